//! The program: starts the engines in order and stops them in the opposite order, each step with a deadline.
//!
//! The program binds its socket first. A port that is in use shows at once, and a node that holds the socket of an address
//! knows that no earlier process of that address is alive. The socket is served at once: until the start is done, the
//! process reports that it is alive and what it waits for, and refuses everything else.

mod database;
mod declarations;
mod error;
mod files;
mod memory;
mod options;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::config::Config;
use crate::store::Database;
use crate::supervisor::Supervisor;
use crate::{cluster, http, local_postgres, lock, queue, relay, stream, telemetry, topic};
use options::{
    http_options, node_address, queue_options, relay_options, stream_options, url_for_others,
};

pub use error::{Error, NotStopped};

/// The part of readiness that says how far the start is.
const START: &str = "start";
/// The time that a stop may take beyond the sum of its deadlines.
const STOP_MARGIN: Duration = Duration::from_secs(5);
/// How long parts have to end whose work is void.
const ABANDON: Duration = Duration::from_secs(1);
/// For the pool's connections, once nothing uses them.
const POOL_CLOSE: Duration = Duration::from_secs(5);
/// How long the private Postgres may take to stop.
const POSTGRES_STOP: Duration = Duration::from_secs(30);

/// How long a stop takes at most, unless something is stuck.
#[must_use]
pub fn longest_stop(config: &Config) -> Duration {
    let postgres = match config.database_url {
        Some(_) => Duration::ZERO,
        None => POSTGRES_STOP,
    };
    config.shutdown + postgres + STOP_MARGIN
}

/// Tells the private Postgres to stop, if one still runs, and does not wait for it: for a process that has to end now.
pub fn let_postgres_go() {
    local_postgres::let_go();
}

/// The supervisors of a broker, one per step of the stop.
#[derive(Debug)]
struct Steps {
    root: Supervisor,
    postgres: Supervisor,
    cluster: Supervisor,
    stream: Supervisor,
    queue: Supervisor,
    relay: Supervisor,
    http: Supervisor,
}

impl Steps {
    fn new() -> Self {
        let root = Supervisor::new();
        Self {
            postgres: root.child(),
            cluster: root.child(),
            stream: root.child(),
            queue: root.child(),
            relay: root.child(),
            http: root.child(),
            root,
        }
    }

    /// Stops what runs, in order. The engines share `time`; the private Postgres has its own.
    async fn stop(&self, database: Option<&Database>, time: Duration) -> Result<(), NotStopped> {
        let deadline = tokio::time::Instant::now() + time;
        let mut late = Vec::new();
        for step in [
            &self.http,
            &self.relay,
            &self.queue,
            &self.stream,
            &self.cluster,
        ] {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            if let Err(names) = step.stop(left).await {
                late = names;
            }
        }
        if let Some(database) = database {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            // The pool's close only waits; dropped, nothing is left half-done. Nobody uses it any more: what does not close is a connection
            // that is dead without a word, on its way back into the pool.
            let closing = tokio::time::timeout(left.min(POOL_CLOSE), database.close());
            if closing.await.is_err() {
                tracing::warn!("connections to Postgres did not close in time");
            }
        }
        if let Err(names) = self.postgres.stop(POSTGRES_STOP).await {
            late = names;
        }
        if late.is_empty() {
            Ok(())
        } else {
            Err(NotStopped(late))
        }
    }
}

/// The engines' handles. An engine's tasks end when nobody holds its handle, so these are held until all have stopped.
#[derive(Debug, Default)]
struct Held {
    cluster: Option<cluster::Handle>,
    stream: Option<stream::Handle>,
    queue: Option<queue::Handle>,
    topics: Option<topic::Handle>,
    locks: Option<lock::Handle>,
    relay: Option<relay::Handle>,
    readiness: Option<http::Readiness>,
}

/// A running broker.
#[derive(Debug)]
pub struct Broker {
    /// The address that it listens on.
    pub address: SocketAddr,
    url: String,
    database: Database,
    /// The database's history and those before it are known by these.
    histories: Vec<Uuid>,
    shutdown: Duration,
    steps: Steps,
    held: Held,
}

