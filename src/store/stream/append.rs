//! The call that writes the log.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::domain::id::{Fence, Offset, OriginId, StreamId, TopicId};
use crate::domain::message::Message;
use crate::store::bounded::{STATEMENT, bounded};
use crate::store::call::{Call, Function};
use crate::store::{Connection, Error};

/// One group commit, column by column, as the function `append` in `migrations/broker` takes it.
#[derive(Debug, Default)]
pub struct Append<'a> {
    pub(super) streams: Vec<i32>,
    hints: Vec<i64>,
    counts: Vec<i32>,
    pub(super) relays: Relays<'a>,
    members: Vec<i32>,
    message_streams: Vec<i32>,
    ranks: Vec<i32>,
    topics: Vec<i32>,
    key_hashes: Vec<Option<i64>>,
    keys: Vec<Option<&'a str>>,
    ids: Vec<&'a str>,
    sources: Vec<&'a str>,
    types: Vec<Option<&'a str>>,
    subjects: Vec<Option<&'a str>>,
    times: Vec<Option<DateTime<Utc>>>,
    content_types: Vec<Option<&'a str>>,
    schemas: Vec<Option<&'a str>>,
    extensions: Vec<Option<String>>,
    kinds: Vec<i16>,
    priorities: Vec<i16>,
    data: Vec<Option<&'a [u8]>>,
    origins: Vec<Option<i32>>,
    identities: Vec<Option<Uuid>>,
    contents: Vec<Option<Uuid>>,
    /// Empty unless a message is to come later.
    pub(super) dues: Vec<Option<DateTime<Utc>>>,
    pub(super) checks_ids: bool,
    pub(super) bases: Vec<i64>,
    counted: Vec<i64>,
    expected_keys: ExpectedKeys<'a>,
    expectations: Expectations<'a>,
}

/// Keys of which some message of the group expects a version.
#[derive(Debug, Default)]
struct ExpectedKeys<'a> {
    streams: Vec<i32>,
    keys: Vec<&'a str>,
    counts: Vec<i64>,
}

/// Messages of those keys.
#[derive(Debug, Default)]
struct Expectations<'a> {
    messages: Vec<i32>,
    keys: Vec<i32>,
    expected: Vec<i64>,
    seqs: Vec<i64>,
    rows: Vec<&'a str>,
}

/// The value that stands for null in arrays of numbers: in an array with nulls, an element cannot be found by its place alone.
pub(super) const NONE: i64 = -1;

#[derive(Debug, Default)]
pub(super) struct Relays<'a> {
    pub(super) members: Vec<i32>,
    pub(super) leases: Vec<&'a str>,
    pub(super) epochs: Vec<i64>,
    pub(super) origins: Vec<i32>,
    pub(super) from: Vec<i64>,
    pub(super) to: Vec<i64>,
    pub(super) positions: Vec<&'a str>,
    pub(super) rejected_relays: Vec<i32>,
    rejected_seqs: Vec<i64>,
    rejected_reasons: Vec<&'a str>,
    rejected_rows: Vec<&'a str>,
}

/// A message of a group commit.
#[derive(Debug)]
pub struct AppendMessage<'a> {
    /// The number of its member.
    pub member: usize,
    /// The place of its stream, as [`Append::push_stream`] gave it.
    pub place: usize,
    /// The number of its topic.
    pub topic: TopicId,
    /// The message.
    pub message: &'a Message,
    /// The hash of its key.
    pub key_hash: Option<i64>,
    /// The origin whose relay appends it.
    pub origin: Option<OriginId>,
    /// Its identity and content, if ids are checked.
    pub check: Option<(Uuid, Uuid)>,
    /// The time when it enters the stream; `None` means at once.
    pub due_at: Option<DateTime<Utc>>,
}

/// A relay's share of a group commit.
#[derive(Debug)]
pub struct RelayMember<'a> {
    /// The origin whose position it moves.
    pub origin: OriginId,
    /// The relay's lease.
    pub fence: &'a Fence,
    /// The latest position number that it expects.
    pub from: i64,
    /// The number that it records.
    pub to: i64,
    /// The position that it records, JSON text.
    pub position: &'a str,
}

