//! Schedules of recurring messages. The functions are in `migrations/broker`.

use chrono::{DateTime, Utc};
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use crate::domain::id::{StreamId, TopicId};
use crate::domain::message::Message;
use crate::store::bounded::{STATEMENT, bounded};
use crate::store::{Connection, Error};

/// A schedule, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduleRow {
    /// Its number.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// As declared: JSON text.
    pub declaration: String,
    /// Rises with each change.
    pub revision: i64,
    /// The time of the first declaration.
    pub created_at: DateTime<Utc>,
    /// The time of the last change.
    pub changed_at: DateTime<Utc>,
    /// All occurrences up to here are dealt with.
    pub through_at: DateTime<Utc>,
    /// The last occurrence that was published.
    pub last_at: Option<DateTime<Utc>>,
    /// Occurrences published so far.
    pub published_count: i64,
    /// Occurrences left out so far, since they could not be published.
    pub failed_count: i64,
    /// The last that could not.
    pub failure: Option<ScheduleFailure>,
}

/// An occurrence that could not be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduleFailure {
    /// The time when it was due.
    pub occurrence_at: DateTime<Utc>,
    /// Why, as one clause.
    pub reason: String,
    /// The time when that was found.
    pub at: DateTime<Utc>,
}

/// All schedules, by name, and the clock to go by, of the database's and the node's.
///
/// # Errors
/// The database's.
pub async fn list_schedules(
    connection: &mut Connection,
    witness: DateTime<Utc>,
) -> Result<(Vec<ScheduleRow>, DateTime<Utc>), Error> {
    const DOING: &str = "reading the schedules";
    let rows = bounded(
        DOING,
        STATEMENT,
        sqlx::query(
            "select c.clock, s.id, s.name, s.declaration, s.revision, s.created_at, s.changed_at, t.through_at, \
                 t.last_at, t.published_count, t.failed_count, t.failed_at, t.failure, t.failure_at \
             from (select postroad_broker.agreed_clock($1) as clock) c \
             left join (postroad_broker.schedule s join postroad_broker.schedule_state t on t.schedule_id = s.id) on true \
             order by s.name",
        )
        .bind(witness)
        .fetch_all(connection),
    )
    .await?;
    let read = || {
        let clock = rows
            .first()
            .map_or(Ok(DateTime::UNIX_EPOCH), |row| row.try_get("clock"))?;
        let schedules: Result<Vec<_>, _> = rows
            .iter()
            .filter_map(|row| read_row(row).transpose())
            .collect();
        Ok((schedules?, clock))
    };
    read().map_err(Error::query(DOING))
}

/// None where there is no schedule at all.
fn read_row(row: &PgRow) -> Result<Option<ScheduleRow>, sqlx::Error> {
    let Some(id) = row.try_get("id")? else {
        return Ok(None);
    };
    let failure = match (
        row.try_get("failed_at")?,
        row.try_get("failure")?,
        row.try_get("failure_at")?,
    ) {
        (Some(occurrence_at), Some(reason), Some(at)) => Some(ScheduleFailure {
            occurrence_at,
            reason,
            at,
        }),
        _ => None,
    };
    Ok(Some(ScheduleRow {
        id,
        name: row.try_get("name")?,
        declaration: row.try_get("declaration")?,
        revision: row.try_get("revision")?,
        created_at: row.try_get("created_at")?,
        changed_at: row.try_get("changed_at")?,
        through_at: row.try_get("through_at")?,
        last_at: row.try_get("last_at")?,
        published_count: row.try_get("published_count")?,
        failed_count: row.try_get("failed_count")?,
        failure,
    }))
}

/// The result of declaring a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScheduleDeclared {
    /// It is new.
    Created,
    /// It was other.
    Changed,
    /// It was the same.
    Unchanged,
    /// There are as many as there can be.
    Full,
    /// It was deleted at the same time.
    Gone,
}

/// Declares a schedule. `cadence` is the part whose change makes it start again.
///
/// # Errors
/// The database's.
pub async fn declare_schedule(
    connection: &mut Connection,
    name: &str,
    declaration: &str,
    cadence: &str,
    is_paused: bool,
    most: i64,
    witness: DateTime<Utc>,
) -> Result<ScheduleDeclared, Error> {
    let (status,): (String,) = bounded(
        "declaring a schedule",
        STATEMENT,
        sqlx::query_as("select postroad_broker.declare_schedule($1, $2, $3, $4, $5, $6)")
            .bind(name)
            .bind(declaration)
            .bind(cadence)
            .bind(is_paused)
            .bind(most)
            .bind(witness)
            .fetch_one(connection),
    )
    .await?;
    Ok(match status.as_str() {
        "created" => ScheduleDeclared::Created,
        "changed" => ScheduleDeclared::Changed,
        "unchanged" => ScheduleDeclared::Unchanged,
        "full" => ScheduleDeclared::Full,
        "gone" => ScheduleDeclared::Gone,
        _ => return Err(Error::unknown_status("declaring a schedule", &status)),
    })
}

