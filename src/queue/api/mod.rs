//! The requests and answers of the queue engine. The HTTP layer gives these their wire form.

mod handout;
mod letters;
mod message;
mod renewal;

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::domain::id::{Generation, Offset, QueueId, StreamId};
use crate::domain::letter::LetterId;
use crate::domain::message::Entry;
use crate::domain::name::{QueueName, StreamName, TopicPattern};
use crate::domain::policy::{Fault, Settings, Start};
use crate::domain::queue::EmptyReason;
use crate::{store, stream};

pub use crate::domain::queue::{BlockedBy, Outcome, Verb};
pub use crate::store::renewal::Renewal;
pub use handout::Handout;
pub(super) use handout::{Promise, Promises};
pub use letters::{DryRun, LETTERS_MAX, LetterFilter, LetterPage, NewRedrive};
pub use message::{Act, Acted, Expire, INSPECT_MAX, MessageState, MessageStatus};
pub use renewal::{OnLoss, Renewed};

/// Most messages of one receive, and most receipts of one verb request.
pub const BATCH_MAX: usize = 1_000;
/// Longest wait of a receive.
pub const WAIT_MAX: Duration = Duration::from_secs(50);
/// Longest wait of a receive for its batch to fill.
pub const BATCH_WAIT_MAX: Duration = Duration::from_secs(5);

/// The settings of a queue.
#[derive(Debug, Clone, PartialEq)]
pub struct Declaration {
    /// The stream it reads. Cannot be changed.
    pub stream: StreamName,
    /// The topics it takes, 1 to 100 patterns. A change holds from the scan position on.
    pub topics: Vec<TopicPattern>,
    /// Its start. Used when the queue is created, and kept from then on.
    pub start: Start,
    /// Everything else. A change holds at once.
    pub settings: Settings,
}

/// The result of a declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// The queue is new.
    Created,
    /// The queue was already so.
    Unchanged,
    /// The queue is changed.
    Changed,
}

/// A queue as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// Its number, never used again.
    pub id: QueueId,
    /// Its name.
    pub name: QueueName,
    /// The number of its stream.
    pub stream_id: StreamId,
    /// Its declaration.
    pub declaration: Declaration,
    /// The incarnation; receipts of another are `gone`.
    pub generation: Generation,
    /// The offset that the start came to: the first message that the queue can deliver.
    pub start_offset: Offset,
    /// Whether a person has paused it: nothing is handed out.
    pub is_paused: bool,
    /// The time of its creation.
    pub created_at: DateTime<Utc>,
    /// Its numbers now; None while its state is being recovered.
    pub status: Option<Status>,
    /// The queue is not served, since its log was restored without it.
    pub log_behind: Option<LogBehind>,
}

/// The numbers of a queue at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Status {
    /// Unsettled messages among those up to `scanned_through`.
    pub depth: u64,
    /// Unsettled messages that are handed out and live.
    pub in_flight: u64,
    /// Unsettled messages that are held back by a delay.
    pub delayed: u64,
    /// Unsettled messages that are ready to go out.
    pub ready: u64,
    /// Unsettled messages that wait for an earlier message of their key.
    pub waiting: u64,
    /// Unsettled, by lane, lowest first; None without lanes.
    pub lanes: Option<[u64; 3]>,
    /// The keys that stand still for longest, with messages that wait; at most 20.
    pub blocked_keys: Vec<BlockedKey>,
    /// The dead letters of this generation that have not been removed.
    pub dead_letters: u64,
    /// Long polls that wait.
    pub waiters: u64,
    /// Everything that matches up to here is settled.
    pub watermark: Offset,
    /// How far the stream was looked at for matching messages.
    pub scanned_through: Offset,
    /// The lowest unsettled offset among those looked at.
    pub oldest_unsettled: Option<Offset>,
    /// The time when the message of `oldest_unsettled` was appended, if it is known without a read of the log.
    pub oldest_unsettled_at: Option<DateTime<Utc>>,
    /// Whether the queue begins beyond the stream's end: nothing is delivered until the stream has got there.
    pub ahead: bool,
    /// Whether the queue stands still since Postgres cannot be reached.
    pub standing_still: bool,
}

