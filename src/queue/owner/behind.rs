//! Queues whose log is older than their state: the log alone was restored from an earlier time, and lacks messages that the
//! queue has handed out and settled, or has grown again and has other messages there. Such a queue does nothing: going on
//! would skip messages that it never saw. It refuses every request with this reason, until a person seeks it and accepts
//! the loss.
//!
//! A queue's state is compared with the log whenever it is read: how far the queue has looked, and the message at its
//! watermark, which is stored now and then. Queues and logs of one snapshot of the database always agree.

use super::Engine;
use super::rebuild::Recovered;
use crate::domain::id::{Offset, QueueId, Slot};
use crate::domain::queue::At;
use crate::queue::api::LogBehind;
use crate::store;
use crate::store::journal::Position;

/// Most places that are noted at a time.
const MARKS_MAX: usize = 1_000;

/// A queue whose log is behind it.
#[derive(Debug)]
pub(super) struct Behind {
    slot: Slot,
    /// The state that its next generation begins with: its dead letters stay.
    pub(super) carried: Vec<u8>,
}

impl Engine {
    /// Keeps a queue from being served.
    pub(super) fn note_behind(&mut self, recovered: Recovered, end: Offset) {
        let machine = recovered.machine;
        let (id, through) = (machine.id(), machine.journaled_through());
        let Some(owned) = self.queues.get(&id) else {
            return;
        };
        let (name, slot) = (owned.row.name.clone(), owned.row.slot);
        tracing::error!(
            queue = %name, through = through.0, end = end.0,
            "the log is older than the queue's state: it was restored without the queue. The queue is not served until a seek with accept_loss"
        );
        if let Some(known) = self.write_known().get_mut(&name) {
            known.mailbox = None;
            known.description.log_behind = Some(LogBehind { through, end });
        }
        let carried = machine.carried(true, At::from(self.cluster.now()));
        self.behind.insert(id, Behind { slot, carried });
        self.count_behind();
    }

    /// The queue is about to be read again, or is gone.
    pub(super) fn forget_behind(&mut self, queue: QueueId) {
        if self.behind.remove(&queue).is_none() {
            return;
        }
        let name = self.queues.get(&queue).map(|owned| owned.row.name.clone());
        if let Some(name) = name
            && let Some(known) = self.write_known().get_mut(&name)
        {
            known.description.log_behind = None;
        }
        self.count_behind();
    }

    /// The same of all queues of a slot.
    pub(super) fn forget_behind_of(&mut self, slot: Slot) {
        let of_slot = self.behind.iter().filter(|(_, behind)| behind.slot == slot);
        let of_slot: Vec<QueueId> = of_slot.map(|(&queue, _)| queue).collect();
        for queue in of_slot {
            self.forget_behind(queue);
        }
    }

    fn count_behind(&self) {
        self.shared.metrics.behind.set(self.behind.len() as i64);
    }

    /// Notes which messages stand where queues have settled everything up to.
    pub(super) fn write_marks(&mut self) {
        const DUTY: &str = "queue marks";
        if self.errands.is_busy(DUTY) {
            return;
        }
        let mut places = Vec::new();
        for owned in self.queues.values_mut() {
            let place = (owned.row.generation, owned.settled_through());
            let is_new = owned.mailbox.is_some() && owned.marked != Some(place);
            if is_new && place.1 >= owned.row.start_offset && places.len() < MARKS_MAX {
                owned.marked = Some(place);
                places.push(Position {
                    queue: owned.row.id,
                    generation: place.0,
                    through: place.1,
                });
            }
        }
        if places.is_empty() {
            return;
        }
        self.beside(DUTY, move |errand| async move {
            if let Err(error) = store::mark::write_marks(&errand.database, &places).await {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "storing the places of queues failed; trying again when they have moved"
                );
            }
        });
    }
}
