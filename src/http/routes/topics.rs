//! Topic settings: declare, describe, list, delete; and their application to messages published over HTTP.

use std::time::Duration;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::wire;
use crate::domain::json;
use crate::domain::message::Message;
use crate::domain::name::TopicPattern;
use crate::http::extract::{Check, Json, Named, Query, parse_json};
use crate::http::openapi::{NoTopicSettings, Reads, TopicSettingsBounds, Writes};
use crate::http::problem::{FieldError, Kind, Place, Problem};
use crate::http::route::Routes;
use crate::http::state::State;
use crate::topic::{self, Declared, Description, Settings};

/// The largest payload that a setting can allow, in bytes.
const MAX_BYTES: i64 = 16 << 20;
/// The highest rate and the largest burst.
const RATE_MAX: f64 = 1_000_000.0;
const BURST_MAX: i64 = 1_000_000;
/// Faults that one answer names.
const ERRORS_MAX: usize = 100;
/// How long a request waits for the answer of the schemas.
const ASKING_MAX: Duration = Duration::from_secs(10);

/// Rules for publishing to the topics of a pattern. Everything is optional; a setting that is left out sets no limit, even if it did
/// before. For each setting, the most specific pattern that has it applies: compared token by token, a name comes before `*`,
/// and `*` before `>`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(
    as = TopicDeclaration,
    example = json!({"schema": {"type": "object", "required": ["order"]}, "max_bytes": 65536, "rate_per_second": 100, "burst": 200})
)]
struct Declaration {
    /// A JSON Schema for payloads, at most 64 KiB, an object or a boolean. References may only point into the schema itself. HTTP requests
    /// with payloads that do not match are refused; such rows of an outbox are listed as rejected.
    #[schema(value_type = Option<serde_json::Value>)]
    schema: Option<Box<RawValue>>,
    /// The largest payload over HTTP, in bytes.
    #[schema(minimum = 1, maximum = 16_777_216)]
    max_bytes: Option<i64>,
    /// Messages per second over HTTP, all topics of the pattern together, on each node.
    #[schema(minimum = 0.001, maximum = 1_000_000)]
    rate_per_second: Option<f64>,
    /// Messages that may come at once; by default the messages of one second.
    #[schema(minimum = 1, maximum = 1_000_000)]
    burst: Option<i64>,
}

/// The settings of the topics of a pattern.
#[derive(Debug, Serialize, ToSchema)]
struct TopicSettings {
    /// The pattern.
    #[schema(example = "orders.*")]
    topic: String,
    /// The JSON Schema; null without one.
    #[schema(value_type = Option<serde_json::Value>)]
    schema: Option<Box<RawValue>>,
    max_bytes: Option<i64>,
    rate_per_second: Option<f64>,
    burst: Option<i64>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    changed_at: String,
    /// The reason why the declared schema is not applied; usually null. The broker checks a schema when it is declared, so this happens only
    /// to one that another version of the program accepted. Until it is declared again, everything is published.
    schema_fault: Option<String>,
}

/// The settings of the topics of a pattern, without the schema itself.
#[derive(Debug, Serialize, ToSchema)]
struct TopicSummary {
    /// The pattern.
    topic: String,
    /// True if there is a schema; `GET /v1/topics/{topic}` returns it.
    has_schema: bool,
    max_bytes: Option<i64>,
    rate_per_second: Option<f64>,
    burst: Option<i64>,
    #[schema(format = DateTime)]
    changed_at: String,
    /// The reason why the declared schema is not applied; usually null.
    schema_fault: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Topics {
    /// By pattern.
    topics: Vec<TopicSummary>,
}

/// A schema may have 64 KiB by itself.
const DECLARATION_MAX_BYTES: usize = 4 * 64 * 1024;

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(routes!(declare, describe, delete))
}

