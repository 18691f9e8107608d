//! The decisions of a queue's task since its last submission, as one part of a group commit, and the answers that wait for
//! it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Task;
use super::fold::InPart;
use crate::domain::id::Offset;
use crate::domain::message::Entry;
use crate::domain::queue::{End, Handed, Outcome, Record, encode};
use crate::failpoint;
use crate::queue::api::Promise;
use crate::queue::api::{Acted, Error, Received};
use crate::queue::ask::Why;
use crate::queue::writer::{Submission, Written};
use crate::store::journal::GroupPart;
use crate::store::redrive::RedriveRow;

/// How long acks that a long poll brought wait for a delivery, whose commit they share then. Nobody has been told that they are
/// done; a crash meanwhile hands their messages out again, as one a moment earlier would.
const LINGER: Duration = Duration::from_millis(10);
/// The acks of this many long polls are worth a separate commit.
const LINGERING_MAX: usize = 32;
/// Acks of a receive that waits less are waited for.
pub(super) const LINGERING_WAIT: Duration = Duration::from_millis(500);

/// An answer that waits for its commit.
pub(super) enum Answer {
    Receive {
        reply: oneshot::Sender<Result<Received, Error>>,
        handed: Vec<(Handed, Arc<Entry>)>,
        /// None for a repeated receive whose first answer was written: its deliveries are not taken back.
        promise: Option<Arc<Promise>>,
    },
    Pin {
        reply: oneshot::Sender<Result<(), Error>>,
    },
    Done {
        reply: oneshot::Sender<Result<(), Error>>,
    },
    /// A redrive's row is written, or what a dry run counts is.
    Begun { id: String },
    Redrive {
        reply: oneshot::Sender<Result<RedriveRow, Error>>,
        row: Box<RedriveRow>,
    },
    Settle {
        reply: oneshot::Sender<Result<Vec<Outcome>, Error>>,
        outcomes: Vec<Outcome>,
        /// A long poll brought them, and waits for messages after.
        is_carried: bool,
    },
    Act {
        reply: oneshot::Sender<Result<Acted, Error>>,
        acted: Acted,
    },
    Expired {
        reply: oneshot::Sender<Result<Vec<Offset>, Error>>,
        offsets: Vec<Offset>,
    },
}

