//! Publishing: to one topic, with CloudEvents in structured, binary and batch mode, or a plain body; to several at once,
//! with items that each name their topic.

use std::cell::RefCell;

use axum::extract::{FromRequest as _, Request, State as Extract};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{topics, wire};
use crate::domain::cloudevents::{self, Fault, Mode, Parsed};
use crate::domain::message::{DELIVER_AHEAD_MAX, DELIVER_AT, Message};
use crate::domain::name::Topic;
use crate::http::extract::{Named, Query, Whole, require_json};
use crate::http::openapi::Publishes;
use crate::http::problem::{FieldError, Kind, Place, Problem};
use crate::http::route::{Routes, route};
use crate::http::state::{LARGE_BYTES, State};
use crate::stream::{self, Member};

/// The namespace of ids that `Idempotency-Key` derives.
const IDEMPOTENCY: Uuid = Uuid::from_u128(0x9d6f_5b0e_31a4_5c8e_8f57_2c1a_6b0d_44e7);
/// The longest `Idempotency-Key`, in bytes.
const IDEMPOTENCY_KEY_MAX_BYTES: usize = 255;

/// A CloudEvent to publish. The broker fills in missing attributes: it makes an `id`, `source` is `/postroad/http`, and `type` is the
/// topic. Other members are extension attributes: names of a-z and 0-9, at most 20 long; strings, booleans, integers.
/// Length limits count bytes of UTF-8, so text with non-ASCII characters reaches them sooner.
#[derive(Deserialize, ToSchema)]
#[schema(
    as = PublishEvent,
    example = json!({"specversion": "1.0", "id": "order-7", "source": "/shop", "type": "orders.created",
        "partitionkey": "sku-1", "data": {"order": 7}})
)]
#[expect(dead_code, reason = "describes what domain::cloudevents reads")]
struct NewEvent {
    /// Always `1.0`.
    #[schema(pattern = "^1\\.0$")]
    specversion: String,
    /// The event's id, unique together with `source`.
    #[schema(
        min_length = 1,
        max_length = 1024,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    id: Option<String>,
    /// The context in which the event happened.
    #[schema(
        min_length = 1,
        max_length = 1024,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    source: Option<String>,
    /// The type of event.
    #[schema(
        rename = "type",
        min_length = 1,
        max_length = 1024,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    kind: Option<String>,
    /// The subject of the event within its source.
    #[schema(
        min_length = 1,
        max_length = 1024,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    subject: Option<String>,
    /// The time when the event happened.
    #[schema(value_type = Option<String>, format = DateTime, pattern = "^[0-9]{4}-[0-9]{2}-[0-9]{2}T")]
    time: Option<String>,
    /// The payload's media type; JSON by default.
    #[schema(
        min_length = 1,
        max_length = 1024,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    datacontenttype: Option<String>,
    /// The URI of the payload's schema.
    #[schema(
        min_length = 1,
        max_length = 1024,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    dataschema: Option<String>,
    /// The ordering key.
    #[schema(
        min_length = 1,
        max_length = 512,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    partitionkey: Option<String>,
    /// If the topic belongs to a keyed stream: how many messages the key must have had there; 409 otherwise. Not kept as part of the
    /// event.
    #[schema(minimum = 0, maximum = 9_007_199_254_740_991_i64)]
    expectedversion: Option<i64>,
    /// The time when the message enters its stream, at most a year ahead. A time in the past means at once.
    #[schema(value_type = Option<String>, format = DateTime, pattern = "^[0-9]{4}-[0-9]{2}-[0-9]{2}T")]
    deliverat: Option<String>,
    /// The payload, JSON or text by `datacontenttype`. The broker passes it on as the text it is.
    data: Option<serde_json::Value>,
}

/// Messages to publish together.
#[derive(ToSchema)]
#[schema(as = PublishMessages)]
#[expect(dead_code, reason = "describes what domain::cloudevents reads")]
struct NewMessages {
    /// Messages with their topics. They get their offsets in this order.
    #[schema(max_items = 1000)]
    messages: Vec<NewItem>,
}

