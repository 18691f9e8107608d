//! The body of an answer that hands out deliveries, and what happens when it does not reach the connection.
//!
//! hyper takes a body's bytes into its buffer before it writes them, so "the body was taken" does not mean that it was
//! written. The connection's [`Outgoing`] keeps what stands for the deliveries from the moment the bytes are taken until
//! the connection has flushed; a connection that breaks before drops it, and the deliveries go back.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

/// Something that must know whether an answer was written. Dropped without [`OnWritten::written`], it was not.
pub(in crate::http) trait OnWritten: Send + fmt::Debug {
    /// The answer is in the kernel's hands.
    fn written(self: Box<Self>);
}

/// What waits for the connection's next flush.
#[derive(Debug, Clone, Default)]
pub(in crate::http) struct Outgoing {
    waiting: Arc<Mutex<Vec<Box<dyn OnWritten>>>>,
}

impl Outgoing {
    fn lock(&self) -> MutexGuard<'_, Vec<Box<dyn OnWritten>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, item: Box<dyn OnWritten>) {
        self.lock().push(item);
    }

    /// All that hyper had buffered is written.
    pub(in crate::http) fn flushed(&self) {
        for item in std::mem::take(&mut *self.lock()) {
            item.written();
        }
    }

    /// The connection is over: what waits was not written.
    pub(in crate::http) fn broken(&self) {
        let waiting = std::mem::take(&mut *self.lock());
        drop(waiting);
    }
}

/// One piece of bytes, and what wants to know that it was written.
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
        let Some(bytes) = self.bytes.take() else {
            return Poll::Ready(None);
        };
        if let Some(item) = self.on_written.take() {
            self.outgoing.push(item);
        }
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}
