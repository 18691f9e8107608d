//! Streams of which somebody else has a part of the log locked, as the readers find out.
//!
//! A read of such a stream waits for a moment, in vain. Many of them would keep all readers busy, so only one reader at a time tries;
//! who asks for another is told so at once, and asks again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::domain::id::StreamId;

/// How long a stream is taken to be held after a read that waited in vain.
const HELD_FOR: Duration = Duration::from_secs(1);

/// Streams of which somebody has a part locked.
#[derive(Debug)]
pub(super) struct HeldStreams {
    streams: Mutex<HashMap<StreamId, Instant>>,
    turn: Semaphore,
}

impl Default for HeldStreams {
    fn default() -> Self {
        Self {
            streams: Mutex::default(),
            turn: Semaphore::new(1),
        }
    }
}

/// Of a stream that is held, or of any other.
pub(super) type Turn<'a> = Option<SemaphorePermit<'a>>;

impl HeldStreams {
    fn streams(&self) -> MutexGuard<'_, HashMap<StreamId, Instant>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A turn to read the stream; none, if it is held and another reader waits for it or for one like it.
    pub(super) fn turn(&self, stream: StreamId) -> Option<Turn<'_>> {
        let now = Instant::now();
        let mut streams = self.streams();
        streams.retain(|_, until| now < *until);
        match streams.contains_key(&stream) {
            true => self.turn.try_acquire().ok().map(Some),
            false => Some(None),
        }
    }

    /// A read of the stream waited for a lock in vain.
    pub(super) fn note(&self, stream: StreamId) {
        self.streams().insert(stream, Instant::now() + HELD_FOR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_all_that_are_held_one_is_read_at_a_time() {
        let held = HeldStreams::default();
        let [one, two, free] = [1, 2, 3].map(StreamId);
        held.note(one);
        held.note(two);
        let turn = held.turn(one);
        assert!(turn.is_some());
        assert!(held.turn(two).is_none() && held.turn(one).is_none());
        assert!(held.turn(free).is_some());
        drop(turn);
        assert!(held.turn(two).is_some());
    }
}