impl Broker {
    /// Starts everything. Resolves when requests are answered. While the database is not up it waits, however long.
    ///
    /// # Errors
    /// See [`Error`]. Everything that was started before is stopped again.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let started = Self::start_until(config, Vec::new(), std::future::pending()).await?;
        Ok(started.expect("it was not asked to stop"))
    }

    /// As [`Broker::start`], after [`Broker::history_changed`] made these histories of the database void. When `asked` resolves
    /// first, everything is stopped again, and there is no broker.
    ///
    /// # Errors
    /// As [`Broker::start`].
    pub async fn start_until(
        config: Config,
        void: Vec<Uuid>,
        asked: impl Future<Output = ()>,
    ) -> Result<Option<Self>, Error> {
        let steps = Steps::new();
        let mut held = Held::default();
        let started = {
            let starting = Box::pin(assemble(&config, void, &steps, &mut held));
            // Nothing was promised to anybody yet: what the start was about to write is undone by the database.
            tokio::select! {
                started = starting => Some(started),
                () = asked => None,
            }
        };
        let failed = match started {
            Some(Ok(parts)) => {
                return Ok(Some(Self {
                    address: parts.address,
                    url: parts.url,
                    database: parts.database,
                    histories: parts.histories,
                    shutdown: config.shutdown,
                    steps,
                    held,
                }));
            }
            Some(Err(error)) => Some(error),
            None => None,
        };
        // A part that could not start has nothing to finish; one that did stops by itself.
        let stopped = steps.stop(None, config.shutdown).await;
        match failed {
            Some(error) => Err(error),
            None => stopped.map(|()| None).map_err(Error::NotStopped),
        }
    }

    /// The base URL of its API.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Resolves when the database no longer has the history that this broker was started in, after a failover or a restore, and
    /// says why. Everything that this broker knows is void, and it no longer writes: [`Broker::abandon`] it, and start another.
    /// Cancel-safe.
    pub async fn history_changed(&self) -> String {
        self.database.history_changed().await
    }

    /// Stops without finishing anything, within a second and what the private Postgres needs. Tasks that cannot end are left
    /// behind, waiting for a database that they will not get: drop their runtime. Gives what the histories are known by that are void now:
    /// the database can be put back to any of them, and is another one then.
    pub async fn abandon(self) -> Vec<Uuid> {
        let _ = self.steps.stop(None, ABANDON).await;
        self.histories
    }

    /// Resolves when a part failed, so that the process must stop. Cancel-safe.
    pub async fn failed(&self) {
        self.steps.root.failed().await;
    }

    /// A view of the tasks that run.
    #[must_use]
    pub fn tasks(&self) -> Supervisor {
        self.steps.root.clone()
    }

    /// Stops in order: readiness off, other nodes are given what this one holds, no new requests, long polls answer, relays and queues finish and flush, leases are
    /// released, the pool closes, the private Postgres stops. In all at most `shutdown_seconds`, and 30 s for the Postgres.
    ///
    /// # Errors
    /// The tasks that had not ended in time; they are left running.
    pub async fn stop(self) -> Result<(), NotStopped> {
        let began = tokio::time::Instant::now();
        if let (Some(cluster), Some(readiness)) = (&self.held.cluster, &self.held.readiness) {
            readiness.not_ready("node", "the node is leaving");
            cluster.leave(self.shutdown / 3).await;
        }
        let left = self.shutdown.saturating_sub(began.elapsed());
        let stopped = self.steps.stop(Some(&self.database), left).await;
        drop(self.held);
        stopped
    }
}

/// The results of a start.
struct Parts {
    address: SocketAddr,
    url: String,
    database: Database,
    histories: Vec<Uuid>,
}

