//! Reads the queues' state beside the engine's task, some slots at a time, so that a large queue keeps no other waiting. A
//! change meanwhile makes a read void, and it starts again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::rebuild::Recovered;
use super::{Engine, rebuild};
use crate::domain::id::{Fence, QueueId, Slot};
use crate::store::queue::QueueRow;
use crate::store::{self, Database};
use crate::supervisor::OnEnd;

/// Slots that are read at a time: the pool is for others too.
pub(super) const RECOVERIES: usize = 3;
/// What could not be recovered is tried again after this.
const RECOVER_AGAIN: Duration = Duration::from_millis(500);

/// The request to read.
struct Asked {
    slot: Slot,
    fence: Fence,
    /// This queue alone.
    one: Option<QueueId>,
    /// The rows that are known.
    rows: Vec<QueueRow>,
    /// They may be others by now, and are read first.
    are_stale: bool,
}

/// The state that was read.
pub(super) struct Recovery {
    asked: Asked,
    /// The rows as they are, if they were read.
    rows: Option<Vec<QueueRow>>,
    outcome: Result<Vec<Recovered>, rebuild::Error>,
}

impl Asked {
    async fn read(self, database: &Database, permits: &Arc<Semaphore>) -> Recovery {
        let permit = permits.acquire().await;
        let (mut rows, mut outcome) = (None, Ok(Vec::new()));
        if self.are_stale {
            match store::queue::find_queues_of(database, self.slot).await {
                Ok(found) => rows = Some(found),
                Err(error) => outcome = Err(error.into()),
            }
        }
        if outcome.is_ok() {
            let known = rows.as_ref().unwrap_or(&self.rows);
            outcome = rebuild::recover(database, &self.fence, self.slot, known, self.one).await;
        }
        drop(permit);
        Recovery {
            asked: self,
            rows,
            outcome,
        }
    }
}

impl Engine {
    fn read_state(&self, asked: Asked) {
        let name = match asked.one {
            Some(queue) => format!("recovery of queue {queue}"),
            None => format!("recovery of slot {}", asked.slot),
        };
        let (database, permits) = (self.database.clone(), Arc::clone(&self.recovering));
        let done = self.recoveries.0.clone();
        self.supervisor.spawn(name, OnEnd::Ordinary, async move {
            let _ = done.send(asked.read(&database, &permits).await).await;
        });
    }

    pub(super) fn recover_due(&mut self) {
        let now = Instant::now();
        let due = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.recover_at.is_some_and(|at| at <= now));
        let due: Vec<Slot> = due.map(|(&slot, _)| slot).collect();
        for slot in due {
            self.recover(slot);
        }
        self.recover_due_alone();
    }

    /// Has the state of the slot's queues read, once the lease is held and no former task runs.
    pub(super) fn recover(&mut self, slot: Slot) {
        let Some(state) = self.slots.get_mut(&slot) else {
            return;
        };
        state.recover_at = None;
        let Some(fence) = state.recovers().cloned() else {
            return;
        };
        if self.supervisor.is_stopping() {
            return;
        }
        state.recovery_began();
        let are_stale = state.are_rows_stale;
        let rows = self.queues.values().map(|owned| &owned.row);
        let rows = rows.filter(|row| row.slot == slot).cloned().collect();
        self.read_state(Asked {
            slot,
            fence,
            one: None,
            rows,
            are_stale,
        });
    }

    /// Has the state of one queue read, whose slot's other queues go on.
    pub(super) fn recover_alone(&mut self, queue: QueueId) {
        let Some(owned) = self.queues.get_mut(&queue) else {
            return;
        };
        let row = owned.row.clone();
        let state = self.slots.get(&row.slot).filter(|slot| slot.is_recovered);
        let Some(fence) = state.and_then(|slot| slot.fence.clone()) else {
            // The slot's recovery brings it back.
            return;
        };
        if owned.mailbox.is_some() || owned.is_recovering || self.supervisor.is_stopping() {
            return;
        }
        owned.is_recovering = true;
        self.read_state(Asked {
            slot: row.slot,
            fence,
            one: Some(queue),
            rows: vec![row],
            are_stale: false,
        });
    }

    /// Starts the tasks of the queues that were read, if nothing has changed since.
    pub(super) fn note_recovery(&mut self, recovery: Recovery) {
        if let Some(queue) = recovery.asked.one {
            return self.note_recovery_alone(queue, recovery);
        }
        let (slot, fence) = (recovery.asked.slot, recovery.asked.fence);
        let Some(state) = self.slots.get_mut(&slot) else {
            return;
        };
        if !state.recovery_ended(&fence) {
            return self.recover(slot);
        }
        match recovery.outcome {
            Ok(machines) => {
                if let Some(rows) = recovery.rows {
                    self.take_rows(slot, rows);
                }
                if let Some(state) = self.slots.get_mut(&slot) {
                    state.recovered();
                }
                for recovered in machines {
                    self.start_recovered(recovered, &fence);
                }
            }
            Err(rebuild::Error::Fenced) => {
                self.cluster.fenced(&fence);
                self.forget_fence(&fence, slot);
            }
            Err(error) => {
                tracing::error!(%slot, error = &error as &dyn std::error::Error, "recovering queues failed; trying again");
                if let Some(state) = self.slots.get_mut(&slot) {
                    state.recover_at = Some(Instant::now() + RECOVER_AGAIN);
                }
            }
        }
    }

    /// Starts the queue's task; reads the queue again later where its log could not be looked at.
    fn start_recovered(&mut self, recovered: Recovered, fence: &Fence) {
        if recovered.is_log_locked {
            let queue = recovered.machine.id();
            self.alone.insert(queue, Instant::now() + RECOVER_AGAIN);
        } else {
            self.start_task(recovered, fence);
        }
    }

    fn note_recovery_alone(&mut self, queue: QueueId, recovery: Recovery) {
        let (slot, fence) = (recovery.asked.slot, recovery.asked.fence);
        let Some(owned) = self.queues.get_mut(&queue) else {
            return;
        };
        owned.is_recovering = false;
        let state = self.slots.get(&slot).filter(|slot| slot.is_recovered);
        if state.and_then(|slot| slot.fence.as_ref()) != Some(&fence) || owned.mailbox.is_some() {
            return;
        }
        if recovery.asked.rows != [owned.row.clone()] {
            // It was changed meanwhile.
            return self.recover_alone(queue);
        }
        match recovery.outcome {
            Ok(machines) => {
                for recovered in machines {
                    self.start_recovered(recovered, &fence);
                }
            }
            Err(error) => {
                tracing::warn!(queue = %owned.row.name, error = &error as &dyn std::error::Error, "recovering a queue failed; its slot is read again");
                self.read_again(slot);
            }
        }
    }

    /// The rows of the slot's queues as they are, after a change of one without a known outcome.
    fn take_rows(&mut self, slot: Slot, rows: Vec<QueueRow>) {
        let known = self.queues.values().map(|owned| &owned.row);
        let known = known.filter(|row| row.slot == slot).map(|row| row.id);
        let gone: Vec<QueueId> = known
            .filter(|id| rows.iter().all(|row| row.id != *id))
            .collect();
        for id in gone {
            self.forget(id);
        }
        for row in rows {
            match self.queues.get_mut(&row.id) {
                Some(owned) => {
                    let id = row.id;
                    owned.row = row;
                    self.show_row(id);
                }
                None => self.add(row),
            }
        }
        if let Some(state) = self.slots.get_mut(&slot) {
            state.are_rows_stale = false;
        }
    }
}
