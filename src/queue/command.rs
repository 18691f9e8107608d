//! What is asked of the engine and of one queue's task, and how the task takes it.

use tokio::sync::oneshot;

use super::api::{
    Declaration, Declared, Description, Error, InFlight, InFlightFilter, ReceiveRequest, Received,
    Status,
};
use super::hold::{Held, Hold};
use super::message::{Act, Acted, Expire, MessageStatus};
use super::part::{Answer, LINGERING_WAIT};
use super::redrive::{DryRun, NewRedrive};
use super::renewal::{OnLoss, Renewal, Renewed};
use super::task::{Task, Why};
use crate::domain::id::{Generation, Offset, Slot};
use crate::domain::letter::LetterId;
use crate::domain::name::{QueueName, Topic};
use crate::domain::queue::{Item, Outcome, Verb};
use crate::store::redrive::RedriveRow;

/// Commands taken in one round, so that the journal gets its groups.
const ROUND_MAX: usize = 1_000;

/// Where an answer goes.
pub(in crate::queue) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What is asked of one queue's task.
#[derive(Debug)]
pub(in crate::queue) enum Command {
    Receive {
        request: ReceiveRequest,
        acks: Option<Acks>,
        reply: Reply<Received>,
    },
    Settle {
        verb: Verb,
        items: Vec<Item>,
        reply: Reply<Vec<Outcome>>,
    },
    InFlight {
        filter: InFlightFilter,
        reply: Reply<Vec<InFlight>>,
    },
    Status {
        reply: oneshot::Sender<Status>,
    },
    Inspect {
        messages: Vec<(Offset, Option<Topic>)>,
        /// With those that have dead letters.
        reply: Reply<(Vec<MessageStatus>, Vec<Offset>)>,
    },
    Act {
        offset: Offset,
        act: Act,
        reply: Reply<Acted>,
    },
    Expire {
        expire: Expire,
        reply: Reply<Vec<Offset>>,
    },
    /// The topics are about to change: look no further. Answered when the scan position is committed, with all that
    /// was found up to there.
    Pin {
        reply: Reply<()>,
    },
    /// The declaration changed, or a pinned queue may go on.
    Change {
        declaration: Box<Declaration>,
        /// Answered once what follows from it is committed.
        reply: Reply<()>,
    },
    /// Decide nothing more; answered once all that was decided is committed.
    Hold {
        keeps_redriven: bool,
        reply: oneshot::Sender<Held>,
    },
    /// Hand nothing out from now on, or do again.
    Pause {
        is_paused: bool,
    },
    /// Write a checkpoint if something before this turn of the journal is not folded into one.
    Fold {
        before_turn: i64,
    },
    /// Remove these dead letters.
    Trim {
        letters: Vec<Offset>,
    },
    /// Remove this one, of this death.
    RemoveLetter {
        id: LetterId,
        delivery: u32,
        reply: Reply<()>,
    },
    Redrive {
        new: NewRedrive,
        reply: Reply<RedriveRow>,
    },
    DryRun {
        new: NewRedrive,
        reply: Reply<DryRun>,
    },
    CancelRedrive {
        id: String,
        reply: Reply<()>,
    },
    /// Finish: the slot is to be another node's. What is decided is written, and who waits asks there.
    Yield,
    /// End: the queue is deleted or its slot is lost. Nothing more is written.
    End,
}

/// Receipts that come along with a receive, acknowledged first and answered by themselves: their commit does not wait for
/// the long poll.
#[derive(Debug)]
pub(in crate::queue) struct Acks {
    pub(in crate::queue) items: Vec<Item>,
    pub(in crate::queue) reply: Reply<Vec<Outcome>>,
}

/// What is asked of the engine's own task.
#[derive(Debug)]
pub(in crate::queue) enum Job {
    Declare {
        name: QueueName,
        declaration: Box<Declaration>,
        reply: Reply<(Description, Declared)>,
    },
    Delete {
        name: QueueName,
        reply: Reply<()>,
    },
    Renew {
        name: QueueName,
        renewal: Renewal,
        expected_generation: Option<Generation>,
        on_loss: OnLoss,
        reply: Reply<Renewed>,
    },
    Pause {
        name: QueueName,
        is_paused: bool,
        reply: Reply<()>,
    },
    /// Look the queue of this name up.
    Find {
        name: QueueName,
        reply: Reply<Slot>,
    },
}

impl Command {
    /// Answers a command that nothing was decided about.
    pub(in crate::queue) fn refuse(self, error: &dyn Fn() -> Error) {
        match self {
            Self::Receive { reply, acks, .. } => {
                let _ = reply.send(Err(error()));
                if let Some(acks) = acks {
                    let _ = acks.reply.send(Err(error()));
                }
            }
            Self::Settle { reply, .. } => drop(reply.send(Err(error()))),
            Self::InFlight { reply, .. } => drop(reply.send(Err(error()))),
            Self::Pin { reply }
            | Self::RemoveLetter { reply, .. }
            | Self::Change { reply, .. }
            | Self::CancelRedrive { reply, .. } => drop(reply.send(Err(error()))),
            Self::Redrive { reply, .. } => drop(reply.send(Err(error()))),
            Self::DryRun { reply, .. } => drop(reply.send(Err(error()))),
            Self::Inspect { reply, .. } => drop(reply.send(Err(error()))),
            Self::Act { reply, .. } => drop(reply.send(Err(error()))),
            Self::Expire { reply, .. } => drop(reply.send(Err(error()))),
            Self::Status { .. }
            | Self::Hold { .. }
            | Self::Pause { .. }
            | Self::Fold { .. }
            | Self::Trim { .. }
            | Self::Yield
            | Self::End => {}
        }
    }
}

