//! The latest messages of a stream, printed once for all its followers. Each followed stream has one task, which fills the
//! window from the stream's tail and ends when nobody follows any more.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{broadcast, watch};

use super::print::{AROUND_BYTES, put_event};
use crate::domain::id::{Offset, StreamId};
use crate::domain::message::Entry;
use crate::http::state::State;
use crate::stream::{self, Batch};
use crate::supervisor::{OnEnd, Supervisor};

/// The text kept per stream: readers further behind read pages of the log, whose cache reaches further back.
const WINDOW_MAX_BYTES: usize = 4 << 20;
/// Nothing is added to a chunk once it has this many bytes.
const CHUNK_BYTES: usize = 32 << 10;
/// How long a window stays without readers, at least.
const IDLE: Duration = Duration::from_secs(5);

/// Some messages of a stream without a gap.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) last: Offset,
    /// By offset, each with the place in the text where it ends.
    pub(super) items: Vec<(Arc<Entry>, usize)>,
    pub(super) text: Bytes,
}

/// The place where a reader continues.
#[derive(Debug)]
pub(super) enum Next {
    /// With this chunk, the part after its position.
    Chunk(Arc<Chunk>),
    /// It has all there is.
    Wait,
    /// In the log: its next messages are no longer here.
    Log,
    /// The stream is gone, or the broker stops.
    Closed,
}

#[derive(Debug)]
pub(super) struct Window {
    inner: Mutex<Inner>,
    last: watch::Sender<Offset>,
}

#[derive(Debug, Default)]
struct Inner {
    /// All after it is in the chunks.
    start: Offset,
    last: Offset,
    chunks: VecDeque<Arc<Chunk>>,
    bytes: usize,
    is_closed: bool,
}