impl Answer {
    /// Answers that nothing was done.
    fn refuse(self, error: Error) {
        match self {
            Self::Receive { reply, .. } => drop(reply.send(Err(error))),
            Self::Pin { reply } | Self::Done { reply } => drop(reply.send(Err(error))),
            Self::Begun { .. } => {}
            Self::Redrive { reply, .. } => drop(reply.send(Err(error))),
            Self::Settle { reply, .. } => drop(reply.send(Err(error))),
            Self::Act { reply, .. } => drop(reply.send(Err(error))),
            Self::Expired { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

/// The part that the writer has.
pub(super) struct Submitted {
    decided_at: Instant,
    submitted_at: Instant,
    done: oneshot::Receiver<Written>,
    answers: Vec<Answer>,
    has_records: bool,
    has_forwards: bool,
    fold: InPart,
    watermark: Offset,
}

impl Task {
    /// Submits the decisions, if anybody gains by it: acks that long polls brought may wait a little for a delivery, and any decision
    /// for consumers that were just answered and are back in a moment.
    pub(super) fn submit_unless_lingering(&mut self) {
        let now = Instant::now();
        self.linger_until = match self.may_linger() {
            true => self.linger_until.or(Some(now + LINGER)),
            false => None,
        };
        self.rejoin_until = match self.linger_until {
            Some(_) => None,
            None => self.rejoined_at(now),
        };
        if self.rejoin_until.is_some() {
            self.decided_at.get_or_insert(now);
        }
        let until = self.linger_until.or(self.rejoin_until);
        if until.is_none_or(|until| until <= now) {
            self.submit();
        }
    }

    /// How long to wait for the consumers the last part answered, while messages are ready for them.
    fn rejoined_at(&mut self, now: Instant) -> Option<Instant> {
        let is_ready = self.submitted.is_none() && self.machine.has_batch();
        if !is_ready || self.answers.is_empty() {
            return None;
        }
        let are_served = !self.parts.is_paused && !self.is_standing() && !self.machine.is_full();
        let counts = self.machine.counts();
        let has_messages = counts.fresh + counts.again > counts.waiting;
        if !are_served || !has_messages {
            return None;
        }
        self.rejoin.until(self.answers.len(), now)
    }

    /// Whether only long polls, which wait for messages anyway, wait for the decisions.
    fn may_linger(&self) -> bool {
        let is_carried = |(_, answer): &(u64, Answer)| {
            matches!(
                answer,
                Answer::Settle {
                    is_carried: true,
                    ..
                }
            )
        };
        self.submitted.is_none()
            && self.machine.has_batch()
            && !self.may_fold()
            && !self.redrives.has_steps()
            && (1..=LINGERING_MAX).contains(&self.answers.len())
            && self.answers.iter().all(is_carried)
    }

    /// Answers once all that was decided up to now is committed.
    pub(super) fn answer_later(&mut self, answer: Answer) {
        self.answers.push((self.machine.deciding(), answer));
    }

    pub(super) fn submit(&mut self) {
        if self.machine.has_batch() {
            self.decided_at.get_or_insert_with(Instant::now);
        }
        self.answer_early();
        if self.submitted.is_some() {
            return;
        }
        let is_fold = self.may_fold();
        if is_fold {
            self.machine.journal_scan(self.machine.scanned_through());
        }
        let has_nothing = !self.machine.has_batch() && !is_fold && !self.redrives.has_steps();
        if has_nothing && !self.is_to_be_confirmed() {
            let answers = std::mem::take(&mut self.answers).into_iter();
            self.answer(answers.map(|(_, answer)| answer).collect());
            return;
        }
        let number = self.machine.writing();
        let batch = self.machine.take_batch();
        self.count(&batch.records, batch.letters.len());
        let (fold, checkpoint) = match is_fold {
            true => self.fold(),
            false => (InPart::Nothing, None),
        };
        let part = Box::new(GroupPart {
            slot: self.parts.slot,
            queue: self.machine.id(),
            generation: self.machine.generation(),
            records: match batch.records.is_empty() {
                true => Vec::new(),
                false => encode(&batch.records),
            },
            checkpoint,
            letters: batch.letters,
            forward: self.machine.settings().dead_letter_topic.clone(),
            removed_letters: batch.removed_letters,
            redrives: self.redrives.take_steps(),
            chunks: Vec::new(),
        });
        let has_records = !part.records.is_empty();
        let has_forwards = part.forward.is_some() && !part.letters.is_empty();
        let (done, receiver) = oneshot::channel();
        let fence = self.parts.fence.clone();
        if self
            .parts
            .writer
            .try_send(Submission::Part { fence, part, done })
            .is_err()
        {
            // The channel holds a part of every queue there can be, so the writer is gone.
            self.ending = Some(Why::Cut);
            return;
        }
        let now = Instant::now();
        (self.linger_until, self.rejoin_until) = (None, None);
        // In the order in which they were decided.
        let later = self
            .answers
            .partition_point(|(decided, _)| *decided <= number);
        let later = self.answers.split_off(later);
        let answers = std::mem::replace(&mut self.answers, later).into_iter();
        let answers: Vec<Answer> = answers.map(|(_, answer)| answer).collect();
        self.rejoin.submit(answers.len());
        self.submitted = Some(Submitted {
            decided_at: self.decided_at.take().unwrap_or(now),
            submitted_at: now,
            done: receiver,
            answers,
            has_records,
            has_forwards,
            fold,
            watermark: self.machine.watermark(),
        });
    }

    /// Answers that change nothing are given out of memory, and that is void if the slot is another node's by now, as it may be once this
    /// one was not heard of for its time to live. Then an empty part asks: it is committed under the slot's epoch, or fenced.
    fn is_to_be_confirmed(&self) -> bool {
        !self.answers.is_empty() && !self.parts.cluster.is_trusted()
    }

    fn count(&self, records: &[Record], letters: usize) {
        let metrics = &self.parts.shared.metrics;
        metrics.dead_letters.inc_by(letters as u64);
        let is_expiry = |record: &&Record| {
            matches!(
                record,
                Record::Ended {
                    end: End::TimedOut,
                    ..
                }
            )
        };
        metrics
            .expired
            .inc_by(records.iter().filter(is_expiry).count() as u64);
    }

    pub(super) fn finish_part(&mut self, written: Option<Written>) {
        let Some(part) = self.submitted.take() else {
            return;
        };
        match written {
            Some(Written::Committed { turn, number }) => {
                let waited = part.decided_at.elapsed().as_secs_f64();
                self.parts.shared.metrics.wait_seconds.observe(waited);
                self.note_folded(part.fold, part.has_records, (turn, number));
                self.parts
                    .progress
                    .watermark
                    .store(part.watermark.0, Ordering::Release);
                if part.has_forwards {
                    self.parts.shared.forward.notify_one();
                }
                let now = Instant::now();
                let (answered, took) = (part.answers.len(), now - part.submitted_at);
                self.rejoin.commit(answered, self.answers.len(), took, now);
                self.answer(part.answers);
            }
            Some(Written::Fenced) => {
                // Nothing is written: whoever has the slot now decides.
                for answer in part.answers {
                    answer.refuse(Error::NotOwner {
                        queue: self.parts.name.clone(),
                    });
                }
                self.ending = Some(Why::Fenced);
            }
            // The answers are dropped, which says so.
            Some(Written::Unknown) => self.ending = Some(Why::Fenced),
            Some(Written::Refused) => self.ending = Some(Why::Refused),
            None => self.ending = Some(Why::Cut),
        }
    }

    /// Two planted faults: answers that do not wait for their commit.
    fn answer_early(&mut self) {
        if !failpoint::is_mutant("ack-before-commit")
            && !failpoint::is_mutant("receive-before-journal")
        {
            return;
        }
        let (early, rest) =
            std::mem::take(&mut self.answers)
                .into_iter()
                .partition(|(_, answer)| match answer {
                    Answer::Settle { .. } => failpoint::is_mutant("ack-before-commit"),
                    Answer::Receive { .. } => failpoint::is_mutant("receive-before-journal"),
                    _ => false,
                });
        self.answers = rest;
        let early: Vec<(u64, Answer)> = early;
        self.answer(early.into_iter().map(|(_, answer)| answer).collect());
    }

    /// Sends answers whose decisions are committed.
    fn answer(&mut self, answers: Vec<Answer>) {
        for answer in answers {
            match answer {
                Answer::Settle {
                    reply, outcomes, ..
                } => {
                    let _ = reply.send(Ok(outcomes));
                }
                Answer::Receive {
                    reply,
                    handed,
                    promise,
                } => {
                    // A caller that is gone drops the answer, and the handout in it takes the deliveries back.
                    let _ = reply.send(Ok(self.received(handed, promise)));
                }
                Answer::Act { reply, acted } => {
                    let _ = reply.send(Ok(acted));
                }
                Answer::Expired { reply, offsets } => {
                    let _ = reply.send(Ok(offsets));
                }
                Answer::Pin { reply } | Answer::Done { reply } => {
                    let _ = reply.send(Ok(()));
                }
                Answer::Begun { id } => self.redrive_is_begun(&id),
                Answer::Redrive { reply, row } => {
                    let _ = reply.send(Ok(*row));
                }
            }
        }
    }
}

/// The outcome of the part under way; never resolves when there is none. Cancel-safe.
pub(super) async fn committed(submitted: &mut Option<Submitted>) -> Option<Written> {
    match submitted {
        Some(submitted) => (&mut submitted.done).await.ok(),
        None => std::future::pending().await,
    }
}