/// One message of a request: an event, or a payload that becomes one.
#[derive(Deserialize, ToSchema)]
#[schema(as = PublishItem)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes what domain::cloudevents reads")]
enum NewItem {
    Event(EventItem),
    Plain(PlainItem),
}

/// A CloudEvent and its topic.
#[derive(Deserialize, ToSchema)]
#[schema(as = PublishEventItem)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "describes what domain::cloudevents reads")]
struct EventItem {
    /// The topic to publish to.
    #[schema(
        min_length = 1,
        max_length = 255,
        pattern = "^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$",
        example = "orders.created"
    )]
    topic: String,
    /// The event.
    event: NewEvent,
}

/// A payload and its topic.
#[derive(Deserialize, ToSchema)]
#[schema(as = PublishPlainItem)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "describes what domain::cloudevents reads")]
struct PlainItem {
    /// The topic to publish to.
    #[schema(
        min_length = 1,
        max_length = 255,
        pattern = "^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$",
        example = "orders.created"
    )]
    topic: String,
    /// The payload, any JSON; the broker passes it on as the text it is. Without it the message has no payload, which differs from `null`.
    #[schema(required = false)]
    data: serde_json::Value,
    /// The ordering key.
    #[schema(
        min_length = 1,
        max_length = 512,
        required = false,
        nullable = false,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    key: Option<String>,
    /// If the topic belongs to a keyed stream: how many messages the key must have had there; 409 otherwise.
    #[schema(
        minimum = 0,
        maximum = 9_007_199_254_740_991_i64,
        required = false,
        nullable = false
    )]
    expected_version: Option<i64>,
    /// The time when the message enters its stream, at most a year ahead. A time in the past means at once.
    #[schema(
        value_type = String,
        format = DateTime,
        required = false,
        nullable = false,
        pattern = "^[0-9]{4}-[0-9]{2}-[0-9]{2}T"
    )]
    deliver_at: Option<String>,
    /// The message's id; the broker makes one if there is none.
    #[schema(
        min_length = 1,
        max_length = 1024,
        required = false,
        nullable = false,
        pattern = "^[^\\u0000-\\u001F\\u007F-\\u009F]+$"
    )]
    id: Option<String>,
}

/// The published messages, in the order of the request.
#[derive(Debug, Serialize, ToSchema)]
struct Published {
    messages: Vec<PublishedMessage>,
}

/// One published message.
#[derive(Debug, Serialize, ToSchema)]
struct PublishedMessage {
    /// The message's id: the producer's, or the one that the broker made.
    id: String,
    /// The stream that owns the topic; null when it was deleted just now.
    #[schema(example = "main")]
    stream: Option<String>,
    /// The message's offset in the stream; for a duplicate, the first one's. Null for a scheduled message.
    #[schema(minimum = 1)]
    offset: Option<i64>,
    /// True if an earlier message with this source and id was the same one.
    duplicate: bool,
    /// For a scheduled message: its id until it is published. For a duplicate, the first one's.
    scheduled: Option<ScheduledFor>,
}

/// A message that enters its stream later.
#[derive(Debug, Serialize, ToSchema)]
struct ScheduledFor {
    /// The id under which the message can be read and cancelled: see `/v1/scheduled-messages`.
    #[schema(example = "1-1764000000000000-17")]
    id: String,
    /// The time when the message enters its stream.
    #[schema(format = DateTime)]
    due_at: String,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(publish))
        .routes(route(routes!(publish_together)).needs_body())
}

