//! All SQL, and all of sqlx, by table family. Engines call functions of this module and get domain types back.

pub mod bench;
mod bounded;
pub mod cluster;
mod error;
mod guard;
pub mod hint;
pub mod history;
pub mod journal;
pub mod letter;
pub mod lock;
pub mod mapped;
pub mod mark;
pub mod migrate;
#[cfg(feature = "failpoints")]
mod mutant;
pub mod origin;
mod pooled;
pub mod queue;
pub mod redrive;
pub mod relay;
pub mod renewal;
mod repeat;
pub mod server;
pub mod shop;
pub mod stream;
pub mod topic;

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _};

pub use error::{Error, Retry};
use guard::Guard;
use pooled::Pooled;
pub use repeat::Patience;
use repeat::repeated;

/// A connection of its own, for what must not share one: a relay's session, a heartbeat, an appender.
pub type Connection = sqlx::PgConnection;

/// Settings of every session (ARCHITECTURE.md, what must stay true): a role's default of repeatable read gave two
/// appends one offset. Compiling a plan takes far longer than any of these short statements: with `jit` on, the planner's
/// penalty for scans that the hot functions forbid had the appender's and the writer's sessions compile in every group. A process that
/// is stopped within a transaction holds the rows of leases: for no longer than the shortest time to live, after which others
/// are to have them. The server asks after clients that it has not heard of, and ends the sessions of those that are gone without a
/// word: by default it keeps them, and the locks they hold or wait for, for two hours. (On Unix sockets it disregards that.)
///
/// A name without a schema means Postgres' own. Whoever may create in another schema of the role's search path would otherwise
/// have an operator of his run with the rights of this session, which may be those of a superuser. Limits that somebody put on the role for
/// his application's sessions would end a migration, or a statement that is bounded here anyway.
const SESSION: [(&str, &str); 15] = [
    ("search_path", "pg_catalog, pg_temp"),
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("synchronous_commit", "on"),
    ("idle_in_transaction_session_timeout", "2s"),
    ("timezone", "UTC"),
    ("jit", "off"),
    ("application_name", "postroad"),
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "25s"),
];

/// Settings that not every server has, which would refuse a session that asks for them. A session whose statement was given up waits
/// for a lock, or for a standby, and would not notice that its client is gone: it would stay for as long, one more each time.
async fn settle(connection: &mut Connection) -> Result<(), sqlx::Error> {
    const SETTLE: &str = "select set_config(s.name, s.value, false)
        from (values
            ('client_connection_check_interval', '5s', version() like '%linux%'),
            ('transaction_timeout', '0', true)
        ) as s (name, value, fits)
        where s.fits and current_setting(s.name, true) is not null";
    sqlx::query(SETTLE)
        .persistent(false)
        .execute(&mut *connection)
        .await?;
    // Tests give a database another clock by a schema before Postgres' own.
    #[cfg(feature = "failpoints")]
    sqlx::query(
        "select set_config('search_path', 'settable, pg_catalog, pg_temp', false) where to_regnamespace('settable') is not null",
    )
    .persistent(false)
    .execute(connection)
    .await?;
    Ok(())
}

/// A Postgres database, reached by its URL. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Database {
    options: PgConnectOptions,
    pool: PgPool,
    guard: Arc<Guard>,
}

impl Database {
    /// Parses the URL and makes a pool that connects when first used.
    ///
    /// # Errors
    /// A URL that is not one of Postgres.
    pub fn new(url: &str, pool_size: u32) -> Result<Self, Error> {
        let options = url
            .parse::<PgConnectOptions>()
            .map_err(Error::url)?
            .options(SESSION)
            .disable_statement_logging();
        let guard = Arc::new(Guard::new());
        let of_pool = Arc::clone(&guard);
        let pool = PgPoolOptions::new()
            .max_connections(pool_size)
            .acquire_timeout(Duration::from_secs(10))
            .test_before_acquire(false)
            .before_acquire(|connection, _| Box::pin(pooled::is_alive(connection)))
            .after_connect(move |connection, _| {
                let guard = Arc::clone(&of_pool);
                Box::pin(async move {
                    settle(connection).await?;
                    guard.check(connection).await
                })
            })
            .connect_lazy_with(options.clone());
        Ok(Self {
            options,
            pool,
            guard,
        })
    }

    /// A connection outside the pool.
    ///
    /// # Errors
    /// The server cannot be reached within 10 s or refuses, or has another history than before ([`Database::history_changed`]).
    pub async fn connect(&self) -> Result<Connection, Error> {
        bounded::connecting(async {
            let mut connection = Connection::connect_with(&self.options).await?;
            settle(&mut connection).await?;
            self.guard.check(&mut connection).await?;
            Ok(connection)
        })
        .await
    }

    /// The number of the next heartbeat.
    #[must_use]
    pub fn next_beat(&self) -> i64 {
        self.guard.next_beat()
    }

    /// The heartbeat of that number is committed, in the row of this incarnation.
    pub fn note_beat(&self, incarnation: i64, beat: i64) {
        self.guard.note_beat(incarnation, beat);
    }

    /// Resolves when a new connection has met another history than the one that [`history::begin`] found: another server, another
    /// timeline, or an older copy. Says which. No connection is made any more, and what this process has in memory of the database
    /// is void. Cancel-safe.
    pub async fn history_changed(&self) -> String {
        self.guard.changed().await
    }

    /// The pool. Statements on it must run in tasks that are never aborted: see docs/decisions.md on `Pool::begin`.
    pub(in crate::store) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// The pool, for one statement, which is given up when it is not answered.
    pub(in crate::store) fn pooled(&self) -> Pooled<'_> {
        Pooled(&self.pool)
    }

    /// Where the database is, for logs: host (or the socket's folder), port and name, never the password.
    #[must_use]
    pub fn place(&self) -> String {
        let name = self.options.get_database().unwrap_or_default();
        if let Some(socket) = self.options.get_socket() {
            return format!("{}:{}/{name}", socket.display(), self.options.get_port());
        }
        format!(
            "{}:{}/{}",
            self.options.get_host(),
            self.options.get_port(),
            name
        )
    }

    /// Closes the pool and waits for its connections to end.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
