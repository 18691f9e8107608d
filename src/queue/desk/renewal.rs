//! Seek, purge and pause.

use super::Handle;
use crate::domain::id::Generation;
use crate::domain::name::QueueName;
use crate::queue::api::{Error, OnLoss, Renewal, Renewed};
use crate::queue::ask::Job;

impl Handle {
    /// Begins the queue's next generation: at another place (seek), or after all there is (purge). Receipts of before are
    /// `gone`, dead letters stay, long polls go on.
    ///
    /// With `expected_generation`, a repeat of the request gets the answer of the first, and does nothing; without, a repeat
    /// does it again.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::GenerationMoved`], [`Error::LogBehind`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`], or the database's.
    pub async fn renew(
        &self,
        name: &QueueName,
        renewal: Renewal,
        expected_generation: Option<Generation>,
    ) -> Result<Renewed, Error> {
        self.renew_with(name, renewal, expected_generation, OnLoss::Refuse)
            .await
    }

    /// As [`Handle::renew`], also of a queue whose log was restored without it.
    ///
    /// # Errors
    /// As [`Handle::renew`].
    pub async fn renew_with(
        &self,
        name: &QueueName,
        renewal: Renewal,
        expected_generation: Option<Generation>,
        on_loss: OnLoss,
    ) -> Result<Renewed, Error> {
        // Waits while the queue is being recovered.
        match self.shared.mailbox(name).await {
            Err(Error::LogBehind { .. }) if on_loss == OnLoss::Accept => {}
            mailbox => drop(mailbox?),
        }
        let name = name.clone();
        self.ask(|reply| Job::Renew {
            name,
            renewal,
            expected_generation,
            on_loss,
            reply,
        })
        .await
    }

    /// Pauses the queue, or resumes it. Nothing is handed out while it is paused; verbs, expiry and delays go on. Repeating it
    /// changes nothing.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::OutcomeUnknown`], [`Error::Stopping`], or the database's.
    pub async fn set_paused(&self, name: &QueueName, is_paused: bool) -> Result<(), Error> {
        let name = name.clone();
        self.ask(|reply| Job::Pause {
            name,
            is_paused,
            reply,
        })
        .await
    }
}
