//! Decides, without I/O, what an engine does with a slot as its lease comes and goes: `slots` carries it out, and
//! `simulation` runs it by seed.
//!
//! A slot's queues are read once the lease is shown and no earlier task runs: a task's state runs ahead of the journal, and
//! its last writes must not come after the read. The lease goes when nothing runs.

use tokio::time::Instant;

use crate::domain::id::{Epoch, Fence};

/// A slot that queues hash into, as this process has it.
#[derive(Debug, Default)]
pub(super) struct SlotState {
    /// The lease, while it is held.
    pub(super) fence: Option<Fence>,
    /// Its queues' state is at hand under this fence.
    pub(super) is_recovered: bool,
    /// Its queues' rows may be others than known: after a change without a known outcome, or another node's time with the slot.
    /// They are read again with their state.
    pub(super) are_rows_stale: bool,
    /// Tasks that run. A slot is recovered only when none does.
    pub(super) running: usize,
    pub(super) recover_at: Option<Instant>,
    /// Its queues' state is being read.
    is_recovering: bool,
    /// A read under way is void: something has changed since.
    is_void: bool,
    /// The epoch at which it was held last.
    last_epoch: Option<Epoch>,
}

/// The reaction to a change of the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// It is as it was.
    Nothing,
    /// It is to go: tasks write what they have decided, then the lease is free.
    Yield,
    /// It is there: tasks of a former time are dropped, then the state is read.
    Recover {
        /// Nobody had it since this process did.
        is_next: bool,
    },
}

impl SlotState {
    /// The lease's watch shows something.
    pub(super) fn change(&mut self, fence: Option<Fence>) -> Change {
        if self.fence == fence {
            return Change::Nothing;
        }
        let change = match &fence {
            None => Change::Yield,
            Some(fence) => {
                let last = self.last_epoch.replace(fence.epoch);
                Change::Recover {
                    is_next: last.is_some_and(|last| last.0 + 1 == fence.epoch.0),
                }
            }
        };
        self.fence = fence;
        self.drop_state();
        change
    }

    /// Whether the lease can go: it is to, and nothing runs under it.
    pub(super) fn is_vacant(&self) -> bool {
        self.fence.is_none() && self.running == 0
    }

    /// The fence to recover under, if it is time to.
    pub(super) fn recovers(&self) -> Option<&Fence> {
        let is_time = !self.is_recovered && !self.is_recovering && self.running == 0;
        self.fence.as_ref().filter(|_| is_time)
    }

    /// The state is about to be read.
    pub(super) fn recovery_began(&mut self) {
        self.is_recovering = true;
        self.is_void = false;
    }

    /// Notes that the state was read under this fence. Returns whether to use it; otherwise it must be read again, if there is still a
    /// lease.
    pub(super) fn recovery_ended(&mut self, fence: &Fence) -> bool {
        self.is_recovering = false;
        let is_void = std::mem::take(&mut self.is_void);
        !is_void && self.fence.as_ref() == Some(fence)
    }

    /// Notes that a queue of the slot has changed: a read under way may have its former state.
    pub(super) fn void_recovery(&mut self) {
        self.is_void |= self.is_recovering;
    }

    /// The state at hand is void.
    pub(super) fn drop_state(&mut self) {
        self.is_recovered = false;
        self.void_recovery();
    }

    /// The state was read, and tasks go by it.
    pub(super) fn recovered(&mut self) {
        self.is_recovered = true;
    }

    pub(super) fn task_began(&mut self) {
        self.running += 1;
    }

    pub(super) fn task_ended(&mut self) {
        self.running = self.running.saturating_sub(1);
    }

    /// A write or a read under this fence was refused, or its outcome is not known. Whether it was the present one: then its tasks
    /// are dropped, and nothing is read before a new epoch.
    pub(super) fn forget(&mut self, fence: &Fence) -> bool {
        let is_present = self.fence.as_ref() == Some(fence);
        if is_present {
            self.fence = None;
            self.drop_state();
        }
        is_present
    }
}