impl<'a> Append<'a> {
    /// Adds a stream and the last of its offsets that the appender knows. Returns its place for [`Append::push_message`].
    pub fn push_stream(&mut self, stream: StreamId, hint: i64) -> usize {
        self.streams.push(stream.0);
        self.hints.push(hint);
        self.counts.push(0);
        self.bases.push(NONE);
        self.counted.push(NONE);
        self.streams.len() - 1
    }

    /// Says between which offsets the appender has counted the keys of a keyed stream.
    pub fn counted(&mut self, place: usize, after: Offset, through: Offset) {
        self.bases[place] = after.0;
        self.counted[place] = through.0;
    }

    /// Adds a key that some message expects a version of, with how many messages it has had between those offsets. Returns its
    /// number for [`Append::push_expectation`].
    pub fn push_key(&mut self, place: usize, key: &'a str, count: usize) -> usize {
        self.expected_keys.streams.push(place as i32 + 1);
        self.expected_keys.keys.push(key);
        self.expected_keys.counts.push(count as i64);
        self.expected_keys.keys.len() - 1
    }

    /// Says of the message added last that it has this key, and which version it expects, if any. An outbox row comes with its
    /// number and its copy: it is listed as rejected when it expects another version.
    pub fn push_expectation(
        &mut self,
        key: usize,
        expected: Option<i64>,
        row: Option<(i64, &'a str)>,
    ) {
        let (seq, row) = row.unwrap_or((NONE, ""));
        self.expectations.messages.push(self.members.len() as i32);
        self.expectations.keys.push(key as i32 + 1);
        self.expectations.expected.push(expected.unwrap_or(NONE));
        self.expectations.seqs.push(seq);
        self.expectations.rows.push(row);
    }

    /// Adds a message at the end of its stream.
    pub fn push_message(&mut self, one: AppendMessage<'a>) {
        let AppendMessage {
            member,
            place,
            topic,
            message,
            key_hash,
            origin,
            check,
            due_at,
        } = one;
        self.members.push(member as i32);
        self.message_streams.push(place as i32 + 1);
        self.ranks.push(self.counts[place]);
        self.counts[place] += 1;
        self.topics.push(topic.0);
        self.key_hashes.push(key_hash);
        self.keys.push(message.key.as_deref());
        self.ids.push(&message.id);
        self.sources.push(&message.source);
        self.types.push(message.kind.as_deref());
        self.subjects.push(message.subject.as_deref());
        self.times.push(message.time);
        self.content_types
            .push(message.data_content_type.as_deref());
        self.schemas.push(message.data_schema.as_deref());
        self.extensions
            .push((!message.extensions.is_empty()).then(|| {
                serde_json::to_string(&message.extensions)
                    .expect("a JSON map always serializes into memory")
            }));
        self.kinds.push(message.data.kind());
        self.priorities.push(message.priority().stored());
        let bytes: &[u8] = message.data.bytes();
        self.data.push((message.data.kind() != 0).then_some(bytes));
        self.origins.push(origin.map(|origin| origin.0));
        self.identities.push(check.map(|(identity, _)| identity));
        self.contents.push(check.map(|(_, content)| content));
        self.checks_ids |= check.is_some();
        if due_at.is_some() || !self.dues.is_empty() {
            self.dues.resize(self.members.len() - 1, None);
            self.dues.push(due_at);
        }
    }

    /// Adds the relay part of a member.
    pub fn push_relay(&mut self, member: usize, relay: RelayMember<'a>) {
        self.relays.members.push(member as i32);
        self.relays.leases.push(&relay.fence.lease);
        self.relays.epochs.push(relay.fence.epoch.0);
        self.relays.origins.push(relay.origin.0);
        self.relays.from.push(relay.from);
        self.relays.to.push(relay.to);
        self.relays.positions.push(relay.position);
    }

    /// Adds an outbox row that could not become a message to the relay member added last.
    pub fn push_rejected(&mut self, seq: i64, reason: &'a str, outbox_row: &'a str) {
        self.relays
            .rejected_relays
            .push(self.relays.members.len() as i32);
        self.relays.rejected_seqs.push(seq);
        self.relays.rejected_reasons.push(reason);
        self.relays.rejected_rows.push(outbox_row);
    }

    /// The streams with the messages that go to each.
    pub fn streams(&self) -> impl Iterator<Item = (StreamId, i32)> {
        let counts = self.counts.iter().copied();
        self.streams.iter().map(|&id| StreamId(id)).zip(counts)
    }
}

/// The outcome of a group.
#[derive(Debug)]
pub enum AppendOutcome {
    /// It is committed.
    Appended(Appended),
    /// Nothing was done: the catalogue has another version than the group was routed by.
    Stale,
    /// Nothing was done: keys were counted from another base than their heads have by now, or too far from the log's end.
    Behind,
    /// Nothing was done now, and whether an earlier try was is forgotten by now: the group is older than results are kept.
    Expired {
        /// The database's clock.
        clock: DateTime<Utc>,
    },
}

/// The result of a committed group.
#[derive(Debug, Default)]
pub struct Appended {
    /// By stream: the first offset that its messages got.
    pub first: Vec<i64>,
    /// By stream: when they were appended.
    pub at: Vec<DateTime<Utc>>,
    /// Members of relays that were refused, with the latest position number; `None` is fenced.
    pub refused: Vec<(usize, Option<i64>)>,
    /// Messages whose id was used before.
    pub seen: Vec<Seen>,
    /// Messages, from 0, that expect another version of their key, with the version that it had at their turn. One that was
    /// published refuses its member, an outbox row is left out alone.
    pub conflicts: Vec<(usize, i64)>,
    /// By message: its number, if it was scheduled. Empty when none was.
    pub scheduled: Vec<Option<i64>>,
}

/// A message whose id was used before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its place in the group, from 0.
    pub place: usize,
    /// The offset of the first use; the number of a scheduled one.
    pub offset: i64,
    /// Whether the first use was for other content.
    pub is_conflict: bool,
    /// The due time of the first use, if it was scheduled.
    pub due_at: Option<DateTime<Utc>>,
}

