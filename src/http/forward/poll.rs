//! A long poll for a queue of another node: asked there at once, and then in its turn.
//!
//! One that wants its batch filled is not in the line: those behind it are to take what is ready meanwhile.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use prometheus_client::metrics::gauge::Gauge;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::line::Turn;
use super::{Kept, Passed, ask, end_to_end, unwritten};
use crate::cluster::Owner;
use crate::domain::id::{Epoch, Slot};
use crate::domain::name::QueueName;
use crate::http::body::Outgoing;
use crate::http::problem::{Kind, Problem};
use crate::http::state::State;
use crate::queue::{ReceiveRequest, WAIT_MAX};

#[derive(Deserialize)]
struct Wire {
    wait_seconds: Option<f64>,
    batch_wait_seconds: Option<f64>,
}

/// How long a receive waits in line for messages. None for what the line is not for, and for what its owner will refuse.
fn wait_of(body: &[u8]) -> Option<Duration> {
    let wire: Wire = serde_json::from_slice(body).ok()?;
    let default = ReceiveRequest::default();
    let seconds = |given: Option<f64>, default| match given {
        Some(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        None => Some(default),
    };
    let wait = seconds(wire.wait_seconds, default.wait)?;
    let batch_wait = seconds(wire.batch_wait_seconds, default.batch_wait)?;
    (!wait.is_zero() && batch_wait.is_zero()).then_some(wait)
}

/// A receive's body without what it acknowledges.
fn without_acks(body: &[u8]) -> Option<Bytes> {
    let mut body: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(body).ok()?;
    body.remove("ack");
    Some(serde_json::Value::Object(body).to_string().into())
}

/// What became of deliveries that a long poll brought along: answered, while it waits on.
#[derive(Debug, Clone)]
pub(in crate::http) struct Acked(pub(in crate::http) Arc<RawValue>);

/// A node's answer to a receive.
struct Received {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Received {
    /// None with messages; else what became of what it brought along. Goes by how this broker prints it: an answer with messages is
    /// long, and is not read.
    fn nothing(&self) -> Option<Option<Acked>> {
        let (acked, rest) = match self.body.strip_prefix(b"{\"ack\":") {
            Some(body) => {
                let mut values =
                    serde_json::Deserializer::from_slice(body).into_iter::<Box<RawValue>>();
                let acked = values.next()?.ok()?;
                let rest = body[values.byte_offset()..].strip_prefix(b",")?;
                (Some(Acked(acked.into())), rest)
            }
            None => (None, self.body.strip_prefix(b"{")?),
        };
        let is_nothing = self.status.is_success() && rest.starts_with(b"\"deliveries\":[]");
        is_nothing.then_some(acked)
    }

    /// With what was acknowledged before.
    fn with(mut self, acked: Option<&Acked>) -> Self {
        if let Some(Acked(acked)) = acked
            && self.status.is_success()
            && let Some(rest) = self.body.strip_prefix(b"{")
        {
            let acked = acked.get().as_bytes();
            self.body = [b"{\"ack\":", acked, b",", rest].concat().into();
        }
        self
    }
}

/// What waiting in line came to.
enum Waited {
    /// It may go, with a turn or since its time is over.
    Goes(Option<Turn>),
    /// The queue has another owner by now.
    Moved,
    Stopping,
}

/// Passes a receive on; a long poll in its turn.
pub(super) async fn pass_on(
    state: &State,
    kept: &mut Kept,
    (queue, slot): (&QueueName, Slot),
    to: (i64, &str, Epoch),
) -> Passed {
    let mut turn = None;
    if let Some(time) = wait_of(&kept.body) {
        match state.lines.join(queue) {
            Ok(taken) => turn = Some(taken),
            Err(coming) => {
                // What is there at once is had at once, and what is wrong with the request is told.
                if !std::mem::replace(&mut kept.has_asked, true) {
                    // Boxed, here and below: what waits in line has no need of its place.
                    let asking = Box::pin(receive(state, kept, slot, to, WAIT_MAX));
                    let received = match asking.await {
                        Ok(received) => received,
                        Err(passed) => return passed,
                    };
                    let Some(nothing) = received.nothing() else {
                        return Passed::Answered(hand_on(state, kept, queue, received));
                    };
                    if let Some(acked) = nothing
                        && let Some(body) = without_acks(&kept.body)
                    {
                        (kept.acked, kept.body) = (Some(acked), body);
                    }
                }
                match wait(state, kept, slot, to, (time, coming)).await {
                    Waited::Goes(taken) => turn = taken,
                    Waited::Moved => return Passed::Moved,
                    Waited::Stopping => return Passed::Answered(stopping()),
                }
            }
        }
    }
    match Box::pin(receive(state, kept, slot, to, Duration::ZERO)).await {
        Ok(received) => {
            if let Some(turn) = turn {
                turn.answered(received.nothing().is_none());
            }
            Passed::Answered(hand_on(state, kept, queue, received))
        }
        Err(passed) => passed,
    }
}

/// One more, until it is dropped.
struct Counted(Gauge);

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Waits for a turn, until its time is over or the queue is not that node's any more.
async fn wait(
    state: &State,
    kept: &Kept,
    slot: Slot,
    (node, ..): (i64, &str, Epoch),
    (time, coming): (Duration, tokio::sync::oneshot::Receiver<Turn>),
) -> Waited {
    let _counted = Counted::new(&state.parts.metrics.polls_in_line);
    let lease = slot.lease_name();
    let mut views = state.parts.cluster.views();
    let moved = views.wait_for(
        |view| !matches!(view.owner(&lease), Owner::Other { node: owner, .. } if owner == node),
    );
    tokio::select! {
        biased;
        turn = coming => Waited::Goes(turn.ok()),
        _ = moved => Waited::Moved,
        () = state.stopping.cancelled() => Waited::Stopping,
        () = tokio::time::sleep_until(kept.since + time) => Waited::Goes(None),
    }
}

/// Sends a receive and reads all of the answer. `waited`: how long it is to have waited already, at least.
async fn receive(
    state: &State,
    kept: &Kept,
    slot: Slot,
    to: (i64, &str, Epoch),
    waited: Duration,
) -> Result<Received, Passed> {
    let asking = ask(state, kept, slot, to, waited);
    let answer = tokio::select! {
        biased;
        answer = asking => answer?,
        // Taken away there, the poll hands out nothing.
        () = state.stopping.cancelled() => return Err(Passed::Answered(stopping())),
    };
    let (status, headers) = (answer.status(), end_to_end(answer.headers()));
    // Until all of it is here the owner takes it back if the client goes.
    match answer.bytes().await {
        Ok(body) => Ok(Received {
            status,
            headers,
            body,
        }),
        Err(_) => Err(kept.unanswered()),
    }
}

fn hand_on(state: &State, kept: &Kept, queue: &QueueName, received: Received) -> Response {
    let outgoing = kept.parts.extensions.get::<Outgoing>();
    let outgoing = outgoing.cloned().unwrap_or_default();
    let received = received.with(kept.acked.as_ref());
    let Received {
        status,
        headers,
        body,
    } = received;
    let body = unwritten::handed(state, queue, &kept.body, outgoing, status, body);
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

fn stopping() -> Response {
    Problem::new(Kind::Stopping, "the broker is stopping").into_response()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn polls_are_read() {
        let seconds = Duration::from_secs;
        assert_eq!(wait_of(b"{}"), Some(seconds(20)));
        let body = br#"{"wait_seconds": 5, "ack": [{"receipt": "r"}], "consumer": "c"}"#;
        assert_eq!(wait_of(body), Some(seconds(5)));
        let without = without_acks(body).unwrap();
        assert_eq!(without, r#"{"consumer":"c","wait_seconds":5}"#);
        for other in [
            r#"{"wait_seconds": 0}"#,
            r#"{"wait_seconds": -1}"#,
            r#"{"batch_wait_seconds": 1}"#,
            r#"{"ack": [}"#,
            "[]",
            "",
        ] {
            assert_eq!(wait_of(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn what_was_acknowledged_is_in_the_answer() {
        let received = |status, body: &'static str| Received {
            status,
            headers: HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
        };
        let nothing = r#"{"ack":{"deliveries":[]},"deliveries":[],"reason":"empty"}"#;
        let acked = received(StatusCode::OK, nothing).nothing().unwrap();
        let acked = acked.unwrap();
        assert_eq!(acked.0.get(), r#"{"deliveries":[]}"#);
        let empty = received(StatusCode::OK, r#"{"deliveries":[],"reason":"empty"}"#);
        assert!(empty.nothing().unwrap().is_none());
        let some = r#"{"deliveries":[{"receipt":"r"}]}"#;
        assert!(received(StatusCode::OK, some).nothing().is_none());
        let some = received(StatusCode::OK, some).with(Some(&acked)).body;
        assert_eq!(
            some,
            r#"{"ack":{"deliveries":[]},"deliveries":[{"receipt":"r"}]}"#
        );
        let with_both = r#"{"ack":{"deliveries":[]},"deliveries":[{"receipt":"r"}]}"#;
        assert!(received(StatusCode::OK, with_both).nothing().is_none());
        let refused = received(StatusCode::CONFLICT, "{}").with(Some(&acked)).body;
        assert_eq!(refused, "{}");
    }
}
