//! The body of an answer that hands out deliveries, and what happens when it does not reach the connection.
//!
//! hyper takes a body's bytes into its buffer before it writes them, so "the body was taken" does not mean that it was
//! written. The connection's [`Outgoing`] keeps a guard for the deliveries from the moment the bytes are taken until the
//! connection has flushed; a connection that breaks before that drops the guard, and the deliveries go back.
//!
//! Under HTTP/2 the taken bytes also wait for the client's window, while other flushes go by. There the body is given out
//! in pieces. Each piece, and the end of the body, is polled for when the window has room beyond the pieces before it: only
//! then can all of it be written, and only then does it begin to wait for the flush.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::unread::{Held, PATIENCE, Standing, Unread};
use crate::failpoint;

/// Something that must know whether an answer was written. Dropped without [`OnWritten::written`], it was not.
pub(in crate::http) trait OnWritten: Send + fmt::Debug {
    /// The answer is in the kernel's hands.
    fn written(self: Box<Self>);
}

/// All that a connection and those who answer on it know of each other. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::http) struct Outgoing {
    has_windows: bool,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// These wait for the connection's next flush.
    waiting: Mutex<Vec<Box<dyn OnWritten>>>,
    /// Answers that the client must take in time.
    unread: Unread,
    /// Makes the connection look at itself again.
    attention: Notify,
    is_to_end: AtomicBool,
    /// A request came that is the last.
    has_last: AtomicBool,
    /// Bytes wait to be written.
    is_writing: AtomicBool,
    /// Answers without a known end are under way.
    endless: AtomicUsize,
    /// How far the request is, by the numbers of [`Phase`].
    phase: AtomicU8,
    /// The sender's end was seen meanwhile; this wakes the task that must see it again.
    hidden_end: Mutex<Option<Waker>>,
    /// It was seen while the body was read.
    end_seen: Notify,
}

/// How far the request of an HTTP/1 connection is. It says whether hyper may see that the client sends nothing more, which it takes for
/// the end of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// There is no request, or it waits for messages as long as its sender is there: the end is shown.
    Open = 0,
    /// Its body is being read. The end may come right behind it: the reader of the body says when the end cuts the body short.
    Reading = 1,
    /// It was read whole, and is answered.
    Answering = 2,
}

/// An answer without a known end, until it is dropped.
#[derive(Debug)]
pub(in crate::http) struct Endless(Arc<Shared>);

