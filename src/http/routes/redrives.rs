//! Redrives, which bring dead letters back into their queue.

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::dead_letters::TEXT_MAX_BYTES;
use super::streams::parse_time;
use super::wire;
use super::words::{DeathCause, RedriveStatus};
use crate::domain::letter::{Cause, LETTER_IDS_MAX, LetterId, REDRIVE_RATE_MAX, Selection};
use crate::domain::name::{QueueName, TopicPattern};
use crate::http::extract::{Check, Json, Named, PathPart, Query};
use crate::http::openapi::{Cancels, NoQueue, NoRedrive, QueueBounds, Reads, Writes};
use crate::http::problem::Problem;
use crate::http::route::{Routes, route};
use crate::http::state::State;
use crate::queue::{NewRedrive, Redrive};

/// The dead letters to bring back, and how fast: those in `ids`, those that match `filter`, or all if neither is given. Letters that
/// die after the redrive began are not included.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RedriveRequest, example = json!({"filter": {"reason": "no stock"}, "rate_per_second": 100}))]
struct Request {
    /// The redrive's id: a repeat with the same id is the same redrive. The broker makes one if there is none.
    #[schema(
        min_length = 1,
        max_length = 100,
        pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$"
    )]
    redrive_id: Option<String>,
    /// The ids of the letters.
    #[schema(min_items = 1, max_items = 1000)]
    ids: Option<Vec<String>>,
    /// The letters that match every given condition.
    filter: Option<Filter>,
    /// The number of letters per second; by default as fast as the consumers settle them.
    #[schema(minimum = 1, maximum = 10000)]
    rate_per_second: Option<i64>,
    /// Only count the letters.
    dry_run: Option<bool>,
}

/// A filter on dead letters.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RedriveFilter)]
struct Filter {
    /// Only letters with this cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<DeathCause>)]
    cause: Option<String>,
    /// Only letters whose topic matches this pattern.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 255)]
    topic: Option<String>,
    /// Only letters with this ordering key.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 512)]
    key: Option<String>,
    /// Only letters with this text in the reason of one of their failures.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 512)]
    reason: Option<String>,
    /// Only letters that died after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    died_after: Option<String>,
    /// Only letters that died before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    died_before: Option<String>,
}

/// A redrive and its progress.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Redrive)]
struct View {
    id: String,
    status: RedriveStatus,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    finished_at: Option<String>,
    /// Dead letters per second; null means as fast as the consumers settle them.
    rate_per_second: Option<u32>,
    /// The ids of the requested dead letters.
    ids: Option<Vec<String>>,
    /// The filter that the dead letters had to match.
    filter: Option<Filter>,
    /// Dead letters that matched when the redrive began; null until they are counted.
    total: Option<u64>,
    /// Letters that came back into the queue.
    redriven: u64,
    /// Letters that were gone, or already in the queue, when their turn came.
    skipped: u64,
    /// Redriven messages, in a queue ordered by key, whose key had a later message that was already settled.
    late: u64,
}

/// The dead letters that a redrive would bring back.
#[derive(Debug, Serialize, ToSchema)]
struct DryRun {
    /// Always true.
    dry_run: bool,
    /// The number of dead letters that match.
    matching: u64,
    /// Matching letters, in a queue ordered by key, whose key has a later message that is already settled.
    late: u64,
}

#[derive(Debug, Serialize, ToSchema)]
struct Redrives {
    /// The newest first.
    redrives: Vec<View>,
}

/// A redrive's name.
#[derive(Debug)]
struct RedriveId(String);

impl PathPart for RedriveId {
    const PARAMETER: &'static str = "id";

    fn parse(text: &str) -> Result<Self, String> {
        // The same alphabet and length as of a queue's name.
        QueueName::parse(text)
            .map(|_| Self(text.to_owned()))
            .map_err(|error| error.to_string())
    }
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(route(routes!(begin)).once())
        .routes(routes!(describe, cancel))
}

impl From<Redrive> for View {
    fn from(redrive: Redrive) -> Self {
        let selection = redrive.selection;
        let filter = Filter {
            cause: selection.cause.map(|cause| cause.as_str().to_owned()),
            topic: selection.topic.map(|topic| topic.to_string()),
            key: selection.key,
            reason: selection.reason,
            died_after: selection.died_after.map(wire::time),
            died_before: selection.died_before.map(wire::time),
        };
        let ids = selection.ids;
        Self {
            id: redrive.id,
            status: RedriveStatus(redrive.status),
            created_at: wire::time(redrive.created_at),
            finished_at: redrive.finished_at.map(wire::time),
            rate_per_second: redrive.rate_per_second,
            filter: (!filter.is_empty()).then_some(filter),
            ids: ids.map(|ids| ids.iter().map(ToString::to_string).collect()),
            total: redrive.total,
            redriven: redrive.redriven,
            skipped: redrive.skipped,
            late: redrive.late,
        }
    }
}

impl Filter {
    fn is_empty(&self) -> bool {
        let texts = [&self.cause, &self.topic, &self.key, &self.reason];
        let times = [&self.died_after, &self.died_before];
        texts.into_iter().chain(times).all(Option::is_none)
    }

