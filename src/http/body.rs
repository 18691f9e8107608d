//! The body of an answer that hands out deliveries, and what happens when it does not reach the connection.
//!
//! hyper takes a body's bytes into its buffer before it writes them, so "the body was taken" does not mean that it was
//! written. The connection's [`Outgoing`] keeps what stands for the deliveries from the moment the bytes are taken until
//! the connection has flushed; a connection that breaks before drops it, and the deliveries go back.
//!
//! Under HTTP/2 the bytes taken wait for the client's window as well, while other flushes go by. There the body is given out in
//! pieces, each polled for when the window has room beyond those before it, and so is its end: only then all of it can be
//! written, and only then it begins to wait for the flush.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use crate::failpoint;

/// Something that must know whether an answer was written. Dropped without [`OnWritten::written`], it was not.
pub(in crate::http) trait OnWritten: Send + fmt::Debug {
    /// The answer is in the kernel's hands.
    fn written(self: Box<Self>);
}

/// What waits for the connection's next flush.
#[derive(Debug, Clone, Default)]
pub(in crate::http) struct Outgoing {
    has_windows: bool,
    waiting: Arc<Mutex<Vec<Box<dyn OnWritten>>>>,
}

impl Outgoing {
    /// The same, for a request whose answer is subject to the client's window: one of HTTP/2.
    pub(in crate::http) fn with_windows(&self) -> Self {
        Self {
            has_windows: true,
            waiting: Arc::clone(&self.waiting),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Box<dyn OnWritten>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, item: Box<dyn OnWritten>) {
        self.lock().push(item);
    }

    /// All that hyper had buffered is written.
    pub(in crate::http) fn flushed(&self) {
        let written = std::mem::take(&mut *self.lock());
        if !written.is_empty() {
            failpoint::reach("http.deliveries_written");
        }
        for item in written {
            item.written();
        }
    }

    /// The connection is over: what waits was not written.
    pub(in crate::http) fn broken(&self) {
        let waiting = std::mem::take(&mut *self.lock());
        drop(waiting);
    }
}

/// The most bytes given out at once under HTTP/2, one frame by default.
const PIECE_BYTES: usize = 16 << 10;

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
