//! What the handles, the queues' tasks and the owner of the slots share: which queues there are, and how far each is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use crate::cluster::{self, Owner};
use crate::domain::id::{Generation, Slot, StreamId};
use crate::domain::name::QueueName;
use crate::domain::receipt::{Keys, Opened, Receipt};
use crate::queue::api::{Description, Error};
use crate::queue::ask::{Command, Job};
use crate::queue::log::letters::Letters;
use crate::queue::metrics::Metrics;

/// How often a request looks whether its queue is recovered.
const RECOVERY_POLL: Duration = Duration::from_millis(10);

/// One queue, as the handles find it.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) description: Description,
    /// None while the queue's state is not at hand.
    pub(super) mailbox: Option<mpsc::Sender<Command>>,
    pub(super) progress: Arc<Progress>,
}

/// State that the handles and the tasks share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) queues: RwLock<HashMap<QueueName, Known>>,
    pub(super) jobs: mpsc::Sender<Job>,
    pub(super) cluster: cluster::Handle,
    pub(super) keys: Keys,
    pub(super) outcome_wait: Duration,
    pub(super) metrics: Metrics,
    /// Reads for people.
    pub(super) letters: Letters,
    /// Reads for the queues' tasks, which somebody's long read must not hold up.
    pub(super) task_letters: Letters,
    /// Notifies that dead letters are committed whose copies must be published.
    pub(super) forward: Arc<Notify>,
}

impl Shared {
    pub(super) fn find(&self, queue: &QueueName) -> Result<Known, Error> {
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        queues.get(queue).cloned().ok_or_else(|| Error::NotFound {
            queue: queue.clone(),
        })
    }

    /// The receipt that a text is. One of a message that was lost with a former history of the database is given as of a generation
    /// that never was, so that it is `gone`.
    pub(super) fn receipt(&self, stream: StreamId, text: &str) -> Option<Receipt> {
        match self.keys.open(stream, text) {
            Opened::Unknown => None,
            Opened::Valid(receipt) => Some(receipt),
            Opened::Lost(receipt) => {
                self.metrics.incidents.inc();
                tracing::warn!(
                    ?receipt,
                    "refused a receipt of a message that was lost when the database went back in time"
                );
                Some(Receipt {
                    generation: Generation(0),
                    ..receipt
                })
            }
        }
    }

    /// The stream of a queue, if there is one of this name.
    pub(super) fn stream_of(&self, queue: &QueueName) -> Option<StreamId> {
        let known = self.find(queue).ok()?;
        Some(known.description.stream_id)
    }

    /// Refuses what another node has to answer.
    pub(super) fn check_owned(&self, queue: &QueueName, slot: Slot) -> Result<(), Error> {
        match self.cluster.view().owner(&slot.lease_name()) {
            Owner::This | Owner::Nobody => Ok(()),
            Owner::Other { .. } => Err(Error::NotOwner {
                queue: queue.clone(),
            }),
        }
    }

    /// The queue's task. Waits while the queue's state is being recovered: after a start, a declare or a hand-over.
    pub(super) async fn mailbox(&self, queue: &QueueName) -> Result<mpsc::Sender<Command>, Error> {
        let until = tokio::time::Instant::now() + self.outcome_wait;
        loop {
            let known = self.find(queue)?;
            if let Some(mailbox) = known.mailbox {
                return Ok(mailbox);
            }
            self.check_owned(queue, Slot::of(known.description.id))?;
            if let Some(behind) = known.description.log_behind {
                return Err(behind.error(queue));
            }
            if tokio::time::Instant::now() >= until {
                return Err(Error::Unavailable {
                    why: "its state is being recovered",
                });
            }
            tokio::time::sleep(RECOVERY_POLL).await;
        }
    }
}

/// How far a queue is, for the stream's retention. Moves with commits only.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) watermark: AtomicI64,
    /// Nothing is unsettled and the queue keeps up: its watermark is what the dispatcher has done.
    pub(super) idle: AtomicBool,
    // For the scrape: as of the task's last round.
    pub(super) depth: AtomicU64,
    pub(super) live: AtomicU64,
    pub(super) delayed: AtomicU64,
    pub(super) dead: AtomicU64,
    pub(super) waiters: AtomicU64,
    pub(super) is_paused: AtomicBool,
    /// Deliveries, ever since.
    pub(super) delivered: AtomicU64,
}
