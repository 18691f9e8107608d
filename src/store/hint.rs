//! Notices between nodes that something was appended. They are hints only: a lost one costs the time until the next look.

use sqlx::postgres::{PgListener, PgPoolOptions};

use super::bounded::{STATEMENT, bounded};
use super::{Connection, Database, Error};

const CHANNEL: &str = "postroad_appended";

/// Tells the other nodes. In a transaction of its own: a commit with a notice waits for all others that have one.
///
/// # Errors
/// The database's.
pub async fn tell_appended(connection: &mut Connection, incarnation: i64) -> Result<(), Error> {
    bounded(
        "telling other nodes of an append",
        STATEMENT,
        sqlx::query("select pg_notify($1, $2)")
            .bind(CHANNEL)
            .bind(incarnation.to_string())
            .execute(connection),
    )
    .await?;
    Ok(())
}

/// Hears notices, on a connection of its own.
#[derive(Debug)]
pub struct Hints(PgListener);

impl Hints {
    /// Connects and listens.
    ///
    /// # Errors
    /// The database's.
    pub async fn listen(database: &Database) -> Result<Self, Error> {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .connect_lazy_with(database.options());
        let listening = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(CHANNEL).await?;
            Ok(listener)
        };
        let listener = listening.await.map_err(Error::Connect)?;
        Ok(Self(listener))
    }

    /// The node that tells of an append. Connects again by itself when the connection is lost; notices of between are lost.
    ///
    /// # Errors
    /// The database cannot be reached.
    pub async fn next(&mut self) -> Result<i64, Error> {
        let notice = self.0.recv().await;
        let notice = notice.map_err(Error::query("waiting for notices"))?;
        Ok(notice.payload().parse().unwrap_or_default())
    }
}
