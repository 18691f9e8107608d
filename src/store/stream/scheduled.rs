//! Scheduled messages. The functions are in `migrations/broker`.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::Row as _;
use sqlx::postgres::types::PgInterval;

use super::log::{Row, read_row};
use crate::domain::id::{Offset, ScheduledId, StreamId, TopicId};
use crate::domain::message::Priority;
use crate::domain::name::{StreamName, Topic};
use crate::store::bounded::{LONG_STATEMENT, STATEMENT, bounded};
use crate::store::{Connection, Error};

/// Makes the leaf that moves of horizons at a time are filed in, if it is missing.
///
/// # Errors
/// The database's.
pub async fn extend_publications(
    connection: &mut Connection,
    at: DateTime<Utc>,
) -> Result<(), Error> {
    extend_scheduled(connection, &("publication".to_owned(), at)).await
}

/// The leaves that are still missing, the nearest first: each by its kind and a time in it.
///
/// # Errors
/// The database's.
pub async fn missing_scheduled_leaves(
    connection: &mut Connection,
    now: DateTime<Utc>,
) -> Result<Vec<(String, DateTime<Utc>)>, Error> {
    bounded(
        "looking for leaves of scheduled messages",
        STATEMENT,
        sqlx::query_as("select kind, leaf_at from postroad_broker.missing_scheduled_leaves($1)")
            .bind(now)
            .fetch_all(connection),
    )
    .await
}

/// The database's clock: what leaves are made for. A node's own view of it does not follow when it is set.
///
/// # Errors
/// The database's.
pub async fn read_clock(connection: &mut Connection) -> Result<DateTime<Utc>, Error> {
    bounded(
        "reading the clock",
        STATEMENT,
        sqlx::query_scalar("select clock_timestamp()").fetch_one(connection),
    )
    .await
}

/// Makes a leaf, if it is missing.
///
/// # Errors
/// The database's.
pub async fn extend_scheduled(
    connection: &mut Connection,
    (kind, at): &(String, DateTime<Utc>),
) -> Result<(), Error> {
    bounded(
        "making leaves for scheduled messages",
        STATEMENT,
        sqlx::query("select postroad_broker.extend_scheduled($1, $2)")
            .bind(kind)
            .bind(at)
            .execute(connection),
    )
    .await?;
    Ok(())
}

/// The result of publishing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishedScheduled {
    /// The horizon moved over this many messages, and over cancelled ones; the log ends at this offset.
    Moved {
        /// The last offset of the log.
        last: Offset,
        /// Messages appended.
        count: u64,
    },
    /// Nothing is due.
    Idle,
    /// There is no such stream.
    Gone,
}

/// Publishes the next messages of a stream that are due, as one commit. Safe to repeat when its outcome is unknown: the next call
/// goes on from what is there.
///
/// # Errors
/// The database's.
pub async fn publish_scheduled(
    connection: &mut Connection,
    stream: StreamId,
    hint: Offset,
    (max_messages, max_bytes): (i32, i64),
    witness: DateTime<Utc>,
) -> Result<PublishedScheduled, Error> {
    let (status, last, count): (String, Option<i64>, i32) = bounded(
        "publishing scheduled messages",
        STATEMENT,
        sqlx::query_as(
            "select status, last_offset, message_count from postroad_broker.publish_scheduled($1, $2, $3, $4, $5)",
        )
        .bind(stream.0)
        .bind(hint.0)
        .bind(max_messages)
        .bind(max_bytes)
        .bind(witness)
        .fetch_one(connection),
    )
    .await?;
    Ok(match status.as_str() {
        "published" => PublishedScheduled::Moved {
            last: Offset(last.unwrap_or_default()),
            count: u64::from(count.unsigned_abs()),
        },
        "idle" => PublishedScheduled::Idle,
        "gone" => PublishedScheduled::Gone,
        _ => {
            return Err(Error::unknown_status(
                "publishing scheduled messages",
                &status,
            ));
        }
    })
}

/// The next scheduled messages of a stream that had some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextScheduled {
    /// The stream.
    pub stream: StreamId,
    /// The due time of its next message; `None` if it lies beyond the time looked for.
    pub due_at: Option<DateTime<Utc>>,
    /// The clock to go by, of the database's and the node's.
    pub clock: DateTime<Utc>,
    /// The latest time at which the next move of the horizon is filed.
    pub files_until: DateTime<Utc>,
}

/// The next message of each stream, `ahead` of the clock at most.
///
/// # Errors
/// The database's.
pub async fn next_scheduled(
    connection: &mut Connection,
    ahead: Duration,
    witness: DateTime<Utc>,
) -> Result<Vec<NextScheduled>, Error> {
    type Columns = (i32, Option<DateTime<Utc>>, DateTime<Utc>, DateTime<Utc>);
    let rows: Vec<Columns> = bounded(
        "looking for scheduled messages that are due",
        STATEMENT,
        sqlx::query_as("select stream_id, due_at, clock, files_until from postroad_broker.next_scheduled($1, $2)")
            .bind(interval(ahead))
            .bind(witness)
            .fetch_all(connection),
    )
    .await?;
    let next = rows
        .into_iter()
        .map(|(stream, due_at, clock, files_until)| NextScheduled {
            stream: StreamId(stream),
            due_at,
            clock,
            files_until,
        });
    Ok(next.collect())
}

fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}

/// The result of a cancellation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelledScheduled {
    /// It will not be published.
    Cancelled {
        /// Whether this call did it.
        is_new: bool,
    },
    /// It is in its stream.
    Published {
        /// The place.
        offset: Offset,
    },
    /// There is no such message, or it is forgotten.
    Unknown,
}

/// Cancels a message that is not in its stream yet. Safe to repeat.
///
/// # Errors
/// The database's.
pub async fn cancel_scheduled(
    connection: &mut Connection,
    id: ScheduledId,
) -> Result<CancelledScheduled, Error> {
    let (status, offset, is_new): (String, Option<i64>, bool) = bounded(
        "cancelling a scheduled message",
        STATEMENT,
        sqlx::query_as(
            "select status, \"offset\", is_new from postroad_broker.cancel_scheduled($1, $2, $3)",
        )
        .bind(id.stream.0)
        .bind(id.due_at)
        .bind(id.number)
        .fetch_one(connection),
    )
    .await?;
    Ok(match status.as_str() {
        "cancelled" => CancelledScheduled::Cancelled { is_new },
        "published" => CancelledScheduled::Published {
            offset: Offset(offset.unwrap_or_default()),
        },
        "unknown" => CancelledScheduled::Unknown,
        _ => {
            return Err(Error::unknown_status(
                "cancelling a scheduled message",
                &status,
            ));
        }
    })
}

/// A leaf of scheduled messages or of horizons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledLeaf {
    /// `near` and `month` of messages, `publication` of moves of horizons.
    pub kind: String,
    /// Its first due time.
    pub first_at: DateTime<Utc>,
    /// The first due time after it.
    pub last_at: DateTime<Utc>,
}

/// All leaves, by kind and time, those of publications last.
///
/// # Errors
/// The database's.
pub async fn list_scheduled_leaves(
    connection: &mut Connection,
) -> Result<Vec<ScheduledLeaf>, Error> {
    let rows: Vec<(String, DateTime<Utc>, DateTime<Utc>)> = bounded(
        "listing leaves of scheduled messages",
        STATEMENT,
        sqlx::query_as(
            "select kind, first_at, last_at from postroad_broker.scheduled_leaf order by kind, first_at",
        )
        .fetch_all(connection),
    )
    .await?;
    let leaves = rows
        .into_iter()
        .map(|(kind, first_at, last_at)| ScheduledLeaf {
            kind,
            first_at,
            last_at,
        });
    Ok(leaves.collect())
}

/// Empties a leaf whose time has been over for `keep`, or drops one that is empty. `now` is the node's clock; the earlier of it and
/// the server's counts. Whether anything was done. Fails as [`Error::is_held`] when somebody is in the way.
///
/// # Errors
/// The database's.
pub async fn empty_scheduled_leaf(
    connection: &mut Connection,
    leaf: &ScheduledLeaf,
    now: DateTime<Utc>,
    keep: Duration,
) -> Result<bool, Error> {
    let (done,): (Option<String>,) = bounded(
        "emptying a leaf of scheduled messages",
        LONG_STATEMENT,
        sqlx::query_as("select postroad_broker.empty_scheduled_leaf($1, $2, $3, $4)")
            .bind(&leaf.kind)
            .bind(leaf.first_at)
            .bind(now)
            .bind(interval(keep))
            .fetch_one(connection),
    )
    .await?;
    Ok(done.is_some())
}

/// Deletes rows of no leaf that are remembered no more, `max` of a stream at most. Returns how many.
///
/// # Errors
/// The database's.
pub async fn forget_scheduled(connection: &mut Connection, max: i32) -> Result<i32, Error> {
    bounded(
        "deleting scheduled messages that are past",
        LONG_STATEMENT,
        sqlx::query_scalar("select postroad_broker.forget_scheduled($1)")
            .bind(max)
            .fetch_one(connection),
    )
    .await
}

/// A query for scheduled messages.
#[derive(Debug, Clone, Copy)]
pub struct ScheduledSlice {
    /// Only of this stream.
    pub stream: Option<StreamId>,
    /// Due from then on.
    pub from: DateTime<Utc>,
    /// And before then.
    pub until: DateTime<Utc>,
    /// After this one in the order (due, number).
    pub after: Option<ScheduledId>,
    /// The most to return.
    pub limit: u32,
}

/// A message that waits to be published, without its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitingRow {
    /// Its name.
    pub id: ScheduledId,
    /// Its topic.
    pub topic: TopicId,
    /// Its ordering key.
    pub key: Option<String>,
    /// CloudEvents id.
    pub event_id: String,
    /// CloudEvents source.
    pub source: String,
    /// CloudEvents type; `None` is the topic.
    pub kind: Option<String>,
    /// Its lane.
    pub priority: Priority,
    /// The time when it was accepted.
    pub accepted_at: DateTime<Utc>,
    /// Bytes of its payload.
    pub data_bytes: u64,
}

