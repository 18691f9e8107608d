//! The memory that all request bodies on their way in, and all answers on their way out, may hold together. One body and
//! one answer have their own bounds; many clients at a time would hold many times that.
//!
//! A body is counted as it arrives, and is refused when there is no room for it (503 `overloaded`), before it is read if it
//! states its length. Small bodies have some room of their own, so that acknowledgements go on while large bodies fill the
//! rest. An answer waits a moment for room before it is made. Both give back their room with their last byte: when they are
//! dropped, or when the kernel has them. A client that does not read its answer loses its connection in bounded time, and
//! with it the answer.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use hyper::body::{Body as _, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::body::{Outgoing, PIECE_BYTES};
use super::problem::{Kind, Problem};
use super::unread::Held;

/// Counted at a time, since permits are 32 bits.
const UNIT_BYTES: usize = 1 << 10;
/// A body or answer up to this size is small.
pub(in crate::http) const SMALL_BYTES: usize = 64 << 10;
/// One part in this many is for small ones alone.
const SMALL_PART: usize = 8;
/// How long an answer waits for room.
const PATIENCE: Duration = Duration::from_secs(5);

/// Some memory for bodies, or for answers.
#[derive(Debug, Clone)]
pub(in crate::http) struct Budget(Arc<Room>);

#[derive(Debug)]
struct Room {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    large_units: u32,
    /// Answers that wait for some.
    waiting: AtomicUsize,
    what: &'static str,
}

/// An answer that waits for room, until it is dropped.
struct Waiting<'b>(&'b Room);

