//! The way into the queue engine.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use super::api::{
    BATCH_MAX, BATCH_WAIT_MAX, Declaration, Declared, Description, Error, InFlight, InFlightFilter,
    ReceiveRequest, Received, VerbItem, WAIT_MAX,
};
use super::command::{Acks, Command, Job, Reply};
use super::letters::Letters;
use super::metrics::Metrics;
use super::task::Progress;
use crate::cluster::{self, Owner};
use crate::domain::id::{Generation, Slot, StreamId};
use crate::domain::name::QueueName;
use crate::domain::policy::{
    CONSUMER_MAX_BYTES, DELAY_MAX, Fault, PATTERNS_MAX, REASON_MAX_BYTES, VISIBILITY_TIMEOUT_RANGE,
};
use crate::domain::queue::{EmptyReason, Item, Outcome, Verb};
use crate::domain::receipt::{Keys, Opened, Receipt};

/// The queues of this process. Cheap to clone. Every future can be dropped at any time.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(in crate::queue) shared: Arc<Shared>,
}

/// How often a request looks whether its queue is recovered.
const RECOVERY_POLL: Duration = Duration::from_millis(10);

/// One queue, as the handles find it.
#[derive(Debug, Clone)]
pub(in crate::queue) struct Known {
    pub(in crate::queue) description: Description,
    /// None while the queue's state is not at hand.
    pub(in crate::queue) mailbox: Option<mpsc::Sender<Command>>,
    pub(in crate::queue) progress: Arc<Progress>,
}

/// What the handles and the tasks share.
#[derive(Debug)]
pub(in crate::queue) struct Shared {
    pub(in crate::queue) queues: RwLock<HashMap<QueueName, Known>>,
    pub(in crate::queue) jobs: mpsc::Sender<Job>,
    pub(in crate::queue) cluster: cluster::Handle,
    pub(in crate::queue) keys: Keys,
    pub(in crate::queue) outcome_wait: Duration,
    pub(in crate::queue) metrics: Metrics,
    /// Reads for people.
    pub(in crate::queue) letters: Letters,
    /// Reads for the queues' tasks, which somebody's long read must not hold up.
    pub(in crate::queue) task_letters: Letters,
    /// Dead letters are committed whose copies are to be published.
    pub(in crate::queue) forward: Notify,
}

impl Shared {
    pub(in crate::queue) fn find(&self, queue: &QueueName) -> Result<Known, Error> {
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        queues.get(queue).cloned().ok_or_else(|| Error::NotFound {
            queue: queue.clone(),
        })
    }

    /// The receipt that a text is. One of a message that was lost with a former history of the database is given as of a generation
    /// that never was, so that it is `gone`.
    pub(in crate::queue) fn receipt(&self, stream: StreamId, text: &str) -> Option<Receipt> {
        match self.keys.open(stream, text) {
            Opened::Unknown => None,
            Opened::Valid(receipt) => Some(receipt),
            Opened::Lost(receipt) => {
                self.metrics.incidents.inc();
                tracing::warn!(
                    ?receipt,
                    "a receipt of a message that was lost when the database went back in time"
                );
                Some(Receipt {
                    generation: Generation(0),
                    ..receipt
                })
            }
        }
    }

    /// The stream of a queue, if there is one of this name.
    fn stream_of(&self, queue: &QueueName) -> Option<StreamId> {
        let known = self.find(queue).ok()?;
        Some(known.description.stream_id)
    }

    /// Refuses what another node has to answer.
    pub(in crate::queue) fn check_owned(&self, queue: &QueueName, slot: Slot) -> Result<(), Error> {
        match self.cluster.view().owner(&slot.lease_name()) {
            Owner::This | Owner::Nobody => Ok(()),
            Owner::Other { .. } => Err(Error::NotOwner {
                queue: queue.clone(),
            }),
        }
    }

