//! Reads of the log. All go through the primary key in offset order: see [`connect_reader`](super::connect_reader).

use chrono::{DateTime, Utc};
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use crate::domain::id::{Offset, StreamId, TopicId};
use crate::domain::message::{Data, Message, Priority};
use crate::domain::name::Topic;
use crate::store::bounded::{STATEMENT, bounded};
use crate::store::{Connection, Error};

/// Every stream's head: its floor, up to which all is gone.
///
/// # Errors
/// The database's.
pub async fn list_heads(connection: &mut Connection) -> Result<Vec<(StreamId, Offset)>, Error> {
    let rows: Vec<(i32, i64)> = bounded(
        "reading the heads of streams",
        STATEMENT,
        sqlx::query_as(
            "select stream_id, floor from postroad_broker.stream_head order by stream_id",
        )
        .fetch_all(connection),
    )
    .await?;
    Ok(rows
        .into_iter()
        .map(|(id, floor)| (StreamId(id), Offset(floor)))
        .collect())
}

/// A stream's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// All up to here is gone.
    pub floor: Offset,
    /// For a keyed stream: the offset up to which its keys are folded.
    pub keys_through: Option<Offset>,
}

/// A stream's head; `None` when the stream is gone.
///
/// # Errors
/// The database's.
pub async fn find_head(
    connection: &mut Connection,
    stream: StreamId,
) -> Result<Option<Head>, Error> {
    let row: Option<(i64, Option<i64>)> = bounded(
        "reading the head of a stream",
        STATEMENT,
        sqlx::query_as(
            "select floor, keys_through from postroad_broker.stream_head where stream_id = $1",
        )
        .bind(stream.0)
        .fetch_optional(connection),
    )
    .await?;
    Ok(row.map(|(floor, keys_through)| Head {
        floor: Offset(floor),
        keys_through: keys_through.map(Offset),
    }))
}

/// The last offset of the log at or after the hint; `None` when there is none.
///
/// # Errors
/// The database's.
pub async fn read_top(
    connection: &mut Connection,
    stream: StreamId,
    hint: Offset,
) -> Result<Option<Offset>, Error> {
    let row: Option<(i64,)> = bounded(
        "reading the top of a stream",
        STATEMENT,
        sqlx::query_as("select t.top from postroad_broker.stream_last($1) t where t.top >= $2")
            .bind(stream.0)
            .bind(hint.0)
            .fetch_optional(connection),
    )
    .await?;
    Ok(row.map(|(offset,)| Offset(offset)))
}

/// Topics with a number after this one, by number.
///
/// # Errors
/// The database's.
pub async fn list_topics(
    connection: &mut Connection,
    after: TopicId,
) -> Result<Vec<(TopicId, Topic)>, Error> {
    const DOING: &str = "reading topics";
    let rows: Vec<(i32, String)> = bounded(
        DOING,
        STATEMENT,
        sqlx::query_as("select id, name from postroad_broker.topic where id > $1 order by id")
            .bind(after.0)
            .fetch_all(connection),
    )
    .await?;
    rows.into_iter()
        .map(|(id, name)| match Topic::parse(&name) {
            Ok(topic) => Ok((TopicId(id), topic)),
            Err(error) => Err(Error::Corrupt {
                doing: DOING,
                what: format!("topic {id}, `{name}`, {error}"),
            }),
        })
        .collect()
}

/// The offsets between which a leaf can match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatchRange {
    /// The leaf's last offset: all up to here is examined when the range is.
    pub leaf_last: Offset,
    /// The first and last offset that can match; `None`: nothing in the leaf does.
    pub range: Option<(Offset, Offset)>,
}

/// The ranges that can have messages of these topics after an offset, leaf by leaf in offset order, at most 64 leaves.
///
/// # Errors
/// The database's.
pub async fn list_match_ranges(
    connection: &mut Connection,
    stream: StreamId,
    after: Offset,
    through: Offset,
    topics: &[TopicId],
) -> Result<Vec<MatchRange>, Error> {
    let topics: Vec<i32> = topics.iter().map(|topic| topic.0).collect();
    let rows: Vec<(i64, i64, bool, Option<i64>, Option<i64>)> = bounded("reading the topics of leaves", STATEMENT, sqlx::query_as(
        "select l.first_offset, l.last_offset, l.summarised_at is not null, t.first_match, t.last_match \
         from ( \
             select * from postroad_broker.message_leaf \
             where stream_id = $1 and last_offset > $2 and first_offset <= $3 and emptied_at is null \
             order by first_offset limit 64) l \
         left join lateral ( \
             select min(p.first_match) as first_match, max(p.last_match) as last_match \
             from postroad_broker.partition_topic p \
             where p.stream_id = l.stream_id and p.first_offset = l.first_offset and p.topic_id = any ($4)) t on true \
         order by l.first_offset",
    )
    .bind(stream.0)
    .bind(after.0)
    .bind(through.0)
    .bind(topics)
    .fetch_all(connection)).await?;
    Ok(rows
        .into_iter()
        .map(
            |(first, last, is_summarised, first_match, last_match)| MatchRange {
                leaf_last: Offset(last),
                range: if is_summarised {
                    first_match.map(Offset).zip(last_match.map(Offset))
                } else {
                    Some((Offset(first), Offset(last)))
                },
            },
        )
        .collect())
}