impl<'b> Waiting<'b> {
    fn new(room: &'b Room) -> Self {
        room.waiting.fetch_add(1, Ordering::Relaxed);
        Self(room)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A share of it, until it is dropped.
#[derive(Debug)]
pub(in crate::http) struct Share {
    budget: Budget,
    small: Option<OwnedSemaphorePermit>,
    large: Option<OwnedSemaphorePermit>,
}

/// There is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) struct Full(&'static str);

impl From<Full> for Problem {
    fn from(Full(what): Full) -> Self {
        let detail = format!("{what} in progress use all the memory set aside for them");
        Self::new(Kind::Overloaded, detail)
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

impl Budget {
    /// `what`: in a sentence, "bodies".
    pub(in crate::http) fn new(bytes: usize, what: &'static str) -> Self {
        let small = units(bytes / SMALL_PART).max(1);
        let large = units(bytes).saturating_sub(small).max(1);
        Self(Arc::new(Room {
            small: Arc::new(Semaphore::new(small as usize)),
            large: Arc::new(Semaphore::new(large as usize)),
            large_units: large,
            waiting: AtomicUsize::new(0),
            what,
        }))
    }

    /// Nothing yet, to grow.
    pub(in crate::http) fn share(&self) -> Share {
        Share {
            budget: self.clone(),
            small: None,
            large: None,
        }
    }

    /// The refusal where there is no room.
    pub(in crate::http) fn full(&self) -> Full {
        Full(self.0.what)
    }

    /// True if there is room for this many more bytes now.
    pub(in crate::http) fn has_room(&self, bytes: usize) -> bool {
        let free = self.0.large.available_permits() + self.0.small.available_permits();
        bytes <= SMALL_BYTES || units(bytes) as usize <= free
    }

    /// A share of this many bytes; waits a moment for it. More than the whole budget counts as all of it.
    pub(in crate::http) async fn hold(&self, bytes: usize) -> Result<Share, Full> {
        let mut share = self.share();
        if bytes <= SMALL_BYTES && share.grow(bytes).is_ok() {
            return Ok(share);
        }
        let wanted = units(bytes).min(self.0.large_units);
        let taking = Arc::clone(&self.0.large).acquire_many_owned(wanted);
        let _waiting = Waiting::new(&self.0);
        match timeout(PATIENCE, taking).await {
            Ok(Ok(permit)) => {
                share.large = Some(permit);
                Ok(share)
            }
            Ok(Err(_)) | Err(_) => Err(self.full()),
        }
    }

    /// Bytes that hold their share for as long as any of them is there.
    pub(in crate::http) fn keep(&self, bytes: Vec<u8>) -> Result<Bytes, Full> {
        let mut share = self.share();
        share.grow(bytes.len())?;
        Ok(Bytes::from_owner(Kept {
            bytes,
            _share: share,
        }))
    }

    #[cfg(test)]
    pub(in crate::http) fn free(&self) -> usize {
        (self.0.large.available_permits() + self.0.small.available_permits()) * UNIT_BYTES
    }
}

impl Share {
    /// True if others wait for room.
    pub(in crate::http) fn is_wanted(&self) -> bool {
        self.budget.0.waiting.load(Ordering::Relaxed) > 0
    }

    fn units(&self) -> u32 {
        let of = |permit: &Option<OwnedSemaphorePermit>| {
            permit.as_ref().map_or(0, |permit| permit.num_permits())
        };
        u32::try_from(of(&self.small) + of(&self.large)).unwrap_or(u32::MAX)
    }

    /// Grows it to this many bytes, or leaves it as it is.
    pub(in crate::http) fn grow(&mut self, bytes: usize) -> Result<(), Full> {
        let wanted = units(bytes).saturating_sub(self.units());
        if wanted == 0 {
            return Ok(());
        }
        let mut take = |semaphore: &Arc<Semaphore>, to: Place| -> bool {
            let Ok(permit) = Arc::clone(semaphore).try_acquire_many_owned(wanted) else {
                return false;
            };
            let held = match to {
                Place::Small => &mut self.small,
                Place::Large => &mut self.large,
            };
            match held {
                Some(held) => held.merge(permit),
                None => *held = Some(permit),
            }
            true
        };
        let is_small = bytes <= SMALL_BYTES && take(&self.budget.0.small, Place::Small);
        match is_small || take(&self.budget.0.large, Place::Large) {
            true => Ok(()),
            false => Err(self.budget.full()),
        }
    }

    /// Gives back everything beyond this many bytes.
    pub(in crate::http) fn shrink(&mut self, bytes: usize) {
        let surplus = self.units().saturating_sub(units(bytes)) as usize;
        if let Some(large) = &mut self.large {
            drop(large.split(surplus.min(large.num_permits())));
        }
    }

    /// Bytes that hold this share for as long as any of them is there.
    pub(in crate::http) fn keep(self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Kept {
            bytes,
            _share: self,
        })
    }
}

enum Place {
    Small,
    Large,
}

/// Bytes with their share.
struct Kept {
    bytes: Vec<u8>,
    _share: Share,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// An answer's share, which a handler took before it made the answer; in the answer's extensions.
#[derive(Debug, Clone)]
pub(in crate::http) struct Counted(pub(in crate::http) Arc<Share>);

impl Counted {
    pub(in crate::http) fn new(share: Share) -> Self {
        Self(Arc::new(share))
    }
}

/// In the extensions of an answer that [`carry`] has looked at.
#[derive(Debug, Clone, Copy)]
struct Looked;

/// Counts an answer until the kernel has its last byte, and gives its connection a time limit for that. Small answers are let through over
/// HTTP/1, where a client has one at a time; so are answers without a known length (server-sent events have their own budget).
pub(in crate::http) async fn carry(
    budget: &Budget,
    outgoing: Option<&Outgoing>,
    mut response: Response,
) -> Response {
    let counted = response.extensions_mut().remove::<Counted>();
    let bytes = known_bytes(&response);
    let most_free = match outgoing.is_some_and(Outgoing::has_windows) {
        true => 0,
        false => SMALL_BYTES,
    };
    if bytes <= most_free {
        return response;
    }
    let share = match counted {
        Some(Counted(share)) => share,
        None => match budget.hold(bytes).await {
            Ok(share) => Arc::new(share),
            // Its deliveries go back, as if they had not been written.
            Err(full) => return Problem::from(full).into_response(),
        },
    };
    response.extensions_mut().insert(Looked);
    carried(Held(Some(share)), outgoing, response, bytes)
}

/// Gives a connection of HTTP/2 a time for an answer that is not counted: a problem, which is printed last of all.
pub(in crate::http) fn bound(outgoing: &Outgoing, mut response: Response) -> Response {
    let is_looked_at = response.extensions_mut().remove::<Looked>().is_some();
    let bytes = known_bytes(&response);
    if is_looked_at || bytes == 0 || !outgoing.has_windows() {
        return response;
    }
    carried(Held::default(), Some(outgoing), response, bytes)
}

/// The length of an answer's body; 0 where it is not known.
fn known_bytes(response: &Response) -> usize {
    let bytes = response.body().size_hint().exact().unwrap_or_default();
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn carried(held: Held, outgoing: Option<&Outgoing>, response: Response, bytes: usize) -> Response {
    let held = Arc::new(held);
    if let Some(outgoing) = outgoing {
        outgoing.is_due(&held, bytes);
    }
    let windows = outgoing.filter(|outgoing| outgoing.has_windows()).cloned();
    response.map(|inner| {
        Body::new(Carried {
            inner,
            rest: None,
            held,
            windows,
        })
    })
}

/// A body whose bytes hold its share.
struct Carried {
    inner: Body,
    /// The rest of a frame that is given out in pieces.
    rest: Option<Bytes>,
    held: Arc<Held>,
    /// The connection, where what its client takes is seen by the pieces alone.
    windows: Option<Outgoing>,
}

/// Some of its bytes.
struct Piece {
    bytes: Bytes,
    windows: Option<Outgoing>,
    _held: Arc<Held>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(outgoing) = &self.windows {
            outgoing.moved();
        }
    }
}

impl hyper::body::Body for Carried {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = match self.rest.take() {
            Some(rest) => Frame::data(rest),
            None => match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                // Bodies of a known length are in memory, and do not fail.
                Some(Err(_)) | None => return Poll::Ready(None),
            },
        };
        let frame = match frame.into_data() {
            Ok(mut bytes) => {
                if self.windows.is_some() && bytes.len() > PIECE_BYTES {
                    self.rest = Some(bytes.split_off(PIECE_BYTES));
                }
                Frame::data(Bytes::from_owner(Piece {
                    bytes,
                    windows: self.windows.clone(),
                    _held: Arc::clone(&self.held),
                }))
            }
            Err(frame) => frame,
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.as_ref().map_or(0, |rest| rest.len() as u64);
        match self.inner.size_hint().exact() {
            Some(inner) => SizeHint::with_exact(inner + rest),
            None => self.inner.size_hint(),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_share_grows_as_far_as_there_is_room_and_is_given_back() {
        let budget = Budget::new(8 << 20, "bodies");
        assert_eq!(budget.free(), 8 << 20);
        let mut large = budget.share();
        large.grow(100).unwrap();
        assert_eq!(budget.free(), (8 << 20) - UNIT_BYTES);
        large.grow(7 << 20).unwrap();
        assert!(large.grow((7 << 20) + 2 * UNIT_BYTES).is_err());
        assert_eq!(large.units(), 7 << 10, "as it was");
        // Small bodies still have their part.
        let mut small = budget.share();
        small.grow(SMALL_BYTES).unwrap();
        assert!(!budget.has_room(2 << 20) && budget.has_room(10));
        large.shrink(1 << 20);
        assert!(budget.has_room(2 << 20));
        let kept = small.keep(vec![7; SMALL_BYTES]);
        let slice = kept.slice(0..1);
        drop((kept, large));
        assert_eq!(budget.free(), (8 << 20) - SMALL_BYTES, "a slice holds all");
        drop(slice);
        assert_eq!(budget.free(), 8 << 20);
    }

    #[tokio::test]
    async fn an_answer_waits_for_room() {
        let budget = Budget::new(1 << 20, "answers");
        let first = budget.hold(10 << 20).await.unwrap();
        let second = budget.hold(512 << 10);
        let (second, ()) = tokio::join!(second, async { drop(first) });
        assert_eq!(second.unwrap().units(), 512);
        let all = budget.hold(10 << 20).await.unwrap();
        let moment = Duration::from_millis(20);
        assert!(timeout(moment, budget.hold(512 << 10)).await.is_err());
        drop(all);
        assert_eq!(budget.free(), 1 << 20);
    }

    #[tokio::test]
    async fn the_bytes_of_an_answer_hold_its_share() {
        use http_body_util::BodyExt as _;
        let budget = Budget::new(1 << 20, "answers");
        let response = Response::new(Body::from(vec![1; 200_000]));
        let response = carry(&budget, None, response).await;
        assert!(budget.free() < (1 << 20) - 190_000);
        let mut body = response.into_body();
        let bytes = body.frame().await.unwrap().unwrap().into_data().unwrap();
        drop(body);
        assert!(budget.free() < (1 << 20) - 190_000);
        drop(bytes);
        assert_eq!(budget.free(), 1 << 20);
        let small = || Response::new(Body::from("x"));
        let outgoing = Outgoing::new(Duration::from_secs(30));
        let _small = carry(&budget, None, small()).await;
        let _small = carry(&budget, Some(&outgoing), small()).await;
        assert_eq!(budget.free(), 1 << 20);
        // A client that shuts its windows can leave many of them unread at a time.
        let small = carry(&budget, Some(&outgoing.with_windows()), small()).await;
        assert_eq!(budget.free(), (1 << 20) - UNIT_BYTES);
        drop(small);
        assert_eq!(budget.free(), 1 << 20);
        let large = Response::new(Body::from(vec![1; 40_000]));
        let large = carry(&budget, Some(&outgoing.with_windows()), large).await;
        let mut body = large.into_body();
        let mut pieces = Vec::new();
        while let Some(frame) = body.frame().await {
            pieces.push(frame.unwrap().into_data().unwrap().len());
        }
        assert_eq!(pieces, [16_384, 16_384, 7_232]);
    }
}
