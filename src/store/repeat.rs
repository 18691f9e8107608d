//! Finds out the outcome of a write whose connection was lost.
//!
//! The writes here may be repeated: a repeat does nothing, and returns what the first one returned. (They name what they
//! change by a number that is never used again, or by the state that they begin from.) Group commits of the appender and of
//! the queues have their own numbers, and find out by those.

use std::future::Future;
use std::time::{Duration, Instant};

use super::Error;
use crate::supervisor::Backoff;

/// How long a write is repeated whose outcome is not known. Callers wait longer for an answer.
const PATIENCE: Duration = Duration::from_secs(6);
const PAUSE: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_millis(500));

/// A write on its way to a known outcome.
#[derive(Debug)]
pub struct Patience {
    until: Instant,
    pause: Backoff,
    is_unknown: bool,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            until: Instant::now() + PATIENCE,
            pause: PAUSE,
            is_unknown: false,
        }
    }
}

impl Patience {
    /// Whether an earlier try may have been carried out.
    #[must_use]
    pub fn is_repeat(&self) -> bool {
        self.is_unknown
    }

    /// Ok if the caller should repeat the write after this error; it has waited a little by then. Otherwise the error to report. The
    /// caller must drop the connection.
    ///
    /// # Errors
    /// The error, or [`Error::OutcomeUnknown`] if an earlier try may have been carried out.
    pub async fn again(&mut self, error: Error) -> Result<(), Error> {
        // What found no connection was never sent.
        let was_sent = !matches!(error, Error::Connect(_));
        self.is_unknown |= was_sent && error.is_connection_lost();
        let is_passing = error.is_connection_lost() || error.retry() != super::Retry::Never;
        if !self.is_unknown || !is_passing {
            return Err(error);
        }
        if Instant::now() >= self.until {
            return Err(Error::OutcomeUnknown(Box::new(error)));
        }
        self.pause.wait().await;
        Ok(())
    }
}

/// Repeats a write on connections of the pool until its outcome is known, for 6 s at most. It is told whether an earlier try may have
/// been carried out.
pub(in crate::store) async fn repeated<T, F>(mut write: impl FnMut(bool) -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut patience = Patience::default();
    loop {
        match write(patience.is_repeat()).await {
            Ok(done) => return Ok(done),
            Err(error) => patience.again(error).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn lost() -> Error {
        Error::query("writing")(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into()))
    }

    #[tokio::test]
    async fn a_lost_write_is_repeated_and_knows_it() {
        let tries = Cell::new(0);
        let done = repeated(|is_repeat| {
            tries.set(tries.get() + 1);
            let number = tries.get();
            async move {
                match number {
                    1 => Err(lost()),
                    // The server is not back yet: nothing new is known.
                    2 => Err(Error::Connect(sqlx::Error::PoolTimedOut)),
                    _ => Ok(is_repeat),
                }
            }
        });
        assert!(done.await.is_ok_and(|is_repeat| is_repeat));
        assert_eq!(tries.get(), 3);
    }

    #[tokio::test]
    async fn what_was_never_sent_or_is_refused_is_told_at_once() {
        let never: Result<(), Error> =
            repeated(|_| async { Err(Error::Connect(sqlx::Error::PoolTimedOut)) }).await;
        assert!(matches!(never, Err(Error::Connect(_))));
        let tries = Cell::new(0);
        let refused: Result<(), Error> = repeated(|_| {
            tries.set(tries.get() + 1);
            let number = tries.get();
            async move {
                match number {
                    1 => Err(lost()),
                    _ => Err(Error::query("writing")(sqlx::Error::RowNotFound)),
                }
            }
        })
        .await;
        assert!(matches!(refused, Err(Error::Query { .. })));
        assert_eq!(tries.get(), 2);
    }
}
