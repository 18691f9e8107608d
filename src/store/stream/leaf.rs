//! The log's leaves: made, summarised, emptied, dropped. The functions are in `migrations/broker`.

use chrono::{DateTime, Utc};
use sqlx::postgres::types::PgInterval;
use std::time::Duration;

use crate::domain::id::{Offset, StreamId};
use crate::store::bounded::{LONG_STATEMENT, STATEMENT, bounded};
use crate::store::{Connection, Error};

/// A leaf of a stream's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Its stream.
    pub stream: StreamId,
    /// Its first offset.
    pub first: Offset,
    /// Its last offset.
    pub last: Offset,
    /// The time of its creation.
    pub created_at: DateTime<Utc>,
    /// Whether its topics are written down.
    pub is_summarised: bool,
    /// Whether retention has emptied it.
    pub is_emptied: bool,
}

/// All leaves of streams that there are, by stream and offset.
///
/// # Errors
/// The database's.
pub async fn list_leaves(connection: &mut Connection) -> Result<Vec<Leaf>, Error> {
    let rows: Vec<(i32, i64, i64, DateTime<Utc>, bool, bool)> = bounded(
        "listing leaves",
        STATEMENT,
        sqlx::query_as(
            "select l.stream_id, l.first_offset, l.last_offset, l.created_at, \
             l.summarised_at is not null, l.emptied_at is not null \
         from postroad_broker.message_leaf l join postroad_broker.stream s on s.id = l.stream_id \
         order by l.stream_id, l.first_offset",
        )
        .fetch_all(connection),
    )
    .await?;
    Ok(rows
        .into_iter()
        .map(
            |(stream, first, last, created_at, is_summarised, is_emptied)| Leaf {
                stream: StreamId(stream),
                first: Offset(first),
                last: Offset(last),
                created_at,
                is_summarised,
                is_emptied,
            },
        )
        .collect())
}

/// Logs of streams that were deleted, as far as they are still there.
///
/// # Errors
/// The database's.
pub async fn list_orphans(connection: &mut Connection) -> Result<Vec<StreamId>, Error> {
    let rows: Vec<(i32,)> = bounded(
        "listing logs of deleted streams",
        STATEMENT,
        sqlx::query_as(
            "select o.id from ( \
             select substring(c.relname from 9)::integer as id from pg_class c \
             where c.relnamespace = 'postroad_broker'::regnamespace and c.relkind = 'p' and c.relname ~ '^message_[0-9]+$' \
         ) o \
         where not exists (select from postroad_broker.stream s where s.id = o.id) order by o.id",
        )
        .fetch_all(connection),
    )
    .await?;
    Ok(rows.into_iter().map(|(id,)| StreamId(id)).collect())
}

/// Makes leaves until the log reaches an offset. Returns its end; `None` when the stream is gone.
///
/// # Errors
/// The database's.
pub async fn extend_log(
    connection: &mut Connection,
    stream: StreamId,
    through: Offset,
    leaf_size: i64,
) -> Result<Option<Offset>, Error> {
    let (last,): (Option<i64>,) = bounded(
        "extending a stream's log",
        STATEMENT,
        sqlx::query_as("select postroad_broker.extend_log($1, $2, $3)")
            .bind(stream.0)
            .bind(through.0)
            .bind(leaf_size)
            .fetch_one(connection),
    )
    .await?;
    Ok(last.map(Offset))
}

/// Writes down which topics a full leaf holds, and that it was full by now.
///
/// # Errors
/// The database's.
pub async fn summarise_leaf(
    connection: &mut Connection,
    (stream, first): (StreamId, Offset),
    now: DateTime<Utc>,
) -> Result<(), Error> {
    bounded(
        "summarising a leaf",
        LONG_STATEMENT,
        sqlx::query("select postroad_broker.summarise_leaf($1, $2, $3)")
            .bind(stream.0)
            .bind(first.0)
            .bind(now)
            .execute(connection),
    )
    .await?;
    Ok(())
}

/// The conditions for emptying a leaf.
#[derive(Debug, Clone, Copy)]
pub struct EmptyLeaf {
    /// The stream.
    pub stream: StreamId,
    /// The leaf's first offset.
    pub first: Offset,
    /// The node's clock; the earlier of it and the server's counts.
    pub now: DateTime<Utc>,
    /// The least age at which settled messages go; `None` is never.
    pub settled: Option<Duration>,
    /// The age at which all messages go; `None` is never.
    pub unsettled: Option<Duration>,
    /// Whether settled messages go whatever their age.
    pub is_over_settled_bytes: bool,
    /// Whether all messages go whatever their age.
    pub is_over_unsettled_bytes: bool,
    /// Up to here every queue has settled.
    pub watermark: Offset,
    /// The time of that report: queues that began a generation since then are not in it.
    pub watermark_at: DateTime<Utc>,
}

