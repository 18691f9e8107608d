//! Receive: a long poll, and the answer that carries the messages.

use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::verbs::{AckItem, WireSettled};
use crate::domain::name::QueueName;
use crate::domain::policy::CONSUMER_MAX_BYTES;
use crate::domain::queue::EmptyReason;
use crate::http::body::{Handed, OnWritten, Outgoing};
use crate::http::budget::{Counted, SMALL_BYTES};
use crate::http::extract::{Check, Json, Named, Query, VERB_MAX_BYTES};
use crate::http::forward::{self, Acked, Deliveries, Waited};
use crate::http::openapi::{NoQueue, QueueBounds, Writes};
use crate::http::problem::Problem;
use crate::http::route::{Routes, route};
use crate::http::routes::queues::TWELVE_HOURS;
use crate::http::routes::wire::{self, Event};
use crate::http::routes::words;
use crate::http::state::State;
use crate::queue::{BATCH_MAX, BATCH_WAIT_MAX, Handout, ReceiveRequest, Received, Verb, WAIT_MAX};

/// Options of a receive. All are optional.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Receive, example = json!({"max_messages": 10, "wait_seconds": 0, "consumer": "billing-1"}))]
pub(in crate::http) struct Receive {
    /// At most this many messages; 10 by default.
    #[schema(minimum = 1, maximum = 1000)]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_messages: Option<i64>,
    /// At most this many bytes of events, but always at least one message; 4 MiB by default.
    #[schema(minimum = 1, maximum = 16_777_216)]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_bytes: Option<i64>,
    /// How long to wait for the first message; 20 by default.
    #[schema(minimum = 0, maximum = 50)]
    #[serde(skip_serializing_if = "Option::is_none")]
    wait_seconds: Option<f64>,
    /// How long to wait, after the first message, until there are `max_messages`; 0 by default, and never beyond
    /// `wait_seconds`. Other receives can take ready messages meanwhile.
    #[schema(minimum = 0, maximum = 5)]
    #[serde(skip_serializing_if = "Option::is_none")]
    batch_wait_seconds: Option<f64>,
    /// How long the deliveries are held; by default the queue's visibility timeout.
    #[schema(minimum = 1, maximum = 43200)]
    #[serde(skip_serializing_if = "Option::is_none")]
    visibility_timeout_seconds: Option<f64>,
    /// The consumer's name, shown in the list of live deliveries.
    #[schema(min_length = 1, max_length = 255, pattern = "^[!-~]+$")]
    #[serde(skip_serializing_if = "Option::is_none")]
    consumer: Option<String>,
    /// Repeating a receive under the same id while its deliveries are live returns the same deliveries.
    #[schema(min_length = 1, max_length = 255, pattern = "^[!-~]+$")]
    #[serde(skip_serializing_if = "Option::is_none")]
    receive_id: Option<String>,
    /// Deliveries to acknowledge. They are acknowledged first, in the commit of the new deliveries, and at once: waiting for
    /// messages does not delay it, and abandoning the receive does not undo it.
    #[schema(min_items = 0, max_items = 1000)]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ack: Vec<AckItem>,
}

/// The received messages.
#[derive(ToSchema)]
#[schema(as = Received)]
#[expect(dead_code, reason = "describes what is printed by hand")]
struct WireReceived {
    /// The results for the deliveries to acknowledge; left out if there were none. A refused one does not keep messages from being
    /// handed out.
    #[schema(required = false, nullable = false)]
    ack: Option<WireSettled>,
    /// By offset.
    deliveries: Vec<Delivery>,
    /// The reason why there are no messages.
    #[schema(required = false, nullable = false, value_type = words::EmptyReason)]
    reason: Option<words::EmptyReason>,
    /// The next time when a delayed message falls due or a live delivery expires.
    #[schema(required = false, format = DateTime)]
    next_due_at: Option<String>,
}

