//! The numbers that identify things in Postroad's tables, each with its own type so that they cannot be confused.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// A stream's row in the catalogue. Never used again after the stream is deleted.
    StreamId,
    i32
);
number!(
    /// A queue's row in the catalogue. Never used again after the queue is deleted.
    QueueId,
    i64
);
number!(
    /// An origin's row in the catalogue.
    OriginId,
    i32
);
number!(
    /// A topic's interned number.
    TopicId,
    i32
);
number!(
    /// The place of a message in its stream: dense, from 1. `Offset(0)` stands before the first message.
    Offset,
    i64
);
number!(
    /// The incarnation of a queue. Rises at create, seek and purge; a receipt of another generation is `gone`.
    Generation,
    i64
);
number!(
    /// The fencing token of a lease. Rises at each hand-over and only then.
    Epoch,
    i64
);
number!(
    /// One of the shards that queues hash into, 0 to [`SLOT_COUNT`] - 1.
    Slot,
    i16
);

/// The number of slots (docs/protocol.md, Parameters). Part of the stored state: changing it moves queues between leases.
pub const SLOT_COUNT: i16 = 64;

impl Offset {
    /// The offset after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Slot {
    /// The slot that owns a queue.
    #[must_use]
    pub fn of(queue: QueueId) -> Self {
        let hash = xxhash_rust::xxh3::xxh3_64(&queue.0.to_le_bytes());
        Self((hash % SLOT_COUNT as u64) as i16)
    }

    /// The name of the slot's lease, `slot/07`. Lease names sort as slots do, which is the order locks are taken in.
    #[must_use]
    pub fn lease_name(self) -> String {
        format!("slot/{:02}", self.0)
    }
}

impl OriginId {
    /// The name of the lease that the origin's relay writes under, `relay/3`.
    #[must_use]
    pub fn lease_name(self) -> String {
        format!("relay/{}", self.0)
    }
}

/// A lease held at an epoch: what every fenced write carries and checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The lease's name, `slot/07` or `relay/3`.
    pub lease: String,
    /// The epoch at which the writer took the lease.
    pub epoch: Epoch,
}

/// Names a message that was accepted to come later: its place among those of its stream. Its text, `3-1764000000000000-17`, is
/// for the broker alone to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScheduledId {
    /// The due time, in whole microseconds.
    pub due_at: DateTime<Utc>,
    /// The order of acceptance.
    pub number: i64,
    /// Its stream.
    pub stream: StreamId,
}

impl std::fmt::Display for ScheduledId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let due = self.due_at.timestamp_micros();
        write!(f, "{}-{due}-{}", self.stream, self.number)
    }
}

impl ScheduledId {
    /// Reads what [`ScheduledId`] prints; `None` for any other text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '-').map(str::parse::<i64>);
        let (Some(Ok(stream)), Some(Ok(due)), Some(Ok(number))) =
            (parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        let id = Self {
            due_at: DateTime::from_timestamp_micros(due)?,
            number,
            stream: StreamId(i32::try_from(stream).ok()?),
        };
        // Each has only one valid text: `007` is not valid.
        (id.to_string() == text).then_some(id)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn scheduled_ids_read_back_and_nothing_else_does() {
        let id = ScheduledId {
            due_at: DateTime::from_timestamp_micros(1_764_000_000_000_001).unwrap(),
            number: 17,
            stream: StreamId(3),
        };
        assert_eq!(id.to_string(), "3-1764000000000001-17");
        assert_eq!(ScheduledId::parse(&id.to_string()), Some(id));
        for text in [
            "",
            "3",
            "3-1",
            "3--1-1",
            "03-1-1",
            "3-1-1-1",
            "3-1-+1",
            "99999999999-1-1",
            "3-9223372036854775807-1",
        ] {
            assert_eq!(ScheduledId::parse(text), None, "{text}");
        }
    }
}
