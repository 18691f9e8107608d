//! Deliveries: receive, the verbs, and the list of what is in flight.

use axum::Extension;
use axum::body::Body;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::queues::TWELVE_HOURS;
use super::streams::OFFSET_MAX;
use super::wire::{self, Event};
use crate::domain::id::Offset;
use crate::domain::name::QueueName;
use crate::domain::policy::{CONSUMER_MAX_BYTES, REASON_MAX_BYTES};
use crate::http::body::{Handed, OnWritten, Outgoing};
use crate::http::extract::{Check, Json, Named, Query};
use crate::http::openapi::{NoQueue, QueueBounds, Reads, Writes};
use crate::http::problem::Problem;
use crate::http::state::State;
use crate::queue::{
    BATCH_MAX, Handout, InFlightFilter, Outcome, ReceiveRequest, Received, Verb, VerbItem, WAIT_MAX,
};

/// How to receive. Everything is optional.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Receive, example = json!({"max_messages": 10, "wait_seconds": 0, "consumer": "billing-1"}))]
struct Receive {
    /// At most so many messages; 10 without.
    #[schema(minimum = 1, maximum = 1000)]
    max_messages: Option<i64>,
    /// At most so many bytes of events, but one message always; 4 MiB without.
    #[schema(minimum = 1, maximum = 16_777_216)]
    max_bytes: Option<i64>,
    /// How long to wait for the first message; 20 without.
    #[schema(minimum = 0, maximum = 50)]
    wait_seconds: Option<f64>,
    /// How long the deliveries are held; as the queue says without.
    #[schema(minimum = 1, maximum = 43200)]
    visibility_timeout_seconds: Option<f64>,
    /// Who receives, for the list of what is in flight.
    #[schema(min_length = 1, max_length = 255, pattern = "^[!-~]+$")]
    consumer: Option<String>,
    /// Repeated under the same id while its deliveries live, a receive gives the same deliveries.
    #[schema(min_length = 1, max_length = 255, pattern = "^[!-~]+$")]
    receive_id: Option<String>,
}

/// What was received.
#[derive(ToSchema)]
#[schema(as = Received)]
#[expect(dead_code, reason = "describes what is printed by hand")]
struct WireReceived {
    /// By offset.
    deliveries: Vec<Delivery>,
    /// Why there are none: `empty`, `paused`, `in_flight_full`, `waiting_for_keys` or `delayed`.
    #[schema(required = false, nullable = false, value_type = String)]
    reason: Option<String>,
    /// When a delayed message falls due or a live one expires.
    #[schema(required = false, format = DateTime)]
    next_due_at: Option<String>,
}

/// One handing-out of one message.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is printed by hand")]
struct Delivery {
    /// What it is settled by.
    receipt: String,
    /// Its number, ever rising per message.
    delivery: u32,
    /// The number of the attempt: deliveries that count.
    attempt: u32,
    #[schema(minimum = 1)]
    offset: i64,
    topic: String,
    /// Until when it is held for this consumer.
    #[schema(format = DateTime)]
    visible_until: String,
    event: Event,
}

