//! Queues as they were declared. Called from tasks that are never aborted.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::Row as _;

use super::renewal::Renewed;
use super::{Database, Error, repeated};
use crate::domain::id::{Generation, Offset, QueueId, Slot, StreamId};
use crate::domain::name::{QueueName, StreamName, TopicPattern};
use crate::domain::policy::{Settings, Start};

/// A queue's row.
#[derive(Debug, Clone, PartialEq)]
pub struct QueueRow {
    /// Its number.
    pub id: QueueId,
    /// Its name.
    pub name: QueueName,
    /// Its stream.
    pub stream_id: StreamId,
    /// Its stream's name.
    pub stream: StreamName,
    /// The topics it takes.
    pub patterns: Vec<TopicPattern>,
    /// Its settings.
    pub settings: Settings,
    /// The declared start.
    pub start: Start,
    /// Its incarnation.
    pub generation: Generation,
    /// The offset that the start came to.
    pub start_offset: Offset,
    /// The slot that owns it.
    pub slot: Slot,
    /// Whether a person has paused it.
    pub is_paused: bool,
    /// The act that began its generation, except for the first one.
    pub renewal: Option<Renewed>,
    /// The time of its creation.
    pub created_at: DateTime<Utc>,
    /// Queues that had its name before, and were deleted.
    pub former: Vec<QueueId>,
}

/// A queue to be made.
#[derive(Debug, Clone, PartialEq)]
pub struct NewQueue {
    /// Its name.
    pub name: QueueName,
    /// Its stream.
    pub stream_id: StreamId,
    /// The topics it takes.
    pub patterns: Vec<TopicPattern>,
    /// Its settings.
    pub settings: Settings,
    /// Its start.
    pub start: Start,
    /// For a start at a time: the last offset before it.
    pub before_start: Offset,
}

/// The result of creating a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It is made.
    New {
        /// Its number.
        id: QueueId,
        /// The first offset that it can deliver.
        start_offset: Offset,
        /// The time of its creation.
        created_at: DateTime<Utc>,
    },
    /// There is one of this name.
    NameTaken,
    /// The stream is gone.
    NoStream,
}

/// Reads all queues.
///
/// # Errors
/// The database's, or a row that no version has written.
pub async fn find_queues(database: &Database) -> Result<Vec<QueueRow>, Error> {
    find(database, None, None, 0).await
}

/// Reads the queues of a slot.
///
/// # Errors
/// As [`find_queues`].
pub async fn find_queues_of(database: &Database, slot: Slot) -> Result<Vec<QueueRow>, Error> {
    find(database, Some(slot), None, 0).await
}

/// Reads the queue of a name, if there is one.
///
/// # Errors
/// As [`find_queues`].
pub async fn find_queue(database: &Database, name: &QueueName) -> Result<Option<QueueRow>, Error> {
    let mut rows = find(database, None, Some(name), 0).await?;
    Ok(rows.pop())
}

/// Changes of the catalogue: its version, the queues created since another version, and the deleted ones.
///
/// # Errors
/// As [`find_queues`].
pub async fn find_changes(
    database: &Database,
    since: i64,
) -> Result<(i64, Vec<QueueRow>, Vec<QueueId>), Error> {
    const DOING: &str = "reading the catalogue of queues";
    // The version first: what is read after it is of that version at least.
    let version = read_version(database).await?;
    let made = find(database, None, None, since).await?;
    let deleted: Vec<i64> =
        sqlx::query_scalar("select id from postroad_broker.former_queue where version > $1")
            .bind(since)
            .fetch_all(database.pooled())
            .await
            .map_err(Error::query(DOING))?;
    Ok((version, made, deleted.into_iter().map(QueueId).collect()))
}

/// Reads the version of the catalogue: it rises when a queue is made or deleted.
///
/// # Errors
/// The database's.
pub async fn read_version(database: &Database) -> Result<i64, Error> {
    sqlx::query_scalar("select version from postroad_broker.queue_catalogue")
        .fetch_one(database.pooled())
        .await
        .map_err(Error::query("reading the catalogue of queues"))
}

async fn find(
    database: &Database,
    slot: Option<Slot>,
    name: Option<&QueueName>,
    since: i64,
) -> Result<Vec<QueueRow>, Error> {
    let rows = sqlx::query(
        "select q.id, q.name, q.stream_id, s.name as stream, q.patterns, q.settings::text as settings, \
            q.start::text as start, q.generation, q.start_offset, q.slot, q.paused, \
            q.renewal::text as renewal, q.created_at, \
            array(select f.id from postroad_broker.former_queue f where f.name = q.name order by f.id desc limit 1000) as former \
         from postroad_broker.queue q join postroad_broker.stream s on s.id = q.stream_id \
         where ($1::smallint is null or q.slot = $1) and ($2::text is null or q.name = $2) and q.version > $3 \
         order by q.id",
    )
    .bind(slot.map(|slot| slot.0))
    .bind(name.map(QueueName::as_str))
    .bind(since)
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query("reading queues"))?;
    rows.iter().map(read_queue).collect()
}

