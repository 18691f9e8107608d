//! Queues: declare, describe, list, delete.

use axum::extract::State as Extract;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::retry::{Retry, RetryNow, RetrySchedule, Seconds, seconds};
use super::streams::{OFFSET_MAX, parse_time};
use super::wire;
use crate::domain::id::Offset;
use crate::domain::name::{QueueName, StreamName, Topic, TopicPattern};
use crate::domain::objects;
use crate::domain::policy::{
    DEAD_LETTER_RETENTION, MAX_ATTEMPTS, MAX_ATTEMPTS_MAX, MAX_IN_FLIGHT, Ordering, PATTERNS_MAX,
    RetryPolicy, Settings, Start, VISIBILITY_TIMEOUT,
};
use crate::http::extract::{Check, Json, Named, Query, parse_json};
use crate::http::forward;
use crate::http::openapi::{NoQueue, QueueConflicts, Reads, Writes};
use crate::http::problem::Problem;
use crate::http::route::Routes;
use crate::http::state::State;
use crate::queue::{self, BlockedBy, BlockedKey, Declared, Description, Status};

/// Longest delay and visibility timeout, in seconds: 12 h.
pub(super) const TWELVE_HOURS: f64 = 43_200.0;
/// Longest `dead_letter_retention_seconds`.
const TEN_YEARS: f64 = 315_360_000.0;
/// Longest `max_hold_seconds`: a week.
const WEEK: f64 = 604_800.0;

/// A queue's settings. A setting that is left out takes its default, even if it had another value before.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(
    as = QueueDeclaration,
    example = json!({"stream": "main", "topics": ["orders.*"], "start": "latest", "visibility_timeout_seconds": 30})
)]
struct Declaration {
    /// The stream that the queue reads; `main` by default. It cannot be changed.
    #[schema(
        min_length = 1,
        max_length = 100,
        pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$"
    )]
    stream: Option<String>,
    /// The topics that the queue matches; all by default. A change applies from the queue's current place in the stream.
    #[schema(min_items = 1, max_items = 100)]
    topics: Option<Vec<String>>,
    /// The place in the stream where the queue starts, fixed at its creation; `earliest` by default.
    start: Option<StartAt>,
    /// How long a delivery is held unless the receive says otherwise.
    #[schema(minimum = 1, maximum = 43200)]
    visibility_timeout_seconds: Option<f64>,
    /// The number of attempts before a message becomes a dead letter; 16 by default.
    #[schema(minimum = 1, maximum = 1000)]
    max_attempts: Option<i64>,
    /// The most live deliveries at a time; 10,000 by default.
    #[schema(minimum = 1, maximum = 10000)]
    max_in_flight: Option<i64>,
    /// How long one delivery can be held by extending it; unlimited by default.
    #[schema(minimum = 1, maximum = 604_800)]
    max_hold_seconds: Option<f64>,
    /// When to retry a message that failed.
    retry: Option<Retry>,
    /// How long dead letters are kept; 14 days by default.
    #[schema(minimum = 60, maximum = 315_360_000)]
    dead_letter_retention_seconds: Option<f64>,
    /// The topic that gets a copy of each dead letter, as an event with its own id and the attributes `postroadqueue`,
    /// `postroadcause` and others. By default no copy is published. The queue itself must not match the topic.
    #[schema(
        min_length = 1,
        max_length = 255,
        pattern = "^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$"
    )]
    dead_letter_topic: Option<String>,
    /// The order in which messages go out. `none`: as they become ready. `key`: at most one message per key is in flight at a time,
    /// and later ones wait for it, also through its retries; messages without a key wait for none.
    ordering: Option<OrderingName>,
    /// In order by key: after a dead letter its key waits until a person deletes or redrives the letter. By default the key goes on.
    hold_key: Option<bool>,
    /// In order by key: one receive may take several messages of a key. An ack of a later one is `blocked` while an
    /// earlier one is not settled.
    key_batches: Option<bool>,
    /// Serve three lanes, chosen by the attribute `priority`: of ten messages seven come from `high`, two from `normal` and one from `low`
    /// while all have some. Not together with order by key.
    priorities: Option<bool>,
}

#[derive(Debug, Clone, Copy, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum OrderingName {
    None,
    Key,
}

