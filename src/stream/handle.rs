//! The way into the stream engine. Every call goes through a bounded channel to a task that is never aborted, so that a
//! caller may drop any of these futures at any time.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use chrono::{DateTime, Utc};
use tokio::sync::{Notify, Semaphore, broadcast, mpsc, oneshot, watch};

use super::cache::Cache;
use super::catalogue::{Catalogue, Watermarks};
use super::held::HeldStreams;
use super::inbox::{Inbox, Pending};
use super::keys::Keys;
use super::leaf_sizes::LeafSizes;
use super::limits::Limits;
use super::metrics::Metrics;
use super::request::{
    Attributes, Batch, KeyPage, KeyRead, KeysPage, KeysRead, Member, Page, Placed, Read, Scan,
    Scanned, Search, SearchPage,
};
use super::scheduled::Scheduling;
use super::tail::Tails;
use super::topics::Topics;
use super::witness::Witness;
use super::{AppendError, Error, reader, scheduled};
use crate::domain::id::{Offset, StreamId};
use crate::domain::message::Entry;
use crate::store::Database;
use crate::supervisor::Desk;

/// The stream engine of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
}

/// State that the handles and the tasks share.
#[derive(Debug)]
pub(super) struct Shared {
    /// For lookups that should not keep a reader from its work.
    pub(super) db: Database,
    pub(super) appends: Inbox,
    pub(super) reads: mpsc::Sender<reader::Job>,
    /// Replays that may ask the log at a time: one reader is left for the queues.
    pub(super) replays: Semaphore,
    pub(super) catalogue: Desk<Catalogue>,
    pub(super) scheduled: Desk<Scheduling>,
    pub(super) state: Arc<State>,
}

/// The common state of the engine's tasks.
#[derive(Debug)]
pub(super) struct State {
    pub(super) tails: Tails,
    pub(super) cache: Cache,
    pub(super) keys: Keys,
    pub(super) watermarks: Watermarks,
    pub(super) topics: Topics,
    pub(super) limits: Limits,
    pub(super) leaf_sizes: LeafSizes,
    /// Wakes the maintenance before its tick: a log's end comes near.
    pub(super) maintain: Arc<Notify>,
    /// For other nodes to hear.
    pub(super) appended_here: Arc<Notify>,
    /// As was heard from them.
    pub(super) appended_elsewhere: Notify,
    pub(super) schedule: scheduled::Schedule,
    pub(super) witness: Witness,
    pub(super) held: HeldStreams,
    pub(super) metrics: Metrics,
}

impl State {
    /// Notes that retention dropped everything up to `floor`. The memory is cleared as well, or it would still hand out dropped
    /// messages.
    pub(super) fn raise_floor(&self, stream: StreamId, floor: Offset) {
        if self.tails.raise_floor(stream, floor) {
            self.cache.forget_through(stream, floor);
        }
    }
}