/// A key whose messages wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockedKey {
    /// The key; None if the log has dropped the message that is waited for.
    pub key: Option<Arc<str>>,
    /// The message that is waited for.
    pub offset: Offset,
    /// In which state it is.
    pub state: BlockedBy,
    /// Its attempt; None for a dead letter.
    pub attempt: Option<u32>,
    /// The time when it expires, or goes out again; None for a dead letter.
    pub due_at: Option<DateTime<Utc>>,
    /// The time since when the key has been blocked, as far as known.
    pub since: DateTime<Utc>,
    /// How many messages wait.
    pub waiting: u64,
}

/// A long poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveRequest {
    /// Most messages, 1 to 1,000.
    pub max_messages: u32,
    /// Most bytes of events; one message is always handed out, however large.
    pub max_bytes: u64,
    /// How long to wait for the first message, at most 50 s.
    pub wait: Duration,
    /// From the first message on, how long to wait for others until there are `max_messages`, at most 5 s. Never beyond
    /// the end of `wait`.
    pub batch_wait: Duration,
    /// Held for this long; the queue's own time without.
    pub visibility_timeout: Option<Duration>,
    /// The consumer's name, at most 255 bytes, for the list of live deliveries.
    pub consumer: Option<String>,
    /// A receive repeated under the same id, at most 255 bytes, gets the same deliveries while they live.
    pub receive_id: Option<String>,
    /// Receipts of deliveries that are done, at most 1,000: acknowledged before anything is handed out, and whatever
    /// becomes of the wait.
    pub ack: Vec<String>,
}

impl Default for ReceiveRequest {
    fn default() -> Self {
        Self {
            max_messages: 10,
            max_bytes: 4 * 1024 * 1024,
            wait: Duration::from_secs(20),
            batch_wait: Duration::ZERO,
            visibility_timeout: None,
            consumer: None,
            receive_id: None,
            ack: Vec::new(),
        }
    }
}

/// The answer to a receive.
#[derive(Debug)]
pub struct Received {
    /// The results for the receipts that came along for acknowledgement, in the order of the request.
    pub acked: Vec<Outcome>,
    /// The messages, by offset.
    pub deliveries: Vec<Delivery>,
    /// The reason why there are none.
    pub reason: Option<EmptyReason>,
    /// The next time when a delayed message falls due or a live delivery expires, if there are no deliveries.
    pub next_due_at: Option<DateTime<Utc>>,
    /// Call [`Handout::written`] once the answer is on the wire; dropped without it, the deliveries are released and
    /// not charged.
    pub handout: Handout,
}

impl Received {
    /// No deliveries, for this reason.
    #[must_use]
    pub fn nothing(reason: EmptyReason) -> Self {
        Self {
            acked: Vec::new(),
            deliveries: Vec::new(),
            reason: Some(reason),
            next_due_at: None,
            handout: Handout::default(),
        }
    }
}

/// One message handed out.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The receipt that settles this delivery.
    pub receipt: String,
    /// The number of the delivery, ever rising per message.
    pub delivery: u32,
    /// The number of the attempt: deliveries that count.
    pub attempt: u32,
    /// The message.
    pub entry: Arc<Entry>,
    /// This consumer holds the delivery until then.
    pub visible_until: DateTime<Utc>,
}

/// One receipt of a verb request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerbItem {
    /// The receipt, as it was handed out.
    pub receipt: String,
    /// For nack and release: not before this much time, at most 12 h.
    pub delay: Option<Duration>,
    /// For extend: held for this long from now on, 1 s to 12 h; the queue's visibility timeout without.
    pub extend_by: Option<Duration>,
    /// For nack and reject: why, at most 1,024 bytes.
    pub reason: Option<String>,
}

/// A filter on live deliveries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InFlightFilter {
    /// Only deliveries of this consumer.
    pub consumer: Option<String>,
    /// Only messages after this offset.
    pub after: Offset,
    /// At most this many, 1 to 1,000.
    pub limit: usize,
}

/// A live delivery, as the in-flight list shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InFlight {
    /// The message.
    pub offset: Offset,
    /// The number of the delivery.
    pub delivery: u32,
    /// The number of the attempt.
    pub attempt: u32,
    /// The consumer that received it, if the receive named one.
    pub consumer: Option<String>,
    /// The time when it was handed out.
    pub delivered_at: DateTime<Utc>,
    /// The delivery is held until then.
    pub visible_until: DateTime<Utc>,
}

/// A log that lacks what its queue knows, or has other messages there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogBehind {
    /// The queue has looked at everything up to here.
    pub through: Offset,
    /// The log's last offset.
    pub end: Offset,
}

impl LogBehind {
    pub(super) fn error(self, queue: &QueueName) -> Error {
        Error::LogBehind {
            queue: queue.clone(),
            behind: self,
        }
    }
}