/// Publish messages to a topic.
///
/// In binary mode the attributes come from `ce-` headers and the payload is the body. A body without such headers is a payload, too:
/// JSON unless `Content-Type` says otherwise. All or nothing: one fault refuses the whole request. Messages are deduplicated by
/// source and id for 24 hours.
#[utoipa::path(
    post, path = "/v1/topics/{topic}/messages", tag = "publish",
    params(
        ("topic" = String, Path, description = "Tokens of A-Z a-z 0-9 _ -, separated by dots",
            min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$", example = "orders.created"),
        ("Idempotency-Key" = Option<String>, Header,
            description = "Gives ids to messages that have none. Repeating the same request yields duplicates; another request with the same key: 409",
            min_length = 1, max_length = 255, pattern = "^[!-~]+$"),
    ),
    request_body(content(
        (NewEvent = "application/cloudevents+json"),
        (Vec<NewEvent> = "application/cloudevents-batch+json"),
        (serde_json::Value = "application/json"),
        (String = "text/plain"),
    )),
    responses((status = 200, description = "The messages are published and durable", body = Published), Publishes),
)]
async fn publish(
    Extract(state): Extract<State>,
    Named(topic): Named<Topic>,
    query: Query,
    request: Request,
) -> Result<Response, Problem> {
    query.finish()?;
    let headers = request.headers().clone();
    let key = idempotency_key(&headers)?;
    let Whole(body) = Whole::from_request(request, &state).await?;
    let (parsed, as_one) = match body.len() <= LARGE_BYTES {
        true => parse_to(&state, &topic, &headers, key.as_deref(), body)?,
        false => {
            let (known, headers) = (state.clone(), headers.clone());
            let parse = move || parse_to(&known, &topic, &headers, key.as_deref(), body);
            Box::pin(state.beside(parse)).await?
        }
    };
    let Parsed { mode, messages } = parsed;
    check_due(&state, &messages, |index| match mode {
        Mode::Batch => Place::Pointer(format!("/{index}/{DELIVER_AT}")),
        Mode::Structured => Place::Pointer(format!("/{DELIVER_AT}")),
        Mode::Binary => Place::Header(format!("ce-{DELIVER_AT}")),
    })?;
    let published = append(&state, messages, as_one, |index| match mode {
        Mode::Batch => format!("/{index}"),
        Mode::Structured | Mode::Binary => String::new(),
    });
    Ok(wire::json(StatusCode::OK, &published.await?))
}

/// Publish messages to several topics.
///
/// The messages can go to any number of topics and streams: all or nothing, in one commit. One fault refuses the whole request, and
/// `errors` names the items. Messages are deduplicated by source and id for 24 hours, as in all publishing; with `Idempotency-Key`,
/// also messages without an id.
#[utoipa::path(
    post, path = "/v1/messages", tag = "publish",
    params(
        ("Idempotency-Key" = Option<String>, Header,
            description = "Gives ids to messages that have none. Repeating the same request yields duplicates; another request with the same key: 409",
            min_length = 1, max_length = 255, pattern = "^[!-~]+$"),
    ),
    request_body(content = NewMessages, example = json!({"messages": [
        {"topic": "orders.created", "key": "customer-7", "data": {"order": 1}},
        {"topic": "audit.orders", "event": {"specversion": "1.0", "id": "a-1", "source": "/shop", "type": "audit", "data": "order 1"}},
    ]})),
    responses((status = 200, description = "The messages are published and durable", body = Published), Publishes),
)]
async fn publish_together(
    Extract(state): Extract<State>,
    query: Query,
    request: Request,
) -> Result<Response, Problem> {
    query.finish()?;
    let headers = request.headers().clone();
    let key = idempotency_key(&headers)?;
    require_json(&headers)?;
    let Whole(body) = Whole::from_request(request, &state).await?;
    let (messages, as_one) = match body.len() <= LARGE_BYTES {
        true => parse_items(&state, &headers, key.as_deref(), body)?,
        false => {
            let known = state.clone();
            let parse = move || parse_items(&known, &headers, key.as_deref(), body);
            Box::pin(state.beside(parse)).await?
        }
    };
    check_due(&state, &messages, |index| {
        Place::Pointer(format!("/messages/{index}"))
    })?;
    let published = append(&state, messages, as_one, |index| {
        format!("/messages/{index}")
    });
    Ok(wire::json(StatusCode::OK, &published.await?))
}

