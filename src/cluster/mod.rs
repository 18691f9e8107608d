//! Who this process is among its peers, and what it may write.
//!
//! One task keeps the node's row renewed on a connection of its own and takes the leases that the engines want. A lease
//! changes only at hand-over: the taker marks the holder's incarnation dead, then raises the epoch. A dead incarnation is
//! never renewed; a process that finds its own dead registers a new one, drops every fence and takes them again.
//!
//! While the database cannot be reached fences stay: nothing can be written anyhow, and a lease that nobody took meanwhile
//! goes on at its epoch. Time decides only when a lease may be taken, never whether a write is allowed: each write locks the
//! lease's row and checks epoch and holder.

mod metrics;
mod task;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, watch};

use crate::domain::id::Fence;
use crate::store::cluster::BrokerIdentity;
use crate::store::{self, Database};
use crate::supervisor::{OnEnd, Supervisor};
use metrics::Metrics;

/// How a node takes part.
#[derive(Debug, Clone)]
pub struct Options {
    /// The advertised address, `http://host:port`, unique per listening process: a node takes at once what a former
    /// incarnation of its own address held, since it has that one's socket.
    pub address: String,
    /// How long the node row lives without a heartbeat. At least twice the heartbeat.
    pub ttl: Duration,
    /// How often the row is renewed, and leases that others hold are asked for again.
    pub heartbeat: Duration,
    /// Runs on a Postgres that may lose what it acknowledged. For tests and toys.
    pub allow_unsafe_postgres: bool,
}

impl Options {
    /// The defaults of PROTOCOL.md at an address: ttl 10 s, heartbeat 1 s.
    #[must_use]
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            ttl: Duration::from_secs(10),
            heartbeat: Duration::from_secs(1),
            allow_unsafe_postgres: false,
        }
    }
}

/// Why the node could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings that Postroad's promises rest on are off.
    #[error("Postgres runs with {} off and could lose acknowledged messages", settings.join(", "))]
    UnsafePostgres {
        /// The settings.
        settings: Vec<&'static str>,
    },
    /// The database is a standby.
    #[error("the database is a standby: Postroad writes, so it needs the primary")]
    Standby,
    /// A ttl that a late heartbeat would exceed.
    #[error("the node's ttl must be at least twice its heartbeat")]
    TtlTooShort,
    /// The database could not do it.
    #[error("the database could not be used")]
    Store(#[from] store::Error),
}

/// The node of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    incarnation: AtomicI64,
    identity: BrokerIdentity,
    /// The database's clock and this process's, read together.
    started: (DateTime<Utc>, Instant),
    state: Mutex<State>,
    wake: Notify,
    metrics: Metrics,
}

