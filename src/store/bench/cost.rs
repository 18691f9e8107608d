//! The cost of a load to the server, as the server reports it.

use super::super::{Connection, Error};

/// Readings that are compared between two moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Position in the write-ahead log, in bytes.
    pub wal_bytes: i64,
    /// Size of the database, in bytes.
    pub database_bytes: i64,
}

/// The server, and how to find its processes.
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    /// `15.14`.
    pub version: String,
    /// The backend of the connection that asked.
    pub backend_pid: i32,
    /// The postmaster's start, in seconds since the Unix epoch.
    pub started_at: f64,
    /// Settings that decide what a commit costs: name and value.
    pub settings: Vec<(String, String)>,
}

/// Reads the log's position and the database's size.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn cost(connection: &mut Connection) -> Result<Cost, Error> {
    let (wal_bytes, database_bytes) = sqlx::query_as::<_, (i64, i64)>(
        "select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint, pg_database_size(current_database())",
    )
    .fetch_one(connection)
    .await
    .map_err(Error::query("reading the position of the log"))?;
    Ok(Cost {
        wal_bytes,
        database_bytes,
    })
}

/// Describes the server.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn server(connection: &mut Connection) -> Result<Server, Error> {
    let (version, backend_pid, started_at) = sqlx::query_as::<_, (String, i32, f64)>(
        "select current_setting('server_version'), pg_backend_pid(),
            extract(epoch from pg_postmaster_start_time())::float8",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(Error::query("asking the server for its version"))?;
    let settings = sqlx::query_as::<_, (String, String)>(
        "select name, current_setting(name) from pg_settings
         where name in ('shared_buffers', 'fsync', 'synchronous_commit', 'full_page_writes', 'wal_sync_method', 'max_wal_size',
            'checkpoint_timeout', 'wal_compression', 'commit_delay')
         order by name",
    )
    .fetch_all(connection)
    .await
    .map_err(Error::query("asking the server for its settings"))?;
    Ok(Server {
        version,
        backend_pid,
        started_at,
        settings,
    })
}
