//! Long polls for queues of other nodes. Of the polls that wait here for one queue, a few also wait at its owner; the
//! others wait in line here, where a poll costs no request. The number at the owner follows the messages that the owner
//! lately had: each answer with messages makes room for one more than it took, each empty answer halves the room. So a
//! queue with nothing to hand out is asked by one poll, however many wait.
//!
//! This module sends no requests: `poll` does, when its turn comes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::domain::name::QueueName;

/// Polls of one queue that are with its owner at a time, at most.
const ROOM_MAX: usize = 64;
/// Places in a line that are looked through for callers who are gone, at least.
const SWEEP_MIN: usize = 64;

/// The lines of all queues of other nodes.
#[derive(Debug, Default)]
pub(in crate::http) struct Lines(Mutex<HashMap<QueueName, Line>>);

#[derive(Debug)]
struct Line {
    /// Polls that may be with the owner.
    room: usize,
    /// Polls that are.
    busy: usize,
    waiting: VecDeque<oneshot::Sender<Turn>>,
    /// The length at which entries without a caller are removed: twice the length after the last removal.
    sweep_at: usize,
}

/// A poll may go to the owner. Dropped when it is back.
#[derive(Debug)]
pub(super) struct Turn {
    /// None once there is nothing to give back.
    lines: Option<Arc<Lines>>,
    queue: QueueName,
}

impl Lines {
    /// A turn, or where it will come.
    pub(super) fn join(
        self: &Arc<Self>,
        queue: &QueueName,
    ) -> Result<Turn, oneshot::Receiver<Turn>> {
        let mut lines = self.lock();
        let line = lines.entry(queue.clone()).or_insert(Line {
            room: 1,
            busy: 0,
            waiting: VecDeque::new(),
            sweep_at: SWEEP_MIN,
        });
        if line.busy < line.room {
            line.busy += 1;
            return Ok(self.turn(queue));
        }
        if line.waiting.len() >= line.sweep_at {
            // One poll can be with the owner for long, while any number of short ones come and go behind it.
            line.waiting.retain(|poll| !poll.is_closed());
            line.sweep_at = (line.waiting.len() * 2).max(SWEEP_MIN);
        }
        let (sender, receiver) = oneshot::channel();
        line.waiting.push_back(sender);
        Err(receiver)
    }

    /// Polls that wait here.
    #[cfg(test)]
    fn len(&self) -> usize {
        let lines = self.lock();
        let waiting = lines.values().map(|line| line.waiting.iter());
        waiting.flatten().filter(|poll| !poll.is_closed()).count()
    }

    fn turn(self: &Arc<Self>, queue: &QueueName) -> Turn {
        Turn {
            lines: Some(Arc::clone(self)),
            queue: queue.clone(),
        }
    }

    /// A poll is back from the owner: the next ones go.
    fn leave(self: &Arc<Self>, queue: &QueueName) {
        let mut lines = self.lock();
        let Some(line) = lines.get_mut(queue) else {
            return;
        };
        line.busy = line.busy.saturating_sub(1);
        while line.busy < line.room
            && let Some(next) = line.waiting.pop_front()
        {
            match next.send(self.turn(queue)) {
                Ok(()) => line.busy += 1,
                // Its caller is gone.
                Err(mut turn) => turn.lines = None,
            }
        }
        if line.busy == 0 && line.waiting.is_empty() {
            lines.remove(queue);
        }
    }

    fn resize(&self, queue: &QueueName, size: impl FnOnce(usize) -> usize) {
        if let Some(line) = self.lock().get_mut(queue) {
            line.room = size(line.room).clamp(1, ROOM_MAX);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<QueueName, Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// The owner had messages for it, or none.
    pub(super) fn answered(self, has_messages: bool) {
        if let Some(lines) = &self.lines {
            match has_messages {
                true => lines.resize(&self.queue, |room| room + 1),
                false => lines.resize(&self.queue, |room| room / 2),
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(lines) = self.lines.take() {
            lines.leave(&self.queue);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn polls_that_came_and_went_leave_no_places_behind() {
        let (lines, queue) = (Arc::new(Lines::default()), QueueName::parse("q").unwrap());
        let first = lines.join(&queue).unwrap();
        let stays: Vec<_> = (0..SWEEP_MIN)
            .map(|_| lines.join(&queue).unwrap_err())
            .collect();
        for _ in 0..10_000 {
            drop(lines.join(&queue).unwrap_err());
        }
        assert!(lines.lock()[&queue].waiting.len() <= SWEEP_MIN * 2);
        assert_eq!(lines.len(), SWEEP_MIN);
        drop((first, stays));
    }

    #[test]
    fn an_idle_queue_is_asked_by_one_and_a_busy_one_by_as_many_as_it_serves() {
        let (lines, queue) = (Arc::new(Lines::default()), QueueName::parse("q").unwrap());
        let first = lines.join(&queue).unwrap();
        let mut waiting: VecDeque<_> = (0..10).map(|_| lines.join(&queue).unwrap_err()).collect();
        assert_eq!(lines.len(), 10);
        first.answered(true);
        let mut turns: Vec<Turn> = Vec::new();
        for _ in 0..2 {
            turns.push(waiting.pop_front().unwrap().try_recv().unwrap());
        }
        assert!(waiting[0].try_recv().is_err(), "two at a time by now");
        // One whose caller is gone holds nobody up; and one that gives up its turn unanswered changes nothing.
        drop(waiting.pop_front());
        drop(turns.pop());
        turns.push(waiting.pop_front().unwrap().try_recv().unwrap());
        assert!(waiting[0].try_recv().is_err());
        turns.pop().unwrap().answered(false);
        assert!(
            waiting[0].try_recv().is_err(),
            "room for one, and one is there"
        );
        turns.pop().unwrap().answered(false);
        drop(waiting.pop_front().unwrap().try_recv().unwrap());
        // A turn that comes to somebody who has just gone is passed on.
        drop(waiting.pop_front());
        while let Some(mut next) = waiting.pop_front() {
            next.try_recv().unwrap().answered(true);
        }
        assert_eq!(
            (lines.len(), lines.lock().len()),
            (0, 0),
            "nothing is left of it"
        );
    }
}
