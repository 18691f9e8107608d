//! Streams: append-only logs with dense offsets, over partitioned tables of Postgres.
//!
//! One appender per process commits whatever gathered while the last commit was in flight, in one call that commits by
//! itself (`append` in `migrations/broker`). It locks the heads of its streams, so offset order is commit order on any
//! number of nodes. Its own commits go from memory to the tails and the cache of recent entries; commits of other nodes are
//! read from the log. Nothing hot is updated in place: the next offset is read from the top of the log.
//!
//! When the database is unreachable, appends wait and then fail: as unavailable if they were never tried, and with an
//! unknown outcome if they were; the appender repeats a group under its number until it knows. Reads fail at once and may
//! be repeated.

mod appender;
mod attempt;
mod cache;
mod catalogue;
mod error;
mod group;
mod handle;
mod held;
mod hints;
mod history;
mod inbox;
mod keys;
mod lanes;
mod leaf_sizes;
mod leaves;
mod limits;
mod metrics;
mod plan;
mod present;
mod reader;
mod request;
mod scheduled;
mod search;
mod settings;
mod tail;
mod topics;
mod witness;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::registry::Registry;
use tokio::sync::{Notify, Semaphore, mpsc};

use crate::cluster;
use crate::domain::id::{Offset, StreamId};
use crate::store::{self, Connection, Database, Link};
use crate::supervisor::{Desk, OnEnd, Supervisor};

pub use crate::domain::retention::{DEFAULT_HARD_LIMIT, DEFAULT_RETENTION, Retention};
pub use error::{AppendError, ConflictItem, Error, VersionConflict};
pub use handle::Handle;
use handle::{Shared, State};
pub use inbox::{MEMBER_MAX_BYTES, MEMBER_MAX_MESSAGES};
pub use present::Wanted;
pub use request::{
    Attributes, Batch, Conditional, KeyEntry, KeyPage, KeyRead, KeysPage, KeysRead, Member, Page,
    Placed, Read, Rejected, Scan, ScanItem, Scanned, Search, SearchPage, key_hash,
};
pub use scheduled::{
    Acceptance, Cancelled, ScheduleDescription, ScheduleFailure, Scheduled, ScheduledPage,
    ScheduledQuery, ScheduledStatus, Waiting, check_event,
};
pub use settings::{
    Declared, Description, Found, PATTERN_MAX_COUNT, RETENTION_MIN_BYTES, SCHEDULED_AHEAD,
    ScheduledState, Settings, SettingsError,
};
pub use tail::entry;

/// Jobs that wait for a reader or for the catalogue.
const JOBS_MAX: usize = 1_024;

/// How the engine runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long an append's caller waits before it is told that the outcome is unknown.
    pub wait: Duration,
    /// Messages after which a group takes no further member.
    pub group_max_messages: usize,
    /// Bytes after which a group takes no further member.
    pub group_max_bytes: usize,
    /// Members that wait for a group at most; further callers wait to queue.
    pub waiting_max_members: usize,
    /// Bytes that wait for a group at most.
    pub waiting_max_bytes: usize,
    /// Bytes of recent entries kept in memory, all streams together.
    pub cache_bytes: usize,
    /// How often other nodes' appends are looked for; 1 s at most.
    pub poll: Duration,
    /// Connections that read the log.
    pub readers: usize,
    /// Offsets per leaf of the log to begin with; it adapts to how fast leaves fill.
    pub leaf_offsets: i64,
    /// How often leaves are made, summarised and emptied.
    pub maintenance: Duration,
    /// The retention that `main` is created with.
    pub main_retention: Retention,
    /// The check of each occurrence of a schedule.
    pub acceptance: Acceptance,
    /// How far the node's clock is set ahead of the system's: for tests that set the database's.
    pub clock_lead: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            wait: Duration::from_secs(10),
            group_max_messages: 5_000,
            group_max_bytes: 8 << 20,
            waiting_max_members: 10_000,
            waiting_max_bytes: 64 << 20,
            cache_bytes: 64 << 20,
            poll: Duration::from_millis(500),
            readers: 3,
            leaf_offsets: 250_000,
            maintenance: Duration::from_secs(2),
            main_retention: Retention::default(),
            acceptance: Acceptance::default(),
            clock_lead: Duration::ZERO,
        }
    }
}