/// A part of a stream to look through.
#[derive(Debug)]
pub struct Slice<'a> {
    /// The stream.
    pub stream: StreamId,
    /// After this offset.
    pub after: Offset,
    /// Through this one.
    pub through: Offset,
    /// Only these topics; `None` is all.
    pub topics: Option<&'a [TopicId]>,
    /// Only keys with this hash.
    pub key_hash: Option<i64>,
    /// Only this id.
    pub id: Option<&'a str>,
    /// The most to return.
    pub limit: usize,
}

/// A message of a slice, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceItem {
    /// Its place.
    pub offset: Offset,
    /// Its topic.
    pub topic: TopicId,
    /// The hash of its key.
    pub key_hash: Option<i64>,
    /// Bytes of its payload.
    pub data_bytes: i32,
    /// Its lane.
    pub priority: Priority,
}

impl SliceItem {
    /// From the columns of `read_slice.sql`.
    pub(super) fn of(
        (offset, topic, key_hash, data_bytes, priority): (i64, i32, Option<i64>, Option<i32>, i16),
    ) -> Self {
        Self {
            offset: Offset(offset),
            topic: TopicId(topic),
            key_hash,
            data_bytes: data_bytes.unwrap_or(0),
            priority: Priority::from_stored(priority),
        }
    }
}

/// Looks through a slice, in offset order. The size of a payload is read without the payload.
///
/// # Errors
/// The database's.
pub async fn read_slice(
    connection: &mut Connection,
    slice: &Slice<'_>,
) -> Result<Vec<SliceItem>, Error> {
    let topics = slice
        .topics
        .map(|topics| topics.iter().map(|topic| topic.0).collect::<Vec<_>>());
    let rows = bounded(
        "scanning a stream",
        STATEMENT,
        sqlx::query_as(include_str!("../sql/read_slice.sql"))
            .bind(slice.stream.0)
            .bind(slice.after.0)
            .bind(slice.through.0)
            .bind(topics)
            .bind(slice.key_hash)
            .bind(slice.limit as i64)
            .bind(slice.id)
            .fetch_all(connection),
    )
    .await?;
    Ok(rows.into_iter().map(SliceItem::of).collect())
}

/// The attributes that decide order by key and lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttributesRow {
    /// The message's place.
    pub offset: Offset,
    /// The hash of its key.
    pub key_hash: Option<i64>,
    /// Its lane.
    pub priority: Priority,
}

/// A range is read whole if at least one in this many of its offsets is asked for.
const SPARSE_FROM: i64 = 4;

/// Whether offsets, which ascend, are read as a range.
#[must_use]
pub fn are_dense(offsets: &[Offset]) -> bool {
    let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else {
        return false;
    };
    last.0 - first.0 < SPARSE_FROM * offsets.len() as i64
}

/// Reads the attributes of messages, in offset order. Those that are gone are absent. `offsets` ascend, each once.
///
/// # Errors
/// The database's.
pub async fn fetch_attributes(
    connection: &mut Connection,
    stream: StreamId,
    offsets: &[Offset],
) -> Result<Vec<AttributesRow>, Error> {
    let (Some(&first), Some(&last)) = (offsets.first(), offsets.last()) else {
        return Ok(Vec::new());
    };
    let is_dense = are_dense(offsets);
    let mut rows = match is_dense {
        true => read_attributes(connection, stream, (first, last)).await?,
        false => look_up_attributes(connection, stream, offsets).await?,
    };
    rows.sort_unstable_by_key(|row| row.offset);
    if is_dense {
        let mut wanted = offsets.iter().peekable();
        rows.retain(|row| {
            while wanted.next_if(|&&offset| offset < row.offset).is_some() {}
            wanted.next_if(|&&offset| offset == row.offset).is_some()
        });
    }
    Ok(rows)
}

async fn read_attributes(
    connection: &mut Connection,
    stream: StreamId,
    (first, last): (Offset, Offset),
) -> Result<Vec<AttributesRow>, Error> {
    type Columns = (Option<Vec<i64>>, Option<Vec<Option<i64>>>, Option<Vec<i16>>);
    let (offsets, hashes, priorities): Columns = bounded(
        "reading attributes of a range",
        STATEMENT,
        sqlx::query_as(include_str!("../sql/read_attributes.sql"))
            .bind(stream.0)
            .bind(first.0)
            .bind(last.0)
            .fetch_one(connection),
    )
    .await?;
    let rest = hashes.into_iter().flatten();
    let rest = rest.zip(priorities.into_iter().flatten());
    let rows = offsets.into_iter().flatten().zip(rest);
    Ok(rows
        .map(|(offset, (key_hash, priority))| AttributesRow {
            offset: Offset(offset),
            key_hash,
            priority: Priority::from_stored(priority),
        })
        .collect())
}