/// One delivery of one message.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is printed by hand")]
struct Delivery {
    /// The receipt that settles this delivery.
    receipt: String,
    /// The delivery's number, which rises with each delivery of the message.
    delivery: u32,
    /// The attempt's number. Released deliveries do not count.
    attempt: u32,
    #[schema(minimum = 1)]
    offset: i64,
    topic: String,
    /// This consumer holds the delivery until then.
    #[schema(format = DateTime)]
    visible_until: String,
    event: Event,
}

pub(super) fn routes() -> Routes {
    Routes::new().routes(route(routes!(receive)).polls().names_deliveries())
}

impl OnWritten for Handout {
    fn written(self: Box<Self>) {
        (*self).written();
    }
}

impl Receive {
    /// For how long it asks to wait, for the first message and for others; what its owner will refuse is none.
    pub(in crate::http) fn waits(&self) -> (Duration, Duration) {
        let default = ReceiveRequest::default();
        let seconds = |given: Option<f64>, default, most: Duration| match given {
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .ok()
                .filter(|wait| *wait <= most)
                .unwrap_or_default(),
            None => default,
        };
        (
            seconds(self.wait_seconds, default.wait, WAIT_MAX),
            seconds(self.batch_wait_seconds, default.batch_wait, BATCH_WAIT_MAX),
        )
    }

    /// Whether it can be asked for again by its id.
    pub(in crate::http) const fn has_id(&self) -> bool {
        self.receive_id.is_some()
    }

    /// Leaves out what is to be acknowledged.
    pub(in crate::http) fn forget_acks(&mut self) {
        self.ack = Vec::new();
    }

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
        let batch_wait = self.batch_wait_seconds.map_or(default.batch_wait, |value| {
            let most = BATCH_WAIT_MAX.as_secs_f64();
            check.seconds("/batch_wait_seconds", value, 0.0..=most)
        });
        if self.ack.len() > BATCH_MAX {
            let detail = format!("`ack` must have at most {BATCH_MAX} items");
            check.fault("/ack", detail);
        }
        let visibility_timeout = self
            .visibility_timeout_seconds
            .map(|value| check.seconds("/visibility_timeout_seconds", value, 1.0..=TWELVE_HOURS));
        for (pointer, text) in [
            ("/consumer", &self.consumer),
            ("/receive_id", &self.receive_id),
        ] {
            if let Some(text) = text {
                check.token(pointer, text, CONSUMER_MAX_BYTES);
            }
        }
        check.finish()?;
        Ok(ReceiveRequest {
            max_messages,
            max_bytes,
            wait,
            batch_wait,
            visibility_timeout,
            consumer: self.consumer,
            receive_id: self.receive_id,
            ack: self.ack.into_iter().map(|item| item.receipt).collect(),
        })
    }
}

/// Receive messages; wait for the first one if necessary.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/receive", tag = "deliveries",
    params(("queue" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "billing")),
    request_body = Receive,
    responses((status = 200, description = "Deliveries, or the reason why there are none", body = WireReceived), NoQueue, QueueBounds, Writes),
)]
async fn receive(
    Extract(state): Extract<State>,
    Named(name): Named<QueueName>,
    query: Query,
    (outgoing, waited, acked): (
        Option<Extension<Outgoing>>,
        Option<Extension<Waited>>,
        Option<Extension<Acked>>,
    ),
    Json(receive): Json<Receive, VERB_MAX_BYTES>,
) -> Result<Response, Problem> {
    query.finish()?;
    if let Some(Extension(outgoing)) = &outgoing {
        outgoing.waits();
    }
    // Where another node waits for the answer, or this one did elsewhere.
    let is_passed_on = waited.is_some();
    let mut request = receive.checked()?;
    if !request.wait.is_zero() {
        // Some of it may have passed with a former owner. Not all: no wait at all means another thing.
        let left = request.wait.saturating_sub(forward::waited(waited));
        request.wait = left.max(Duration::from_millis(1));
        request.batch_wait = request.batch_wait.min(request.wait);
    }
    let receipts = request.ack.clone();
    let received = received(&state, &name, request).await?;
    let acks = match acked {
        Some(Extension(acked)) => Acks::Before(acked),
        None if receipts.is_empty() => Acks::None,
        None => Acks::Now(WireSettled::new(Verb::Ack, receipts, &received.acked)),
    };
    let bytes = printed_bytes(&received);
    let share = match bytes > SMALL_BYTES {
        // Without room they go back, as if they had not been written.
        true => Some(Counted::new(state.answers.hold(bytes).await?)),
        false => None,
    };
    let body = print(&received, &acks);
    let count = received.deliveries.len();
    let mut response = match count {
        0 => wire::json_bytes(StatusCode::OK, body.into()),
        _ => {
            let outgoing = outgoing
                .map(|Extension(outgoing)| outgoing)
                .unwrap_or_default();
            let handed = Handed::new(body.into(), Box::new(received.handout), outgoing);
            wire::json_body(StatusCode::OK, Body::new(handed))
        }
    };
    if is_passed_on {
        response.extensions_mut().insert(Deliveries(count));
    }
    if let Some(share) = share {
        response.extensions_mut().insert(share);
    }
    Ok(response)
}

