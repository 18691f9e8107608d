//! The identity of this process among its peers, and its permission to write.
//!
//! One task keeps the node's row renewed on its own connection, and its heartbeat reads all nodes, leases and assignments.
//! The holder of the lease `leader` writes the assignments: an even share of the slots, relays and duties for each live
//! node, with as few moves as that takes. A node takes the leases that its engines want and that are assigned to it. It
//! gives back leases that are assigned to others: it shows `None`, its engine finishes and says so ([`Handle::yielded`]),
//! the lease is released, and the other node takes it.
//!
//! A lease changes only at hand-over: the taker marks an expired holder dead, then raises the epoch. A dead incarnation is
//! never renewed; a process that finds its own incarnation dead registers a new one, drops every fence and takes its leases
//! again.
//!
//! While the database cannot be reached fences stay: nothing can be written anyway, and a lease that nobody took meanwhile
//! goes on at its epoch. Time decides only when a lease may be taken, never whether a write is allowed: each write locks
//! the lease's row and checks epoch and holder.

mod lead;
mod metrics;
#[cfg(test)]
mod simulation;
mod task;
mod tenure;
mod view;

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, watch};

use crate::domain::id::Fence;
use crate::store::cluster::BrokerIdentity;
use crate::store::history::History;
use crate::store::{self, Database};
use crate::supervisor::{Lease, Supervisor};
use metrics::Metrics;
use tenure::{State, Wanted};
pub use view::{Member, Owner, Standing, View};

/// How a node takes part.
#[derive(Debug, Clone)]
pub struct Options {
    /// The advertised address, `http://host:port`, unique per listening process: a node takes over at once the leases of an
    /// earlier incarnation at its own address, since it has that one's socket.
    pub address: String,
    /// The URL at which other nodes reach it; `address` if they reach it there.
    pub url: Option<String>,
    /// How long the node row lives without a heartbeat. At least twice the heartbeat.
    pub ttl: Duration,
    /// How often the row is renewed, and leases that others hold are asked for again.
    pub heartbeat: Duration,
    /// Runs on a Postgres that may lose what it acknowledged. For tests and toys.
    pub allow_unsafe_postgres: bool,
}

impl Options {
    /// The defaults of docs/protocol.md at an address: ttl 10 s, heartbeat 1 s.
    #[must_use]
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            url: None,
            ttl: Duration::from_secs(10),
            heartbeat: Duration::from_secs(1),
            allow_unsafe_postgres: false,
        }
    }
}

/// Reasons why the node could not start.
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
    #[error("node_ttl_seconds must be at least twice node_heartbeat_seconds")]
    TtlTooShort,
    /// The database could not do it.
    #[error("the database could not be used")]
    Store(#[from] store::Error),
}

/// The signs of life that the database confirmed.
#[derive(Debug)]
struct Pulse {
    /// The last one.
    at: Instant,
    /// The reason why none has come since, if it is known.
    why: Option<String>,
}

/// A heartbeat that is so much later than its time is a write that does not come through: longer than a slow disk takes.
const SILENCE: Duration = Duration::from_secs(2);

/// The node of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    incarnation: AtomicI64,
    identity: BrokerIdentity,
    histories: Vec<History>,
    /// The database's clock and this process's, read together.
    started: (DateTime<Utc>, Instant),
    /// How far the clock has been moved on since, in microseconds: both clocks said that it was behind.
    moved_on: AtomicI64,
    ttl: Duration,
    heartbeat: Duration,
    pulse: Mutex<Pulse>,
    state: Mutex<State>,
    view: watch::Sender<Arc<View>>,
    wake: Arc<Notify>,
    metrics: Metrics,
    /// The time when the leader last looked at the loads.
    evened_at: Mutex<Instant>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pulse(&self) -> MutexGuard<'_, Pulse> {
        self.pulse.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no heartbeat has come through for longer than it may take; then for how long.
    fn silence(&self) -> Option<Duration> {
        let silence = self.pulse().at.elapsed();
        (silence > self.heartbeat * 2 + SILENCE).then_some(silence)
    }

    /// Whether it is time to look at the loads of slots; then it is noted that it was done.
    fn is_evening_out(&self) -> bool {
        let mut at = self
            .evened_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_time = at.elapsed() >= lead::EVEN_OUT_EVERY;
        if is_time {
            *at = Instant::now();
        }
        is_time
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
            "Postgres may lose acknowledged messages; allow_unsafe_postgres permits it"
        );
    }
    let identity = store::cluster::broker_identity(&db).await?;
    let histories = store::history::list(&db).await?;
    let metrics = Metrics::new(registry);
    let asked = Instant::now();
    let ttl_seconds = options.ttl.as_secs_f64();
    let url = options.url.clone();
    let url = url.unwrap_or_else(|| options.address.clone());
    let (incarnation, now, inherited) =
        store::cluster::register_node(&mut connection, &options.address, &url, ttl_seconds).await?;
    // The clock was read after `asked`: now() lags by the round trip at most, and never runs ahead.
    let started = (believed(now), Instant::now());
    store::cluster::delete_old_nodes(&mut connection).await?;
    let beat = db.next_beat();
    let sign = store::cluster::Sign {
        incarnation,
        ttl_millis: task::millis(options.ttl),
        wants: &inherited,
        is_leaving: false,
        beat,
    };
    let seen = store::cluster::beat(&mut connection, sign).await?;
    if seen.is_renewed {
        db.note_beat(incarnation, beat);
    }
    let mut observer = view::Observer::new(options.heartbeat);
    let view = observer.view((asked, Instant::now()), incarnation, seen);
    metrics.incarnations.inc();
    metrics.trusted.set(1);
    tracing::info!(incarnation, address = options.address, "node registered");
    let handle = Handle {
        shared: Arc::new(Shared {
            incarnation: AtomicI64::new(incarnation),
            identity,
            histories,
            started,
            moved_on: AtomicI64::new(0),
            ttl: options.ttl,
            heartbeat: options.heartbeat,
            pulse: Mutex::new(Pulse {
                at: Instant::now(),
                why: None,
            }),
            state: Mutex::new(State::new(inherited, asked + options.ttl)),
            view: watch::Sender::new(Arc::new(view)),
            wake: Arc::default(),
            metrics,
            evened_at: Mutex::new(asked),
        }),
    };
    let task = task::Heartbeat::new(
        options,
        db,
        (connection, observer),
        Arc::clone(&handle.shared),
    );
    task.start(supervisor);
    Ok(handle)
}

