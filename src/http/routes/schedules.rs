//! Schedules: messages that are published again and again, by cron.

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::{topics, wire, words};
use crate::domain::cloudevents;
use crate::domain::name::{ScheduleName, Topic};
use crate::domain::schedule::{Cadence, CadenceError, Declaration, Misfire};
use crate::http::extract::{Check, Json, Named, PAYLOAD_MAX_BYTES, Query};
use crate::http::openapi::{NoSchedule, Reads, SchedulesFull, Writes};
use crate::http::problem::Problem;
use crate::http::route::{Routes, route};
use crate::http::state::State;
use crate::stream::{Declared, ScheduleDescription, check_event};
use crate::topic;

/// Occurrences shown of what comes next.
const NEXT_SHOWN: i64 = 5;
/// At most.
const NEXT_MAX: i64 = 100;
/// What an occurrence has of its own.
const NOT_IN_EVENT: [&str; 5] = ["id", "source", "time", "deliverat", "expectedversion"];

/// The message to publish, and when.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(
    as = ScheduleDeclaration,
    example = json!({"topic": "reports.daily", "cron": "0 9 * * MON-FRI", "time_zone": "Europe/Berlin",
        "event": {"partitionkey": "reports", "data": {"kind": "daily"}}, "misfire": "one"})
)]
struct Body {
    /// The topic to publish to.
    #[schema(
        min_length = 1,
        max_length = 255,
        pattern = "^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$"
    )]
    topic: String,
    /// Minute, hour, day of month, month, day of week, with optional seconds before them; or `@daily` and its like.
    #[schema(min_length = 1, max_length = 200)]
    cron: String,
    /// The IANA time zone of the schedule's clock; `UTC` by default.
    time_zone: Option<String>,
    /// The CloudEvent without `id`, `source` and `time`, which each occurrence gets for itself. If it has no data, neither do occurrences.
    #[schema(value_type = Option<Object>)]
    event: Option<Box<RawValue>>,
    /// What to do with occurrences that no broker published within 60 seconds: `skip`, `one` (the latest of them, the default) or
    /// `all` (the latest 1,000 at most).
    #[schema(value_type = Option<words::Misfire>)]
    misfire: Option<String>,
    /// A paused schedule publishes nothing, and does not make up for the pause later.
    #[serde(default)]
    paused: bool,
}

/// A schedule and its state.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Schedule)]
struct View {
    #[schema(example = "daily-report")]
    name: String,
    topic: String,
    cron: String,
    time_zone: &'static str,
    #[schema(value_type = Object)]
    event: Box<RawValue>,
    misfire: words::Misfire,
    paused: bool,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    changed_at: String,
    /// `failing` when its latest occurrence could not be published: `last_failure` says why.
    state: Condition,
    /// How long a due occurrence has been waiting to be published; 0 when none is due.
    #[schema(minimum = 0)]
    lag_seconds: f64,
    /// Occurrences published so far.
    published_count: u64,
    /// Occurrences left out so far because they could not be published.
    failed_count: u64,
    /// The last occurrence that could not be published.
    last_failure: Option<Failure>,
    /// The last occurrence that was published.
    #[schema(format = DateTime)]
    last_at: Option<String>,
    /// The next occurrences; none while the schedule is paused.
    next_at: Vec<String>,
}

/// A schedule's state.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ScheduleState)]
enum Condition {
    Active,
    Paused,
    Failing,
}

/// An occurrence that could not be published.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ScheduleFailure)]
struct Failure {
    /// The time when the occurrence was due.
    #[schema(format = DateTime)]
    occurrence_at: String,
    /// The reason, as one clause.
    #[schema(
        example = "the payload does not match the schema of `reports.*`: \"kind\" is a required property"
    )]
    reason: String,
    /// The time when the failure was found.
    #[schema(format = DateTime)]
    at: String,
}

/// All schedules.
#[derive(Debug, Serialize, ToSchema)]
struct Schedules {
    /// By name.
    schedules: Vec<View>,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(route(routes!(declare)).needs_body())
        .routes(routes!(describe, delete))
}