type Columns = (
    String,
    DateTime<Utc>,
    Option<Vec<i64>>,
    Option<Vec<DateTime<Utc>>>,
    Option<Vec<i32>>,
    Option<Vec<Option<i64>>>,
    Option<Vec<i32>>,
    Option<Vec<i64>>,
    Option<Vec<bool>>,
    Option<Vec<i32>>,
    Option<Vec<i64>>,
    Option<Vec<Option<DateTime<Utc>>>>,
    Option<Vec<Option<i64>>>,
);

/// Names a group, and says what it was made under.
#[derive(Debug, Clone, Copy)]
pub struct GroupKey {
    /// The node whose group it is, and who must hold the leases.
    pub incarnation: i64,
    /// Its number among the node's groups.
    pub number: i64,
    /// The database's clock when it was made.
    pub born_at: DateTime<Utc>,
    /// The catalogue's version that it was routed by.
    pub catalogue: i64,
    /// The node's clock at this try.
    pub witness: DateTime<Utc>,
}

/// Appends a group. `is_repeat`: an earlier call's outcome is not known; its result is looked up.
///
/// # Errors
/// The database's. Lost connections leave the outcome unknown; any other error means that nothing was done.
pub async fn append(
    connection: &mut Connection,
    key: GroupKey,
    is_repeat: bool,
    group: &Append<'_>,
) -> Result<AppendOutcome, Error> {
    let columns: Columns = bounded("appending", STATEMENT, async {
        call(key, is_repeat, group)
            .query_as()?
            .fetch_one(connection)
            .await
    })
    .await?;
    read_outcome(columns)
}

/// The whole append is one call that commits by itself: see the function's header in `migrations/broker`.
static APPEND: Function = Function::new(
    "append",
    "status, clock, stream_first, stream_at, refused_member, refused_found, seen_message, seen_offset, seen_conflict, \
     conflict_message, conflict_version, seen_due, scheduled_number",
);

