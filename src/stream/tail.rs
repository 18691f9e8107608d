//! Passes on appended entries in offset order without a gap: own appends from memory, other nodes' from the log.
//!
//! A lock that somebody holds on one stream's log holds up that stream's tail alone. What is passed on of it meanwhile is dropped,
//! and read from the log once the lock is gone.

use std::collections::{HashMap, hash_map};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::sync::{broadcast, mpsc, watch};

use super::Options;
use super::group::truncate_times;
use super::handle::State;
use super::request::{Batch, key_hash};
use super::topics::Topics;
use crate::cluster;
use crate::domain::chain;
use crate::domain::id::{Offset, StreamId};
use crate::domain::message::{Entry, Message};
use crate::store::stream as sql;
use crate::store::{self, Connection, Link};
use crate::supervisor::{Backoff, Report, Supervisor};

/// Batches that wait for the slowest receiver of a stream; one further behind has lagged and reads the log.
const TAIL_MAX_BATCHES: usize = 256;
/// Offsets read from the log at a time for a gap.
const GAP_PAGE: i64 = 1_000;
/// A stream whose log is locked is looked at again after so long: each look may wait for 50 ms.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// So often it is noted that the clocks agree.
const NOTE_CLOCKS: Duration = Duration::from_secs(45);
/// The pause before a gap is read again.
const READ_AGAIN: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));

/// The tails of all streams, made when first asked for.
#[derive(Debug, Default)]
pub(super) struct Tails {
    streams: Mutex<HashMap<StreamId, Tail>>,
}

#[derive(Debug)]
struct Tail {
    batches: broadcast::Sender<Arc<Batch>>,
    last: watch::Sender<Offset>,
    /// The last offset that this node has committed: at or before what it tells its callers.
    committed: Offset,
    /// Everything up to it is gone by retention.
    floor: watch::Sender<Offset>,
}

impl Default for Tail {
    fn default() -> Self {
        Self {
            batches: broadcast::Sender::new(TAIL_MAX_BATCHES),
            last: watch::Sender::new(Offset(0)),
            committed: Offset(0),
            floor: watch::Sender::new(Offset(0)),
        }
    }
}

impl Tails {
    fn streams(&self) -> MutexGuard<'_, HashMap<StreamId, Tail>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn subscribe(&self, stream: StreamId) -> broadcast::Receiver<Arc<Batch>> {
        self.streams()
            .entry(stream)
            .or_default()
            .batches
            .subscribe()
    }

    pub(super) fn last_offset(&self, stream: StreamId) -> watch::Receiver<Offset> {
        self.streams().entry(stream).or_default().last.subscribe()
    }

    pub(super) fn floor(&self, stream: StreamId) -> watch::Receiver<Offset> {
        self.streams().entry(stream).or_default().floor.subscribe()
    }

    /// Everything up to here is gone by retention, as far as known.
    pub(super) fn floor_now(&self, stream: StreamId) -> Offset {
        let streams = self.streams();
        let tail = streams.get(&stream);
        tail.map_or(Offset(0), |tail| *tail.floor.borrow())
    }

    /// Notes that everything up to `floor` is gone. Whether that is news.
    pub(super) fn raise_floor(&self, stream: StreamId, floor: Offset) -> bool {
        let mut streams = self.streams();
        let tail = streams.entry(stream).or_default();
        tail.floor.send_if_modified(|now| {
            let is_higher = floor > *now;
            *now = (*now).max(floor);
            is_higher
        })
    }

    /// The last offset passed on.
    pub(super) fn last(&self, stream: StreamId) -> Offset {
        let streams = self.streams();
        streams
            .get(&stream)
            .map_or(Offset(0), |tail| *tail.last.borrow())
    }

    /// The last offset that this node has committed.
    pub(super) fn committed(&self, stream: StreamId) -> Offset {
        let streams = self.streams();
        streams
            .get(&stream)
            .map_or(Offset(0), |tail| tail.committed)
    }

    /// Notes a commit, before its callers are told.
    pub(super) fn commit(&self, stream: StreamId, last: Offset) {
        self.streams().entry(stream).or_default().committed = last;
    }

    /// Starts a stream's tail after an offset, unless it is further already.
    pub(super) fn start(&self, stream: StreamId, last: Offset) {
        let mut streams = self.streams();
        streams
            .entry(stream)
            .or_default()
            .last
            .send_if_modified(|now| {
                let is_later = last > *now;
                *now = (*now).max(last);
                is_later
            });
    }

    /// The streams that were asked for.
    fn known(&self) -> Vec<StreamId> {
        self.streams().keys().copied().collect()
    }

    pub(super) fn remove(&self, stream: StreamId) {
        self.streams().remove(&stream);
    }

    /// Passes a batch on. The caller has made sure that it follows the last one.
    pub(super) fn publish(&self, batch: Batch) {
        let mut streams = self.streams();
        let tail = streams.entry(batch.stream).or_default();
        let last = batch.last;
        // No receivers is no error: nobody follows this stream just now.
        let _ = tail.batches.send(Arc::new(batch));
        tail.last.send_replace(last);
    }
}

