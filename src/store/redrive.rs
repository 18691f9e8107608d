//! Redrives. The group that journals their effects writes their rows: `store::queue`.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::letter::{EXAMINED_MAX, Part, bounds};
use super::{Database, Error};
use crate::domain::id::{Offset, QueueId, Slot};
use crate::domain::letter::{RedriveStatus, Selection};
use crate::domain::queue::Reborn;

/// The progress of a redrive since its last step. The schema's `write_redrives` reads these names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RedriveStep {
    /// The redrive's id.
    pub id: String,
    /// It is new, and began then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<DateTime<Utc>>,
    /// For a new redrive: the filter of the letters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selection: Option<Selection>,
    /// For a new redrive: letters per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_per_second: Option<u32>,
    /// Letters that fit, once they are counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Every letter up to here was looked at.
    pub through: Offset,
    /// Letters brought back in all.
    pub redriven: u64,
    /// Letters that were unsettled or gone by then, in all.
    pub skipped: u64,
    /// Redriven letters that came after settled messages of their key, in all.
    pub late: u64,
    /// The redriven letters.
    pub offsets: Vec<Offset>,
    /// The time of the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<DateTime<Utc>>,
    /// Its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<RedriveStatus>,
}

/// A redrive's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedriveRow {
    /// Its name in its queue.
    pub id: String,
    /// The time when it began: letters that died later are not included.
    pub created_at: DateTime<Utc>,
    /// The filter of the letters.
    pub selection: Selection,
    /// Letters per second; None for as fast as it goes.
    pub rate_per_second: Option<u32>,
    /// How far it is.
    pub status: RedriveStatus,
    /// The time when it ended.
    pub finished_at: Option<DateTime<Utc>>,
    /// Letters that fit; None until they are counted.
    pub total: Option<u64>,
    /// Letters brought back.
    pub redriven: u64,
    /// Letters that were unsettled or gone when their turn came.
    pub skipped: u64,
    /// Redriven letters that came after settled messages of their key.
    pub late: u64,
    /// Every letter up to here was looked at.
    pub through: Offset,
}

const COLUMNS: &str = "id, created_at, selection::text as selection, rate_per_second, status, finished_at, total, \
    redriven, skipped, late, through_offset";

fn read(row: &PgRow) -> Result<RedriveRow, Error> {
    const DOING: &str = "reading redrives";
    let read = || -> Result<_, sqlx::Error> {
        let count = |name: &str| -> Result<u64, sqlx::Error> {
            Ok(u64::try_from(row.try_get::<i64, _>(name)?).unwrap_or(0))
        };
        let total: Option<i64> = row.try_get("total")?;
        let rate: Option<i32> = row.try_get("rate_per_second")?;
        let selection: String = row.try_get("selection")?;
        let status: String = row.try_get("status")?;
        let redrive = RedriveRow {
            id: row.try_get("id")?,
            created_at: row.try_get("created_at")?,
            selection: Selection::default(),
            rate_per_second: rate.and_then(|rate| u32::try_from(rate).ok()),
            status: RedriveStatus::Running,
            finished_at: row.try_get("finished_at")?,
            total: total.and_then(|total| u64::try_from(total).ok()),
            redriven: count("redriven")?,
            skipped: count("skipped")?,
            late: count("late")?,
            through: Offset(row.try_get("through_offset")?),
        };
        Ok((redrive, selection, status))
    };
    let (mut redrive, selection, status) = read().map_err(Error::query(DOING))?;
    redrive.status =
        RedriveStatus::of(&status).ok_or_else(|| Error::unknown_status(DOING, &status))?;
    redrive.selection = serde_json::from_str(&selection).map_err(|error| Error::Corrupt {
        doing: DOING,
        what: format!("redrive {}: selection: {error}", redrive.id),
    })?;
    Ok(redrive)
}

/// A selection of a queue's redrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// The redrive with this id.
    Named(String),
    /// The newest ones, at most this many.
    Newest(i64),
}

/// Reads redrives of a queue, the newest first.
///
/// # Errors
/// The database's, or a row that no version has written.
pub async fn find_redrives(
    database: &Database,
    queue: QueueId,
    which: &Which,
) -> Result<Vec<RedriveRow>, Error> {
    let (condition, id, limit) = match which {
        Which::Named(id) => ("id = $2", Some(id), 1),
        Which::Newest(limit) => ("$2::text is null", None, *limit),
    };
    let rows = sqlx::query(sqlx::AssertSqlSafe(format!(
        "select {COLUMNS} from postroad_broker.redrive where queue_id = $1 and {condition} \
         order by created_at desc, id limit $3"
    )))
    .bind(queue.0)
    .bind(id)
    .bind(limit)
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query("reading redrives"))?;
    rows.iter().map(read).collect()
}