/// The result of an attempt to empty a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Emptied {
    /// It is empty; the new floor.
    Through(Offset),
    /// It is too young.
    No,
    /// Its keys have to be folded first.
    KeysFirst,
}

/// Empties the oldest leaf that has messages, if all of it is old enough. Fails as [`Error::is_held`] when
/// somebody holds the leaf.
///
/// # Errors
/// The database's.
pub async fn empty_leaf(connection: &mut Connection, leaf: EmptyLeaf) -> Result<Emptied, Error> {
    let (floor,): (Option<i64>,) = bounded(
        "emptying a leaf",
        LONG_STATEMENT,
        sqlx::query_as("select postroad_broker.empty_leaf($1, $2, $3, $4, $5, $6, $7, $8, $9)")
            .bind(leaf.stream.0)
            .bind(leaf.first.0)
            .bind(leaf.now)
            .bind(leaf.settled.map(interval))
            .bind(leaf.unsettled.map(interval))
            .bind(leaf.watermark.0)
            .bind(leaf.watermark_at)
            .bind(leaf.is_over_settled_bytes)
            .bind(leaf.is_over_unsettled_bytes)
            .fetch_one(connection),
    )
    .await?;
    Ok(match floor {
        None => Emptied::No,
        Some(-1) => Emptied::KeysFirst,
        Some(floor) => Emptied::Through(Offset(floor)),
    })
}

fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}

/// Drops an emptied leaf. Fails as [`Error::is_held`] after 50 ms behind anybody who has the stream's log open.
///
/// # Errors
/// The database's.
pub async fn drop_leaf(
    connection: &mut Connection,
    stream: StreamId,
    first: Offset,
) -> Result<(), Error> {
    bounded(
        "dropping a leaf",
        STATEMENT,
        sqlx::query("select postroad_broker.drop_leaf($1, $2)")
            .bind(stream.0)
            .bind(first.0)
            .execute(connection),
    )
    .await?;
    Ok(())
}

/// The next step of dropping a deleted stream's log: drops `leaves` of its leaves at most, at last what is left. Whether all is gone.
/// Fails as [`Error::is_held`] after 50 ms behind anybody who has what it needs open.
///
/// # Errors
/// The database's.
pub async fn drop_stream_log(
    connection: &mut Connection,
    stream: StreamId,
    leaves: i32,
) -> Result<bool, Error> {
    bounded(
        "dropping the log of a deleted stream",
        STATEMENT,
        sqlx::query_scalar("select postroad_broker.drop_stream_log($1, $2)")
            .bind(stream.0)
            .bind(leaves)
            .fetch_one(connection),
    )
    .await
}

/// Leaves that were noted as full by a clock that was ahead were full by `now` at the latest.
///
/// # Errors
/// The database's.
pub async fn correct_leaves(connection: &mut Connection, now: DateTime<Utc>) -> Result<(), Error> {
    bounded(
        "correcting when leaves were full",
        STATEMENT,
        sqlx::query(
            "update postroad_broker.message_leaf set noted_at = $1 where noted_at > $1 + interval '1 minute'",
        )
        .bind(now)
        .execute(connection),
    )
    .await?;
    Ok(())
}

/// Notes that the node's clock and the server's agree, if they do.
///
/// # Errors
/// The database's.
pub async fn note_clocks(connection: &mut Connection, witness: DateTime<Utc>) -> Result<(), Error> {
    bounded(
        "noting that the clocks agree",
        STATEMENT,
        sqlx::query("select postroad_broker.note_clocks($1)")
            .bind(witness)
            .execute(connection),
    )
    .await?;
    Ok(())
}

/// Empties what is out of date of the recent ids and of the append results, unless the node's clock and the server's are too far apart.
/// Fails as [`Error::is_held`] when somebody holds it.
///
/// # Errors
/// The database's.
pub async fn rotate_buckets(
    connection: &mut Connection,
    witness: DateTime<Utc>,
) -> Result<(), Error> {
    bounded(
        "rotating the buckets of recent ids",
        STATEMENT,
        sqlx::query("select postroad_broker.rotate_buckets($1)")
            .bind(witness)
            .execute(connection),
    )
    .await?;
    Ok(())
}
