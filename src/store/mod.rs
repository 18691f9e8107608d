//! All SQL, and all of sqlx, by table family. Engines call functions of this module and get domain types back.

pub mod bench;
mod bounded;
mod call;
pub mod cluster;
mod error;
mod guard;
pub mod hint;
pub mod history;
pub mod journal;
pub mod letter;
mod link;
pub mod lock;
pub mod mapped;
pub mod mark;
pub mod migrate;
#[cfg(feature = "failpoints")]
mod mutant;
pub mod origin;
mod pooled;
mod pooler;
pub mod queue;
pub mod queue_state;
pub mod redrive;
pub mod relay;
pub mod renewal;
mod repeat;
pub mod server;
pub mod shop;
pub mod stream;
mod target;
pub mod topic;
pub mod uninstall;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _, Row as _};

use crate::domain::database_url::DatabaseUrl;
pub use error::{Error, Retry};
use guard::Guard;
pub use link::Link;
use pooled::Pooled;
pub use repeat::Patience;
use repeat::repeated;

/// A separate connection, for users that must not share one: a relay's session, a heartbeat, an appender.
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
/// for a lock, or for a standby, and would not notice that its client is gone: it would stay for as long, one more each time. Postroad reads
/// tables alone: in place of one, between a look at it and its reading, its owner could put a view that has code of his. (From Postgres
/// 15.8, 16.4 on.)
pub(in crate::store) async fn settle(connection: &mut Connection) -> Result<(), sqlx::Error> {
    const SETTLE: &str = "select set_config(s.name, s.value, false)
        from (values
            ('client_connection_check_interval', '5s', version() like '%linux%'),
            ('transaction_timeout', '0', true),
            ('restrict_nonsystem_relation_kind', 'view', true)
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

/// How long each of several servers may take to be connected to, unless the URL says otherwise: the next may be the one.
const EACH_OF_SEVERAL: Duration = Duration::from_secs(3);

/// A Postgres database, reached by its URL. Cheap to clone.
#[derive(Clone)]
pub struct Database {
    reached: Arc<Reached>,
    pool: PgPool,
    guard: Arc<Guard>,
}

/// How a database is reached.
struct Reached {
    /// Its servers, in the order in which they are tried.
    targets: Vec<PgConnectOptions>,
    /// The one that was a primary last.
    last: AtomicUsize,
    /// For each of them.
    patience: Duration,
    /// A pooler drops what sessions begin with: it is set afterwards.
    sets_sessions: AtomicBool,
}

impl fmt::Debug for Database {
    /// The driver's options have the password in them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Database").field(&self.place()).finish()
    }
}

impl Database {
    /// Parses the URL and makes a pool that connects when first used.
    ///
    /// # Errors
    /// The URL is not one of Postgres, or asks for something that is not supported.
    pub fn new(url: &str, pool_size: u32) -> Result<Self, Error> {
        let url = DatabaseUrl::parse(url).map_err(Error::Url)?;
        let targets = target::targets(&url)?.into_iter();
        let targets = targets.map(|target| {
            let target = target.options(SESSION).options([pooler::MARKER]);
            target.disable_statement_logging()
        });
        let targets: Vec<PgConnectOptions> = targets.collect();
        let patience = match (url.connect_timeout, targets.len()) {
            (Some(seconds), _) => Duration::from_secs(seconds).min(bounded::CONNECT),
            (None, 1) => bounded::CONNECT,
            (None, _) => EACH_OF_SEVERAL,
        };
        let first = targets.first().cloned().unwrap_or_default();
        let reached = Arc::new(Reached {
            targets,
            last: AtomicUsize::new(0),
            patience,
            sets_sessions: AtomicBool::new(false),
        });
        let guard = Arc::new(Guard::new());
        let of_pool = (Arc::clone(&guard), Arc::clone(&reached));
        let pool = PgPoolOptions::new()
            .max_connections(pool_size)
            .acquire_timeout(Duration::from_secs(10))
            .test_before_acquire(false)
            .before_acquire(|connection, _| Box::pin(pooled::is_alive(connection)))
            .after_connect(move |connection, _| {
                let (guard, reached) = of_pool.clone();
                Box::pin(async move {
                    if reached.sets_sessions.load(Ordering::Relaxed) {
                        let settings = pooler::text_of(&session(&[]));
                        let setting = sqlx::raw_sql(sqlx::AssertSqlSafe(settings));
                        setting.execute(&mut *connection).await?;
                    }
                    settle(connection).await?;
                    guard.check(connection).await
                })
            })
            .connect_lazy_with(first);
        Ok(Self {
            reached,
            pool,
            guard,
        })
    }

    /// A connection outside the pool.
    ///
    /// # Errors
    /// The server cannot be reached within 10 s or refuses, or has another history than before ([`Database::history_changed`]).
    pub async fn connect(&self) -> Result<Connection, Error> {
        let mut connection = self.open(&[]).await?;
        bounded::connecting(bounded::CONNECT, self.guard.check(&mut connection)).await?;
        Ok(connection)
    }

    /// A connection with further settings, to whatever history.
    pub(in crate::store) async fn open(
        &self,
        further: &[(&'static str, &'static str)],
    ) -> Result<Connection, Error> {
        let mut connection = self.open_unchecked(further).await?;
        if self.sets_sessions() {
            pooler::set(&mut connection, &session(further)).await?;
        }
        bounded::connecting(bounded::CONNECT, settle(&mut connection)).await?;
        Ok(connection)
    }

    /// A connection that may lack settings, since a pooler may be in between. Of several servers, the first that is a primary: beginning with
    /// the one that was it last.
    pub(in crate::store) async fn open_unchecked(
        &self,
        further: &[(&'static str, &'static str)],
    ) -> Result<Connection, Error> {
        let Reached {
            targets,
            last,
            patience,
            ..
        } = &*self.reached;
        let first = last.load(Ordering::Relaxed);
        let mut failed = None;
        for index in (0..targets.len()).map(|step| (first + step) % targets.len()) {
            let target = targets[index].clone().options(further.iter().copied());
            let connecting = async {
                let mut connection = Connection::connect_with(&target).await?;
                if targets.len() > 1 {
                    refuse_standby(&mut connection).await?;
                }
                Ok(connection)
            };
            match bounded::connecting(*patience, connecting).await {
                Ok(connection) => {
                    if index != first {
                        last.store(index, Ordering::Relaxed);
                        self.pool.set_connect_options(targets[index].clone());
                    }
                    return Ok(connection);
                }
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.expect("a URL names one server at least"))
    }

    /// How to reach the server that was a primary last.
    pub(in crate::store) fn options(&self) -> PgConnectOptions {
        let last = self.reached.last.load(Ordering::Relaxed);
        self.reached.targets[last].clone()
    }

    pub(in crate::store) fn sets_sessions(&self) -> bool {
        self.reached.sets_sessions.load(Ordering::Relaxed)
    }

    pub(in crate::store) fn set_sessions(&self) {
        self.reached.sets_sessions.store(true, Ordering::Relaxed);
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

    /// The place of the database, for logs: host (or the socket's folder), port and name, never the password.
    #[must_use]
    pub fn place(&self) -> String {
        let servers = self.reached.targets.iter();
        let servers = servers.map(|target| match target.get_socket() {
            Some(socket) => format!("{}:{}", socket.display(), target.get_port()),
            None => format!("{}:{}", target.get_host(), target.get_port()),
        });
        let servers: Vec<String> = servers.collect();
        let options = self.options();
        let user = options.get_username();
        format!(
            "{}/{}",
            servers.join(","),
            options.get_database().unwrap_or(user)
        )
    }

    /// Closes the pool and waits for its connections to end.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// All settings of a session.
pub(in crate::store) fn session(
    further: &[(&'static str, &'static str)],
) -> Vec<(&'static str, &'static str)> {
    SESSION
        .iter()
        .chain(&[pooler::MARKER])
        .chain(further)
        .copied()
        .collect()
}

async fn refuse_standby(connection: &mut Connection) -> Result<(), sqlx::Error> {
    let looking = sqlx::raw_sql("select pg_catalog.pg_is_in_recovery()");
    let is_standby: bool = looking.fetch_one(connection).await?.try_get(0)?;
    match is_standby {
        true => Err(sqlx::Error::Protocol("the server is a standby".to_owned())),
        false => Ok(()),
    }
}
