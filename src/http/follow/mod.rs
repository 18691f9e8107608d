//! Readers of a stream by server-sent events: they replay from the place they asked for, then follow live.
//!
//! Each reader is a task that hands pieces of text to the body of its answer. Recent messages are printed once per stream
//! and shared by all its readers ([`window`]); older ones are read from the log a page at a time, so a reader that falls
//! behind costs no memory, only reads. At most two pieces of about 32 KiB wait for a client. A client that reads nothing
//! for [`Options::reader_patience`](super::Options::reader_patience) while something waits is told why and disconnected.

mod metrics;
mod print;
mod reader;
mod window;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::{convert::Infallible, fmt};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use bytes::Bytes;
use hyper::body::Frame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::problem::{Kind, Problem};
use super::state::State;
use crate::domain::id::{Offset, StreamId};
use crate::domain::name::TopicPattern;
use crate::supervisor::{OnEnd, Supervisor};

pub(in crate::http) use metrics::Metrics;
use reader::Reader;
use window::Windows;

/// Bytes of text that are held for all readers together, beside what they share. More waits until a client takes something.
const HELD_MAX_BYTES: usize = 32 << 20;
/// The budget is counted in units of this many bytes, since its permits have 32 bits.
const PERMIT_BYTES: usize = 1_024;

/// A reader's request.
#[derive(Debug)]
pub(in crate::http) struct Follow {
    /// The stream.
    pub(in crate::http) stream: StreamId,
    /// Messages after this offset.
    pub(in crate::http) after: Offset,
    /// Whether the reader has everything up to there, so that it must learn of anything that it misses.
    pub(in crate::http) is_resumed: bool,
    /// Only topics that match one of these; `None` is all.
    pub(in crate::http) topics: Option<Arc<[TopicPattern]>>,
    /// Only this ordering key.
    pub(in crate::http) key: Option<String>,
}

/// State that all readers share.
pub(in crate::http) struct Readers {
    supervisor: Supervisor,
    windows: Windows,
    places: Arc<Semaphore>,
    budget: Arc<Semaphore>,
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").finish_non_exhaustive()
    }
}

impl Readers {
    pub(in crate::http) fn new(supervisor: Supervisor, readers_max: usize) -> Self {
        Self {
            supervisor,
            windows: Windows::default(),
            places: Arc::new(Semaphore::new(readers_max)),
            budget: Arc::new(Semaphore::new(HELD_MAX_BYTES / PERMIT_BYTES)),
        }
    }
}

/// Some text on its way to a client.
#[derive(Debug)]
struct Piece {
    text: Bytes,
    /// Its share of the budget, until the connection asks for the next piece.
    _permit: Option<OwnedSemaphorePermit>,
}

/// The event that ends a reader. It has a separate place, for a client that no longer reads pieces.
type Farewell = Arc<Mutex<Option<Bytes>>>;

/// Starts a reader and gives its answer.
///
/// # Errors
/// As many readers as there can be.
pub(in crate::http) fn open(state: &State, follow: Follow) -> Result<Response, Problem> {
    let readers = &state.readers;
    let Ok(place) = Arc::clone(&readers.places).try_acquire_owned() else {
        let detail = format!(
            "{} readers already follow streams, which is the limit",
            state.options.readers_max
        );
        return Err(Problem::new(Kind::TooManyRequests, detail).retry_after(10));
    };
    let (sender, pieces) = mpsc::channel(1);
    let farewell = Farewell::default();
    let body = EventBody {
        pieces,
        farewell: Arc::clone(&farewell),
        held: None,
    };
    let window = readers
        .windows
        .get(state, &readers.supervisor, follow.stream);
    let reader = Reader::new(state.clone(), follow, window, sender);
    let metrics = state.parts.metrics.readers.clone();
    readers
        .supervisor
        .spawn("stream reader", OnEnd::Ordinary, async move {
            let _place = place;
            metrics.reading.inc();
            reader.run(&farewell).await;
            metrics.reading.dec();
        });
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies that gather answers would hold events back.
    let buffering = HeaderName::from_static("x-accel-buffering");
    headers.insert(buffering, HeaderValue::from_static("no"));
    Ok(response)
}

/// The body of a reader's answer. Dropped with its connection, which ends the reader.
#[derive(Debug)]
struct EventBody {
    pieces: mpsc::Receiver<Piece>,
    farewell: Farewell,
    held: Option<OwnedSemaphorePermit>,
}

impl hyper::body::Body for EventBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.held = None;
        let text = match ready!(self.pieces.poll_recv(cx)) {
            Some(piece) => {
                self.held = piece._permit;
                Some(piece.text)
            }
            None => self
                .farewell
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        };
        Poll::Ready(text.map(|text| Ok(Frame::data(text))))
    }
}
