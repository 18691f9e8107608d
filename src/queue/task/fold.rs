//! A queue's checkpoints: its journal rows are folded into them, so that their segment can go. Most checkpoints fit in
//! their heads, which are written with the part whose state they hold. Of larger ones the chunks are written one after
//! another, while the queue goes on deciding, and the head when all of them are written; until then the former checkpoint
//! stands.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use super::Task;
use crate::domain::queue::{Chunk, ChunkId, Stored};
use crate::queue::ask::Why;
use crate::queue::writer::{Submission, Written};
use crate::store::journal::{CheckpointHead, GroupPart};

/// Bytes of chunks in one part.
const TOGETHER: usize = 256 * 1024;

/// A task's knowledge of its checkpoints.
#[derive(Debug, Default)]
pub(super) struct Folds {
    /// The journal holds rows that are to go.
    is_wanted: bool,
    stored: Stored,
    /// The one that is being written.
    now: Option<Fold>,
}

/// A checkpoint whose chunks are being written.
#[derive(Debug)]
struct Fold {
    head: Vec<u8>,
    names: Vec<ChunkId>,
    chunks: VecDeque<Chunk>,
    /// The group that it is as of, once that is committed.
    as_of: Option<i64>,
    /// The turn of the first journal row that it does not hold.
    unfolded_turn: Option<i64>,
    /// The part that the writer has.
    sent: Option<oneshot::Receiver<Written>>,
    is_head_sent: bool,
}

/// The work of a part for a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum InPart {
    Nothing,
    /// One of these chunks is in it, whole.
    Whole(Vec<ChunkId>),
    /// It is what one is as of.
    Begins,
}

impl Folds {
    /// A checkpoint is wanted if the first row that none holds is of an earlier turn.
    pub(super) fn want(&mut self, unfolded_turn: Option<i64>, before_turn: i64) {
        let unfolded = match &self.now {
            Some(now) => now.unfolded_turn,
            None => unfolded_turn,
        };
        self.is_wanted |= unfolded.is_some_and(|turn| turn < before_turn);
    }

    /// Whether a checkpoint is wanted and could begin.
    pub(super) fn waits(&self) -> bool {
        self.is_wanted && self.now.is_none()
    }

    /// Whether something is with the writer.
    pub(super) fn is_sent(&self) -> bool {
        self.now.as_ref().is_some_and(|now| now.sent.is_some())
    }
}

impl Task {
    /// Whether a checkpoint begins with the next part. It holds the current state, so it goes with the last piece of the decisions.
    pub(super) fn may_fold(&self) -> bool {
        self.folds.waits() && !self.machine.is_split()
    }

    /// The checkpoint of the state at hand, whose part is about to go.
    pub(super) fn fold(&mut self) -> (InPart, Option<CheckpointHead>) {
        self.folds.is_wanted = false;
        let checkpoint = self.machine.checkpoint(&self.folds.stored);
        if checkpoint.chunks.is_empty() {
            let names = checkpoint.names.clone();
            let head = CheckpointHead {
                state: checkpoint.head,
                chunks: checkpoint.names,
                as_of: None,
            };
            return (InPart::Whole(names), Some(head));
        }
        self.folds.now = Some(Fold {
            head: checkpoint.head,
            names: checkpoint.names,
            chunks: checkpoint.chunks.into(),
            as_of: None,
            unfolded_turn: None,
            sent: None,
            is_head_sent: false,
        });
        (InPart::Begins, None)
    }

    /// A part is committed, in this turn of the journal and in the group of this number.
    pub(super) fn note_folded(
        &mut self,
        part: InPart,
        has_records: bool,
        (turn, number): (i64, i64),
    ) {
        match part {
            InPart::Whole(names) => {
                self.folds.stored.note(names);
                self.unfolded_turn = None;
                return;
            }
            InPart::Begins => {
                if let Some(now) = &mut self.folds.now {
                    now.as_of = Some(number);
                }
            }
            InPart::Nothing => {
                if let Some(now) = self.folds.now.as_mut().filter(|_| has_records) {
                    now.unfolded_turn.get_or_insert(turn);
                }
            }
        }
        if has_records {
            self.unfolded_turn.get_or_insert(turn);
        }
    }

    /// Sends the next chunks, or the head once they are stored.
    pub(super) fn fold_on(&mut self) {
        let mut part = GroupPart::new(
            self.parts.slot,
            self.machine.id(),
            self.machine.generation(),
        );
        let Some(now) = &mut self.folds.now else {
            return;
        };
        let (Some(as_of), None) = (now.as_of, &now.sent) else {
            return;
        };
        let mut bytes = 0;
        while bytes < TOGETHER
            && let Some(chunk) = now.chunks.pop_front()
        {
            bytes += chunk.data.len();
            part.chunks.push(chunk);
        }
        if part.chunks.is_empty() {
            now.is_head_sent = true;
            part.checkpoint = Some(CheckpointHead {
                state: std::mem::take(&mut now.head),
                chunks: now.names.clone(),
                as_of: Some(as_of),
            });
        }
        let (done, receiver) = oneshot::channel();
        now.sent = Some(receiver);
        let (fence, part) = (self.parts.fence.clone(), Box::new(part));
        let submission = Submission::Part { fence, part, done };
        if self.parts.folds.try_send(submission).is_err() {
            // The channel has room for one of every queue there can be, so the writer is gone.
            self.ending = Some(Why::Cut);
        }
    }

    pub(super) fn finish_fold(&mut self, written: Option<Written>) {
        let Some(now) = &mut self.folds.now else {
            return;
        };
        now.sent = None;
        match written {
            Some(Written::Committed { .. }) if now.is_head_sent => {
                self.unfolded_turn = now.unfolded_turn;
                let names = std::mem::take(&mut now.names);
                self.folds.stored.note(names);
                self.folds.now = None;
            }
            Some(Written::Committed { .. }) => {}
            Some(Written::Fenced | Written::Unknown) => self.ending = Some(Why::Fenced),
            Some(Written::Refused) => self.ending = Some(Why::Refused),
            None => self.ending = Some(Why::Cut),
        }
    }

    /// At a task's end, waits for the parts that the writer has, whatever their outcome: the next reader of the state must find them
    /// stored, or never stored.
    pub(super) async fn await_fold(&mut self) {
        if let Some(sent) = self.folds.now.as_mut().and_then(|now| now.sent.take()) {
            let _ = sent.await;
        }
    }
}

/// Waits for the outcome of the chunks or the head under way; never resolves when there are none. Cancel-safe.
pub(super) async fn folded(folds: &mut Folds) -> Option<Written> {
    match folds.now.as_mut().and_then(|now| now.sent.as_mut()) {
        Some(sent) => sent.await.ok(),
        None => std::future::pending().await,
    }
}
