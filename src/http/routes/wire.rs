//! Pieces of answers that several families share: events spliced in as raw bytes, times, and the engines' errors as
//! problems.

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::domain::message::Entry;
use crate::http::budget::{Counted, Share};
use crate::http::problem::{FieldError, Kind, Place, Problem};
use crate::{lock, queue, relay, store, stream, topic};

/// A CloudEvent in JSON format.
#[derive(ToSchema)]
#[schema(
    as = CloudEvent,
    example = json!({"specversion": "1.0", "id": "8f0b", "source": "/shop", "type": "orders.created",
        "datacontenttype": "application/json", "partitionkey": "sku-1", "data": {"order": 7}})
)]
#[expect(dead_code, reason = "describes what Message prints")]
pub(super) struct Event {
    /// Always `1.0`.
    specversion: String,
    /// The event's id, unique together with `source`.
    id: String,
    /// The context in which the event happened.
    source: String,
    /// The type of event; the topic unless the producer gave another.
    #[schema(rename = "type")]
    kind: String,
    /// The subject of the event within its source.
    #[schema(required = false, nullable = false)]
    subject: Option<String>,
    /// The time when the event happened.
    #[schema(required = false, nullable = false, value_type = String, format = DateTime)]
    time: Option<String>,
    /// The payload's media type.
    #[schema(required = false, nullable = false)]
    datacontenttype: Option<String>,
    /// The URI of the payload's schema.
    #[schema(required = false, nullable = false)]
    dataschema: Option<String>,
    /// The ordering key.
    #[schema(required = false, nullable = false)]
    partitionkey: Option<String>,
    /// The payload, if it is JSON or text.
    data: Option<serde_json::Value>,
    /// The payload in Base64, if it is neither JSON nor text.
    #[schema(required = false, nullable = false)]
    data_base64: Option<String>,
}

/// A moment as all answers print it: UTC, microseconds.
pub(in crate::http) fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// A JSON answer.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    json_bytes(status, printed(body).into())
}

/// An answer as JSON text.
pub(super) fn printed(body: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("answers have string keys only")
}

/// The event of a message as it is: a part of an answer that is printed once more.
pub(super) fn raw(entry: &Entry) -> &RawValue {
    serde_json::from_slice(&entry.event).expect("an event is printed as JSON")
}

/// A JSON answer that is printed already.
pub(super) fn json_bytes(status: StatusCode, body: Bytes) -> Response {
    json_body(status, Body::from(body))
}

/// The same for a page whose share of what answers may hold was taken before it was read.
pub(super) fn json_counted(body: Vec<u8>, share: Share) -> Response {
    let mut response = json_bytes(StatusCode::OK, body.into());
    response.extensions_mut().insert(Counted::new(share));
    response
}

