//! Queues, their journal and checkpoints, dead letters. Called from tasks that are never aborted.

use chrono::{DateTime, Utc};
use sqlx::{Connection as _, Row as _};

use super::bounded::{HEARTBEAT, STATEMENT, bounded};
use super::redrive::RedriveStep;
use super::renewal::Renewed;
use super::{Connection, Database, Error};
use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot, StreamId};
use crate::domain::name::{QueueName, StreamName, Topic, TopicPattern};
use crate::domain::policy::{Settings, Start};
use crate::domain::queue::Letter;

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
    /// What it does.
    pub settings: Settings,
    /// Where it was declared to start.
    pub start: Start,
    /// Its incarnation.
    pub generation: Generation,
    /// The offset that the start came to.
    pub start_offset: Offset,
    /// The slot that owns it.
    pub slot: Slot,
    /// Whether a person has paused it.
    pub is_paused: bool,
    /// What made its generation, but for the first.
    pub renewal: Option<Renewed>,
    /// When it was made.
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
    /// What it does.
    pub settings: Settings,
    /// Where it starts.
    pub start: Start,
    /// For a start at a time: the last offset before it.
    pub before_start: Offset,
}

/// What making a queue came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It is made.
    New {
        /// Its number.
        id: QueueId,
        /// The first offset that it can deliver.
        start_offset: Offset,
        /// When.
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
    const DOING: &str = "reading queues";
    let rows = sqlx::query(
        "select q.id, q.name, q.stream_id, s.name as stream, q.patterns, q.settings::text as settings, \
            q.start::text as start, q.generation, q.start_offset, q.slot, q.paused, \
            q.renewal::text as renewal, q.created_at, \
            array(select f.id from postroad_broker.former_queue f where f.name = q.name order by f.id desc limit 1000) as former \
         from postroad_broker.queue q join postroad_broker.stream s on s.id = q.stream_id order by q.id",
    )
    .fetch_all(database.pool())
    .await
    .map_err(Error::query(DOING))?;
    rows.iter().map(read_queue).collect()
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
    .fetch_all(database.pool())
    .await
    .map_err(Error::query("finding streams without queues"))?;
    Ok(ids.into_iter().map(StreamId).collect())
}

fn to_json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("settings always serialize into memory")
}

fn texts(patterns: &[TopicPattern]) -> Vec<String> {
    patterns
        .iter()
        .map(|pattern| pattern.as_str().to_owned())
        .collect()
}

/// Makes a queue, in a transaction of its own under the lock of the stream's head.
///
/// # Errors
/// The database's.
pub async fn insert_queue(
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
    .fetch_one(database.pool())
    .await;
    match made.map_err(Error::query(DOING)) {
        Ok((offset, created_at)) => Ok(Inserted::New {
            id: QueueId(id),
            start_offset: Offset(offset),
            created_at,
        }),
        Err(error) if error.constraint() == Some("queue_name_key") => Ok(Inserted::NameTaken),
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
    .fetch_one(database.pool())
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
    sqlx::query(
        "update postroad_broker.queue set patterns = $2, settings = $3::text::jsonb where id = $1",
    )
    .bind(id.0)
    .bind(texts(patterns))
    .bind(to_json(settings))
    .execute(database.pool())
    .await
    .map_err(Error::query("changing a queue"))?;
    Ok(())
}

/// Deletes a queue with its checkpoint and dead letters. Its journal rows go with their segments. That it was there is
/// remembered for 30 days, longer than anybody keeps a receipt.
///
/// # Errors
/// The database's.
pub async fn delete_queue(database: &Database, id: QueueId) -> Result<(), Error> {
    sqlx::query(
        "with gone as (delete from postroad_broker.queue where id = $1 returning id, name), \
            forgotten as (delete from postroad_broker.former_queue where deleted_at < clock_timestamp() - interval '30 days') \
         insert into postroad_broker.former_queue (id, name) select id, name from gone",
    )
        .bind(id.0)
        .execute(database.pool())
        .await
        .map_err(Error::query("deleting a queue"))?;
    Ok(())
}

/// Up to where a queue that keeps up has settled all that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Whose.
    pub queue: QueueId,
    /// In which generation.
    pub generation: Generation,
    /// The offset.
    pub through: Offset,
}

/// The positions of a slot's queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPositions {
    /// The slot.
    pub slot: Slot,
    /// Its lease, at the writer's epoch.
    pub fence: Fence,
    /// Of each queue that ever kept up.
    pub positions: Vec<Position>,
}

