//! Answers that a connection's client has not taken yet, and how long it may take for them.
//!
//! An answer's memory is given back with its last byte, so a client that takes none of it would keep it from others. Three times bound
//! that. An answer is to be taken within a patience and at a rate; those that are under way beside it on the same connection count into
//! its own time, since they share the way. A client that takes nothing at all for the patience loses its connection, and for a third of it
//! while others wait for room.
//!
//! Bytes that move count as taken over HTTP/1. Over HTTP/2 a client can answer pings for ever and leave the windows shut: there only
//! pieces of answers count.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::budget::Share;

/// How long a client may take nothing, and how long an answer may take besides its time at the rate.
pub(in crate::http) const PATIENCE: Duration = Duration::from_secs(30);
/// The bytes taken in a second, at least.
const BYTES_PER_SECOND: f64 = 65_536.0;
/// The longest that answers beside it can make an answer's time.
const LONGEST: Duration = Duration::from_secs(30 * 60);
/// While others wait for room, a client that takes nothing has one part in so many of the patience.
const PRESSED_PART: u32 = 3;
/// How often a client that takes nothing is looked at anew, since others may begin to wait: so many times in the patience.
const LOOKS: u32 = 30;

/// The memory that an answer holds until its last byte is in the kernel's hands.
#[derive(Debug, Default)]
pub(in crate::http) struct Held(pub(in crate::http) Option<Arc<Share>>);

impl Held {
    /// True if others wait for the memory that it holds.
    fn is_wanted(&self) -> bool {
        self.0.as_ref().is_some_and(|share| share.is_wanted())
    }
}

/// An answer on its way.
#[derive(Debug)]
struct Answer {
    held: Weak<Held>,
    bytes: usize,
    due_at: Instant,
    due_latest: Instant,
}

/// The answers of a connection.
#[derive(Debug)]
pub(in crate::http) struct Unread {
    patience: Duration,
    /// Asked first, since most connections have none.
    has_any: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    answers: Vec<Answer>,
    /// The time when the client last took something.
    moved_at: Instant,
}

/// How it stands with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) enum Standing {
    /// All are taken.
    Taken,
    /// Some are not; to be looked at anew then.
    LookAt(Instant),
    /// The client has had its time.
    Over,
}

fn time_of(bytes: usize) -> Duration {
    Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND)
}

impl Unread {
    pub(in crate::http) fn new(patience: Duration) -> Self {
        Self {
            patience,
            has_any: AtomicBool::new(false),
            state: Mutex::new(State {
                answers: Vec::new(),
                moved_at: Instant::now(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer of so many bytes was made. Whether it is the only one: then the connection is to look at them.
    pub(in crate::http) fn add(&self, held: &Arc<Held>, bytes: usize, now: Instant) -> bool {
        let mut state = self.state();
        state.drop_taken();
        let time = time_of(bytes);
        let mut before = 0;
        for answer in &mut state.answers {
            answer.due_at = (answer.due_at + time).min(answer.due_latest);
            before += answer.bytes;
        }
        let is_first = state.answers.is_empty();
        if is_first {
            state.moved_at = now;
        }
        let due_latest = now + self.patience + time.max(LONGEST);
        state.answers.push(Answer {
            held: Arc::downgrade(held),
            bytes,
            due_at: (now + self.patience + time + time_of(before)).min(due_latest),
            due_latest,
        });
        self.has_any.store(true, Ordering::Relaxed);
        is_first
    }

    /// The client took something.
    pub(in crate::http) fn moved(&self) {
        if self.has_any.load(Ordering::Relaxed) {
            self.state().moved_at = Instant::now();
        }
    }

    /// How it stands.
    pub(in crate::http) fn standing(&self, now: Instant) -> Standing {
        if !self.has_any.load(Ordering::Relaxed) {
            return Standing::Taken;
        }
        let mut state = self.state();
        state.drop_taken();
        let Some(due_at) = state.answers.iter().map(|answer| answer.due_at).min() else {
            self.has_any.store(false, Ordering::Relaxed);
            return Standing::Taken;
        };
        let over_at = due_at.min(state.moved_at + self.patience);
        let pressed_at = state.moved_at + self.patience / PRESSED_PART;
        let is_wanted = || {
            let mut held = state.answers.iter().map(|answer| answer.held.upgrade());
            held.any(|held| held.is_some_and(|held| held.is_wanted()))
        };
        if now >= over_at || now >= pressed_at && is_wanted() {
            return Standing::Over;
        }
        let next = pressed_at.max(now + self.patience / LOOKS);
        Standing::LookAt(next.min(over_at))
    }
}

impl State {
    fn drop_taken(&mut self) {
        self.answers.retain(|answer| answer.held.strong_count() > 0);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::http::budget::Budget;

    const MIB: usize = 1 << 20;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn answers_beside_each_other_have_the_time_of_all() {
        let (unread, now) = (Unread::new(PATIENCE), Instant::now());
        assert_eq!(unread.standing(now), Standing::Taken);
        // 256 s each, at the rate.
        let held: Vec<Arc<Held>> = (0..4).map(|_| Arc::default()).collect();
        for (number, held) in held.iter().enumerate() {
            assert_eq!(unread.add(held, 16 * MIB, now), number == 0);
        }
        let is_over = |after: u64| {
            unread.state().moved_at = now + seconds(after);
            unread.standing(now + seconds(after)) == Standing::Over
        };
        assert!(!is_over(31) && !is_over(290), "the first alone had 286 s");
        assert!(!is_over(1_050) && is_over(1_055));
        // Small ones without end keep none of them for ever.
        for _ in 0..1_000 {
            let small = Arc::default();
            unread.add(&small, 16 * MIB, now + seconds(1_000));
        }
        assert!(is_over(31 * 60));
        drop(held);
        assert_eq!(unread.standing(now), Standing::Taken);
    }

    #[test]
    fn who_takes_nothing_has_less_time_and_while_others_wait_still_less() {
        let (unread, now) = (Unread::new(PATIENCE), Instant::now());
        let held = Arc::default();
        unread.add(&held, 16 * MIB, now);
        assert_eq!(unread.standing(now), Standing::LookAt(now + seconds(10)));
        let later = now + seconds(10);
        assert_eq!(
            unread.standing(later),
            Standing::LookAt(later + seconds(1)),
            "whether others wait"
        );
        assert_eq!(unread.standing(now + seconds(30)), Standing::Over);
        unread.state().moved_at = now + seconds(20);
        assert_ne!(unread.standing(now + seconds(30)), Standing::Over);
    }

    #[tokio::test]
    async fn others_that_wait_are_seen() {
        let (unread, now) = (Unread::new(PATIENCE), Instant::now());
        let budget = Budget::new(MIB, "answers");
        let share = budget.hold(MIB).await.unwrap();
        let held = Arc::new(Held(Some(Arc::new(share))));
        unread.add(&held, MIB, now);
        assert_ne!(unread.standing(now + seconds(10)), Standing::Over);
        let mut waits = Box::pin(budget.hold(MIB));
        assert!(futures_util::poll!(&mut waits).is_pending());
        assert_ne!(unread.standing(now + seconds(9)), Standing::Over);
        assert_eq!(unread.standing(now + seconds(10)), Standing::Over);
        drop(waits);
        assert_ne!(unread.standing(now + seconds(10)), Standing::Over);
    }
}
