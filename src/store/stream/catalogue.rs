//! Streams and their patterns. A change locks the catalogue's row, raises its version and then locks every head: everything
//! routed by the old patterns is in the log before the change, and everything after it is routed by the new ones.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::scheduled::count_waiting;
use crate::domain::id::{Offset, StreamId};
use crate::domain::name::{StreamName, TopicPattern};
use crate::domain::retention::Retention;
use crate::store::bounded::{STATEMENT, bounded};
use crate::store::{Connection, Error};

/// All streams at one version.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    /// Rises with each change.
    pub version: i64,
    /// By id.
    pub streams: Vec<StreamRow>,
}

/// A stream as declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamRow {
    /// Its number.
    pub id: StreamId,
    /// Its name.
    pub name: StreamName,
    /// The topics that it owns.
    pub patterns: Vec<TopicPattern>,
    /// How long messages are kept.
    pub retention: Retention,
    /// Whether its keys are indexed.
    pub is_keyed: bool,
    /// The time of its creation.
    pub created_at: DateTime<Utc>,
}

/// The result of a declaration.
#[derive(Debug)]
pub enum DeclareOutcome {
    /// It is new.
    Created,
    /// It was there as it is.
    Unchanged,
    /// It was there with other settings.
    Changed,
    /// It has had messages: whether it is keyed cannot change; nothing was done.
    KeyedIsFixed,
    /// The stream limit is reached; nothing was done.
    Full,
    /// Another stream's pattern is in the way; nothing was done.
    Overlap {
        /// The pattern refused.
        pattern: TopicPattern,
        /// The stream in the way.
        other_stream: StreamName,
        /// Its pattern.
        other_pattern: TopicPattern,
    },
}

/// The outcome of a delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeleteOutcome {
    /// It is gone.
    Deleted,
    /// Queues read it; nothing was done.
    HasQueues,
    /// Messages wait to enter it; nothing was done.
    HasScheduled,
}

/// As many streams as there can be: a change of one locks the heads of all, and each node looks after each.
pub const STREAMS_MAX: usize = 1_000;

const DECLARING: &str = "declaring a stream";
const DELETING: &str = "deleting a stream";

/// Reads all streams in one statement.
///
/// # Errors
/// The database's.
pub async fn load_catalogue(connection: &mut Connection) -> Result<Catalogue, Error> {
    const DOING: &str = "reading the streams";
    type Columns = (
        i64,
        Option<i32>,
        Option<String>,
        Option<String>,
        Option<DateTime<Utc>>,
        Vec<String>,
    );
    let rows: Vec<Columns> = bounded(DOING, STATEMENT, sqlx::query_as(
        "select c.version, s.id, s.name, s.settings::text, s.created_at, \
             array(select p.pattern from postroad_broker.stream_pattern p where p.stream_id = s.id order by p.pattern) \
         from postroad_broker.catalogue c left join postroad_broker.stream s on true order by s.id",
    )
    .fetch_all(connection)).await?;
    let mut catalogue = Catalogue::default();
    for (version, id, name, settings, created_at, patterns) in rows {
        catalogue.version = version;
        let (Some(id), Some(name), Some(settings), Some(created_at)) =
            (id, name, settings, created_at)
        else {
            continue;
        };
        let corrupt = |what: String| Error::Corrupt { doing: DOING, what };
        let patterns = patterns.iter().map(|pattern| {
            TopicPattern::parse(pattern).map_err(|error| corrupt(format!("`{pattern}` {error}")))
        });
        let settings: Stored = serde_json::from_str(&settings)
            .map_err(|error| corrupt(format!("the settings of `{name}`: {error}")))?;
        let retention = settings.retention();
        catalogue.streams.push(StreamRow {
            id: StreamId(id),
            is_keyed: settings.keyed,
            patterns: patterns.collect::<Result<_, _>>()?,
            name: StreamName::parse(&name).map_err(|error| corrupt(format!("`{name}` {error}")))?,
            retention: retention
                .ok_or_else(|| corrupt(format!("the retention of `{name}` is out of range")))?,
            created_at,
        });
    }
    Ok(catalogue)
}

