//! What is appended, passed on in offset order without a gap: own appends from memory, other nodes' from the log.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{broadcast, watch};

use super::request::Batch;
use crate::domain::id::{Offset, StreamId};

/// Batches that wait for the slowest receiver of a stream; one further behind has lagged and reads the log.
const TAIL_MAX_BATCHES: usize = 64;

/// The tails of all streams, made when first asked for.
#[derive(Debug, Default)]
pub(super) struct Tails {
    streams: Mutex<HashMap<StreamId, Tail>>,
}

#[derive(Debug)]
struct Tail {
    batches: broadcast::Sender<Arc<Batch>>,
    last: watch::Sender<Offset>,
}

impl Default for Tail {
    fn default() -> Self {
        Self {
            batches: broadcast::Sender::new(TAIL_MAX_BATCHES),
            last: watch::Sender::new(Offset(0)),
        }
    }
}

impl Tails {
    fn streams(&self) -> MutexGuard<'_, HashMap<StreamId, Tail>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn subscribe(&self, stream: StreamId) -> broadcast::Receiver<Arc<Batch>> {
        self.streams()
            .entry(stream)
            .or_default()
            .batches
            .subscribe()
    }

    pub(super) fn last_offset(&self, stream: StreamId) -> watch::Receiver<Offset> {
        self.streams().entry(stream).or_default().last.subscribe()
    }

    /// The last offset passed on.
    pub(super) fn last(&self, stream: StreamId) -> Offset {
        let streams = self.streams();
        streams
            .get(&stream)
            .map_or(Offset(0), |tail| *tail.last.borrow())
    }

    /// Starts a stream's tail after an offset, unless it is further already.
    pub(super) fn start(&self, stream: StreamId, last: Offset) {
        let mut streams = self.streams();
        streams
            .entry(stream)
            .or_default()
            .last
            .send_if_modified(|now| {
                let is_later = last > *now;
                *now = (*now).max(last);
                is_later
            });
    }

    pub(super) fn remove(&self, stream: StreamId) {
        self.streams().remove(&stream);
    }

    /// Passes a batch on. The caller has made sure that it follows the last one.
    pub(super) fn publish(&self, batch: Batch) {
        let mut streams = self.streams();
        let tail = streams.entry(batch.stream).or_default();
        let last = batch.last;
        // No receivers is no error: nobody follows this stream just now.
        let _ = tail.batches.send(Arc::new(batch));
        tail.last.send_replace(last);
    }
}
