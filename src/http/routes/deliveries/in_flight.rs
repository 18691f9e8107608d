//! The list of live deliveries.

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::domain::id::Offset;
use crate::domain::name::QueueName;
use crate::domain::policy::CONSUMER_MAX_BYTES;
use crate::http::extract::{Check, Json, Named, Query};
use crate::http::openapi::{NoQueue, Reads, Writes};
use crate::http::problem::Problem;
use crate::http::route::{Routes, route};
use crate::http::routes::streams::{OFFSET_MAX, parse_time};
use crate::http::routes::wire;
use crate::http::state::State;
use crate::queue::{Expire, INSPECT_MAX, InFlightFilter, Whose};

/// Live deliveries.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = InFlightPage)]
struct WireInFlight {
    /// By offset.
    deliveries: Vec<LiveDelivery>,
    /// Pass this as `after` to get the next page; null at the end.
    next_after: Option<i64>,
}

/// A live delivery.
#[derive(Debug, Serialize, ToSchema)]
struct LiveDelivery {
    offset: i64,
    delivery: u32,
    attempt: u32,
    consumer: Option<String>,
    #[schema(format = DateTime)]
    delivered_at: String,
    #[schema(format = DateTime)]
    visible_until: String,
}

/// The deliveries to end: those of a consumer, or those of some messages.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExpireInFlight, example = json!({"consumer": "billing-1"}))]
struct ExpireBody {
    /// End this consumer's deliveries. Not together with `offsets`.
    #[schema(min_length = 1, max_length = 255)]
    consumer: Option<String>,
    /// End the deliveries of these messages.
    #[schema(min_items = 1, max_items = 1000)]
    offsets: Option<Vec<i64>>,
    /// Only deliveries that began before this time: a repeat then ends none that began since.
    #[schema(format = DateTime)]
    delivered_before: Option<String>,
}

/// The deliveries that ended.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ExpiredInFlight)]
struct WireExpired {
    /// The number of deliveries.
    expired: usize,
    /// The offsets of their messages, in order.
    offsets: Vec<i64>,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(in_flight))
        .routes(route(routes!(expire)).needs_body().once())
}

/// List live deliveries.
#[utoipa::path(
    get, path = "/v1/queues/{queue}/in-flight", tag = "deliveries", operation_id = "list_in_flight",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing"),
        ("consumer" = Option<String>, Query, description = "Only deliveries of this consumer", min_length = 1, max_length = 255),
        ("after" = Option<i64>, Query, description = "Only messages after this offset", minimum = 0, maximum = 9_007_199_254_740_991_i64),
        ("max_messages" = Option<i64>, Query, description = "At most this many; 100 by default", minimum = 1, maximum = 1000),
    ),
    responses((status = 200, description = "A page", body = WireInFlight), NoQueue, Reads),
)]
async fn in_flight(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let consumer = query.text("consumer");
    if consumer
        .as_ref()
        .is_some_and(|text| text.is_empty() || text.len() > CONSUMER_MAX_BYTES)
    {
        query.fault(
            "consumer",
            format!("`consumer` must be 1 to {CONSUMER_MAX_BYTES} bytes long"),
            None,
        );
    }
    let after = Offset(query.integer("after", 0..=OFFSET_MAX).unwrap_or(0));
    let limit =
        usize::try_from(query.integer("max_messages", 1..=1_000).unwrap_or(100)).unwrap_or(1);
    query.finish()?;
    let filter = InFlightFilter {
        consumer,
        after,
        limit,
    };
    let live = state.parts.queue.in_flight(&name, filter).await?;
    let next_after = live
        .last()
        .filter(|_| live.len() >= limit)
        .map(|last| last.offset.0);
    let deliveries = live.into_iter().map(|live| LiveDelivery {
        offset: live.offset.0,
        delivery: live.delivery,
        attempt: live.attempt,
        consumer: live.consumer,
        delivered_at: wire::time(live.delivered_at),
        visible_until: wire::time(live.visible_until),
    });
    let answer = WireInFlight {
        deliveries: deliveries.collect(),
        next_after,
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

/// End live deliveries early, as if they had expired: the attempts count, and the messages go out again. Repeating it ends the
/// deliveries that are live then; `delivered_before` excludes those that began since.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/in-flight/expire", tag = "deliveries", operation_id = "expire_in_flight",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    request_body = ExpireBody,
    responses((status = 200, description = "The deliveries that ended", body = WireExpired), NoQueue, Writes),
)]
async fn expire(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(body): Json<ExpireBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let offsets = state.parts.queue.expire(&name, body.checked()?).await?;
    let answer = WireExpired {
        expired: offsets.len(),
        offsets: offsets.into_iter().map(|offset| offset.0).collect(),
    };
    Ok(wire::json(StatusCode::OK, &answer))
}

impl ExpireBody {
    fn checked(self) -> Result<Expire, Problem> {
        let mut check = Check::default();
        let before = self.delivered_before.as_deref();
        let delivered_before =
            before.and_then(|text| check.parsed("/delivered_before", text, parse_time));
        let whose = match (self.consumer, self.offsets) {
            (Some(consumer), None) => {
                check.text("/consumer", &consumer, CONSUMER_MAX_BYTES);
                Whose::Consumer(consumer)
            }
            (None, Some(offsets)) => {
                if offsets.is_empty() || offsets.len() > INSPECT_MAX {
                    let detail = format!("`offsets` must have 1 to {INSPECT_MAX} numbers");
                    check.fault("/offsets", detail);
                }
                let offsets = offsets.iter().take(INSPECT_MAX).enumerate();
                let offsets = offsets.map(|(index, &offset)| {
                    Offset(check.integer(&format!("/offsets/{index}"), offset, 1..=OFFSET_MAX))
                });
                Whose::Offsets(offsets.collect())
            }
            _ => {
                check.fault("", "give either `consumer` or `offsets`");
                Whose::Offsets(Vec::new())
            }
        };
        check.finish()?;
        Ok(Expire {
            whose,
            delivered_before,
        })
    }
}