/// Reasons why a request to a queue was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No queue of this name.
    #[error("there is no queue `{queue}`")]
    NotFound {
        /// The name asked for.
        queue: QueueName,
    },
    /// No stream of this name.
    #[error("there is no stream `{stream}`")]
    StreamNotFound {
        /// The name asked for.
        stream: StreamName,
    },
    /// The queue reads another stream, and that cannot be changed.
    #[error(
        "the queue `{queue}` reads the stream `{stream}`, and a queue's stream cannot be changed"
    )]
    StreamChange {
        /// The queue.
        queue: QueueName,
        /// The stream it reads.
        stream: StreamName,
    },
    /// The queue's generation is not the one that the request counts on. Answer 409.
    #[error("the queue `{queue}` is in generation {found}, not {expected}")]
    GenerationMoved {
        /// The queue.
        queue: QueueName,
        /// The generation that the request names.
        expected: Generation,
        /// The one that there is.
        found: Generation,
    },
    /// The node has as many queues as it can hold.
    #[error("there are already {limit} queues, which is the limit")]
    TooManyQueues {
        /// The bound.
        limit: usize,
    },
    /// The log was restored from before what the queue knows, without it. Answer 409.
    #[error(
        "the queue `{queue}` has looked at its log up to offset {}, but the log ends at {} or has other messages there: it was restored without the queue",
        behind.through, behind.end
    )]
    LogBehind {
        /// The queue.
        queue: QueueName,
        /// The state of each.
        behind: LogBehind,
    },
    /// A value of the declaration or of the request is out of its range.
    #[error(transparent)]
    Invalid(#[from] Fault),
    /// No dead letter of this id.
    #[error("the queue `{queue}` has no dead letter `{id}`")]
    LetterNotFound {
        /// The queue.
        queue: QueueName,
        /// The id asked for.
        id: LetterId,
    },
    /// The dead letter's message was redriven and is not settled yet.
    #[error("the message of dead letter `{id}` has been redriven: it is in the queue again")]
    LetterRedriven {
        /// The letter.
        id: LetterId,
    },
    /// No redrive of this id.
    #[error("the queue `{queue}` has no redrive `{id}`")]
    RedriveNotFound {
        /// The queue.
        queue: QueueName,
        /// The id asked for.
        id: String,
    },
    /// As many redrives run as a queue can have. Answer 429.
    #[error("{limit} redrives already run in this queue, which is the limit")]
    TooManyRedrives {
        /// The limit.
        limit: usize,
    },
    /// As many deliveries are live as the queue allows, and the receive did not want to wait. Answer 429.
    #[error("the queue has {limit} deliveries in flight, which is its limit")]
    InFlightFull {
        /// The limit.
        limit: u32,
    },
    /// As many long polls wait as the queue allows. Answer 429.
    #[error("{limit} receives already wait for this queue, which is the limit")]
    TooManyWaiters {
        /// The limit.
        limit: usize,
    },
    /// The write was sent and its outcome is not known yet. The same request again is safe. Answer 503.
    #[error("the outcome of the write is not known yet; sending the same request again is safe")]
    OutcomeUnknown,
    /// The queue is not served at the moment: its state is being recovered, its slot is held elsewhere, or Postgres
    /// cannot be reached. Answer 503.
    #[error("the queue is not served at the moment: {why}")]
    Unavailable {
        /// One clause.
        why: &'static str,
    },
    /// Another node owns the queue, or is about to. Nothing was decided: the request is that node's to answer.
    #[error("another node owns the queue `{queue}`")]
    NotOwner {
        /// The queue.
        queue: QueueName,
    },
    /// The process stops. Answer 503.
    #[error("the broker is stopping")]
    Stopping,
    /// A statement failed.
    #[error("reading or writing the queue's tables failed")]
    Store(#[from] store::Error),
}

/// The queue's task ended before it looked at the request: nothing was decided.
pub(super) const ENDED: Error = Error::Unavailable {
    why: "it ended while the request waited",
};

pub(super) fn invalid(field: &'static str, reason: &str) -> Error {
    Error::Invalid(Fault {
        field,
        reason: reason.to_owned(),
    })
}

pub(super) const RECOVERING: Error = Error::Unavailable {
    why: "its state is being recovered",
};

pub(super) fn stream_error(error: stream::Error) -> Error {
    match error {
        stream::Error::Store(error) => Error::Store(error),
        _ => Error::Stopping,
    }
}
