//! Topic settings.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;

use super::{Database, Error, repeated};
use crate::domain::name::TopicPattern;

/// The declared settings for the topics of a pattern.
#[derive(Debug, Clone, PartialEq)]
pub struct SettingsRow {
    /// The pattern.
    pub pattern: TopicPattern,
    /// JSON Schema, as it was given.
    pub schema: Option<String>,
    /// The largest message over HTTP, in bytes.
    pub max_bytes: Option<i64>,
    /// Messages per second over HTTP.
    pub rate_per_second: Option<f64>,
    /// Messages that may come at once.
    pub burst: Option<i64>,
    /// The time of the first declaration.
    pub created_at: DateTime<Utc>,
    /// The time of the last change.
    pub changed_at: DateTime<Utc>,
}

/// How a declaration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// It is new.
    Created,
    /// It was there, and is now as declared.
    Changed,
    /// There are as many as there may be.
    TooMany,
}

type Columns = (
    String,
    Option<String>,
    Option<i64>,
    Option<f64>,
    Option<i64>,
    DateTime<Utc>,
    DateTime<Utc>,
);

const DOING: &str = "reading the settings of topics";

/// The version, which rises with each change.
///
/// # Errors
/// The statement failed.
pub async fn read_version(database: &Database) -> Result<i64, Error> {
    sqlx::query_scalar("select version from postroad_broker.topic_settings_version")
        .fetch_one(database.pooled())
        .await
        .map_err(Error::query(DOING))
}

/// All settings, with a version that they have at least.
///
/// # Errors
/// A statement failed; or a row holds an invalid pattern.
pub async fn list(database: &Database) -> Result<(i64, Vec<SettingsRow>), Error> {
    // The version first: a change in between is read again, never missed.
    let version = read_version(database).await?;
    let rows: Vec<Columns> = sqlx::query_as(
        "select pattern, schema, max_bytes, rate_per_second, burst, created_at, changed_at
        from postroad_broker.topic_settings
        order by pattern collate \"C\"",
    )
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query(DOING))?;
    let rows: Result<Vec<SettingsRow>, Error> = rows.into_iter().map(settings_row).collect();
    Ok((version, rows?))
}

fn settings_row(columns: Columns) -> Result<SettingsRow, Error> {
    let (pattern, schema, max_bytes, rate_per_second, burst, created_at, changed_at) = columns;
    let pattern = TopicPattern::parse(&pattern).map_err(|error| Error::Corrupt {
        doing: DOING,
        what: format!("the pattern `{pattern}` {error}"),
    })?;
    Ok(SettingsRow {
        pattern,
        schema,
        max_bytes,
        rate_per_second,
        burst,
        created_at,
        changed_at,
    })
}

/// Declares settings in place of what the pattern had. The version's row is locked first, so that changes come one after another.
///
/// # Errors
/// The transaction failed.
pub async fn declare(
    database: &Database,
    pattern: &TopicPattern,
    schema: Option<&str>,
    (max_bytes, rate_per_second, burst): (Option<i64>, Option<f64>, Option<i64>),
    most: i64,
) -> Result<Declared, Error> {
    let numbers = (max_bytes, rate_per_second, burst);
    repeated(|_| try_declare(database, pattern, schema, numbers, most)).await
}

async fn try_declare(
    database: &Database,
    pattern: &TopicPattern,
    schema: Option<&str>,
    (max_bytes, rate_per_second, burst): (Option<i64>, Option<f64>, Option<i64>),
    most: i64,
) -> Result<Declared, Error> {
    let write = async {
        let mut connection = database.pool().acquire().await?;
        let mut transaction = connection.begin().await?;
        sqlx::query("update postroad_broker.topic_settings_version set version = version + 1")
            .execute(&mut *transaction)
            .await?;
        let (count, is_there): (i64, bool) = sqlx::query_as(
            "select count(*), coalesce(bool_or(pattern = $1), false) from postroad_broker.topic_settings",
        )
        .bind(pattern.as_str())
        .fetch_one(&mut *transaction)
        .await?;
        if !is_there && count >= most {
            transaction.rollback().await?;
            return Ok(Declared::TooMany);
        }
        sqlx::query(
            "insert into postroad_broker.topic_settings (pattern, schema, max_bytes, rate_per_second, burst)
            values ($1, $2, $3, $4, $5)
            on conflict (pattern) do update set schema = excluded.schema, max_bytes = excluded.max_bytes,
                rate_per_second = excluded.rate_per_second, burst = excluded.burst, changed_at = clock_timestamp()",
        )
        .bind(pattern.as_str())
        .bind(schema)
        .bind(max_bytes)
        .bind(rate_per_second)
        .bind(burst)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(if is_there {
            Declared::Changed
        } else {
            Declared::Created
        })
    };
    write
        .await
        .map_err(Error::query("declaring the settings of a topic"))
}

/// Deletes what a pattern has. Returns whether it had anything.
///
/// # Errors
/// The transaction failed.
pub async fn delete(database: &Database, pattern: &TopicPattern) -> Result<bool, Error> {
    repeated(|is_repeat| async move {
        // What is not there any more was deleted by the first try.
        Ok(try_delete(database, pattern).await? || is_repeat)
    })
    .await
}

async fn try_delete(database: &Database, pattern: &TopicPattern) -> Result<bool, Error> {
    let delete = async {
        let mut connection = database.pool().acquire().await?;
        let mut transaction = connection.begin().await?;
        sqlx::query("update postroad_broker.topic_settings_version set version = version + 1")
            .execute(&mut *transaction)
            .await?;
        let deleted = sqlx::query("delete from postroad_broker.topic_settings where pattern = $1")
            .bind(pattern.as_str())
            .execute(&mut *transaction)
            .await?
            .rows_affected();
        transaction.commit().await?;
        Ok(deleted > 0)
    };
    delete
        .await
        .map_err(Error::query("deleting the settings of a topic"))
}
