//! Origins: their relays' status, and the outbox rows that could not become messages.

use axum::extract::State as Extract;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::streams::OFFSET_MAX;
use super::wire;
use super::words::{self, RelayState};
use crate::domain::name::{OriginName, Topic};
use crate::http::extract::{Check, Json, Named, PAYLOAD_MAX_BYTES, Query, RejectedId};
use crate::http::forward;
use crate::http::openapi::{NoOrigin, NoRejected, Reads, Resends};
use crate::http::problem::{Kind, Problem};
use crate::http::route::Routes;
use crate::http::state::State;
use crate::relay::{self, Correction, Status};

/// The state of a relay that another node has, as this one's stand-in shows it.
const WAITING: &str = relay::State::Waiting.as_str();

/// An origin, as its relay sees it.
#[derive(Debug, Serialize, ToSchema)]
struct Origin {
    #[schema(example = "local")]
    name: String,
    /// The host, port and database.
    place: String,
    /// The table that the relay reads in place of the outbox; null where the outbox is Postroad's own.
    table: Option<String>,
    /// How the table's rows are picked up; null where the outbox is Postroad's own.
    pickup: Option<words::Pickup>,
    /// The relay's state.
    state: RelayState,
    #[schema(format = DateTime)]
    state_since: String,
    /// The reason, if something is wrong.
    detail: Option<String>,
    /// The number of the position that was stored last.
    position: i64,
    /// Everything that was committed before then is in the streams; null until this is known.
    #[schema(format = DateTime)]
    relayed_through: Option<String>,
    /// How long the relay has not been sure that everything is relayed.
    lag_seconds: Option<f64>,
    /// Rows that are known to be committed and are not relayed yet.
    lag_rows: u64,
    /// Messages relayed by this process.
    relayed_count: u64,
    /// Rows that could not become messages and have not been resent.
    rejected_count: u64,
    /// How many times this process read the whole outbox again.
    rerelay_count: u64,
    /// How many times the relay found that emptied rows may be missing from the broker's database, which was restored from a backup:
    /// messages are missing. The count survives restarts; it is null until the answering node has read it.
    gap_count: Option<u64>,
    /// The time of the last one; null if there was none, or while `gap_count` is null.
    #[schema(format = DateTime)]
    gap_at: Option<String>,
    /// The leaf of the outbox that cannot be emptied because a session holds a lock on it.
    blocked: Option<Blocked>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Blocked {
    /// The leaf's table.
    leaf: String,
    /// The session that holds the lock; null for a prepared transaction.
    pid: Option<i32>,
    #[schema(format = DateTime)]
    since: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct Origins {
    /// In the configuration's order.
    origins: Vec<Origin>,
}

/// Outbox rows that could not become messages.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RejectedPage)]
struct Rejected {
    /// Oldest first.
    rejected: Vec<RejectedRow>,
    /// Pass this as `after` to get the next page; null at the end.
    next_after: Option<i64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct RejectedRow {
    #[schema(minimum = 1)]
    id: i64,
    /// Its number in the outbox.
    seq: i64,
    /// The reason why it was rejected.
    reason: String,
    /// The row, as an object of its columns.
    #[schema(value_type = serde_json::Value)]
    row: Option<Box<RawValue>>,
    #[schema(format = DateTime)]
    rejected_at: String,
    /// The time when the row was resent.
    #[schema(format = DateTime)]
    resent_at: Option<String>,
}

/// The number of deleted rows.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RejectedCleared)]
struct Cleared {
    /// Rows that existed and were deleted.
    #[schema(minimum = 0)]
    deleted: u64,
}

/// Corrections to the row. The row keeps what is left out.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Resend, example = json!({"topic": "orders.created"}))]
struct Resend {
    /// Another topic.
    #[schema(
        min_length = 1,
        max_length = 255,
        pattern = "^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$"
    )]
    topic: Option<String>,
    /// Another payload, as text.
    payload: Option<String>,
    /// Send the row even if it does not match its topic's schema.
    #[serde(default)]
    skip_schema: bool,
}

/// The message that was published.
#[derive(Debug, Serialize, ToSchema)]
struct Resent {
    stream: Option<String>,
    /// The message's offset; null for a scheduled message, which enters its stream at its `deliver_at`.
    #[schema(minimum = 1)]
    offset: Option<i64>,
    /// True if the message was published before.
    duplicate: bool,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(routes!(describe))
        .routes(routes!(rejected, clear_rejected))
        .routes(routes!(remove_rejected))
        .routes(routes!(resend))
}

fn origin(status: Status, now: DateTime<Utc>) -> Origin {
    // What this node knew of gaps when it last had the relay may be over.
    let is_elsewhere = status.state == relay::State::Waiting;
    let gap_at = status.gap_at.filter(|_| !is_elsewhere);
    Origin {
        lag_seconds: status.lag(now).map(|lag| lag.as_secs_f64()),
        name: status.name.to_string(),
        place: status.place,
        pickup: status
            .mapped
            .as_ref()
            .map(|mapped| words::Pickup(mapped.pickup)),
        table: status.mapped.map(|mapped| mapped.table),
        state: RelayState(status.state),
        state_since: wire::time(status.state_since),
        detail: status.detail,
        position: status.position,
        relayed_through: status.relayed_through.map(wire::time),
        lag_rows: status.lag_rows,
        relayed_count: status.relayed_count,
        rejected_count: status.rejected_count,
        rerelay_count: status.rerelay_count,
        gap_count: status.gap_count.filter(|_| !is_elsewhere),
        gap_at: gap_at.map(wire::time),
        blocked: status.blocked.map(|blocked| Blocked {
            leaf: blocked.leaf,
            pid: blocked.pid,
            since: wire::time(blocked.since),
        }),
    }
}

/// List the origins.
#[utoipa::path(
    get, path = "/v1/origins", tag = "origins", operation_id = "list_origins",
    responses((status = 200, description = "All origins", body = Origins), Reads),
)]
async fn list(
    Extract(state): Extract<State>,
    headers: HeaderMap,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let now = state.parts.cluster.now();
    let origins = state.parts.relay.origins();
    let origins: Vec<Origin> = origins
        .into_iter()
        .map(|status| origin(status, now))
        .collect();
    if !forward::has_others(&state, &headers) {
        return Ok(wire::json(StatusCode::OK, &Origins { origins }));
    }
    let own = origins.iter().map(serde_json::to_value);
    let own = own.collect::<Result<Vec<_>, _>>();
    let own = own.map_err(|error| Problem::internal(&error))?;
    let others = forward::ask_all(&state, "/v1/origins").await;
    let origins = forward::merge(own, others, "origins", |origin| origin["state"] == WAITING);
    let origins = serde_json::json!({ "origins": origins });
    Ok(wire::json(StatusCode::OK, &origins))
}

