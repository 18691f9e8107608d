//! The identities of messages, for lookups of everything that an origin's relay has appended.

use chrono::{DateTime, Utc};

use crate::domain::id::{Offset, OriginId, StreamId, TopicId};
use crate::store::bounded::{LONG_STATEMENT, bounded};
use crate::store::{Connection, Error};

/// The numbers of topics.
///
/// # Errors
/// The database's.
pub async fn find_topics(
    connection: &mut Connection,
    names: &[&str],
) -> Result<Vec<(TopicId, String)>, Error> {
    let rows: Vec<(i32, String)> = bounded(
        "looking up topics",
        LONG_STATEMENT,
        sqlx::query_as("select id, name from postroad_broker.topic where name = any($1::text[])")
            .bind(names)
            .fetch_all(connection),
    )
    .await?;
    Ok(rows
        .into_iter()
        .map(|(id, name)| (TopicId(id), name))
        .collect())
}

/// The topic, source and id of each message of these origins between two offsets.
///
/// # Errors
/// The database's.
pub async fn read_ids(
    connection: &mut Connection,
    stream: StreamId,
    (after, through): (Offset, Offset),
    origins: &[OriginId],
) -> Result<Vec<(TopicId, String, String)>, Error> {
    let rows: Vec<(i32, String, String)> = bounded(
        "looking for ids in the log",
        LONG_STATEMENT,
        sqlx::query_as(
            "select topic_id, source, id from postroad_broker.message
            where stream_id = $1 and \"offset\" > $2 and \"offset\" <= $3 and origin_id = any ($4)",
        )
        .bind(stream.0)
        .bind(after.0)
        .bind(through.0)
        .bind(origins.iter().map(|origin| origin.0).collect::<Vec<_>>())
        .fetch_all(connection),
    )
    .await?;
    let rows = rows.into_iter();
    Ok(rows
        .map(|(topic, source, id)| (TopicId(topic), source, id))
        .collect())
}

/// A scheduled message's name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the columns")]
pub struct ScheduledName {
    pub due_at: DateTime<Utc>,
    pub number: i64,
    pub topic: TopicId,
    pub source: String,
    pub id: String,
    pub origin: Option<OriginId>,
}

/// The names of a stream's scheduled messages after one of them, in order; those that were published are among them for a while.
///
/// # Errors
/// The database's.
pub async fn read_scheduled_ids(
    connection: &mut Connection,
    stream: StreamId,
    after: Option<(DateTime<Utc>, i64)>,
    limit: usize,
) -> Result<Vec<ScheduledName>, Error> {
    let (due_at, number) = after.unzip();
    type Columns = (DateTime<Utc>, i64, i32, String, String, Option<i32>);
    let rows: Vec<Columns> = bounded(
        "looking for ids of scheduled messages",
        LONG_STATEMENT,
        sqlx::query_as(
            "select due_at, number, topic_id, source, id, origin_id from postroad_broker.scheduled_message
            where stream_id = $1 and (due_at, number) > (coalesce($2, '-infinity'::timestamptz), coalesce($3, 0))
            order by due_at, number
            limit $4",
        )
        .bind(stream.0)
        .bind(due_at)
        .bind(number)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(connection),
    )
    .await?;
    let rows = rows.into_iter();
    Ok(rows
        .map(
            |(due_at, number, topic, source, id, origin)| ScheduledName {
                due_at,
                number,
                topic: TopicId(topic),
                source,
                id,
                origin: origin.map(OriginId),
            },
        )
        .collect())
}