/// Reads messages that wait, by (due, number). The session must be a reader's, which plans each time: only leaves of the slice are
/// looked at.
///
/// # Errors
/// The database's.
pub async fn list_scheduled(
    connection: &mut Connection,
    slice: &ScheduledSlice,
) -> Result<Vec<WaitingRow>, Error> {
    const DOING: &str = "listing scheduled messages";
    let (after_due, after_number) = match slice.after {
        Some(after) => (after.due_at, after.number),
        None => (slice.from, 0),
    };
    let rows = bounded(
        DOING,
        STATEMENT,
        sqlx::query(include_str!("../sql/list_scheduled.sql"))
            .bind(slice.from)
            .bind(slice.until)
            .bind(after_due)
            .bind(after_number)
            .bind(slice.stream.map(|stream| stream.0))
            .bind(i64::from(slice.limit))
            .fetch_all(connection),
    )
    .await?;
    let read = |row: &sqlx::postgres::PgRow| -> Result<WaitingRow, sqlx::Error> {
        Ok(WaitingRow {
            id: ScheduledId {
                stream: StreamId(row.try_get(0)?),
                due_at: row.try_get(1)?,
                number: row.try_get(2)?,
            },
            topic: TopicId(row.try_get(3)?),
            key: row.try_get(4)?,
            event_id: row.try_get(5)?,
            source: row.try_get(6)?,
            kind: row.try_get(7)?,
            priority: Priority::from_stored(row.try_get(8)?),
            accepted_at: row.try_get(9)?,
            data_bytes: u64::from(row.try_get::<i32, _>(10)?.unsigned_abs()),
        })
    };
    let rows: Result<_, _> = rows.iter().map(read).collect();
    rows.map_err(Error::query(DOING))
}

/// The state of a scheduled message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScheduledStatus {
    /// It waits.
    Scheduled,
    /// It is in its stream, at this offset.
    Published(Offset),
    /// It was cancelled then.
    Cancelled(DateTime<Utc>),
}

/// A scheduled message, whole.
#[derive(Debug)]
pub struct ScheduledRow {
    /// The message, with when it was accepted for when it was appended, and no offset.
    pub row: Row,
    /// Its status.
    pub status: ScheduledStatus,
}

/// Reads a scheduled message; `None` when there is none with this id, or it was forgotten.
///
/// # Errors
/// The database's.
pub async fn find_scheduled(
    connection: &mut Connection,
    id: ScheduledId,
    topic: impl Fn(TopicId) -> Option<Topic>,
) -> Result<Option<ScheduledRow>, Error> {
    const DOING: &str = "reading a scheduled message";
    let found = bounded(
        DOING,
        STATEMENT,
        sqlx::query(include_str!("../sql/find_scheduled.sql"))
            .bind(id.stream.0)
            .bind(id.due_at)
            .bind(id.number)
            .fetch_optional(connection),
    )
    .await?;
    let Some(found) = found else { return Ok(None) };
    let read = || -> Result<_, sqlx::Error> {
        let cancelled_at: Option<DateTime<Utc>> = found.try_get(14)?;
        let is_published: bool = found.try_get(15)?;
        let offset: Option<i64> = found.try_get(16)?;
        Ok(match (cancelled_at, is_published) {
            (Some(at), _) => ScheduledStatus::Cancelled(at),
            (None, true) => ScheduledStatus::Published(Offset(offset.unwrap_or_default())),
            (None, false) => ScheduledStatus::Scheduled,
        })
    };
    Ok(Some(ScheduledRow {
        status: read().map_err(Error::query(DOING))?,
        row: read_row(&found, topic)?,
    }))
}

/// How many messages of a stream wait, `most` at most.
///
/// # Errors
/// The database's.
pub async fn count_waiting(
    connection: &mut Connection,
    stream: StreamId,
    most: i64,
) -> Result<i64, Error> {
    bounded(
        "counting scheduled messages of a stream",
        STATEMENT,
        sqlx::query_scalar("select postroad_broker.count_waiting($1, $2)")
            .bind(stream.0)
            .bind(most)
            .fetch_one(connection),
    )
    .await
}

/// How many messages wait, by stream; streams that never had one are absent. Counts 1,000,000 of a stream at most.
///
/// # Errors
/// The database's.
pub async fn count_scheduled(
    connection: &mut Connection,
) -> Result<HashMap<StreamId, (StreamName, i64)>, Error> {
    const DOING: &str = "counting scheduled messages";
    let rows: Vec<(i32, String, i64)> = bounded(
        DOING,
        LONG_STATEMENT,
        sqlx::query_as(include_str!("../sql/count_scheduled.sql")).fetch_all(connection),
    )
    .await?;
    rows.into_iter()
        .map(|(id, name, count)| {
            let name = StreamName::parse(&name).map_err(|error| Error::Corrupt {
                doing: DOING,
                what: format!("`{name}` {error}"),
            })?;
            Ok((StreamId(id), (name, count)))
        })
        .collect()
}
