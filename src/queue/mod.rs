//! Queues: one task per queue around the pure state machine, and the writer that journals for all of them.
//!
//! A receive is answered after one fenced, group-committed journal row that carries what is delivered; an ack after one
//! that carries what is settled. No row is written per message. A queue belongs to a slot, and only the holder of the
//! slot's lease writes for it: every write checks the lease's epoch. A restart reads a checkpoint and the journal behind
//! it, and redelivers nothing before its deadline. While Postgres cannot be reached the queues stand still.

mod ahead;
mod api;
mod behind;
mod catalogue;
mod command;
mod declare;
mod engine;
mod feed;
mod fold;
mod forward;
mod gather;
mod handle;
mod handout;
mod hold;
mod intake;
mod letters;
mod message;
mod metrics;
mod order;
mod pages;
mod part;
mod positions;
mod receive;
mod recover;
mod recovery;
mod redrive;
mod refused;
mod rejoin;
mod renewal;
mod scans;
#[cfg(test)]
mod simulation;
mod slots;
mod task;
mod tenancy;
mod waiters;
mod watermarks;
mod writer;

use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::{Notify, mpsc};

use crate::domain::queue::At;
use crate::domain::receipt::Keys;
use crate::store::{self, Database};
use crate::supervisor::{OnEnd, Supervisor};
use crate::{cluster, stream};

pub use crate::domain::queue::Whose;
pub use api::{
    BATCH_MAX, BATCH_WAIT_MAX, BlockedBy, BlockedKey, Declaration, Declared, Delivery, Description,
    Error, InFlight, InFlightFilter, LogBehind, Outcome, ReceiveRequest, Received, Status, Verb,
    VerbItem, WAIT_MAX,
};
pub use handle::{Handle, Receiving};
pub use handout::Handout;
pub use letters::{LETTERS_MAX, LetterFilter, LetterPage};
pub use message::{Act, Acted, Expire, INSPECT_MAX, MessageState, MessageStatus};
pub use redrive::{DryRun, NewRedrive};
pub use renewal::{OnLoss, Renewal, Renewed};

pub use crate::store::letter::{Stored as DeadLetter, Summary as LetterSummary};
pub use crate::store::redrive::RedriveRow as Redrive;

/// Most queues of one process (docs/protocol.md, Parameters).
pub const QUEUES_MAX: usize = 10_000;

/// How the queue engine runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// A request whose write has no known outcome for so long is answered [`Error::OutcomeUnknown`].
    pub outcome_wait: Duration,
    /// Most queues, at most [`QUEUES_MAX`].
    pub queues_max: usize,
    /// Bytes of a journal segment after which the next one is begun. Recovery reads four segments at most.
    pub journal_full_bytes: i64,
    /// A segment with anything in it is full after so long.
    pub journal_full_after: Duration,
    /// How often dead letters are looked at for those that are older.
    pub trim_every: Duration,
    /// How often it is written down how far the queues that keep up are.
    pub positions_every: Duration,
    /// How many offsets such a queue must have moved to be worth a row for its slot.
    pub position_worth: i64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            outcome_wait: Duration::from_secs(10),
            queues_max: QUEUES_MAX,
            journal_full_bytes: 16 * 1024 * 1024,
            journal_full_after: Duration::from_secs(10 * 60),
            trim_every: Duration::from_secs(60),
            positions_every: Duration::from_secs(30),
            position_worth: 10_000,
        }
    }
}

/// What receipts are made with: a key for each history that streams have been through.
async fn receipt_keys(
    database: &Database,
    cluster: &cluster::Handle,
) -> Result<Keys, store::Error> {
    let histories = store::history::find_streams(database).await?;
    let histories = histories.iter();
    let histories = histories.map(|of| (of.stream, of.first_offset, &of.salt.as_bytes()[..]));
    Ok(Keys::new(&cluster.identity().receipt_key.0, histories))
}

/// Reads which queues there are and starts their tasks. A queue answers once its slot's lease is taken and its state is
/// recovered. To stop, stop the supervisor: the queues flush, then the leases go back.
///
/// # Errors
/// The queues could not be read.
pub async fn start(
    options: Options,
    database: Database,
    stream: stream::Handle,
    cluster: cluster::Handle,
    supervisor: &Supervisor,
    registry: &mut Registry,
) -> Result<Handle, Error> {
    // The version first: the rows are of that one at least.
    let catalogue = catalogue::Catalogue {
        as_of: std::time::Instant::now(),
        version: store::queue::read_version(&database).await?,
        had_peers: cluster.view().has_peers(),
    };
    let rows = store::queue::find_queues(&database).await?;
    let keys = receipt_keys(&database, &cluster).await?;
    let (jobs_in, jobs) = mpsc::channel(256);
    // A part and a probe of every queue there can be: sending to the writer never has to wait.
    let (writer_in, submissions) = mpsc::channel(2 * QUEUES_MAX + 1);
    let (folds_in, folds) = mpsc::channel(QUEUES_MAX + 1);
    let metrics = metrics::Metrics::new(registry);
    let (people, letters) = letters::Desk::new(database.clone(), supervisor.clone());
    let (tasks, task_letters) = letters::Desk::new(database.clone(), supervisor.clone());
    supervisor.spawn("queue letters", OnEnd::StopProcess, people.run());
    supervisor.spawn("queue redrives", OnEnd::StopProcess, tasks.run());
    let shared = Arc::new(handle::Shared {
        letters,
        task_letters,
        forward: Notify::new(),
        queues: RwLock::new(HashMap::new()),
        jobs: jobs_in,
        cluster: cluster.clone(),
        keys,
        outcome_wait: options.outcome_wait,
        metrics: metrics.clone(),
    });
    registry.register_collector(Box::new(metrics::PerQueue(Arc::clone(&shared))));
    let (scans, scanner) = scans::Scans::new(stream.clone(), metrics.clone(), supervisor.clone());
    supervisor.spawn("queue scanner", OnEnd::StopProcess, scanner.run());
    let contact = Arc::new(writer::Contact::new(At::from(cluster.now())));
    let writer = writer::Writer {
        database: database.clone(),
        cluster: cluster.clone(),
        contact: Arc::clone(&contact),
        metrics,
        supervisor: supervisor.clone(),
        submissions,
        folds,
        connection: Some(database.connect().await?),
    };
    supervisor.spawn("queue writer", OnEnd::StopProcess, writer.run());
    let forwarder = forward::Forwarder {
        database: database.clone(),
        stream: stream.clone(),
        shared: Arc::clone(&shared),
        supervisor: supervisor.clone(),
    };
    supervisor.spawn("queue forwarder", OnEnd::StopProcess, forwarder.run());
    let mut engine = engine::Engine::new(engine::Given {
        options,
        database,
        stream,
        cluster,
        supervisor: supervisor.clone(),
        shared: Arc::clone(&shared),
        writer: writer_in,
        folds: folds_in,
        contact,
        scans,
        jobs,
        catalogue,
    });
    engine.cluster.serve_slots();
    engine.add_all(rows);
    supervisor.spawn("queue engine", OnEnd::StopProcess, engine.run());
    Ok(Handle { shared })
}