impl From<Description> for TopicSettings {
    fn from(found: Description) -> Self {
        let row = &found.settings;
        let schema = row.schema.clone();
        Self {
            topic: row.pattern.to_string(),
            schema: schema.and_then(|text| RawValue::from_string(text).ok()),
            schema_fault: found.schema_fault.map(|reason| reason.to_string()),
            max_bytes: row.max_bytes,
            rate_per_second: row.rate_per_second,
            burst: row.burst,
            created_at: wire::time(row.created_at),
            changed_at: wire::time(row.changed_at),
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
        let mut integer = |name: &str, value: Option<i64>, most: i64| {
            let value = check.integer(&format!("/{name}"), value?, 1..=most);
            u32::try_from(value).ok()
        };
        let max_bytes = integer("max_bytes", self.max_bytes, MAX_BYTES);
        let burst = integer("burst", self.burst, BURST_MAX);
        if let Some(rate) = self.rate_per_second
            && !(0.001..=RATE_MAX).contains(&rate)
        {
            check.fault(
                "/rate_per_second",
                "must be from 0.001 to 1000000".to_owned(),
            );
        }
        if burst.is_some() && self.rate_per_second.is_none() {
            check.fault("/burst", "needs a `rate_per_second`".to_owned());
        }
        let schema = self.schema.and_then(|schema| match read_schema(&schema) {
            Ok(schema) => Some(schema),
            Err(error) => {
                let place = format!("/schema{}", error.pointer().unwrap_or_default());
                check.fault(&place, error.to_string());
                None
            }
        });
        check.finish()?;
        Ok(Settings {
            schema,
            max_bytes,
            rate_per_second: self.rate_per_second,
            burst,
        })
    }
}

/// A schema's text, without white space. It goes out inside an answer, so it is as readable as a payload must be: as a value of the parser
/// that stands here, a name twice would be gone without a word.
fn read_schema(schema: &RawValue) -> Result<String, json::Error> {
    let text = json::check(schema.get().as_bytes())?;
    let value: serde_json::Value = serde_json::from_str(text).expect("it was just checked");
    Ok(value.to_string())
}

/// List the settings of topics.
#[utoipa::path(
    get, path = "/v1/topics", tag = "topics", operation_id = "list_topics",
    responses((status = 200, description = "All patterns that have settings", body = Topics), Reads),
)]
async fn list(Extract(state): Extract<State>, query: Query) -> Result<Response, Problem> {
    query.finish()?;
    let all = state.parts.topics.list().await?;
    let topics = all.into_iter().map(|found| TopicSummary {
        topic: found.settings.pattern.to_string(),
        has_schema: found.settings.schema.is_some(),
        max_bytes: found.settings.max_bytes,
        rate_per_second: found.settings.rate_per_second,
        burst: found.settings.burst,
        changed_at: wire::time(found.settings.changed_at),
        schema_fault: found.schema_fault.map(|reason| reason.to_string()),
    });
    let topics = topics.collect();
    Ok(wire::json(StatusCode::OK, &Topics { topics }))
}

/// Declare the settings of a pattern's topics. They replace the pattern's earlier settings. Repeating it changes nothing.
///
/// This node applies them before it answers, the others within a second. Write `>` as `%3E` in the path.
#[utoipa::path(
    put, path = "/v1/topics/{topic}", tag = "topics", operation_id = "declare_topic",
    params(("topic" = String, Path, description = "A topic, or a pattern over topics: `*` is one token, a final `>` the rest",
        min_length = 1, max_length = 255, pattern = "^(>|([A-Za-z0-9_-]+|\\*)(\\.([A-Za-z0-9_-]+|\\*))*(\\.>)?)$", example = "orders.created")),
    request_body = Declaration,
    responses(
        (status = 200, description = "The pattern had settings, and now has these", body = TopicSettings),
        (status = 201, description = "The pattern now has settings", body = TopicSettings),
        TopicSettingsBounds, Writes,
    ),
)]
async fn declare(
    Extract(state): Extract<State>,
    Named(pattern): Named<TopicPattern>,
    query: Query,
    Json(declaration): Json<Declaration, DECLARATION_MAX_BYTES>,
) -> Result<Response, Problem> {
    query.finish()?;
    let settings = declaration.settings()?;
    let (found, declared) = state.parts.topics.declare(pattern, settings).await?;
    let status = match declared {
        Declared::Created => StatusCode::CREATED,
        Declared::Changed => StatusCode::OK,
    };
    Ok(wire::json(status, &TopicSettings::from(found)))
}

