//! Reads the whole body of a request, within a size, a time and the common budget of all bodies.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use tokio::time::{Instant, timeout, timeout_at};

use super::body::Outgoing;
use super::budget::{Full, SMALL_BYTES, Share};
use super::door;
use super::problem::{Kind, Problem};
use super::state::State;

/// How much of a body that is too large is read and thrown away, so that its sender gets to read the answer.
const DISCARD_MAX_BYTES: usize = 64 * 1024 * 1024;
/// The time limit.
const DISCARD_TIME: Duration = Duration::from_secs(3);

/// The whole body, within the server's limits of size and time.
#[derive(Debug, Clone)]
pub(in crate::http) struct Whole(pub(in crate::http) Bytes);

impl FromRequest<State> for Whole {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &State) -> Result<Self, Problem> {
        Self::within(request, state, state.options.body_max_bytes).await
    }
}

/// Reasons why reading a body stops.
enum Stop {
    TooLarge,
    NoRoom(Problem),
    Failed(Problem),
}

impl Whole {
    /// Reads a body up to a size limit. The bytes hold their share of the memory for bodies until they are dropped.
    pub(in crate::http) async fn within(
        request: Request,
        state: &State,
        limit: usize,
    ) -> Result<Self, Problem> {
        let limit = limit.min(state.options.body_max_bytes);
        let announced = door::announced(request.headers());
        let is_expected = door::expects(request.headers());
        let outgoing = request.extensions().get::<Outgoing>().cloned();
        if let Some(whole) = request.extensions().get::<Self>() {
            // It was read already, to be passed on if need be.
            if whole.0.len() > limit {
                return Err(too_large(limit));
            }
            if let Some(outgoing) = outgoing {
                outgoing.was_read();
            }
            return Ok(whole.clone());
        }
        let mut body = request.into_body();
        let stop = match announced.map(|length| usize::try_from(length).unwrap_or(usize::MAX)) {
            Some(length) if length > limit => Stop::TooLarge,
            Some(length) if !state.bodies.has_room(length) => {
                Stop::NoRoom(state.bodies.full().into())
            }
            length => match read(
                &mut body,
                state,
                limit,
                length.unwrap_or(0),
                outgoing.as_ref(),
            )
            .await
            {
                Ok(bytes) => {
                    if let Some(outgoing) = outgoing {
                        outgoing.was_read();
                    }
                    return Ok(Self(bytes));
                }
                Err(Stop::Failed(problem)) => return Err(problem),
                Err(stop) => stop,
            },
        };
        if !is_expected {
            // A sender that waits for a word gets the answer for it; any other is to have sent before it reads.
            discard(body).await;
        }
        Err(match stop {
            Stop::TooLarge => too_large(limit),
            Stop::NoRoom(problem) | Stop::Failed(problem) => problem,
        })
    }
}

async fn read(
    body: &mut Body,
    state: &State,
    limit: usize,
    announced: usize,
    outgoing: Option<&Outgoing>,
) -> Result<Bytes, Stop> {
    let deadline = Instant::now() + state.options.body_timeout;
    let mut whole = Growing::new(state.bodies.share(), announced);
    loop {
        let frame = async {
            let Some(outgoing) = outgoing else {
                return body.frame().await;
            };
            tokio::select! {
                biased;
                frame = body.frame() => return frame,
                () = outgoing.end_seen() => {}
            }
            // Nothing is left of it, and it is not whole.
            outgoing.waits();
            body.frame().await
        };
        let frame = match timeout_at(deadline, frame).await {
            Err(_) => {
                let time = state.options.body_timeout;
                let detail = format!("the body was not complete after {time:?}");
                return Err(Stop::Failed(Problem::new(Kind::RequestTimeout, detail)));
            }
            Ok(None) => {
                return Ok(whole.done());
            }
            Ok(Some(Err(error))) => {
                let detail = format!("the body could not be read: {error}");
                return Err(Stop::Failed(Problem::new(Kind::MalformedRequest, detail)));
            }
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if whole.bytes.len() + data.len() > limit {
            return Err(Stop::TooLarge);
        }
        whole
            .push(&data)
            .map_err(|full| Stop::NoRoom(full.into()))?;
    }
}

/// A body as far as it came, with its share of the memory for bodies.
struct Growing {
    bytes: Vec<u8>,
    share: Share,
    announced: usize,
}

impl Growing {
    fn new(share: Share, announced: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(announced.min(SMALL_BYTES)),
            share,
            announced,
        }
    }

    fn push(&mut self, data: &[u8]) -> Result<(), Full> {
        let length = self.bytes.len() + data.len();
        if length <= self.bytes.capacity() {
            // Of what was announced, only what came is touched.
            self.share.grow(length)?;
        } else if self.announced >= length {
            self.share.grow(length)?;
            self.bytes.reserve_exact(self.announced - self.bytes.len());
        } else {
            // It grows by half each time, and all of that counts: the allocator gives out memory that was in use before.
            let capacity = length.max(self.bytes.capacity() / 2 * 3);
            self.share.grow(capacity)?;
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    fn done(self) -> Bytes {
        match self.bytes.is_empty() {
            true => Bytes::new(),
            false => self.share.keep(self.bytes),
        }
    }
}

/// Reads some of a body that is of no use, so that its sender gets to read the answer.
pub(in crate::http) async fn discard(mut body: Body) {
    let _ = timeout(DISCARD_TIME, async {
        let mut discarded = 0;
        while let Some(Ok(frame)) = body.frame().await {
            discarded += frame.data_ref().map_or(0, Bytes::len);
            if discarded > DISCARD_MAX_BYTES {
                break;
            }
        }
    })
    .await;
}

pub(in crate::http) fn too_large(limit: usize) -> Problem {
    let detail = format!("the body is larger than {limit} bytes");
    Problem::new(Kind::PayloadTooLarge, detail).with("limit_bytes", limit)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::http::budget::Budget;

    #[test]
    fn a_body_counts_as_what_it_takes() {
        let budget = Budget::new(16 << 20, "bodies");
        let all = budget.free();
        // In pieces, as chunks come: what is reserved for more counts.
        let mut growing = Growing::new(budget.share(), 0);
        let mut most_moved = 0;
        for _ in 0..100 {
            let before = growing.bytes.capacity();
            growing.push(&[7; 10_000]).unwrap();
            let held = all - budget.free();
            assert!(held >= growing.bytes.capacity(), "{held}");
            most_moved += usize::from(before != growing.bytes.capacity());
        }
        assert!(most_moved < 20, "moved {most_moved} times");
        let body = growing.done();
        assert_eq!(body.len(), 1_000_000);
        assert!(all - budget.free() < 1_600_000);
        drop(body);
        assert_eq!(budget.free(), all);
        // The announced length counts as the bytes come.
        let mut growing = Growing::new(budget.share(), 8 << 20);
        growing.push(&[7; 100_000]).unwrap();
        assert!(all - budget.free() < 110_000);
        // Without room it is as it was.
        assert!(growing.push(&vec![7; 15 << 20]).is_err());
        assert_eq!(growing.done().len(), 100_000);
        assert_eq!(budget.free(), all);
        assert!(Growing::new(budget.share(), 0).done().is_empty());
    }
}