/// The entries that one commit of this node appended to one stream.
#[derive(Debug)]
pub(super) struct Appended {
    pub(super) stream: StreamId,
    pub(super) first: Offset,
    pub(super) at: DateTime<Utc>,
    pub(super) messages: Vec<Message>,
}

/// A stream whose log was locked when it was last looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// Up to here it is known to be committed.
    through: Offset,
    again_at: Instant,
    /// It has been locked since the start: where its tail begins is not known.
    is_unknown: bool,
}

impl Held {
    pub(super) fn since_start() -> Self {
        Self {
            through: Offset(0),
            again_at: Instant::now() + LOOK_AGAIN,
            is_unknown: true,
        }
    }
}

/// The task that passes batches on. The only one that does, so order holds; that is why it is a loop of its own and not a duty beside
/// another.
pub(super) struct TailTask {
    pub(super) options: Options,
    pub(super) cluster: cluster::Handle,
    pub(super) state: Arc<State>,
    pub(super) supervisor: Supervisor,
    pub(super) appended: mpsc::Receiver<Vec<Appended>>,
    /// How far scheduled messages were published: they are passed on from the log.
    pub(super) published: mpsc::Receiver<(StreamId, Offset)>,
    pub(super) link: Link,
    pub(super) report: Report,
    pub(super) held: HashMap<StreamId, Held>,
    /// When it was last noted that the clocks agree, while they do.
    pub(super) clocks_noted: Option<Instant>,
}

