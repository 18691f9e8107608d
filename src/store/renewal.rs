//! Generations of queues, and their pauses.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{Database, Error, repeated};
use crate::domain::id::{Fence, Generation, Offset, QueueId};
use crate::domain::policy::Start;

/// The acts that begin a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "act", content = "to", rename_all = "snake_case")]
pub enum Renewal {
    /// The queue goes on at another place of its stream.
    Seek(Start),
    /// Everything that is in the stream by now is passed over.
    Purge,
}

/// A renewal that was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// The requested change.
    #[serde(flatten)]
    pub renewal: Renewal,
    /// The generation that it ended.
    pub from_generation: Generation,
    /// Whether retention had dropped some of what was asked for, so that the generation begins later.
    #[serde(default)]
    pub at_floor: bool,
    /// Whether the stream was not there yet.
    #[serde(default)]
    pub ahead: bool,
}

/// A renewal to be carried out.
#[derive(Debug)]
pub struct Renew<'a> {
    /// The queue.
    pub queue: QueueId,
    /// Its slot's lease.
    pub fence: &'a Fence,
    /// This process.
    pub incarnation: i64,
    /// The generation that it ends.
    pub from_generation: Generation,
    /// The requested change.
    pub renewal: Renewal,
    /// For a seek to a time: the last offset before it.
    pub before_start: Offset,
    /// The state that the next generation begins with.
    pub state: &'a [u8],
}

/// A generation that began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// The generation.
    pub generation: Generation,
    /// Its first offset.
    pub start_offset: Offset,
    /// Whether retention had dropped some of what was asked for.
    pub at_floor: bool,
    /// Whether the stream's end is before it: nothing is delivered until the stream has got there.
    pub ahead: bool,
}

/// The outcome of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenewOutcome {
    /// It is done, now or by an earlier try of the very same call.
    Renewed(Begun),
    /// The slot was taken over: nothing is done.
    Fenced,
    /// The queue has another generation: nothing is done.
    Moved,
    /// There is no such queue.
    Gone,
}

/// Begins a queue's next generation, in one autocommit call: what begins it is named by the generation that it ends.
///
/// # Errors
/// The database's.
pub async fn renew_queue(database: &Database, renew: Renew<'_>) -> Result<RenewOutcome, Error> {
    let renew = &renew;
    repeated(|_| try_renew_queue(database, renew)).await
}

async fn try_renew_queue(database: &Database, renew: &Renew<'_>) -> Result<RenewOutcome, Error> {
    const DOING: &str = "beginning a queue's next generation";
    let (kind, at, time): (&str, i64, Option<DateTime<Utc>>) = match renew.renewal {
        Renewal::Purge => ("purge", 0, None),
        Renewal::Seek(Start::Earliest) => ("earliest", 0, None),
        Renewal::Seek(Start::Latest) => ("latest", 0, None),
        Renewal::Seek(Start::Offset(offset)) => ("offset", offset.0, None),
        Renewal::Seek(Start::Time(time)) => {
            ("time", renew.before_start.0.saturating_add(1), Some(time))
        }
    };
    let asked = serde_json::json!({ "from_generation": renew.from_generation });
    let mut asked = asked.as_object().cloned().unwrap_or_default();
    if let Ok(serde_json::Value::Object(renewal)) = serde_json::to_value(renew.renewal) {
        asked.extend(renewal);
    }
    let row: (String, Option<i64>, Option<i64>, Option<bool>, Option<bool>) = sqlx::query_as(
        "select found_status, found_generation, found_offset, found_at_floor, found_ahead \
         from postroad_broker.renew_queue($1, $2, $3, $4, $5, $6, $7, $8, $9::text::jsonb, $10)",
    )
    .bind(renew.queue.0)
    .bind(&renew.fence.lease)
    .bind(renew.fence.epoch.0)
    .bind(renew.incarnation)
    .bind(renew.from_generation.0)
    .bind(kind)
    .bind(at)
    .bind(time)
    .bind(serde_json::Value::Object(asked).to_string())
    .bind(renew.state)
    .fetch_one(database.pooled())
    .await
    .map_err(Error::query(DOING))?;
    match (row.0.as_str(), row.1, row.2) {
        ("renewed", Some(generation), Some(start)) => Ok(RenewOutcome::Renewed(Begun {
            generation: Generation(generation),
            start_offset: Offset(start),
            at_floor: row.3.unwrap_or(false),
            ahead: row.4.unwrap_or(false),
        })),
        ("fenced", ..) => Ok(RenewOutcome::Fenced),
        ("moved", ..) => Ok(RenewOutcome::Moved),
        ("gone", ..) => Ok(RenewOutcome::Gone),
        (status, ..) => Err(Error::Corrupt {
            doing: DOING,
            what: format!("the status `{status}`"),
        }),
    }
}

/// Pauses a queue, or resumes it.
///
/// # Errors
/// The database's.
pub async fn set_paused(database: &Database, queue: QueueId, is_paused: bool) -> Result<(), Error> {
    repeated(|_| async move {
        sqlx::query("update postroad_broker.queue set paused = $2 where id = $1 and paused <> $2")
            .bind(queue.0)
            .bind(is_paused)
            .execute(database.pooled())
            .await
            .map_err(Error::query("pausing a queue"))?;
        Ok(())
    })
    .await
}
