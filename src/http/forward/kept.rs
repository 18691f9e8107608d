//! A request on its way to a queue's owner, even if the owner changes meanwhile.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use axum::http::header::{CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use axum::http::request::Parts;
use bytes::Bytes;
use tokio::time::Instant;

use super::{Acked, Passed, Waited};
use crate::http::body::Outgoing;
use crate::http::budget::SMALL_BYTES;
use crate::http::extract::{VERB_MAX_BYTES, Whole};
use crate::http::problem::Problem;
use crate::http::state::State;

/// A request that can be sent more than once.
pub(super) struct Kept {
    pub(super) parts: Parts,
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
    pub(super) async fn read(state: &State, request: Request) -> Result<Self, Problem> {
        let (mut parts, body) = request.into_parts();
        let is_receive = is_receive(&parts);
        let most = match is_receive || is_verb(&parts) {
            true => VERB_MAX_BYTES,
            false => SMALL_BYTES,
        };
        let whole = Request::from_parts(parts.clone(), body);
        let Whole(body) = Whole::within(whole, state, most).await?;
        // They are of the body as it was sent.
        for name in [CONTENT_LENGTH, TRANSFER_ENCODING, EXPECT] {
            parts.headers.remove(name);
        }
        let since = Instant::now();
        let mut kept = Self {
            parts,
            body,
            since,
            wait: Duration::ZERO,
            until: since,
            is_in_line: false,
            goes_back: false,
            has_asked: false,
            acked: None,
        };
        if is_receive {
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
        // Whoever reads it here takes it as it is, without a copy and a second share of the memory.
        extensions.insert(Whole(self.body.clone()));
        if let Some(acked) = &self.acked {
            extensions.insert(acked.clone());
        }
        request
    }

    /// Whether a repeat is safe when nobody knows what became of the first.
    fn may_be_repeated(&self) -> bool {
        let path = matched_path(&self.parts);
        self.parts.method != Method::POST
            || !["/redrives", "/seek", "/purge", "/in-flight/expire"]
                .iter()
                .any(|end| path.ends_with(end))
    }
}

fn matched_path(parts: &Parts) -> &str {
    let path = parts.extensions.get::<MatchedPath>();
    path.map_or("", MatchedPath::as_str)
}

pub(super) fn is_receive(parts: &Parts) -> bool {
    matched_path(parts).ends_with("/receive")
}

/// Whether it names deliveries.
fn is_verb(parts: &Parts) -> bool {
    let verbs = ["/ack", "/nack", "/extend", "/release", "/reject"];
    verbs.iter().any(|verb| matched_path(parts).ends_with(verb))
}

impl Kept {
    pub(super) fn unanswered(&self) -> Passed {
        match self.may_be_repeated() {
            true => Passed::Moved,
            false => Passed::Unknown,
        }
    }
}