impl Task {
    pub(in crate::queue) fn take_commands(&mut self, first: Option<Command>) {
        let Some(first) = first else {
            self.ending = Some(Why::Told);
            return;
        };
        let mut next = Some(first);
        for _ in 0..ROUND_MAX {
            match next.take() {
                Some(command) => self.take_command(command),
                None => break,
            }
            if self.hold.is_some() || self.is_yielding {
                return;
            }
            next = self.parts.mailbox.try_recv().ok();
        }
        if let Some(command) = next {
            self.take_command(command);
        }
    }

    fn take_command(&mut self, command: Command) {
        match command {
            Command::Receive {
                request,
                acks,
                reply,
            } => {
                if let Some(Acks { items, reply }) = acks {
                    let is_carried = request.wait >= LINGERING_WAIT;
                    self.settle(Verb::Ack, &items, is_carried, reply);
                }
                self.take_receive(request, reply);
            }
            Command::Settle { verb, items, reply } => self.settle(verb, &items, false, reply),
            Command::InFlight { filter, reply } => {
                let _ = reply.send(Ok(self.in_flight(&filter)));
            }
            Command::Status { reply } => {
                self.waiters.drop_gone();
                self.tell_status(reply);
            }
            Command::Inspect { messages, reply } => {
                let _ = reply.send(Ok(self.inspect(&messages)));
            }
            Command::Act { offset, act, reply } => self.take_act(offset, act, reply),
            Command::Expire { expire, reply } => self.expire(&expire, reply),
            Command::Pin { reply } => {
                self.pin();
                self.machine.journal_scan(self.machine.scanned_through());
                self.answer_later(Answer::Pin { reply });
            }
            Command::Change { declaration, reply } => {
                self.change_settings(declaration.settings);
                self.parts.patterns = declaration.topics.into();
                self.unpin();
                self.answer_later(Answer::Done { reply });
            }
            Command::Hold {
                keeps_redriven,
                reply,
            } => {
                self.hold = Some(Hold::Draining {
                    keeps_redriven,
                    reply,
                });
            }
            Command::Pause { is_paused } => self.parts.is_paused = is_paused,
            Command::Fold { before_turn } => {
                self.folds.want(self.unfolded_turn, before_turn);
            }
            Command::Trim { letters } => {
                // The copy of one that was redriven may be the only one.
                for letter in letters {
                    if !self.machine.is_reopened(letter) {
                        self.machine.remove_letter(letter);
                    }
                }
            }
            Command::RemoveLetter {
                id,
                delivery,
                reply,
            } => self.remove_letter(id, delivery, reply),
            Command::Redrive { new, reply } => self.begin_redrive(new, reply),
            Command::DryRun { new, reply } => self.dry_run(&new, reply),
            Command::CancelRedrive { id, reply } => self.cancel_redrive(&id, reply),
            Command::Yield => self.is_yielding = true,
            Command::End => self.ending = Some(Why::Told),
        }
    }

    pub(in crate::queue) fn settle(
        &mut self,
        verb: Verb,
        items: &[Item],
        is_carried: bool,
        reply: oneshot::Sender<Result<Vec<Outcome>, Error>>,
    ) {
        let now = self.now();
        let outcomes = self.machine.settle(verb, items, now);
        let metrics = &self.parts.shared.metrics;
        for (outcome, item) in outcomes.iter().zip(items) {
            match outcome {
                Outcome::Acked => {
                    metrics.settled.inc();
                }
                Outcome::Gone { incident: true } => {
                    metrics.incidents.inc();
                    tracing::error!(
                        queue = %self.parts.name,
                        receipt = ?item.receipt,
                        "a receipt names a delivery that was never issued: was the database restored to an earlier state?"
                    );
                }
                _ => {}
            }
        }
        self.answer_later(Answer::Settle {
            reply,
            outcomes,
            is_carried,
        });
    }

    fn in_flight(&self, filter: &InFlightFilter) -> Vec<InFlight> {
        let live = self.machine.live(filter.after).map(|live| InFlight {
            offset: live.offset,
            delivery: live.delivery,
            attempt: live.attempt,
            consumer: live.receive.and_then(|receive| receive.consumer.clone()),
            delivered_at: live.since.into(),
            visible_until: live.deadline.into(),
        });
        live.filter(|live| filter.consumer.is_none() || live.consumer == filter.consumer)
            .take(filter.limit.clamp(1, 1_000))
            .collect()
    }
}
