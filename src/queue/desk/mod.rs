//! The handle to the queue engine.

mod letters;
mod locate;
mod message;
mod receive;
mod redrive;
mod renewal;

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::domain::id::Slot;
use crate::domain::name::QueueName;
use crate::domain::policy::PATTERNS_MAX;
use crate::queue::api::{
    Declaration, Declared, Description, ENDED, Error, InFlight, InFlightFilter, invalid,
};
use crate::queue::ask::{Command, Job, Reply};
use crate::queue::shared::{Known, Shared};

pub use receive::Receiving;

/// The queues of this process. Cheap to clone. Every future can be dropped at any time.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
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
    async fn tell<T>(
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

    async fn ask<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.shared.jobs.send(job(reply)).await;
        sent.map_err(|_| Error::Stopping)?;
        match tokio::time::timeout(self.shared.outcome_wait, answer).await {
            Ok(answer) => answer.map_err(|_| Error::Stopping)?,
            Err(_) => Err(Error::OutcomeUnknown),
        }
    }
}

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

/// Waits for an answer up to a time limit. The request itself goes on.
async fn bounded<T>(
    bound: Duration,
    exchange: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(bound, exchange).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::OutcomeUnknown),
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