/// Describe an origin.
#[utoipa::path(
    get, path = "/v1/origins/{origin}", tag = "origins", operation_id = "describe_origin",
    params(("origin" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "local")),
    responses((status = 200, description = "The origin", body = Origin), NoOrigin, Reads),
)]
async fn describe(
    Extract(state): Extract<State>,
    Named(name): Named<OriginName>,
    headers: HeaderMap,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let wanted = name.to_string();
    let status = state
        .parts
        .relay
        .watch(&name)
        .map(|status| status.borrow().clone());
    let status = status.ok_or(crate::relay::RejectedError::OriginNotFound { name })?;
    let own = origin(status, state.parts.cluster.now());
    if own.state == RelayState(relay::State::Waiting) && forward::has_others(&state, &headers) {
        // The node that relays it knows more.
        let others = forward::ask_all(&state, "/v1/origins").await;
        let origins = forward::merge(Vec::new(), others, "origins", |origin| {
            origin["state"] == WAITING
        });
        let found = origins.iter().find(|origin| origin["name"] == wanted);
        if let Some(found) = found {
            return Ok(wire::json(StatusCode::OK, found));
        }
    }
    Ok(wire::json(StatusCode::OK, &own))
}

/// List the outbox rows of an origin that could not become messages.
#[utoipa::path(
    get, path = "/v1/origins/{origin}/rejected", tag = "origins", operation_id = "list_rejected",
    params(
        ("origin" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "local"),
        ("after" = Option<i64>, Query, description = "Only rows after this number", minimum = 0, maximum = 9_007_199_254_740_991_i64),
        ("max_rows" = Option<i64>, Query, description = "At most this many; 100 by default", minimum = 1, maximum = 1000),
    ),
    responses((status = 200, description = "A page", body = Rejected), NoOrigin, Reads),
)]
async fn rejected(
    Extract(state): Extract<State>,
    Named(name): Named<OriginName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let after = query.integer("after", 0..=OFFSET_MAX).unwrap_or(0);
    let limit = query.integer("max_rows", 1..=1_000).unwrap_or(100);
    query.finish()?;
    let limit = u32::try_from(limit).unwrap_or(1);
    let page = state.parts.relay.rejected(&name, after, limit).await?;
    let rows = page.rows.into_iter().map(|row| RejectedRow {
        id: row.id,
        seq: row.seq,
        reason: row.reason,
        row: RawValue::from_string(row.outbox_row).ok(),
        rejected_at: wire::time(row.rejected_at),
        resent_at: row.resent_at.map(wire::time),
    });
    let answer = Rejected {
        rejected: rows.collect(),
        next_after: page.next_after,
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

/// Delete the rejected rows of an origin up to a number.
#[utoipa::path(
    delete, path = "/v1/origins/{origin}/rejected", tag = "origins",
    params(
        ("origin" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "local"),
        ("through" = i64, Query, description = "Delete rows up to this number", minimum = 1, maximum = 9_007_199_254_740_991_i64),
    ),
    responses((status = 200, description = "Deleted", body = Cleared), NoOrigin, Reads),
)]
async fn clear_rejected(
    Extract(state): Extract<State>,
    Named(name): Named<OriginName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let through = query.integer("through", 1..=OFFSET_MAX);
    query.finish()?;
    let Some(through) = through else {
        return Err(Problem::new(
            Kind::InvalidRequest,
            "`through` is missing: the number up to which rows are deleted",
        ));
    };
    let deleted = state
        .parts
        .relay
        .delete_rejected(&name, 0..=through)
        .await?;
    Ok(wire::json(StatusCode::OK, &Cleared { deleted }))
}