/// Describe the settings that are declared for exactly this topic or pattern.
#[utoipa::path(
    get, path = "/v1/topics/{topic}", tag = "topics", operation_id = "describe_topic",
    params(("topic" = String, Path, description = "A topic, or a pattern over topics",
        min_length = 1, max_length = 255, pattern = "^(>|([A-Za-z0-9_-]+|\\*)(\\.([A-Za-z0-9_-]+|\\*))*(\\.>)?)$", example = "orders.created")),
    responses((status = 200, description = "The settings", body = TopicSettings), NoTopicSettings, Reads),
)]
async fn describe(
    Extract(state): Extract<State>,
    Named(pattern): Named<TopicPattern>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let row = state.parts.topics.describe(&pattern).await?;
    Ok(wire::json(StatusCode::OK, &TopicSettings::from(row)))
}

/// Delete the settings of exactly this topic or pattern.
#[utoipa::path(
    delete, path = "/v1/topics/{topic}", tag = "topics", operation_id = "delete_topic",
    params(("topic" = String, Path, description = "A topic, or a pattern over topics",
        min_length = 1, max_length = 255, pattern = "^(>|([A-Za-z0-9_-]+|\\*)(\\.([A-Za-z0-9_-]+|\\*))*(\\.>)?)$", example = "orders.gone")),
    responses((status = 204, description = "Deleted"), NoTopicSettings, Reads),
)]
async fn delete(
    Extract(state): Extract<State>,
    Named(pattern): Named<TopicPattern>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    state.parts.topics.delete(&pattern).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Refuses messages that the settings of their topics do not let through: all, if one. `place` is the JSON pointer of each.
pub(super) async fn admit(
    topics: &topic::Handle,
    messages: &[Message],
    place: impl Fn(usize) -> String,
) -> Result<(), Problem> {
    let rules = topics.rules();
    let mut large = Vec::new();
    let mut limit = u64::MAX;
    for (index, message) in messages.iter().enumerate() {
        // Nothing is declared at all.
        let Some(applied) = rules.of(&message.topic) else {
            return Ok(());
        };
        let size = message.data.bytes().len() as u64;
        if let Some(most) = applied.max_bytes.filter(|most| size > *most) {
            limit = limit.min(most);
            large.push(FieldError {
                place: Place::Pointer(place(index)),
                detail: format!("{size} bytes of payload"),
                allowed: Some(format!("at most {most} bytes for `{}`", message.topic)),
            });
        }
    }
    if !large.is_empty() {
        large.truncate(ERRORS_MAX);
        let detail = "a payload is larger than its topic allows";
        return Err(Problem::new(Kind::MessageTooLarge, detail)
            .with_errors(large)
            .with("limit_bytes", limit));
    }
    drop(rules);
    let found = mismatches(topics, messages, ERRORS_MAX).await?;
    let errors = found.into_iter().flat_map(|(index, pattern, mismatches)| {
        let at = Place::Pointer(place(index));
        mismatches.into_iter().map(move |mismatch| FieldError {
            place: at.clone(),
            detail: match mismatch.pointer.as_str() {
                "" => mismatch.detail,
                pointer => format!("at {pointer} of the payload: {}", mismatch.detail),
            },
            allowed: Some(format!("what the schema of `{pattern}` allows")),
        })
    });
    let errors: Vec<FieldError> = errors.take(ERRORS_MAX).collect();
    if let Some(first) = errors.first() {
        let detail = first.detail.clone();
        return Err(Problem::new(Kind::SchemaMismatch, detail).with_errors(errors));
    }
    topics.admit(messages).map_err(|(wait, pattern)| {
        let seconds = u32::try_from(wait.as_secs())
            .unwrap_or(u32::MAX)
            .saturating_add(1);
        let detail = format!("the rate limit of `{pattern}` is reached on this node");
        Problem::new(Kind::RateLimited, detail)
            .retry_after(seconds)
            .with("topics", pattern.as_str())
    })
}

/// Asks the schemas of the messages' topics, for as long as a client waits.
pub(super) async fn mismatches(
    topics: &topic::Handle,
    messages: &[Message],
    most_faults: usize,
) -> Result<topic::Mismatched, Problem> {
    let asked = topics.find_mismatches(messages, most_faults);
    match tokio::time::timeout(ASKING_MAX, asked).await {
        Ok(found) => Ok(found?),
        Err(_) => {
            let detail = format!(
                "checking the payloads against their schemas took more than {} seconds: send fewer messages at once, or try later",
                ASKING_MAX.as_secs()
            );
            Err(Problem::new(Kind::Unavailable, detail).retry_after(1))
        }
    }
}
