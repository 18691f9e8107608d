//! Dead letters: list them, read one with its history, delete one.

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::streams::{OFFSET_MAX, parse_time};
use super::wire;
use super::words::DeathCause;
use crate::domain::id::Offset;
use crate::domain::letter::{Cause, LetterId, Selection};
use crate::domain::name::{QueueName, TopicPattern};
use crate::http::extract::{Named, PathPart, Query};
use crate::http::openapi::{LetterStays, NoLetter, NoQueue, Reads};
use crate::http::problem::Problem;
use crate::http::route::Routes;
use crate::http::state::State;
use crate::queue::{LetterFilter, LetterSummary};

/// Longest text that a reason is searched for, and longest key: bytes.
pub(super) const TEXT_MAX_BYTES: usize = 512;

/// A dead letter, without its message's payload.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeadLetterSummary)]
struct Summary {
    /// The letter's id in the queue.
    #[schema(example = "1-17")]
    id: String,
    /// The message's offset in the stream.
    #[schema(minimum = 1)]
    offset: i64,
    /// The number of the message's last delivery.
    delivery: u32,
    /// The number of attempts made.
    attempts: u32,
    /// The reason why the message died.
    cause: DeathCause,
    /// The reason of the last failure.
    reason: Option<String>,
    #[schema(format = DateTime)]
    died_at: String,
    topic: String,
    key: Option<String>,
    event_id: String,
    event_source: String,
    event_type: String,
    /// The redrive that brought the message back, while the message is not settled.
    redrive_id: Option<String>,
    #[schema(format = DateTime)]
    redriven_at: Option<String>,
    /// The topic that gets a copy, if the queue had a `dead_letter_topic` when the message died.
    forward_topic: Option<String>,
    /// The time when the copy was published.
    #[schema(format = DateTime)]
    forwarded_at: Option<String>,
}

/// How an attempt failed.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeadLetterFailure)]
struct Failure {
    #[schema(format = DateTime)]
    at: String,
    /// `timed_out`, or the consumer's reason.
    reason: String,
}

/// A dead letter with its history and its message.
#[derive(Serialize, ToSchema)]
#[schema(as = DeadLetter)]
struct Letter {
    #[serde(flatten)]
    summary: Summary,
    /// The failures of the last attempts, at most five, oldest first. Attempts before a redrive are included.
    failures: Vec<Failure>,
    /// The time when the message was appended to the stream.
    #[schema(format = DateTime)]
    appended_at: String,
    /// The message.
    #[schema(value_type = wire::Event)]
    event: Box<RawValue>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeadLetterPage)]
struct Page {
    /// By offset.
    dead_letters: Vec<Summary>,
    /// Pass this as `after` to get the next page; null at the end. A page can have fewer letters than asked for, or none,
    /// although more follow.
    next_after: Option<i64>,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(routes!(read, remove))
}

impl PathPart for LetterId {
    const PARAMETER: &'static str = "id";

    fn parse(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }
}

impl From<LetterSummary> for Summary {
    fn from(letter: LetterSummary) -> Self {
        let (redrive_id, redriven_at) = letter.redriven.unzip();
        let (forward_topic, forwarded_at) = letter.forward.unzip();
        Self {
            id: letter.id.to_string(),
            offset: letter.id.offset.0,
            delivery: letter.delivery,
            attempts: letter.attempts,
            cause: DeathCause(letter.cause),
            reason: letter.reason,
            died_at: wire::time(letter.died_at),
            topic: letter.topic,
            key: letter.key,
            event_id: letter.event_id,
            event_source: letter.event_source,
            event_type: letter.event_type,
            redrive_id,
            redriven_at: redriven_at.map(wire::time),
            forward_topic,
            forwarded_at: forwarded_at.flatten().map(wire::time),
        }
    }
}

