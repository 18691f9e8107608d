//! Seek, purge, pause, resume.

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::queues::StartAt;
use super::streams::OFFSET_MAX;
use super::wire;
use crate::domain::id::Generation;
use crate::domain::name::QueueName;
use crate::http::extract::{Check, Json, Named, Query};
use crate::http::openapi::{NoQueue, QueueMoved, Reads, Writes};
use crate::http::problem::Problem;
use crate::http::route::{Routes, route};
use crate::http::state::State;
use crate::queue::{OnLoss, Renewal, Renewed};

/// The place where the queue continues.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Seek, example = json!({"to": {"offset": 1}}))]
struct SeekBody {
    to: StartAt,
    /// For a queue whose log was restored without it: continue anyway. The queue loses messages that the log lacks, and delivers the
    /// messages from the new place on, including those that it has delivered before.
    #[serde(default)]
    accept_loss: bool,
    /// The generation that the request expects: 409 when the queue is in another one. Repeating a request that was carried out returns
    /// its answer and does nothing.
    #[schema(minimum = 1, maximum = 9_007_199_254_740_991_i64)]
    expected_generation: Option<i64>,
}

/// The messages to drop: everything that the stream has by now.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Purge, example = json!({}))]
struct PurgeBody {
    /// The generation that the request expects: 409 when the queue is in another one. Repeating a request that was carried out returns
    /// its answer and does nothing.
    #[schema(minimum = 1, maximum = 9_007_199_254_740_991_i64)]
    expected_generation: Option<i64>,
}

/// The generation that has begun.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = NewGeneration)]
struct WireRenewed {
    /// Receipts of earlier generations are `gone`.
    generation: i64,
    /// The queue continues after this offset.
    through_offset: i64,
    /// True if retention had dropped some of the requested messages: the queue continues with the first one left.
    at_floor: bool,
    /// True if the stream has not reached this place yet: the queue delivers nothing until it has.
    ahead: bool,
}

/// Whether the queue is paused.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Paused)]
struct WirePaused {
    paused: bool,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(route(routes!(seek)).needs_body().once())
        .routes(route(routes!(purge)).once())
        .routes(routes!(pause))
        .routes(routes!(resume))
}

fn expected(check: &mut Check, value: Option<i64>) -> Option<Generation> {
    value.map(|value| Generation(check.integer("/expected_generation", value, 1..=OFFSET_MAX)))
}

fn answer(renewed: Renewed) -> Response {
    let answer = WireRenewed {
        generation: renewed.generation.0,
        through_offset: renewed.through_offset.0,
        at_floor: renewed.at_floor,
        ahead: renewed.ahead,
    };
    wire::json(StatusCode::OK, &answer)
}

/// Continue at another place in the stream, and begin a new generation. Earlier receipts are `gone`; dead letters stay; waiting
/// receives go on.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/seek", tag = "queues", operation_id = "seek_queue",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    request_body = SeekBody,
    responses((status = 200, description = "The new generation", body = WireRenewed), NoQueue, QueueMoved, Writes),
)]
async fn seek(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(body): Json<SeekBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let mut check = Check::default();
    let to = body.to.checked("/to", &mut check);
    let expected = expected(&mut check, body.expected_generation);
    check.finish()?;
    let renewal = Renewal::Seek(to.expect("a place that does not parse is a fault"));
    let on_loss = match body.accept_loss {
        true => OnLoss::Accept,
        false => OnLoss::Refuse,
    };
    let queue = &state.parts.queue;
    let renewed = queue.renew_with(&name, renewal, expected, on_loss).await?;
    Ok(answer(renewed))
}

/// Drop from this queue everything that the stream has by now, and begin a new generation. Other queues keep the messages. Earlier
/// receipts are `gone`; dead letters stay; waiting receives go on.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/purge", tag = "queues", operation_id = "purge_queue",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    request_body = PurgeBody,
    responses((status = 200, description = "The new generation", body = WireRenewed), NoQueue, QueueMoved, Writes),
)]
async fn purge(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(body): Json<PurgeBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let mut check = Check::default();
    let expected = expected(&mut check, body.expected_generation);
    check.finish()?;
    let renewed = state
        .parts
        .queue
        .renew(&name, Renewal::Purge, expected)
        .await?;
    Ok(answer(renewed))
}

/// Pause the queue: it hands out nothing until it is resumed. Receives wait, or answer `paused`; the verbs, expiry and delays go on.
/// Repeating it changes nothing.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/pause", tag = "queues", operation_id = "pause_queue",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    responses((status = 200, description = "The queue is paused", body = WirePaused), NoQueue, Reads),
)]
async fn pause(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
) -> Result<Response, Problem> {
    set_paused(&state, &name, query, true).await
}

/// Resume a paused queue. Repeating it changes nothing.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/resume", tag = "queues", operation_id = "resume_queue",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    responses((status = 200, description = "The queue is not paused", body = WirePaused), NoQueue, Reads),
)]
async fn resume(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
) -> Result<Response, Problem> {
    set_paused(&state, &name, query, false).await
}

async fn set_paused(
    state: &State,
    name: &QueueName,
    query: Query,
    paused: bool,
) -> Result<Response, Problem> {
    query.finish()?;
    state.parts.queue.set_paused(name, paused).await?;
    Ok(wire::json(StatusCode::OK, &WirePaused { paused }))
}
