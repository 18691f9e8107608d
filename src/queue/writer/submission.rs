//! What is asked of the writer, its answers, and what it shows of Postgres.

use std::sync::atomic::{AtomicI64, Ordering};

use tokio::sync::{oneshot, watch};

use crate::domain::id::Fence;
use crate::domain::queue::At;
use crate::store::journal::GroupPart;

/// The outcome of a queue's part of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::queue) enum Written {
    /// Committed, in this turn of the journal, in the group of this number.
    Committed { turn: i64, number: i64 },
    /// The slot was taken over: nothing is written.
    Fenced,
    /// The slot was taken over, and the connection was lost before: nobody can say whether it is written.
    Unknown,
    /// The database refuses it: nothing is written.
    Refused,
}

/// The requests to the writer.
#[derive(Debug)]
pub(in crate::queue) enum Submission {
    Part {
        fence: Fence,
        part: Box<GroupPart>,
        done: oneshot::Sender<Written>,
    },
    /// Answered when Postgres has answered.
    Probe(oneshot::Sender<()>),
}

/// Whether Postgres answers, as the queues see it. Changes only when an outage begins or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::queue) struct Outage {
    /// Postgres cannot be reached: the queues stand still.
    pub(in crate::queue) standing: bool,
    /// By how much, in milliseconds, deadlines have moved since the process began.
    pub(in crate::queue) moved: i64,
}

/// State that the queues share with the writer.
#[derive(Debug)]
pub(in crate::queue) struct Contact {
    /// Postgres was surely reachable at this moment: the beginning of the last call that it answered.
    pub(super) confirmed: AtomicI64,
    pub(super) outage: watch::Sender<Outage>,
}

impl Contact {
    pub(in crate::queue) fn new(now: At) -> Self {
        Self {
            confirmed: AtomicI64::new(now.0),
            outage: watch::Sender::new(Outage::default()),
        }
    }

    pub(in crate::queue) fn confirmed(&self) -> At {
        At(self.confirmed.load(Ordering::Acquire))
    }

    pub(in crate::queue) fn outage(&self) -> watch::Receiver<Outage> {
        self.outage.subscribe()
    }
}
