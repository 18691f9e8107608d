//! Single messages, as people ask about them.

use chrono::{DateTime, Utc};

use crate::domain::id::Offset;
use crate::domain::letter::LetterId;
use crate::domain::queue::{Failure, Whose};
use crate::store::letter::History;

/// Most messages that one request looks at.
pub const INSPECT_MAX: usize = 1_000;

/// The state of a message in a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageState {
    /// Never handed out, and may go out now or when the queue gets there.
    Fresh,
    /// Handed out before, and due again.
    Ready,
    /// Held back by an earlier message of its key.
    Waiting,
    /// Handed out, and held by a consumer.
    Live,
    /// Held back by time.
    Delayed,
    /// A dead letter.
    Dead,
    /// Acked, or deleted by a person.
    Settled,
    /// Retention's hard limit dropped it before it was settled.
    Lost,
    /// The queue does not take its topic.
    NotMatching,
    /// The queue began after it.
    BeforeStart,
    /// There is no such message, or no more.
    NotFound,
}

/// A queue's knowledge of one message.
#[derive(Debug, Clone, PartialEq)]
pub struct MessageStatus {
    /// The message.
    pub offset: Offset,
    /// Its state.
    pub state: MessageState,
    /// The number of its last delivery; 0 before the first.
    pub delivery: u32,
    /// Attempts made, one under way included.
    pub attempts: u32,
    /// How its last attempts failed, oldest first, at most five. A dead letter's are those of former lives, too.
    pub failures: Vec<Failure>,
    /// Its dead letter, also while the message is on its way back.
    pub dead_letter: Option<LetterId>,
    /// The consumer that has it or had it last, if the receive named one.
    pub consumer: Option<String>,
    /// The time when its last delivery began.
    pub delivered_at: Option<DateTime<Utc>>,
    /// While it is live: until when it is held.
    pub visible_until: Option<DateTime<Utc>>,
    /// While it is delayed: until when.
    pub due_at: Option<DateTime<Utc>>,
}

/// A person's acts on a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Settle it in this queue.
    Delete,
    /// Make it a dead letter, also while a consumer holds it.
    Reject {
        /// The reason, at most 1,024 bytes.
        reason: Option<String>,
    },
}

/// Its outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acted {
    /// It is settled.
    Deleted,
    /// It is a dead letter.
    Rejected {
        /// The letter.
        dead_letter: String,
    },
    /// It was settled before.
    AlreadySettled,
    /// It is a dead letter already; that is deleted by its own id.
    DeadLettered,
    /// Nothing was done: it is not there, or not the queue's.
    Not(MessageState),
}

/// The deliveries that end early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expire {
    /// The deliveries' consumer or messages.
    pub whose: Whose,
    /// Only those that began before: so that a repeat ends none that began since.
    pub delivered_before: Option<DateTime<Utc>>,
}

impl MessageStatus {
    pub(in crate::queue) fn add_letter(&mut self, letter: &History) {
        self.dead_letter = Some(letter.id);
        if self.state == MessageState::Dead {
            self.delivery = letter.delivery;
            self.attempts = letter.attempts;
            self.failures.clone_from(&letter.failures);
        }
    }
}