#[derive(Debug)]
struct State {
    wanted: BTreeMap<String, watch::Sender<Option<Fence>>>,
    /// Leases to give back, not wanted any more.
    to_release: Vec<String>,
    trusted_until: Instant,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Registers the node and starts its heartbeat. Stop its supervisor after those of the engines: at its end the task
/// releases every lease and marks its row dead.
///
/// # Errors
/// [`Error::UnsafePostgres`], [`Error::Standby`], [`Error::TtlTooShort`], or the database's.
pub async fn start(
    options: Options,
    db: Database,
    supervisor: &Supervisor,
    registry: &mut Registry,
) -> Result<Handle, Error> {
    if options.ttl < options.heartbeat * 2 {
        return Err(Error::TtlTooShort);
    }
    let mut connection = db.connect().await?;
    let safety = store::cluster::read_server_safety(&mut connection).await?;
    if safety.is_standby {
        return Err(Error::Standby);
    }
    if !safety.unsafe_settings.is_empty() {
        if !options.allow_unsafe_postgres {
            return Err(Error::UnsafePostgres {
                settings: safety.unsafe_settings,
            });
        }
        tracing::warn!(
            settings = safety.unsafe_settings.join(", "),
            "Postgres may lose acknowledged messages, as allowed"
        );
    }
    let identity = store::cluster::broker_identity(&db).await?;
    let metrics = Metrics::new(registry);
    let asked = Instant::now();
    let ttl_seconds = options.ttl.as_secs_f64();
    let (incarnation, now) =
        store::cluster::insert_node(&mut connection, &options.address, ttl_seconds).await?;
    store::cluster::delete_old_nodes(&mut connection).await?;
    metrics.incarnations.inc();
    metrics.trusted.set(1);
    tracing::info!(incarnation, address = options.address, "node registered");
    let handle = Handle {
        shared: Arc::new(Shared {
            incarnation: AtomicI64::new(incarnation),
            identity,
            // The clock was read after `asked`: now() lags by the round trip at most, and never runs ahead.
            started: (now, Instant::now()),
            state: Mutex::new(State {
                wanted: BTreeMap::new(),
                to_release: Vec::new(),
                trusted_until: asked + options.ttl,
            }),
            wake: Notify::new(),
            metrics,
        }),
    };
    let task = task::Heartbeat::new(
        options,
        db,
        connection,
        Arc::clone(&handle.shared),
        supervisor.clone(),
    );
    supervisor.spawn("cluster heartbeat", OnEnd::StopProcess, task.run());
    Ok(handle)
}

impl Handle {
    /// The number of this process's node row. Changes when the process was declared dead and registered again.
    #[must_use]
    pub fn incarnation(&self) -> i64 {
        self.shared.incarnation.load(Ordering::Acquire)
    }

    /// The broker's id and receipt key.
    #[must_use]
    pub fn identity(&self) -> &BrokerIdentity {
        &self.shared.identity
    }

    /// The database's clock, read once, plus the monotonic time since. Never steps back, whatever either clock does.
    #[must_use]
    pub fn now(&self) -> DateTime<Utc> {
        let (at, instant) = self.shared.started;
        at + TimeDelta::from_std(instant.elapsed()).unwrap_or(TimeDelta::MAX)
    }

    /// Whether the node row is surely not expired: the last renewal was asked for less than the ttl ago.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        Instant::now() < self.shared.state().trusted_until
    }

    /// Wants the lease from now on. The receiver shows the fence while it is held, `None` while it is not. Taken when free,
    /// when its holder is dead or expired, or when the holder's row has this node's own address.
    #[must_use]
    pub fn hold(&self, lease: String) -> watch::Receiver<Option<Fence>> {
        let mut state = self.shared.state();
        state.to_release.retain(|name| *name != lease);
        let receiver = match state.wanted.get(&lease) {
            Some(sender) => sender.subscribe(),
            None => {
                let sender = watch::Sender::new(None);
                let receiver = sender.subscribe();
                state.wanted.insert(lease, sender);
                receiver
            }
        };
        drop(state);
        self.shared.wake.notify_one();
        receiver
    }

    /// Wants the lease no more. Its watchers see `None`, then the end of the channel.
    pub fn release(&self, lease: &str) {
        let mut state = self.shared.state();
        if let Some(sender) = state.wanted.remove(lease) {
            sender.send_replace(None);
            state.to_release.push(lease.to_owned());
        }
        drop(state);
        self.shared.wake.notify_one();
    }

    /// A write under this fence was refused: forgets the epoch and tries to take the lease again.
    pub fn fenced(&self, fence: &Fence) {
        let state = self.shared.state();
        let forgotten = state.wanted.get(&fence.lease).is_some_and(|sender| {
            sender.send_if_modified(|held| {
                let is_same = held.as_ref() == Some(fence);
                if is_same {
                    *held = None;
                }
                is_same
            })
        });
        drop(state);
        if forgotten {
            tracing::warn!(lease = fence.lease, epoch = fence.epoch.0, "lease lost");
            self.shared.metrics.leases_fenced.inc();
            self.shared.metrics.leases_held.dec();
            self.shared.wake.notify_one();
        }
    }
}
