//! Single messages of a queue, for people: find them, see their state, settle them by hand.

use std::sync::Arc;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::streams::OFFSET_MAX;
use super::wire::{self, Event};
use crate::domain::cloudevents::{ID_MAX_BYTES, KEY_MAX_BYTES};
use crate::domain::id::Offset;
use crate::domain::message::Entry;
use crate::domain::name::{QueueName, Topic, TopicPattern};
use crate::domain::policy::REASON_MAX_BYTES;
use crate::http::extract::{Check, Json, MessageOffset, Named, Query};
use crate::http::openapi::{NoMessage, NoQueue, Reads, Writes};
use crate::http::problem::{Kind, Problem};
use crate::http::route::Routes;
use crate::http::state::State;
use crate::queue::{Act, Acted, MessageState, MessageStatus};
use crate::stream::Search;

/// Bytes of events of one page.
const PAGE_MAX_BYTES: usize = 4 * 1024 * 1024;

/// A message and its state in this queue.
#[derive(Serialize, ToSchema)]
#[schema(as = QueueMessage)]
struct WireMessage<'a> {
    #[schema(format = DateTime)]
    appended_at: Option<String>,
    /// The number of attempts, a current one included.
    attempts: u32,
    /// The consumer that holds the message, or held it last.
    consumer: Option<&'a str>,
    /// The id of its dead letter, also while the message has been redriven and is not settled; null if there is none.
    dead_letter: Option<String>,
    /// The time when its last delivery began.
    #[schema(format = DateTime)]
    delivered_at: Option<String>,
    /// The number of its last delivery; 0 before the first.
    delivery: u32,
    /// With `delayed`: the time when the message goes out.
    #[schema(format = DateTime)]
    due_at: Option<String>,
    /// The failures of its last attempts, at most five, oldest first. For a dead letter, attempts before a redrive are included.
    failures: Vec<WireFailure>,
    offset: i64,
    state: Standing,
    /// The topic; null when the stream no longer has the message.
    #[schema(value_type = Option<String>)]
    topic: Option<&'a Topic>,
    /// With `live`: the consumer holds the delivery until then.
    #[schema(format = DateTime)]
    visible_until: Option<String>,
    #[schema(value_type = Option<Event>)]
    event: Option<&'a RawValue>,
}

/// A message's state in a queue.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = MessageState)]
enum Standing {
    /// Never handed out, and may go out now or when the queue gets there.
    Fresh,
    /// Handed out before, and due again.
    Ready,
    /// Held back by an earlier message of its key.
    Waiting,
    /// Handed out, and held by a consumer.
    Live,
    /// Held back by time.
    Delayed,
    /// A dead letter.
    Dead,
    /// Acked, or deleted by a person.
    Settled,
    /// Retention's hard limit dropped it before it was settled.
    Lost,
    /// The queue does not take its topic.
    NotMatching,
    /// The queue began after it.
    BeforeStart,
}

impl Standing {
    /// None for a message that is not there.
    const fn of(state: MessageState) -> Option<Self> {
        Some(match state {
            MessageState::Fresh => Self::Fresh,
            MessageState::Ready => Self::Ready,
            MessageState::Waiting => Self::Waiting,
            MessageState::Live => Self::Live,
            MessageState::Delayed => Self::Delayed,
            MessageState::Dead => Self::Dead,
            MessageState::Settled => Self::Settled,
            MessageState::Lost => Self::Lost,
            MessageState::NotMatching => Self::NotMatching,
            MessageState::BeforeStart => Self::BeforeStart,
            MessageState::NotFound => return None,
        })
    }
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
#[derive(Serialize, ToSchema)]
#[schema(as = QueueMessages)]
struct WirePage<'a> {
    /// By offset. This can be empty before the end: a request looks at a bounded part of the stream.
    messages: Vec<WireMessage<'a>>,
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
    /// `already_settled` or `dead_lettered` when there was nothing left to do.
    result: ActResult,
    /// With `rejected`: the dead letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letter: Option<String>,
}

/// The result for a message that a person settles.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = MessageResult)]
enum ActResult {
    Deleted,
    Rejected,
    AlreadySettled,
    DeadLettered,
}

pub(super) fn routes() -> Routes {
    Routes::new()
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
    let messages = found.entries.iter().zip(&told);
    let answer = WirePage {
        messages: messages
            .filter_map(|(entry, told)| WireMessage::of(told, Some(entry)))
            .collect(),
        next_after: found.next.map(|next| next.0),
    };
    let body = wire::printed(&answer);
    share.shrink(body.len());
    Ok(wire::json_counted(body, share))
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
    let told = told.first();
    let answer = told.and_then(|told| WireMessage::of(told, entry));
    let answer = answer.ok_or_else(|| not_found(offset, MessageState::NotFound))?;
    Ok(wire::json(StatusCode::OK, &answer))
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
        Acted::Deleted => (ActResult::Deleted, None),
        Acted::Rejected { dead_letter } => (ActResult::Rejected, Some(dead_letter)),
        Acted::AlreadySettled => (ActResult::AlreadySettled, None),
        Acted::DeadLettered => (ActResult::DeadLettered, None),
        Acted::Not(state) => return Err(not_found(offset, state)),
    };
    let answer = WireActed {
        offset: offset.0,
        result,
        dead_letter,
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

impl<'a> WireMessage<'a> {
    /// None for a message that is not there.
    fn of(told: &'a MessageStatus, entry: Option<&'a Arc<Entry>>) -> Option<Self> {
        let failures = told.failures.iter().map(|failure| WireFailure {
            at: wire::time(failure.at.into()),
            reason: failure.reason.clone(),
        });
        Some(Self {
            offset: told.offset.0,
            topic: entry.map(|entry| &entry.topic),
            appended_at: entry.map(|entry| wire::time(entry.appended_at)),
            state: Standing::of(told.state)?,
            delivery: told.delivery,
            attempts: told.attempts,
            failures: failures.collect(),
            dead_letter: told.dead_letter.map(|id| id.to_string()),
            consumer: told.consumer.as_deref(),
            delivered_at: told.delivered_at.map(wire::time),
            visible_until: told.visible_until.map(wire::time),
            due_at: told.due_at.map(wire::time),
            event: entry.map(|entry| wire::raw(entry)),
        })
    }
}
