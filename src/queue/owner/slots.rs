//! The slots of this process: recovered when the lease is taken, at the new epoch; finished and given back when the lease
//! is assigned to another node; dropped when the epoch is gone. When a queue's task ends by a refused write, its whole slot
//! is recovered, since its state in memory ran ahead of the journal.

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::Engine;
use super::tenancy::{Change, SlotState};
use crate::domain::id::{Fence, Slot};
use crate::failpoint;
use crate::queue::ask::{Command, Ended, Why};
use crate::supervisor::{OnEnd, Supervisor};

impl Engine {
    /// Wants the slot's lease from now on.
    pub(super) fn hold(&self, slot: Slot) {
        let fence = self.cluster.hold(slot.lease_name());
        let changes = self.fences.0.clone();
        let supervisor = self.supervisor.clone();
        self.supervisor.spawn(
            format!("queue slot {slot}"),
            OnEnd::Ordinary,
            follow_fence(slot, fence, changes, supervisor),
        );
    }

    pub(super) fn change_fence(&mut self, slot: Slot, fence: Option<Fence>) {
        let Some(state) = self.slots.get_mut(&slot) else {
            return;
        };
        match state.change(fence) {
            // Or it came and is to go before it was heard of here.
            Change::Nothing => self.note_yielded(slot),
            Change::Yield => self.yield_slot(slot),
            Change::Recover { is_next } => {
                // Whoever had it in between may have changed its queues.
                state.are_rows_stale |= !is_next && self.catalogue.had_peers;
                failpoint::reach("recovery.epoch_taken");
                self.drop_slot(slot);
                self.recover(slot);
            }
        }
    }

    /// Has the slot's tasks finish: what they have decided is written, and their state is journaled, as at the process's end,
    /// while the lease is still held. If it is lost already, their writes are refused, and nothing is the worse for it.
    fn yield_slot(&mut self, slot: Slot) {
        for mailbox in self.take_mailboxes(slot) {
            self.post(&mailbox, Command::Yield);
        }
        self.note_yielded(slot);
    }

    /// Lets the lease go once nothing runs under it.
    fn note_yielded(&self, slot: Slot) {
        let state = self.slots.get(&slot);
        if state.is_some_and(SlotState::is_vacant) {
            failpoint::reach("hand_over.flushed");
            self.cluster.yielded(&slot.lease_name());
        }
    }

    /// Ends the slot's tasks; what they have in memory is void.
    fn drop_slot(&mut self, slot: Slot) {
        for mailbox in self.take_mailboxes(slot) {
            self.post(&mailbox, Command::End);
        }
    }

    /// Lets nobody in; returns the mailboxes of the running tasks.
    fn take_mailboxes(&mut self, slot: Slot) -> Vec<mpsc::Sender<Command>> {
        if let Some(state) = self.slots.get_mut(&slot) {
            state.drop_state();
        }
        self.forget_behind_of(slot);
        let of_slot = self
            .queues
            .values_mut()
            .filter(|owned| owned.row.slot == slot);
        let mailboxes: Vec<_> = of_slot.filter_map(|owned| owned.mailbox.take()).collect();
        let mut known = self.write_known();
        for known in known.values_mut() {
            if Slot::of(known.description.id) == slot {
                known.mailbox = None;
            }
        }
        mailboxes
    }

    pub(super) fn note_end(&mut self, ended: &Ended) {
        self.forget_task(ended);
        self.note_yielded(ended.slot);
        if ended.why == Why::Fenced {
            self.shared.metrics.fenced.inc();
            tracing::warn!(queue = %ended.queue, slot = %ended.slot, epoch = %ended.fence.epoch, "the slot was taken over: its queues are dropped");
        }
        if ended.why == Why::Refused && self.recover_alone_later(ended) {
            return;
        }
        if ended.why != Why::Told {
            // Also when the writer ended: what was sent before may still be under way on a connection that was lost, and
            // must not be written behind the recovery's read. A new epoch shuts it out.
            self.cluster.fenced(&ended.fence);
            self.forget_fence(&ended.fence, ended.slot);
        }
        self.recover(ended.slot);
    }

    pub(super) fn forget_fence(&mut self, fence: &Fence, slot: Slot) {
        let Some(state) = self.slots.get_mut(&slot) else {
            return;
        };
        if state.forget(fence) {
            self.drop_slot(slot);
        }
    }

    /// Has the slot's queues read again, their rows included.
    pub(super) fn read_again(&mut self, slot: Slot) {
        self.drop_slot(slot);
        if let Some(state) = self.slots.get_mut(&slot) {
            state.are_rows_stale = true;
            state.recover_at = Some(Instant::now());
        }
    }

    pub(super) fn forget_task(&mut self, ended: &Ended) {
        if let Some(slot) = self.slots.get_mut(&ended.slot) {
            slot.task_ended();
        }
    }
}

/// Passes a lease's changes on, the first state included.
async fn follow_fence(
    slot: Slot,
    mut fence: watch::Receiver<Option<Fence>>,
    changes: mpsc::Sender<(Slot, Option<Fence>)>,
    supervisor: Supervisor,
) {
    loop {
        let now = fence.borrow_and_update().clone();
        if changes.send((slot, now)).await.is_err() {
            return;
        }
        let changed = tokio::select! {
            changed = fence.changed() => changed.is_ok(),
            () = supervisor.stopping() => false,
        };
        if !changed {
            return;
        }
    }
}
