//! The other engines' requests to the log, and their answers.

use std::sync::Arc;

use crate::domain::id::{Fence, Offset, OriginId, ScheduledId, StreamId};
use crate::domain::message::{Entry, Message, Priority};
use crate::domain::name::{Topic, TopicPattern};

/// One caller's share of a group commit: appended whole or not at all.
#[derive(Debug, Clone)]
pub enum Member {
    /// Messages published over HTTP.
    Publish {
        /// In the order in which they get their offsets.
        messages: Vec<Message>,
        /// Deduplicate by (stream, source, id) within the window: the same content again is a duplicate with the first
        /// offset, other content refuses the whole member.
        check_ids: bool,
        /// Places of messages whose ids stand for the request that they came with: their content is that of the whole member,
        /// so that they repeat an earlier one only together with all that came with it. Empty unless ids are checked.
        as_one: Vec<usize>,
    },
    /// Outbox rows of one origin. Its latest position number must be `from`, its lease must be held at the fence's epoch.
    Relay {
        /// In the order in which they get their offsets. One that expects another version of its key than it has is listed as
        /// rejected instead, and has no place in the answer.
        messages: Vec<Message>,
        /// The rows of those that expect a version, in the order of the messages.
        conditional: Vec<Conditional>,
        /// The origin.
        origin: OriginId,
        /// The relay's lease.
        fence: Fence,
        /// The number of the position that the rows follow; 0 before the first.
        from: i64,
        /// The number of the position after them.
        to: i64,
        /// The found position, as JSON text.
        position: String,
        /// Rows between the two positions that cannot become messages.
        rejected: Vec<Rejected>,
    },
}

impl Member {
    /// The messages.
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        match self {
            Self::Publish { messages, .. } | Self::Relay { messages, .. } => messages,
        }
    }
}

/// An outbox row that goes into the stream at one version of its key only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conditional {
    /// Its number in the outbox.
    pub seq: i64,
    /// The row as a JSON object.
    pub outbox_row: String,
}

/// An outbox row that cannot become a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Its number in the outbox.
    pub seq: i64,
    /// The reason, as one clause.
    pub reason: String,
    /// The row as a JSON object.
    pub outbox_row: String,
}

/// One published message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// The stream that owns its topic.
    pub stream: StreamId,
    /// Its offset: of the first use, for a duplicate. `Offset(0)` for one that was scheduled.
    pub offset: Offset,
    /// Whether its id was used before for the same content.
    pub duplicate: bool,
    /// Its name among those that are to come later, if it is one: of the first use, for a duplicate.
    pub scheduled: Option<ScheduledId>,
}

/// A page of a stream, with payloads.
#[derive(Debug, Clone)]
pub struct Read {
    /// The stream.
    pub stream: StreamId,
    /// Entries after this offset.
    pub after: Offset,
    /// Up to this offset; `None` is the end of the stream when the read starts.
    pub through: Option<Offset>,
    /// Only topics that match one of these; `None` is all.
    pub topics: Option<Arc<[TopicPattern]>>,
    /// Only this ordering key.
    pub key: Option<String>,
    /// The most entries.
    pub max_messages: usize,
    /// The most bytes of events, but always one entry if there is one.
    pub max_bytes: usize,
}

/// The entries of a page, in offset order.
#[derive(Debug, Clone, PartialEq)]
pub struct Page {
    /// The messages that matched.
    pub entries: Vec<Arc<Entry>>,
    /// All up to here was examined: the next page starts after it.
    pub through: Offset,
    /// Retention dropped messages after the read's `after`, up to here: they may be missing from the entries.
    pub lost_through: Option<Offset>,
}

/// A page of one key's history, in a keyed stream.
#[derive(Debug, Clone)]
pub struct KeyRead {
    /// The stream.
    pub stream: StreamId,
    /// The key.
    pub key: String,
    /// Messages after this offset.
    pub after: Offset,
    /// Only the last message.
    pub last_only: bool,
    /// The most entries.
    pub max_messages: usize,
    /// The most bytes of events, but always one entry if there is one.
    pub max_bytes: usize,
}