impl TailTask {
    pub(super) async fn run(mut self) {
        let mut poll = tokio::time::interval(self.options.poll);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut was_passed_over = false;
        loop {
            tokio::select! {
                // The appender ends first and drops its sender, once all is committed.
                appended = self.appended.recv() => match appended {
                    Some(appended) => {
                        for one in appended {
                            self.pass_on(one).await;
                        }
                        self.state.appended_here.notify_one();
                    }
                    None => return,
                },
                Some((stream, last)) = self.published.recv() => {
                    self.fill(stream, last).await;
                    self.state.appended_here.notify_one();
                }
                () = self.state.appended_elsewhere.notified() => self.look().await,
                _ = poll.tick() => {
                    // Alone, it looks half as often: only for those who have not been seen yet.
                    let is_alone = !self.cluster.view().has_peers() && self.held.is_empty();
                    was_passed_over = !was_passed_over && is_alone;
                    if !was_passed_over {
                        self.look().await;
                    }
                }
            }
            let bytes = self.state.cache.bytes();
            self.state
                .metrics
                .cache_bytes
                .set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    fn publish(&self, batch: Batch) {
        let keys = batch.entries.iter();
        let keys = keys.filter_map(|entry| Some((entry.offset, entry.key.as_deref()?)));
        let span = (batch.first, batch.last);
        self.state.keys.feed(batch.stream, span, keys);
        self.state.cache.push(&batch);
        self.state.tails.publish(batch);
    }

    async fn pass_on(&mut self, mut appended: Appended) {
        let stream = appended.stream;
        let first = appended.first;
        let last = Offset(first.0 + appended.messages.len() as i64 - 1);
        if !self.fill(stream, Offset(first.0 - 1)).await {
            // Read from the log with what is missing before it.
            self.hold(stream, last);
            return;
        }
        let passed = self.state.tails.last(stream);
        if passed >= last {
            return;
        }
        truncate_times(&mut appended.messages);
        let entries = appended
            .messages
            .iter()
            .zip(first.0..)
            .map(|(message, offset)| Arc::new(entry(stream, Offset(offset), appended.at, message)));
        // The poll may have read a part of it from the log.
        let entries: Vec<_> = entries.filter(|entry| entry.offset > passed).collect();
        self.publish(Batch {
            stream,
            first: Offset(first.0.max(passed.0 + 1)),
            last,
            entries,
        });
    }

    /// Reads the log up to an offset that is known to be committed, for as long as it takes. Whether all of it is passed on: not if
    /// somebody has the log locked, which [`TailTask::poll`] waits for.
    async fn fill(&mut self, stream: StreamId, through: Offset) -> bool {
        let mut backoff = READ_AGAIN;
        if self.held.get(&stream).is_some_and(|held| held.is_unknown) {
            return false;
        }
        while self.state.tails.last(stream) < through {
            if self.is_waiting(stream) {
                self.hold(stream, through);
                return false;
            }
            match self.read_gap(stream, through).await {
                Ok(()) => {}
                Err(error) if error.is_held() => {
                    self.found_held(stream, through);
                    return false;
                }
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "reading other nodes' appends failed"
                    );
                    if self.supervisor.is_stopping() {
                        return false;
                    }
                    let pause = backoff.next_pause();
                    self.report.failed(chain(&error), pause);
                    tokio::time::sleep(pause).await;
                }
            }
        }
        true
    }

    /// Whether the stream's log was locked a moment ago.
    fn is_waiting(&self, stream: StreamId) -> bool {
        let held = self.held.get(&stream);
        held.is_some_and(|held| Instant::now() < held.again_at)
    }

    /// Notes what is committed of a stream that is held.
    fn hold(&mut self, stream: StreamId, through: Offset) {
        if let Some(held) = self.held.get_mut(&stream) {
            held.through = held.through.max(through);
        }
    }

    /// The stream's log is locked: it is left alone for a moment.
    fn found_held(&mut self, stream: StreamId, through: Offset) {
        let again_at = Instant::now() + LOOK_AGAIN;
        match self.held.entry(stream) {
            hash_map::Entry::Occupied(mut held) => {
                let held = held.get_mut();
                held.through = held.through.max(through);
                held.again_at = again_at;
            }
            hash_map::Entry::Vacant(place) => {
                tracing::warn!(
                    stream = stream.0,
                    "another session holds a lock on the log of a stream: its queues wait for it, other streams do not"
                );
                place.insert(Held {
                    through,
                    again_at,
                    is_unknown: false,
                });
            }
        }
    }

    async fn read_gap(&mut self, stream: StreamId, through: Offset) -> Result<(), store::Error> {
        self.state.metrics.gaps_read.inc();
        let mut connection = self.link.lend().await?;
        let after = self.state.tails.last(stream);
        let last = Offset(through.0.min(after.0 + GAP_PAGE));
        let offsets: Vec<Offset> = (after.0 + 1..=last.0).map(Offset).collect();
        let fetched = fetch(&mut connection, &self.state.topics, stream, &offsets).await;
        if fetched.as_ref().err().is_none_or(store::Error::is_held) {
            self.link.keep(connection);
        }
        self.publish(Batch {
            stream,
            first: after.next(),
            last,
            entries: fetched?,
        });
        Ok(())
    }

