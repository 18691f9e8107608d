//! The handle to scheduled messages.

use chrono::{DateTime, Utc};

use crate::domain::id::{Offset, ScheduledId, StreamId};
use crate::domain::message::Entry;
use crate::domain::name::{Topic, TopicPattern};
use crate::store::stream::WaitingRow;
use crate::stream::{Error, Handle};

/// A query for waiting messages, by due time.
#[derive(Debug, Clone, Default)]
pub struct ScheduledQuery {
    /// Only of this stream.
    pub stream: Option<StreamId>,
    /// Only topics that match.
    pub topic: Option<TopicPattern>,
    /// Only this ordering key.
    pub key: Option<String>,
    /// Due from then on.
    pub due_from: Option<DateTime<Utc>>,
    /// And before then.
    pub due_until: Option<DateTime<Utc>>,
    /// After this one.
    pub after: Option<ScheduledId>,
    /// The most to return.
    pub max_messages: usize,
}

/// A message that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Its topic.
    pub topic: Topic,
    /// The rest of it, without its payload.
    pub row: WaitingRow,
}

/// Messages that wait, in the order in which they are due.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScheduledPage {
    /// The dead letters that match.
    pub messages: Vec<Waiting>,
    /// The listing goes on after this one; `None` at the end. A page can be empty although more follows.
    pub next: Option<ScheduledId>,
}

/// The state of a scheduled message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScheduledStatus {
    /// It waits.
    Scheduled,
    /// It is in its stream.
    Published {
        /// The place.
        offset: Offset,
    },
    /// It was cancelled.
    Cancelled {
        /// The time.
        at: DateTime<Utc>,
    },
}

/// A scheduled message.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheduled {
    /// Its name.
    pub id: ScheduledId,
    /// The time when it was accepted.
    pub accepted_at: DateTime<Utc>,
    /// Its status.
    pub status: ScheduledStatus,
    /// The message. Its offset is not known here.
    pub entry: Entry,
}

/// The result of a cancellation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It will not be published: now, or since it was cancelled before.
    Cancelled,
    /// Too late.
    AlreadyPublished {
        /// Its place.
        offset: Offset,
    },
    /// There is no such message, or it is forgotten: published or cancelled ones are kept for a day after they were due.
    Unknown,
}

impl Handle {
    /// Lists messages that wait. Looks at a bounded number of them: a page can be empty although more follows.
    ///
    /// # Errors
    /// The database's.
    pub async fn list_scheduled(&self, query: ScheduledQuery) -> Result<ScheduledPage, Error> {
        self.scheduling(move |desk| Box::pin(async move { desk.list(&query).await }))
            .await
    }

    /// Finds a scheduled message in any state; `None` when there is none with this id, or it was forgotten.
    ///
    /// # Errors
    /// The database's.
    pub async fn find_scheduled(&self, id: ScheduledId) -> Result<Option<Scheduled>, Error> {
        self.scheduling(move |desk| Box::pin(desk.find(id))).await
    }

    /// Cancels a message that is not in its stream yet: it is either cancelled or published, never both. Safe to repeat.
    ///
    /// # Errors
    /// The database's; with a lost connection it may have happened.
    pub async fn cancel_scheduled(&self, id: ScheduledId) -> Result<Cancelled, Error> {
        self.scheduling(move |desk| Box::pin(desk.cancel(id))).await
    }
}
