//! One reader: from the log until it has caught up, then from the window of its stream, and back to the log when it falls
//! behind.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::print::{AROUND_BYTES, HELLO, heartbeat, notice, put_event};
use super::window::{Chunk, Next, Window};
use super::{Farewell, Follow, HELD_MAX_BYTES, PERMIT_BYTES, Piece};
use crate::domain::id::Offset;
use crate::domain::message::Entry;
use crate::http::state::State;
use crate::stream::{self, Read};

/// Bounds of a page read from the log.
const PAGE_MAX_MESSAGES: usize = 256;
const PAGE_MAX_BYTES: usize = 32 << 10;
/// The pause before the log is asked again after it could not be read.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Reasons why a reader ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The client has gone.
    ClientLeft,
    /// The client took nothing for too long.
    TooSlow,
    /// Retention dropped messages that the client has not got.
    Gone { first_offset: Offset },
    /// The stream was deleted.
    Deleted,
    /// The broker stops.
    Stopping,
}

impl End {
    const fn reason(self) -> &'static str {
        match self {
            Self::ClientLeft => "client_left",
            Self::TooSlow => "too_slow",
            Self::Gone { .. } => "offset_gone",
            Self::Deleted => "stream_deleted",
            Self::Stopping => "stopping",
        }
    }

    /// The last event.
    fn notice(self, patience: Duration) -> Option<Bytes> {
        let reason = self.reason();
        match self {
            Self::ClientLeft => None,
            Self::TooSlow => {
                let seconds = patience.as_secs();
                let detail = format!(
                    "the client read nothing for {seconds} seconds; resume with the last id"
                );
                Some(notice(reason, &detail, None))
            }
            Self::Gone { first_offset } => {
                let detail = "retention dropped messages before they were sent";
                Some(notice(reason, detail, Some(first_offset)))
            }
            Self::Deleted => Some(notice(reason, "the stream was deleted", None)),
            Self::Stopping => {
                let detail = "this process is stopping; resume with the last id";
                Some(notice(reason, detail, None))
            }
        }
    }
}

pub(super) struct Reader {
    state: State,
    follow: Follow,
    window: Arc<Window>,
    pieces: mpsc::Sender<Piece>,
    /// All up to here was sent, or did not match.
    position: Offset,
    /// The time when the client last got something.
    sent_at: Instant,
}

impl Reader {
    pub(super) fn new(
        state: State,
        follow: Follow,
        window: Arc<Window>,
        pieces: mpsc::Sender<Piece>,
    ) -> Self {
        Self {
            state,
            position: follow.after,
            follow,
            window,
            pieces,
            sent_at: Instant::now(),
        }
    }

    pub(super) async fn run(mut self, farewell: &Farewell) {
        let Err(end) = self.read_on().await;
        let notice = end.notice(self.state.options.reader_patience);
        *farewell.lock().unwrap_or_else(PoisonError::into_inner) = notice;
        self.state.parts.metrics.readers.ended(end.reason());
        tracing::debug!(
            stream = self.follow.stream.0,
            position = self.position.0,
            reason = end.reason(),
            "a reader ended"
        );
    }

    async fn read_on(&mut self) -> Result<std::convert::Infallible, End> {
        let mut changes = self.window.changes();
        self.send(Bytes::from_static(HELLO)).await?;
        loop {
            changes.mark_unchanged();
            match self.window.next(self.position) {
                Next::Chunk(chunk) => self.send_chunk(&chunk).await?,
                Next::Log => self.send_page().await?,
                Next::Wait => {
                    let heartbeat_at = self.sent_at + self.state.options.reader_heartbeat;
                    tokio::select! {
                        // Ends with the window, which says so the next time.
                        _ = changes.changed() => {}
                        () = sleep_until(heartbeat_at) => self.send(heartbeat(self.position)).await?,
                        () = self.pieces.closed() => return Err(End::ClientLeft),
                        () = self.state.stopping.cancelled() => return Err(End::Stopping),
                    }
                }
                Next::Closed if self.state.stopping.is_cancelled() => return Err(End::Stopping),
                Next::Closed => return Err(End::Deleted),
            }
        }
    }

    fn wants(&self, entry: &Entry) -> bool {
        let Follow { topics, key, .. } = &self.follow;
        let is_wanted_topic = topics
            .as_ref()
            .is_none_or(|patterns| patterns.iter().any(|p| p.matches(&entry.topic)));
        is_wanted_topic && (key.is_none() || key.as_deref() == entry.key.as_deref())
    }