    /// The queue's task. Waits while the queue's state is being recovered: after a start, a declare or a hand-over.
    pub(in crate::queue) async fn mailbox(
        &self,
        queue: &QueueName,
    ) -> Result<mpsc::Sender<Command>, Error> {
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

impl Handle {
    /// Declares a queue: makes it, fixing where it starts, or changes it. A message published after the answer is
    /// delivered if it matches.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::StreamNotFound`], [`Error::StreamChange`], [`Error::TooManyQueues`],
    /// [`Error::Unavailable`], [`Error::OutcomeUnknown`], [`Error::Stopping`], or the database's.
    pub async fn declare(
        &self,
        name: QueueName,
        declaration: Declaration,
    ) -> Result<(Description, Declared), Error> {
        declaration.settings.check()?;
        let count = declaration.topics.len();
        if count == 0 || count > PATTERNS_MAX {
            return Err(invalid("topics", "must be a list of 1 to 100 patterns"));
        }
        if self.shared.find(&name).is_ok() {
            // A change is made to a queue whose scan position is known. If that takes too long, the engine refuses it.
            let _ = self.shared.mailbox(&name).await;
        }
        let declaration = Box::new(declaration);
        self.ask(|reply| Job::Declare {
            name,
            declaration,
            reply,
        })
        .await
    }

    /// Deletes a queue. Its dead letters are gone with it; once the name is used again, its receipts are
    /// `gone`.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn delete(&self, name: &QueueName) -> Result<(), Error> {
        let name = name.clone();
        self.ask(|reply| Job::Delete { name, reply }).await
    }

    /// Describes a queue, with its numbers now.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn describe(&self, name: &QueueName) -> Result<Description, Error> {
        Ok(with_status(self.shared.find(name)?).await)
    }

    /// Describes all queues, by name.
    ///
    /// Those that other nodes own come without numbers.
    ///
    /// # Errors
    /// None today.
    pub async fn list(&self) -> Result<Vec<Description>, Error> {
        let mut known: Vec<Known> = {
            let queues = self.shared.queues.read();
            let queues = queues.unwrap_or_else(PoisonError::into_inner);
            queues.values().cloned().collect()
        };
        known.sort_by(|a, b| a.description.name.cmp(&b.description.name));
        let mut descriptions = Vec::with_capacity(known.len());
        for known in known {
            descriptions.push(with_status(known).await);
        }
        Ok(descriptions)
    }

    /// Receives, waiting if need be. Answered after the deliveries are journaled and committed. Dropping the future
    /// takes the waiter away: nothing is handed out to it, and what was already decided is released.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::InFlightFull`] with a wait of zero,
    /// [`Error::TooManyWaiters`], [`Error::Unavailable`], [`Error::OutcomeUnknown`], [`Error::Stopping`].
    pub async fn receive(
        &self,
        queue: &QueueName,
        request: ReceiveRequest,
    ) -> Result<Received, Error> {
        self.begin_receive(queue, request).await?.finish().await
    }

    /// As [`Handle::receive`], in two steps: returns when what came along to be acknowledged is committed. What is handed
    /// out is in the same commit, if there is something at once. The acknowledgements stay whatever becomes of the rest.
    ///
    /// # Errors
    /// As [`Handle::receive`].
    pub async fn begin_receive(
        &self,
        queue: &QueueName,
        mut request: ReceiveRequest,
    ) -> Result<Receiving, Error> {
        check_receive(&request)?;
        self.shared.metrics.receives.inc();
        let until = request.wait + self.shared.outcome_wait;
        let (acks, acked) = self.acks(queue, std::mem::take(&mut request.ack));
        let mailbox = self.shared.mailbox(queue).await?;
        let (reply, answer) = oneshot::channel();
        let sent = mailbox.send(Command::Receive {
            request,
            acks,
            reply,
        });
        let begun = bounded(self.shared.outcome_wait, async {
            sent.await.map_err(|_| ENDED)?;
            match acked {
                Some(acked) => acked.await.unwrap_or(Err(Error::OutcomeUnknown)),
                None => Ok(Vec::new()),
            }
        });
        let acked = self.explained(queue, &mailbox, begun.await)?;
        Ok(Receiving {
            acked,
            handle: self.clone(),
            queue: queue.clone(),
            mailbox,
            answer,
            bound: until,
        })
    }

    fn acks(
        &self,
        queue: &QueueName,
        receipts: Vec<String>,
    ) -> (
        Option<Acks>,
        Option<oneshot::Receiver<Result<Vec<Outcome>, Error>>>,
    ) {
        if receipts.is_empty() {
            return (None, None);
        }
        let (reply, acked) = oneshot::channel();
        let stream = self.shared.stream_of(queue);
        let items = receipts.iter().map(|receipt| Item {
            receipt: stream.and_then(|stream| self.shared.receipt(stream, receipt)),
            delay: None,
            extend_by: None,
            reason: None,
        });
        let items = items.collect();
        (Some(Acks { items, reply }), Some(acked))
    }

