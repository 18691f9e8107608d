//! A bound in time for statements on connections of one's own.
//!
//! A host that vanishes without a word answers nothing, and neither sqlx nor Postgres' protocol would ever notice. A statement
//! that is given up leaves its connection in an unknown state: it must be dropped, and what it did is not known. So this is
//! for connections that one task owns and drops when they are lost, never for one of the pool.

use std::future::Future;
use std::time::Duration;

use super::Error;

/// To connect.
pub(in crate::store) const CONNECT: Duration = Duration::from_secs(10);
/// For what a node's life and its signs of life hang on: half of the usual time to live.
pub(in crate::store) const HEARTBEAT: Duration = Duration::from_secs(5);
/// Longer than any group commit or read of a page that makes progress.
pub(in crate::store) const STATEMENT: Duration = Duration::from_secs(60);
/// For statements whose size grows with what has piled up.
pub(in crate::store) const LONG_STATEMENT: Duration = Duration::from_secs(120);

/// Waits at most so long for a statement; then it is a lost connection.
pub(in crate::store) async fn bounded<T>(
    doing: &'static str,
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Error> {
    within(limit, statement).await.map_err(Error::query(doing))
}

/// Waits at most so long for a connection.
pub(in crate::store) async fn connecting<T>(
    connect: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Error> {
    within(CONNECT, connect).await.map_err(Error::Connect)
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    let timed_out = |_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()));
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(timed_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_answers_nothing_is_a_lost_connection() {
        let silent = std::future::pending::<Result<(), sqlx::Error>>();
        let asked = bounded("asking", Duration::from_millis(1), silent).await;
        assert!(asked.is_err_and(|error| error.is_connection_lost()));
    }
}
