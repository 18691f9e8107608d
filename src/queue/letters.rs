//! Dead letters as people and tasks read them, and the desk that reads for both: a task of its own, so that whoever asks
//! may go away and leaves no connection half used.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::api::Error;
use super::command::Command;
use super::handle::Handle;
use super::part::Answer;
use super::task::Task;
use crate::domain::id::{Offset, QueueId, StreamId};
use crate::domain::letter::{LetterId, Selection};
use crate::domain::message::Entry;
use crate::domain::name::QueueName;
use crate::store::letter::{Copy, Part, Stored, Summary};
use crate::store::{self, Database};
use crate::stream::{self, key_hash};
use crate::supervisor::Supervisor;

/// Most dead letters of a page.
pub const LETTERS_MAX: u32 = 1_000;
/// Bytes of payloads that one read of letters brings.
const FETCH_BYTES: i64 = 4 * 1024 * 1024;
/// Reads that wait for the desk.
const JOBS_MAX: usize = 1_024;

type Job = Box<dyn FnOnce(Database) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// Reads from the tables of dead letters and redrives, one after the other.
pub(in crate::queue) struct Desk {
    database: Database,
    supervisor: Supervisor,
    jobs: mpsc::Receiver<Job>,
}

/// The way to a desk.
#[derive(Debug, Clone)]
pub(in crate::queue) struct Letters {
    jobs: mpsc::Sender<Job>,
}

impl Desk {
    pub(in crate::queue) fn new(database: Database, supervisor: Supervisor) -> (Self, Letters) {
        let (sender, jobs) = mpsc::channel(JOBS_MAX);
        let desk = Self {
            database,
            supervisor,
            jobs,
        };
        (desk, Letters { jobs: sender })
    }

    pub(in crate::queue) async fn run(mut self) {
        loop {
            let job = tokio::select! {
                job = self.jobs.recv() => job,
                () = self.supervisor.stopping() => None,
            };
            match job {
                Some(job) => job(self.database.clone()).await,
                None => return self.supervisor.stopping().await,
            }
        }
    }
}

impl Letters {
    /// Has something read. Cancel-safe: the read goes on without its caller.
    pub(in crate::queue) async fn ask<T, F>(
        &self,
        read: impl FnOnce(Database) -> F + Send + 'static,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, store::Error>> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |database| {
            Box::pin(async move {
                let _ = reply.send(read(database).await);
            })
        });
        self.jobs.send(job).await.map_err(|_| Error::Stopping)?;
        Ok(answer.await.map_err(|_| Error::Stopping)??)
    }
}

/// Messages for deliveries: from the log, and those that were redriven and that the log has dropped from their letters.
#[derive(Debug, Clone)]
pub(in crate::queue) struct Source {
    pub(in crate::queue) stream: stream::Handle,
    pub(in crate::queue) letters: Letters,
    pub(in crate::queue) stream_id: StreamId,
    pub(in crate::queue) queue: QueueId,
}

/// What a fetch brought.
#[derive(Debug)]
pub(in crate::queue) struct Fetched {
    /// The messages, by offset.
    pub(in crate::queue) entries: Vec<Arc<Entry>>,
    /// What is nowhere, by offset.
    pub(in crate::queue) missing: Vec<Offset>,
}

impl Source {
    /// Fetches messages by their offsets, given in order as those that were redriven. Of those that only their letters have, not more than memory should hold: the
    /// rest is neither among the entries nor missing.
    pub(in crate::queue) async fn fetch(
        &self,
        offsets: Vec<Offset>,
        reopened: &[Offset],
    ) -> Result<Fetched, stream::Error> {
        let mut entries = self.stream.fetch(self.stream_id, offsets.clone()).await?;
        let mut missing = offsets;
        {
            // Both by offset.
            let mut found = entries.iter().map(|entry| entry.offset).peekable();
            missing.retain(|offset| {
                while found.next_if(|found| found < offset).is_some() {}
                found.peek() != Some(offset)
            });
        }
        let (kept, missing): (Vec<Offset>, Vec<Offset>) = missing
            .into_iter()
            .partition(|offset| reopened.binary_search(offset).is_ok());
        let mut missing = missing;
        if !kept.is_empty() {
            let (queue, asked) = (self.queue, kept.clone());
            let copies = self
                .letters
                .ask(move |database| async move {
                    store::letter::fetch_letters(&database, queue, &asked, FETCH_BYTES).await
                })
                .await
                .map_err(|error| match error {
                    Error::Store(error) => stream::Error::Store(error),
                    _ => stream::Error::Stopping,
                })?;
            let looked_through = match copies.last() {
                // The read stops at its bound: what comes after the last one is not known.
                Some(last) if copies.len() < kept.len() => last.offset,
                _ => Offset(i64::MAX),
            };
            let is_there = |offset: Offset| copies.binary_search_by_key(&offset, |c| c.offset);
            let gone = kept
                .into_iter()
                .filter(|&offset| offset <= looked_through && is_there(offset).is_err());
            missing.extend(gone);
            missing.sort_unstable();
            entries.extend(copies.into_iter().map(|copy| self.entry(copy)));
            entries.sort_by_key(|entry| entry.offset);
        }
        Ok(Fetched { entries, missing })
    }

