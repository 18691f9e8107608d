//! Dead letters: list, read, forward. The group that journals a death writes the letter: `store::queue`.

use chrono::{DateTime, Utc};
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::{Database, Error};
use crate::domain::id::{Generation, Offset, QueueId};
use crate::domain::letter::{Cause, LetterId, Selection};
use crate::domain::message::{Data, Message};
use crate::domain::name::Topic;
use crate::domain::queue::Failure;

/// Letters that one statement looks at.
pub(in crate::store) const EXAMINED_MAX: i64 = 10_000;

/// A dead letter without its payload.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Its name.
    pub id: LetterId,
    /// The delivery that the message died with.
    pub delivery: u32,
    /// Attempts made.
    pub attempts: u32,
    /// Why it died.
    pub cause: Cause,
    /// How the last attempt failed.
    pub reason: Option<String>,
    /// The time when it died.
    pub died_at: DateTime<Utc>,
    /// The message's topic.
    pub topic: String,
    /// Its key.
    pub key: Option<String>,
    /// CloudEvents `id`.
    pub event_id: String,
    /// CloudEvents `source`.
    pub event_source: String,
    /// CloudEvents `type`.
    pub event_type: String,
    /// The redrive that brought it back, while it is not settled.
    pub redriven: Option<(String, DateTime<Utc>)>,
    /// The topic of the copy, and the time when it was published.
    pub forward: Option<(String, Option<DateTime<Utc>>)>,
}

/// A dead letter as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Its entry in the list.
    pub summary: Summary,
    /// How the last attempts failed, oldest first.
    pub failures: Vec<Failure>,
    /// The message.
    pub copy: Copy,
}

/// The copy of a message in its dead letter.
#[derive(Debug, Clone, PartialEq)]
pub struct Copy {
    /// Its place in the stream.
    pub offset: Offset,
    /// The time when it was appended.
    pub appended_at: DateTime<Utc>,
    /// The message.
    pub message: Message,
}

/// A part of the answer, by offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part<T> {
    /// The dead letters that match.
    pub found: Vec<T>,
    /// Everything up to here was looked at; None at the end.
    pub through: Option<Offset>,
}

impl<T> Part<T> {
    /// From rows of which each says how far the statement looked.
    pub(in crate::store) fn new(
        found: Vec<T>,
        limit: i64,
        last: Option<Offset>,
        seen: (Option<i64>, bool),
    ) -> Self {
        let is_full = found.len() as i64 >= limit;
        let (through, is_end) = seen;
        let through = match (is_full, is_end) {
            (true, _) => last,
            (false, true) => None,
            (false, false) => through.map(Offset),
        };
        Self { found, through }
    }
}

fn offsets(selection: &Selection) -> Option<Vec<i64>> {
    let offsets = selection.offsets()?;
    Some(offsets.into_iter().map(|offset| offset.0).collect())
}

/// The parameters that say which letters: offsets that can be meant at all, and the selection.
pub(in crate::store) fn bounds(selection: &Selection) -> (Option<Vec<i64>>, String) {
    let text = serde_json::to_string(selection).expect("a selection always serializes into memory");
    (offsets(selection), text)
}

/// Lists dead letters after an offset, `limit` at most: fewer when few of those looked at fit.
///
/// # Errors
/// The database's.
pub async fn list_letters(
    database: &Database,
    queue: QueueId,
    after: Offset,
    selection: &Selection,
    limit: i64,
) -> Result<Part<Summary>, Error> {
    const DOING: &str = "listing dead letters";
    let (offsets, selection) = bounds(selection);
    let rows = sqlx::query(include_str!("sql/list_letters.sql"))
        .bind(queue.0)
        .bind(after.0)
        .bind(offsets)
        .bind(selection)
        .bind(EXAMINED_MAX)
        .bind(limit)
        .fetch_all(database.pooled())
        .await
        .map_err(Error::query(DOING))?;
    let read = || -> Result<_, sqlx::Error> {
        let mut seen = (None, true);
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            seen = (row.try_get("through")?, row.try_get("is_end")?);
            if row.try_get::<Option<i64>, _>("offset")?.is_some() {
                found.push(read_summary(row)?);
            }
        }
        Ok((found, seen))
    };
    let (found, seen) = read().map_err(Error::query(DOING))?;
    let last = found.last().map(|letter: &Summary| letter.id.offset);
    Ok(Part::new(found, limit, last, seen))
}

