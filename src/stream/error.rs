//! The stream engine's errors.

use crate::domain::id::{Offset, ScheduledId, StreamId};
use crate::domain::name::{ScheduleName, StreamName, TopicPattern};
use crate::domain::schedule::SCHEDULES_MAX;
use crate::store;
use crate::store::stream::{STREAMS_MAX, TOPICS_MAX};

/// Reasons why a stream could not be declared, described, read or deleted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No stream has this name or number.
    #[error("there is no stream `{stream}`")]
    NotFound {
        /// The name asked for, or the number.
        stream: String,
    },
    /// Another stream owns topics that the pattern matches.
    #[error("pattern `{pattern}` overlaps `{other_pattern}` of stream `{other_stream}`")]
    Overlap {
        /// The pattern that was refused.
        pattern: TopicPattern,
        /// The stream in the way.
        other_stream: StreamName,
        /// Its pattern.
        other_pattern: TopicPattern,
    },
    /// Settings that break a rule.
    #[error("the settings are not valid")]
    Settings(#[source] super::SettingsError),
    /// Queues read the stream.
    #[error("stream `{name}` has queues")]
    HasQueues {
        /// The stream.
        name: StreamName,
    },
    /// The stream still has scheduled messages.
    #[error(
        "stream `{name}` has scheduled messages, which would be lost: cancel them, or delete it with `?force=true`"
    )]
    HasScheduled {
        /// The stream.
        name: StreamName,
    },
    /// The stream limit is reached.
    #[error("there are already {STREAMS_MAX} streams, which is the limit")]
    TooManyStreams,
    /// `main` takes what no other stream claims, so it is always there.
    #[error("stream `main` cannot be deleted")]
    MainIsKept,
    /// The stream is not keyed.
    #[error("stream `{stream}` is not keyed")]
    NotKeyed {
        /// The stream's name, or its number.
        stream: String,
    },
    /// A stream that has had messages stays keyed, or not keyed.
    #[error("stream `{name}` has had messages, so its `keyed` setting can no longer change")]
    KeyedIsFixed {
        /// The stream.
        name: StreamName,
    },
    /// More of a keyed stream is not folded yet than is counted in memory.
    #[error("the keys of stream {stream} are still being counted")]
    KeysNotCounted {
        /// The stream.
        stream: StreamId,
    },
    /// No schedule has this name.
    #[error("there is no schedule `{name}`")]
    ScheduleNotFound {
        /// The name asked for.
        name: ScheduleName,
    },
    /// The schedule limit is reached.
    #[error("there are already {SCHEDULES_MAX} schedules, which is the limit")]
    TooManySchedules,
    /// The engine has ended.
    #[error("the stream engine is stopping")]
    Stopping,
    /// The database could not do it.
    #[error("the database could not be used")]
    Store(#[from] store::Error),
}

/// Reasons why an append was refused, or an unknown outcome.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Ids were used before for other content within the window; nothing was appended.
    #[error("{} ids were already used for other messages", items.len())]
    IdConflict {
        /// The items in conflict, in the order sent.
        items: Vec<ConflictItem>,
    },
    /// A message expects another version of its key; nothing was appended.
    #[error(transparent)]
    VersionConflict(VersionConflict),
    /// Messages expect a version of their key, and their streams are not keyed; nothing was appended.
    #[error("{} messages expect a version in a stream that is not keyed", items.len())]
    NotKeyed {
        /// Their places in the member, from 0, and their streams.
        items: Vec<(usize, StreamId)>,
    },
    /// The member's lease has another epoch or holder; nothing was appended.
    #[error("the lease was taken over")]
    Fenced,
    /// The origin's latest position is another than the member's `from`; nothing was appended.
    #[error("the origin's position is {found}")]
    PositionMoved {
        /// The latest position number.
        found: i64,
    },
    /// It may or may not have been appended. The appender goes on finding out; a repeat with the same ids is safe.
    #[error("the outcome of the append is not known")]
    OutcomeUnknown,
    /// The database could not be used in time; nothing was appended.
    #[error("the database could not be used")]
    Unavailable(#[source] Option<store::Error>),
    /// More waits to be appended than the bounds allow; nothing was appended.
    #[error("too many messages wait to be appended")]
    Overloaded,
    /// The member is beyond the limit of one append; nothing was appended.
    #[error("{count} messages with {bytes} bytes are too much for one append")]
    TooLarge {
        /// Messages in the member.
        count: usize,
        /// Bytes in the member.
        bytes: usize,
    },
    /// A message cannot be stored; nothing was appended.
    #[error("message {index} cannot be stored: {reason}")]
    Invalid {
        /// Its place in the member, from 0.
        index: usize,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// The database refuses the statement, whenever it is tried; nothing was appended.
    #[error("the database refuses the append")]
    Refused(#[source] store::Error),
    /// The topic would be one more than there can be; nothing was appended.
    #[error(
        "there are already {TOPICS_MAX} topics, which is the limit: keep parts that differ from message to message out of the topic"
    )]
    TooManyTopics,
    /// The engine has ended; nothing was appended.
    #[error("the stream engine is stopping")]
    Stopping,
}

impl AppendError {
    /// Whether the append is refused for what some of its messages hold, whenever it is tried, so that others can pass.
    #[must_use]
    pub fn is_row_refused(&self) -> bool {
        match self {
            Self::TooLarge { .. } | Self::Invalid { .. } | Self::TooManyTopics => true,
            // The server's table of locks is full: fewer rows need fewer. One row alone is never refused for it.
            Self::Refused(error) => error.is_row_refused() || error.is_out_of_memory(),
            _ => false,
        }
    }

    /// The reason, in the words of whoever refuses.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Refused(error) => error.reason(),
            other => other.to_string(),
        }
    }
}

/// A message that expects another version of its key than it has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the key is at version {version}, not {expected}")]
pub struct VersionConflict {
    /// Its place in the member, from 0.
    pub index: usize,
    /// Its key.
    pub key: String,
    /// The expected version.
    pub expected: i64,
    /// The version that the key has, counting the member's own messages before this one.
    pub version: i64,
}

/// A message whose id stands for another message already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConflictItem {
    /// Its place in the member, from 0.
    pub index: usize,
    /// The stream of the first use.
    pub stream: StreamId,
    /// The offset of the first use; `Offset(0)` when the first use is in the same member, or was scheduled.
    pub offset: Offset,
    /// The first use, if it was scheduled.
    pub scheduled: Option<ScheduledId>,
}