/// The database's clock, unless it is more than a minute ahead of this process's: then one of the two is wrong, and what comes early by it
/// cannot be taken back.
fn believed(clock: DateTime<Utc>) -> DateTime<Utc> {
    let own = own_clock();
    match clock > own + APART {
        true => own,
        false => clock,
    }
}

/// Between two clocks that are further apart, one is wrong.
const APART: TimeDelta = TimeDelta::minutes(1);

fn own_clock() -> DateTime<Utc> {
    let lead = TimeDelta::seconds(crate::failpoint::limit("clock-lead-seconds", 0));
    Utc::now() + lead
}

impl Shared {
    fn now(&self) -> DateTime<Utc> {
        let (at, instant) = self.started;
        let since = TimeDelta::from_std(instant.elapsed()).unwrap_or(TimeDelta::MAX);
        at + since + TimeDelta::microseconds(self.moved_on.load(Ordering::Acquire))
    }

    /// Moves the clock on to the earlier of the database's and this process's own, if these agree and it is behind both: one of them was
    /// wrong at the start.
    fn meet_clock(&self, clock: DateTime<Utc>) {
        let own = own_clock();
        let behind = clock.min(own) - self.now();
        if (clock - own).abs() > APART || behind <= APART {
            return;
        }
        tracing::warn!(
            seconds = behind.num_seconds(),
            "the clock that this node started by was behind: it goes by the present one from now on"
        );
        let behind = behind.num_microseconds().unwrap_or_default();
        self.moved_on.fetch_add(behind, Ordering::AcqRel);
    }
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

    /// The histories of the database, by number. The last one is current: when another begins, the process starts again.
    #[must_use]
    pub fn histories(&self) -> &[History] {
        &self.shared.histories
    }

    /// The database's clock, read once, plus the monotonic time since; this process's own where the database's was more than a minute
    /// ahead of it. Never steps back, whatever either clock does. Where it turns out to have been behind, it is moved on once.
    #[must_use]
    pub fn now(&self) -> DateTime<Utc> {
        self.shared.now()
    }

