//! Parts with dead letters whose messages are in a leaf of the log that somebody has locked. A letter has a copy of its message and
//! commits with its queue's part, so such a part waits for the lock. The others do not wait with it: it stands aside, and is tried by
//! itself now and then. A try costs everybody 50 ms.
//!
//! While some stand aside, parts with letters share no group: one of them may be the next that is locked out.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::gather::{Gathered, Numbers, number};
use super::submission::{Submission, Written};
use crate::domain::id::Slot;
use crate::store::journal::{Group, GroupPart, GroupSlot};

/// The pause between two tries of parts that were locked out.
const RETRY: Duration = Duration::from_millis(500);
/// A part that is locked out for longer is refused: nothing of it is written, and its queue is read again.
const PATIENCE: Duration = Duration::from_secs(10);

/// The parts that stand aside.
#[derive(Debug, Default)]
pub(super) struct Aside {
    /// They shared a group with one that was locked out, and nobody knows yet whether they are too.
    untried: VecDeque<Submission>,
    /// Since when each is locked out; tried one after the other.
    locked: VecDeque<(Instant, Submission)>,
    retry_at: Option<Instant>,
    /// When the one that is being tried was locked out first.
    tried_since: Option<Instant>,
}

impl Aside {
    pub(super) fn is_empty(&self) -> bool {
        self.untried.is_empty() && self.locked.is_empty()
    }

    /// The next part to be tried by itself.
    pub(super) fn take(&mut self, now: Instant) -> Option<Submission> {
        self.tried_since = None;
        if let Some(part) = self.untried.pop_front() {
            return Some(part);
        }
        if self.retry_at.is_some_and(|at| at > now) {
            return None;
        }
        let (since, part) = self.locked.pop_front()?;
        self.tried_since = Some(since);
        Some(part)
    }

    /// When there is something to try.
    pub(super) fn due_at(&self, now: Instant) -> Option<Instant> {
        match (self.untried.is_empty(), self.locked.is_empty()) {
            (false, _) => Some(now),
            (true, false) => Some(self.retry_at.unwrap_or(now)),
            (true, true) => None,
        }
    }

    /// What was tried is written: the lock may be gone, so the next one is not kept waiting.
    pub(super) fn written(&mut self) {
        if self.tried_since.take().is_some() {
            self.retry_at = None;
        }
    }

    /// Takes in what a group was locked out by: its parts with letters. What is left of it goes under numbers of its own; `None` if that is
    /// nothing. Nothing of the group is written.
    pub(super) fn put(
        &mut self,
        locked_out: Gathered,
        numbers: &mut Numbers,
        now: Instant,
        is_stopping: bool,
    ) -> Option<Gathered> {
        let since = self.tried_since.take().unwrap_or(now);
        let Gathered {
            group,
            waiting,
            probes,
        } = locked_out;
        let is_alone = group.parts.len() == 1;
        let slots: HashMap<Slot, GroupSlot> =
            group.slots.into_iter().map(|of| (of.slot, of)).collect();
        let mut rest = Gathered {
            probes,
            ..Gathered::default()
        };
        let mut numbered: Vec<Slot> = Vec::new();
        // Who waits is in the order of the parts.
        for (part, (queue, slot, done)) in group.parts.into_iter().zip(waiting) {
            let Some(fence) = slots.get(&slot).map(|of| of.fence.clone()) else {
                continue;
            };
            if part.letters.is_empty() {
                if !numbered.contains(&slot) {
                    numbered.push(slot);
                    rest.group.slots.push(number(numbers, slot, fence));
                }
                rest.group.parts.push(part);
                rest.waiting.push((queue, slot, done));
                continue;
            }
            let is_over = now.duration_since(since) >= PATIENCE || is_stopping;
            let part = Box::new(part);
            let submission = Submission::Part { fence, part, done };
            match is_alone {
                false => self.untried.push_back(submission),
                true if is_over => refuse(submission),
                true => {
                    tracing::debug!(%queue, "a dead letter waits for a lock of its message's leaf");
                    self.locked.push_back((since, submission));
                    self.retry_at = Some(now + RETRY);
                }
            }
        }
        let is_nothing = rest.group.parts.is_empty() && rest.probes.is_empty();
        (!is_nothing).then_some(rest)
    }
}

fn refuse(submission: Submission) {
    if let Submission::Part { part, done, .. } = submission {
        tracing::warn!(
            queue = %part.queue,
            "a dead letter's message is in a leaf of the log that another session has locked: nothing is written of it, and its queue is read again"
        );
        let _ = done.send(Written::Refused);
    }
}

/// A group of this part alone.
pub(super) fn alone(submission: Submission, numbers: &mut Numbers) -> Gathered {
    let mut gathered = Gathered::default();
    match submission {
        Submission::Part { fence, part, done } => {
            let slots = vec![number(numbers, part.slot, fence)];
            gathered.waiting.push((part.queue, part.slot, done));
            let parts: Vec<GroupPart> = vec![*part];
            gathered.group = Group { slots, parts };
        }
        Submission::Probe(reply) => gathered.probes.push(reply),
    }
    gathered
}

impl Submission {
    /// Whether it needs messages of the log.
    pub(super) fn has_letters(&self) -> bool {
        matches!(self, Self::Part { part, .. } if !part.letters.is_empty())
    }
}