/// The deliveries, or nothing when the process stops. What came along to be acknowledged is waited for even then.
async fn received(
    state: &State,
    name: &QueueName,
    request: ReceiveRequest,
) -> Result<Received, Problem> {
    let has_acks = !request.ack.is_empty();
    let stopping = state.stopping.cancelled();
    tokio::pin!(stopping);
    // Boxed: it is large and soon over, and what waits after it has no need of its place.
    let begun = Box::pin(state.parts.queue.begin_receive(name, request));
    let receiving = tokio::select! {
        biased;
        begun = begun => begun?,
        () = &mut stopping, if !has_acks => return Ok(Received::nothing(EmptyReason::Empty)),
    };
    let acked = receiving.acked.clone();
    tokio::select! {
        // What was decided just now goes out although the process stops.
        biased;
        received = receiving.finish() => Ok(received?),
        () = &mut stopping => Ok(Received { acked, ..Received::nothing(EmptyReason::Empty) }),
    }
}

/// What became of deliveries to acknowledge.
enum Acks {
    None,
    Now(WireSettled),
    /// They were acknowledged while the receive waited on another node.
    Before(Acked),
}

/// How many bytes the answer has, at most or so.
fn printed_bytes(received: &Received) -> usize {
    let deliveries = received.deliveries.iter();
    let bytes = deliveries.map(|delivery| delivery.entry.event.len() + 512);
    bytes.sum::<usize>() + 128
}