impl Handle {
    /// Appends a member with the next group commit. Queued at the first poll; resolves after the commit, after the wait
    /// bound of the options at the latest. Dropping the future does not undo it.
    ///
    /// # Errors
    /// All of [`AppendError`] but [`AppendError::OutcomeUnknown`] mean that nothing of it was appended.
    pub fn append(
        &self,
        member: Member,
    ) -> impl Future<Output = Result<Vec<Placed>, AppendError>> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move { Pending::append(&shared.appends, member).await }
    }

    /// Reads a page, payloads included. Recent entries come from memory. Examines a bounded part of the log: a page can be
    /// empty although more matches after its `through`.
    ///
    /// # Errors
    /// The database's.
    pub async fn read(&self, read: Read) -> Result<Page, Error> {
        let committed = self.shared.state.tails.committed(read.stream);
        if let Some(page) = self.shared.state.cache.read(&read, committed) {
            return Ok(page);
        }
        // Never closed.
        let _turn = self.shared.replays.acquire().await;
        self.ask(|reply| reader::Job::Read { read, reply }).await
    }

    /// A key of a keyed stream, and a page of its history, payloads included.
    ///
    /// # Errors
    /// [`Error::NotKeyed`], [`Error::KeysNotCounted`], or the database's.
    pub async fn read_key(&self, read: KeyRead) -> Result<KeyPage, Error> {
        // Never closed.
        let _turn = self.shared.replays.acquire().await;
        self.ask(|reply| reader::Job::Key { read, reply }).await
    }

    /// A page of the keys of a keyed stream, each with its last message.
    ///
    /// # Errors
    /// [`Error::NotKeyed`], [`Error::KeysNotCounted`], or the database's.
    pub async fn read_keys(&self, read: KeysRead) -> Result<KeysPage, Error> {
        // Never closed.
        let _turn = self.shared.replays.acquire().await;
        self.ask(|reply| reader::Job::Keys { read, reply }).await
    }

    /// Scans for what matches without reading payloads. Closed partitions none of whose topics match are skipped.
    ///
    /// # Errors
    /// The database's.
    pub async fn scan(&self, scan: Scan) -> Result<Scanned, Error> {
        self.ask(|reply| reader::Job::Scan { scan, reply }).await
    }

    /// Fetches entries by offset, in offset order; those that retention dropped are absent. Recent ones come from memory.
    ///
    /// # Errors
    /// The database's.
    pub async fn fetch(
        &self,
        stream: StreamId,
        offsets: Vec<Offset>,
    ) -> Result<Vec<Arc<Entry>>, Error> {
        let (mut found, missing) = self.shared.state.cache.fetch(stream, offsets);
        if !missing.is_empty() {
            let read = self
                .ask(|reply| reader::Job::Fetch {
                    stream,
                    offsets: missing,
                    reply,
                })
                .await?;
            found.extend(read);
            found.sort_by_key(|entry| entry.offset);
        }
        Ok(found)
    }

    /// The attributes that order and lanes go by, in offset order, each offset once; those that retention dropped are absent. Reads
    /// the log without payloads, and not all at once, so that a long list holds up no other reader.
    ///
    /// # Errors
    /// The database's.
    pub async fn attributes(
        &self,
        stream: StreamId,
        mut offsets: Vec<Offset>,
    ) -> Result<Vec<Attributes>, Error> {
        offsets.sort_unstable();
        offsets.dedup();
        let mut found = Vec::with_capacity(offsets.len());
        let mut rest = &offsets[..];
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(reader::attributes_chunk(rest));
            rest = after;
            let offsets = chunk.to_vec();
            let read = self
                .ask(|reply| reader::Job::Attributes {
                    stream,
                    offsets,
                    reply,
                })
                .await?;
            found.extend(read);
        }
        Ok(found)
    }

    /// Looks for messages. Looks at 200,000 offsets at most before it answers with what it has, payloads left aside but for those
    /// it found, so that a search through a long stream holds up neither the database nor other readers.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn search(&self, search: Search) -> Result<SearchPage, Error> {
        self.ask(|reply| reader::Job::Search { search, reply })
            .await
    }

    /// Entries appended to the stream from now on, by any node. A receiver that lags catches up by read or scan.
    #[must_use]
    pub fn tail(&self, stream: StreamId) -> broadcast::Receiver<Arc<Batch>> {
        self.shared.state.tails.subscribe(stream)
    }

    /// The last offset that the tail has passed on. Rises after the batch went out.
    #[must_use]
    pub fn last_offset(&self, stream: StreamId) -> watch::Receiver<Offset> {
        self.shared.state.tails.last_offset(stream)
    }

    /// The offset up to which retention dropped everything; `Offset(0)` before it dropped anything. Known at once on the node
    /// that drops, with the next poll on others.
    #[must_use]
    pub fn floor(&self, stream: StreamId) -> watch::Receiver<Offset> {
        self.shared.state.tails.floor(stream)
    }

    /// The last offset appended before `at`; `Offset(0)`, or the last one dropped, when none was.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn offset_at(&self, stream: StreamId, at: DateTime<Utc>) -> Result<Offset, Error> {
        self.ask(|reply| reader::Job::OffsetAt { stream, at, reply })
            .await
    }

    /// Tells the engine that every queue of the stream has settled what it matches up to this offset. Until told, nothing of
    /// the stream is dropped; with no queues, tell it `Offset(i64::MAX)`.
    pub fn set_watermark(&self, stream: StreamId, watermark: Offset) {
        self.set_watermark_as_of(stream, watermark, Instant::now());
    }

    /// As [`Handle::set_watermark`], for the known state of all queues at a moment that may be past: a queue that was created or
    /// went back after that moment may need more.
    pub fn set_watermark_as_of(&self, stream: StreamId, watermark: Offset, as_of: Instant) {
        self.shared.state.watermarks.set(stream, watermark, as_of);
    }

    async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> reader::Job,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.shared.reads.send(job(reply)).await;
        sent.map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)?
    }
}