/// The settings as the row keeps them. Absent or null values mean unlimited.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    settled_retention_seconds: Option<f64>,
    settled_retention_bytes: Option<u64>,
    unsettled_retention_seconds: Option<f64>,
    unsettled_retention_bytes: Option<u64>,
    #[serde(default)]
    keyed: bool,
}

impl Stored {
    fn of(retention: &Retention, keyed: bool) -> String {
        let stored = Self {
            keyed,
            settled_retention_seconds: retention.settled.map(|age| age.as_secs_f64()),
            settled_retention_bytes: retention.settled_bytes,
            unsettled_retention_seconds: retention.unsettled.map(|age| age.as_secs_f64()),
            unsettled_retention_bytes: retention.unsettled_bytes,
        };
        serde_json::to_string(&stored).expect("the settings have string keys only")
    }

    fn retention(&self) -> Option<Retention> {
        let age = |seconds: Option<f64>| {
            let age = seconds.map(Duration::try_from_secs_f64);
            age.transpose().ok()
        };
        Some(Retention {
            settled: age(self.settled_retention_seconds)?,
            settled_bytes: self.settled_retention_bytes,
            unsettled: age(self.unsettled_retention_seconds)?,
            unsettled_bytes: self.unsettled_retention_bytes,
        })
    }
}

/// Creates `main` with this retention unless it is there.
///
/// # Errors
/// The database's.
pub async fn create_main(connection: &mut Connection, retention: &Retention) -> Result<(), Error> {
    let main = StreamName::main();
    let mut transaction = begin(connection, DECLARING).await?;
    let catalogue = load_catalogue(&mut transaction).await?;
    if catalogue.streams.iter().all(|stream| stream.name != main) {
        write(
            &mut transaction,
            None,
            &main,
            &[],
            &Stored::of(retention, false),
        )
        .await?;
    }
    transaction.commit().await.map_err(Error::query(DECLARING))
}

/// Declares a stream.
///
/// # Errors
/// The database's.
pub async fn declare(
    connection: &mut Connection,
    name: &StreamName,
    patterns: &[TopicPattern],
    retention: &Retention,
    is_keyed: bool,
) -> Result<DeclareOutcome, Error> {
    let mut transaction = begin(connection, DECLARING).await?;
    let catalogue = load_catalogue(&mut transaction).await?;
    for pattern in patterns {
        for other in catalogue.streams.iter().filter(|other| other.name != *name) {
            if let Some(found) = other.patterns.iter().find(|p| p.overlaps(pattern)) {
                end(transaction, DECLARING).await?;
                return Ok(DeclareOutcome::Overlap {
                    pattern: pattern.clone(),
                    other_stream: other.name.clone(),
                    other_pattern: found.clone(),
                });
            }
        }
    }
    let present = catalogue.streams.iter().find(|stream| stream.name == *name);
    let outcome = match present {
        None if catalogue.streams.len() >= STREAMS_MAX => {
            end(transaction, DECLARING).await?;
            return Ok(DeclareOutcome::Full);
        }
        None => DeclareOutcome::Created,
        Some(row) => {
            let mut wanted = patterns.to_vec();
            wanted.sort();
            let mut have = row.patterns.clone();
            have.sort();
            let is_same = row.retention == *retention && row.is_keyed == is_keyed;
            if wanted == have && is_same {
                end(transaction, DECLARING).await?;
                return Ok(DeclareOutcome::Unchanged);
            }
            DeclareOutcome::Changed
        }
    };
    let id = present.map(|row| row.id);
    let settings = Stored::of(retention, is_keyed);
    let id = write(&mut transaction, id, name, patterns, &settings).await?;
    let was_keyed = present.is_some_and(|row| row.is_keyed);
    if was_keyed != is_keyed && !set_keyed(&mut transaction, id, is_keyed).await? {
        end(transaction, DECLARING).await?;
        return Ok(DeclareOutcome::KeyedIsFixed);
    }
    transaction
        .commit()
        .await
        .map_err(Error::query(DECLARING))?;
    Ok(outcome)
}

