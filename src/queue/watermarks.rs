//! How far the queues of each stream are, for its retention, which runs on one node for all. Each node writes down now and then
//! how far those of its slots are; what it says stays true, since a queue goes back by a seek only, and retention is told of
//! those by the queue's row.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::engine::{Engine, Owned};
use crate::domain::id::{Offset, Slot, StreamId};
use crate::store;

/// How often nodes tell each other.
const SHARE_EVERY: Duration = Duration::from_secs(5);

/// What other nodes say of their slots.
#[derive(Debug, Default)]
pub(in crate::queue) struct Told {
    shared_at: Option<Instant>,
    /// By slot and stream: as of when, and up to where.
    told: HashMap<(Slot, StreamId), (Instant, Offset)>,
}

impl Owned {
    /// Up to where the queue has settled all that it matches, as far as this process knows.
    pub(in crate::queue) fn settled_through(&self) -> Offset {
        // Not recovered: nothing is known of it but where it began.
        if self.mailbox.is_none() {
            return Offset(self.row.start_offset.0 - 1);
        }
        let watermark = Offset(self.progress.watermark.load(Ordering::Acquire));
        self.idle_through()
            .map_or(watermark, |through| watermark.max(through))
    }
}

impl Engine {
    /// Tells each stream how far all its queues have settled. One with no queues is told that nothing is needed.
    pub(in crate::queue) async fn tell_watermarks(&mut self) {
        let now = Instant::now();
        if self.catalogue.had_peers
            && self
                .told
                .shared_at
                .is_none_or(|at| now.duration_since(at) >= SHARE_EVERY)
        {
            self.told.shared_at = Some(now);
            if let Err(error) = self.share_watermarks().await {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "telling other nodes how far queues are failed; trying again"
                );
            }
        }
        let mut lowest: HashMap<StreamId, (Offset, Instant)> = HashMap::new();
        for owned in self.queues.values() {
            let stream = owned.row.stream_id;
            let told = self.told.told.get(&(owned.row.slot, stream));
            let (as_of, through) = match told.filter(|_| !self.is_held(owned.row.slot)) {
                Some(&told) => told,
                None => (self.catalogue.as_of, owned.settled_through()),
            };
            let entry = lowest
                .entry(stream)
                .or_insert((through, self.catalogue.as_of));
            *entry = (through.min(entry.0), as_of.min(entry.1));
        }
        for (&stream, &(watermark, as_of)) in &lowest {
            self.stream.set_watermark_as_of(stream, watermark, as_of);
        }
        let asked = Instant::now();
        let unread = store::queue::find_streams_without_queues(&self.database).await;
        for stream in unread.unwrap_or_default() {
            if !lowest.contains_key(&stream) {
                let all = Offset(i64::MAX);
                self.stream.set_watermark_as_of(stream, all, asked);
            }
        }
    }

    fn is_held(&self, slot: Slot) -> bool {
        self.slots
            .get(&slot)
            .is_some_and(|state| state.fence.is_some())
    }

    async fn share_watermarks(&mut self) -> Result<(), store::Error> {
        let mut own: BTreeMap<(Slot, StreamId), Offset> = BTreeMap::new();
        for owned in self.queues.values() {
            let slot = owned.row.slot;
            if self.is_held(slot) {
                let through = owned.settled_through();
                let lowest = own.entry((slot, owned.row.stream_id)).or_insert(through);
                *lowest = through.min(*lowest);
            }
        }
        let own = own.into_iter();
        let own: Vec<store::queue::Told> = own
            .map(|((slot, stream), through)| (slot, stream, through))
            .collect();
        let incarnation = self.cluster.incarnation();
        let age = self.catalogue.as_of.elapsed();
        store::queue::write_watermarks(&self.database, incarnation, age, &own).await?;
        let asked = Instant::now();
        let told = store::queue::find_watermarks(&self.database, incarnation).await?;
        let view = self.cluster.view();
        self.told.told.clear();
        for (node, (slot, stream, through), age) in told {
            let lease = view.leases.get(&slot.lease_name());
            let is_holder = lease.is_some_and(|lease| lease.holder == Some(node));
            if let Some(as_of) = asked.checked_sub(age).filter(|_| is_holder) {
                self.told.told.insert((slot, stream), (as_of, through));
            }
        }
        Ok(())
    }
}