macro_rules! verb_bodies {
    ($($body:ident, $item:ident, $schema:ident, $item_schema:ident { $($(#[$attr:meta])* $field:ident: $type:ty,)* })*) => {$(
        /// Which deliveries.
        #[derive(Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        #[schema(as = $schema)]
        struct $body {
            #[schema(min_items = 1, max_items = 1000)]
            deliveries: Vec<$item>,
        }

        /// One delivery.
        #[derive(Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        #[schema(as = $item_schema)]
        struct $item {
            /// The receipt, as it was handed out.
            receipt: String,
            $($(#[$attr])* $field: $type,)*
        }
    )*};
}

verb_bodies! {
    AckBody, AckItem, Ack, AckDelivery {}
    NackBody, NackItem, Nack, NackDelivery {
        /// Not before so long; by the queue's retry policy without.
        #[schema(minimum = 0, maximum = 43200)]
        delay_seconds: Option<f64>,
        /// Why it failed, for the dead letter.
        #[schema(min_length = 1, max_length = 1024)]
        reason: Option<String>,
    }
    ExtendBody, ExtendItem, Extend, ExtendDelivery {
        /// Held for so long from now on; the queue's visibility timeout without.
        #[schema(minimum = 1, maximum = 43200)]
        visibility_timeout_seconds: Option<f64>,
    }
    ReleaseBody, ReleaseItem, Release, ReleaseDelivery {
        /// Not before so long; at once without.
        #[schema(minimum = 0, maximum = 43200)]
        delay_seconds: Option<f64>,
    }
    RejectBody, RejectItem, Reject, RejectDelivery {
        /// Why it cannot succeed, for the dead letter.
        #[schema(min_length = 1, max_length = 1024)]
        reason: Option<String>,
    }
}

/// What became of each delivery, in the order sent.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Settled)]
struct WireSettled {
    /// Deliveries for which the verb did what it says, now or before.
    settled: usize,
    /// The others.
    refused: usize,
    deliveries: Vec<WireOutcome>,
}

/// What became of one delivery.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = Outcome)]
struct WireOutcome {
    receipt: String,
    /// `acked`, `nacked`, `extended`, `released`, `rejected`, `already_settled`, `dead_lettered`, `stale`, `gone` or
    /// `unknown`.
    result: &'static str,
    /// With `nacked` and `released`: when it goes out again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    due_at: Option<String>,
    /// With `extended`: until when it is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    visible_until: Option<String>,
    /// The dead letter that the message has become.
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letter: Option<String>,
    /// With `stale`: the current attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    attempt: Option<u32>,
}

/// Live deliveries.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = InFlightPage)]
struct WireInFlight {
    /// By offset.
    deliveries: Vec<LiveDelivery>,
    /// The next page is the one `after` this offset; null at the end.
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

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new()
        .routes(routes!(receive))
        .routes(routes!(ack))
        .routes(routes!(nack))
        .routes(routes!(extend))
        .routes(routes!(release))
        .routes(routes!(reject))
        .routes(routes!(in_flight))
}

impl OnWritten for Handout {
    fn written(self: Box<Self>) {
        (*self).written();
    }
}

impl Receive {
    fn checked(self) -> Result<ReceiveRequest, Problem> {
        let default = ReceiveRequest::default();
        let mut check = Check::default();
        let max_messages = self.max_messages.map_or(default.max_messages, |value| {
            let most = i64::try_from(BATCH_MAX).unwrap_or(i64::MAX);
            u32::try_from(check.integer("/max_messages", value, 1..=most)).unwrap_or(1)
        });
        let max_bytes = self.max_bytes.map_or(default.max_bytes, |value| {
            check
                .integer("/max_bytes", value, 1..=16 * 1024 * 1024)
                .unsigned_abs()
        });
        let wait = self.wait_seconds.map_or(default.wait, |value| {
            check.seconds("/wait_seconds", value, 0.0..=WAIT_MAX.as_secs_f64())
        });
        let visibility_timeout = self
            .visibility_timeout_seconds
            .map(|value| check.seconds("/visibility_timeout_seconds", value, 1.0..=TWELVE_HOURS));
        for (pointer, text) in [
            ("/consumer", &self.consumer),
            ("/receive_id", &self.receive_id),
        ] {
            if let Some(text) = text {
                check.text(pointer, text, CONSUMER_MAX_BYTES);
            }
        }
        check.finish()?;
        Ok(ReceiveRequest {
            max_messages,
            max_bytes,
            wait,
            visibility_timeout,
            consumer: self.consumer,
            receive_id: self.receive_id,
        })
    }
}

/// Receive messages, waiting for the first one if need be.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/receive", tag = "deliveries",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "billing")),
    request_body = Receive,
    responses((status = 200, description = "Deliveries, or why there are none", body = WireReceived), NoQueue, QueueBounds, Writes),
)]
async fn receive(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    outgoing: Option<Extension<Outgoing>>,
    Json(receive): Json<Receive>,
) -> Result<Response, Problem> {
    query.finish()?;
    let request = receive.checked()?;
    let received = tokio::select! {
        // What was decided just now goes out although the process stops.
        biased;
        received = state.parts.queue.receive(&name, request) => received?,
        () = state.stopping.cancelled() => {
            let empty = &br#"{"deliveries":[],"reason":"empty","next_due_at":null}"#[..];
            return Ok(wire::json_bytes(StatusCode::OK, empty.into()));
        }
    };
    let body = print(&received);
    if received.deliveries.is_empty() {
        return Ok(wire::json_bytes(StatusCode::OK, body.into()));
    }
    let outgoing = outgoing
        .map(|Extension(outgoing)| outgoing)
        .unwrap_or_default();
    let handed = Handed::new(body.into(), Box::new(received.handout), outgoing);
    Ok(wire::json_body(StatusCode::OK, Body::new(handed)))
}

/// Events are spliced in as they are.
fn print(received: &Received) -> Vec<u8> {
    let bytes: usize = received
        .deliveries
        .iter()
        .map(|delivery| delivery.entry.event.len() + 512)
        .sum();
    let mut out = Vec::with_capacity(bytes + 128);
    out.extend_from_slice(b"{\"deliveries\":[");
    for (number, delivery) in received.deliveries.iter().enumerate() {
        out.extend_from_slice(if number > 0 {
            b",{\"receipt\":"
        } else {
            b"{\"receipt\":"
        });
        wire::put(&mut out, &delivery.receipt);
        out.extend_from_slice(b",\"delivery\":");
        wire::put(&mut out, &delivery.delivery);
        out.extend_from_slice(b",\"attempt\":");
        wire::put(&mut out, &delivery.attempt);
        out.extend_from_slice(b",\"offset\":");
        wire::put(&mut out, &delivery.entry.offset);
        out.extend_from_slice(b",\"topic\":");
        wire::put(&mut out, &delivery.entry.topic);
        out.extend_from_slice(b",\"visible_until\":");
        wire::put(&mut out, &wire::time(delivery.visible_until));
        out.extend_from_slice(b",\"event\":");
        out.extend_from_slice(&delivery.entry.event);
        out.push(b'}');
    }
    out.push(b']');
    if received.deliveries.is_empty() {
        out.extend_from_slice(b",\"reason\":");
        wire::put(
            &mut out,
            &received
                .reason
                .unwrap_or(crate::domain::queue::EmptyReason::Empty),
        );
        out.extend_from_slice(b",\"next_due_at\":");
        wire::put(&mut out, &received.next_due_at.map(wire::time));
    }
    out.push(b'}');
    out
}

/// Gathers and checks the items of a verb.
#[derive(Default)]
struct Items {
    items: Vec<VerbItem>,
    check: Check,
}

impl Items {
    fn delay(
        &mut self,
        field: &str,
        value: Option<f64>,
        least: f64,
    ) -> Option<std::time::Duration> {
        let pointer = format!("/deliveries/{}/{field}", self.items.len());
        value.map(|value| self.check.seconds(&pointer, value, least..=TWELVE_HOURS))
    }

    fn reason(&mut self, reason: Option<String>) -> Option<String> {
        let pointer = format!("/deliveries/{}/reason", self.items.len());
        if let Some(text) = &reason {
            self.check.text(&pointer, text, REASON_MAX_BYTES);
        }
        reason
    }

    async fn settle(
        mut self,
        state: &State,
        name: &QueueName,
        verb: Verb,
    ) -> Result<Response, Problem> {
        if self.items.is_empty() || self.items.len() > BATCH_MAX {
            self.check.fault(
                "/deliveries",
                format!("`deliveries` must have 1 to {BATCH_MAX} items"),
            );
        }
        self.check.finish()?;
        let receipts: Vec<String> = self.items.iter().map(|item| item.receipt.clone()).collect();
        let outcomes = state.parts.queue.settle(name, verb, self.items).await?;
        let settled = outcomes.iter().filter(|outcome| outcome.is_done()).count();
        let deliveries = receipts.into_iter().zip(&outcomes);
        let answer = WireSettled {
            settled,
            refused: outcomes.len() - settled,
            deliveries: deliveries
                .map(|(receipt, outcome)| wire_outcome(receipt, outcome))
                .collect(),
        };
        Ok(wire::json(StatusCode::OK, &answer))
    }
}

fn wire_outcome(receipt: String, outcome: &Outcome) -> WireOutcome {
    let mut wire = WireOutcome {
        receipt,
        ..WireOutcome::default()
    };
    let at = |at: crate::domain::queue::At| wire::time(at.into());
    match outcome {
        Outcome::Acked => wire.result = "acked",
        Outcome::Nacked {
            due_at,
            dead_letter,
        } => {
            wire.result = "nacked";
            wire.due_at = due_at.map(at);
            wire.dead_letter.clone_from(dead_letter);
        }
        Outcome::Released {
            due_at,
            dead_letter,
        } => {
            wire.result = "released";
            wire.due_at = due_at.map(at);
            wire.dead_letter.clone_from(dead_letter);
        }
        Outcome::Extended { visible_until } => {
            wire.result = "extended";
            wire.visible_until = Some(at(*visible_until));
        }
        Outcome::Rejected { dead_letter } => {
            wire.result = "rejected";
            wire.dead_letter = Some(dead_letter.clone());
        }
        Outcome::AlreadySettled => wire.result = "already_settled",
        Outcome::DeadLettered { dead_letter } => {
            wire.result = "dead_lettered";
            wire.dead_letter = Some(dead_letter.clone());
        }
        Outcome::Stale { attempt } => {
            wire.result = "stale";
            wire.attempt = Some(*attempt);
        }
        Outcome::Gone { .. } => wire.result = "gone",
        Outcome::Unknown => wire.result = "unknown",
    }
    wire
}

/// Settle deliveries: done.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/ack", tag = "deliveries",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "billing")),
    request_body = AckBody,
    responses((status = 200, description = "What became of each", body = WireSettled), NoQueue, Writes),
)]
async fn ack(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(body): Json<AckBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let items = body.deliveries.into_iter().map(|item| VerbItem {
        receipt: item.receipt,
        ..VerbItem::default()
    });
    let items = Items {
        items: items.collect(),
        ..Items::default()
    };
    items.settle(&state, &name, Verb::Ack).await
}

/// Give deliveries back as failed: they are tried again later, or become dead letters.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/nack", tag = "deliveries",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "billing")),
    request_body = NackBody,
    responses((status = 200, description = "What became of each", body = WireSettled), NoQueue, Writes),
)]
async fn nack(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(body): Json<NackBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let mut items = Items::default();
    for item in body.deliveries {
        let item = VerbItem {
            delay: items.delay("delay_seconds", item.delay_seconds, 0.0),
            reason: items.reason(item.reason),
            receipt: item.receipt,
            extend_by: None,
        };
        items.items.push(item);
    }
    items.settle(&state, &name, Verb::Nack).await
}

