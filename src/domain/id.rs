//! The numbers that identify things in Postroad's tables, each a type of its own so that none is taken for another.

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

/// The number of slots (DESIGN.md: 64). Part of the stored state: changing it moves queues between leases.
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