/// The parameters that choose among dead letters.
fn selection(query: &mut Query) -> Selection {
    let text = |query: &mut Query, name: &'static str| {
        let text = query.text(name)?;
        if text.is_empty() || text.len() > TEXT_MAX_BYTES || text.contains('\0') {
            let detail =
                format!("`{name}` must be 1 to {TEXT_MAX_BYTES} bytes long, without U+0000");
            query.fault(name, detail, None);
        }
        Some(text)
    };
    Selection {
        ids: None,
        cause: query.parsed("cause", Cause::parse),
        topic: query.parsed("topic", TopicPattern::parse),
        key: text(query, "key"),
        reason: text(query, "reason"),
        died_after: query.parsed("died_after", parse_time),
        died_before: query.parsed("died_before", parse_time),
    }
}

/// List a queue's dead letters, a page at a time.
#[utoipa::path(
    get, path = "/v1/queues/{queue}/dead-letters", tag = "dead letters", operation_id = "list_dead_letters",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("after" = Option<i64>, Query, description = "Only letters whose message comes after this offset", minimum = 0, maximum = 9_007_199_254_740_991_i64),
        ("limit" = Option<i64>, Query, description = "At most this many; 100 by default", minimum = 1, maximum = 1000),
        ("cause" = Option<DeathCause>, Query, description = "Only letters with this cause"),
        ("topic" = Option<String>, Query, description = "Only letters whose topic matches this pattern", min_length = 1, max_length = 255),
        ("key" = Option<String>, Query, description = "Only letters with this ordering key", min_length = 1, max_length = 512),
        ("reason" = Option<String>, Query, description = "Only letters with this text in the reason of one of their failures",
            min_length = 1, max_length = 512),
        ("died_after" = Option<String>, Query, description = "Only letters that died after this time", format = DateTime),
        ("died_before" = Option<String>, Query, description = "Only letters that died before this time", format = DateTime),
    ),
    responses((status = 200, description = "A page", body = Page), NoQueue, Reads),
)]
async fn list(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let after = query.integer("after", 0..=OFFSET_MAX).unwrap_or(0);
    let limit = query.integer("limit", 1..=1_000).unwrap_or(100);
    let selection = selection(&mut query);
    query.finish()?;
    let filter = LetterFilter {
        selection,
        after: Offset(after),
        limit: u32::try_from(limit).unwrap_or(1),
    };
    let page = state.parts.queue.dead_letters(&name, filter).await?;
    let answer = Page {
        dead_letters: page.letters.into_iter().map(Summary::from).collect(),
        next_after: page.next_after.map(|offset| offset.0),
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

/// Read a dead letter: its message, and how its attempts failed.
#[utoipa::path(
    get, path = "/v1/queues/{queue}/dead-letters/{id}", tag = "dead letters", operation_id = "read_dead_letter",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("id" = String, Path, description = "The letter's id in the list", pattern = "^[1-9][0-9]{0,17}-[1-9][0-9]{0,17}$", example = "1-17"),
    ),
    responses((status = 200, description = "The dead letter", body = Letter), NoLetter, Reads),
)]
async fn read(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    Named(id): Named<LetterId>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let letter = state.parts.queue.dead_letter(&name, id).await?;
    let failures = letter.failures.into_iter().map(|failure| Failure {
        at: wire::time(failure.at.into()),
        reason: failure.reason,
    });
    let event = letter.copy.message.to_event_json();
    let event = String::from_utf8(event.into()).expect("an event is UTF-8");
    let answer = Letter {
        summary: letter.summary.into(),
        failures: failures.collect(),
        appended_at: wire::time(letter.copy.appended_at),
        // JSON was checked when it was published, and is not parsed into values here.
        event: RawValue::from_string(event).expect("an event is JSON"),
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

/// Delete a dead letter: its message counts as settled. Repeating it changes nothing.
#[utoipa::path(
    delete, path = "/v1/queues/{queue}/dead-letters/{id}", tag = "dead letters", operation_id = "remove_dead_letter",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("id" = String, Path, description = "The letter's id in the list", pattern = "^[1-9][0-9]{0,17}-[1-9][0-9]{0,17}$", example = "1-18"),
    ),
    responses((status = 204, description = "It does not exist"), NoQueue, LetterStays, Reads),
)]
async fn remove(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    Named(id): Named<LetterId>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    state.parts.queue.delete_dead_letter(&name, id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
