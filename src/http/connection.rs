//! Watches the socket of a connection: when bytes last moved, when everything buffered is written, and when the client has
//! sent its last byte. hyper takes that end for a client that has gone. But a client that only closed its half, as some do
//! after a request, should get its answer, unless it asked to wait. So hyper sees the end only once the answer is written.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::body::Outgoing;

/// The time when bytes last moved on a connection. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::http) struct Activity(Arc<Mutex<Instant>>);

impl Activity {
    /// Now.
    pub(in crate::http) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    /// The moment.
    pub(in crate::http) fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Now.
    pub(in crate::http) fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// A socket that tells.
#[derive(Debug)]
pub(in crate::http) struct Watched {
    stream: TcpStream,
    activity: Activity,
    /// Of HTTP/2 with windows: what is written there need not be of an answer.
    outgoing: Outgoing,
}

impl Watched {
    pub(in crate::http) fn new(stream: TcpStream, activity: Activity, outgoing: Outgoing) -> Self {
        Self {
            stream,
            activity,
            outgoing,
        }
    }

    fn wrote(&self, written: &io::Result<usize>) {
        if matches!(written, Ok(count) if *count > 0) {
            self.activity.touch();
            if !self.outgoing.has_windows() {
                self.outgoing.moved();
            }
        } else {
            self.outgoing.broken();
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.outgoing.broken();
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        if buffer.filled().len() > before {
            self.activity.touch();
        } else if result.is_ok() && buffer.remaining() > 0 && self.outgoing.hides_end(cx) {
            return Poll::Pending;
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.outgoing.set_writing(true);
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes));
        self.wrote(&written);
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.outgoing.set_writing(true);
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bytes));
        self.wrote(&written);
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes the socket after it has written all that it had buffered.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.stream).poll_flush(cx));
        match &flushed {
            Ok(()) => self.outgoing.flushed(),
            Err(_) => self.outgoing.broken(),
        }
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
