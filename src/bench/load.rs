//! State that the producers and consumers of one round share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::Error;
use super::options::Ack;
use super::random::Keys;
use super::series::Series;
use super::tracker::Tracker;

/// How a load is paced.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Messages per transaction or publish.
    pub(super) batch: u32,
    /// Messages per receive, at most.
    pub(super) receive: u32,
    pub(super) ack: Ack,
    /// Messages per second, all producers together; 0 for no limit.
    pub(super) rate: u32,
    /// Messages in all; none without.
    pub(super) most: Option<u64>,
}

/// State that the producers and consumers of one round share.
pub(super) struct Shared {
    /// Stands in every message's id, so that what a former run left is not taken for this one's.
    pub(super) run: String,
    /// The topic; with a topic per queue, what stands before the queue's number.
    pub(super) topic: String,
    /// Each queue has its own topic.
    pub(super) has_topic_per_queue: bool,
    pub(super) payloads: Arc<[String]>,
    pub(super) keys: Keys,
    pub(super) key_names: Vec<String>,
    /// The business row's contents; none without such a row.
    pub(super) note: Option<String>,
    pub(super) pace: Pace,
    pub(super) tracker: Tracker,
    pub(super) series: Series,
    pub(super) published: AtomicU64,
    /// Deliveries whose settling was answered.
    pub(super) settled: AtomicU64,
    /// Deliveries that may still be on their way.
    pub(super) room: Semaphore,
    next_batch: AtomicU64,
    left: AtomicU64,
    /// Producers stop.
    pub(super) enough: CancellationToken,
    /// Consumers stop.
    pub(super) done: CancellationToken,
    pub(super) failed: mpsc::Sender<Error>,
}

/// The parts that [`Shared::new`] takes.
pub(super) struct Parts {
    pub(super) run: String,
    pub(super) topic: String,
    pub(super) has_topic_per_queue: bool,
    pub(super) payloads: Arc<[String]>,
    pub(super) keys: Keys,
    pub(super) business_row: bool,
    pub(super) pace: Pace,
    pub(super) tracker: Tracker,
    /// Messages that may be on their way.
    pub(super) outstanding: u32,
}

impl Shared {
    pub(super) fn new(parts: Parts, failed: mpsc::Sender<Error>) -> Self {
        let deliveries = parts.tracker.deliveries_per_message();
        let room = u64::from(parts.outstanding).saturating_mul(deliveries);
        let room = usize::try_from(room).unwrap_or(Semaphore::MAX_PERMITS);
        Self {
            run: parts.run,
            topic: parts.topic,
            has_topic_per_queue: parts.has_topic_per_queue,
            payloads: parts.payloads,
            key_names: (0..parts.keys.count())
                .map(|key| format!("k{key}"))
                .collect(),
            keys: parts.keys,
            note: parts.business_row.then(|| "x".repeat(64)),
            pace: parts.pace,
            tracker: parts.tracker,
            series: Series::new(),
            published: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            room: Semaphore::new(room.min(Semaphore::MAX_PERMITS)),
            next_batch: AtomicU64::new(0),
            left: AtomicU64::new(parts.pace.most.unwrap_or(u64::MAX)),
            enough: CancellationToken::new(),
            done: CancellationToken::new(),
            failed,
        }
    }

    /// How many messages to send next, once their time has come and there is room for them; `None` when there are enough.
    pub(super) async fn next_batch(&self) -> Option<u32> {
        let number = self.next_batch.fetch_add(1, Ordering::Relaxed);
        if self.pace.rate > 0 {
            let messages = number as f64 * f64::from(self.pace.batch);
            let due = Duration::from_secs_f64(messages / f64::from(self.pace.rate));
            let due = self.series.began() + due;
            if due > Instant::now() {
                tokio::select! {
                    () = tokio::time::sleep_until(due.into()) => {}
                    () = self.enough.cancelled() => {}
                }
            }
        }
        let taken = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(u64::from(self.pace.batch)))
            });
        let left = taken.unwrap_or_else(|left| left);
        let count = u32::try_from(left.min(u64::from(self.pace.batch))).unwrap_or(0);
        if count == 0 || self.enough.is_cancelled() {
            return None;
        }
        self.make_room(count).await.then_some(count)
    }

    /// Waits until this many messages may be sent; false when enough have been sent.
    async fn make_room(&self, count: u32) -> bool {
        let deliveries = self.tracker.deliveries_per_message();
        let permits = u64::from(count).saturating_mul(deliveries);
        let permits = u32::try_from(permits).unwrap_or(u32::MAX);
        tokio::select! {
            biased;
            () = self.enough.cancelled() => false,
            room = self.room.acquire_many(permits) => {
                if let Ok(room) = room {
                    room.forget();
                }
                true
            }
        }
    }

    pub(super) fn published(&self, count: u64) {
        self.published.fetch_add(count, Ordering::Relaxed);
        self.series.published(Instant::now(), count);
    }

    /// Notes deliveries whose settling was answered, and lets producers go on.
    pub(super) fn settled(&self, count: u64) {
        self.settled.fetch_add(count, Ordering::Relaxed);
        self.series.settled(Instant::now(), count);
        let count = usize::try_from(count).unwrap_or(0);
        // A message that comes twice must not give room twice without end.
        if self.room.available_permits() < Semaphore::MAX_PERMITS / 2 {
            self.room.add_permits(count);
        }
    }

    /// Deliveries that are on their way.
    pub(super) fn outstanding(&self) -> u64 {
        let sent = self.published.load(Ordering::Relaxed) * self.tracker.deliveries_per_message();
        sent.saturating_sub(self.settled.load(Ordering::Relaxed))
    }
}