fn read_summary(row: &PgRow) -> Result<Summary, sqlx::Error> {
    let count = |name: &str| -> Result<u32, sqlx::Error> {
        Ok(u32::try_from(row.try_get::<i32, _>(name)?).unwrap_or(0))
    };
    let (redrive, redriven_at) = (row.try_get("redrive_id")?, row.try_get("redriven_at")?);
    let redrive: Option<String> = redrive;
    let forward: Option<String> = row.try_get("forward_topic")?;
    let forwarded_at = row.try_get("forwarded_at")?;
    let cause: String = row.try_get("cause")?;
    let cause = Cause::of(&cause)
        .ok_or_else(|| sqlx::Error::Decode(format!("`{cause}` is no known cause").into()))?;
    Ok(Summary {
        id: LetterId {
            generation: Generation(row.try_get("generation")?),
            offset: Offset(row.try_get("offset")?),
        },
        delivery: count("delivery")?,
        attempts: count("attempts")?,
        cause,
        reason: row.try_get("reason")?,
        died_at: row.try_get("died_at")?,
        topic: row.try_get("topic")?,
        key: row.try_get("key")?,
        event_id: row.try_get("id")?,
        event_source: row.try_get("source")?,
        event_type: row.try_get("type")?,
        redriven: redrive.zip(redriven_at),
        forward: forward.map(|topic| (topic, forwarded_at)),
    })
}

const READING: &str = "reading dead letters";

/// Reads the letter of a message, whatever generation it died in.
///
/// # Errors
/// The database's, or a row that no version has written.
pub async fn find_letter(
    database: &Database,
    queue: QueueId,
    offset: Offset,
) -> Result<Option<Stored>, Error> {
    let row = sqlx::query(
        "select d.generation, d.\"offset\", d.delivery, d.attempts, d.cause, d.failures -> -1 ->> 'reason' as reason, \
            d.failures::text as failures, d.died_at, d.topic, d.key, d.id, d.source, coalesce(d.type, d.topic) as type, \
            d.redrive_id, d.redriven_at, d.forward_topic, d.forwarded_at \
         from postroad_broker.dead_letter d where d.queue_id = $1 and d.\"offset\" = $2",
    )
    .bind(queue.0)
    .bind(offset.0)
    .fetch_optional(database.pooled())
    .await
    .map_err(Error::query(READING))?;
    let Some(row) = row else {
        return Ok(None);
    };
    let read = || Ok((read_summary(&row)?, row.try_get::<String, _>("failures")?));
    let (summary, failures) = read().map_err(Error::query(READING))?;
    let failures = read_failures(&failures)?;
    let copy = fetch_letters(database, queue, &[offset], i64::MAX)
        .await?
        .pop();
    // One that was removed or replaced between the two reads is not there.
    Ok(copy.map(|copy| Stored {
        summary,
        failures,
        copy,
    }))
}

/// The number of the delivery that a letter's message died with.
///
/// # Errors
/// The database's.
pub async fn find_death(
    database: &Database,
    queue: QueueId,
    id: LetterId,
) -> Result<Option<u32>, Error> {
    let delivery: Option<i32> = sqlx::query_scalar(
        "select delivery from postroad_broker.dead_letter where queue_id = $1 and \"offset\" = $2 and generation = $3",
    )
    .bind(queue.0)
    .bind(id.offset.0)
    .bind(id.generation.0)
    .fetch_optional(database.pooled())
    .await
    .map_err(Error::query(READING))?;
    Ok(delivery.and_then(|delivery| u32::try_from(delivery).ok()))
}

/// How a dead letter came to be, without its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// The letter's name.
    pub id: LetterId,
    /// The delivery that the message died with.
    pub delivery: u32,
    /// Attempts made.
    pub attempts: u32,
    /// How the last attempts failed, oldest first.
    pub failures: Vec<Failure>,
}