/// In no order.
async fn look_up_attributes(
    connection: &mut Connection,
    stream: StreamId,
    offsets: &[Offset],
) -> Result<Vec<AttributesRow>, Error> {
    let rows: Vec<(i64, Option<i64>, i16)> = bounded(
        "reading attributes of messages",
        STATEMENT,
        sqlx::query_as(include_str!("../sql/fetch_attributes.sql"))
            .bind(stream.0)
            .bind(offsets.iter().map(|offset| offset.0).collect::<Vec<_>>())
            .bind(offsets[0].0)
            .bind(offsets[offsets.len() - 1].0)
            .fetch_all(connection),
    )
    .await?;
    Ok(rows
        .into_iter()
        .map(|(offset, key_hash, priority)| AttributesRow {
            offset: Offset(offset),
            key_hash,
            priority: Priority::from_stored(priority),
        })
        .collect())
}

/// A message as the log keeps it.
#[derive(Debug)]
pub struct Row {
    /// Its place.
    pub offset: Offset,
    /// The time when it was appended.
    pub appended_at: DateTime<Utc>,
    /// The message.
    pub message: Message,
}

/// Reads messages by offset, in offset order; `offsets` ascend. Those that are gone are absent. `topic` names the topics.
///
/// # Errors
/// The database's; a topic that is not known.
pub async fn fetch_entries(
    connection: &mut Connection,
    stream: StreamId,
    offsets: &[Offset],
    topic: impl Fn(TopicId) -> Option<Topic>,
) -> Result<Vec<Row>, Error> {
    let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else {
        return Ok(Vec::new());
    };
    // A run of offsets is read as a range: one descent of the index instead of one each.
    let is_run = last.0 - first.0 + 1 == offsets.len() as i64;
    let reading = if is_run {
        sqlx::query(include_str!("../sql/fetch_range.sql"))
            .bind(stream.0)
            .bind(first.0)
            .bind(last.0)
    } else {
        sqlx::query(include_str!("../sql/fetch_offsets.sql"))
            .bind(stream.0)
            .bind(offsets.iter().map(|offset| offset.0).collect::<Vec<_>>())
            .bind(first.0)
            .bind(last.0)
    };
    let rows = bounded(FETCHING, STATEMENT, reading.fetch_all(connection)).await?;
    let mut entries = rows
        .iter()
        .map(|row| read_row(row, &topic))
        .collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|row| row.offset);
    Ok(entries)
}

const FETCHING: &str = "reading messages";

pub(super) fn read_row(
    row: &PgRow,
    topic: impl Fn(TopicId) -> Option<Topic>,
) -> Result<Row, Error> {
    let read = || -> Result<_, sqlx::Error> {
        let kind: i16 = row.try_get(12)?;
        let data: Option<Vec<u8>> = row.try_get(13)?;
        let topic_id: i32 = row.try_get(1)?;
        let extensions: Option<String> = row.try_get(11)?;
        let rest = Row {
            offset: Offset(row.try_get(0)?),
            appended_at: row.try_get(2)?,
            message: Message {
                id: row.try_get(4)?,
                source: row.try_get(5)?,
                kind: row.try_get(6)?,
                topic: topic(TopicId(topic_id))
                    .ok_or_else(|| sqlx::Error::Decode("a topic that is not interned".into()))?,
                key: row.try_get(3)?,
                subject: row.try_get(7)?,
                time: row.try_get(8)?,
                data_content_type: row.try_get(9)?,
                data_schema: row.try_get(10)?,
                data: Data::Absent,
                extensions: serde_json::Map::new(),
                expected_version: None,
            },
        };
        Ok((rest, kind, data, extensions))
    };
    let (mut rest, kind, data, extensions) = read().map_err(Error::query(FETCHING))?;
    let offset = rest.offset;
    let corrupt = |what: String| Error::Corrupt {
        doing: FETCHING,
        what: format!("offset {offset}: {what}"),
    };
    rest.message.data = Data::from_stored(kind, data.unwrap_or_default().into())
        .map_err(|error| corrupt(error.to_string()))?;
    if let Some(extensions) = extensions {
        rest.message.extensions =
            serde_json::from_str(&extensions).map_err(|error| corrupt(error.to_string()))?;
    }
    Ok(rest)
}

/// The time when the message at an offset was appended; `None` when it is gone.
///
/// # Errors
/// The database's.
pub async fn read_appended_at(
    connection: &mut Connection,
    stream: StreamId,
    offset: Offset,
) -> Result<Option<DateTime<Utc>>, Error> {
    let row: Option<(DateTime<Utc>,)> = bounded("reading when a message was appended", STATEMENT, sqlx::query_as(
        "select appended_at from postroad_broker.message where stream_id = $1 and \"offset\" = $2",
    )
    .bind(stream.0)
    .bind(offset.0)
    .fetch_optional(connection)).await?;
    Ok(row.map(|(at,)| at))
}
