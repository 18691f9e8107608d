//! Queues: one task per queue around the pure state machine, and the writer that journals for all of them.
//!
//! A receive is answered after one fenced, group-committed journal row that carries what is delivered; an ack after one
//! that carries what is settled. No row is written per message. A queue belongs to a slot, and only the holder of the
//! slot's lease writes for it: every write checks the lease's epoch. A restart reads a checkpoint and the journal behind
//! it, and redelivers nothing before its deadline. While Postgres cannot be reached the queues stand still.

mod api;
mod ask;
mod desk;
mod forward;
mod gauges;
mod log;
mod metrics;
mod options;
mod owner;
mod shared;
mod task;
mod writer;

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use prometheus_client::registry::Registry;
use tokio::sync::mpsc;

use crate::domain::queue::At;
use crate::domain::receipt::Keys;
use crate::store::{self, Database};
use crate::supervisor::{OnEnd, Supervisor};
use crate::{cluster, stream};

pub use crate::domain::queue::Whose;
pub use api::{
    Act, Acted, BATCH_MAX, BATCH_WAIT_MAX, BlockedBy, BlockedKey, Declaration, Declared, Delivery,
    Description, DryRun, Error, Expire, Handout, INSPECT_MAX, InFlight, InFlightFilter,
    LETTERS_MAX, LetterFilter, LetterPage, LogBehind, MessageState, MessageStatus, NewRedrive,
    OnLoss, Outcome, ReceiveRequest, Received, Renewal, Renewed, Status, Verb, VerbItem, WAIT_MAX,
};
pub use desk::{Handle, Receiving};
pub use options::{Options, QUEUES_MAX};

pub use crate::store::letter::{Stored as DeadLetter, Summary as LetterSummary};
pub use crate::store::redrive::RedriveRow as Redrive;

/// The keys of receipts: one for each history that streams have been through.
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
    let as_of = std::time::Instant::now();
    let version = store::queue::read_version(&database).await?;
    let catalogue = owner::Catalogue::new(as_of, version, cluster.view().has_peers());
    let rows = store::queue::find_queues(&database).await?;
    let keys = receipt_keys(&database, &cluster).await?;
    let (jobs_in, jobs) = mpsc::channel(256);
    // A part and a probe of every queue there can be: sending to the writer never has to wait.
    let (writer_in, submissions) = mpsc::channel(2 * QUEUES_MAX + 1);
    let (folds_in, folds) = mpsc::channel(QUEUES_MAX + 1);
    let metrics = metrics::Metrics::new(registry);
    let (people, letters) = log::letters::Desk::new(database.clone(), supervisor.clone());
    let (tasks, task_letters) = log::letters::Desk::new(database.clone(), supervisor.clone());
    supervisor.spawn("queue letters", OnEnd::StopProcess, people.run());
    supervisor.spawn("queue redrives", OnEnd::StopProcess, tasks.run());
    let shared = Arc::new(shared::Shared {
        letters,
        task_letters,
        forward: Arc::default(),
        queues: RwLock::new(HashMap::new()),
        jobs: jobs_in,
        cluster: cluster.clone(),
        keys,
        outcome_wait: options.outcome_wait,
        metrics: metrics.clone(),
    });
    registry.register_collector(Box::new(gauges::PerQueue(Arc::clone(&shared))));
    let (scans, scanner) =
        log::scans::Scans::new(stream.clone(), metrics.clone(), supervisor.clone());
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
    };
    forwarder.start(supervisor);
    let mut engine = owner::Engine::new(owner::Given {
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