    fn entry(&self, copy: Copy) -> Arc<Entry> {
        let message = copy.message;
        Arc::new(Entry {
            stream: self.stream_id,
            offset: copy.offset,
            event: message.to_event_json(),
            priority: message.priority(),
            key_hash: message.key.as_deref().map(key_hash),
            key: message.key.map(Into::into),
            topic: message.topic,
            appended_at: copy.appended_at,
        })
    }
}

/// Which dead letters to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LetterFilter {
    /// Those that fit.
    pub selection: Selection,
    /// Of offsets after this one.
    pub after: Offset,
    /// At most this many, 1 to 1,000.
    pub limit: u32,
}

/// A page of dead letters.
#[derive(Debug, Clone, PartialEq)]
pub struct LetterPage {
    /// The letters, by offset.
    pub letters: Vec<Summary>,
    /// Where the next page starts; None at the end. There may be more even when this page has few.
    pub next_after: Option<Offset>,
}

impl Handle {
    /// Lists dead letters by offset, without payloads.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Stopping`], or the database's.
    pub async fn dead_letters(
        &self,
        queue: &QueueName,
        filter: LetterFilter,
    ) -> Result<LetterPage, Error> {
        let id = self.shared.find(queue)?.description.id;
        let limit = i64::from(filter.limit.clamp(1, LETTERS_MAX));
        let part: Part<Summary> = self
            .shared
            .letters
            .ask(move |database| async move {
                let LetterFilter {
                    selection, after, ..
                } = filter;
                store::letter::list_letters(&database, id, after, &selection, limit).await
            })
            .await?;
        Ok(LetterPage {
            letters: part.found,
            next_after: part.through,
        })
    }

    /// Reads one dead letter, with its message and its history.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::LetterNotFound`], [`Error::Stopping`], or the database's.
    pub async fn dead_letter(&self, queue: &QueueName, id: LetterId) -> Result<Stored, Error> {
        let queue_id = self.shared.find(queue)?.description.id;
        let found = self
            .shared
            .letters
            .ask(move |database| async move {
                store::letter::find_letter(&database, queue_id, id.offset).await
            })
            .await?;
        found
            .filter(|letter| letter.summary.id == id)
            .ok_or_else(|| Error::LetterNotFound {
                queue: queue.clone(),
                id,
            })
    }

    /// Removes a dead letter: its message is settled like any other from then on, and with `hold_key` its key goes on.
    /// Answered after the commit. Repeating it is safe: one that is not there is removed already.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::LetterRedriven`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`], or the database's.
    pub async fn delete_dead_letter(&self, queue: &QueueName, id: LetterId) -> Result<(), Error> {
        let queue_id = self.shared.find(queue)?.description.id;
        let delivery =
            self.shared
                .letters
                .ask(move |database| async move {
                    store::letter::find_death(&database, queue_id, id).await
                })
                .await?;
        let Some(delivery) = delivery else {
            return Ok(());
        };
        self.tell(queue, self.shared.outcome_wait, |reply| {
            Command::RemoveLetter {
                id,
                delivery,
                reply,
            }
        })
        .await
    }
}

impl Task {
    /// Where the messages of this queue's deliveries are.
    pub(in crate::queue) fn source(&self) -> Source {
        Source {
            stream: self.parts.stream.clone(),
            letters: self.parts.letters.clone(),
            stream_id: self.parts.stream_id,
            queue: self.machine.id(),
        }
    }

    /// Those of these messages that were redriven, in the same order.
    pub(in crate::queue) fn reopened(&self, offsets: &[Offset]) -> Vec<Offset> {
        let offsets = offsets.iter().copied();
        offsets
            .filter(|&offset| self.machine.is_reopened(offset))
            .collect()
    }

    pub(in crate::queue) fn remove_letter(
        &mut self,
        id: LetterId,
        delivery: u32,
        reply: oneshot::Sender<Result<(), Error>>,
    ) {
        // Of a later death, or gone: then the one that was meant is removed.
        if self.machine.death(id.offset) == Some(delivery) {
            if self.machine.is_reopened(id.offset) {
                let _ = reply.send(Err(Error::LetterRedriven { id }));
                return;
            }
            self.machine.remove_letter(id.offset);
        }
        self.answer_later(Answer::Done { reply });
    }
}
