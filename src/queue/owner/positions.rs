//! The positions of queues that keep up: one row per slot now and then, instead of a journal row per queue. A queue with
//! nothing unsettled, and everything committed, has settled all matching messages up to the dispatcher's place; after a
//! restart its scan goes on from there.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::{Engine, Owned};
use crate::domain::id::{Fence, Offset, Slot};
use crate::store;
use crate::store::journal::{Position, SlotPositions};

impl Owned {
    /// Up to where the queue keeps up with nothing unsettled; None when it does not.
    pub(super) fn idle_through(&self) -> Option<Offset> {
        // In this order: see `Dispatch::take` and `Task::take_in`, which clear the flag before they empty the feed.
        let done = self.dispatch.done();
        let is_fed_out = self.feed.is_fed_out();
        let is_idle = is_fed_out && self.progress.idle.load(Ordering::SeqCst);
        (is_idle && self.mailbox.is_some()).then_some(done)
    }
}

impl Engine {
    /// Writes the slots' rows in which some queue has moved far enough. What fails is written the next time.
    pub(super) fn write_positions(&mut self) {
        const DUTY: &str = "queue positions";
        if self.errands.is_busy(DUTY) {
            return;
        }
        let worth = self.options.position_worth;
        let mut moved: BTreeSet<Slot> = BTreeSet::new();
        for owned in self.queues.values_mut() {
            let generation = owned.row.generation;
            let Some(through) = owned.idle_through() else {
                continue;
            };
            let before = owned.position.filter(|(of, _)| *of == generation);
            if before.is_none_or(|(_, before)| through.0 - before.0 >= worth) {
                owned.position = Some((generation, through));
                moved.insert(owned.row.slot);
            }
        }
        let held = |slot: Slot| {
            let state = self.slots.get(&slot).filter(|state| state.is_recovered)?;
            Some((slot, state.fence.clone()?))
        };
        let slots: Vec<(Slot, Fence)> = moved.into_iter().filter_map(held).collect();
        if slots.is_empty() {
            return;
        }
        let rows = slots.into_iter().map(|(slot, fence)| SlotPositions {
            slot,
            fence,
            positions: self.positions(slot),
        });
        let rows: Vec<SlotPositions> = rows.collect();
        let incarnation = self.cluster.incarnation();
        self.beside(DUTY, move |errand| async move {
            let written = store::journal::write_positions(&errand.database, incarnation, &rows);
            if let Err(error) = written.await {
                // Known to nobody but this process: after a restart the scan begins earlier. Nothing is lost by it.
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "writing the positions of queues failed; trying again"
                );
            }
        });
    }

    /// All that is known of the slot's queues: one that has something to do at the moment keeps the position that it had.
    fn positions(&self, slot: Slot) -> Vec<Position> {
        let of_slot = self.queues.values().filter(|owned| owned.row.slot == slot);
        let known = of_slot.filter_map(|owned| {
            let (generation, through) = owned.position?;
            (generation == owned.row.generation).then_some(Position {
                queue: owned.row.id,
                generation,
                through,
            })
        });
        known.collect()
    }
}
