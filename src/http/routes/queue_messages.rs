//! Single messages of a queue, for people: find them, see their state, settle them by hand.

use std::sync::Arc;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::streams::OFFSET_MAX;
use super::wire::{self, Event};
use crate::domain::cloudevents::{ID_MAX_BYTES, KEY_MAX_BYTES};
use crate::domain::id::Offset;
use crate::domain::message::Entry;
use crate::domain::name::{QueueName, TopicPattern};
use crate::domain::policy::REASON_MAX_BYTES;
use crate::http::extract::{Check, Json, MessageOffset, Named, Query};
use crate::http::openapi::{NoMessage, NoQueue, Reads, Writes};
use crate::http::problem::{Kind, Problem};
use crate::http::state::State;
use crate::queue::{Act, Acted, MessageState, MessageStatus};
use crate::stream::Search;

/// Bytes of events of one page.
const PAGE_MAX_BYTES: usize = 4 * 1024 * 1024;

/// A message and its state in this queue.
#[derive(ToSchema)]
#[schema(as = QueueMessage)]
#[expect(dead_code, reason = "describes what is printed by hand")]
struct WireMessage {
    offset: i64,
    /// The topic; null when the stream no longer has the message.
    topic: Option<String>,
    #[schema(format = DateTime)]
    appended_at: Option<String>,
    /// `fresh`, `ready`, `waiting`, `live`, `delayed`, `dead`, `settled`, `lost`, `not_matching`, `before_start`.
    state: String,
    /// The number of its last delivery; 0 before the first.
    delivery: u32,
    /// The number of attempts, a current one included.
    attempts: u32,
    /// The failures of its last attempts, at most five, oldest first. For a dead letter, attempts before a redrive are included.
    failures: Vec<WireFailure>,
    /// The id of its dead letter, also while the message has been redriven and is not settled; null if there is none.
    dead_letter: Option<String>,
    /// The consumer that holds the message, or held it last.
    consumer: Option<String>,
    /// The time when its last delivery began.
    #[schema(format = DateTime)]
    delivered_at: Option<String>,
    /// With `live`: the consumer holds the delivery until then.
    #[schema(format = DateTime)]
    visible_until: Option<String>,
    /// With `delayed`: the time when the message goes out.
    #[schema(format = DateTime)]
    due_at: Option<String>,
    event: Option<Event>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = AttemptFailure)]
struct WireFailure {
    #[schema(format = DateTime)]
    at: String,
    /// `timed_out`, or the consumer's reason.
    reason: String,
}

/// A page of messages.
#[derive(ToSchema)]
#[schema(as = QueueMessages)]
#[expect(dead_code, reason = "describes what is printed by hand")]
struct WirePage {
    /// By offset. This can be empty before the end: a request looks at a bounded part of the stream.
    messages: Vec<WireMessage>,
    /// Pass this as `after` to continue the search; null at the end of the stream.
    next_after: Option<i64>,
}

/// The reason why the message is rejected.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RejectMessage, example = json!({"reason": "blocks its key"}))]
struct RejectBody {
    /// The reason, kept with the dead letter; `rejected` by default.
    #[schema(min_length = 1, max_length = 1024)]
    reason: Option<String>,
}

/// The result for one message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MessageOutcome)]
struct WireActed {
    offset: i64,
    /// `deleted` or `rejected`; `already_settled` or `dead_lettered` when there was nothing left to do.
    result: &'static str,
    /// With `rejected`: the dead letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letter: Option<String>,
}

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new()
        .routes(routes!(search))
        .routes(routes!(find, delete))
        .routes(routes!(reject))
}

fn not_found(offset: Offset, state: MessageState) -> Problem {
    let why = match state {
        MessageState::NotMatching => "has a topic that the queue does not match",
        MessageState::BeforeStart => "comes before the offset where the queue began",
        MessageState::Lost => "was dropped by the stream's retention before it was settled",
        _ => "is not in the queue's stream, or is no longer there",
    };
    let detail = format!("the message at offset {offset} {why}");
    Problem::new(Kind::QueueMessageNotFound, detail)
}

/// Find messages that match the queue's topics, and show the state of each. A request looks at a bounded part of the stream:
/// continue with `next_after` until it is null.
#[utoipa::path(
    get, path = "/v1/queues/{queue}/messages", tag = "queues", operation_id = "search_messages",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("key" = Option<String>, Query, description = "Only messages with this ordering key", min_length = 1, max_length = 512),
        ("topic" = Option<String>, Query, description = "Only messages whose topic matches this pattern", min_length = 1, max_length = 255),
        ("id" = Option<String>, Query, description = "Only messages with this CloudEvents id", min_length = 1, max_length = 1024),
        ("after" = Option<i64>, Query, description = "Only messages after this offset; by default from the queue's start",
            minimum = 0, maximum = 9_007_199_254_740_991_i64),
        ("max_messages" = Option<i64>, Query, description = "At most this many; 20 by default", minimum = 1, maximum = 100),
    ),
    responses((status = 200, description = "A page", body = WirePage), NoQueue, Reads),
)]
async fn search(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let mut text = |field: &'static str, most: usize| {
        let text = query.text(field)?;
        if text.is_empty() || text.len() > most {
            let detail = format!("`{field}` must be 1 to {most} bytes long");
            query.fault(field, detail, None);
        }
        Some(text)
    };
    let (key, id) = (text("key", KEY_MAX_BYTES), text("id", ID_MAX_BYTES));
    let topic = query.parsed("topic", TopicPattern::parse);
    let after = query.integer("after", 0..=OFFSET_MAX);
    let most = query.integer("max_messages", 1..=100).unwrap_or(20);
    query.finish()?;
    let mut share = state.answers.hold(PAGE_MAX_BYTES).await?;
    let queue = state.parts.queue.describe(&name).await?;
    let begin = queue.start_offset.0 - 1;
    let found = state
        .parts
        .stream
        .search(Search {
            stream: queue.stream_id,
            after: Offset(after.unwrap_or(begin)),
            topics: queue.declaration.topics,
            topic,
            key,
            id,
            max_messages: usize::try_from(most).unwrap_or(1),
            max_bytes: PAGE_MAX_BYTES,
        })
        .await?;
    let asked = found.entries.iter();
    let asked = asked.map(|entry| (entry.offset, Some(entry.topic.clone())));
    let told = state.parts.queue.inspect(&name, asked.collect()).await?;
    let mut out = b"{\"messages\":[".to_vec();
    for (number, (entry, told)) in found.entries.iter().zip(&told).enumerate() {
        if number > 0 {
            out.push(b',');
        }
        print(&mut out, told, Some(entry));
    }
    out.extend_from_slice(b"],\"next_after\":");
    wire::put(&mut out, &found.next.map(|next| next.0));
    out.push(b'}');
    share.shrink(out.len());
    Ok(wire::json_counted(out, share))
}