/// Events are spliced in as they are, and so is what became of deliveries to acknowledge.
fn print(received: &Received, acks: &Acks) -> Vec<u8> {
    let mut out = Vec::with_capacity(printed_bytes(received));
    out.push(b'{');
    if !matches!(acks, Acks::None) {
        out.extend_from_slice(b"\"ack\":");
        match acks {
            Acks::Now(settled) => wire::put(&mut out, settled),
            Acks::Before(Acked(acked)) => out.extend_from_slice(acked.get().as_bytes()),
            Acks::None => {}
        }
        out.push(b',');
    }
    out.extend_from_slice(b"\"deliveries\":[");
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
        wire::put(&mut out, &received.reason.unwrap_or(EmptyReason::Empty));
        out.extend_from_slice(b",\"next_due_at\":");
        wire::put(&mut out, &received.next_due_at.map(wire::time));
    }
    out.push(b'}');
    out
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use chrono::DateTime;
    use serde_json::Value;
    use utoipa::PartialSchema;

    use super::*;
    use crate::domain::id::{Offset, StreamId};
    use crate::domain::message::{Data, Message};
    use crate::domain::name::Topic;
    use crate::queue::Outcome;

    #[test]
    fn a_receive_is_kept_as_it_was_understood() {
        let read = |text: &str| serde_json::from_str::<Receive>(text).unwrap();
        let seconds = Duration::from_secs_f64;
        for (text, waits) in [
            ("{}", (20.0, 0.0)),
            (r#"{"wait_seconds": 5}"#, (5.0, 0.0)),
            (
                r#"{"wait_seconds": 0, "batch_wait_seconds": 1}"#,
                (0.0, 1.0),
            ),
            (r#"{"wait_seconds": -1}"#, (0.0, 0.0)),
            (r#"{"wait_seconds": 1e300}"#, (0.0, 0.0)),
        ] {
            let waits = (seconds(waits.0), seconds(waits.1));
            assert_eq!(read(text).waits(), waits, "{text}");
        }
        let text = r#" {"wait_seconds": 5,   "ack": [{"receipt": "r"}], "receive_id": "i"} "#;
        let mut receive = read(text);
        assert!(receive.has_id());
        let printed = serde_json::to_string(&receive).unwrap();
        assert_eq!(
            printed,
            r#"{"wait_seconds":5.0,"receive_id":"i","ack":[{"receipt":"r"}]}"#
        );
        receive.forget_acks();
        let printed = serde_json::to_string(&receive).unwrap();
        assert_eq!(printed, r#"{"wait_seconds":5.0,"receive_id":"i"}"#);
    }

    /// An answer with a delivery, and one without.
    fn answers() -> (Received, Received) {
        let message = Message {
            id: "1".to_owned(),
            source: "/s".to_owned(),
            kind: None,
            topic: Topic::parse("orders.created").unwrap(),
            key: None,
            subject: None,
            time: None,
            data_content_type: None,
            data_schema: None,
            data: Data::Json("{}".into()),
            extensions: serde_json::Map::new(),
            expected_version: None,
        };
        let at = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        let entry = crate::stream::entry(StreamId(1), Offset(7), at, &message);
        let delivery = crate::queue::Delivery {
            receipt: "r".to_owned(),
            delivery: 2,
            attempt: 1,
            entry: Arc::new(entry),
            visible_until: at,
        };
        let nothing = Received::nothing(EmptyReason::Paused);
        let some = Received {
            deliveries: vec![delivery],
            ..Received::nothing(EmptyReason::Empty)
        };
        (some, nothing)
    }

    fn settled() -> Acks {
        let receipts = vec!["r".to_owned()];
        Acks::Now(WireSettled::new(Verb::Ack, receipts, &[Outcome::Acked]))
    }

    /// The members that a schema describes, and those that it requires.
    fn described<T: PartialSchema>() -> (BTreeSet<String>, BTreeSet<String>) {
        let schema = serde_json::to_value(T::schema()).unwrap();
        let members = schema["properties"].as_object().unwrap().keys();
        let required = schema["required"].as_array().unwrap().iter();
        let required = required.map(|name| name.as_str().unwrap().to_owned());
        (members.cloned().collect(), required.collect())
    }

    fn members(printed: &Value) -> BTreeSet<String> {
        printed.as_object().unwrap().keys().cloned().collect()
    }

    /// It is printed by hand: no event is copied or read again on its way to a consumer.
    #[test]
    fn the_answer_has_the_members_that_are_described() {
        let (some, nothing) = answers();
        let printed = [print(&some, &settled()), print(&nothing, &Acks::None)];
        let printed = printed.map(|text| serde_json::from_slice::<Value>(&text).unwrap());
        let (all, required) = described::<WireReceived>();
        let found = printed.each_ref().map(members);
        assert_eq!(&found[0] | &found[1], all);
        assert!(found.iter().all(|found| found.is_superset(&required)));
        let (all, required) = described::<Delivery>();
        assert_eq!(all, required);
        assert_eq!(members(&printed[0]["deliveries"][0]), all);
        assert_eq!(printed[1]["reason"], "paused");
    }

    /// A node of the previous build knows an answer with nothing by its first bytes.
    #[test]
    fn an_answer_with_nothing_begins_as_the_previous_build_expects() {
        let (_, nothing) = answers();
        let plain = print(&nothing, &Acks::None);
        assert!(plain.starts_with(br#"{"deliveries":[],"#));
        let acked = String::from_utf8(print(&nothing, &settled())).unwrap();
        let rest = acked.strip_prefix(r#"{"ack":"#).unwrap();
        assert!(rest.contains(r#"},"deliveries":[],"reason""#), "{acked}");
    }
}