/// Writes the rows of slots, those that are still held; they take the place of the former ones. One statement for all.
///
/// # Errors
/// The database's.
pub async fn write_positions(
    database: &Database,
    incarnation: i64,
    slots: &[SlotPositions],
) -> Result<(), Error> {
    let all = || {
        let slots = slots.iter();
        slots.flat_map(|slot| slot.positions.iter().map(move |position| (slot, position)))
    };
    sqlx::query("select postroad_broker.write_queue_positions($1, $2, $3, $4, $5, $6, $7, $8)")
        .bind(incarnation)
        .bind(collect(slots.iter(), |slot| slot.slot.0))
        .bind(collect(slots.iter(), |slot| slot.fence.lease.clone()))
        .bind(collect(slots.iter(), |slot| slot.fence.epoch.0))
        .bind(collect(all(), |(slot, _)| slot.slot.0))
        .bind(collect(all(), |(_, position)| position.queue.0))
        .bind(collect(all(), |(_, position)| position.generation.0))
        .bind(collect(all(), |(_, position)| position.through.0))
        .execute(database.pool())
        .await
        .map_err(Error::query("writing the positions of queues"))?;
    Ok(())
}

/// A part of a queue's stored state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatePart {
    /// Whose.
    pub queue: QueueId,
    /// A row of the journal; else the checkpoint.
    pub is_journal: bool,
    /// The blob.
    pub data: Vec<u8>,
}

/// What the queues of a slot recover from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotState {
    /// Per queue the checkpoint first, then the journal in order.
    pub parts: Vec<StatePart>,
    /// Of queues that kept up.
    pub positions: Vec<Position>,
}

/// Reads what the queues of a slot recover from. None when the
/// lease is no longer at the fence's epoch. The lease's row first, in a statement of its own: a group whose outcome is
/// unknown holds it until it is decided, and the state is read by a later snapshot.
///
/// # Errors
/// The transaction failed.
pub async fn find_queue_state(
    database: &Database,
    fence: &Fence,
    slot: Slot,
) -> Result<Option<SlotState>, Error> {
    type Rows = (
        Vec<(i64, bool, Vec<u8>)>,
        Option<(Vec<i64>, Vec<i64>, Vec<i64>)>,
    );
    let read = async {
        let mut connection = database.pool().acquire().await?;
        let mut transaction = connection.begin().await?;
        let epoch: Option<i64> = sqlx::query_scalar(
            "select epoch from postroad_broker.lease where name = $1 for no key update",
        )
        .bind(&fence.lease)
        .fetch_optional(&mut *transaction)
        .await?;
        if epoch != Some(fence.epoch.0) {
            transaction.rollback().await?;
            return Ok(None);
        }
        let parts = sqlx::query_as(include_str!("sql/read_queue_state.sql"))
            .bind(slot.0)
            .fetch_all(&mut *transaction)
            .await?;
        let positions = sqlx::query_as(
            "select queue_ids, generations, throughs from postroad_broker.queue_position where slot = $1",
        )
        .bind(slot.0)
        .fetch_optional(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(Some((parts, positions)))
    };
    let rows: Option<Rows> = read
        .await
        .map_err(Error::query("reading the state of queues"))?;
    Ok(rows.map(|(parts, positions)| {
        let parts = parts
            .into_iter()
            .map(|(queue, is_journal, data)| StatePart {
                queue: QueueId(queue),
                is_journal,
                data,
            });
        let (queues, generations, throughs) = positions.unwrap_or_default();
        let positions = queues.into_iter().zip(generations).zip(throughs);
        let positions = positions.map(|((queue, generation), through)| Position {
            queue: QueueId(queue),
            generation: Generation(generation),
            through: Offset(through),
        });
        SlotState {
            parts: parts.collect(),
            positions: positions.collect(),
        }
    }))
}

/// One group commit: per slot its lease, epoch and number, and what its queues wrote.
#[derive(Debug, Clone, Default)]
pub struct Group {
    /// The slots, each once.
    pub slots: Vec<GroupSlot>,
    /// What the queues wrote, each queue once.
    pub parts: Vec<GroupPart>,
}

/// A slot of a group.
#[derive(Debug, Clone)]
pub struct GroupSlot {
    /// The slot.
    pub slot: Slot,
    /// Its lease, at the writer's epoch.
    pub fence: Fence,
    /// The group's number under that epoch.
    pub number: i64,
}

/// What one queue wrote.
#[derive(Debug, Clone)]
pub struct GroupPart {
    /// The queue's slot.
    pub slot: Slot,
    /// The queue.
    pub queue: QueueId,
    /// Its generation.
    pub generation: Generation,
    /// The encoded records; empty for none.
    pub records: Vec<u8>,
    /// The state after these records, if it is time for one.
    pub checkpoint: Option<Vec<u8>>,
    /// Messages that died.
    pub letters: Vec<Letter>,
    /// Where copies of them go.
    pub forward: Option<Topic>,
    /// Dead letters to be removed.
    pub removed_letters: Vec<Offset>,
    /// What redrives did, each at most once.
    pub redrives: Vec<RedriveStep>,
}

/// What became of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupWritten {
    /// The turn of the journal that it was written in.
    pub turn: i64,
    /// Slots that were taken over: nothing of theirs is written.
    pub fenced: Vec<Slot>,
}