/// Reads how the letters of these messages came to be, by offset.
///
/// # Errors
/// The database's, or a row that no version has written.
pub async fn find_histories(
    database: &Database,
    queue: QueueId,
    offsets: &[Offset],
) -> Result<Vec<History>, Error> {
    let rows: Vec<(i64, i64, i32, i32, String)> = sqlx::query_as(
        "select d.* from unnest($2::bigint[]) p (place) cross join lateral ( \
            select l.generation, l.\"offset\", l.delivery, l.attempts, l.failures::text from postroad_broker.dead_letter l \
            where l.queue_id = $1 and l.\"offset\" = p.place limit 1) d \
         order by d.\"offset\"",
    )
    .bind(queue.0)
    .bind(offsets.iter().map(|offset| offset.0).collect::<Vec<_>>())
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query(READING))?;
    rows.into_iter()
        .map(|(generation, offset, delivery, attempts, failures)| {
            Ok(History {
                id: LetterId {
                    generation: Generation(generation),
                    offset: Offset(offset),
                },
                delivery: u32::try_from(delivery).unwrap_or(0),
                attempts: u32::try_from(attempts).unwrap_or(0),
                failures: read_failures(&failures)?,
            })
        })
        .collect()
}

fn read_failures(text: &str) -> Result<Vec<Failure>, Error> {
    #[derive(serde::Deserialize)]
    struct Wire {
        at: DateTime<Utc>,
        reason: String,
    }
    let failures: Vec<Wire> = serde_json::from_str(text).map_err(|error| Error::Corrupt {
        doing: READING,
        what: format!("failures: {error}"),
    })?;
    let failures = failures.into_iter().map(|failure| Failure {
        at: failure.at.into(),
        reason: failure.reason,
    });
    Ok(failures.collect())
}

/// Reads the copies of messages from their letters, by offset: as many as `bytes` of payload allow, but the first always.
///
/// # Errors
/// The database's, or a row that no version has written.
pub async fn fetch_letters(
    database: &Database,
    queue: QueueId,
    offsets: &[Offset],
    bytes: i64,
) -> Result<Vec<Copy>, Error> {
    let rows = sqlx::query(include_str!("sql/fetch_letters.sql"))
        .bind(queue.0)
        .bind(offsets.iter().map(|offset| offset.0).collect::<Vec<_>>())
        .bind(bytes)
        .fetch_all(database.pooled())
        .await
        .map_err(Error::query(READING))?;
    rows.iter().map(read_copy).collect()
}

fn read_copy(row: &PgRow) -> Result<Copy, Error> {
    let read = || -> Result<_, sqlx::Error> {
        let extensions: Option<String> = row.try_get("extensions")?;
        let kind: i16 = row.try_get("data_kind")?;
        let data: Option<Vec<u8>> = row.try_get("data")?;
        let topic: String = row.try_get("topic")?;
        let copy = Copy {
            offset: Offset(row.try_get("offset")?),
            appended_at: row.try_get("appended_at")?,
            message: Message {
                id: row.try_get("id")?,
                source: row.try_get("source")?,
                kind: row.try_get("type")?,
                topic: Topic::parse(&topic).map_err(|error| sqlx::Error::Decode(error.into()))?,
                key: row.try_get("key")?,
                subject: row.try_get("subject")?,
                time: row.try_get("event_time")?,
                data_content_type: row.try_get("data_content_type")?,
                data_schema: row.try_get("data_schema")?,
                data: Data::Absent,
                extensions: serde_json::Map::new(),
                expected_version: None,
            },
        };
        Ok((copy, kind, data, extensions))
    };
    let (mut copy, kind, data, extensions) = read().map_err(Error::query(READING))?;
    let offset = copy.offset;
    let corrupt = |what: String| Error::Corrupt {
        doing: READING,
        what: format!("offset {offset}: {what}"),
    };
    copy.message.data = Data::from_stored(kind, data.unwrap_or_default().into())
        .map_err(|error| corrupt(error.to_string()))?;
    if let Some(extensions) = extensions {
        copy.message.extensions =
            serde_json::from_str(&extensions).map_err(|error| corrupt(error.to_string()))?;
    }
    Ok(copy)
}