impl Drop for Endless {
    fn drop(&mut self) {
        self.0.endless.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for Outgoing {
    fn default() -> Self {
        Self::new(PATIENCE)
    }
}

impl Outgoing {
    /// Of a connection whose client has such a patience to take an answer, and longer for a large one: see [`Unread`].
    pub(in crate::http) fn new(patience: Duration) -> Self {
        let shared = Shared {
            waiting: Mutex::default(),
            unread: Unread::new(patience),
            attention: Notify::new(),
            is_to_end: AtomicBool::new(false),
            has_last: AtomicBool::new(false),
            is_writing: AtomicBool::new(false),
            endless: AtomicUsize::new(0),
            phase: AtomicU8::new(Phase::Open as u8),
            hidden_end: Mutex::default(),
            end_seen: Notify::new(),
        };
        Self {
            has_windows: false,
            shared: Arc::new(shared),
        }
    }

    /// The same, for a request whose answer is subject to the client's window: one of HTTP/2.
    pub(in crate::http) fn with_windows(&self) -> Self {
        Self {
            has_windows: true,
            shared: Arc::clone(&self.shared),
        }
    }

    /// True if answers are subject to the client's window.
    pub(in crate::http) const fn has_windows(&self) -> bool {
        self.has_windows
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Box<dyn OnWritten>>> {
        let waiting = self.shared.waiting.lock();
        waiting.unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, item: Box<dyn OnWritten>) {
        self.lock().push(item);
    }

    /// All that hyper had buffered is written.
    pub(in crate::http) fn flushed(&self) {
        self.set_writing(false);
        self.show_end();
        let written = std::mem::take(&mut *self.lock());
        if !written.is_empty() {
            failpoint::reach("http.deliveries_written");
        }
        for item in written {
            item.written();
        }
    }

    /// Notes an answer: its client must take it in time, or the connection ends.
    pub(in crate::http) fn is_due(&self, held: &Arc<Held>, bytes: usize) {
        if self.shared.unread.add(held, bytes, Instant::now()) {
            self.shared.attention.notify_one();
        }
    }

    /// The client took something of an answer.
    pub(in crate::http) fn moved(&self) {
        self.shared.unread.moved();
    }

    /// How far the client is with its answers.
    pub(in crate::http) fn standing(&self) -> Standing {
        self.shared.unread.standing(Instant::now())
    }

    /// Resolves when the connection must look at itself again. Cancel-safe.
    pub(in crate::http) async fn attention(&self) {
        self.shared.attention.notified().await;
    }

    /// Has the connection end, since another is to have its place.
    pub(in crate::http) fn end(&self) {
        self.shared.is_to_end.store(true, Ordering::Relaxed);
        self.shared.attention.notify_one();
    }

    /// A request is the connection's last.
    pub(in crate::http) fn is_last(&self) {
        self.shared.has_last.store(true, Ordering::Relaxed);
        self.shared.attention.notify_one();
    }

    pub(in crate::http) fn has_last(&self) -> bool {
        self.shared.has_last.load(Ordering::Relaxed)
    }

    pub(in crate::http) fn is_to_end(&self) -> bool {
        self.shared.is_to_end.load(Ordering::Relaxed)
    }

    pub(in crate::http) fn set_writing(&self, is_writing: bool) {
        self.shared.is_writing.store(is_writing, Ordering::Relaxed);
    }

    /// Whether something is under way, apart from requests that wait for their answers.
    pub(in crate::http) fn is_busy(&self) -> bool {
        self.shared.is_writing.load(Ordering::Relaxed)
            || self.shared.endless.load(Ordering::Relaxed) > 0
    }

    /// An answer without a known end begins.
    pub(in crate::http) fn endless(&self) -> Endless {
        self.shared.endless.fetch_add(1, Ordering::Relaxed);
        Endless(Arc::clone(&self.shared))
    }

    fn phase(&self) -> u8 {
        self.shared.phase.load(Ordering::Acquire)
    }

    fn set_phase(&self, phase: Phase) {
        if !self.has_windows {
            self.shared.phase.store(phase as u8, Ordering::Release);
        }
    }

    /// A request is there, with its body still to be read or without any.
    pub(in crate::http) fn begins(&self, has_body: bool) {
        self.set_phase(match has_body {
            true => Phase::Reading,
            false => Phase::Answering,
        });
    }

    /// The request was read whole: it is answered although its sender sends nothing more. One that may wait for long is not: see
    /// [`Outgoing::waits`].
    pub(in crate::http) fn was_read(&self) {
        self.set_phase(Phase::Answering);
    }

    /// Resolves when the sender's end was seen behind the part of a body that was read. Cancel-safe.
    pub(in crate::http) async fn end_seen(&self) {
        self.shared.end_seen.notified().await;
    }

    /// The request waits for what may come, for as long as its sender is there; or its body is cut short.
    pub(in crate::http) fn waits(&self) {
        self.set_phase(Phase::Open);
        let hidden = self.hidden_end().take();
        if let Some(waker) = hidden {
            waker.wake();
        }
    }

    /// The answer is made.
    pub(in crate::http) fn answered(&self) {
        self.set_phase(Phase::Open);
    }

    fn hidden_end(&self) -> MutexGuard<'_, Option<Waker>> {
        let hidden = self.shared.hidden_end.lock();
        hidden.unwrap_or_else(PoisonError::into_inner)
    }

    /// True to hide the end of the client's bytes until later.
    pub(in crate::http) fn hides_end(&self, cx: &Context<'_>) -> bool {
        // Under the lock that `waits` takes after it, or neither would wake the connection.
        let mut hidden = self.hidden_end();
        let phase = self.phase();
        let is_hidden =
            phase != Phase::Open as u8 || self.shared.is_writing.load(Ordering::Relaxed);
        *hidden = is_hidden.then(|| cx.waker().clone());
        if phase == Phase::Reading as u8 {
            self.shared.end_seen.notify_one();
        }
        is_hidden
    }

    /// Everything is written: shows the sender's end, if it was hidden.
    fn show_end(&self) {
        if self.phase() == Phase::Open as u8
            && let Some(waker) = self.hidden_end().take()
        {
            waker.wake();
        }
    }

    /// The connection is over: what waits was not written.
    pub(in crate::http) fn broken(&self) {
        let waiting = std::mem::take(&mut *self.lock());
        drop(waiting);
    }
}

/// The most bytes given out at once under HTTP/2, one frame by default.
pub(in crate::http) const PIECE_BYTES: usize = 16 << 10;

/// Bytes, and what wants to know that they were written.
#[derive(Debug)]
pub(in crate::http) struct Handed {
    bytes: Option<Bytes>,
    on_written: Option<Box<dyn OnWritten>>,
    outgoing: Outgoing,
}

impl Handed {
    pub(in crate::http) fn new(
        bytes: Bytes,
        on_written: Box<dyn OnWritten>,
        outgoing: Outgoing,
    ) -> Self {
        Self {
            bytes: Some(bytes),
            on_written: Some(on_written),
            outgoing,
        }
    }
}

impl Body for Handed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let has_windows = self.outgoing.has_windows;
        let piece = self.bytes.take().map(|mut bytes| {
            if has_windows && bytes.len() > PIECE_BYTES {
                let piece = bytes.split_to(PIECE_BYTES);
                self.bytes = Some(bytes);
                piece
            } else {
                bytes
            }
        });
        let is_over = if has_windows {
            piece.is_none()
        } else {
            self.bytes.is_none()
        };
        if is_over && let Some(item) = self.on_written.take() {
            self.outgoing.push(item);
        }
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    /// Over HTTP/1 a body of known length is not polled again after its last byte; over HTTP/2 its end must be.
    fn is_end_stream(&self) -> bool {
        self.bytes.is_none() && self.on_written.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}