/// Reads messages to one topic. With the places of those whose ids stand for the `Idempotency-Key`.
fn parse_to(
    state: &State,
    topic: &Topic,
    headers: &HeaderMap,
    key: Option<&str>,
    body: Bytes,
) -> Result<(Parsed, Vec<usize>), Problem> {
    let ids = Ids::new(topic.as_str(), key);
    let context = cloudevents::Context {
        topic,
        limits: state.options.publish,
        new_id: &|number| ids.make(number),
    };
    let parsed = cloudevents::parse(&incoming(headers, body)?, &context).map_err(refused)?;
    Ok((parsed, ids.derived()))
}

/// The same for messages that each name their topic.
fn parse_items(
    state: &State,
    headers: &HeaderMap,
    key: Option<&str>,
    body: Bytes,
) -> Result<(Vec<Message>, Vec<usize>), Problem> {
    // No topic is empty, so these ids are none of those that a topic's own path makes.
    let ids = Ids::new("", key);
    let new_id = |number| ids.make(number);
    let request = incoming(headers, body)?;
    let messages = cloudevents::parse_items(&request, state.options.publish, &new_id);
    Ok((messages.map_err(refused)?, ids.derived()))
}

/// Makes the ids of a request's messages that come without one.
struct Ids<'k> {
    scope: &'k str,
    key: Option<&'k str>,
    derived: RefCell<Vec<usize>>,
}

impl<'k> Ids<'k> {
    /// For requests of one scope; with an `Idempotency-Key`, the same ids again for the same places.
    const fn new(scope: &'k str, key: Option<&'k str>) -> Self {
        Self {
            scope,
            key,
            derived: RefCell::new(Vec::new()),
        }
    }

    fn make(&self, number: usize) -> String {
        let Some(key) = self.key else {
            return Uuid::now_v7().to_string();
        };
        self.derived.borrow_mut().push(number);
        let name = format!("{}\n{number}\n{key}", self.scope);
        Uuid::new_v5(&IDEMPOTENCY, name.as_bytes()).to_string()
    }

    /// The places of the messages whose ids stand for the key.
    fn derived(self) -> Vec<usize> {
        self.derived.into_inner()
    }
}

/// The request as the domain reads it.
fn incoming(headers: &HeaderMap, body: Bytes) -> Result<cloudevents::Request<'_>, Problem> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    Ok(cloudevents::Request {
        content_type: content_type(headers)?,
        attributes: headers
            .iter()
            .filter_map(|(name, value)| {
                Some((name.as_str().strip_prefix("ce-")?, value.as_bytes()))
            })
            .collect(),
        traceparent: text("traceparent"),
        tracestate: text("tracestate"),
        body,
    })
}

/// Appends the messages; `place` is the JSON pointer of each, for faults.
async fn append(
    state: &State,
    messages: Vec<Message>,
    as_one: Vec<usize>,
    place: impl Fn(usize) -> String,
) -> Result<Published, Problem> {
    if messages.is_empty() {
        return Ok(Published {
            messages: Vec::new(),
        });
    }
    topics::admit(&state.parts.topics, &messages, &place).await?;
    let ids: Vec<String> = messages.iter().map(|message| message.id.clone()).collect();
    let member = Member::Publish {
        messages,
        check_ids: true,
        as_one,
    };
    let placed = state.parts.stream.append(member).await;
    let placed = placed.map_err(|error| wire::append_problem(&error, place))?;
    // The messages are published: that their stream's name cannot be read now must not look as if they were not.
    let names = state
        .stream_names(placed.iter().map(|placed| placed.stream))
        .await
        .unwrap_or_default();
    let messages = ids.into_iter().zip(placed);
    Ok(Published {
        messages: messages
            .map(|(id, placed): (String, stream::Placed)| PublishedMessage {
                id,
                stream: names.get(&placed.stream).map(ToString::to_string),
                offset: placed.scheduled.is_none().then_some(placed.offset.0),
                duplicate: placed.duplicate,
                scheduled: placed.scheduled.map(|scheduled| ScheduledFor {
                    id: scheduled.to_string(),
                    due_at: wire::time(scheduled.due_at),
                }),
            })
            .collect(),
    })
}