    /// The part of a chunk that this reader wants: a slice of the shared text where it is in one piece.
    fn take(&self, chunk: &Chunk) -> Bytes {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        let mut start = 0;
        for (entry, end) in &chunk.items {
            if entry.offset > self.position && self.wants(entry) {
                match runs.last_mut() {
                    Some(run) if run.1 == start => run.1 = *end,
                    _ => runs.push((start, *end)),
                }
            }
            start = *end;
        }
        match *runs {
            [] => Bytes::new(),
            [(from, to)] => chunk.text.slice(from..to),
            _ => {
                let mut text = Vec::new();
                for (from, to) in runs {
                    text.extend_from_slice(&chunk.text[from..to]);
                }
                text.into()
            }
        }
    }

    async fn send_chunk(&mut self, chunk: &Chunk) -> Result<(), End> {
        let text = self.take(chunk);
        self.send(text).await?;
        self.position = self.position.max(chunk.last);
        self.follow.is_resumed = true;
        Ok(())
    }

    async fn send_page(&mut self) -> Result<(), End> {
        let read = Read {
            stream: self.follow.stream,
            after: self.position,
            through: None,
            topics: self.follow.topics.clone(),
            key: self.follow.key.clone(),
            max_messages: PAGE_MAX_MESSAGES,
            max_bytes: PAGE_MAX_BYTES,
        };
        let reading = self.state.parts.stream.read(read);
        let page = tokio::select! {
            page = reading => page,
            () = self.pieces.closed() => return Err(End::ClientLeft),
            () = self.state.stopping.cancelled() => return Err(End::Stopping),
        };
        let page = match page {
            Ok(page) => page,
            Err(stream::Error::NotFound { .. }) => return Err(End::Deleted),
            Err(stream::Error::Stopping) => return Err(End::Stopping),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a reader could not read the log; trying again"
                );
                return self.pause().await;
            }
        };
        if let Some(floor) = page.lost_through
            && self.follow.is_resumed
        {
            return Err(End::Gone {
                first_offset: floor.next(),
            });
        }
        let bytes = page
            .entries
            .iter()
            .map(|entry| entry.event.len() + AROUND_BYTES);
        let mut text = Vec::with_capacity(bytes.sum());
        for entry in &page.entries {
            put_event(&mut text, entry);
        }
        let through = page.through;
        drop(page);
        self.send(text.into()).await?;
        if through <= self.position {
            // The tail knows of more than the log gives: other nodes' appends, on their way. Not as fast as possible.
            return self.pause().await;
        }
        self.position = through;
        self.follow.is_resumed = true;
        // A filter that passes over much takes long, and the client must hear that it is alive.
        if self.sent_at.elapsed() >= self.state.options.reader_heartbeat {
            self.send(heartbeat(self.position)).await?;
        }
        Ok(())
    }

    /// Waits a little, with a heartbeat when it is due.
    async fn pause(&mut self) -> Result<(), End> {
        tokio::select! {
            () = sleep(RETRY_PAUSE) => {}
            () = self.pieces.closed() => return Err(End::ClientLeft),
            () = self.state.stopping.cancelled() => return Err(End::Stopping),
        }
        if self.sent_at.elapsed() >= self.state.options.reader_heartbeat {
            self.send(heartbeat(self.position)).await?;
        }
        Ok(())
    }

    /// Hands text to the connection. What it waits for other readers' memory does not count against its client.
    async fn send(&mut self, text: Bytes) -> Result<(), End> {
        if text.is_empty() {
            return Ok(());
        }
        let budget = Arc::clone(&self.state.readers.budget);
        // A text beyond the whole budget takes all of it.
        let bytes = text.len().min(HELD_MAX_BYTES);
        let permits = u32::try_from(bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        let permit = tokio::select! {
            permit = budget.acquire_many_owned(permits) => permit,
            () = self.pieces.closed() => return Err(End::ClientLeft),
            () = self.state.stopping.cancelled() => return Err(End::Stopping),
        };
        let piece = Piece {
            text,
            // Never closed.
            _permit: permit.ok(),
        };
        let patience = self.state.options.reader_patience;
        tokio::select! {
            sent = timeout(patience, self.pieces.send(piece)) => match sent {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(End::ClientLeft),
                Err(_) => return Err(End::TooSlow),
            },
            () = self.state.stopping.cancelled() => return Err(End::Stopping),
        }
        self.sent_at = Instant::now();
        Ok(())
    }
}
