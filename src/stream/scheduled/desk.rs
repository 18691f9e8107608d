//! The desk for scheduled messages: lists them, shows one, cancels one. It is a separate task, so that a caller that goes
//! away leaves nothing half done.

use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::handle::{
    Cancelled, Scheduled, ScheduledPage, ScheduledQuery, ScheduledStatus, Waiting,
};
use super::schedules::{self, ScheduleDescription};
use crate::domain::id::{Offset, ScheduledId};
use crate::domain::name::ScheduleName;
use crate::domain::schedule::Declaration;
use crate::store::stream::{self as sql, CancelledScheduled, ScheduledSlice};
use crate::store::{Link, Patience};
use crate::stream::handle::State;
use crate::stream::tail::entry;
use crate::stream::{Declared, Error, Handle};
use crate::supervisor::{Closed, Work};

/// Rows that one listing looks at before it answers with what it has.
const LOOKED_AT_MAX: usize = 20_000;
/// Rows read at a time.
const SLICE_ROWS: u32 = 2_000;
/// After whatever can be scheduled: the year 9999.
const FOR_EVER: DateTime<Utc> = DateTime::from_timestamp(253_402_300_799, 0).expect("in range");

/// Serves people who ask for scheduled messages and schedules, at a desk.
#[derive(Debug)]
pub(in crate::stream) struct Scheduling {
    pub(in crate::stream) link: Link,
    pub(in crate::stream) state: Arc<State>,
}

impl Handle {
    /// Has something done at the desk. What fails in the database costs it its connection.
    pub(super) async fn scheduling<T: Send + 'static>(
        &self,
        work: impl for<'a> FnOnce(&'a mut Scheduling) -> Work<'a, Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let asked = self.shared.scheduled.ask(move |scheduling| {
            Box::pin(async move {
                let answer = work(&mut *scheduling).await;
                if let Err(Error::Store(_)) = &answer {
                    scheduling.link.cut();
                }
                answer
            })
        });
        asked.await.map_err(|Closed| Error::Stopping)?
    }
}

impl Scheduling {
    pub(super) async fn declare(
        &mut self,
        name: &ScheduleName,
        declaration: &Declaration,
    ) -> Result<(ScheduleDescription, Declared), Error> {
        let mut patience = Patience::default();
        let witness = self.state.witness.now();
        loop {
            // Done once more it finds what it declared.
            let declared = match self.link.get().await {
                Ok(connection) => schedules::declare(connection, name, declaration, witness).await,
                Err(error) => Err(error.into()),
            };
            match declared {
                Err(Error::Store(error)) => {
                    // On another connection.
                    self.link.cut();
                    patience.again(error).await?;
                }
                declared => {
                    self.state.schedule.note_changed();
                    return declared;
                }
            }
        }
    }

    pub(super) async fn schedule(
        &mut self,
        name: &ScheduleName,
    ) -> Result<ScheduleDescription, Error> {
        let witness = self.state.witness.now();
        schedules::find(self.link.get().await?, name, witness).await
    }

    pub(super) async fn schedules(&mut self) -> Result<Vec<ScheduleDescription>, Error> {
        let witness = self.state.witness.now();
        schedules::list(self.link.get().await?, witness).await
    }

    pub(super) async fn delete(&mut self, name: &ScheduleName) -> Result<(), Error> {
        let mut patience = Patience::default();
        loop {
            let deleted = match self.link.get().await {
                Ok(connection) => schedules::delete(connection, name).await,
                Err(error) => Err(error.into()),
            };
            match deleted {
                Err(Error::Store(error)) => {
                    // On another connection.
                    self.link.cut();
                    patience.again(error).await?;
                }
                // What is not there any more was deleted by the first try.
                Err(Error::ScheduleNotFound { .. }) if patience.is_repeat() => break,
                deleted => {
                    deleted?;
                    break;
                }
            }
        }
        self.state.schedule.note_changed();
        Ok(())
    }

    /// Walks over what waits from the query's place on, as far as the bounds allow.
    pub(super) async fn list(&mut self, query: &ScheduledQuery) -> Result<ScheduledPage, Error> {
        let state = Arc::clone(&self.state);
        let connection = self.link.get().await?;
        state.topics.refresh(connection).await?;
        let mut page = ScheduledPage::default();
        let mut looked_at = 0;
        let mut after = query.after;
        loop {
            let slice = ScheduledSlice {
                stream: query.stream,
                from: query.due_from.unwrap_or(DateTime::UNIX_EPOCH),
                until: query.due_until.unwrap_or(FOR_EVER),
                after,
                limit: SLICE_ROWS,
            };
            let rows = sql::list_scheduled(connection, &slice).await?;
            let is_last = rows.len() < SLICE_ROWS as usize;
            for row in rows {
                after = Some(row.id);
                looked_at += 1;
                let Some(topic) = state.topics.name(row.topic) else {
                    continue;
                };
                let is_wanted = query.topic.as_ref().is_none_or(|p| p.matches(&topic))
                    && query
                        .key
                        .as_ref()
                        .is_none_or(|key| row.key.as_ref() == Some(key));
                if is_wanted {
                    page.messages.push(Waiting { topic, row });
                }
                if page.messages.len() >= query.max_messages || looked_at >= LOOKED_AT_MAX {
                    page.next = after;
                    return Ok(page);
                }
            }
            if is_last {
                return Ok(page);
            }
        }
    }

    pub(super) async fn find(&mut self, id: ScheduledId) -> Result<Option<Scheduled>, Error> {
        let state = Arc::clone(&self.state);
        let connection = self.link.get().await?;
        state.topics.refresh(connection).await?;
        let found = sql::find_scheduled(connection, id, |topic| state.topics.name(topic)).await?;
        Ok(found.map(|found| Scheduled {
            id,
            accepted_at: found.row.appended_at,
            status: match found.status {
                sql::ScheduledStatus::Scheduled => ScheduledStatus::Scheduled,
                sql::ScheduledStatus::Published(offset) => ScheduledStatus::Published { offset },
                sql::ScheduledStatus::Cancelled(at) => ScheduledStatus::Cancelled { at },
            },
            entry: entry(
                id.stream,
                Offset(0),
                found.row.appended_at,
                &found.row.message,
            ),
        }))
    }

    pub(super) async fn cancel(&mut self, id: ScheduledId) -> Result<Cancelled, Error> {
        let mut patience = Patience::default();
        let cancelled = loop {
            let cancelled = match self.link.get().await {
                Ok(connection) => sql::cancel_scheduled(connection, id).await,
                Err(error) => Err(error),
            };
            match cancelled {
                Ok(cancelled) => break cancelled,
                Err(error) => {
                    // On another connection.
                    self.link.cut();
                    patience.again(error).await?;
                }
            }
        };
        Ok(match cancelled {
            CancelledScheduled::Cancelled { is_new } => {
                if is_new {
                    self.state.metrics.scheduled_cancelled.inc();
                    self.state.schedule.note_gone(id.stream, 1);
                }
                Cancelled::Cancelled
            }
            CancelledScheduled::Published { offset } => Cancelled::AlreadyPublished { offset },
            CancelledScheduled::Unknown => Cancelled::Unknown,
        })
    }
}