    /// Whether the node row is surely not expired: the last renewal was asked for less than the ttl ago.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        Instant::now() < self.shared.state().trusted_until
    }

    /// The reason why no write comes through to the database, if none does: heartbeats are writes, and none was confirmed for
    /// twice their interval plus two seconds.
    #[must_use]
    pub fn unwritable(&self) -> Option<String> {
        let silence = self.shared.silence()?.as_secs();
        let pulse = self.shared.pulse();
        let why = pulse.why.as_deref();
        let why = why.unwrap_or("the database does not answer");
        Some(format!("no write has come through for {silence} s: {why}"))
    }

    /// How long a node lives without a heartbeat.
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.shared.ttl
    }

    /// All nodes, leases and assignments as of the last heartbeat.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.shared.view.borrow())
    }

    /// The same, to wait for the next.
    #[must_use]
    pub fn views(&self) -> watch::Receiver<Arc<View>> {
        self.shared.view.subscribe()
    }

    /// Waits for a view that is younger than this call, for at most a second: while the database is unreachable there is none.
    pub async fn refresh(&self) -> Arc<View> {
        let asked = Instant::now();
        let mut views = self.views();
        self.shared.state().is_beat_wanted = true;
        self.shared.wake.notify_one();
        let newer = views.wait_for(|view| view.as_of >= asked);
        let _ = tokio::time::timeout(Duration::from_secs(1), newer).await;
        self.view()
    }

    /// A view that is not older than `age`, as [`Handle::refresh`] brings one. However many ask, the database is asked no more often
    /// than that.
    pub async fn refresh_within(&self, age: Duration) -> Arc<View> {
        let view = self.view();
        match view.as_of.elapsed() < age {
            true => view,
            false => self.refresh().await,
        }
    }

    /// Whether this node is to hold the lease, whether it has it yet or not.
    #[must_use]
    pub fn is_assigned(&self, lease: &str) -> bool {
        self.shared.view.borrow().owner(lease) == Owner::This
    }

    /// Has slots shared out to this node: it serves their queues, from whenever on there are some.
    pub fn serve_slots(&self) {
        let mut state = self.shared.state();
        state.serves_slots = true;
        state.is_beat_wanted = true;
        drop(state);
        self.shared.wake.notify_one();
    }

    /// All that this process wants it has said: what a former one at its address held and this one does not want can go.
    pub fn has_started(&self) {
        let mut state = self.shared.state();
        state.is_beat_wanted |= state.inherited.take().is_some();
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Wants the lease from now on. The receiver shows the fence while it is held, `None` while it is not. Taken once it is
    /// assigned to this node, which is one of those that want it, and free: its holder has given it back, is dead or expired, or
    /// had this node's own address. When it shows `None` after a fence, the engine finishes what it does under that, and then
    /// says so ([`Handle::yielded`]).
    #[must_use]
    pub fn hold(&self, lease: String) -> watch::Receiver<Option<Fence>> {
        let mut state = self.shared.state();
        let receiver = state.hold(lease);
        drop(state);
        self.shared.wake.notify_one();
        receiver
    }

    /// As [`Handle::hold`], for a duty: it gives the lease back once no pass is under way.
    #[must_use]
    pub fn lease(&self, name: &'static str) -> Lease {
        let cluster = self.clone();
        Lease::new(name, self.hold(name.to_owned()), move || {
            cluster.yielded(name);
        })
    }

    /// Reports that no work is under way under the last fence that the lease's watchers saw: if the lease is assigned to another
    /// node, it can go.
    pub fn yielded(&self, lease: &str) {
        let is_yielded = self.shared.state().yielded(lease);
        if is_yielded {
            self.shared.wake.notify_one();
        }
    }

    /// Wants the lease no more. Its watchers see `None`, then the end of the channel.
    pub fn release(&self, lease: &str) {
        self.shared.state().release(lease);
        self.shared.wake.notify_one();
    }

    /// Hands over all that this node holds, while it goes on answering: resolves when the others have been given everything
    /// that they can hold, or none of them is there, or `bound` is over. Cancel-safe.
    pub async fn leave(&self, bound: Duration) {
        let asked = Instant::now();
        {
            let mut state = self.shared.state();
            state.is_leaving = true;
            state.is_beat_wanted = true;
        }
        let mut views = self.views();
        if !views.borrow().has_peers() {
            return;
        }
        self.shared.wake.notify_one();
        let handing_over = async {
            loop {
                let view = Arc::clone(&views.borrow_and_update());
                if view.as_of >= asked && (!view.has_staying_peers() || self.is_handed_over(&view))
                {
                    return;
                }
                if views.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(bound, handing_over).await.is_err() {
            tracing::warn!(
                "not everything was handed over in time; the remaining leases become free when this node has ended"
            );
        }
    }

    fn is_handed_over(&self, view: &View) -> bool {
        let items = view.items();
        let can_go = |lease: &str| {
            let item = items.iter().find(|item| item.name == lease);
            item.is_none_or(|item| item.nodes.iter().any(|node| *node != view.own))
        };
        let is_ours = |name: &String| can_go(name) && view.assigned.get(name) == Some(&view.own);
        let state = self.shared.state();
        let mut wanted = state.wanted.iter();
        let is_held =
            |wanted: &Wanted| wanted.yielding.is_some() || wanted.fence.borrow().is_some();
        state.to_release.is_empty()
            && !view.assigned.keys().any(is_ours)
            && !wanted.any(|(name, wanted)| can_go(name) && is_held(wanted))
    }

    /// A write under this fence was refused: forgets the epoch and tries to take the lease again.
    pub fn fenced(&self, fence: &Fence) {
        let forgotten = self.shared.state().fenced(fence);
        if forgotten {
            tracing::warn!(lease = fence.lease, epoch = fence.epoch.0, "lease lost");
            self.shared.metrics.leases_fenced.inc();
            self.shared.metrics.leases_held.dec();
            self.shared.wake.notify_one();
        }
    }
}