/// `earliest`, `latest`, an offset or a time.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(
    untagged,
    expecting = "it must be \"earliest\", \"latest\", {\"offset\": …} or {\"time\": …}"
)]
pub(super) enum StartAt {
    /// `earliest` or `latest`.
    Word(StartWord),
    /// The offset of the first message.
    Offset(#[serde(deserialize_with = "objects::read")] StartOffset),
    /// A time: start at the first message appended at or after it.
    Time(#[serde(deserialize_with = "objects::read")] StartTime),
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum StartWord {
    /// At the oldest message that the stream still has.
    Earliest,
    /// After the newest message.
    Latest,
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StartOffset {
    #[schema(minimum = 1, maximum = 9_007_199_254_740_991_i64)]
    offset: i64,
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StartTime {
    #[schema(format = DateTime)]
    time: String,
}

/// A queue, its settings and its numbers.
#[derive(Debug, Serialize, ToSchema)]
struct Queue {
    #[schema(example = "billing")]
    name: String,
    stream: String,
    topics: Vec<String>,
    start: StartAt,
    visibility_timeout_seconds: Seconds,
    max_attempts: u32,
    max_in_flight: u32,
    max_hold_seconds: Option<Seconds>,
    retry: RetryNow,
    dead_letter_retention_seconds: Seconds,
    dead_letter_topic: Option<String>,
    /// The delays that the retry policy leads to.
    retry_schedule: RetrySchedule,
    ordering: OrderingName,
    hold_key: bool,
    key_batches: bool,
    priorities: bool,
    /// The queue's generation: receipts of other generations are `gone`.
    generation: i64,
    /// The first offset that the queue can deliver.
    start_offset: i64,
    #[schema(format = DateTime)]
    created_at: String,
    /// True while a person has paused the queue.
    paused: bool,
    /// The queue's current numbers; null while its state is being recovered.
    status: Option<Numbers>,
    /// Set while the queue is not served because its log was restored without it; null otherwise.
    log_behind: Option<LogBehindNow>,
}

/// A log that lacks messages that its queue has seen, or has other messages in their place.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LogBehind)]
struct LogBehindNow {
    /// The queue has looked at every message up to here.
    through_offset: i64,
    /// The log's last offset when the queue's state was read.
    end_offset: i64,
}

/// A queue's numbers at one moment.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = QueueStatus)]
struct Numbers {
    /// The number of unsettled messages.
    depth: u64,
    /// Unsettled messages that are handed out and live.
    in_flight: u64,
    /// Unsettled messages that are held back by time.
    delayed: u64,
    /// Unsettled messages that are ready to go out.
    ready: u64,
    /// Unsettled messages that wait for an earlier message of their key.
    waiting: u64,
    /// Unsettled messages by lane; null without priorities.
    lanes: Option<Lanes>,
    /// The keys that have been blocked for longest, with the messages that wait; at most 20.
    blocked_keys: Vec<BlockedKeyNow>,
    /// The number of dead letters.
    dead_letters: u64,
    /// The number of receives that wait.
    waiters: u64,
    /// Every matching message up to this offset is settled.
    watermark: i64,
    /// The offset up to which the queue has looked at the stream.
    scanned_through: i64,
    /// The lowest unsettled offset.
    oldest_unsettled: Option<i64>,
    /// The time when that message was appended, if known.
    #[schema(format = DateTime)]
    oldest_unsettled_at: Option<String>,
    /// True if the queue starts beyond the stream's end, as far as this node knows: nothing is delivered until the stream gets there.
    ahead: bool,
    /// True while the queue stands still because the database cannot be reached.
    standing_still: bool,
}

/// Unsettled messages by lane.
#[derive(Debug, Serialize, ToSchema)]
struct Lanes {
    high: u64,
    normal: u64,
    low: u64,
}

/// A key whose messages wait.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BlockedKey)]
struct BlockedKeyNow {
    /// The key; null if the log has dropped the message that holds it back.
    key: Option<String>,
    /// The time since when it has been blocked, as far as known.
    #[schema(format = DateTime)]
    since: String,
    /// The number of its messages that wait.
    waiting: u64,
    by: BlockerNow,
}

/// The message that a key's other messages wait for.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Blocker)]
struct BlockerNow {
    offset: i64,
    /// The current or last attempt; null for a dead letter.
    attempt: Option<u32>,
    /// `live`: handed out. `delayed`: held back by time. `held`: a dead letter that waits for a person.
    state: BlockerState,
    /// The time when its delivery expires, or when it goes out again; null for a dead letter.
    #[schema(format = DateTime)]
    due_at: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum BlockerState {
    Live,
    Delayed,
    Held,
}

impl From<BlockedKey> for BlockedKeyNow {
    fn from(blocked: BlockedKey) -> Self {
        Self {
            key: blocked.key.as_deref().map(str::to_owned),
            since: wire::time(blocked.since),
            waiting: blocked.waiting,
            by: BlockerNow {
                offset: blocked.offset.0,
                attempt: blocked.attempt,
                state: match blocked.state {
                    BlockedBy::Live => BlockerState::Live,
                    BlockedBy::Delayed => BlockerState::Delayed,
                    BlockedBy::Held => BlockerState::Held,
                },
                due_at: blocked.due_at.map(wire::time),
            },
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct Queues {
    /// By name.
    queues: Vec<Queue>,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(routes!(declare, describe, delete))
}

impl StartAt {
    /// None with a fault.
    pub(super) fn checked(self, pointer: &str, check: &mut Check) -> Option<Start> {
        match self {
            Self::Word(StartWord::Earliest) => Some(Start::Earliest),
            Self::Word(StartWord::Latest) => Some(Start::Latest),
            Self::Offset(StartOffset { offset }) => Some(Start::Offset(Offset(check.integer(
                &format!("{pointer}/offset"),
                offset,
                1..=OFFSET_MAX,
            )))),
            Self::Time(StartTime { time }) => check
                .parsed(&format!("{pointer}/time"), &time, parse_time)
                .map(Start::Time),
        }
    }
}

impl From<Start> for StartAt {
    fn from(start: Start) -> Self {
        match start {
            Start::Earliest => Self::Word(StartWord::Earliest),
            Start::Latest => Self::Word(StartWord::Latest),
            Start::Offset(offset) => Self::Offset(StartOffset { offset: offset.0 }),
            Start::Time(time) => Self::Time(StartTime {
                time: wire::time(time),
            }),
        }
    }
}

impl From<Description> for Queue {
    fn from(queue: Description) -> Self {
        let queue::Declaration {
            stream,
            topics,
            start,
            settings,
        } = queue.declaration;
        Self {
            name: queue.name.to_string(),
            stream: stream.to_string(),
            topics: topics.iter().map(ToString::to_string).collect(),
            start: start.into(),
            visibility_timeout_seconds: seconds(settings.visibility_timeout),
            max_attempts: settings.max_attempts,
            max_in_flight: settings.max_in_flight,
            max_hold_seconds: settings.max_hold.map(seconds),
            retry_schedule: RetrySchedule::new(&settings.retry, settings.max_attempts),
            retry: settings.retry.into(),
            dead_letter_retention_seconds: seconds(settings.dead_letter_retention),
            dead_letter_topic: settings.dead_letter_topic.map(|topic| topic.to_string()),
            ordering: match settings.ordering {
                Ordering::None => OrderingName::None,
                Ordering::Key => OrderingName::Key,
            },
            hold_key: settings.hold_key,
            key_batches: settings.key_batches,
            priorities: settings.priorities,
            generation: queue.generation.0,
            start_offset: queue.start_offset.0,
            created_at: wire::time(queue.created_at),
            paused: queue.is_paused,
            status: queue.status.map(Numbers::from),
            log_behind: queue.log_behind.map(|behind| LogBehindNow {
                through_offset: behind.through.0,
                end_offset: behind.end.0,
            }),
        }
    }
}

impl From<Status> for Numbers {
    fn from(status: Status) -> Self {
        Self {
            depth: status.depth,
            in_flight: status.in_flight,
            delayed: status.delayed,
            ready: status.ready,
            waiting: status.waiting,
            lanes: status
                .lanes
                .map(|[low, normal, high]| Lanes { low, normal, high }),
            blocked_keys: status
                .blocked_keys
                .into_iter()
                .map(BlockedKeyNow::from)
                .collect(),
            dead_letters: status.dead_letters,
            waiters: status.waiters,
            watermark: status.watermark.0,
            scanned_through: status.scanned_through.0,
            oldest_unsettled: status.oldest_unsettled.map(|offset| offset.0),
            oldest_unsettled_at: status.oldest_unsettled_at.map(wire::time),
            ahead: status.ahead,
            standing_still: status.standing_still,
        }
    }
}

/// Reads a declaration from elsewhere than a request.
pub(in crate::http) fn read_declaration(body: &[u8]) -> Result<queue::Declaration, Problem> {
    parse_json::<Declaration>(body)?.checked()
}

impl Declaration {
    fn checked(self) -> Result<queue::Declaration, Problem> {
        let mut check = Check::default();
        let stream = self.stream.map_or_else(
            || Some(StreamName::main()),
            |text| check.parsed("/stream", &text, StreamName::parse),
        );
        let topics = self.topics.unwrap_or_else(|| vec![">".to_owned()]);
        if topics.is_empty() || topics.len() > PATTERNS_MAX {
            check.fault(
                "/topics",
                format!("`topics` must have 1 to {PATTERNS_MAX} patterns"),
            );
        }
        let topics: Vec<TopicPattern> = topics
            .iter()
            .take(PATTERNS_MAX)
            .enumerate()
            .filter_map(|(index, text)| {
                check.parsed(&format!("/topics/{index}"), text, TopicPattern::parse)
            })
            .collect();
        let start = match self.start {
            None => Some(Start::Earliest),
            Some(start) => start.checked("/start", &mut check),
        };
        let integer = |check: &mut Check, pointer: &str, value: Option<i64>, default: u32, max| {
            value.map_or(default, |value| {
                u32::try_from(check.integer(pointer, value, 1..=i64::from(max))).unwrap_or(default)
            })
        };
        let settings = Settings {
            visibility_timeout: self
                .visibility_timeout_seconds
                .map_or(VISIBILITY_TIMEOUT, |value| {
                    check.seconds("/visibility_timeout_seconds", value, 1.0..=TWELVE_HOURS)
                }),
            max_attempts: integer(
                &mut check,
                "/max_attempts",
                self.max_attempts,
                MAX_ATTEMPTS,
                MAX_ATTEMPTS_MAX,
            ),
            max_in_flight: integer(
                &mut check,
                "/max_in_flight",
                self.max_in_flight,
                MAX_IN_FLIGHT,
                MAX_IN_FLIGHT,
            ),
            max_hold: self
                .max_hold_seconds
                .map(|value| check.seconds("/max_hold_seconds", value, 1.0..=WEEK)),
            retry: self
                .retry
                .map_or_else(RetryPolicy::default, |retry| retry.checked(&mut check)),
            dead_letter_retention: self
                .dead_letter_retention_seconds
                .map_or(DEAD_LETTER_RETENTION, |value| {
                    check.seconds("/dead_letter_retention_seconds", value, 60.0..=TEN_YEARS)
                }),
            dead_letter_topic: self
                .dead_letter_topic
                .and_then(|text| check.parsed("/dead_letter_topic", &text, Topic::parse)),
            ordering: match self.ordering {
                None | Some(OrderingName::None) => Ordering::None,
                Some(OrderingName::Key) => Ordering::Key,
            },
            hold_key: self.hold_key.unwrap_or_default(),
            key_batches: self.key_batches.unwrap_or_default(),
            priorities: self.priorities.unwrap_or_default(),
        };
        check.finish()?;
        Ok(queue::Declaration {
            stream: stream.expect("a stream that does not parse is a fault"),
            topics,
            start: start.expect("a start that does not parse is a fault"),
            settings,
        })
    }
}

/// List the queues.
#[utoipa::path(
    get, path = "/v1/queues", tag = "queues", operation_id = "list_queues",
    responses((status = 200, description = "All queues", body = Queues), Reads),
)]
async fn list(
    Extract(state): Extract<State>,
    headers: HeaderMap,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let queues = state.parts.queue.list().await?;
    let queues: Vec<Queue> = queues.into_iter().map(Queue::from).collect();
    if !forward::has_others(&state, &headers) {
        return Ok(wire::json(StatusCode::OK, &Queues { queues }));
    }
    let own = queues.iter().map(serde_json::to_value);
    let own = own.collect::<Result<Vec<_>, _>>();
    let own = own.map_err(|error| Problem::internal(&error))?;
    let others = forward::ask_all(&state, "/v1/queues").await;
    let mut queues = forward::merge(own, others, "queues", |queue| queue["status"].is_null());
    queues.sort_by(|a, b| a["name"].as_str().cmp(&b["name"].as_str()));
    let queues = serde_json::json!({ "queues": queues });
    Ok(wire::json(StatusCode::OK, &queues))
}

/// Declare a queue: create it, or change its settings. It delivers every matching message that is published after the answer.
#[utoipa::path(
    put, path = "/v1/queues/{queue}", tag = "queues", operation_id = "declare_queue",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    request_body = Declaration,
    responses(
        (status = 200, description = "It existed, and now has these settings", body = Queue),
        (status = 201, description = "It has been created", body = Queue),
        QueueConflicts, Writes,
    ),
)]
async fn declare(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(declaration): Json<Declaration>,
) -> Result<Response, Problem> {
    query.finish()?;
    let declaration = declaration.checked()?;
    let (queue, declared) = state.parts.queue.declare(name, declaration).await?;
    let status = match declared {
        Declared::Created => StatusCode::CREATED,
        Declared::Unchanged | Declared::Changed => StatusCode::OK,
    };
    Ok(wire::json(status, &Queue::from(queue)))
}

/// Describe a queue and its numbers.
#[utoipa::path(
    get, path = "/v1/queues/{queue}", tag = "queues", operation_id = "describe_queue",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    responses((status = 200, description = "The queue", body = Queue), NoQueue, Reads),
)]
async fn describe(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let queue = state.parts.queue.describe(&name).await?;
    Ok(wire::json(StatusCode::OK, &Queue::from(queue)))
}

/// Delete a queue with its progress and its dead letters.
#[utoipa::path(
    delete, path = "/v1/queues/{queue}", tag = "queues", operation_id = "delete_queue",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "gone")),
    responses((status = 204, description = "Deleted"), NoQueue, Reads),
)]
async fn delete(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    state.parts.queue.delete(&name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