/// Refuses messages that are due too far ahead.
fn check_due(
    state: &State,
    messages: &[Message],
    place: impl Fn(usize) -> Place,
) -> Result<(), Problem> {
    let latest = state.parts.cluster.now() + DELIVER_AHEAD_MAX;
    let days = DELIVER_AHEAD_MAX.num_days();
    let faults = messages.iter().enumerate().filter_map(|(index, message)| {
        let due_at = message.deliver_at().filter(|&due_at| due_at > latest)?;
        Some(FieldError {
            place: place(index),
            detail: format!(
                "`{DELIVER_AT}` is {}, more than {days} days ahead",
                wire::time(due_at)
            ),
            allowed: Some(format!("at most {}", wire::time(latest))),
        })
    });
    let faults: Vec<FieldError> = faults.take(100).collect();
    match faults.first() {
        None => Ok(()),
        Some(first) => {
            let detail = first.detail.clone();
            Err(Problem::new(Kind::InvalidMessage, detail).with_errors(faults))
        }
    }
}

fn content_type(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    match headers.get(CONTENT_TYPE).map(|value| value.to_str()) {
        None => Ok(None),
        Some(Ok(text)) => Ok(Some(text)),
        Some(Err(_)) => Err(bad_header("content-type", "`Content-Type` is not ASCII")),
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let key = value.to_str().unwrap_or_default();
    let is_valid = (1..=IDEMPOTENCY_KEY_MAX_BYTES).contains(&key.len())
        && key.bytes().all(|byte| byte.is_ascii_graphic());
    if !is_valid || values.next().is_some() {
        return Err(bad_header(
            "idempotency-key",
            "`Idempotency-Key` must be given once, with 1 to 255 visible ASCII characters",
        ));
    }
    Ok(Some(key.to_owned()))
}

fn bad_header(name: &str, detail: &str) -> Problem {
    Problem::invalid(vec![FieldError {
        place: Place::Header(name.to_owned()),
        detail: detail.to_owned(),
        allowed: None,
    }])
}

fn place(place: cloudevents::Place) -> Place {
    match place {
        cloudevents::Place::Body(pointer) => Place::Pointer(pointer),
        cloudevents::Place::Header(name) => Place::Header(name),
    }
}

fn refused(error: cloudevents::Error) -> Problem {
    use cloudevents::Error;
    let text = error.to_string();
    match error {
        Error::UnsupportedFormat { .. } => Problem::new(
            Kind::UnsupportedMediaType,
            format!(
                "{text}: CloudEvents come as `application/cloudevents+json`, \
                 `application/cloudevents-batch+json` or in binary mode"
            ),
        ),
        Error::NotJson(_) => Problem::new(Kind::MalformedRequest, text),
        Error::Invalid(faults) => {
            let detail = faults.first().map_or(text, |fault| fault.detail.clone());
            let errors = faults
                .into_iter()
                .map(|Fault { place: at, detail }| FieldError {
                    place: place(at),
                    detail,
                    allowed: None,
                });
            Problem::new(Kind::InvalidMessage, detail).with_errors(errors.collect())
        }
        Error::TooLarge {
            place: at,
            size,
            limit,
        } => Problem::new(Kind::MessageTooLarge, text)
            .with_errors(vec![FieldError {
                place: place(at),
                detail: format!("{size} bytes"),
                allowed: Some(format!("at most {limit} bytes")),
            }])
            .with("limit_bytes", limit),
    }
}
