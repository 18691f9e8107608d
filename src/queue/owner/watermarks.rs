//! The watermarks of each stream's queues, for its retention, which one node runs for all. Each node writes the watermarks
//! of its slots' queues now and then. They stay true, since a queue goes back only by a seek, and retention learns of seeks
//! by the queue's row.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Engine, Owned};
use crate::domain::id::{Offset, SLOT_COUNT, Slot, StreamId};
use crate::store;

/// How often nodes tell each other.
const SHARE_EVERY: Duration = Duration::from_secs(5);

/// How often it is asked which streams have no queue at all.
const UNREAD_EVERY: Duration = Duration::from_secs(6);

/// The reports of other nodes about their slots.
#[derive(Debug, Default)]
pub(super) struct Told {
    shared_at: Option<Instant>,
    unread_at: Option<Instant>,
    /// By slot and stream: as of when, and up to where.
    told: HashMap<(Slot, StreamId), (Instant, Offset)>,
    loads: Loads,
}

/// Deliveries in a second out of each slot, smoothed over a minute or so.
#[derive(Debug, Default)]
struct Loads {
    /// By slot: how many there were, when last counted.
    counted: BTreeMap<Slot, u64>,
    rates: BTreeMap<Slot, f64>,
}

/// How much of the latest count is in a rate.
const LATEST: f64 = 0.1;

impl Loads {
    /// Takes in how many deliveries there were by now out of each slot that is held, and gives the rates by slot.
    fn count(&mut self, counted: BTreeMap<Slot, u64>, over: Duration) -> Vec<i32> {
        let mut rates = BTreeMap::new();
        for (&slot, &count) in &counted {
            // A task that began anew counts from 0; a slot that has just come is counted from now on.
            let before = self.counted.get(&slot).copied().unwrap_or(count);
            let now = count.saturating_sub(before) as f64 / over.as_secs_f64().max(0.001);
            let rate = self.rates.get(&slot).copied().unwrap_or(now);
            rates.insert(slot, rate + LATEST * (now - rate));
        }
        (self.counted, self.rates) = (counted, rates);
        let slots = (0..SLOT_COUNT).map(Slot);
        let rates = slots.map(|slot| self.rates.get(&slot).copied().unwrap_or_default());
        rates.map(|rate| rate.round() as i32).collect()
    }
}

impl Owned {
    /// Up to where the queue has settled all that it matches, as far as this process knows.
    pub(super) fn settled_through(&self) -> Offset {
        // About to go back, maybe: nothing is settled until it is known how far.
        if self.is_renewing {
            return Offset(0);
        }
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
    pub(super) fn tell_watermarks(&mut self) {
        self.share_watermarks();
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
        self.release_unread();
    }

    /// Tells streams that no queue reads that nothing is needed.
    fn release_unread(&mut self) {
        let asked = Instant::now();
        let is_known = |at: Instant| asked.duration_since(at) < UNREAD_EVERY;
        if self.told.unread_at.is_some_and(is_known) {
            return;
        }
        self.told.unread_at = Some(asked);
        self.beside("queue streams", move |errand| async move {
            let unread = store::queue::find_streams_without_queues(&errand.database).await;
            let release = move |engine: &mut Self| {
                for stream in unread.unwrap_or_default() {
                    let mut rows = engine.queues.values().map(|owned| &owned.row);
                    if rows.all(|row| row.stream_id != stream) {
                        let all = Offset(i64::MAX);
                        engine.stream.set_watermark_as_of(stream, all, asked);
                    }
                }
            };
            let _ = errand.visit(release).await;
        });
    }

    fn is_held(&self, slot: Slot) -> bool {
        self.slots
            .get(&slot)
            .is_some_and(|state| state.fence.is_some())
    }

    /// Writes down how far the queues of this process's slots are, and reads what others say of theirs, while there are
    /// others.
    fn share_watermarks(&mut self) {
        const DUTY: &str = "queue watermarks";
        let now = Instant::now();
        let is_time = |at: Instant| now.duration_since(at) >= SHARE_EVERY;
        if !self.catalogue.had_peers
            || !self.told.shared_at.is_none_or(is_time)
            || self.errands.is_busy(DUTY)
        {
            return;
        }
        let last = self.told.shared_at.replace(now);
        let over = last.map_or(SHARE_EVERY, |last| now.duration_since(last));
        let incarnation = self.cluster.incarnation();
        self.beside(DUTY, move |errand| async move {
            let database = &errand.database;
            let telling = errand.telling.lock().await;
            let Ok((as_of, own, loads)) = errand.visit(move |engine| engine.count(over)).await
            else {
                return;
            };
            let shared = async {
                // What is told was so then.
                let age = as_of.elapsed();
                store::queue::write_watermarks(database, incarnation, age, &own).await?;
                drop(telling);
                store::cluster::note_loads(database, incarnation, &loads).await?;
                let asked = Instant::now();
                let told = store::queue::find_watermarks(database, incarnation).await?;
                Ok::<_, store::Error>((asked, told))
            };
            match shared.await {
                Ok((asked, told)) => {
                    let _ = errand
                        .visit(move |engine| engine.note_watermarks(asked, told))
                        .await;
                }
                Err(error) => tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "telling other nodes the queues' watermarks failed; trying again"
                ),
            }
        });
    }

