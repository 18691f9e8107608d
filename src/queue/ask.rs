//! Requests to the engine and to one queue's task, and their last words: no behaviour but the refusal of a command.

use tokio::sync::oneshot;

use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot};
use crate::domain::letter::LetterId;
use crate::domain::name::{QueueName, Topic};
use crate::domain::queue::{Item, Outcome, Verb};
use crate::queue::api::{
    Act, Acted, Declaration, Declared, Description, DryRun, Error, Expire, InFlight,
    InFlightFilter, MessageStatus, NewRedrive, OnLoss, ReceiveRequest, Received, Renewal, Renewed,
    Status,
};
use crate::store::redrive::RedriveRow;

/// The receiver of an answer.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// The requests to one queue's task.
#[derive(Debug)]
pub(super) enum Command {
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
    /// Finish: the slot is assigned to another node. Decisions are written, and waiting callers ask there.
    Yield,
    /// End: the queue is deleted or its slot is lost. Nothing more is written.
    End,
}

/// Receipts that come along with a receive, acknowledged first and answered by themselves: their commit does not wait for
/// the long poll.
#[derive(Debug)]
pub(super) struct Acks {
    pub(super) items: Vec<Item>,
    pub(super) reply: Reply<Vec<Outcome>>,
}

/// The requests to the engine's own task.
#[derive(Debug)]
pub(super) enum Job {
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
    pub(super) fn refuse(self, error: &dyn Fn() -> Error) {
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

/// A task that holds still: all that it decided is committed and answered.
#[derive(Debug)]
pub(super) struct Held {
    /// The state that the next generation begins with.
    pub(super) carried: Vec<u8>,
    /// Dropped, the task ends: nobody knows which generation it is in.
    pub(super) go_on: oneshot::Sender<Verdict>,
}

/// How a held task goes on.
#[derive(Debug)]
pub(super) enum Verdict {
    /// In this generation.
    Renewed {
        generation: Generation,
        start_offset: Offset,
    },
}

/// Reasons why a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// It was told to.
    Told,
    /// Its slot was taken over.
    Fenced,
    /// The database refused its journal, and that is known: its state must be read again.
    Refused,
    /// The writer ended, and what became of the journal is not known: its slot's state must be read again.
    Cut,
}

/// A task's last word.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) queue: QueueId,
    pub(super) slot: Slot,
    pub(super) fence: Fence,
    pub(super) why: Why,
}