/// A JSON answer with a body of its own kind.
pub(super) fn json_body(status: StatusCode, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Appends a JSON value to a body that is printed by hand.
pub(in crate::http) fn put(out: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) {
    serde_json::to_writer(out, value).expect("a value always serializes into memory");
}

fn store_problem(error: &store::Error) -> Problem {
    if matches!(error, store::Error::OutcomeUnknown(_)) {
        let detail = "the connection to the database was lost during the write; sending the same request again is safe";
        return Problem::new(Kind::OutcomeUnknown, detail);
    }
    match error.retry() {
        store::Retry::Never if !error.is_connection_lost() => Problem::internal(error),
        _ => Problem::unavailable(error),
    }
}

fn stopping() -> Problem {
    Problem::new(Kind::Stopping, "this process is stopping")
}

impl From<stream::Error> for Problem {
    fn from(error: stream::Error) -> Self {
        use stream::Error;
        match &error {
            Error::NotFound { .. } => Self::new(Kind::StreamNotFound, error.to_string()),
            Error::Overlap { .. } => Self::new(Kind::StreamOverlap, error.to_string()),
            Error::Settings(rule) => Self::invalid(vec![FieldError {
                place: Place::Pointer(String::new()),
                detail: rule.to_string(),
                allowed: None,
            }]),
            Error::HasQueues { .. } => Self::new(Kind::StreamHasQueues, error.to_string()),
            Error::HasScheduled { .. } => Self::new(Kind::StreamHasScheduled, error.to_string()),
            Error::TooManyStreams => Self::new(Kind::TooManyStreams, error.to_string()),
            Error::NotKeyed { .. } => Self::new(Kind::StreamNotKeyed, error.to_string()),
            Error::KeyedIsFixed { .. } => Self::new(Kind::StreamKeyedFixed, error.to_string()),
            Error::KeysNotCounted { .. } => Self::new(Kind::Unavailable, error.to_string()),
            Error::MainIsKept => Self::new(Kind::StreamIsKept, error.to_string()),
            Error::ScheduleNotFound { .. } => Self::new(Kind::ScheduleNotFound, error.to_string()),
            Error::TooManySchedules => Self::new(Kind::TooManySchedules, error.to_string()),
            Error::Stopping => stopping(),
            Error::Store(source) => store_problem(source),
        }
    }
}

/// Why an append was refused; `place` is the JSON pointer of each message in its request.
pub(super) fn append_problem(
    error: &stream::AppendError,
    place: impl Fn(usize) -> String,
) -> Problem {
    use stream::AppendError;
    match error {
        AppendError::IdConflict { items } => {
            let errors = items.iter().map(|item| FieldError {
                place: Place::Pointer(place(item.index)),
                detail: match item.scheduled {
                    Some(scheduled) => {
                        format!("the id belongs to the scheduled message `{scheduled}`")
                    }
                    None if item.offset.0 > 0 => {
                        format!("the id belongs to the message at offset {}", item.offset)
                    }
                    None => "the id belongs to an earlier message of this request".to_owned(),
                },
                allowed: None,
            });
            Problem::new(Kind::IdConflict, error.to_string()).with_errors(errors.collect())
        }
        AppendError::VersionConflict(conflict) => {
            Problem::new(Kind::VersionConflict, conflict.to_string())
                .with_errors(vec![FieldError {
                    place: Place::Pointer(place(conflict.index)),
                    detail: conflict.to_string(),
                    allowed: None,
                }])
                .with("key", conflict.key.as_str())
                .with("version", conflict.version)
                .with("expected_version", conflict.expected)
        }
        AppendError::NotKeyed { items } => {
            let errors = items.iter().map(|&(index, _)| FieldError {
                place: Place::Pointer(place(index)),
                detail: "the stream that owns the topic is not keyed".to_owned(),
                allowed: None,
            });
            Problem::new(Kind::StreamNotKeyed, error.to_string()).with_errors(errors.collect())
        }
        AppendError::OutcomeUnknown => Problem::new(
            Kind::OutcomeUnknown,
            "it is unknown whether the messages were published; repeating the request with the same ids is safe",
        ),
        AppendError::Unavailable(Some(source)) => Problem::unavailable(source),
        AppendError::Unavailable(None) => Problem::unavailable(error),
        AppendError::Overloaded => {
            Problem::new(Kind::TooManyRequests, error.to_string()).retry_after(1)
        }
        AppendError::TooLarge { .. } => Problem::new(Kind::PayloadTooLarge, error.to_string()),
        AppendError::Invalid { index, reason } => {
            Problem::new(Kind::InvalidMessage, error.to_string()).with_errors(vec![FieldError {
                place: Place::Pointer(place(*index)),
                detail: (*reason).to_owned(),
                allowed: None,
            }])
        }
        AppendError::TooManyTopics => Problem::new(Kind::TooManyTopics, error.to_string()),
        AppendError::Stopping => stopping(),
        AppendError::Refused(source) => Problem::internal(source),
        AppendError::Fenced | AppendError::PositionMoved { .. } => Problem::internal(error),
    }
}

impl From<stream::AppendError> for Problem {
    fn from(error: stream::AppendError) -> Self {
        append_problem(&error, |index| format!("/{index}"))
    }
}

impl From<topic::Error> for Problem {
    fn from(error: topic::Error) -> Self {
        use topic::Error;
        match &error {
            Error::NotFound { .. } => Self::new(Kind::TopicSettingsNotFound, error.to_string()),
            Error::TooMany => Self::new(Kind::TooManyTopicSettings, error.to_string()),
            Error::Schema(_) => Self::invalid(vec![FieldError {
                place: Place::Pointer("/schema".to_owned()),
                detail: error.to_string(),
                allowed: None,
            }]),
            Error::Stopping => stopping(),
            Error::Store(source) => store_problem(source),
        }
    }
}

impl From<lock::Error> for Problem {
    fn from(error: lock::Error) -> Self {
        use lock::Error;
        let text = error.to_string();
        match &error {
            Error::Held { holder, ahead, .. } => {
                let problem = Self::new(Kind::LockHeld, text)
                    .retry_after(1)
                    .with("ahead", *ahead);
                match holder {
                    Some(holder) => problem
                        .with("owner", holder.owner.as_str())
                        .with("expires_at", time(holder.expires_at)),
                    None => problem,
                }
            }
            Error::Lost { .. } => Self::new(Kind::LockLost, text),
            Error::NotFound { .. } => Self::new(Kind::LockNotFound, text),
            Error::TooManyWaiters => Self::new(Kind::TooManyRequests, text).retry_after(1),
            Error::OutcomeUnknown => Self::new(Kind::OutcomeUnknown, text),
            Error::Stopping => stopping(),
            Error::Store(source) => store_problem(source),
        }
    }
}

impl From<relay::RejectedError> for Problem {
    fn from(error: relay::RejectedError) -> Self {
        use relay::RejectedError;
        let text = error.to_string();
        match error {
            RejectedError::OriginNotFound { .. } => Self::new(Kind::OriginNotFound, text),
            RejectedError::NotFound { .. } => Self::new(Kind::RejectedMessageNotFound, text),
            RejectedError::AlreadyResent { .. }
            | RejectedError::NotKept { .. }
            | RejectedError::StillInvalid { .. } => Self::new(Kind::NotResendable, text),
            RejectedError::Append(source) => source.into(),
            RejectedError::Stopping => stopping(),
            RejectedError::Store(source) => store_problem(&source),
        }
    }
}

impl From<queue::Error> for Problem {
    fn from(error: queue::Error) -> Self {
        use queue::Error;
        match &error {
            Error::NotFound { .. } => Self::new(Kind::QueueNotFound, error.to_string()),
            Error::StreamNotFound { .. } => Self::invalid(vec![FieldError {
                place: Place::Pointer("/stream".to_owned()),
                detail: error.to_string(),
                allowed: None,
            }]),
            Error::StreamChange { .. } => Self::new(Kind::QueueStreamFixed, error.to_string()),
            Error::GenerationMoved { found, .. } => {
                Self::new(Kind::GenerationMoved, error.to_string()).with("generation", found.0)
            }
            Error::LogBehind { behind, .. } => Self::new(Kind::LogBehindQueue, error.to_string())
                .with("through_offset", behind.through.0)
                .with("end_offset", behind.end.0),
            Error::LetterNotFound { .. } => Self::new(Kind::DeadLetterNotFound, error.to_string()),
            Error::LetterRedriven { .. } => Self::new(Kind::DeadLetterRedriven, error.to_string()),
            Error::RedriveNotFound { .. } => Self::new(Kind::RedriveNotFound, error.to_string()),
            Error::TooManyQueues { .. } => Self::new(Kind::TooManyQueues, error.to_string()),
            Error::Invalid(fault) => Self::invalid(vec![FieldError {
                place: Place::Pointer(format!("/{}", fault.field.replace('.', "/"))),
                detail: error.to_string(),
                allowed: None,
            }]),
            Error::InFlightFull { .. }
            | Error::TooManyWaiters { .. }
            | Error::TooManyRedrives { .. } => {
                Self::new(Kind::TooManyRequests, error.to_string()).retry_after(1)
            }
            Error::OutcomeUnknown => Self::new(Kind::OutcomeUnknown, error.to_string()),
            Error::Unavailable { .. } => Self::new(Kind::Unavailable, error.to_string()),
            Error::NotOwner { .. } => Self::new(Kind::NoOwner, error.to_string()),
            Error::Stopping => stopping(),
            Error::Store(source) => store_problem(source),
        }
    }
}