impl View {
    fn of(schedule: ScheduleDescription, now: DateTime<Utc>, next: usize) -> Self {
        let state = match (schedule.declaration.is_paused, schedule.is_failing()) {
            (true, _) => Condition::Paused,
            (false, true) => Condition::Failing,
            (false, false) => Condition::Active,
        };
        let lag_seconds = schedule.lag(now).as_secs_f64();
        let declaration = schedule.declaration;
        let next = match declaration.is_paused {
            true => Vec::new(),
            false => declaration.cadence.preview(now.max(schedule.through), next),
        };
        Self {
            name: schedule.name.to_string(),
            topic: declaration.topic.to_string(),
            cron: declaration.cadence.expression().to_owned(),
            time_zone: declaration.cadence.zone(),
            event: RawValue::from_string(declaration.event).expect("checked when it was declared"),
            misfire: words::Misfire(declaration.misfire),
            paused: declaration.is_paused,
            created_at: wire::time(schedule.created_at),
            changed_at: wire::time(schedule.changed_at),
            state,
            lag_seconds,
            published_count: schedule.published_count,
            failed_count: schedule.failed_count,
            last_failure: schedule.failure.map(|failure| Failure {
                occurrence_at: wire::time(failure.occurrence_at),
                reason: failure.reason,
                at: wire::time(failure.at),
            }),
            last_at: schedule.last.map(wire::time),
            next_at: next.into_iter().map(wire::time).collect(),
        }
    }
}

impl Body {
    async fn checked(
        self,
        name: &ScheduleName,
        state: &State,
        now: DateTime<Utc>,
    ) -> Result<Declaration, Problem> {
        let mut check = Check::default();
        let topic = check.parsed("/topic", &self.topic, Topic::parse);
        let zone = self.time_zone.as_deref().unwrap_or("UTC");
        let cadence = match Cadence::parse(&self.cron, zone, now) {
            Ok(cadence) => Some(cadence),
            Err(error) => {
                let pointer = match error {
                    CadenceError::Zone => "/time_zone",
                    CadenceError::Expression { .. } | CadenceError::Never => "/cron",
                };
                check.fault(pointer, error.to_string());
                None
            }
        };
        let misfire = match &self.misfire {
            Some(text) => check.parsed("/misfire", text, Misfire::parse),
            None => Some(Misfire::default()),
        };
        let event = self
            .event
            .map_or("{}".to_owned(), |event| event.get().to_owned());
        check_members(&event, &mut check);
        let (Some(topic), Some(cadence), Some(misfire)) = (topic, cadence, misfire) else {
            check.finish()?;
            return Err(Problem::invalid(Vec::new()));
        };
        check.finish()?;
        let declaration = Declaration {
            topic,
            cadence,
            misfire,
            is_paused: self.paused,
            event: without_specversion(event),
        };
        let mut check = Check::default();
        check_occurrence(name, &declaration, state, now, &mut check).await?;
        check.finish()?;
        Ok(declaration)
    }
}

/// Refuses an event that could not be published: what every message must be, and what its topic takes.
async fn check_occurrence(
    name: &ScheduleName,
    declaration: &Declaration,
    state: &State,
    now: DateTime<Utc>,
    check: &mut Check,
) -> Result<(), Problem> {
    let message = match check_event(name, declaration, now) {
        Ok(message) => message,
        Err(cloudevents::Error::Invalid(faults)) => {
            for fault in faults {
                let pointer = match &fault.place {
                    cloudevents::Place::Body(pointer) => format!("/event{pointer}"),
                    cloudevents::Place::Header(_) => "/event".to_owned(),
                };
                check.fault(pointer, fault.detail);
            }
            return Ok(());
        }
        Err(error) => {
            check.fault("/event", error.to_string());
            return Ok(());
        }
    };
    let applied = state.parts.topics.rules().of(&declaration.topic);
    let most = applied.as_ref().and_then(|applied| applied.max_bytes);
    let most = most.map_or(state.options.publish.message_bytes, |most| {
        usize::try_from(most).unwrap_or(usize::MAX)
    });
    let size = message.data.bytes().len();
    if size > most.min(state.options.publish.message_bytes) {
        let detail = format!("has {size} bytes, at most {most} are allowed");
        check.fault("/event/data", detail);
    }
    let message = std::slice::from_ref(&message);
    let found = topics::mismatches(&state.parts.topics, message, topic::MISMATCHES_MAX).await?;
    for (_, pattern, mismatches) in found {
        for mismatch in mismatches {
            let detail = format!(
                "does not match the schema of `{pattern}`: {}",
                mismatch.detail
            );
            check.fault(format!("/event/data{}", mismatch.pointer), detail);
        }
    }
    Ok(())
}