/// Delete a rejected row. Repeating it changes nothing.
#[utoipa::path(
    delete, path = "/v1/origins/{origin}/rejected/{id}", tag = "origins",
    params(
        ("origin" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "local"),
        ("id" = i64, Path, description = "The row's number in the list", minimum = 1, maximum = 9_007_199_254_740_991_i64),
    ),
    responses((status = 204, description = "It does not exist"), NoOrigin, Reads),
)]
async fn remove_rejected(
    Extract(state): Extract<State>,
    Named(name): Named<OriginName>,
    Named(RejectedId(id)): Named<RejectedId>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    state.parts.relay.delete_rejected(&name, id..=id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Resend a rejected row, corrected or as it is.
#[utoipa::path(
    post, path = "/v1/origins/{origin}/rejected/{id}/resend", tag = "origins", operation_id = "resend_rejected",
    params(
        ("origin" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "local"),
        ("id" = i64, Path, description = "The row's number in the list", minimum = 1, maximum = 9_007_199_254_740_991_i64),
    ),
    request_body = Resend,
    responses((status = 200, description = "The message that was published", body = Resent), NoRejected, Resends),
)]
async fn resend(
    Extract(state): Extract<State>,
    Named(name): Named<OriginName>,
    Named(RejectedId(id)): Named<RejectedId>,
    query: Query,
    Json(resend): Json<Resend, PAYLOAD_MAX_BYTES>,
) -> Result<Response, Problem> {
    query.finish()?;
    let mut check = Check::default();
    let correction = Correction {
        topic: resend
            .topic
            .and_then(|text| check.parsed("/topic", &text, Topic::parse)),
        payload: resend.payload,
        skip_schema: resend.skip_schema,
    };
    check.finish()?;
    let placed = state
        .parts
        .relay
        .resend_rejected(&name, id, correction)
        .await?;
    let names = state
        .stream_names(std::iter::once(placed.stream))
        .await
        .unwrap_or_default();
    let answer = Resent {
        stream: names.get(&placed.stream).map(ToString::to_string),
        offset: placed.scheduled.is_none().then_some(placed.offset.0),
        duplicate: placed.duplicate,
    };
    Ok(wire::json(StatusCode::OK, &answer))
}
