//! Dead letters as people and tasks read them, and the desk that reads for both. The desk is a separate task, so that a
//! caller may go away without leaving a connection half used.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::domain::id::{Offset, QueueId, StreamId};
use crate::domain::message::Entry;
use crate::queue::api::Error;
use crate::store::letter::Copy;
use crate::store::{self, Database};
use crate::stream::{self, key_hash};
use crate::supervisor::Supervisor;

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

/// The result of a fetch.
#[derive(Debug)]
pub(in crate::queue) struct Fetched {
    /// The messages, by offset.
    pub(in crate::queue) entries: Vec<Arc<Entry>>,
    /// The messages that exist nowhere, by offset.
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
