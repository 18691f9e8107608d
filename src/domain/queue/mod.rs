//! The queue as a pure state machine: which messages are ready, live, delayed and settled, and what each verb does to them.
//!
//! Every durable change is a [`Record`]: a method decides, builds the record and applies it by the same `apply` that
//! replays the journal, so a recovered queue cannot differ from the one that was lost. State that is not durable (messages
//! that the scan found since the last `Scanned` record) is found again by scanning on from [`Queue::journaled_through`].
//!
//! A matching message that was never handed out is in `fresh`; one that was handed out and is not settled has an `Entry`;
//! every other message at or below the scan position is settled. Settled messages above the journaled scan position are in
//! `ahead`, so that the scan after a restart does not take them for fresh. Fresh messages may therefore go out in any
//! order, which ordering by key and priorities need.

mod arrange;
mod blocked;
mod checkpoint;
mod clock;
mod decide;
mod manage;
mod members;
mod offsets;
mod order;
mod pending;
mod record;
mod redrive;
mod state;
mod verbs;
mod walk;
mod wire;

#[cfg(test)]
mod model;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use roaring::RoaringTreemap;

use super::id::{Generation, Offset, QueueId};
use super::message::Priority;
use super::policy::Settings;
use super::word::words;

use offsets::Offsets;
use order::Order;
use pending::Pending;

pub use blocked::{BlockedBy, BlockedKey};
pub use checkpoint::{Checkpoint, Chunk, ChunkId, Stored};
pub use decide::{ENTRIES_MAX, Handed, Taken};
pub use manage::{Inspected, Standing, Whose};
pub use record::{Decode, End, Record, SettledAs, decode, encode};
pub use redrive::{REOPENED_MAX, Reborn};
pub use verbs::{Item, Outcome, Verb};

/// A moment by the database's clock: milliseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct At(pub i64);

impl At {
    /// This moment plus a duration, to the millisecond.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)),
        )
    }

    /// How long from `earlier` to this moment; zero if it is not later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl From<DateTime<Utc>> for At {
    fn from(time: DateTime<Utc>) -> Self {
        Self(time.timestamp_millis())
    }
}

impl From<At> for DateTime<Utc> {
    fn from(at: At) -> Self {
        DateTime::from_timestamp_millis(at.0).unwrap_or(DateTime::<Utc>::MAX_UTC)
    }
}

words! {
    /// The reasons why a receive gets nothing.
    pub enum EmptyReason {
        /// Nothing is unsettled except live deliveries.
        Empty = "empty",
        /// A person paused the queue.
        Paused = "paused",
        /// As many deliveries are live as the queue allows.
        InFlightFull = "in_flight_full",
        /// All messages wait for an earlier message of their key.
        WaitingForKeys = "waiting_for_keys",
        /// All messages are held back by a delay.
        Delayed = "delayed",
    }
}

/// The consumer that received, and the id of its receive.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Receive {
    /// The consumer's name.
    pub consumer: Option<String>,
    /// The receive's id, for a repeat.
    pub receive_id: Option<String>,
}

/// How an attempt failed; the last few are kept for the dead letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The time.
    pub at: At,
    /// `timed_out`, or the consumer's reason.
    pub reason: String,
}

/// Failures kept per message.
pub const FAILURES_KEPT: usize = 5;
/// Bytes of the reasons of failures that a queue keeps of its unsettled messages. Of a message that fails beyond that the last reason is kept,
/// and its first [`REASON_BYTES_MIN`] bytes if that is too much as well. What a dead letter has when it is written it keeps.
pub const REASON_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The bytes of the last reason that are always kept.
pub const REASON_BYTES_MIN: usize = 100;
/// The reason of an attempt whose time ran out.
pub const TIMED_OUT: &str = "timed_out";

/// A message of a matching topic that the scan or the feed found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The message.
    pub offset: Offset,
    /// The hash of its key.
    pub key_hash: Option<i64>,
    /// Its lane.
    pub priority: Priority,
}

impl Found {
    fn mark(&self) -> Mark {
        Mark {
            key: self.key_hash,
            priority: self.priority,
        }
    }

    #[cfg(test)]
    fn at(offset: i64) -> Self {
        Self {
            offset: Offset(offset),
            key_hash: None,
            priority: Priority::Normal,
        }
    }
}

/// The basis of order and lanes. It comes from the log and is in no record: a queue that needs it asks the log at its recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Mark {
    /// The hash of the message's key. Two keys of one hash wait for each other, which harms nobody.
    key: Option<i64>,
    priority: Priority,
}

/// A dead letter, as the queue remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Dead {
    /// The last delivery.
    delivery: u32,
    /// The time when it died.
    at: At,
    /// As far as it is known: the log may have dropped the message by now.
    mark: Mark,
    /// Whether later messages of the key wait for a person.
    holds: bool,
}

