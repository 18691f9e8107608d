//! Streams: declare, describe, list, delete.

use std::fmt::Display;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::wire;
use crate::domain::name::{StreamName, TopicPattern};
use crate::http::extract::{Check, Json, Named, Query, parse_json};
use crate::http::openapi::{NoStream, Reads, StreamConflicts, StreamStays, Writes};
use crate::http::problem::Problem;
use crate::http::route::Routes;
use crate::http::state::State;
use crate::stream::{
    DEFAULT_HARD_LIMIT, DEFAULT_RETENTION, Declared, Description, PATTERN_MAX_COUNT, Retention,
    Settings,
};

/// The longest retention, in seconds: a hundred years.
const RETENTION_MAX_SECONDS: i64 = 100 * 366 * 86_400;

/// The largest offset that every JSON parser reads exactly.
pub(super) const OFFSET_MAX: i64 = (1 << 53) - 1;

/// A stream's settings. Everything is optional; a setting that is left out takes its default, even if it had another value before.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = StreamDeclaration, example = json!({"topics": ["orders.>"]}))]
struct Declaration {
    /// The topics that it owns: `*` stands for one token, a final `>` for the rest. Every stream except `main` needs one.
    #[serde(default)]
    #[schema(max_items = 1000)]
    topics: Vec<String>,
    /// A message that every queue has settled is kept at least this long; 7 days by default.
    settled_retention_seconds: Option<Seconds>,
    /// Beyond this size the oldest messages that every queue has settled are dropped, however young; unlimited by default.
    settled_retention_bytes: Option<Bytes>,
    /// A message of this age is dropped, settled or not; by default 14 days, or unlimited if `settled_retention_seconds` is.
    unsettled_retention_seconds: Option<Seconds>,
    /// Beyond this size the oldest messages are dropped, settled or not; unlimited by default.
    unsettled_retention_bytes: Option<Bytes>,
    /// Index the keys: each key has a history and a version, and a message may expect a version (`expectedversion`). Fixed
    /// once the stream has had a message.
    #[serde(default)]
    keyed: bool,
}

/// A number of seconds, or `unlimited`.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(
    untagged,
    expecting = "a retention must be an integer or \"unlimited\""
)]
#[schema(as = RetentionSeconds)]
enum Seconds {
    /// A number of seconds.
    Of(SecondCount),
    /// No limit.
    Unlimited(Unlimited),
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[schema(minimum = 1, maximum = 3_162_240_000_i64)]
struct SecondCount(i64);

/// A number of bytes, or `unlimited`.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(
    untagged,
    expecting = "a retention must be an integer or \"unlimited\""
)]
enum Bytes {
    /// A number of bytes.
    Of(ByteCount),
    /// No limit.
    Unlimited(Unlimited),
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[schema(minimum = 1_048_576, maximum = 9_007_199_254_740_991_i64)]
struct ByteCount(i64);

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Unlimited {
    Unlimited,
}

impl Seconds {
    fn new(age: Option<std::time::Duration>) -> Self {
        match age {
            Some(age) => Self::Of(SecondCount(seconds(age))),
            None => Self::Unlimited(Unlimited::Unlimited),
        }
    }
}

impl Seconds {
    fn read(&self, check: &mut Check, name: &str) -> Option<std::time::Duration> {
        let Self::Of(SecondCount(value)) = self else {
            return None;
        };
        let value = check.integer(&format!("/{name}"), *value, 1..=RETENTION_MAX_SECONDS);
        Some(std::time::Duration::from_secs(value.unsigned_abs()))
    }
}

impl Bytes {
    fn read(&self, check: &mut Check, name: &str) -> Option<u64> {
        let Self::Of(ByteCount(value)) = self else {
            return None;
        };
        let value = check.integer(&format!("/{name}"), *value, 1 << 20..=OFFSET_MAX);
        Some(value.unsigned_abs())
    }