    /// Settles deliveries by their receipts, evaluated as one request in offset order and answered in the order sent,
    /// after the commit. Repeating it is safe.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`].
    pub async fn settle(
        &self,
        queue: &QueueName,
        verb: Verb,
        items: Vec<VerbItem>,
    ) -> Result<Vec<Outcome>, Error> {
        check_items(&items)?;
        let stream = self.shared.stream_of(queue);
        let items = items
            .into_iter()
            .map(|item| Item {
                receipt: stream.and_then(|stream| self.shared.receipt(stream, &item.receipt)),
                delay: item.delay,
                extend_by: item.extend_by,
                reason: item.reason,
            })
            .collect();
        self.tell(queue, self.shared.outcome_wait, |reply| Command::Settle {
            verb,
            items,
            reply,
        })
        .await
    }

    /// Lists live deliveries by offset.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Unavailable`], [`Error::Stopping`].
    pub async fn in_flight(
        &self,
        queue: &QueueName,
        filter: InFlightFilter,
    ) -> Result<Vec<InFlight>, Error> {
        self.tell(queue, self.shared.outcome_wait, |reply| Command::InFlight {
            filter,
            reply,
        })
        .await
    }

    /// Sends a command to the queue's task.
    pub(in crate::queue) async fn tell<T>(
        &self,
        queue: &QueueName,
        bound: Duration,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, Error> {
        let mailbox = self.shared.mailbox(queue).await?;
        let answer = send(&mailbox, bound, command).await;
        self.explained(queue, &mailbox, answer)
    }

    /// A task that ended because its queue was deleted meanwhile leaves nothing to find out: the queue is not there.
    fn explained<T>(
        &self,
        queue: &QueueName,
        mailbox: &mpsc::Sender<Command>,
        answer: Result<T, Error>,
    ) -> Result<T, Error> {
        match answer {
            Err(error @ (Error::Unavailable { .. } | Error::OutcomeUnknown))
                if mailbox.is_closed() =>
            {
                let known = self.shared.find(queue)?;
                if matches!(error, Error::Unavailable { .. }) {
                    let slot = Slot::of(known.description.id);
                    self.shared.check_owned(queue, slot)?;
                }
                Err(error)
            }
            answer => answer,
        }
    }

    pub(in crate::queue) async fn ask<T>(
        &self,
        job: impl FnOnce(Reply<T>) -> Job,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.shared.jobs.send(job(reply)).await;
        sent.map_err(|_| Error::Stopping)?;
        match tokio::time::timeout(self.shared.outcome_wait, answer).await {
            Ok(answer) => answer.map_err(|_| Error::Stopping)?,
            Err(_) => Err(Error::OutcomeUnknown),
        }
    }
}

/// The queue's task ended before it looked at the request: nothing was decided.
pub(in crate::queue) const ENDED: Error = Error::Unavailable {
    why: "it ended while the request waited",
};

/// Sends a command and waits for its answer, at most `bound`.
async fn send<T>(
    mailbox: &mpsc::Sender<Command>,
    bound: Duration,
    command: impl FnOnce(Reply<T>) -> Command,
) -> Result<T, Error> {
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        let sent = mailbox.send(command(reply)).await;
        sent.map_err(|_| ENDED)?;
        // The task ended with the decision in its hands: it may be committed.
        answer.await.unwrap_or(Err(Error::OutcomeUnknown))
    };
    bounded(bound, exchange).await
}

/// Waits for an answer at most so long. What is asked for goes on by itself.
async fn bounded<T>(
    bound: Duration,
    exchange: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(bound, exchange).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::OutcomeUnknown),
    }
}

/// A receive whose acknowledgements are committed.
#[derive(Debug)]
#[must_use = "dropping it takes the waiter away"]
pub struct Receiving {
    /// What became of the receipts that came along, in the order sent.
    pub acked: Vec<Outcome>,
    handle: Handle,
    queue: QueueName,
    mailbox: mpsc::Sender<Command>,
    answer: oneshot::Receiver<Result<Received, Error>>,
    bound: Duration,
}