    /// How far the queues of this process's slots are, as of when that holds, and the load of each slot.
    fn count(&mut self, over: Duration) -> (Instant, Vec<store::queue::Told>, Vec<i32>) {
        let mut delivered: BTreeMap<Slot, u64> = BTreeMap::new();
        let mut own: BTreeMap<(Slot, StreamId), Offset> = BTreeMap::new();
        for owned in self.queues.values() {
            let slot = owned.row.slot;
            if self.is_held(slot) {
                *delivered.entry(slot).or_default() +=
                    owned.progress.delivered.load(Ordering::Relaxed);
                let through = owned.settled_through();
                let lowest = own.entry((slot, owned.row.stream_id)).or_insert(through);
                *lowest = through.min(*lowest);
            }
        }
        let own = own.into_iter();
        let own = own.map(|((slot, stream), through)| (slot, stream, through));
        let loads = self.told.loads.count(delivered, over);
        (self.catalogue.as_of, own.collect(), loads)
    }

    /// Takes note of what other nodes say of the slots that they hold.
    fn note_watermarks(&mut self, asked: Instant, told: Vec<(i64, store::queue::Told, Duration)>) {
        let view = self.cluster.view();
        self.told.told.clear();
        for (node, (slot, stream, through), age) in told {
            let lease = view.leases.get(&slot.lease_name());
            let is_holder = lease.is_some_and(|lease| lease.holder == Some(node));
            if let Some(as_of) = asked.checked_sub(age).filter(|_| is_holder) {
                self.told.told.insert((slot, stream), (as_of, through));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_counted_by_slot() {
        let mut loads = Loads::default();
        let ten = Duration::from_secs(10);
        let counted = |one, two| BTreeMap::from([(Slot(1), one), (Slot(2), two)]);
        assert_eq!(
            loads.count(counted(5_000, 0), ten)[1],
            0,
            "not what was before"
        );
        for round in 1..100 {
            loads.count(counted(5_000 + round * 1_000, round * 10), ten);
        }
        let rates = loads.count(counted(105_000, 1_000), ten);
        assert_eq!((rates.len(), rates[0], rates[1], rates[2]), (64, 0, 100, 1));
        let rates = loads.count(counted(0, 1_010), ten);
        assert_eq!((rates[1], rates[2]), (90, 1), "a task that began anew");
        let rates = loads.count(BTreeMap::new(), ten);
        assert!(
            rates.iter().all(|rate| *rate == 0),
            "nothing of what others hold"
        );
    }
}