    /// Begins the tail of a stream that could not be looked at before: whoever follows it reads the log up to here.
    fn begin(&self, stream: StreamId, top: Offset) {
        self.publish(Batch {
            stream,
            first: top.next(),
            last: top,
            entries: Vec::new(),
        });
    }

    async fn look(&mut self) {
        self.report.begins();
        let looked = match self.poll().await {
            Ok(()) => self.note_clocks().await,
            failed => failed,
        };
        match looked {
            Ok(()) => self.report.passed(Some(self.options.poll), None),
            Err(error) => {
                self.report.failed(chain(&error), self.options.poll);
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "looking for other nodes' appends failed"
                );
            }
        }
    }

    /// Notes, on each node by itself, that its clock and the database's agree: see `agreed_time` in `migrations/broker`.
    async fn note_clocks(&mut self) -> Result<(), store::Error> {
        if self.state.witness.is_apart(&self.cluster) {
            self.clocks_noted = None;
        } else if self
            .clocks_noted
            .is_none_or(|at| at.elapsed() >= NOTE_CLOCKS)
        {
            self.clocks_noted = Some(Instant::now());
            let mut connection = self.link.lend().await?;
            let noted = sql::note_clocks(&mut connection, self.state.witness.now()).await;
            if noted.as_ref().err().is_none_or(store::Error::is_held) {
                self.link.keep(connection);
                return Ok(());
            }
            return noted;
        }
        Ok(())
    }

    /// Looks for what other nodes appended, and for streams that came and went.
    async fn poll(&mut self) -> Result<(), store::Error> {
        let mut connection = self.link.lend().await?;
        // Before the heads: what is asked for by then and has none is gone, not new.
        let known = self.state.tails.known();
        let heads = sql::list_heads(&mut connection).await?;
        let mut tops = Vec::with_capacity(heads.len());
        for &(stream, floor) in &heads {
            if self.is_waiting(stream) {
                continue;
            }
            let passed = self.state.tails.last(stream);
            match sql::read_top(&mut connection, stream, passed).await {
                Ok(top) => tops.push((stream, top.unwrap_or(floor))),
                Err(error) if error.is_held() => self.found_held(stream, floor),
                Err(error) => return Err(error),
            }
        }
        self.link.keep(connection);
        for (stream, top) in tops {
            let held = self.held.get(&stream).copied();
            let is_there = match held {
                Some(held) if held.is_unknown => {
                    self.begin(stream, top);
                    true
                }
                held => {
                    let through = held.map_or(top, |held| top.max(held.through));
                    self.fill(stream, through).await
                }
            };
            if held.is_some() && is_there {
                self.held.remove(&stream);
            }
        }
        self.held
            .retain(|stream, _| heads.iter().any(|(there, _)| there == stream));
        for &(stream, floor) in &heads {
            self.state.raise_floor(stream, floor);
        }
        for stream in known {
            if !heads.iter().any(|&(there, _)| there == stream) {
                self.state.tails.remove(stream);
                self.state.keys.forget(stream);
                self.state.cache.forget(stream);
            }
        }
        Ok(())
    }
}

/// An entry as readers share it.
#[must_use]
pub fn entry(stream: StreamId, offset: Offset, at: DateTime<Utc>, message: &Message) -> Entry {
    Entry {
        stream,
        offset,
        topic: message.topic.clone(),
        key: message.key.as_deref().map(Arc::from),
        key_hash: message.key.as_deref().map(key_hash),
        priority: message.priority(),
        event: message.to_event_json(),
        appended_at: at,
    }
}

/// Reads entries from the log. Topics that came since are read first: a message's topic commits before the message.
pub(super) async fn fetch(
    connection: &mut Connection,
    topics: &Topics,
    stream: StreamId,
    offsets: &[Offset],
) -> Result<Vec<Arc<Entry>>, store::Error> {
    topics.refresh(connection).await?;
    let rows = sql::fetch_entries(connection, stream, offsets, |id| topics.name(id)).await?;
    Ok(rows
        .into_iter()
        .map(|row| Arc::new(entry(stream, row.offset, row.appended_at, &row.message)))
        .collect())
}