/// Writes a group in one autocommit call. Idempotent by (slot, epoch, number): when the connection was lost, writing
/// the very same group again finds out what became of it, or does it.
///
/// # Errors
/// The database's. After a lost connection the outcome is unknown.
pub async fn write_group(
    connection: &mut Connection,
    incarnation: i64,
    group: &Group,
) -> Result<GroupWritten, Error> {
    let slots = &group.slots;
    let journal = || group.parts.iter().filter(|part| !part.records.is_empty());
    let folded = || group.parts.iter().filter(|part| part.checkpoint.is_some());
    let letters = || {
        group
            .parts
            .iter()
            .flat_map(|part| part.letters.iter().map(move |l| (part, l)))
    };
    let removed = || {
        let parts = group.parts.iter();
        parts.flat_map(|part| {
            part.removed_letters
                .iter()
                .map(move |offset| (part, offset))
        })
    };
    let redrives = || {
        let parts = group.parts.iter();
        parts.flat_map(|part| part.redrives.iter().map(move |step| (part, step)))
    };
    let (turn, fenced): (i64, Vec<i16>) = bounded("writing the journal of queues", STATEMENT, sqlx::query_as(
        "select current_turn, fenced from postroad_broker.write_queue_group($1, $2, $3, $4, $5, $6, $7, $8, $9, \
            $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26, $27, $28, $29)",
    )
    .bind(incarnation)
    .bind(collect(slots.iter(), |slot| slot.slot.0))
    .bind(collect(slots.iter(), |slot| slot.fence.lease.clone()))
    .bind(collect(slots.iter(), |slot| slot.fence.epoch.0))
    .bind(collect(slots.iter(), |slot| slot.number))
    .bind(collect(journal(), |part| part.slot.0))
    .bind(collect(journal(), |part| part.queue.0))
    .bind(collect(journal(), |part| part.generation.0))
    .bind(collect(journal(), |part| part.records.as_slice()))
    .bind(collect(folded(), |part| part.slot.0))
    .bind(collect(folded(), |part| part.queue.0))
    .bind(collect(folded(), |part| part.generation.0))
    .bind(collect(folded(), |part| part.checkpoint.as_deref().unwrap_or_default()))
    .bind(collect(letters(), |(part, _)| part.slot.0))
    .bind(collect(letters(), |(part, _)| part.queue.0))
    .bind(collect(letters(), |(part, _)| part.generation.0))
    .bind(collect(letters(), |(_, letter)| letter.offset.0))
    .bind(collect(letters(), |(_, letter)| i32::try_from(letter.delivery).unwrap_or(i32::MAX)))
    .bind(collect(letters(), |(_, letter)| i32::try_from(letter.attempts).unwrap_or(i32::MAX)))
    .bind(collect(letters(), |(_, letter)| letter.cause))
    .bind(collect(letters(), |(_, letter)| failures(letter)))
    .bind(collect(letters(), |(_, letter)| DateTime::<Utc>::from(letter.died_at)))
    .bind(collect(letters(), |(part, _)| part.forward.as_ref().map(Topic::as_str)))
    .bind(collect(removed(), |(part, _)| part.slot.0))
    .bind(collect(removed(), |(part, _)| part.queue.0))
    .bind(collect(removed(), |(_, offset)| offset.0))
    .bind(collect(redrives(), |(part, _)| part.slot.0))
    .bind(collect(redrives(), |(part, _)| part.queue.0))
    .bind(collect(redrives(), |(_, step)| to_json(step)))
    .fetch_one(connection)).await?;
    Ok(GroupWritten {
        turn,
        fenced: fenced.into_iter().map(Slot).collect(),
    })
}

fn collect<I: Iterator, T>(items: I, part: impl FnMut(I::Item) -> T) -> Vec<T> {
    items.map(part).collect()
}

fn failures(letter: &Letter) -> String {
    let failures: Vec<serde_json::Value> = letter
        .failures
        .iter()
        .map(|failure| {
            let at = DateTime::<Utc>::from(failure.at).to_rfc3339();
            serde_json::json!({ "at": at, "reason": failure.reason })
        })
        .collect();
    serde_json::Value::Array(failures).to_string()
}

/// Asks the server for a sign of life.
///
/// # Errors
/// The database's.
pub async fn probe(connection: &mut Connection) -> Result<(), Error> {
    bounded(
        "asking for a sign of life",
        HEARTBEAT,
        sqlx::query("select 1").execute(connection),
    )
    .await?;
    Ok(())
}

/// Turns the journal to its next segment if the current one is full, and truncates segments that every checkpoint is
/// past. Returns the turn, and how many former segments still have rows.
///
/// # Errors
/// The database's.
pub async fn turn_journal(
    database: &Database,
    full_bytes: i64,
    full_after_seconds: f64,
) -> Result<(i64, i32), Error> {
    const DOING: &str = "turning the journal of queues";
    let left: i32 = sqlx::query_scalar("select postroad_broker.truncate_queue_journal()")
        .fetch_one(database.pool())
        .await
        .map_err(Error::query(DOING))?;
    let turn: i64 = sqlx::query_scalar(
        "select postroad_broker.turn_queue_journal($1, make_interval(secs => $2))",
    )
    .bind(full_bytes)
    .bind(full_after_seconds)
    .fetch_one(database.pool())
    .await
    .map_err(Error::query(DOING))?;
    Ok((turn, left))
}
