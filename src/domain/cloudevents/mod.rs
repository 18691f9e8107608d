//! CloudEvents 1.0 as they arrive over HTTP: structured JSON, a JSON batch, binary mode, or a plain body without any
//! CloudEvents attributes. All become [`Message`]s by the rules of docs/protocol.md ("Publishing").
//!
//! Missing attributes are filled in: the id by the caller's generator, the source by [`DEFAULT_SOURCE`], the type by the
//! topic. The parser finds and names all faults of a request, not only the first, and one fault refuses the whole request.

mod attributes;
mod binary;
mod items;
mod structured;
#[cfg(test)]
mod tests;

pub use attributes::check_characters;

use std::fmt;

use bytes::Bytes;

use super::message::Message;
use super::name::Topic;

/// The source of messages that came without one.
pub const DEFAULT_SOURCE: &str = "/postroad/http";
/// The longest id and source, in bytes.
pub const ID_MAX_BYTES: usize = 1_024;
/// The longest ordering key, in bytes.
pub const KEY_MAX_BYTES: usize = 512;
/// The longest type, subject, content type and data schema, in bytes.
pub const ATTRIBUTE_MAX_BYTES: usize = 1_024;
/// The longest value of an extension attribute, in bytes.
pub const EXTENSION_MAX_BYTES: usize = 8_192;
/// The longest name of an attribute, in bytes.
pub const NAME_MAX_BYTES: usize = 20;
/// The most extension attributes of one message.
pub const EXTENSIONS_MAX_COUNT: usize = 64;
/// The most faults that are named; those past it are not looked for.
const FAULTS_MAX_COUNT: usize = 100;

/// The limits of a request.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The most messages of one request.
    pub message_count: usize,
    /// The largest message: its payload and its attributes, in bytes.
    pub message_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_count: 1_000,
            message_bytes: 1024 * 1024,
        }
    }
}

/// A request that publishes, as HTTP delivered it.
#[derive(Debug, Clone, Default)]
pub struct Request<'a> {
    /// The `Content-Type`.
    pub content_type: Option<&'a str>,
    /// The `ce-` headers, names without `ce-` and in lower case, values as they came.
    pub attributes: Vec<(&'a str, &'a [u8])>,
    /// The request's own `traceparent`, for events without one.
    pub traceparent: Option<&'a str>,
    /// The request's own `tracestate`; counts only together with its `traceparent`.
    pub tracestate: Option<&'a str>,
    /// The body.
    pub body: Bytes,
}

/// The context in which a request's events are published.
pub struct Context<'a> {
    /// Their topic.
    pub topic: &'a Topic,
    /// The limits.
    pub limits: Limits,
    /// Makes the id of the message at a place in the request, for those without one.
    pub new_id: &'a dyn Fn(usize) -> String,
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("topic", &self.topic)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// The place of a fault in a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A JSON pointer into the body; empty for the whole body.
    Body(String),
    /// A header, by its name.
    Header(String),
}

/// One rule that a request breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The place.
    pub place: Place,
    /// The fault, as one sentence without a full stop.
    pub detail: String,
}

/// Reasons why a request is refused. Nothing of it may be published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A CloudEvents format that is not spoken here.
    #[error("the content type `{found}` is not supported")]
    UnsupportedFormat {
        /// The content type.
        found: String,
    },
    /// The body of a structured event or of a batch is not JSON.
    #[error("the body {0}")]
    NotJson(super::json::Error),
    /// Messages break rules.
    #[error("{} faults in the messages", .0.len())]
    Invalid(Vec<Fault>),
    /// A message is larger than allowed.
    #[error("a message of {size} bytes is larger than {limit} bytes")]
    TooLarge {
        /// The message's place in the request.
        place: Place,
        /// Its payload and attributes, in bytes.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
}

/// Collects faults, up to a limit.
#[derive(Debug, Default)]
struct Faults(Vec<Fault>);

impl Faults {
    fn add(&mut self, place: Place, detail: impl Into<String>) {
        if !self.is_full() {
            self.0.push(Fault {
                place,
                detail: detail.into(),
            });
        }
    }

    fn is_full(&self) -> bool {
        self.0.len() >= FAULTS_MAX_COUNT
    }
}

/// In which form events come, which the content type says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One event, the body.
    Structured,
    /// An array of events.
    Batch,
    /// The body is a payload, its attributes are headers.
    Binary,
}

/// A request's messages.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// The form that they came in.
    pub mode: Mode,
    /// In the order in which they stand.
    pub messages: Vec<Message>,
}

/// Turns a request into messages.
///
/// # Errors
/// Any rule that the request or one of its messages breaks.
pub fn parse(request: &Request<'_>, context: &Context<'_>) -> Result<Parsed, Error> {
    let essence = essence(request.content_type.unwrap_or_default());
    let mode = match essence.as_str() {
        "application/cloudevents+json" => Mode::Structured,
        "application/cloudevents-batch+json" => Mode::Batch,
        other if other.starts_with("application/cloudevents") => {
            return Err(Error::UnsupportedFormat {
                found: other.to_owned(),
            });
        }
        _ => Mode::Binary,
    };
    let messages = match mode {
        Mode::Structured => structured::parse_one(request, context)?,
        Mode::Batch => structured::parse_batch(request, context)?,
        Mode::Binary => binary::parse(request, context)?,
    };
    Ok(Parsed { mode, messages })
}

/// Turns one event in CloudEvents' JSON format into a message. `place` is the JSON pointer of the event in its request.
///
/// # Errors
/// Any rule that the event breaks.
pub fn parse_event(
    event: &str,
    place: &str,
    number: usize,
    request: &Request<'_>,
    context: &Context<'_>,
) -> Result<Message, Error> {
    structured::parse_event(event, place, number, request, context)
}

/// Turns a body of several messages, each with its own topic, into messages: see `POST /v1/messages`. `new_id` makes the id of the
/// message at a place, for those without one.
///
/// # Errors
/// Any rule that the body or one of its messages breaks.
pub fn parse_items(
    request: &Request<'_>,
    limits: Limits,
    new_id: &dyn Fn(usize) -> String,
) -> Result<Vec<Message>, Error> {
    items::parse(request, limits, new_id)
}

/// The media type without its parameters, in lower case.
fn essence(content_type: &str) -> String {
    content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase()
}

/// Whether a content type says JSON: `application/json`, `text/json` or a `+json` suffix.
fn is_json(essence: &str) -> bool {
    matches!(essence, "application/json" | "text/json") || essence.ends_with("+json")
}
