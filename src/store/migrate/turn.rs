//! One process at a time migrates a database.
//!
//! A lock, held by the session in which the migrations run, decides whose turn it is. The session ends with the migrations,
//! however they end: a failed migration leaves nothing behind that the next try, or another node, would wait for.

use std::time::{Duration, Instant};

use sqlx::Connection as _;

use super::super::bounded::{STATEMENT, bounded};
use super::super::{Connection, Database, Error};
use crate::supervisor::Backoff;

/// `postroad` in ASCII.
const LOCK: i64 = 0x706f_7374_726f_6164;
/// How long another session is waited for.
pub(super) const LONGEST: Duration = Duration::from_secs(600);
/// How often it is looked whether it has ended: at first, and at most.
const LOOK_EVERY: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
/// A wait is told in the log after this, and then every minute.
const TELL_AFTER: Duration = Duration::from_secs(1);
const TELL_EVERY: Duration = Duration::from_secs(60);

/// A session whose turn it is to migrate.
pub(super) struct Turn(pub(super) Connection);

impl Turn {
    /// Connects, and waits until no other session migrates; at most so long.
    pub(super) async fn take(database: &Database, longest: Duration) -> Result<Self, Error> {
        let mut connection = database.connect().await?;
        let began = Instant::now();
        let mut told: Option<Instant> = None;
        let mut pause = LOOK_EVERY;
        while !try_lock(&mut connection).await? {
            let waited = began.elapsed();
            let is_over = waited >= longest;
            if is_over || (waited >= TELL_AFTER && told.is_none_or(|at| at.elapsed() >= TELL_EVERY))
            {
                let holder = holder(&mut connection).await?;
                if is_over {
                    return Err(Error::MigrationHeld { waited, holder });
                }
                tracing::warn!(
                    database = %database.place(),
                    holder,
                    "waiting for another session that is migrating this database"
                );
                told = Some(Instant::now());
            }
            pause.wait().await;
        }
        if told.is_some() {
            tracing::info!(database = %database.place(), "the other session has ended");
        }
        Ok(Self(connection))
    }

    /// Gives the turn back.
    pub(super) async fn end(mut self) -> Result<(), Error> {
        let unlocking = sqlx::query("select pg_catalog.pg_advisory_unlock($1)")
            .bind(LOCK)
            .execute(&mut self.0);
        bounded("ending the migration", STATEMENT, unlocking).await?;
        // The server notices either way.
        let _ = bounded("ending the migration", STATEMENT, self.0.close()).await;
        Ok(())
    }
}

async fn try_lock(connection: &mut Connection) -> Result<bool, Error> {
    let locking = sqlx::query_scalar("select pg_catalog.pg_try_advisory_lock($1)")
        .bind(LOCK)
        .fetch_one(connection);
    bounded("looking whose turn it is to migrate", STATEMENT, locking).await
}

/// The session whose turn it is, for people.
async fn holder(connection: &mut Connection) -> Result<String, Error> {
    let looking = sqlx::query_scalar(
        "select pg_catalog.format('session %s of user %s%s, connected since %s, %s',
                l.pid, coalesce(a.usename, '?'), ' at ' || a.client_addr,
                pg_catalog.date_trunc('second', a.backend_start),
                coalesce(a.state || coalesce(', waiting for ' || a.wait_event_type || ' ' || a.wait_event, ''), 'state unknown'))
           from pg_catalog.pg_locks l
           left join pg_catalog.pg_stat_activity a on a.pid = l.pid
          where l.locktype = 'advisory' and l.granted and l.objsubid = 1
            and l.classid::bigint = ($1::bigint >> 32) and l.objid::bigint = ($1::bigint & 4294967295)
            and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
          order by l.pid
          limit 1",
    )
    .bind(LOCK)
    .fetch_optional(connection);
    let found: Option<String> =
        bounded("looking who migrates the database", STATEMENT, looking).await?;
    Ok(found.unwrap_or_else(|| "it has just ended".to_owned()))
}