type Transaction<'c> = sqlx::Transaction<'c, sqlx::Postgres>;

/// Begins a change: one at a time.
async fn begin<'c>(
    connection: &'c mut Connection,
    doing: &'static str,
) -> Result<Transaction<'c>, Error> {
    let mut transaction = sqlx::Connection::begin(connection)
        .await
        .map_err(Error::query(doing))?;
    wait_for_locks(&mut transaction, "2s", doing).await?;
    sqlx::query("select from postroad_broker.catalogue for no key update")
        .execute(&mut *transaction)
        .await
        .map_err(Error::query(doing))?;
    Ok(transaction)
}

/// Ends a transaction that changes nothing. A dropped one would keep its locks until the connection is next used.
async fn end(transaction: Transaction<'_>, doing: &'static str) -> Result<(), Error> {
    transaction.rollback().await.map_err(Error::query(doing))
}

/// Ends a change: the new version, then every head, so that no append is on its way by the old one. Under the heads' locks no other
/// lock is waited for any longer than a moment: all publishing waits meanwhile.
async fn raise_version(
    transaction: &mut Transaction<'_>,
    doing: &'static str,
) -> Result<(), Error> {
    sqlx::query("update postroad_broker.catalogue set version = version + 1")
        .execute(&mut **transaction)
        .await
        .map_err(Error::query(doing))?;
    sqlx::query("select from postroad_broker.stream_head order by stream_id for no key update")
        .execute(&mut **transaction)
        .await
        .map_err(Error::query(doing))?;
    wait_for_locks(transaction, "50ms", doing).await
}

/// How long the rest of a transaction waits for a lock.
async fn wait_for_locks(
    transaction: &mut Transaction<'_>,
    bound: &str,
    doing: &'static str,
) -> Result<(), Error> {
    sqlx::query("select set_config('lock_timeout', $1, true)")
        .bind(bound)
        .execute(&mut **transaction)
        .await
        .map_err(Error::query(doing))?;
    Ok(())
}

async fn write(
    transaction: &mut Transaction<'_>,
    present: Option<StreamId>,
    name: &StreamName,
    patterns: &[TopicPattern],
    settings: &str,
) -> Result<i32, Error> {
    let (id,): (i32,) = match present {
        Some(id) => sqlx::query_as(
            "update postroad_broker.stream set settings = $2::text::jsonb where id = $1 returning id",
        )
        .bind(id.0)
        .bind(settings)
        .fetch_one(&mut **transaction)
        .await
        .map_err(Error::query(DECLARING))?,
        None => sqlx::query_as(
            "with made as ( \
                 insert into postroad_broker.stream (name, settings) values ($1, $2::text::jsonb) returning id) \
             insert into postroad_broker.stream_head (stream_id) select id from made returning stream_id",
        )
        .bind(name.as_str())
        .bind(settings)
        .fetch_one(&mut **transaction)
        .await
        .map_err(Error::query(DECLARING))?,
    };
    if present.is_none() {
        sqlx::query("select postroad_broker.create_stream_log($1)")
            .bind(id)
            .execute(&mut **transaction)
            .await
            .map_err(Error::query(DECLARING))?;
    }
    let patterns: Vec<&str> = patterns.iter().map(TopicPattern::as_str).collect();
    sqlx::query(
        "delete from postroad_broker.stream_pattern where stream_id = $1 and not pattern = any ($2)",
    )
    .bind(id)
    .bind(&patterns)
    .execute(&mut **transaction)
    .await
    .map_err(Error::query(DECLARING))?;
    sqlx::query(
        "insert into postroad_broker.stream_pattern (pattern, stream_id) \
         select p, $1 from unnest($2::text[]) as p on conflict (pattern) do nothing",
    )
    .bind(id)
    .bind(&patterns)
    .execute(&mut **transaction)
    .await
    .map_err(Error::query(DECLARING))?;
    raise_version(transaction, DECLARING).await?;
    Ok(id)
}