/// Creates `main` if it is missing and starts the engine.
///
/// # Errors
/// The database's.
pub async fn start(
    options: Options,
    db: Database,
    cluster: cluster::Handle,
    supervisor: &Supervisor,
    registry: &mut Registry,
) -> Result<Handle, Error> {
    let mut connection = store::stream::connect_tail(&db).await?;
    store::stream::create_main(&mut connection, &options.main_retention).await?;
    let state = Arc::new(State {
        tails: tail::Tails::default(),
        cache: cache::Cache::new(options.cache_bytes),
        keys: keys::Keys::default(),
        watermarks: catalogue::Watermarks::default(),
        topics: topics::Topics::default(),
        limits: limits::Limits::default(),
        leaf_sizes: leaf_sizes::LeafSizes::new(options.leaf_offsets),
        maintain: Arc::default(),
        appended_here: Arc::default(),
        appended_elsewhere: Notify::new(),
        schedule: scheduled::Schedule::default(),
        witness: witness::Witness::new(options.clock_lead),
        held: held::HeldStreams::default(),
        metrics: metrics::Metrics::new(registry),
    });
    witness::register(registry, &state, &cluster);
    registry.register_collector(Box::new(metrics::OpenKeys(Arc::clone(&state))));
    scheduled::register(registry, &state, &cluster);
    let (lasts, held) = start_tails(&mut connection, &state).await?;
    let streams = store::stream::load_catalogue(&mut connection)
        .await?
        .streams;
    let keyed = streams.into_iter().filter(|row| row.is_keyed);
    let keyed: Vec<StreamId> = keyed.map(|row| row.id).collect();
    let (appends, inbox) = inbox::Inbox::new(
        options.waiting_max_members,
        options.waiting_max_bytes,
        options.wait,
    );
    let (tail, appended) = mpsc::channel(8);
    let (published_tail, published) = mpsc::channel(8);
    let appender = appender::Appender::new(
        options.clone(),
        db.clone(),
        cluster.clone(),
        Arc::clone(&state),
        supervisor.clone(),
        lanes::Source::Inbox(inbox),
        tail,
        lasts,
    );
    supervisor.spawn("stream appender", OnEnd::StopProcess, appender.run());
    let tail = tail::TailTask {
        options: options.clone(),
        link: Link::of_tail(&db).with(connection),
        report: supervisor.report("stream tail", None),
        cluster: cluster.clone(),
        state: Arc::clone(&state),
        supervisor: supervisor.clone(),
        appended,
        published,
        held,
        clocks_noted: None,
    };
    supervisor.spawn("stream tail", OnEnd::StopProcess, tail.run());
    let teller = hints::Teller {
        link: Link::plain(&db),
        cluster: cluster.clone(),
        state: Arc::clone(&state),
    };
    teller.start(supervisor);
    let listener = hints::Listener {
        db: db.clone(),
        cluster: cluster.clone(),
        state: Arc::clone(&state),
        supervisor: supervisor.clone(),
    };
    supervisor.spawn("stream listener", OnEnd::StopProcess, listener.run());
    let read_count = options.readers;
    let reads = start_readers(&options, &db, &state, supervisor);
    for stream in keyed {
        // Without it, the first who asks waits.
        let _ = reads.try_send(reader::Job::CountKeys { stream });
    }
    let catalogue = catalogue::Catalogue {
        link: Link::of_catalogue(&db),
        sizes: HashMap::new(),
        state: Arc::clone(&state),
    };
    let catalogue = Desk::open(supervisor, "stream catalogue", JOBS_MAX, catalogue);
    let publishing = (published_tail, options.acceptance.clone());
    let scheduled = start_scheduled(&db, &cluster, &state, supervisor, publishing);
    let lease = cluster.lease(leaves::LEASE);
    let maintenance = leaves::Maintenance {
        quiet: leaves::Maintenance::quiet(options.maintenance),
        options,
        link: Link::of_duty(&db),
        cluster,
        state: Arc::clone(&state),
        supervisor: supervisor.clone(),
        drop_at: Instant::now(),
        rotate_at: Instant::now(),
        ends: None,
        is_apart: false,
        trouble: None,
    };
    maintenance.start(lease);
    let shared = Shared {
        db,
        appends,
        reads,
        replays: Semaphore::new(read_count.saturating_sub(1).max(1)),
        catalogue,
        scheduled,
        state,
    };
    Ok(Handle {
        shared: Arc::new(shared),
    })
}

/// Where the streams end, and those that nobody can look at just now.
type Tops = (HashMap<StreamId, Offset>, HashMap<StreamId, tail::Held>);

/// Starts every tail at the end of its stream. One whose log is locked begins when the lock is gone.
async fn start_tails(connection: &mut Connection, state: &State) -> Result<Tops, Error> {
    let (mut lasts, mut held) = (HashMap::new(), HashMap::new());
    for (stream, floor) in store::stream::list_heads(connection).await? {
        state.raise_floor(stream, floor);
        let last = match store::stream::read_top(connection, stream, floor).await {
            Ok(top) => top.unwrap_or(floor),
            Err(error) if error.is_held() => {
                held.insert(stream, tail::Held::since_start());
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        state.tails.start(stream, last);
        lasts.insert(stream, last);
    }
    Ok((lasts, held))
}

/// Starts the duty that publishes scheduled messages, and the desk where they are asked for.
fn start_scheduled(
    db: &Database,
    cluster: &cluster::Handle,
    state: &Arc<State>,
    supervisor: &Supervisor,
    (tail, acceptance): (mpsc::Sender<(StreamId, Offset)>, Acceptance),
) -> Desk<scheduled::Scheduling> {
    let lease = cluster.lease(scheduled::LEASE);
    let publisher = scheduled::Publisher {
        link: Link::of_duty(db),
        cluster: cluster.clone(),
        state: Arc::clone(state),
        supervisor: supervisor.clone(),
        tail,
        acceptance,
        known: scheduled::Knows::default(),
        trouble: None,
    };
    let upkeep = scheduled::Upkeep {
        link: Link::of_duty(db),
        state: Arc::clone(state),
        supervisor: supervisor.clone(),
    };
    upkeep.start(lease.beside());
    publisher.start(lease);
    let scheduling = scheduled::Scheduling {
        link: Link::of_reader(db),
        state: Arc::clone(state),
    };
    Desk::open(supervisor, "stream schedule desk", JOBS_MAX, scheduling)
}

fn start_readers(
    options: &Options,
    db: &Database,
    state: &Arc<State>,
    supervisor: &Supervisor,
) -> mpsc::Sender<reader::Job> {
    let (sender, jobs) = mpsc::channel(JOBS_MAX);
    let jobs = Arc::new(tokio::sync::Mutex::new(jobs));
    for number in 0..options.readers.max(1) {
        let reader = reader::Reader {
            link: Link::of_shared_reader(db),
            state: Arc::clone(state),
            supervisor: supervisor.clone(),
            jobs: Arc::clone(&jobs),
            serving: None,
        };
        let name = format!("stream reader {number}");
        supervisor.spawn(name, OnEnd::StopProcess, reader.run());
    }
    sender
}
