//! Feeds entries from the tail of a stream to its queues. One dispatcher per stream finds the queues that match a topic by
//! an index, and remembers them, so that a queue that does not match, or that nobody feeds, costs nothing per message.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, broadcast};

use crate::domain::id::{Offset, QueueId, StreamId};
use crate::domain::message::Entry;
use crate::domain::name::{Topic, TopicPattern};
use crate::domain::topic_index::TopicIndex;
use crate::stream::{self, Batch};
use crate::supervisor::Supervisor;

/// Bytes that wait in a feed before its queue has to catch up from the log.
const FEED_MAX_BYTES: usize = 1024 * 1024;
/// Messages that wait in a feed before its queue has to catch up from the log.
const FEED_MAX_ENTRIES: usize = 5_000;
/// Topics whose queues are remembered.
const TOPICS_MAX: usize = 10_000;

/// The place where the dispatcher leaves entries for one queue.
#[derive(Debug)]
pub(in crate::queue) struct Feed {
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    attached: bool,
    entries: Vec<Arc<Entry>>,
    bytes: usize,
    /// Where it was detached: up to here nothing is missing.
    through: Offset,
}

/// A queue's findings in its feed.
#[derive(Debug)]
pub(in crate::queue) struct Fed {
    /// Matching entries, by offset.
    pub(in crate::queue) entries: Vec<Arc<Entry>>,
    /// Nothing that matches is missing up to here.
    pub(in crate::queue) through: Offset,
    /// Whether more will come; else the queue catches up from the log.
    pub(in crate::queue) attached: bool,
}

