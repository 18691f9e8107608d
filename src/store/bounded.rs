//! A time limit for statements on a task's own connection.
//!
//! A host that vanishes silently never answers, and neither sqlx nor Postgres' protocol would notice. A statement that is
//! given up leaves its connection in an unknown state: the connection must be dropped, and the statement's outcome is
//! unknown. So this is for connections that one task owns and drops when they are lost, or for one that then leaves its
//! pool.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::Error;

/// How long a statement is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Limit {
    first: Duration,
    /// Each time that a statement of a kind is given up, the next of its kind gets twice the time, up to this limit, until one is
    /// answered within the first limit. So a slow statement that makes progress is not restarted for ever, and does not each time
    /// leave a session that still works on it.
    longest: Duration,
}

/// To connect.
pub(in crate::store) const CONNECT: Duration = Duration::from_secs(10);
/// For what a node's life and its signs of life hang on: half of the usual time to live.
pub(in crate::store) const HEARTBEAT: Limit = Limit::of(5, 5);
/// To begin with, longer than a group commit or a read of a page takes on a disk that is not ill, and not longer than who waits for a
/// group is kept waiting; then longer than any that makes progress.
pub(in crate::store) const STATEMENT: Limit = Limit::of(10, 60);
/// For statements whose size grows with the backlog. The first limit is less than a stop waits for a task in the middle of one.
pub(in crate::store) const LONG_STATEMENT: Limit = Limit::of(20, 120);

impl Limit {
    const fn of(first_seconds: u64, longest_seconds: u64) -> Self {
        Self {
            first: Duration::from_secs(first_seconds),
            longest: Duration::from_secs(longest_seconds),
        }
    }

    fn after(self, given_up: u32) -> Duration {
        let factor = 2_u32.saturating_pow(given_up.min(16));
        self.first.saturating_mul(factor).min(self.longest)
    }
}

/// Kinds of statements of which the last was given up, and how many in a row.
#[derive(Debug, Default)]
struct GivenUp {
    /// How many kinds there are in the map: mostly none, and then nobody looks.
    kinds: AtomicUsize,
    counts: Mutex<HashMap<&'static str, u32>>,
}

impl GivenUp {
    fn counts(&self) -> MutexGuard<'_, HashMap<&'static str, u32>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, doing: &str) -> u32 {
        match self.kinds.load(Ordering::Acquire) {
            0 => 0,
            _ => self.counts().get(doing).copied().unwrap_or(0),
        }
    }

    fn add(&self, doing: &'static str) {
        let mut counts = self.counts();
        *counts.entry(doing).or_default() += 1;
        self.kinds.store(counts.len(), Ordering::Release);
    }

    /// One was answered in time.
    fn forget(&self, doing: &str) {
        if self.kinds.load(Ordering::Acquire) > 0 {
            let mut counts = self.counts();
            counts.remove(doing);
            self.kinds.store(counts.len(), Ordering::Release);
        }
    }
}

fn given_up() -> &'static GivenUp {
    static GIVEN_UP: OnceLock<GivenUp> = OnceLock::new();
    GIVEN_UP.get_or_init(GivenUp::default)
}

/// Waits at most so long for a statement; then it is a lost connection.
pub(in crate::store) async fn bounded<T>(
    doing: &'static str,
    limit: Limit,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Error> {
    bounded_by(given_up(), doing, limit, statement).await
}

async fn bounded_by<T>(
    given_up: &GivenUp,
    doing: &'static str,
    limit: Limit,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Error> {
    let (began, longest) = (Instant::now(), limit.after(given_up.count(doing)));
    let done = tokio::time::timeout(longest, statement).await;
    if done.is_err() {
        given_up.add(doing);
    } else if began.elapsed() <= limit.first {
        given_up.forget(doing);
    }
    done.unwrap_or_else(timed_out).map_err(Error::query(doing))
}

/// Waits at most so long for a connection.
pub(in crate::store) async fn connecting<T>(
    longest: Duration,
    connect: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Error> {
    let connected = tokio::time::timeout(longest, connect).await;
    connected.unwrap_or_else(timed_out).map_err(Error::Connect)
}

fn timed_out<T>(_: tokio::time::error::Elapsed) -> Result<T, sqlx::Error> {
    Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Limit = Limit {
        first: Duration::from_millis(50),
        longest: Duration::from_millis(400),
    };

    #[tokio::test]
    async fn a_server_that_answers_nothing_is_a_lost_connection() {
        let given_up = GivenUp::default();
        for times in 1..=3 {
            let silent = std::future::pending::<Result<(), sqlx::Error>>();
            let asked = bounded_by(&given_up, "asking", QUICK, silent).await;
            assert!(asked.is_err_and(|error| error.is_connection_lost()));
            assert_eq!(given_up.count("asking"), times);
        }
        assert_eq!(given_up.count("asking for something else"), 0);
        // One that is slow and comes is waited for as long again.
        let slow = async {
            tokio::time::sleep(QUICK.first * 2).await;
            Ok(())
        };
        assert!(bounded_by(&given_up, "asking", QUICK, slow).await.is_ok());
        assert_eq!(given_up.count("asking"), 3);
        // An answer, whatever it says: the server is there.
        let refused = std::future::ready(Err::<(), _>(sqlx::Error::RowNotFound));
        let _ = bounded_by(&given_up, "asking", QUICK, refused).await;
        assert_eq!(given_up.count("asking"), 0);
        assert_eq!(given_up.kinds.load(Ordering::Acquire), 0);
    }

    #[test]
    fn what_is_given_up_again_and_again_is_waited_for_longer() {
        let seconds = [0, 1, 2, 3, 100].map(|given_up| STATEMENT.after(given_up).as_secs());
        assert_eq!(seconds, [10, 20, 40, 60, 60]);
        assert_eq!(HEARTBEAT.after(9), HEARTBEAT.after(0));
    }
}
