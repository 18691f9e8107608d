//! Deliveries that came from a queue's owner and did not reach the client: they go back, as they would on the owner itself.
//! To the owner they were written, namely to this node.
//!
//! Deliveries of a receive with an id do not go back: its client asks again, perhaps at another node, and would hold them
//! just as they go back here.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use serde::Deserialize;

use super::{EPOCH, NODE};
use crate::cluster::Owner;
use crate::domain::name::QueueName;
use crate::http::body::{Handed, OnWritten, Outgoing};
use crate::http::state::State;
use crate::queue::{Verb, VerbItem};
use crate::supervisor::OnEnd;

/// How often it is tried. After that they come again when their time is up.
const TRIES: u32 = 3;
/// The pause between tries, and how long each may take.
const PAUSE: Duration = Duration::from_millis(300);
const ANSWER: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
struct Received {
    deliveries: Vec<Delivery>,
}

#[derive(Deserialize)]
struct Delivery {
    receipt: String,
}

/// An answer to a receive on its way to the client.
#[derive(Debug)]
struct OnTheWay {
    state: State,
    queue: QueueName,
    /// Taken when it was written.
    answer: Option<Bytes>,
}

impl OnWritten for OnTheWay {
    fn written(mut self: Box<Self>) {
        self.answer = None;
    }
}

impl Drop for OnTheWay {
    fn drop(&mut self) {
        let Some(answer) = self.answer.take() else {
            return;
        };
        let Ok(received) = serde_json::from_slice::<Received>(&answer) else {
            return;
        };
        let receipts = received.deliveries.into_iter();
        let receipts: Vec<String> = receipts.map(|delivery| delivery.receipt).collect();
        if receipts.is_empty() {
            return;
        }
        let (state, queue) = (self.state.clone(), self.queue.clone());
        self.state
            .supervisor
            .spawn("http unwritten", OnEnd::Ordinary, async move {
                give_back(&state, &queue, receipts).await;
            });
    }
}

/// The body of an owner's answer to a receive, as this node's.
pub(super) fn handed(
    state: &State,
    queue: &QueueName,
    goes_back: bool,
    outgoing: Outgoing,
    body: Bytes,
) -> Body {
    let on_the_way = OnTheWay {
        state: state.clone(),
        queue: queue.clone(),
        answer: goes_back.then(|| body.clone()),
    };
    Body::new(Handed::new(body, Box::new(on_the_way), outgoing))
}

async fn give_back(state: &State, queue: &QueueName, receipts: Vec<String>) {
    for _ in 0..TRIES {
        if try_to_give_back(state, queue, &receipts).await {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
    tracing::debug!(%queue, "deliveries could not be sent, and go out again when they expire");
}

async fn try_to_give_back(state: &State, queue: &QueueName, receipts: &[String]) -> bool {
    match state.parts.queue.locate(queue).await {
        Ok((_, Owner::This)) => {
            let items = receipts.iter().map(|receipt| VerbItem {
                receipt: receipt.clone(),
                ..VerbItem::default()
            });
            let released = state
                .parts
                .queue
                .settle(queue, Verb::Release, items.collect());
            released.await.is_ok()
        }
        Ok((_, Owner::Other { url, .. })) => {
            let Ok(place) = state.peers.place(&url, |_| true) else {
                return false;
            };
            let items = receipts.iter();
            let items = items.map(|receipt| serde_json::json!({ "receipt": receipt }));
            let body = serde_json::json!({ "deliveries": items.collect::<Vec<_>>() });
            let asked = place
                .client
                .post(format!("{url}/v1/queues/{queue}/release"))
                .header(NODE, state.tag.clone())
                .header(EPOCH, 0)
                .timeout(ANSWER)
                .json(&body)
                .send();
            asked.await.is_ok_and(|answer| answer.status().is_success())
        }
        Ok((_, Owner::Nobody)) | Err(_) => false,
    }
}