fn call(key: GroupKey, is_repeat: bool, group: &Append<'_>) -> Call {
    let call = APPEND
        .call()
        .with("p_incarnation", key.incarnation)
        .with("p_number", key.number)
        .with("p_born_at", key.born_at)
        .with("p_is_repeat", is_repeat)
        .with("p_catalogue", key.catalogue)
        .with("p_checks_ids", group.checks_ids)
        .with("s_id", &group.streams)
        .with("s_hint", &group.hints)
        .with("r_member", &group.relays.members)
        .with("r_lease", &group.relays.leases)
        .with("r_epoch", &group.relays.epochs)
        .with("r_origin", &group.relays.origins)
        .with("r_from", &group.relays.from)
        .with("r_to", &group.relays.to)
        .with("r_position", &group.relays.positions)
        .with("j_relay", &group.relays.rejected_relays)
        .with("j_seq", &group.relays.rejected_seqs)
        .with("j_reason", &group.relays.rejected_reasons)
        .with("j_row", &group.relays.rejected_rows)
        .with("m_member", &group.members)
        .with("m_stream", &group.message_streams)
        .with("m_rank", &group.ranks);
    with_messages(call, group)
        .with("s_base", &group.bases)
        .with("s_counted", &group.counted)
        .with("k_stream", &group.expected_keys.streams)
        .with("k_key", &group.expected_keys.keys)
        .with("k_count", &group.expected_keys.counts)
        .with("x_message", &group.expectations.messages)
        .with("x_key", &group.expectations.keys)
        .with("x_expected", &group.expectations.expected)
        .with("x_seq", &group.expectations.seqs)
        .with("x_row", &group.expectations.rows)
        .with("m_due", &group.dues)
        .with("p_witness", key.witness)
}

/// Adds what messages are made of, column by column.
pub(super) fn with_messages(call: Call, group: &Append<'_>) -> Call {
    call.with("m_topic", &group.topics)
        .with("m_key_hash", &group.key_hashes)
        .with("m_key", &group.keys)
        .with("m_id", &group.ids)
        .with("m_source", &group.sources)
        .with("m_type", &group.types)
        .with("m_subject", &group.subjects)
        .with("m_time", &group.times)
        .with("m_content_type", &group.content_types)
        .with("m_schema", &group.schemas)
        .with("m_extensions", &group.extensions)
        .with("m_kind", &group.kinds)
        .with("m_priority", &group.priorities)
        .with("m_data", &group.data)
        .with("m_origin", &group.origins)
        .with("m_identity", &group.identities)
        .with("m_content", &group.contents)
}

fn read_outcome(columns: Columns) -> Result<AppendOutcome, Error> {
    let (status, clock, first, at, refused, found, seen, seen_at, is_other, ..) = columns;
    let (.., conflicts, versions, seen_due, scheduled) = columns;
    match status.as_str() {
        "stale" => return Ok(AppendOutcome::Stale),
        "behind" => return Ok(AppendOutcome::Behind),
        "expired" => return Ok(AppendOutcome::Expired { clock }),
        "appended" => {}
        _ => return Err(Error::unknown_status("appending", &status)),
    }
    let from_zero = |places: Option<Vec<i32>>| {
        let places = places.unwrap_or_default().into_iter();
        places.map(|place| place as usize - 1)
    };
    let members = refused.unwrap_or_default().into_iter();
    Ok(AppendOutcome::Appended(Appended {
        first: first.unwrap_or_default(),
        at: at.unwrap_or_default(),
        refused: members
            .map(|member| member as usize)
            .zip(found.unwrap_or_default())
            .collect(),
        seen: from_zero(seen)
            .zip(seen_at.unwrap_or_default())
            .zip(is_other.unwrap_or_default())
            .zip(seen_due.unwrap_or_default())
            .map(|(((place, offset), is_conflict), due_at)| Seen {
                place,
                offset,
                is_conflict,
                due_at,
            })
            .collect(),
        conflicts: from_zero(conflicts)
            .zip(versions.unwrap_or_default())
            .collect(),
        scheduled: scheduled.unwrap_or_default(),
    }))
}

/// As many topics as there can be: each is in the memory of every node.
pub const TOPICS_MAX: i64 = 200_000;

/// The numbers of topics, new ones included.
///
/// # Errors
/// The database's; [`Error::is_topic_limit_reached`] for one more than [`TOPICS_MAX`].
pub async fn intern_topics(
    connection: &mut Connection,
    names: &[&str],
) -> Result<Vec<(TopicId, String)>, Error> {
    let rows: Vec<(i32, String)> = bounded(
        "interning topics",
        STATEMENT,
        sqlx::query_as("select topic_id, topic_name from postroad_broker.intern_topics($1, $2)")
            .bind(names)
            .bind(TOPICS_MAX)
            .fetch_all(connection),
    )
    .await?;
    Ok(rows
        .into_iter()
        .map(|(id, name)| (TopicId(id), name))
        .collect())
}