/// Refuses what an occurrence has of its own.
fn check_members(event: &str, check: &mut Check) {
    let Ok(members) = serde_json::from_str::<Map<String, Value>>(event) else {
        check.fault("/event", "`event` must be a JSON object");
        return;
    };
    for name in NOT_IN_EVENT {
        if members.contains_key(name) {
            let detail =
                format!("`{name}` is made for each occurrence, or is not supported in a schedule");
            check.fault(format!("/event/{name}"), detail);
        }
    }
    if members
        .get("specversion")
        .is_some_and(|version| version != "1.0")
    {
        check.fault("/event/specversion", "only `1.0` is supported");
    }
}

/// The event without its `specversion`, which each occurrence is given; its other members as they are.
fn without_specversion(event: String) -> String {
    let members = serde_json::from_str::<std::collections::BTreeMap<String, &RawValue>>(&event);
    let Ok(mut members) = members else {
        return event;
    };
    match members.remove("specversion") {
        Some(_) => serde_json::to_string(&members).expect("it has string keys only"),
        None => event,
    }
}

/// List schedules.
#[utoipa::path(
    get, path = "/v1/schedules", tag = "scheduled messages", operation_id = "list_schedules",
    responses((status = 200, description = "All schedules", body = Schedules), Reads),
)]
async fn list(Extract(state): Extract<State>, query: Query) -> Result<Response, Problem> {
    query.finish()?;
    let now = state.parts.cluster.now();
    let shown = usize::try_from(NEXT_SHOWN).unwrap_or_default();
    let schedules = state.parts.stream.schedules().await?;
    let schedules = schedules
        .into_iter()
        .map(|schedule| View::of(schedule, now, shown))
        .collect();
    Ok(wire::json(StatusCode::OK, &Schedules { schedules }))
}

/// Declare a schedule: it publishes a message again and again from now on, each occurrence once, whatever happens to the broker.
///
/// A change of `cron` or `time_zone`, and the end of a pause, start afresh from now. Repeating the declaration changes nothing.
/// Daylight saving time: an occurrence at a fixed time in a skipped hour comes at the first moment after it, and in a repeated hour
/// it comes once. An occurrence by `*` or a step is left out in a skipped hour, and comes in both repeated hours.
#[utoipa::path(
    put, path = "/v1/schedules/{name}", tag = "scheduled messages", operation_id = "declare_schedule",
    params(("name" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "daily-report")),
    request_body = Body,
    responses(
        (status = 200, description = "It existed, and now is as declared", body = View),
        (status = 201, description = "It has been created", body = View),
        SchedulesFull, Writes,
    ),
)]
async fn declare(
    Extract(state): Extract<State>,
    Named(name): Named<ScheduleName>,
    query: Query,
    Json(body): Json<Body, PAYLOAD_MAX_BYTES>,
) -> Result<Response, Problem> {
    query.finish()?;
    let now = state.parts.cluster.now();
    let declaration = body.checked(&name, &state, now).await?;
    let declared = state.parts.stream.declare_schedule(name, declaration).await;
    let (schedule, declared) = declared?;
    let status = match declared {
        Declared::Created => StatusCode::CREATED,
        Declared::Unchanged | Declared::Changed => StatusCode::OK,
    };
    let shown = usize::try_from(NEXT_SHOWN).unwrap_or_default();
    Ok(wire::json(status, &View::of(schedule, now, shown)))
}

/// Describe a schedule and its next occurrences.
#[utoipa::path(
    get, path = "/v1/schedules/{name}", tag = "scheduled messages", operation_id = "describe_schedule",
    params(
        ("name" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "daily-report"),
        ("next" = Option<i64>, Query, description = "How many of the next occurrences to return; 5 by default", minimum = 0, maximum = 100),
    ),
    responses((status = 200, description = "The schedule", body = View), NoSchedule, Reads),
)]
async fn describe(
    Extract(state): Extract<State>,
    Named(name): Named<ScheduleName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let next = query.integer("next", 0..=NEXT_MAX).unwrap_or(NEXT_SHOWN);
    query.finish()?;
    let schedule = state.parts.stream.schedule(&name).await?;
    let next = usize::try_from(next).unwrap_or_default();
    let view = View::of(schedule, state.parts.cluster.now(), next);
    Ok(wire::json(StatusCode::OK, &view))
}

/// Delete a schedule. The messages that it published stay.
#[utoipa::path(
    delete, path = "/v1/schedules/{name}", tag = "scheduled messages", operation_id = "delete_schedule",
    params(("name" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "daily-report")),
    responses((status = 204, description = "It does not exist"), NoSchedule, Reads),
)]
async fn delete(
    Extract(state): Extract<State>,
    Named(name): Named<ScheduleName>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    state.parts.stream.delete_schedule(&name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