    fn new(bytes: Option<u64>) -> Self {
        match bytes {
            Some(bytes) => Self::Of(ByteCount(i64::try_from(bytes).unwrap_or(i64::MAX))),
            None => Self::Unlimited(Unlimited::Unlimited),
        }
    }
}

/// A stream, its settings and its numbers.
#[derive(Debug, Serialize, ToSchema)]
struct Stream {
    #[schema(example = "main")]
    name: String,
    /// The topics that it owns; `main` takes all that no other stream owns.
    topics: Vec<String>,
    settled_retention_seconds: Seconds,
    settled_retention_bytes: Bytes,
    unsettled_retention_seconds: Seconds,
    unsettled_retention_bytes: Bytes,
    /// True if its keys are indexed.
    keyed: bool,
    /// The used share, from 0 to 1, of the limits for messages that some queue has not settled; left out without a limit.
    /// At 1 the messages are dropped; the broker warns from one half on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, minimum = 0, maximum = 1)]
    unsettled_limit_used: Option<f64>,
    /// Messages that wait to enter the stream; null if it never had a scheduled message.
    scheduled: Option<Scheduled>,
    /// The first offset that is still there; one past `last_offset` when all messages are gone.
    first_offset: i64,
    /// The last offset given to a message; 0 before the first.
    last_offset: i64,
    /// The approximate size of its messages on disk.
    message_bytes: u64,
    #[schema(format = DateTime)]
    created_at: String,
}

/// The state of a stream's scheduled messages.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StreamSchedule)]
struct Scheduled {
    /// The next due time, if it is within a day; in the past while publishing is late. A cancelled message counts until then.
    #[schema(format = DateTime)]
    next_due_at: Option<String>,
    /// How long the first of them has been overdue: more than a moment when publishing cannot go on.
    #[schema(minimum = 0)]
    lag_seconds: f64,
    /// The number of waiting messages, at most 100,000; null where streams are listed.
    #[schema(minimum = 0)]
    waiting: Option<i64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Streams {
    /// By name.
    streams: Vec<Stream>,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(routes!(declare, describe, delete))
}

fn seconds(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

impl From<Description> for Stream {
    fn from(stream: Description) -> Self {
        Self {
            name: stream.name.to_string(),
            topics: stream.patterns.iter().map(ToString::to_string).collect(),
            settled_retention_seconds: Seconds::new(stream.retention.settled),
            settled_retention_bytes: Bytes::new(stream.retention.settled_bytes),
            unsettled_retention_seconds: Seconds::new(stream.retention.unsettled),
            unsettled_retention_bytes: Bytes::new(stream.retention.unsettled_bytes),
            keyed: stream.is_keyed,
            unsettled_limit_used: stream.unsettled_limit_used,
            scheduled: stream.scheduled.map(|scheduled| Scheduled {
                next_due_at: scheduled.next_due_at.map(wire::time),
                lag_seconds: scheduled.lag.as_secs_f64(),
                waiting: scheduled.waiting,
            }),
            first_offset: stream.first_offset.0,
            last_offset: stream.last_offset.0,
            message_bytes: stream.message_bytes,
            created_at: wire::time(stream.created_at),
        }
    }
}

/// Reads a declaration from elsewhere than a request.
pub(in crate::http) fn read_declaration(body: &[u8]) -> Result<Settings, Problem> {
    parse_json::<Declaration>(body)?.settings()
}

impl Declaration {
    fn settings(self) -> Result<Settings, Problem> {
        let mut check = Check::default();
        if self.topics.len() > PATTERN_MAX_COUNT {
            check.fault(
                "/topics",
                format!("at most {PATTERN_MAX_COUNT} patterns are allowed"),
            );
        }
        let patterns = self.topics.iter().enumerate().filter_map(|(index, text)| {
            check.parsed(&format!("/topics/{index}"), text, TopicPattern::parse)
        });
        let patterns = patterns.collect();
        let retention = Retention {
            settled: match &self.settled_retention_seconds {
                None => Some(DEFAULT_RETENTION),
                Some(limit) => limit.read(&mut check, "settled_retention_seconds"),
            },
            settled_bytes: self
                .settled_retention_bytes
                .and_then(|limit| limit.read(&mut check, "settled_retention_bytes")),
            unsettled: None,
            unsettled_bytes: self
                .unsettled_retention_bytes
                .and_then(|limit| limit.read(&mut check, "unsettled_retention_bytes")),
        };
        let unsettled = match self.unsettled_retention_seconds {
            // A stream that keeps settled messages for longer than the default limit keeps unsettled ones as long.
            None => retention.settled.map(|age| age.max(DEFAULT_HARD_LIMIT)),
            Some(limit) => limit.read(&mut check, "unsettled_retention_seconds"),
        };
        check.finish()?;
        Ok(Settings {
            patterns,
            retention: Retention {
                unsettled,
                ..retention
            },
            is_keyed: self.keyed,
        })
    }
}

/// List the streams.
#[utoipa::path(
    get, path = "/v1/streams", tag = "streams", operation_id = "list_streams",
    responses((status = 200, description = "All streams", body = Streams), Reads),
)]
async fn list(Extract(state): Extract<State>, query: Query) -> Result<Response, Problem> {
    query.finish()?;
    let streams = state.parts.stream.list().await?;
    let streams = streams.into_iter().map(Stream::from).collect();
    Ok(wire::json(StatusCode::OK, &Streams { streams }))
}

/// Declare a stream: create it, or change its settings. Repeating it changes nothing.
#[utoipa::path(
    put, path = "/v1/streams/{stream}", tag = "streams", operation_id = "declare_stream",
    params(("stream" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "orders")),
    request_body = Declaration,
    responses(
        (status = 200, description = "It existed, and now has these settings", body = Stream),
        (status = 201, description = "It has been created", body = Stream),
        StreamConflicts, Writes,
    ),
)]
async fn declare(
    Extract(state): Extract<State>,
    Named(name): Named<StreamName>,
    query: Query,
    Json(declaration): Json<Declaration>,
) -> Result<Response, Problem> {
    query.finish()?;
    let settings = declaration.settings()?;
    let (stream, declared) = state.parts.stream.declare(name, settings).await?;
    let status = match declared {
        Declared::Created => StatusCode::CREATED,
        Declared::Unchanged | Declared::Changed => StatusCode::OK,
    };
    Ok(wire::json(status, &Stream::from(stream)))
}