/// Deletes a schedule. Whether there was one.
///
/// # Errors
/// The database's.
pub async fn delete_schedule(connection: &mut Connection, name: &str) -> Result<bool, Error> {
    let deleted = bounded(
        "deleting a schedule",
        STATEMENT,
        sqlx::query("delete from postroad_broker.schedule where name = $1")
            .bind(name)
            .execute(connection),
    )
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// Occurrences to be accepted.
#[derive(Debug)]
pub struct Fire<'a> {
    /// The version of the catalogue that the stream was chosen by.
    pub catalogue: i64,
    /// The schedule's number.
    pub schedule: i64,
    /// The revision that the occurrences are of.
    pub revision: i64,
    /// How far the schedule must be.
    pub from: DateTime<Utc>,
    /// How far it is then.
    pub to: DateTime<Utc>,
    /// The stream of the messages.
    pub stream: StreamId,
    /// The number of their topic.
    pub topic: TopicId,
    /// The hash of their key.
    pub key_hash: Option<i64>,
    /// Id and time of each.
    pub occurrences: Vec<(String, DateTime<Utc>)>,
    /// Their common part.
    pub message: &'a Message,
    /// The node's clock.
    pub witness: DateTime<Utc>,
}

/// The outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fired {
    /// They are accepted.
    Fired,
    /// The schedule is another by now, or elsewhere: nothing was done.
    Moved,
    /// The catalogue has another version: nothing was done.
    Stale,
}

/// Accepts occurrences and moves the schedule over them. Safe to repeat when its outcome is unknown: then it has moved.
///
/// # Errors
/// The database's.
pub async fn fire_schedule(connection: &mut Connection, fire: &Fire<'_>) -> Result<Fired, Error> {
    let message = fire.message;
    let (ids, times): (Vec<&str>, Vec<DateTime<Utc>>) = fire
        .occurrences
        .iter()
        .map(|(id, time)| (id.as_str(), *time))
        .unzip();
    let extensions = (!message.extensions.is_empty()).then(|| {
        serde_json::to_string(&message.extensions)
            .expect("a JSON map always serializes into memory")
    });
    let data: &[u8] = message.data.bytes();
    let (status,): (String,) = bounded(
        "publishing a schedule's occurrences",
        STATEMENT,
        sqlx::query_as(
            "select postroad_broker.fire_schedule($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, \
             $17, $18, $19, $20, $21)",
        )
        .bind(fire.catalogue)
        .bind(fire.schedule)
        .bind(fire.revision)
        .bind(fire.from)
        .bind(fire.to)
        .bind(fire.stream.0)
        .bind(fire.topic.0)
        .bind(ids)
        .bind(times)
        .bind(fire.key_hash)
        .bind(&message.key)
        .bind(&message.source)
        .bind(&message.kind)
        .bind(&message.subject)
        .bind(&message.data_content_type)
        .bind(&message.data_schema)
        .bind(extensions)
        .bind(message.data.kind())
        .bind(message.priority().stored())
        .bind((message.data.kind() != 0).then_some(data))
        .bind(fire.witness)
        .fetch_one(connection),
    )
    .await?;
    Ok(match status.as_str() {
        "fired" => Fired::Fired,
        "moved" => Fired::Moved,
        "stale" => Fired::Stale,
        _ => return Err(Error::unknown_status("accepting an occurrence", &status)),
    })
}

/// Occurrences that are left out.
#[derive(Debug)]
pub struct Pass<'a> {
    /// The schedule's number.
    pub schedule: i64,
    /// The revision that the occurrences are of.
    pub revision: i64,
    /// How far the schedule must be.
    pub from: DateTime<Utc>,
    /// How far it is then: beyond the occurrences, or where it was if they are to be tried again.
    pub to: DateTime<Utc>,
    /// How many of them could not be published.
    pub failed: usize,
    /// The due time of the last of these, and the reason, as one clause.
    pub failure: Option<(DateTime<Utc>, &'a str)>,
}

/// Moves a schedule over occurrences that are left out, and keeps why. `false`: the schedule is another by now, or elsewhere, and nothing
/// was done. Safe to repeat when its outcome is unknown: then it has moved.
///
/// # Errors
/// The database's.
pub async fn pass_schedule(connection: &mut Connection, pass: &Pass<'_>) -> Result<bool, Error> {
    let (status,): (String,) = bounded(
        "leaving out a schedule's occurrences",
        STATEMENT,
        sqlx::query_as("select postroad_broker.pass_schedule($1, $2, $3, $4, $5, $6, $7)")
            .bind(pass.schedule)
            .bind(pass.revision)
            .bind(pass.from)
            .bind(pass.to)
            .bind(i64::try_from(pass.failed).unwrap_or(i64::MAX))
            .bind(pass.failure.map(|(at, _)| at))
            .bind(pass.failure.map(|(_, reason)| reason))
            .fetch_one(connection),
    )
    .await?;
    match status.as_str() {
        "passed" => Ok(true),
        "moved" => Ok(false),
        _ => Err(Error::unknown_status(
            "leaving out a schedule's occurrences",
            &status,
        )),
    }
}
