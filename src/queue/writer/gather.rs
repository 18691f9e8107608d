//! Gathers one group commit from the parts that have arrived. It is bounded, so that nobody waits long for the writes of
//! others.

use std::collections::{BTreeMap, HashMap};

use tokio::sync::oneshot;

use super::submission::{Submission, Written};
use crate::domain::id::{Epoch, Fence, QueueId, Slot};
use crate::store::journal::{Group, GroupSlot};

/// Most queues in one group.
const GROUP_MAX_PARTS: usize = 1_000;
/// Bytes in a group after which it is sent.
const GROUP_BYTES: usize = 4 * 1024 * 1024;
/// Dead letters in a group after which it is sent: each is a copy of a message.
const GROUP_LETTERS: usize = 64;
/// A part of more bytes is not sent: no part that a queue's task makes comes near it.
const PART_MAX_BYTES: usize = 32 * 1024 * 1024;

/// The queues that wait for their parts of a group.
type Waiting = Vec<(QueueId, Slot, oneshot::Sender<Written>)>;

/// A group, and who waits for it.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) group: Group,
    pub(super) waiting: Waiting,
    pub(super) probes: Vec<oneshot::Sender<()>>,
}

/// Parts that arrived and cannot go with the group at hand.
#[derive(Default)]
pub(super) struct Held {
    pub(super) part: Option<Submission>,
    pub(super) fold: Option<Submission>,
    /// The last job was a part that stood aside: what has come meanwhile is first.
    pub(super) was_aside: bool,
}

impl Held {
    pub(super) fn take(&mut self) -> Option<Submission> {
        self.part.take().or_else(|| self.fold.take())
    }
}

/// A group that is being put together.
#[derive(Default)]
pub(super) struct Gathering {
    pub(super) gathered: Gathered,
    pub(super) slots: BTreeMap<String, GroupSlot>,
    bytes: usize,
    letters: usize,
    /// The queue whose checkpoint has a part in it.
    pub(super) folding: Option<QueueId>,
}

impl Gathering {
    pub(super) fn is_full(&self) -> bool {
        self.gathered.group.parts.len() >= GROUP_MAX_PARTS
            || self.bytes >= GROUP_BYTES
            || self.letters >= GROUP_LETTERS
    }

    /// Takes it in, or gives it back if it cannot share a group with the present parts.
    pub(super) fn add(
        &mut self,
        submission: Submission,
        numbers: &mut Numbers,
    ) -> Result<(), Submission> {
        let (fence, part, done) = match submission {
            Submission::Part { fence, part, done } => (fence, part, done),
            Submission::Probe(reply) => {
                self.gathered.probes.push(reply);
                return Ok(());
            }
        };
        let size = part.size();
        if size > PART_MAX_BYTES {
            tracing::error!(
                queue = %part.queue, bytes = size, most = PART_MAX_BYTES,
                "a queue's next write is too large: the queue stands still, the others go on"
            );
            let _ = done.send(Written::Refused);
            return Ok(());
        }
        // A queue of a former epoch beside one of the present.
        let slot = self.slots.get(&fence.lease);
        let is_of_another_time = slot.is_some_and(|slot| slot.fence.epoch != fence.epoch);
        // Its queue tells the outcome of a part.
        let mut parts = self.gathered.group.parts.iter();
        let is_twice = match part.is_fold() {
            true => self.folding.is_some() || parts.any(|other| other.queue == part.queue),
            false => self.folding == Some(part.queue),
        };
        if is_of_another_time || is_twice {
            return Err(Submission::Part { fence, part, done });
        }
        if part.is_fold() {
            self.folding = Some(part.queue);
        }
        self.bytes += size;
        self.letters += part.letters.len();
        self.gathered.waiting.push((part.queue, part.slot, done));
        self.slots
            .entry(fence.lease.clone())
            .or_insert_with(|| number(numbers, part.slot, fence));
        self.gathered.group.parts.push(*part);
        Ok(())
    }
}

/// The last number used of each slot, and under which epoch.
pub(super) type Numbers = HashMap<Slot, (Epoch, i64)>;

/// The slot's place in the next group, under its next number.
pub(super) fn number(numbers: &mut Numbers, slot: Slot, fence: Fence) -> GroupSlot {
    let counter = numbers.entry(slot).or_insert((fence.epoch, 0));
    if counter.0 != fence.epoch {
        *counter = (fence.epoch, 0);
    }
    counter.1 += 1;
    GroupSlot {
        slot,
        number: counter.1,
        fence,
    }
}
