//! A long poll for a queue of another node: it asks there at once, and then whenever its turn comes.
//!
//! A poll that wants its batch filled does not join the line, because polls behind it should take ready messages meanwhile.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use prometheus_client::metrics::gauge::Gauge;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use super::line::Turn;
use super::{Kept, Passed, Received, ask, read, unwritten};
use crate::cluster::Owner;
use crate::domain::id::{Epoch, Slot};
use crate::domain::name::QueueName;
use crate::http::body::Outgoing;
use crate::http::extract::{parse_json, require_json};
use crate::http::problem::{Kind, Problem};
use crate::http::routes::Receive;
use crate::http::state::State;
use crate::queue::WAIT_MAX;

impl Kept {
    /// Reads what a receive asks, and keeps that in place of its body.
    pub(super) fn understand(&mut self, state: &State) -> Result<(), Problem> {
        require_json(&self.parts.headers)?;
        let receive: Receive = match self.body.is_empty() {
            true => parse_json(b"{}")?,
            false => parse_json(&self.body)?,
        };
        let (wait, batch_wait) = receive.waits();
        self.wait = wait;
        // One that wants its batch filled is not in the line, nor what its owner will refuse.
        self.is_in_line = !wait.is_zero() && batch_wait.is_zero();
        self.goes_back = !receive.has_id();
        // The room that the body had first, or the two would need it twice.
        self.body = Bytes::new();
        self.body = state.bodies.keep(print(&receive))?;
        Ok(())
    }

    /// Its acknowledgements are done: they are left out from here on.
    fn forget_acks(&mut self, state: &State, acked: Acked) -> Result<(), Problem> {
        let mut receive: Receive = parse_json(&self.body)?;
        receive.forget_acks();
        self.acked = Some(acked);
        self.body = state.bodies.keep(print(&receive))?;
        Ok(())
    }
}

fn print(receive: &Receive) -> Vec<u8> {
    serde_json::to_vec(receive).expect("it has string keys only")
}

/// The results for deliveries that a long poll brought along: they are settled while it waits on.
#[derive(Debug, Clone)]
pub(in crate::http) struct Acked(pub(in crate::http) Arc<RawValue>);

/// How many deliveries an answer has, for the node that passed the request on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) struct Deliveries(pub(in crate::http) usize);

/// An answer without deliveries.
#[derive(Deserialize)]
struct Nothing {
    ack: Option<Box<RawValue>>,
    deliveries: Vec<IgnoredAny>,
}

/// The members of an answer as they are, in their order.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;

        impl<'de> Visitor<'de> for Read {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, _>()? {
                    members.push((Cow::Owned(name), value));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Read)
    }
}

impl Serialize for Members<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl Received {
    /// None with messages; else what became of what it brought along. Most answers with messages are not read: the owner says how many
    /// it has. A node of the previous build does not, and its answer is read to know.
    fn nothing(&self) -> Option<Option<Acked>> {
        if !self.status.is_success() || self.deliveries.is_some_and(|count| count > 0) {
            return None;
        }
        let answer: Nothing = serde_json::from_slice(&self.body).ok()?;
        let acked = answer.ack.map(|acked| Acked(acked.into()));
        answer.deliveries.is_empty().then_some(acked)
    }

    /// Adds the earlier results of acknowledgements.
    fn with(mut self, acked: Option<&Acked>) -> Self {
        if let Some(Acked(acked)) = acked
            && self.status.is_success()
            && let Ok(Members(mut members)) = serde_json::from_slice(&self.body)
        {
            members.insert(0, (Cow::Borrowed("ack"), acked));
            let body = serde_json::to_vec(&Members(members)).expect("it has string keys only");
            self.body = body.into();
        }
        self
    }
}

/// The result of waiting in line.
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
    if kept.is_in_line {
        let time = kept.wait;
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
                        && let Err(problem) = kept.forget_acks(state, acked)
                    {
                        return Passed::Answered(problem.into_response());
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

/// Waits for a turn, until its time is over or that node no longer owns the queue.
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
    // Until all of it is here the owner takes it back if the client goes.
    read(state, kept, answer).await
}

fn hand_on(state: &State, kept: &Kept, queue: &QueueName, received: Received) -> Response {
    let outgoing = kept.parts.extensions.get::<Outgoing>();
    let outgoing = outgoing.cloned().unwrap_or_default();
    let received = received.with(kept.acked.as_ref());
    let goes_back = kept.goes_back && received.status.is_success();
    received.with_body(|body| unwritten::handed(state, queue, goes_back, outgoing, body))
}

fn stopping() -> Response {
    Problem::new(Kind::Stopping, "the broker is stopping").into_response()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use axum::http::{HeaderMap, StatusCode};

    use super::*;

    fn received(status: StatusCode, body: &'static str, deliveries: Option<usize>) -> Received {
        Received {
            status,
            headers: HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
            deliveries,
            share: None,
        }
    }

    const NOTHING: &str = r#"{"ack":{"deliveries":[]},"deliveries":[],"reason":"empty"}"#;
    const BOTH: &str = r#"{"ack":{"deliveries":[]},"deliveries":[{"receipt":"r"}]}"#;

    #[test]
    fn an_answer_with_nothing_is_told_from_one_with_messages() {
        // A node of the previous build does not say how many there are.
        for said in [Some(0), None] {
            let acked = received(StatusCode::OK, NOTHING, said).nothing().unwrap();
            assert_eq!(acked.unwrap().0.get(), r#"{"deliveries":[]}"#);
            let empty = r#"{ "reason": "empty", "deliveries": [ ] }"#;
            let empty = received(StatusCode::OK, empty, said);
            assert!(empty.nothing().unwrap().is_none());
        }
        assert!(received(StatusCode::OK, BOTH, None).nothing().is_none());
        let unread = received(StatusCode::OK, NOTHING, Some(1));
        assert!(unread.nothing().is_none(), "what the owner says counts");
        let refused = received(StatusCode::CONFLICT, NOTHING, None);
        assert!(refused.nothing().is_none());
    }

    #[test]
    fn what_was_acknowledged_is_in_the_answer() {
        let acked = received(StatusCode::OK, NOTHING, Some(0))
            .nothing()
            .unwrap();
        let some =
            r#"{"deliveries":[{"receipt":"r","event":{"data":1.50, "x":"\u0061"}}],"more":null}"#;
        let with = received(StatusCode::OK, some, Some(1)).with(acked.as_ref());
        let expected = some.replacen('{', r#"{"ack":{"deliveries":[]},"#, 1);
        assert_eq!(with.body, expected, "the rest is as it was, byte for byte");
        let refused = received(StatusCode::CONFLICT, "{}", None).with(acked.as_ref());
        assert_eq!(refused.body, "{}");
    }
}