    fn checked(self, check: &mut Check) -> Selection {
        for (pointer, text) in [("/filter/key", &self.key), ("/filter/reason", &self.reason)] {
            if let Some(text) = text {
                check.text(pointer, text, TEXT_MAX_BYTES);
            }
        }
        let mut time = |pointer: &str, text: Option<String>| {
            text.and_then(|text| check.parsed(pointer, &text, parse_time))
        };
        let died_after = time("/filter/died_after", self.died_after);
        let died_before = time("/filter/died_before", self.died_before);
        Selection {
            ids: None,
            cause: self
                .cause
                .and_then(|text| check.parsed("/filter/cause", &text, Cause::parse)),
            topic: self
                .topic
                .and_then(|text| check.parsed("/filter/topic", &text, TopicPattern::parse)),
            key: self.key,
            reason: self.reason,
            died_after,
            died_before,
        }
    }
}

impl Request {
    fn checked(self) -> Result<NewRedrive, Problem> {
        let mut check = Check::default();
        let id = match self.redrive_id {
            Some(text) => {
                check.parsed("/redrive_id", &text, QueueName::parse);
                text
            }
            None => uuid::Uuid::now_v7().to_string(),
        };
        if self.ids.is_some() && self.filter.is_some() {
            check.fault("/filter", "`ids` and `filter` cannot be given together");
        }
        let mut selection = self.filter.unwrap_or_default().checked(&mut check);
        if let Some(texts) = self.ids {
            if texts.is_empty() || texts.len() > LETTER_IDS_MAX {
                check.fault("/ids", format!("`ids` must have 1 to {LETTER_IDS_MAX} ids"));
            }
            let ids = texts.iter().take(LETTER_IDS_MAX).enumerate();
            let ids = ids.filter_map(|(index, text)| {
                check.parsed(&format!("/ids/{index}"), text, LetterId::parse)
            });
            selection.ids = Some(ids.collect());
        }
        let rate_per_second = self.rate_per_second.map(|rate| {
            let rate = check.integer("/rate_per_second", rate, 1..=i64::from(REDRIVE_RATE_MAX));
            u32::try_from(rate).unwrap_or(1)
        });
        check.finish()?;
        Ok(NewRedrive {
            id,
            selection,
            rate_per_second,
        })
    }
}

/// List a queue's redrives. Ended ones are kept for 30 days.
#[utoipa::path(
    get, path = "/v1/queues/{queue}/redrives", tag = "dead letters", operation_id = "list_redrives",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("limit" = Option<i64>, Query, description = "At most this many, newest first; 100 by default", minimum = 1, maximum = 1000),
    ),
    responses((status = 200, description = "Redrives", body = Redrives), NoQueue, Reads),
)]
async fn list(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let limit = query.integer("limit", 1..=1_000).unwrap_or(100);
    query.finish()?;
    let limit = u32::try_from(limit).unwrap_or(1);
    let redrives = state.parts.queue.redrives(&name, limit).await?;
    let redrives = redrives.into_iter().map(View::from).collect();
    Ok(wire::json(StatusCode::OK, &Redrives { redrives }))
}

/// Redrive dead letters into their own queue, in offset order, each with all its attempts. A redriven message goes out before later
/// ones; receipts of its former deliveries are `stale`. Other queues are not affected.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/redrives", tag = "dead letters", operation_id = "begin_redrive",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    request_body = Request,
    responses(
        (status = 200, description = "The counts of a dry run; or the redrive with this id, which had begun before",
            body = Answer),
        (status = 201, description = "The redrive has begun", body = View),
        NoQueue, QueueBounds, Writes,
    ),
)]
async fn begin(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(request): Json<Request>,
) -> Result<Response, Problem> {
    query.finish()?;
    let is_dry = request.dry_run == Some(true);
    let new = request.checked()?;
    let (status, answer) = match is_dry {
        true => {
            let found = state.parts.queue.dry_run(&name, new).await?;
            let counts = DryRun {
                dry_run: true,
                matching: found.matching,
                late: found.late,
            };
            (StatusCode::OK, Answer::DryRun(counts))
        }
        false => {
            let (redrive, is_new) = state.parts.queue.redrive(&name, new).await?;
            let status = match is_new {
                true => StatusCode::CREATED,
                false => StatusCode::OK,
            };
            (status, Answer::Redrive(Box::new(redrive.into())))
        }
    };
    Ok(wire::json(status, &answer))
}

/// A redrive, or the counts of a dry run.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = RedriveAnswer)]
enum Answer {
    DryRun(DryRun),
    Redrive(Box<View>),
}

/// Describe a redrive and its progress.
#[utoipa::path(
    get, path = "/v1/queues/{queue}/redrives/{id}", tag = "dead letters", operation_id = "describe_redrive",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("id" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "after-the-fix"),
    ),
    responses((status = 200, description = "The redrive", body = View), NoRedrive, Reads),
)]
async fn describe(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    Named(RedriveId(id)): Named<RedriveId>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let redrive = state.parts.queue.find_redrive(&name, &id).await?;
    Ok(wire::json(StatusCode::OK, &View::from(redrive)))
}

/// Cancel a redrive: redriven messages stay in the queue, and the other letters stay dead. A redrive that has ended is left as it is.
#[utoipa::path(
    delete, path = "/v1/queues/{queue}/redrives/{id}", tag = "dead letters", operation_id = "cancel_redrive",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("id" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "after-the-fix"),
    ),
    responses((status = 204, description = "The redrive is not running"), NoRedrive, Cancels, Reads),
)]
async fn cancel(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    Named(RedriveId(id)): Named<RedriveId>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    state.parts.queue.cancel_redrive(&name, &id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
