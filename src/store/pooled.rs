//! Single statements on connections of the pool.
//!
//! A statement that is not answered is given up after a while, as in `bounded`, and its connection leaves the pool. (When a
//! statement is dropped, its connection goes back to the pool, which first asks it for a sign of life, without a time
//! limit, and keeps its place meanwhile.)

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use sqlx::postgres::{PgPool, PgQueryResult, PgRow, PgStatement, PgTypeInfo};
use sqlx::{Connection as _, Either, Error, Execute, Executor, PgConnection, Postgres, SqlStr};

/// Longer than any of these statements takes, since what grows without end has connections of its own; less than a stop waits for
/// whoever is in the middle of one.
const STATEMENT: Duration = Duration::from_secs(15);
/// For a sign of life of a connection that was idle: several may be dead in the time that somebody waits for one.
const PING: Duration = Duration::from_secs(2);

/// The pool, to run one statement on.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct Pooled<'p>(pub(in crate::store) &'p PgPool);

/// Whether an idle connection may be used.
pub(in crate::store) async fn is_alive(connection: &mut PgConnection) -> Result<bool, Error> {
    match tokio::time::timeout(PING, connection.ping()).await {
        Ok(alive) => alive.map(|()| true),
        Err(_) => Err(timed_out()),
    }
}

fn timed_out() -> Error {
    Error::Io(std::io::ErrorKind::TimedOut.into())
}

/// Waits for a statement, and keeps its connection from the pool if it is given up.
macro_rules! bounded {
    ($connection:ident, $running:expr) => {
        match tokio::time::timeout(STATEMENT, $running).await {
            Ok(done) => done,
            Err(_) => {
                $connection.close_on_drop();
                Err(timed_out())
            }
        }
    };
}

impl<'p> Executor<'p> for Pooled<'p> {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let all = async move {
            let mut connection = self.0.acquire().await?;
            let running = (&mut *connection).fetch_many(query).try_collect::<Vec<_>>();
            bounded!(connection, running)
        };
        let all = all.map(|done| match done {
            Ok(steps) => stream::iter(steps.into_iter().map(Ok)).left_stream(),
            Err(error) => stream::once(std::future::ready(Err(error))).right_stream(),
        });
        all.flatten_stream().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        async move {
            let mut connection = self.0.acquire().await?;
            let running = (&mut *connection).fetch_optional(query);
            bounded!(connection, running)
        }
        .boxed()
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [PgTypeInfo],
    ) -> BoxFuture<'e, Result<PgStatement, Error>>
    where
        'p: 'e,
    {
        async move {
            let mut connection = self.0.acquire().await?;
            (&mut *connection).prepare_with(sql, parameters).await
        }
        .boxed()
    }
}