impl Window {
    fn new(last: Offset) -> Self {
        let inner = Inner {
            start: last,
            last,
            ..Inner::default()
        };
        Self {
            inner: Mutex::new(inner),
            last: watch::Sender::new(last),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes with every batch, and when the window is closed.
    pub(super) fn changes(&self) -> watch::Receiver<Offset> {
        self.last.subscribe()
    }

    pub(super) fn next(&self, position: Offset) -> Next {
        let inner = self.inner();
        if inner.is_closed {
            Next::Closed
        } else if position >= inner.last {
            Next::Wait
        } else if position < inner.start {
            Next::Log
        } else {
            let place = inner.chunks.partition_point(|chunk| chunk.last <= position);
            match inner.chunks.get(place) {
                Some(chunk) => Next::Chunk(Arc::clone(chunk)),
                None => Next::Log,
            }
        }
    }

    fn push(&self, batch: &Batch) {
        let chunks = print(batch);
        let mut inner = self.inner();
        if batch.last <= inner.last {
            return;
        }
        let is_whole = batch.entries.len() as i64 == batch.last.0 - batch.first.0 + 1;
        if !is_whole || batch.first != inner.last.next() {
            // Something is missing: readers find out in the log what it is.
            inner.chunks.clear();
            inner.bytes = 0;
            inner.start = if is_whole {
                Offset(batch.first.0 - 1)
            } else {
                batch.last
            };
        }
        inner.last = batch.last;
        if is_whole {
            inner.bytes += chunks.iter().map(|chunk| chunk.text.len()).sum::<usize>();
            inner.chunks.extend(chunks);
        }
        while inner.bytes > WINDOW_MAX_BYTES
            && let Some(oldest) = inner.chunks.pop_front()
        {
            inner.bytes -= oldest.text.len();
            inner.start = oldest.last;
        }
        drop(inner);
        self.last.send_replace(batch.last);
    }

    fn close(&self) {
        self.inner().is_closed = true;
        self.last.send_modify(|_| {});
    }
}

fn print(batch: &Batch) -> Vec<Arc<Chunk>> {
    let mut chunks = Vec::new();
    let mut text = Vec::new();
    let mut items = Vec::new();
    for entry in &batch.entries {
        text.reserve(entry.event.len() + AROUND_BYTES);
        put_event(&mut text, entry);
        items.push((Arc::clone(entry), text.len()));
        if text.len() >= CHUNK_BYTES {
            chunks.extend(Chunk::of(
                std::mem::take(&mut items),
                std::mem::take(&mut text),
            ));
        }
    }
    chunks.extend(Chunk::of(items, text));
    chunks
}

impl Chunk {
    fn of(items: Vec<(Arc<Entry>, usize)>, text: Vec<u8>) -> Option<Arc<Self>> {
        let last = items.last()?.0.offset;
        Some(Arc::new(Self {
            last,
            items,
            text: text.into(),
        }))
    }
}

/// The windows of the streams that are followed.
#[derive(Debug, Default)]
pub(super) struct Windows {
    streams: Arc<Mutex<HashMap<StreamId, Arc<Window>>>>,
}

type Streams = Mutex<HashMap<StreamId, Arc<Window>>>;

impl Windows {
    /// The window of a stream; begins one if there is none.
    pub(super) fn get(
        &self,
        state: &State,
        supervisor: &Supervisor,
        stream: StreamId,
    ) -> Arc<Window> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(window) = streams.get(&stream) {
            return Arc::clone(window);
        }
        // In this order: what comes between the two is in both.
        let tail = state.parts.stream.tail(stream);
        let last = *state.parts.stream.last_offset(stream).borrow();
        let window = Arc::new(Window::new(last));
        streams.insert(stream, Arc::clone(&window));
        let task = Filler {
            state: state.clone(),
            stream,
            window: Arc::clone(&window),
            streams: Arc::clone(&self.streams),
            tail,
        };
        supervisor.spawn("stream window", OnEnd::Ordinary, task.run());
        window
    }
}

/// The task that fills a window.
struct Filler {
    state: State,
    stream: StreamId,
    window: Arc<Window>,
    streams: Arc<Streams>,
    tail: broadcast::Receiver<Arc<stream::Batch>>,
}

impl Filler {
    async fn run(mut self) {
        let mut idle = tokio::time::interval(IDLE);
        loop {
            tokio::select! {
                batch = self.tail.recv() => match batch {
                    Ok(batch) => self.window.push(&batch),
                    // The next batch does not follow the last one, which the window sees.
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => break,
                },
                _ = idle.tick() => {
                    if self.leave_if_alone() {
                        return;
                    }
                }
                () = self.state.stopping.cancelled() => break,
            }
        }
        self.window.close();
        let mut streams = self.streams();
        streams.remove(&self.stream);
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<StreamId, Arc<Window>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Under the lock that every new reader takes, so that none gets a window that nobody fills.
    fn leave_if_alone(&self) -> bool {
        let mut streams = self.streams();
        // The map's and the task's own.
        let is_alone = Arc::strong_count(&self.window) <= 2;
        if is_alone {
            streams.remove(&self.stream);
        }
        is_alone
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::domain::message::{Data, Message};
    use crate::domain::name::Topic;

    fn batch(first: i64, last: i64, missing: usize) -> Batch {
        let message = Message {
            id: "1".into(),
            source: "/s".into(),
            kind: None,
            topic: Topic::parse("a").unwrap(),
            key: None,
            subject: None,
            time: None,
            data_content_type: None,
            data_schema: None,
            data: Data::Text(vec![b'x'; 20_000].into()),
            extensions: serde_json::Map::new(),
            expected_version: None,
        };
        let stream = StreamId(1);
        let at = chrono::DateTime::UNIX_EPOCH;
        let entries = (first..=last)
            .skip(missing)
            .map(|offset| Arc::new(stream::entry(stream, Offset(offset), at, &message)));
        Batch {
            stream,
            first: Offset(first),
            last: Offset(last),
            entries: entries.collect(),
        }
    }

    fn next(window: &Window, position: i64) -> String {
        match window.next(Offset(position)) {
            Next::Chunk(chunk) => format!("{}..{}", chunk.items[0].0.offset, chunk.last),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn a_reader_finds_what_it_wants_or_is_sent_to_the_log() {
        let window = Window::new(Offset(10));
        assert_eq!(next(&window, 10), "Wait");
        assert_eq!(next(&window, 9), "Log");
        window.push(&batch(11, 15, 0));
        assert_eq!(next(&window, 10), "11..12");
        assert_eq!(next(&window, 11), "11..12");
        assert_eq!(next(&window, 12), "13..14");
        assert_eq!(next(&window, 14), "15..15");
        assert_eq!(next(&window, 15), "Wait");
        // Read from the log before the tail had it.
        assert_eq!(next(&window, 17), "Wait");
        window.push(&batch(12, 13, 0));
        assert_eq!(next(&window, 15), "Wait");
        // The tail lagged.
        window.push(&batch(20, 20, 0));
        assert_eq!(next(&window, 15), "Log");
        assert_eq!(next(&window, 19), "20..20");
        // Retention dropped a part before it was read.
        window.push(&batch(21, 23, 1));
        assert_eq!(next(&window, 20), "Log");
        assert_eq!(next(&window, 23), "Wait");
        window.close();
        assert_eq!(next(&window, 23), "Closed");
    }

    #[test]
    fn the_oldest_chunks_go_when_there_is_too_much() {
        let window = Window::new(Offset(0));
        for first in 0..50 {
            window.push(&batch(first * 10 + 1, first * 10 + 10, 0));
        }
        assert!(window.inner().bytes <= WINDOW_MAX_BYTES);
        assert_eq!(next(&window, 0), "Log");
        let start = window.inner().start.0;
        assert_eq!(
            next(&window, start),
            format!("{}..{}", start + 1, start + 2)
        );
    }
}