/// A node's report on the streams that queues of its slots read: slot, stream, and the offset up to which all of them have
/// settled it.
pub type Told = (Slot, StreamId, Offset);

/// Writes down how far the queues of a node's slots are, in place of what it said before.
///
/// # Errors
/// The database's.
pub async fn write_watermarks(
    database: &Database,
    incarnation: i64,
    age: Duration,
    told: &[Told],
) -> Result<(), Error> {
    let slots: Vec<i16> = told.iter().map(|(slot, _, _)| slot.0).collect();
    let streams: Vec<i32> = told.iter().map(|(_, stream, _)| stream.0).collect();
    let offsets: Vec<i64> = told.iter().map(|(_, _, offset)| offset.0).collect();
    sqlx::query(
        "insert into postroad_broker.slot_watermark (incarnation, told_at, slots, streams, watermarks) \
         select n.incarnation, clock_timestamp() - make_interval(secs => $2), $3, $4, $5 \
         from postroad_broker.node n where n.incarnation = $1 \
         on conflict (incarnation) do update set told_at = excluded.told_at, slots = excluded.slots, \
            streams = excluded.streams, watermarks = excluded.watermarks",
    )
    .bind(incarnation)
    .bind(age.as_secs_f64())
    .bind(slots)
    .bind(streams)
    .bind(offsets)
    .execute(database.pooled())
    .await
    .map_err(Error::query("writing how far queues are"))?;
    Ok(())
}

/// Reads what other nodes said of their slots: which node, what, and how long ago.
///
/// # Errors
/// The database's.
pub async fn find_watermarks(
    database: &Database,
    incarnation: i64,
) -> Result<Vec<(i64, Told, Duration)>, Error> {
    let rows: Vec<(i64, i16, i32, i64, f64)> = sqlx::query_as(
        "select w.incarnation, t.slot, t.stream_id, t.watermark, \
            extract(epoch from clock_timestamp() - w.told_at)::double precision \
         from postroad_broker.slot_watermark w, \
            unnest(w.slots, w.streams, w.watermarks) t (slot, stream_id, watermark) \
         where w.incarnation <> $1",
    )
    .bind(incarnation)
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query("reading how far queues are"))?;
    let told = rows
        .into_iter()
        .map(|(node, slot, stream, offset, seconds)| {
            let age = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            (node, (Slot(slot), StreamId(stream), Offset(offset)), age)
        });
    Ok(told.collect())
}

fn read_queue(row: &sqlx::postgres::PgRow) -> Result<QueueRow, Error> {
    const DOING: &str = "reading queues";
    fn column<'r, T>(row: &'r sqlx::postgres::PgRow, name: &str) -> Result<T, Error>
    where
        T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        row.try_get(name).map_err(Error::query(DOING))
    }
    let corrupt = |what: String| Error::Corrupt { doing: DOING, what };
    let id: i64 = column(row, "id")?;
    let name: String = column(row, "name")?;
    let stream: String = column(row, "stream")?;
    let patterns: Vec<String> = column(row, "patterns")?;
    let settings: String = column(row, "settings")?;
    let start: String = column(row, "start")?;
    Ok(QueueRow {
        id: QueueId(id),
        name: QueueName::parse(&name).map_err(|e| corrupt(format!("queue {id}: name {e}")))?,
        stream_id: StreamId(column(row, "stream_id")?),
        stream: StreamName::parse(&stream)
            .map_err(|e| corrupt(format!("queue {id}: stream {e}")))?,
        patterns: patterns
            .iter()
            .map(|pattern| TopicPattern::parse(pattern))
            .collect::<Result<_, _>>()
            .map_err(|e| corrupt(format!("queue {id}: pattern {e}")))?,
        settings: serde_json::from_str(&settings)
            .map_err(|e| corrupt(format!("queue {id}: settings: {e}")))?,
        start: serde_json::from_str(&start)
            .map_err(|e| corrupt(format!("queue {id}: start: {e}")))?,
        generation: Generation(column(row, "generation")?),
        start_offset: Offset(column(row, "start_offset")?),
        slot: Slot(column(row, "slot")?),
        is_paused: column(row, "paused")?,
        renewal: column::<Option<String>>(row, "renewal")?
            .map(|text| serde_json::from_str(&text))
            .transpose()
            .map_err(|e| corrupt(format!("queue {id}: renewal: {e}")))?,
        created_at: column(row, "created_at")?,
        former: column::<Vec<i64>>(row, "former")?
            .into_iter()
            .map(QueueId)
            .collect(),
    })
}

/// Finds the streams that no queue reads.
///
/// # Errors
/// The database's.
pub async fn find_streams_without_queues(database: &Database) -> Result<Vec<StreamId>, Error> {
    let ids: Vec<i32> = sqlx::query_scalar(
        "select s.id from postroad_broker.stream s \
         where not exists (select from postroad_broker.queue q where q.stream_id = s.id)",
    )
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query("finding streams without queues"))?;
    Ok(ids.into_iter().map(StreamId).collect())
}