/// A key, and a page of its history.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyPage {
    /// How many messages it has had, whether they are still there or not; 0 for a key that there never was.
    pub version: i64,
    /// The offset of the last one.
    pub last_offset: Option<Offset>,
    /// The first offset that the stream still has: messages before it are missing.
    pub first_offset: Offset,
    /// In offset order.
    pub entries: Vec<Arc<Entry>>,
    /// The next page is the one after this offset; none when this page reaches `last_offset`.
    pub next_after: Option<Offset>,
}

/// A page of a keyed stream's keys, each with its last message.
#[derive(Debug, Clone)]
pub struct KeysRead {
    /// The stream.
    pub stream: StreamId,
    /// Keys after this one, in the order of their bytes.
    pub after: Option<String>,
    /// The most keys.
    pub max_keys: usize,
    /// The most bytes of events, but always one key if there is one.
    pub max_bytes: usize,
}

/// Keys in the order of their bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct KeysPage {
    /// The keys.
    pub keys: Vec<KeyEntry>,
    /// The next page is the one after this key; none at the end.
    pub next_after: Option<String>,
}

/// A key and its last message.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyEntry {
    /// The key.
    pub key: String,
    /// How many messages it has had.
    pub version: i64,
    /// The offset of the last one.
    pub last_offset: Offset,
    /// Its last message; `None` when retention dropped it.
    pub entry: Option<Arc<Entry>>,
}

/// A look at what matches, without payloads.
#[derive(Debug, Clone)]
pub struct Scan {
    /// The stream.
    pub stream: StreamId,
    /// Messages after this offset.
    pub after: Offset,
    /// Only topics that match one of these; empty matches all.
    pub topics: Vec<TopicPattern>,
    /// The most items.
    pub max_items: usize,
}

/// The findings of a scan, in offset order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scanned {
    /// The messages that matched.
    pub items: Vec<ScanItem>,
    /// All up to here was examined: the next scan starts after it. Equal to the scan's `after` at the end of the stream.
    pub through: Offset,
}

/// A search, for a person: a bounded part of the stream at a time.
#[derive(Debug, Clone)]
pub struct Search {
    /// The stream.
    pub stream: StreamId,
    /// Messages after this offset.
    pub after: Offset,
    /// Topics that match one of these.
    pub topics: Vec<TopicPattern>,
    /// And this one.
    pub topic: Option<TopicPattern>,
    /// Only this ordering key.
    pub key: Option<String>,
    /// Only this CloudEvents id.
    pub id: Option<String>,
    /// The most entries.
    pub max_messages: usize,
    /// The most bytes of events, but always one entry if there is one.
    pub max_bytes: usize,
}

/// The findings of a search so far, in offset order.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchPage {
    /// The dead letters that match.
    pub entries: Vec<Arc<Entry>>,
    /// The search goes on after this offset; `None` at the end of the stream.
    pub next: Option<Offset>,
}

/// A message without its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanItem {
    /// Its place.
    pub offset: Offset,
    /// Its topic.
    pub topic: Topic,
    /// xxh3-64 of its key, see [`key_hash`].
    pub key_hash: Option<i64>,
    /// Bytes of its event, about.
    pub bytes: usize,
    /// Its lane.
    pub priority: Priority,
}

/// The attributes that decide order by key and lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// The message's place.
    pub offset: Offset,
    /// xxh3-64 of its key, see [`key_hash`].
    pub key_hash: Option<i64>,
    /// Its lane.
    pub priority: Priority,
}

/// The entries that one commit appended to one stream, or that were read from the log after another node appended them. Batches
/// of a stream follow one another without a gap.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The stream.
    pub stream: StreamId,
    /// The first offset.
    pub first: Offset,
    /// The last offset.
    pub last: Offset,
    /// The entries from first to last; fewer only when retention dropped them before this node read them.
    pub entries: Vec<Arc<Entry>>,
}

/// The hash of an ordering key as the log keeps it.
#[must_use]
pub fn key_hash(key: &str) -> i64 {
    xxhash_rust::xxh3::xxh3_64(key.as_bytes()).cast_signed()
}