impl Receiving {
    /// Waits for messages, as [`Handle::receive`] does. Dropping the future takes the waiter away.
    ///
    /// # Errors
    /// As [`Handle::receive`]. Not [`Error::InFlightFull`] if something came along to be acknowledged: what became of
    /// that must be told.
    pub async fn finish(self) -> Result<Received, Error> {
        let Self {
            acked,
            handle,
            queue,
            mailbox,
            answer,
            bound,
        } = self;
        // The task ended with the decision in its hands: it may be committed.
        let exchange = async { answer.await.unwrap_or(Err(Error::OutcomeUnknown)) };
        let answer = bounded(bound, exchange).await;
        let received = match handle.explained(&queue, &mailbox, answer) {
            Err(Error::InFlightFull { .. }) if !acked.is_empty() => {
                Received::nothing(EmptyReason::InFlightFull)
            }
            // What was acknowledged must be told; the next receive finds the new owner.
            Err(Error::NotOwner { .. }) if !acked.is_empty() => {
                Received::nothing(EmptyReason::Empty)
            }
            answer => answer?,
        };
        Ok(Received { acked, ..received })
    }
}

async fn with_status(known: Known) -> Description {
    let mut description = known.description;
    if let Some(mailbox) = known.mailbox {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            mailbox.send(Command::Status { reply }).await.ok()?;
            answer.await.ok()
        };
        description.status = tokio::time::timeout(Duration::from_secs(5), asked)
            .await
            .ok()
            .flatten();
    }
    description
}

pub(in crate::queue) fn invalid(field: &'static str, reason: &str) -> Error {
    Error::Invalid(Fault {
        field,
        reason: reason.to_owned(),
    })
}

fn check_receive(request: &ReceiveRequest) -> Result<(), Error> {
    let (shortest, longest) = VISIBILITY_TIMEOUT_RANGE;
    if request.max_messages == 0 || request.max_messages as usize > BATCH_MAX {
        return Err(invalid("max_messages", "must be from 1 to 1000"));
    }
    if request.max_bytes == 0 {
        return Err(invalid("max_bytes", "must be at least 1"));
    }
    if request.wait > WAIT_MAX {
        return Err(invalid("wait_seconds", "must be from 0 to 50"));
    }
    if request.batch_wait > BATCH_WAIT_MAX {
        return Err(invalid("batch_wait_seconds", "must be from 0 to 5"));
    }
    if request.ack.len() > BATCH_MAX {
        return Err(invalid("ack", "must be a list of at most 1000"));
    }
    if request
        .visibility_timeout
        .is_some_and(|timeout| timeout < shortest || timeout > longest)
    {
        return Err(invalid(
            "visibility_timeout_seconds",
            "must be from 1 to 43200",
        ));
    }
    for (field, text) in [
        ("consumer", &request.consumer),
        ("receive_id", &request.receive_id),
    ] {
        if text
            .as_ref()
            .is_some_and(|text| text.len() > CONSUMER_MAX_BYTES)
        {
            return Err(invalid(field, "must be at most 255 bytes long"));
        }
    }
    Ok(())
}

fn check_items(items: &[VerbItem]) -> Result<(), Error> {
    let (shortest, longest) = VISIBILITY_TIMEOUT_RANGE;
    if items.is_empty() || items.len() > BATCH_MAX {
        return Err(invalid("deliveries", "must be a list of 1 to 1000"));
    }
    for item in items {
        if item.delay.is_some_and(|delay| delay > DELAY_MAX) {
            return Err(invalid("delay_seconds", "must be from 0 to 43200"));
        }
        if item
            .extend_by
            .is_some_and(|by| by < shortest || by > longest)
        {
            return Err(invalid(
                "visibility_timeout_seconds",
                "must be from 1 to 43200",
            ));
        }
        if item
            .reason
            .as_ref()
            .is_some_and(|reason| reason.len() > REASON_MAX_BYTES)
        {
            return Err(invalid("reason", "must be at most 1024 bytes long"));
        }
        if item
            .reason
            .as_ref()
            .is_some_and(|reason| reason.contains('\0'))
        {
            return Err(invalid("reason", "must not contain the character U+0000"));
        }
    }
    Ok(())
}