/// Describe a stream.
#[utoipa::path(
    get, path = "/v1/streams/{stream}", tag = "streams", operation_id = "describe_stream",
    params(("stream" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "main")),
    responses((status = 200, description = "The stream", body = Stream), NoStream, Reads),
)]
async fn describe(
    Extract(state): Extract<State>,
    Named(name): Named<StreamName>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let stream = state.parts.stream.describe(&name).await?;
    Ok(wire::json(StatusCode::OK, &Stream::from(stream)))
}

/// Delete a stream with its messages. Its topics then belong to `main`. A stream with scheduled messages needs `force`.
#[utoipa::path(
    delete, path = "/v1/streams/{stream}", tag = "streams", operation_id = "delete_stream",
    params(("stream" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "gone"),
        ("force" = Option<bool>, Query, description = "Also delete the scheduled messages that wait to enter the stream"),
    ),
    responses((status = 204, description = "Deleted"), NoStream, StreamStays, Reads),
)]
async fn delete(
    Extract(state): Extract<State>,
    Named(name): Named<StreamName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let is_forced = query.parsed("force", |text| match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("must be `true` or `false`"),
    });
    query.finish()?;
    let is_forced = is_forced.unwrap_or_default();
    state.parts.stream.delete(&name, is_forced).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Parses a moment; the error completes "`text` …".
pub(super) fn parse_time(text: &str) -> Result<DateTime<Utc>, impl Display + use<>> {
    match DateTime::parse_from_rfc3339(text) {
        Ok(time) => Ok(time.to_utc()),
        Err(_) => Err("is not an RFC 3339 timestamp such as 2026-11-22T03:00:00Z"),
    }
}
