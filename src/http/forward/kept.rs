//! A request on its way to a queue's owner, even if the owner changes meanwhile.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use axum::http::request::Parts;
use bytes::Bytes;
use tokio::time::Instant;

use super::{Acked, Passed, Waited};
use crate::http::body::Outgoing;
use crate::http::extract::Whole;
use crate::http::problem::Problem;
use crate::http::route::{Forward, Nature};
use crate::http::state::State;

/// A request that can be sent more than once.
pub(super) struct Kept {
    pub(super) parts: Parts,
    /// How its route goes to the owner.
    pub(super) forward: Forward,
    pub(super) body: Bytes,
    pub(super) since: Instant,
    /// How long it asked to wait.
    pub(super) wait: Duration,
    /// It is answered by then, with whatever there is to say.
    pub(super) until: Instant,
    /// It is a receive that waits in line for messages.
    pub(super) is_in_line: bool,
    /// Deliveries that do not reach the client go back; a client that asks again by its `receive_id` holds them.
    pub(super) goes_back: bool,
    /// The owner was asked before it waited in line.
    pub(super) has_asked: bool,
    /// Its acknowledgements are answered, and no longer in its body.
    pub(super) acked: Option<Acked>,
}

impl Kept {
    /// Reads a request, to send it as often as need be.
    pub(super) async fn read(
        state: &State,
        nature: Nature,
        request: Request,
    ) -> Result<Self, Problem> {
        let (mut parts, body) = request.into_parts();
        let whole = Request::from_parts(parts.clone(), body);
        let Whole(body) = Whole::within(whole, state, nature.body_max_bytes).await?;
        // They are of the body as it was sent.
        for name in [CONTENT_LENGTH, TRANSFER_ENCODING, EXPECT] {
            parts.headers.remove(name);
        }
        let since = Instant::now();
        let mut kept = Self {
            parts,
            forward: nature.forward,
            body,
            since,
            wait: Duration::ZERO,
            until: since,
            is_in_line: false,
            goes_back: false,
            has_asked: false,
            acked: None,
        };
        if nature.forward == Forward::Poll {
            if let Some(outgoing) = kept.parts.extensions.get::<Outgoing>() {
                outgoing.waits();
            }
            kept.understand(state)?;
        }
        kept.until = since + kept.wait + state.parts.cluster.ttl() * 2;
        Ok(kept)
    }

    pub(super) fn request(&self) -> Request {
        let mut request = Request::from_parts(self.parts.clone(), Body::from(self.body.clone()));
        let extensions = request.extensions_mut();
        extensions.insert(Waited(self.since.elapsed()));
        // A reader here takes it as it is, without a copy and a second share of the memory.
        extensions.insert(Whole(self.body.clone()));
        if let Some(acked) = &self.acked {
            extensions.insert(acked.clone());
        }
        request
    }

    /// The owner may have it. A repeat is not safe with every route when nobody knows what became of the first.
    pub(super) const fn unanswered(&self) -> Passed {
        match self.forward {
            Forward::Again | Forward::Poll => Passed::Moved,
            Forward::Once => Passed::Unknown,
        }
    }
}