/// A message that was handed out and is not settled.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// The number of its last delivery.
    delivery: u32,
    /// Attempts that ended and count. While live, the attempt under way is this plus one.
    attempts: u32,
    releases: u32,
    /// Whether an attempt ever ran out of time: from its third attempt on, it goes out alone.
    timed_out: bool,
    /// The time when the last delivery began.
    since: At,
    /// The time of the receive that handed it out, if that may have brought several messages of its key.
    batch: Option<At>,
    mark: Mark,
    state: State,
    receive: Option<Arc<Receive>>,
    failures: Vec<Failure>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Live { deadline: At },
    Ended { end: End, due: At },
}

impl Entry {
    fn attempt(&self) -> u32 {
        match self.state {
            State::Live { .. } => self.attempts + 1,
            State::Ended { .. } => self.attempts.max(1),
        }
    }

    fn reason_bytes(&self) -> usize {
        let reasons = self.failures.iter().map(|failure| failure.reason.len());
        reasons.sum()
    }

    /// Whether it was tried before, in vain.
    fn has_failed(&self) -> bool {
        self.attempts > 0
    }

    /// A poison message must take no innocents with it.
    fn goes_alone(&self) -> bool {
        self.timed_out && self.attempts >= 2
    }
}

/// A message out of attempts or rejected, as the dead letters keep it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    /// The message.
    pub offset: Offset,
    /// Its last delivery.
    pub delivery: u32,
    /// Attempts made.
    pub attempts: u32,
    /// The cause of its death: `rejected`, `out_of_attempts`.
    pub cause: &'static str,
    /// How its last attempts failed.
    pub failures: Vec<Failure>,
    /// The time.
    pub died_at: At,
}

/// The writes of one round of the state machine, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// The journal's records.
    pub records: Vec<Record>,
    /// Dead letters to be copied.
    pub letters: Vec<Letter>,
    /// Dead letters to be removed: by a person, or since their message was settled after all.
    pub removed_letters: Vec<Offset>,
}

impl Batch {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

/// A live delivery, for the in-flight list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDelivery {
    /// The message.
    pub offset: Offset,
    /// The number of the delivery.
    pub delivery: u32,
    /// The number of the attempt.
    pub attempt: u32,
    /// The time when it began.
    pub since: At,
    /// The time when it expires.
    pub deadline: At,
    /// Its holder.
    pub receive: Option<Arc<Receive>>,
}

/// The numbers of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Never handed out.
    pub fresh: u64,
    /// Handed out before, and due again.
    pub again: u64,
    /// Handed out and live.
    pub live: u64,
    /// Held back by a delay.
    pub delayed: u64,
    /// Of `fresh` and `again`, those that wait for an earlier message of their key.
    pub waiting: u64,
    /// Unsettled, by lane, lowest first; None without lanes.
    pub lanes: Option<[u64; 3]>,
    /// Dead letters that are still there and whose messages were not redriven.
    pub dead: u64,
}

/// The state machine of one queue in one generation.
#[derive(Debug, Clone)]
pub struct Queue {
    id: QueueId,
    generation: Generation,
    /// Queues that had this one's name before, and were deleted.
    former: Vec<QueueId>,
    settings: Settings,
    random: Random,
    /// Every message at or below was looked at.
    scanned: i64,
    /// As `scanned`, as far as the journal knows.
    journaled: i64,
    fresh: Offsets,
    entries: BTreeMap<i64, Entry>,
    ahead: RoaringTreemap,
    /// Handed out once, and lost to retention's hard limit.
    lost: RoaringTreemap,
    dead: BTreeMap<i64, Dead>,
    /// Redriven, and not settled since.
    reopened: RoaringTreemap,
    /// Offsets before this one are not the queue's.
    start: i64,
    /// As far as the journal knows, the queue is ordered no more and keys are in order still.
    left_order: bool,

    // Derived from the entries.
    deadlines: BTreeSet<(At, i64)>,
    delays: BTreeSet<(At, i64)>,
    again: BTreeSet<i64>,
    receives: HashMap<String, BTreeSet<i64>>,
    order: Order,
    /// Bytes of all reasons.
    reason_bytes: usize,
    /// Nothing goes out before the marks of all that is unsettled are known.
    is_arranging: bool,
    /// Every entry below is a redriven one.
    passed: Cell<i64>,

    pending: Pending,
    /// The last message that went out had failed before: the next one is one that did not.
    after_failed: bool,
}

/// Uniform numbers for the jitter. Not for secrets.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, 0 to 1.
    pub fn next_unit(&mut self) -> f64 {
        (self.next_bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The next 64 bits (splitmix64).
    pub fn next_bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// The id of a dead letter, unique in its queue and known without a look-up.
#[must_use]
pub fn dead_letter_id(generation: Generation, offset: Offset) -> String {
    format!("{generation}-{offset}")
}