/// Hold deliveries for longer.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/extend", tag = "deliveries",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "billing")),
    request_body = ExtendBody,
    responses((status = 200, description = "What became of each", body = WireSettled), NoQueue, Writes),
)]
async fn extend(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(body): Json<ExtendBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let mut items = Items::default();
    for item in body.deliveries {
        let item = VerbItem {
            extend_by: items.delay(
                "visibility_timeout_seconds",
                item.visibility_timeout_seconds,
                1.0,
            ),
            receipt: item.receipt,
            ..VerbItem::default()
        };
        items.items.push(item);
    }
    items.settle(&state, &name, Verb::Extend).await
}

/// Give deliveries back unhandled: the attempt does not count.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/release", tag = "deliveries",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "billing")),
    request_body = ReleaseBody,
    responses((status = 200, description = "What became of each", body = WireSettled), NoQueue, Writes),
)]
async fn release(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(body): Json<ReleaseBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let mut items = Items::default();
    for item in body.deliveries {
        let item = VerbItem {
            delay: items.delay("delay_seconds", item.delay_seconds, 0.0),
            receipt: item.receipt,
            ..VerbItem::default()
        };
        items.items.push(item);
    }
    items.settle(&state, &name, Verb::Release).await
}

/// Refuse deliveries for good: they become dead letters.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/reject", tag = "deliveries",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "billing")),
    request_body = RejectBody,
    responses((status = 200, description = "What became of each", body = WireSettled), NoQueue, Writes),
)]
async fn reject(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    Json(body): Json<RejectBody>,
) -> Result<Response, Problem> {
    query.finish()?;
    let mut items = Items::default();
    for item in body.deliveries {
        let item = VerbItem {
            reason: items.reason(item.reason),
            receipt: item.receipt,
            ..VerbItem::default()
        };
        items.items.push(item);
    }
    items.settle(&state, &name, Verb::Reject).await
}

/// List live deliveries.
#[utoipa::path(
    get, path = "/v1/queues/{queue}/in-flight", tag = "deliveries",
    params(
        ("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]+$", example = "billing"),
        ("consumer" = Option<String>, Query, description = "Of this consumer only", min_length = 1, max_length = 255),
        ("after" = Option<i64>, Query, description = "Of offsets after this one", minimum = 0, maximum = 9_007_199_254_740_991_i64),
        ("max_messages" = Option<i64>, Query, description = "At most so many; 100 without", minimum = 1, maximum = 1000),
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
