//! Redrives: begin, count, list, cancel.

use std::time::Duration;

use super::Handle;
use crate::domain::letter::RedriveStatus;
use crate::domain::name::QueueName;
use crate::queue::api::{DryRun, Error, NewRedrive};
use crate::queue::ask::Command;
use crate::store;
use crate::store::redrive::{RedriveRow, Which};

/// A dry run reads through all letters, and in a queue ordered by key through the log.
const DRY_RUN_WAIT: Duration = Duration::from_secs(60);

impl Handle {
    /// Begins to bring dead letters back: those that died up to now. Answered once that is committed and the letters are
    /// counted. A repeat under the same id gives that redrive, and `false`.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::TooManyRedrives`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`], or the database's.
    pub async fn redrive(
        &self,
        queue: &QueueName,
        new: NewRedrive,
    ) -> Result<(RedriveRow, bool), Error> {
        match self.find_redrive(queue, &new.id).await {
            Ok(found) => return Ok((found, false)),
            Err(Error::RedriveNotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let row = self
            .tell(queue, self.shared.outcome_wait, |reply| Command::Redrive {
                new,
                reply,
            })
            .await?;
        Ok((row, true))
    }

    /// Counts what a redrive would bring back, and writes nothing.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::TooManyRedrives`], [`Error::Unavailable`], [`Error::OutcomeUnknown`] when the count
    /// takes longer than a minute, [`Error::Stopping`].
    pub async fn dry_run(&self, queue: &QueueName, new: NewRedrive) -> Result<DryRun, Error> {
        self.tell(queue, DRY_RUN_WAIT, |reply| Command::DryRun { new, reply })
            .await
    }

    /// Lists redrives, the newest first. Those that ended are kept for 30 days.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Stopping`], or the database's.
    pub async fn redrives(&self, queue: &QueueName, limit: u32) -> Result<Vec<RedriveRow>, Error> {
        self.read_redrives(queue, Which::Newest(i64::from(limit)))
            .await
    }

    /// Describes one redrive, as far as it is committed.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::RedriveNotFound`], [`Error::Stopping`], or the database's.
    pub async fn find_redrive(&self, queue: &QueueName, id: &str) -> Result<RedriveRow, Error> {
        let found = self
            .read_redrives(queue, Which::Named(id.to_owned()))
            .await?;
        let found = found.into_iter().next();
        found.ok_or_else(|| Error::RedriveNotFound {
            queue: queue.clone(),
            id: id.to_owned(),
        })
    }

    /// Cancels a redrive: what came back stays, and no more does. Answered after the commit; one that is over is left as it
    /// is.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::RedriveNotFound`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`], or the database's.
    pub async fn cancel_redrive(&self, queue: &QueueName, id: &str) -> Result<(), Error> {
        if self.find_redrive(queue, id).await?.status != RedriveStatus::Running {
            return Ok(());
        }
        let id = id.to_owned();
        self.tell(queue, self.shared.outcome_wait, |reply| {
            Command::CancelRedrive { id, reply }
        })
        .await
    }

    async fn read_redrives(
        &self,
        queue: &QueueName,
        which: Which,
    ) -> Result<Vec<RedriveRow>, Error> {
        let queue = self.shared.find(queue)?.description.id;
        self.shared
            .letters
            .ask(move |database| async move {
                store::redrive::find_redrives(&database, queue, &which).await
            })
            .await
    }
}
