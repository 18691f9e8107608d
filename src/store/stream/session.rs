//! Sessions that read and write the log, with the settings that each needs.

use sqlx::Executor as _;

use crate::store::bounded::{STATEMENT, bounded};
use crate::store::{Connection, Database, Error};

/// A connection for reads of the log. The leaves have no statistics (nothing analyzes them), so the planner is told: go by
/// the index, in its order, and plan anew each time, so that leaves out of range are neither looked at nor locked.
///
/// # Errors
/// The server cannot be reached or refuses.
pub async fn connect_reader(database: &Database) -> Result<Connection, Error> {
    let mut connection = database.connect().await?;
    let setting_up = connection.execute(
        "set enable_seqscan = off; set enable_bitmapscan = off; set enable_sort = off; \
         set enable_hashjoin = off; set enable_mergejoin = off; \
         set plan_cache_mode = force_custom_plan; set jit = off",
    );
    bounded("setting up a reader's session", STATEMENT, setting_up).await?;
    Ok(connection)
}

/// A reader that serves all streams: what one asks for under a lock of somebody else's is not waited for in the way of the others.
///
/// # Errors
/// The server cannot be reached or refuses.
pub async fn connect_shared_reader(database: &Database) -> Result<Connection, Error> {
    let connection = connect_reader(database).await?;
    waiting_for(connection, "set lock_timeout = '50ms'").await
}

/// The reader that passes on what is appended to all streams: it waits for no lock for long, as those that serve.
///
/// # Errors
/// The server cannot be reached or refuses.
pub async fn connect_tail(database: &Database) -> Result<Connection, Error> {
    connect_shared_reader(database).await
}

/// The session that changes streams and looks at all of them. A look at a stream that is locked is given up in a moment; for how long a
/// change waits, its transaction says.
///
/// # Errors
/// The server cannot be reached or refuses.
pub async fn connect_catalogue(database: &Database) -> Result<Connection, Error> {
    let connection = connect_reader(database).await?;
    waiting_for(connection, "set lock_timeout = '200ms'").await
}

async fn waiting_for(
    mut connection: Connection,
    setting: &'static str,
) -> Result<Connection, Error> {
    let setting_up = connection.execute(setting);
    bounded("setting up a reader's session", STATEMENT, setting_up).await?;
    Ok(connection)
}

/// A connection of the appender. What it waits for under a lock of somebody else's is up to that one stream, so it waits for a moment only.
/// A lane, for what is held already, tries again and again: it waits for less, since it has the heads of its streams meanwhile.
///
/// # Errors
/// The server cannot be reached or refuses.
pub async fn connect_appender(database: &Database, is_lane: bool) -> Result<Connection, Error> {
    let mut connection = database.connect().await?;
    let setting_up = connection.execute(match is_lane {
        true => "set lock_timeout = '50ms'",
        false => "set lock_timeout = '200ms'",
    });
    bounded("setting up an appender's session", STATEMENT, setting_up).await?;
    Ok(connection)
}

/// A connection of a duty: one stream that is locked holds up no other for long, and no plan is kept, which would lock all leaves.
///
/// # Errors
/// The server cannot be reached or refuses.
pub async fn connect_duty(database: &Database) -> Result<Connection, Error> {
    let mut connection = database.connect().await?;
    let setting_up =
        connection.execute("set lock_timeout = '200ms'; set plan_cache_mode = force_custom_plan");
    bounded("setting up a duty's session", STATEMENT, setting_up).await?;
    Ok(connection)
}