/// Makes a stream keyed, or not, under the lock of its head. `false`: it has had messages.
async fn set_keyed(
    transaction: &mut Transaction<'_>,
    stream: i32,
    is_keyed: bool,
) -> Result<bool, Error> {
    let text = match is_keyed {
        true => "select postroad_broker.create_stream_keys($1)",
        false => "select postroad_broker.drop_stream_keys($1)",
    };
    sqlx::query_scalar(text)
        .bind(stream)
        .fetch_one(&mut **transaction)
        .await
        .map_err(Error::query(DECLARING))
}

/// Deletes a stream's rows; its log is dropped later. With what waits to enter it only if `is_forced`.
///
/// # Errors
/// The database's.
pub async fn delete(
    connection: &mut Connection,
    stream: StreamId,
    is_forced: bool,
) -> Result<DeleteOutcome, Error> {
    let mut transaction = begin(connection, DELETING).await?;
    // The version and the heads first: the delete's cascade must not lock a head out of order.
    raise_version(&mut transaction, DELETING).await?;
    // Under the heads' locks: nothing is accepted meanwhile.
    let waiting = match is_forced {
        true => 0,
        false => count_waiting(&mut transaction, stream, 1).await?,
    };
    if waiting > 0 {
        end(transaction, DELETING).await?;
        return Ok(DeleteOutcome::HasScheduled);
    }
    let deleted = sqlx::query("delete from postroad_broker.stream where id = $1")
        .bind(stream.0)
        .execute(&mut *transaction)
        .await
        .map_err(Error::query(DELETING));
    match deleted {
        Err(error) if error.sqlstate().as_deref() == Some("23503") => {
            end(transaction, DELETING).await?;
            return Ok(DeleteOutcome::HasQueues);
        }
        deleted => deleted?,
    };
    transaction.commit().await.map_err(Error::query(DELETING))?;
    Ok(DeleteOutcome::Deleted)
}

/// Bytes on disk of each stream's leaves.
///
/// # Errors
/// The database's.
pub async fn read_sizes(connection: &mut Connection) -> Result<Vec<(StreamId, i64)>, Error> {
    let rows: Vec<(i32, i64)> = bounded("reading the sizes of streams", STATEMENT, sqlx::query_as(
        "select l.stream_id, coalesce(sum(pg_table_size(to_regclass('postroad_broker.' || l.table_name))), 0)::bigint \
         from postroad_broker.message_leaf l where l.emptied_at is null group by l.stream_id",
    )
    .fetch_all(connection)).await?;
    Ok(rows
        .into_iter()
        .map(|(id, bytes)| (StreamId(id), bytes))
        .collect())
}

/// Bytes on disk of each leaf of a stream that has messages, by offset.
///
/// # Errors
/// The database's.
pub async fn read_leaf_sizes(
    connection: &mut Connection,
    stream: StreamId,
) -> Result<Vec<(Offset, u64)>, Error> {
    let rows: Vec<(i64, i64)> = bounded(
        "reading the sizes of leaves",
        STATEMENT,
        sqlx::query_as(
            "select l.first_offset, coalesce(pg_table_size(to_regclass('postroad_broker.' || l.table_name)), 0) \
             from postroad_broker.message_leaf l where l.stream_id = $1 and l.emptied_at is null \
             order by l.first_offset",
        )
        .bind(stream.0)
        .fetch_all(connection),
    )
    .await?;
    Ok(rows
        .into_iter()
        .map(|(first, bytes)| (Offset(first), bytes.unsigned_abs()))
        .collect())
}
