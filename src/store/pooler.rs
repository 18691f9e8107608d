//! The ways between Postroad and a server: direct, through a pooler whose clients have their own sessions, or through one
//! whose clients share sessions.
//!
//! The last kind cannot work: settings, prepared statements and locks of a session are lost, or go to another client.
//! Postroad detects it before it sets anything. Statements go as simple queries, which leave nothing behind in a session.

use sqlx::{AssertSqlSafe, Row as _};

use super::bounded::{HEARTBEAT, bounded};
use super::{Connection, Database, Error};

/// A setting that means nothing to anybody else: a session that has it began with Postroad's settings.
pub(in crate::store) const MARKER: (&str, &str) = ("postroad.session", "postroad");

/// A session's own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    pid: i32,
    is_marked: bool,
}

async fn look(connection: &mut Connection) -> Result<Seen, Error> {
    const DOING: &str = "looking for a pooler";
    let text = format!(
        "select pg_catalog.pg_backend_pid(), \
         coalesce(pg_catalog.current_setting('{}', true), '') operator(pg_catalog.=) '{}'",
        MARKER.0, MARKER.1
    );
    let looking = sqlx::raw_sql(AssertSqlSafe(text)).fetch_one(connection);
    let row = bounded(DOING, HEARTBEAT, looking).await?;
    let read = || Ok((row.try_get(0)?, row.try_get(1)?));
    let (pid, is_marked) = read().map_err(Error::query(DOING))?;
    Ok(Seen { pid, is_marked })
}

/// Refuses a pooler whose clients share sessions. One whose clients do not may have dropped the settings: they are set then, here and in
/// every session from now on. `is_sure`: looks twice even where nothing seems to be between.
pub(in crate::store) async fn check(
    database: &Database,
    connection: &mut Connection,
    settings: &[(&str, &str)],
    is_sure: bool,
) -> Result<(), Error> {
    let first = look(connection).await?;
    if first.is_marked && !is_sure {
        return Ok(());
    }
    if is_shared(database, connection, first).await? {
        return Err(Error::Pooled);
    }
    if !first.is_marked {
        if !database.sets_sessions() {
            tracing::info!(
                database = %database.place(),
                "a pooler drops the startup settings of sessions; setting them after connecting"
            );
        }
        database.set_sessions();
        set(connection, settings).await?;
    }
    Ok(())
}

/// Whether two clients that are there at a time are served by one session, or one of them by two.
async fn is_shared(
    database: &Database,
    connection: &mut Connection,
    first: Seen,
) -> Result<bool, Error> {
    let mut other = database.open_unchecked(&[]).await?;
    let beside = match look(&mut other).await {
        Ok(beside) => beside,
        // A pool of sessions that has no other to give.
        Err(error) if error.is_timed_out() => return Ok(false),
        Err(error) => return Err(error),
    };
    let (first_again, beside_again) = (look(connection).await?, look(&mut other).await?);
    Ok(first.pid == beside.pid || first.pid != first_again.pid || beside.pid != beside_again.pid)
}

/// Sets what the session was to begin with.
pub(in crate::store) async fn set(
    connection: &mut Connection,
    settings: &[(&str, &str)],
) -> Result<(), Error> {
    let setting = sqlx::raw_sql(AssertSqlSafe(text_of(settings))).execute(connection);
    bounded("setting up a session", HEARTBEAT, setting).await?;
    Ok(())
}

/// As statements. Names and values are constants of this program.
pub(in crate::store) fn text_of(settings: &[(&str, &str)]) -> String {
    let settings = settings.iter();
    let statements = settings.map(|(name, value)| format!("set {name} = '{value}';"));
    statements.collect()
}