async fn assemble(
    config: &Config,
    mut void: Vec<Uuid>,
    steps: &Steps,
    held: &mut Held,
) -> Result<Parts, Error> {
    let listener = TcpListener::bind(config.bind)
        .await
        .and_then(|listener| Ok((listener.local_addr()?, listener)))
        .map_err(|source| Error::Bind {
            address: config.bind,
            source,
        });
    let (address, listener) = listener?;
    let url = format!("http://{address}");
    let mut registry = Registry::default();
    telemetry::register(&mut registry);
    let metrics = http::Metrics::new(&mut registry);
    let readiness = http::Readiness::new();
    readiness.not_ready(START, "starting the private Postgres");
    held.readiness = Some(readiness.clone());
    let early = http::Early {
        readiness: readiness.clone(),
        metrics: metrics.clone(),
        registry: early_registry(),
    };
    let server = http::serve(listener, early, http_options(config, address), &steps.http)?;
    let database = open_database(config, steps).await?;
    void.extend(database::prepare(&database, &void, &readiness).await?);
    readiness.not_ready(START, "starting the engines");
    let cluster = cluster::start(
        cluster::Options {
            address: (config.advertise_url.clone()).unwrap_or_else(|| node_address(address)),
            url: Some(url_for_others(config, address)),
            ttl: config.node_ttl,
            heartbeat: config.node_heartbeat,
            allow_unsafe_postgres: config.allow_unsafe_postgres,
        },
        database.clone(),
        &steps.cluster,
        &mut registry,
    )
    .await
    .map_err(|error| refused(&database, error))?;
    held.cluster = Some(cluster.clone());
    let topics = topic::start(database.clone(), &steps.stream).await?;
    held.topics = Some(topics.clone());
    let locks = lock::start(database.clone(), &steps.stream, &mut registry);
    held.locks = Some(locks.clone());
    let stream = stream::start(
        stream_options(config, &topics),
        database.clone(),
        cluster.clone(),
        &steps.stream,
        &mut registry,
    )
    .await?;
    held.stream = Some(stream.clone());
    let queue = queue::start(
        queue_options(),
        database.clone(),
        stream.clone(),
        cluster.clone(),
        &steps.queue,
        &mut registry,
    )
    .await?;
    held.queue = Some(queue.clone());
    // Before the relays: a message must find the stream and the queues that the configuration declares for it.
    declarations::declare(config, &stream, &queue, &topics).await?;
    let relay = relay::start(
        relay_options(config),
        database.clone(),
        (stream.clone(), topics.clone()),
        cluster.clone(),
        &steps.relay,
        &mut registry,
    )
    .await?;
    held.relay = Some(relay.clone());
    cluster.has_started();
    let writes = cluster.clone();
    readiness.ask("database", move || writes.unwritable());
    let parts = http::Parts {
        stream,
        queue,
        topics,
        locks,
        relay,
        cluster,
        registry: Arc::new(registry),
        metrics,
        readiness: readiness.clone(),
    };
    server.open(parts);
    readiness.ready(START);
    Ok(Parts {
        address,
        url,
        database,
        histories: void,
    })
}

/// The metrics of a process that is starting: its use of the machine.
fn early_registry() -> Arc<Registry> {
    let mut registry = Registry::default();
    telemetry::register(&mut registry);
    Arc::new(registry)
}

/// Adds the remedy to the reason when Postgres is unsafe.
fn refused(database: &Database, error: cluster::Error) -> Error {
    match &error {
        cluster::Error::UnsafePostgres { .. } => Error::Refused {
            place: database.place(),
            reason: format!("{error}: turn them on, or set allow_unsafe_postgres"),
        },
        _ => error.into(),
    }
}

/// The configured database, or a private one.
async fn open_database(config: &Config, steps: &Steps) -> Result<Database, Error> {
    let url = match &config.database_url {
        Some(url) => url.clone(),
        None => {
            let data_dir = config
                .data_dir
                .clone()
                .unwrap_or_else(local_postgres::default_data_dir);
            let mut settings = local_postgres::Settings::new(data_dir);
            settings.bin_dir.clone_from(&config.postgres_bin);
            let server = local_postgres::start(settings, &steps.postgres).await?;
            server.url()
        }
    };
    Ok(Database::new(&url, config.database_pool_size)?)
}
