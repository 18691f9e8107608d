//! The verbs: ack, nack, extend, release, reject. All have the same answer: the result for each delivery.

use std::time::Duration;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::UtoipaMethodRouter;
use utoipa_axum::routes;

use crate::domain::name::QueueName;
use crate::domain::policy::REASON_MAX_BYTES;
use crate::http::extract::{Check, Json, Named, Query, VERB_MAX_BYTES};
use crate::http::openapi::{NoQueue, Writes};
use crate::http::problem::Problem;
use crate::http::route::{Route, Routes, route};
use crate::http::routes::queues::TWELVE_HOURS;
use crate::http::routes::wire;
use crate::http::state::State;
use crate::queue::{BATCH_MAX, Outcome, Verb, VerbItem};

/// A verb's body, its item, and its route, which differ in the fields of an item only.
macro_rules! verb {
    (
        $(#[$doc:meta])*
        $route:ident($path:literal, $verb:expr): $body:ident as $schema:ident,
        $item:ident as $item_schema:ident { $($(#[$attr:meta])* $field:ident: $type:ty,)* }
        => |$items:ident, $sent:ident| { $($set:ident: $value:expr),* }
    ) => {
        /// The deliveries, each named by its receipt.
        #[derive(Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        #[schema(as = $schema)]
        struct $body {
            #[schema(min_items = 1, max_items = 1000)]
            deliveries: Vec<$item>,
        }

        /// One delivery.
        #[derive(Debug, Deserialize, Serialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        #[schema(as = $item_schema)]
        pub(super) struct $item {
            /// The receipt, as it was handed out.
            pub(super) receipt: String,
            $($(#[$attr])* $field: $type,)*
        }

        $(#[$doc])*
        #[utoipa::path(
            post, path = $path, tag = "deliveries",
            params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
            request_body = $body,
            responses((status = 200, description = "The result for each delivery", body = WireSettled), NoQueue, Writes),
        )]
        async fn $route(
            Extract(state): Extract<State>,
            Named(name): Named<QueueName>,
            query: Query,
            Json(body): Json<$body, VERB_MAX_BYTES>,
        ) -> Result<Response, Problem> {
            query.finish()?;
            let mut $items = Items::default();
            for $sent in body.deliveries {
                let item = VerbItem {
                    $($set: $value,)*
                    receipt: $sent.receipt,
                    ..VerbItem::default()
                };
                $items.items.push(item);
            }
            $items.settle(&state, &name, $verb).await
        }
    };
}

verb! {
    /// Acknowledge deliveries: they are done.
    ack("/v1/queues/{queue}/ack", Verb::Ack): AckBody as Ack,
    AckItem as AckDelivery {} => |items, item| {}
}

verb! {
    /// Give deliveries back as failed: their messages are retried later, or become dead letters.
    nack("/v1/queues/{queue}/nack", Verb::Nack): NackBody as Nack,
    NackItem as NackDelivery {
        /// Try again no sooner than after this delay; by default the queue's retry policy decides.
        #[schema(minimum = 0, maximum = 43200)]
        delay_seconds: Option<f64>,
        /// The reason of the failure, kept for the dead letter.
        #[schema(min_length = 1, max_length = 1024)]
        reason: Option<String>,
    } => |items, item| {
        delay: items.seconds("delay_seconds", item.delay_seconds, 0.0),
        reason: items.reason(item.reason)
    }
}

verb! {
    /// Extend deliveries: hold them for longer.
    extend("/v1/queues/{queue}/extend", Verb::Extend): ExtendBody as Extend,
    ExtendItem as ExtendDelivery {
        /// Hold the delivery for this long from now on; by default the queue's visibility timeout.
        #[schema(minimum = 1, maximum = 43200)]
        visibility_timeout_seconds: Option<f64>,
    } => |items, item| {
        extend_by: items.seconds("visibility_timeout_seconds", item.visibility_timeout_seconds, 1.0)
    }
}

verb! {
    /// Give deliveries back unhandled: the attempt does not count.
    release("/v1/queues/{queue}/release", Verb::Release): ReleaseBody as Release,
    ReleaseItem as ReleaseDelivery {
        /// Hand the message out no sooner than after this delay; at once by default.
        #[schema(minimum = 0, maximum = 43200)]
        delay_seconds: Option<f64>,
    } => |items, item| {
        delay: items.seconds("delay_seconds", item.delay_seconds, 0.0)
    }
}

verb! {
    /// Reject deliveries for good: their messages become dead letters.
    reject("/v1/queues/{queue}/reject", Verb::Reject): RejectBody as Reject,
    RejectItem as RejectDelivery {
        /// The reason why it cannot succeed, kept for the dead letter.
        #[schema(min_length = 1, max_length = 1024)]
        reason: Option<String>,
    } => |items, item| {
        reason: items.reason(item.reason)
    }
}

/// The result for each delivery, in the order of the request.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Settled)]
pub(super) struct WireSettled {
    /// The number of deliveries for which the verb's effect holds, from this request or an earlier one: `ack` counts those that are
    /// `already_settled`, and `nack`, `release` and `reject` count those that are `dead_lettered` by this very delivery. So a repeat
    /// of a request whose answer was lost counts like the first.
    settled: usize,
    /// The number of other deliveries.
    refused: usize,
    deliveries: Vec<WireOutcome>,
}

/// The result for one delivery.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Outcome)]
struct WireOutcome {
    receipt: String,
    result: Word,
    /// With `nacked` and `released`: the time when the message goes out again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    due_at: Option<String>,
    /// With `extended`: the consumer holds the delivery until then.
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

/// The result for a delivery, in a word.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = OutcomeResult)]
enum Word {
    Acked,
    Nacked,
    Extended,
    Released,
    Rejected,
    /// It was settled before.
    AlreadySettled,
    /// It is a dead letter.
    DeadLettered,
    /// A later delivery exists.
    Stale,
    /// The message, or the queue's generation, is gone.
    Gone,
    /// An earlier message of its key is not settled.
    Blocked,
    /// The receipt is none of this queue's.
    Unknown,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(verb(routes!(ack)))
        .routes(verb(routes!(nack)))
        .routes(verb(routes!(extend)))
        .routes(verb(routes!(release)))
        .routes(verb(routes!(reject)))
}

/// A verb's route. A repeat finds what the first did.
fn verb(routes: UtoipaMethodRouter<State>) -> Route {
    route(routes).needs_body().names_deliveries()
}

/// Gathers and checks the items of a verb.
#[derive(Default)]
struct Items {
    items: Vec<VerbItem>,
    check: Check,
}

impl Items {
    fn seconds(&mut self, field: &str, value: Option<f64>, least: f64) -> Option<Duration> {
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
        let answer = WireSettled::new(verb, receipts, &outcomes);
        Ok(wire::json(StatusCode::OK, &answer))
    }
}

impl WireSettled {
    pub(super) fn new(verb: Verb, receipts: Vec<String>, outcomes: &[Outcome]) -> Self {
        let settled = outcomes.iter();
        let settled = settled.filter(|outcome| outcome.is_done(verb)).count();
        let deliveries = receipts.into_iter().zip(outcomes);
        Self {
            settled,
            refused: outcomes.len() - settled,
            deliveries: deliveries
                .map(|(receipt, outcome)| wire_outcome(receipt, outcome))
                .collect(),
        }
    }
}

fn wire_outcome(receipt: String, outcome: &Outcome) -> WireOutcome {
    let at = |at: crate::domain::queue::At| wire::time(at.into());
    let said = |result| WireOutcome {
        receipt,
        result,
        due_at: None,
        visible_until: None,
        dead_letter: None,
        attempt: None,
    };
    match outcome {
        Outcome::Acked => said(Word::Acked),
        Outcome::Nacked {
            due_at,
            dead_letter,
        } => WireOutcome {
            due_at: due_at.map(at),
            dead_letter: dead_letter.clone(),
            ..said(Word::Nacked)
        },
        Outcome::Released {
            due_at,
            dead_letter,
        } => WireOutcome {
            due_at: due_at.map(at),
            dead_letter: dead_letter.clone(),
            ..said(Word::Released)
        },
        Outcome::Extended { visible_until } => WireOutcome {
            visible_until: Some(at(*visible_until)),
            ..said(Word::Extended)
        },
        Outcome::Rejected { dead_letter } => WireOutcome {
            dead_letter: Some(dead_letter.clone()),
            ..said(Word::Rejected)
        },
        Outcome::AlreadySettled => said(Word::AlreadySettled),
        Outcome::DeadLettered { dead_letter, .. } => WireOutcome {
            dead_letter: Some(dead_letter.clone()),
            ..said(Word::DeadLettered)
        },
        Outcome::Stale { attempt } => WireOutcome {
            attempt: Some(*attempt),
            ..said(Word::Stale)
        },
        Outcome::Gone { .. } => said(Word::Gone),
        Outcome::Blocked => said(Word::Blocked),
        Outcome::Unknown => said(Word::Unknown),
    }
}