/// Finds dead letters older than their queues keep them, the oldest of each queue: at most a hundred of each, and of a
/// hundred queues. Those on their way back are kept: their messages may be nowhere else. `default_seconds` is for queues
/// whose settings do not say. `witness`: what another clock says; the earlier of the two counts, so that one that runs ahead for a while
/// deletes nothing.
///
/// # Errors
/// The database's.
pub async fn find_old_letters(
    database: &Database,
    default_seconds: f64,
    witness: DateTime<Utc>,
) -> Result<Vec<(QueueId, Vec<Offset>)>, Error> {
    let found: Vec<(i64, Vec<i64>)> = sqlx::query_as(
        "select q.id, array_agg(d.\"offset\") \
         from (select q.id, least(clock_timestamp(), $2) - make_interval(secs => \
                coalesce((q.settings ->> 'dead_letter_retention_ms')::float8 / 1000, $1)) as before \
            from postroad_broker.queue q) q, \
            lateral (select l.\"offset\" from postroad_broker.dead_letter l \
                where l.queue_id = q.id and l.died_at < q.before and l.redriven_at is null \
                order by l.died_at limit 100) d \
         group by q.id limit 100",
    )
    .bind(default_seconds)
    .bind(witness)
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query("finding old dead letters"))?;
    let letters = found.into_iter().map(|(queue, offsets)| {
        let offsets = offsets.into_iter().map(Offset);
        (QueueId(queue), offsets.collect())
    });
    Ok(letters.collect())
}

/// A dead letter whose copy has to be published.
#[derive(Debug, Clone, PartialEq)]
pub struct Unforwarded {
    /// Its queue.
    pub queue: QueueId,
    /// Its name.
    pub id: LetterId,
    /// The delivery that the message died with.
    pub delivery: u32,
    /// Attempts made.
    pub attempts: u32,
    /// `rejected` or `out_of_attempts`.
    pub cause: String,
    /// How the last attempts failed, oldest first.
    pub failures: Vec<Failure>,
    /// The time when it died.
    pub died_at: DateTime<Utc>,
    /// The topic of the copy.
    pub topic: String,
    /// The message.
    pub copy: Copy,
}

/// Finds dead letters whose copies have yet to be published: at most `limit` of these queues, and about `bytes`.
///
/// # Errors
/// The database's, or a row that no version has written.
pub async fn find_unforwarded(
    database: &Database,
    queues: &[QueueId],
    limit: i64,
    bytes: i64,
) -> Result<Vec<Unforwarded>, Error> {
    let rows = sqlx::query(include_str!("sql/find_unforwarded_letters.sql"))
        .bind(queues.iter().map(|queue| queue.0).collect::<Vec<_>>())
        .bind(limit)
        .bind(bytes)
        .fetch_all(database.pooled())
        .await
        .map_err(Error::query(READING))?;
    rows.iter()
        .map(|row| {
            let copy = read_copy(row)?;
            let read = || -> Result<_, sqlx::Error> {
                let failures: String = row.try_get("failures")?;
                let letter = Unforwarded {
                    queue: QueueId(row.try_get("queue_id")?),
                    id: LetterId {
                        generation: Generation(row.try_get("generation")?),
                        offset: copy.offset,
                    },
                    delivery: u32::try_from(row.try_get::<i32, _>("delivery")?).unwrap_or(0),
                    attempts: u32::try_from(row.try_get::<i32, _>("attempts")?).unwrap_or(0),
                    cause: row.try_get("cause")?,
                    failures: Vec::new(),
                    died_at: row.try_get("died_at")?,
                    topic: row.try_get("forward_topic")?,
                    copy,
                };
                Ok((letter, failures))
            };
            let (mut letter, failures) = read().map_err(Error::query(READING))?;
            letter.failures = read_failures(&failures)?;
            Ok(letter)
        })
        .collect()
}

/// Notes that copies of letters are published, or cannot be. A letter that was replaced meanwhile is another death, which
/// has a copy of its own.
///
/// # Errors
/// The database's.
pub async fn mark_forwarded(
    database: &Database,
    letters: &[(QueueId, Offset, u32)],
) -> Result<(), Error> {
    sqlx::query(
        "update postroad_broker.dead_letter d set forwarded_at = clock_timestamp() \
         from unnest($1::bigint[], $2::bigint[], $3::integer[]) f (queue_id, \"offset\", delivery) \
         where d.queue_id = f.queue_id and d.\"offset\" = f.\"offset\" and d.delivery = f.delivery",
    )
    .bind(letters.iter().map(|letter| letter.0.0).collect::<Vec<_>>())
    .bind(letters.iter().map(|letter| letter.1.0).collect::<Vec<_>>())
    .bind(
        letters
            .iter()
            .map(|letter| i32::try_from(letter.2).unwrap_or(i32::MAX))
            .collect::<Vec<_>>(),
    )
    .execute(database.pooled())
    .await
    .map_err(Error::query("noting forwarded dead letters"))?;
    Ok(())
}