pub(super) fn to_json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("settings always serialize into memory")
}

fn texts(patterns: &[TopicPattern]) -> Vec<String> {
    patterns
        .iter()
        .map(|pattern| pattern.as_str().to_owned())
        .collect()
}

/// Makes a queue, in a transaction of its own under the lock of the stream's head. The number is from [`next_queue`], for this call
/// alone: a queue that has it was made by an earlier try of this call.
///
/// # Errors
/// The database's.
pub async fn insert_queue(
    database: &Database,
    id: QueueId,
    queue: &NewQueue,
) -> Result<Inserted, Error> {
    repeated(|is_repeat| async move {
        let inserted = try_insert_queue(database, id, queue).await?;
        if inserted != Inserted::NameTaken || !is_repeat {
            return Ok(inserted);
        }
        let found = find_queue(database, &queue.name).await?;
        Ok(match found.filter(|row| row.id == id) {
            Some(row) => Inserted::New {
                id,
                start_offset: row.start_offset,
                created_at: row.created_at,
            },
            None => Inserted::NameTaken,
        })
    })
    .await
}

async fn try_insert_queue(
    database: &Database,
    QueueId(id): QueueId,
    queue: &NewQueue,
) -> Result<Inserted, Error> {
    const DOING: &str = "creating a queue";
    let (kind, at) = match queue.start {
        Start::Earliest => ("earliest", 0),
        Start::Latest => ("latest", 0),
        Start::Offset(offset) => ("offset", offset.0),
        Start::Time(_) => ("offset", queue.before_start.0.saturating_add(1)),
    };
    let made: Result<(i64, DateTime<Utc>), sqlx::Error> = sqlx::query_as(
        "select found_offset, found_created_at from postroad_broker.create_queue(\
            $1, $2, $3, $4, $5::text::jsonb, $6::text::jsonb, $7, $8, $9)",
    )
    .bind(id)
    .bind(queue.name.as_str())
    .bind(queue.stream_id.0)
    .bind(texts(&queue.patterns))
    .bind(to_json(&queue.settings))
    .bind(to_json(&queue.start))
    .bind(kind)
    .bind(at)
    .bind(Slot::of(QueueId(id)).0)
    .fetch_one(database.pooled())
    .await;
    match made.map_err(Error::query(DOING)) {
        Ok((offset, created_at)) => Ok(Inserted::New {
            id: QueueId(id),
            start_offset: Offset(offset),
            created_at,
        }),
        // Of its own number by an earlier try alone.
        Err(error) if matches!(error.constraint(), Some("queue_name_key" | "queue_pkey")) => {
            Ok(Inserted::NameTaken)
        }
        // No head row, or the stream went between the lock and the insert.
        Err(error)
            if error.sqlstate().as_deref() == Some("P0002")
                || error.constraint() == Some("queue_stream_id_fkey") =>
        {
            Ok(Inserted::NoStream)
        }
        Err(error) => Err(error),
    }
}

/// A number for a new queue, and the queues that had this name and were deleted, the last thousand of them.
///
/// # Errors
/// The database's.
pub async fn next_queue(
    database: &Database,
    name: &QueueName,
) -> Result<(QueueId, Vec<QueueId>), Error> {
    let (id, former): (i64, Vec<i64>) = sqlx::query_as(
        "select nextval(pg_get_serial_sequence('postroad_broker.queue', 'id')), \
            array(select id from postroad_broker.former_queue where name = $1 order by id desc limit 1000)",
    )
    .bind(name.as_str())
    .fetch_one(database.pooled())
    .await
    .map_err(Error::query("numbering a queue"))?;
    Ok((QueueId(id), former.into_iter().map(QueueId).collect()))
}

/// Changes a queue's filter and settings.
///
/// # Errors
/// The database's.
pub async fn update_queue(
    database: &Database,
    id: QueueId,
    patterns: &[TopicPattern],
    settings: &Settings,
) -> Result<(), Error> {
    repeated(|_| async move {
        sqlx::query(
            "update postroad_broker.queue set patterns = $2, settings = $3::text::jsonb where id = $1",
        )
        .bind(id.0)
        .bind(texts(patterns))
        .bind(to_json(settings))
        .execute(database.pooled())
        .await
        .map_err(Error::query("changing a queue"))?;
        Ok(())
    })
    .await
}

/// Deletes a queue with its checkpoint and dead letters. Its journal rows go with their segments. That it was there is
/// remembered for 30 days, longer than anybody keeps a receipt.
///
/// # Errors
/// The database's.
pub async fn delete_queue(database: &Database, id: QueueId) -> Result<(), Error> {
    repeated(|_| async move {
        sqlx::query("select postroad_broker.delete_queue($1)")
            .bind(id.0)
            .execute(database.pooled())
            .await
            .map_err(Error::query("deleting a queue"))?;
        Ok(())
    })
    .await
}
