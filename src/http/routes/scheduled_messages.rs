//! Scheduled messages that wait to enter their stream: list, describe, cancel.

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::streams::parse_time;
use super::wire::{self, Event};
use crate::domain::id::ScheduledId;
use crate::domain::name::{StreamName, TopicPattern};
use crate::http::extract::{Named, PathPart, Query};
use crate::http::openapi::{CancelsScheduled, NoScheduled, NoStream, Reads};
use crate::http::problem::{Kind, Problem};
use crate::http::route::Routes;
use crate::http::state::State;
use crate::stream::{Cancelled, ScheduledQuery, ScheduledStatus, Waiting};

/// A message that waits, without its payload.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = WaitingMessage)]
struct WaitingView {
    /// The id under which it can be read and cancelled.
    #[schema(example = "1-1764000000000000-17")]
    id: String,
    /// The stream that it will enter; null when the stream was deleted just now.
    #[schema(example = "main")]
    stream: Option<String>,
    #[schema(example = "orders.reminder")]
    topic: String,
    /// The time when it enters its stream.
    #[schema(format = DateTime)]
    due_at: String,
    #[schema(format = DateTime)]
    accepted_at: String,
    /// The ordering key.
    key: Option<String>,
    /// The event's id.
    event_id: String,
    /// The event's source.
    event_source: String,
    /// The event's type.
    event_type: String,
    /// The size of its payload in bytes.
    data_bytes: u64,
}

/// Messages that wait, in the order in which they are due.
#[derive(Debug, Serialize, ToSchema)]
struct WaitingMessages {
    messages: Vec<WaitingView>,
    /// Pass this as `after` to get the next page; null at the end. A page can be empty although more follows: a request looks at
    /// 20,000 messages at most.
    next_after: Option<String>,
}

/// A scheduled message and its state.
#[derive(Debug, Serialize, ToSchema)]
struct ScheduledMessage {
    #[schema(example = "1-1764000000000000-17")]
    id: String,
    stream: Option<String>,
    #[schema(example = "orders.reminder")]
    topic: String,
    #[schema(format = DateTime)]
    due_at: String,
    #[schema(format = DateTime)]
    accepted_at: String,
    status: Status,
    /// Its offset in the stream, once it is published.
    #[schema(minimum = 1)]
    offset: Option<i64>,
    /// The time when it was cancelled, if it was.
    #[schema(format = DateTime)]
    cancelled_at: Option<String>,
    #[schema(value_type = Event)]
    event: Box<RawValue>,
}

/// A scheduled message's status.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ScheduledStatus)]
enum Status {
    Scheduled,
    Published,
    Cancelled,
}

/// A scheduled message's name. Any other text names none.
#[derive(Debug)]
struct Id(Option<ScheduledId>);

impl PathPart for Id {
    const PARAMETER: &'static str = "id";

    fn parse(text: &str) -> Result<Self, String> {
        Ok(Self(ScheduledId::parse(text)))
    }
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(routes!(describe, cancel))
}

fn not_found() -> Problem {
    Problem::new(
        Kind::ScheduledMessageNotFound,
        "there is no scheduled message with this id, or it was forgotten: published and cancelled ones are kept for a day after they \
         were due",
    )
}

