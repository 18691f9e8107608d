//! The handle to the relays: their status, and the rows that they could not relay.

use std::ops::RangeInclusive;
use std::sync::Arc;

use tokio::sync::watch;

use super::rejected::{Rejected, RejectedPage};
use super::status::Status;
use crate::domain::id::OriginId;
use crate::domain::name::{OriginName, Topic};
use crate::store;
use crate::stream::{AppendError, Placed};
use crate::supervisor::{Closed, Desk, Work};

/// The relays of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    statuses: Arc<[watch::Receiver<Status>]>,
    rejected: Desk<Rejected>,
}

/// A person's corrections to a rejected row before it is resent. A field that is `None` stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Correction {
    /// Another topic.
    pub topic: Option<Topic>,
    /// Another payload, as text.
    pub payload: Option<String>,
    /// Whether the schema of its topic is not asked.
    pub skip_schema: bool,
}

/// Reasons why rejected rows could not be listed, or one could not be resent.
#[derive(Debug, thiserror::Error)]
pub enum RejectedError {
    /// No origin of this process has the name.
    #[error("there is no origin `{name}`")]
    OriginNotFound {
        /// The name asked for.
        name: OriginName,
    },
    /// The origin has no such rejected row.
    #[error("the origin has no rejected row {id}")]
    NotFound {
        /// The number asked for.
        id: i64,
    },
    /// It has been resent before.
    #[error("the rejected row {id} has already been resent")]
    AlreadyResent {
        /// The number asked for.
        id: i64,
    },
    /// It could not be kept whole: it was too large, or could not be read.
    #[error("the rejected row {id} could not be kept in full: insert the row again")]
    NotKept {
        /// The number asked for.
        id: i64,
    },
    /// The corrected row cannot become a message either.
    #[error("the row still cannot become a message: {reason}")]
    StillInvalid {
        /// The cause.
        reason: String,
    },
    /// The stream refused it.
    #[error("the message could not be appended")]
    Append(#[source] AppendError),
    /// The engine has ended.
    #[error("the relays are stopping")]
    Stopping,
    /// The database could not do it.
    #[error("the database could not be used")]
    Store(#[from] store::Error),
}

impl Handle {
    pub(super) fn new(statuses: Vec<watch::Receiver<Status>>, rejected: Desk<Rejected>) -> Self {
        Self {
            statuses: statuses.into(),
            rejected,
        }
    }

    /// Every origin, in the configuration's order.
    #[must_use]
    pub fn origins(&self) -> Vec<Status> {
        let statuses = self.statuses.iter();
        statuses.map(|status| status.borrow().clone()).collect()
    }

    /// An origin's status, to wait for a change of.
    #[must_use]
    pub fn watch(&self, name: &OriginName) -> Option<watch::Receiver<Status>> {
        let mut statuses = self.statuses.iter();
        statuses
            .find(|status| status.borrow().name == *name)
            .cloned()
    }

    /// The rejected rows of an origin after number `after` (0 for the first page), oldest first, at most
    /// [`REJECTED_PAGE_MAX`](super::REJECTED_PAGE_MAX).
    ///
    /// # Errors
    /// [`RejectedError::OriginNotFound`], or the database's.
    pub async fn rejected(
        &self,
        name: &OriginName,
        after: i64,
        limit: u32,
    ) -> Result<RejectedPage, RejectedError> {
        let origin = self.find(name)?;
        self.ask(move |rejected| Box::pin(rejected.list(origin, after, limit)))
            .await
    }

    /// Sends a rejected row on, corrected or as it is. Safe to repeat within the deduplication window: its id is looked up.
    ///
    /// # Errors
    /// All of [`RejectedError`].
    pub async fn resend_rejected(
        &self,
        name: &OriginName,
        id: i64,
        correction: Correction,
    ) -> Result<Placed, RejectedError> {
        let origin = self.find(name)?;
        self.ask(move |rejected| Box::pin(rejected.resend(origin, id, correction)))
            .await
    }

    /// Deletes rejected rows of an origin, those with numbers in a range. Returns how many were there. Safe to repeat.
    ///
    /// # Errors
    /// [`RejectedError::OriginNotFound`], or the database's.
    pub async fn delete_rejected(
        &self,
        name: &OriginName,
        ids: RangeInclusive<i64>,
    ) -> Result<u64, RejectedError> {
        let origin = self.find(name)?;
        self.ask(move |rejected| Box::pin(rejected.delete(origin, ids)))
            .await
    }

    fn find(&self, name: &OriginName) -> Result<OriginId, RejectedError> {
        match self.watch(name) {
            Some(status) => Ok(status.borrow().id),
            None => Err(RejectedError::OriginNotFound { name: name.clone() }),
        }
    }

    async fn ask<T: Send + 'static>(
        &self,
        work: impl for<'a> FnOnce(&'a mut Rejected) -> Work<'a, Result<T, RejectedError>>
        + Send
        + 'static,
    ) -> Result<T, RejectedError> {
        let answer = self.rejected.ask(work).await;
        answer.map_err(|Closed| RejectedError::Stopping)?
    }
}