impl Feed {
    fn new() -> Self {
        Self {
            state: Mutex::default(),
            wake: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when there is something to take. Cancel-safe.
    pub(in crate::queue) async fn filled(&self) {
        self.wake.notified().await;
    }

    /// Whether what the dispatcher has done is the queue's own progress: nothing waits here, and nothing was passed over.
    pub(in crate::queue) fn is_fed_out(&self) -> bool {
        let state = self.state();
        state.attached && state.entries.is_empty()
    }

    fn detach(&self, through: Offset) {
        let mut state = self.state();
        if state.attached {
            state.attached = false;
            state.through = through;
            drop(state);
            self.wake.notify_one();
        }
    }
}

/// A stream's dispatcher, as its queues see it.
#[derive(Debug)]
pub(in crate::queue) struct Dispatch {
    stream: StreamId,
    /// Every batch up to here is in the feeds.
    done: AtomicI64,
    /// No part of a batch after this one is in a feed yet.
    begun: AtomicI64,
    subscribers: Mutex<Subscribers>,
}

#[derive(Debug, Default)]
struct Subscribers {
    /// Rises with each change, so that the dispatcher forgets what it remembered of topics.
    version: u64,
    feeds: HashMap<QueueId, (Arc<Feed>, Arc<[TopicPattern]>)>,
    index: TopicIndex<QueueId>,
}

impl Subscribers {
    fn matching(&self, topic: &Topic) -> Arc<[Arc<Feed>]> {
        let queues = self.index.matching(topic).into_iter();
        let feeds = queues.filter_map(|queue| Some(Arc::clone(&self.feeds.get(&queue)?.0)));
        feeds.collect()
    }
}

impl Dispatch {
    pub(in crate::queue) fn new(stream: StreamId) -> Self {
        Self {
            stream,
            done: AtomicI64::new(0),
            begun: AtomicI64::new(0),
            subscribers: Mutex::default(),
        }
    }

    fn subscribers(&self) -> MutexGuard<'_, Subscribers> {
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Every batch up to here is in the feeds.
    pub(in crate::queue) fn done(&self) -> Offset {
        Offset(self.done.load(Ordering::Acquire))
    }

    /// Adds a queue, detached, or changes its patterns.
    pub(in crate::queue) fn subscribe(
        &self,
        queue: QueueId,
        patterns: Arc<[TopicPattern]>,
    ) -> Arc<Feed> {
        let mut guard = self.subscribers();
        let subscribers = &mut *guard;
        let (feed, kept) = subscribers
            .feeds
            .entry(queue)
            .or_insert_with(|| (Arc::new(Feed::new()), Arc::default()));
        if *kept != patterns {
            subscribers.version += 1;
            for pattern in kept.iter() {
                subscribers.index.remove(pattern, queue);
            }
            for pattern in patterns.iter() {
                subscribers.index.insert(pattern, queue);
            }
            *kept = patterns;
        }
        Arc::clone(feed)
    }

    pub(in crate::queue) fn unsubscribe(&self, queue: QueueId) {
        let mut guard = self.subscribers();
        let subscribers = &mut *guard;
        subscribers.version += 1;
        if let Some((_, patterns)) = subscribers.feeds.remove(&queue) {
            for pattern in patterns.iter() {
                subscribers.index.remove(pattern, queue);
            }
        }
    }

    /// Attaches a queue: everything after the answer comes by the feed, everything before it is read from the log. A batch that is
    /// being dispatched may have passed this feed already, so it counts as before.
    pub(in crate::queue) fn attach(&self, feed: &Feed) -> Offset {
        let mut state = feed.state();
        state.attached = true;
        state.entries.clear();
        state.bytes = 0;
        Offset(self.begun.load(Ordering::SeqCst))
    }

    /// Detaches a queue that has enough.
    pub(in crate::queue) fn detach(&self, feed: &Feed) {
        let mut state = feed.state();
        *state = State::default();
    }

    /// Takes the entries in the feed.
    pub(in crate::queue) fn take(&self, feed: &Feed) -> Fed {
        // Before the lock: what was done by now is in the feed.
        let done = self.done();
        let mut state = feed.state();
        let entries = std::mem::take(&mut state.entries);
        state.bytes = 0;
        let through = if state.attached { done } else { state.through };
        Fed {
            through: entries
                .last()
                .map_or(through, |entry| through.max(entry.offset)),
            entries,
            attached: state.attached,
        }
    }

    fn detach_all(&self, through: Offset) {
        for (feed, _) in self.subscribers().feeds.values() {
            feed.detach(through);
        }
    }
}

/// Dispatches one stream's tail until told to stop, or until the stream is gone.
pub(in crate::queue) async fn run(
    dispatch: Arc<Dispatch>,
    stream: stream::Handle,
    supervisor: Supervisor,
) {
    let mut tail = stream.tail(dispatch.stream);
    let last = *stream.last_offset(dispatch.stream).borrow();
    dispatch.begun.fetch_max(last.0, Ordering::SeqCst);
    dispatch.done.fetch_max(last.0, Ordering::SeqCst);
    // Who attached before the tail was subscribed may miss what came between.
    dispatch.detach_all(Offset(0));
    let mut topics: HashMap<Topic, Arc<[Arc<Feed>]>> = HashMap::new();
    let mut version = 0;
    loop {
        let received = tokio::select! {
            received = tail.recv() => received,
            () = supervisor.stopping() => return,
        };
        match received {
            Ok(batch) => {
                let done = dispatch.done();
                if batch.last <= done {
                    continue;
                }
                if batch.first > done.next() {
                    dispatch.begun.store(batch.first.0 - 1, Ordering::SeqCst);
                    dispatch.detach_all(done);
                }
                dispatch_batch(&dispatch, &batch, &mut topics, &mut version);
            }
            Err(broadcast::error::RecvError::Lagged(_)) => {
                let last = *stream.last_offset(dispatch.stream).borrow();
                dispatch.begun.fetch_max(last.0, Ordering::SeqCst);
                dispatch.detach_all(dispatch.done());
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

fn dispatch_batch(
    dispatch: &Dispatch,
    batch: &Batch,
    topics: &mut HashMap<Topic, Arc<[Arc<Feed>]>>,
    version: &mut u64,
) {
    dispatch.begun.store(batch.last.0, Ordering::SeqCst);
    let mut filled: Vec<(Arc<Feed>, Vec<Arc<Entry>>)> = Vec::new();
    {
        let subscribers = dispatch.subscribers();
        if *version != subscribers.version || topics.len() > TOPICS_MAX {
            topics.clear();
            *version = subscribers.version;
        }
        let mut places: HashMap<*const Feed, usize> = HashMap::new();
        for entry in &batch.entries {
            let feeds = topics
                .entry(entry.topic.clone())
                .or_insert_with(|| subscribers.matching(&entry.topic));
            for feed in feeds.iter() {
                let place = *places.entry(Arc::as_ptr(feed)).or_insert_with(|| {
                    filled.push((Arc::clone(feed), Vec::new()));
                    filled.len() - 1
                });
                filled[place].1.push(Arc::clone(entry));
            }
        }
    }
    let before = dispatch.done();
    for (feed, entries) in &filled {
        let mut state = feed.state();
        if !state.attached {
            continue;
        }
        state.bytes += entries.iter().map(|entry| entry.event.len()).sum::<usize>();
        if state.bytes > FEED_MAX_BYTES.max(entries[0].event.len()) && !state.entries.is_empty()
            || state.entries.len() >= FEED_MAX_ENTRIES
        {
            state.attached = false;
            state.through = before;
        } else {
            state.entries.extend(entries.iter().cloned());
        }
    }
    dispatch.done.store(batch.last.0, Ordering::SeqCst);
    // Woken after `done`, so that they see it.
    for (feed, _) in filled {
        feed.wake.notify_one();
    }
}