/// List scheduled messages that wait to enter their streams, by due time.
#[utoipa::path(
    get, path = "/v1/scheduled-messages", tag = "scheduled messages", operation_id = "list_scheduled_messages",
    params(
        ("stream" = Option<String>, Query, description = "Only messages of this stream", min_length = 1, max_length = 100,
            pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$"),
        ("topic" = Option<String>, Query, description = "Only messages whose topic matches this pattern"),
        ("key" = Option<String>, Query, description = "Only messages with this ordering key", min_length = 1, max_length = 512),
        ("due_from" = Option<String>, Query, description = "Only messages due at or after this time", format = DateTime),
        ("due_until" = Option<String>, Query, description = "Only messages due before this time", format = DateTime),
        ("after" = Option<String>, Query, description = "`next_after` of the previous page", max_length = 100),
        ("max_messages" = Option<i64>, Query, description = "At most this many; 100 by default", minimum = 1, maximum = 1000),
    ),
    responses((status = 200, description = "A page", body = WaitingMessages), NoStream, Reads),
)]
async fn list(Extract(state): Extract<State>, mut query: Query) -> Result<Response, Problem> {
    let stream = query.parsed("stream", StreamName::parse);
    let asked = ScheduledQuery {
        stream: None,
        topic: query.parsed("topic", TopicPattern::parse),
        key: query.key(),
        due_from: query.parsed("due_from", parse_time),
        due_until: query.parsed("due_until", parse_time),
        after: query.parsed("after", |text| {
            ScheduledId::parse(text).ok_or("is not the `next_after` of a page")
        }),
        max_messages: usize::try_from(query.integer("max_messages", 1..=1_000).unwrap_or(100))
            .unwrap_or(100),
    };
    query.finish()?;
    let engine = &state.parts.stream;
    let asked = ScheduledQuery {
        stream: match stream {
            Some(name) => Some(engine.find(&name).await?.id),
            None => None,
        },
        ..asked
    };
    let page = engine.list_scheduled(asked).await?;
    let streams = page.messages.iter().map(|waiting| waiting.row.id.stream);
    let names = state.stream_names(streams).await?;
    let view = |waiting: Waiting| WaitingView {
        id: waiting.row.id.to_string(),
        stream: names.get(&waiting.row.id.stream).map(ToString::to_string),
        due_at: wire::time(waiting.row.id.due_at),
        accepted_at: wire::time(waiting.row.accepted_at),
        key: waiting.row.key,
        event_id: waiting.row.event_id,
        event_source: waiting.row.source,
        event_type: waiting
            .row
            .kind
            .unwrap_or_else(|| waiting.topic.to_string()),
        data_bytes: waiting.row.data_bytes,
        topic: waiting.topic.to_string(),
    };
    let answer = WaitingMessages {
        messages: page.messages.into_iter().map(view).collect(),
        next_after: page.next.map(|next| next.to_string()),
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

/// Describe a scheduled message and its state. Published and cancelled ones are kept for a day after their due time.
#[utoipa::path(
    get, path = "/v1/scheduled-messages/{id}", tag = "scheduled messages", operation_id = "describe_scheduled_message",
    params(("id" = String, Path, min_length = 1, max_length = 100, example = "1-1764000000000000-17")),
    responses((status = 200, description = "The message", body = ScheduledMessage), NoScheduled, Reads),
)]
async fn describe(
    Extract(state): Extract<State>,
    Named(Id(id)): Named<Id>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let id = id.ok_or_else(not_found)?;
    let found = state.parts.stream.find_scheduled(id).await?;
    let found = found.ok_or_else(not_found)?;
    let names = state.stream_names(std::iter::once(id.stream)).await?;
    let (status, offset, cancelled_at) = match found.status {
        ScheduledStatus::Scheduled => (Status::Scheduled, None, None),
        ScheduledStatus::Published { offset } => (Status::Published, Some(offset.0), None),
        ScheduledStatus::Cancelled { at } => (Status::Cancelled, None, Some(wire::time(at))),
    };
    let event = String::from_utf8_lossy(&found.entry.event).into_owned();
    let answer = ScheduledMessage {
        id: id.to_string(),
        stream: names.get(&id.stream).map(ToString::to_string),
        topic: found.entry.topic.to_string(),
        due_at: wire::time(id.due_at),
        accepted_at: wire::time(found.accepted_at),
        status,
        offset,
        cancelled_at,
        event: RawValue::from_string(event).expect("an event is printed as JSON"),
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

/// Cancel a scheduled message, so that it never enters its stream. Its id stays taken for 24 hours after it was accepted. If the
/// message has been published, the answer is 409 with its `offset`. Safe to repeat.
#[utoipa::path(
    delete, path = "/v1/scheduled-messages/{id}", tag = "scheduled messages", operation_id = "cancel_scheduled_message",
    params(("id" = String, Path, min_length = 1, max_length = 100, example = "1-1764000000000000-17")),
    responses((status = 204, description = "The message is cancelled, by this request or an earlier one"), NoScheduled, CancelsScheduled, Reads),
)]
async fn cancel(
    Extract(state): Extract<State>,
    Named(Id(id)): Named<Id>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let id = id.ok_or_else(not_found)?;
    match state.parts.stream.cancel_scheduled(id).await? {
        Cancelled::Cancelled => Ok(StatusCode::NO_CONTENT.into_response()),
        Cancelled::Unknown => Err(not_found()),
        Cancelled::AlreadyPublished { offset } => {
            let names = state.stream_names(std::iter::once(id.stream)).await;
            let names = names.unwrap_or_default();
            let stream = names.get(&id.stream).map(ToString::to_string);
            let detail = format!("the message is already in its stream, at offset {offset}");
            Err(Problem::new(Kind::AlreadyPublished, detail)
                .with("offset", offset.0)
                .with("stream", stream))
        }
    }
}