/// Reads the redrives that run, of all queues of a slot.
///
/// # Errors
/// The database's, or a row that no version has written.
pub async fn find_running(
    database: &Database,
    slot: Slot,
) -> Result<Vec<(QueueId, RedriveRow)>, Error> {
    const DOING: &str = "reading redrives";
    let rows = sqlx::query(sqlx::AssertSqlSafe(format!(
        "select queue_id, {COLUMNS} from postroad_broker.redrive \
         where status = 'running' and queue_id in (select q.id from postroad_broker.queue q where q.slot = $1) \
         order by created_at, id"
    )))
    .bind(slot.0)
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query(DOING))?;
    rows.iter()
        .map(|row| {
            let queue = row.try_get("queue_id").map_err(Error::query(DOING))?;
            Ok((QueueId(queue), read(row)?))
        })
        .collect()
}

/// Removes redrives that ended longer ago than this, a thousand at most, by the earlier of the database's clock and another.
///
/// # Errors
/// The database's.
pub async fn delete_old_redrives(
    database: &Database,
    seconds: f64,
    witness: DateTime<Utc>,
) -> Result<(), Error> {
    sqlx::query(
        "delete from postroad_broker.redrive where (queue_id, id) in (select queue_id, id from postroad_broker.redrive \
            where finished_at < least(clock_timestamp(), $2) - make_interval(secs => $1) limit 1000)",
    )
    .bind(seconds)
    .bind(witness)
    .execute(database.pooled())
    .await
    .map_err(Error::query("removing old redrives"))?;
    Ok(())
}

/// A dead letter to be brought back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redrivable {
    /// The letter.
    pub letter: Reborn,
    /// The message's key.
    pub key: Option<String>,
}

/// Finds the next letters of a selection that died at `before` at the latest, `limit` at most.
///
/// # Errors
/// The database's.
pub async fn find_redrivable(
    database: &Database,
    queue: QueueId,
    after: Offset,
    selection: &Selection,
    before: DateTime<Utc>,
    limit: i64,
) -> Result<Part<Redrivable>, Error> {
    /// How far the statement looked, whether that is the end; offset, delivery and key.
    type Found = (Option<i64>, bool, Option<i64>, Option<i32>, Option<String>);
    let (offsets, selection) = bounds(selection);
    let rows: Vec<Found> = sqlx::query_as(include_str!("sql/find_redrivable_letters.sql"))
        .bind(queue.0)
        .bind(after.0)
        .bind(offsets)
        .bind(selection)
        .bind(before)
        .bind(EXAMINED_MAX)
        .bind(limit)
        .fetch_all(database.pooled())
        .await
        .map_err(Error::query("finding dead letters to redrive"))?;
    let seen = rows.first().map_or((None, true), |row| (row.0, row.1));
    let found: Vec<Redrivable> = rows
        .into_iter()
        .filter_map(|(_, _, offset, delivery, key)| {
            let letter = Reborn {
                offset: Offset(offset?),
                delivery: u32::try_from(delivery?).ok()?,
            };
            Some(Redrivable { letter, key })
        })
        .collect();
    let last = found.last().map(|found| found.letter.offset);
    Ok(Part::new(found, limit, last, seen))
}

/// Counts the letters of a selection that died at `before` at the latest and are not on their way back, 10,000 looked at
/// per statement.
///
/// # Errors
/// The database's.
pub async fn count_redrivable(
    database: &Database,
    queue: QueueId,
    selection: &Selection,
    before: DateTime<Utc>,
) -> Result<u64, Error> {
    let (offsets, selection) = bounds(selection);
    let (mut after, mut total) = (0, 0);
    loop {
        let (through, is_end, count): (Option<i64>, bool, i64) =
            sqlx::query_as(include_str!("sql/count_redrivable_letters.sql"))
                .bind(queue.0)
                .bind(after)
                .bind(&offsets)
                .bind(&selection)
                .bind(before)
                .bind(EXAMINED_MAX)
                .fetch_one(database.pooled())
                .await
                .map_err(Error::query("counting dead letters to redrive"))?;
        total += u64::try_from(count).unwrap_or(0);
        match through {
            Some(through) if !is_end => after = through,
            _ => return Ok(total),
        }
    }
}
