//! A queue whose journal the database refuses, because of a defect or a constraint that somebody added. It is recovered
//! alone, later each time, and the other queues of its slot go on.

use std::time::Duration;

use tokio::time::Instant;

use super::Engine;
use crate::domain::id::QueueId;
use crate::queue::ask::Ended;

/// The pause after the first refusal; it doubles with each.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Refusals are forgotten when a queue has worked for so long.
const FORGIVEN: Duration = Duration::from_secs(300);

impl Engine {
    /// Has the queue read again after a pause: the refusal is known, so none of its writes is under way, and the writes of the
    /// slot's other queues stand. False when the slot is recovered anyway, with all its queues.
    pub(super) fn recover_alone_later(&mut self, ended: &Ended) -> bool {
        let is_held = self
            .slots
            .get(&ended.slot)
            .is_some_and(|slot| slot.is_recovered && slot.fence.as_ref() == Some(&ended.fence));
        let Some(owned) = self.queues.get_mut(&ended.queue).filter(|_| is_held) else {
            return false;
        };
        owned.mailbox = None;
        let is_first = owned
            .refused_at
            .is_none_or(|at| at.elapsed() > FORGIVEN + PAUSE_MAX);
        owned.refusals = if is_first { 0 } else { owned.refusals + 1 };
        owned.refused_at = Some(Instant::now());
        let pause = PAUSE
            .saturating_mul(1 << owned.refusals.min(10))
            .min(PAUSE_MAX);
        let name = owned.row.name.clone();
        tracing::error!(queue = %name, ?pause, "the queue's journal was refused: it is read again after a pause");
        if let Some(known) = self.write_known().get_mut(&name) {
            known.mailbox = None;
        }
        self.alone.insert(ended.queue, Instant::now() + pause);
        true
    }

    pub(super) fn recover_due_alone(&mut self) {
        let now = Instant::now();
        let due = self.alone.iter().filter(|(_, at)| **at <= now);
        let due: Vec<QueueId> = due.map(|(&queue, _)| queue).collect();
        for queue in due {
            self.alone.remove(&queue);
            self.recover_alone(queue);
        }
    }
}