/// Describe one message and its state in this queue.
#[utoipa::path(
    get, path = "/v1/queues/{queue}/messages/{offset}", tag = "queues", operation_id = "find_message",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("offset" = i64, Path, minimum = 1, maximum = 9_007_199_254_740_991_i64, example = 1),
    ),
    responses((status = 200, description = "The message", body = WireMessage), NoMessage, Reads),
)]
async fn find(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    Named(MessageOffset(offset)): Named<MessageOffset>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let queue = state.parts.queue.describe(&name).await?;
    let entries = state
        .parts
        .stream
        .fetch(queue.stream_id, vec![offset])
        .await?;
    let entry = entries.first();
    let topic = entry.map(|entry| entry.topic.clone());
    let told = state
        .parts
        .queue
        .inspect(&name, vec![(offset, topic)])
        .await?;
    match told.first() {
        Some(told) if told.state != MessageState::NotFound => {
            let mut out = Vec::new();
            print(&mut out, told, entry);
            Ok(wire::json_bytes(StatusCode::OK, out.into()))
        }
        _ => Err(not_found(offset, MessageState::NotFound)),
    }
}

/// Delete a message from this queue, even while a consumer holds it. Other queues of the stream keep it. Dead letters have their
/// own request for this, by id. Repeating it is safe.
#[utoipa::path(
    delete, path = "/v1/queues/{queue}/messages/{offset}", tag = "queues", operation_id = "delete_message",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("offset" = i64, Path, minimum = 1, maximum = 9_007_199_254_740_991_i64, example = 1),
    ),
    responses((status = 200, description = "The result", body = WireActed), NoMessage, Writes),
)]
async fn delete(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    Named(MessageOffset(offset)): Named<MessageOffset>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    act(&state, &name, offset, Act::Delete).await
}

/// Make a message a dead letter, even while a consumer holds it. Use it for a message that blocks its key. Repeating it is safe.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/messages/{offset}/reject", tag = "queues", operation_id = "reject_message",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("offset" = i64, Path, minimum = 1, maximum = 9_007_199_254_740_991_i64, example = 1),
    ),
    request_body = RejectBody,
    responses((status = 200, description = "The result", body = WireActed), NoMessage, Writes),
)]
async fn reject(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    Named(MessageOffset(offset)): Named<MessageOffset>,
    query: Query,
    Json(body): Json<RejectBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let mut check = Check::default();
    if let Some(reason) = &body.reason {
        check.text("/reason", reason, REASON_MAX_BYTES);
    }
    check.finish()?;
    let reason = body.reason;
    act(&state, &name, offset, Act::Reject { reason }).await
}

async fn act(
    state: &State,
    name: &QueueName,
    offset: Offset,
    act: Act,
) -> Result<Response, Problem> {
    let (result, dead_letter) = match state.parts.queue.act(name, offset, act).await? {
        Acted::Deleted => ("deleted", None),
        Acted::Rejected { dead_letter } => ("rejected", Some(dead_letter)),
        Acted::AlreadySettled => ("already_settled", None),
        Acted::DeadLettered => ("dead_lettered", None),
        Acted::Not(state) => return Err(not_found(offset, state)),
    };
    let answer = WireActed {
        offset: offset.0,
        result,
        dead_letter,
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

/// The event is spliced in as it is.
fn print(out: &mut Vec<u8>, told: &MessageStatus, entry: Option<&Arc<Entry>>) {
    let failures: Vec<WireFailure> = told
        .failures
        .iter()
        .map(|failure| WireFailure {
            at: wire::time(failure.at.into()),
            reason: failure.reason.clone(),
        })
        .collect();
    let head = serde_json::json!({
        "offset": told.offset.0,
        "topic": entry.map(|entry| entry.topic.as_str()),
        "appended_at": entry.map(|entry| wire::time(entry.appended_at)),
        "state": told.state,
        "delivery": told.delivery,
        "attempts": told.attempts,
        "failures": failures,
        "dead_letter": told.dead_letter.map(|id| id.to_string()),
        "consumer": told.consumer,
        "delivered_at": told.delivered_at.map(wire::time),
        "visible_until": told.visible_until.map(wire::time),
        "due_at": told.due_at.map(wire::time),
    });
    wire::put(out, &head);
    out.pop();
    out.extend_from_slice(b",\"event\":");
    match entry {
        Some(entry) => out.extend_from_slice(&entry.event),
        None => out.extend_from_slice(b"null"),
    }
    out.push(b'}');
}
