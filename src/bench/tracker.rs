//! Tracks what was sent and what arrived. Each message is known by its producer and its number there, so the tracker finds
//! whatever is lost, doubled or out of order, however many messages there are.
//!
//! In each queue the offsets of a producer's messages must rise with its numbers. With keys, a key's messages must arrive
//! one after another, by offset, each after the previous one was settled.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;

/// Numbers of one producer per piece of memory.
const CHUNK: usize = 8_192;
const CHUNKS: usize = 16_384;

/// One number per message of a producer, in memory that grows with use.
struct Lane(Vec<OnceLock<Box<[AtomicI64]>>>);

impl Lane {
    fn new() -> Self {
        Self((0..CHUNKS).map(|_| OnceLock::new()).collect())
    }

    /// None beyond what can be kept, 134 million messages.
    fn slot(&self, number: u64) -> Option<&AtomicI64> {
        let number = usize::try_from(number).ok()?;
        let chunk = self.0.get(number / CHUNK)?;
        let chunk = chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicI64::new(0)).collect());
        chunk.get(number % CHUNK)
    }
}

/// The queues that a message goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spread {
    /// To each of them.
    All,
    /// Message n of a producer to queue n modulo their number.
    One,
}

/// The faults of the deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(super) struct Checked {
    /// Messages sent.
    pub(super) sent: u64,
    /// Deliveries that ought to have come: one per message and queue that takes it.
    pub(super) expected: u64,
    /// Deliveries that never came.
    pub(super) lost: u64,
    /// Deliveries beyond the first of a message in a queue.
    pub(super) duplicated: u64,
    /// Messages with a lower offset than an earlier one of their producer, or that came before an earlier one of their key.
    pub(super) out_of_order: u64,
    /// Deliveries of messages that were never sent, or to the wrong queue.
    pub(super) unknown: u64,
    /// Deliveries whose settling was refused.
    pub(super) refused: u64,
}

impl Checked {
    /// Whether everything came once and in order.
    pub(super) const fn is_clean(&self) -> bool {
        self.lost == 0
            && self.duplicated == 0
            && self.out_of_order == 0
            && self.unknown == 0
            && self.refused == 0
    }
}

/// The last message of a key that came.
#[derive(Default)]
struct KeyState {
    last: AtomicI64,
    is_live: AtomicBool,
}

/// The book of one round.
pub(super) struct Tracker {
    began: Instant,
    spread: Spread,
    queues: usize,
    /// Per producer: when each message was sent, in microseconds since `began` plus one.
    sent: Vec<Lane>,
    sent_count: Vec<AtomicU64>,
    /// Per queue (one for all of them if each message goes to one alone) and producer: the offset.
    offsets: Vec<Vec<Lane>>,
    keys: Vec<KeyState>,
    duplicated: AtomicU64,
    out_of_order: AtomicU64,
    unknown: AtomicU64,
    refused: AtomicU64,
}

/// A message that a consumer was given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Came {
    pub(super) queue: usize,
    pub(super) producer: usize,
    pub(super) number: u64,
    pub(super) offset: i64,
    pub(super) key: Option<usize>,
}

impl Tracker {
    /// `keys`: how many keys there are whose order consumers must see; 0 when they need not.
    pub(super) fn new(producers: usize, queues: usize, spread: Spread, keys: usize) -> Self {
        let lanes = || (0..producers).map(|_| Lane::new()).collect::<Vec<_>>();
        let books = match spread {
            Spread::All => queues,
            Spread::One => 1,
        };
        Self {
            began: Instant::now(),
            spread,
            queues,
            sent: lanes(),
            sent_count: (0..producers).map(|_| AtomicU64::new(0)).collect(),
            offsets: (0..books).map(|_| lanes()).collect(),
            keys: (0..keys * books).map(|_| KeyState::default()).collect(),
            duplicated: AtomicU64::new(0),
            out_of_order: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    fn micros(&self, at: Instant) -> i64 {
        let micros = at.saturating_duration_since(self.began).as_micros();
        i64::try_from(micros).unwrap_or(i64::MAX - 1) + 1
    }

    /// How many deliveries one message makes.
    pub(super) const fn deliveries_per_message(&self) -> u64 {
        match self.spread {
            Spread::All => self.queues as u64,
            Spread::One => 1,
        }
    }

    /// The queue that message `number` of a producer goes to, if it is one alone.
    pub(super) fn queue_of(&self, number: u64) -> usize {
        match self.spread {
            Spread::All => 0,
            Spread::One => usize::try_from(number % self.queues as u64).unwrap_or(0),
        }
    }

    /// Notes that a message is about to be committed or published. Numbers of a producer rise by one.
    pub(super) fn sending(&self, producer: usize, number: u64, at: Instant) {
        if let Some(slot) = self.sent[producer].slot(number) {
            slot.store(self.micros(at), Ordering::Relaxed);
        }
        self.sent_count[producer].store(number + 1, Ordering::Release);
    }

    /// Notes that a message came, and gives its time on the way in microseconds; None for one that ought not to have come.
    pub(super) fn came(&self, came: &Came, at: Instant) -> Option<u64> {
        let book = match self.spread {
            Spread::All => came.queue,
            Spread::One => 0,
        };
        let sent = self.sent.get(came.producer).and_then(|lane| {
            let sent = lane.slot(came.number)?.load(Ordering::Relaxed);
            (sent > 0).then_some(sent)
        });
        let is_astray = self.spread == Spread::One && self.queue_of(came.number) != came.queue;
        let Some(sent) = sent.filter(|_| !is_astray) else {
            self.unknown.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let slot = self.offsets[book][came.producer].slot(came.number)?;
        let first = slot.compare_exchange(0, came.offset, Ordering::Relaxed, Ordering::Relaxed);
        if first.is_err() {
            self.duplicated.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        if let Some(key) = self.key(book, came.key) {
            let last = key.last.swap(came.offset, Ordering::AcqRel);
            let was_live = key.is_live.swap(true, Ordering::AcqRel);
            if last > came.offset || was_live {
                self.out_of_order.fetch_add(1, Ordering::Relaxed);
            }
        }
        Some(u64::try_from(self.micros(at).saturating_sub(sent)).unwrap_or(0))
    }

    /// Notes that a message is about to be settled: from now on the next one of its key may come.
    pub(super) fn settling(&self, queue: usize, key: Option<usize>) {
        let book = match self.spread {
            Spread::All => queue,
            Spread::One => 0,
        };
        if let Some(key) = self.key(book, key) {
            key.is_live.store(false, Ordering::Release);
        }
    }

    /// Notes deliveries whose settling was refused.
    pub(super) fn refused(&self, count: u64) {
        self.refused.fetch_add(count, Ordering::Relaxed);
    }

    fn key(&self, book: usize, key: Option<usize>) -> Option<&KeyState> {
        let count = self.keys.len() / self.offsets.len();
        self.keys.get(book * count + key?)
    }

    /// The verdict, once nothing moves.
    pub(super) fn check(&self) -> Checked {
        let mut checked = Checked {
            duplicated: self.duplicated.load(Ordering::Relaxed),
            out_of_order: self.out_of_order.load(Ordering::Relaxed),
            unknown: self.unknown.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            ..Checked::default()
        };
        for (producer, count) in self.sent_count.iter().enumerate() {
            let count = count.load(Ordering::Acquire);
            checked.sent += count;
            for book in &self.offsets {
                checked.expected += count;
                let mut last = 0;
                for number in 0..count {
                    let slot = book[producer].slot(number);
                    match slot.map_or(0, |slot| slot.load(Ordering::Relaxed)) {
                        0 => checked.lost += 1,
                        offset if offset < last => checked.out_of_order += 1,
                        offset => last = offset,
                    }
                }
            }
        }
        checked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(spread: Spread, queues: usize, keys: usize) -> Tracker {
        let tracker = Tracker::new(2, queues, spread, keys);
        let now = Instant::now();
        for number in 0..4 {
            tracker.sending(0, number, now);
            tracker.sending(1, number, now);
        }
        tracker
    }

    fn give(tracker: &Tracker, producer: usize, number: u64, offset: i64, key: Option<usize>) {
        for queue in 0..usize::try_from(tracker.deliveries_per_message()).unwrap_or(1) {
            let queue = queue.max(tracker.queue_of(number));
            let came = Came {
                queue,
                producer,
                number,
                offset,
                key,
            };
            tracker.came(&came, Instant::now());
            tracker.settling(queue, key);
        }
    }

    /// Everything in order, but for what a fault changes.
    fn with(fault: impl Fn(usize, u64) -> Option<i64>, spread: Spread, queues: usize) -> Checked {
        let tracker = book(spread, queues, 0);
        for producer in 0..2 {
            for number in 0..4u64 {
                if let Some(offset) = fault(producer, number) {
                    give(&tracker, producer, number, offset, None);
                }
            }
        }
        tracker.check()
    }

    fn offset(producer: usize, number: u64) -> i64 {
        1 + 2 * number.cast_signed() + i64::try_from(producer).unwrap_or(0)
    }

    #[test]
    fn what_came_once_and_in_order_is_clean() {
        for (spread, queues, expected) in [
            (Spread::All, 1, 8),
            (Spread::All, 3, 24),
            (Spread::One, 3, 8),
        ] {
            let checked = with(|p, n| Some(offset(p, n)), spread, queues);
            assert!(checked.is_clean(), "{checked:?}");
            assert_eq!((checked.sent, checked.expected), (8, expected));
        }
    }

    #[test]
    fn every_planted_fault_is_found() {
        let lost = with(|p, n| (n != 2).then(|| offset(p, n)), Spread::All, 2);
        assert_eq!((lost.lost, lost.is_clean()), (4, false));
        let swapped = with(
            |p, n| {
                Some(if p == 1 && n == 3 {
                    1
                } else {
                    offset(p, n) + 1
                })
            },
            Spread::All,
            1,
        );
        assert_eq!((swapped.out_of_order, swapped.is_clean()), (1, false));

        let tracker = book(Spread::All, 1, 0);
        give(&tracker, 0, 0, 1, None);
        give(&tracker, 0, 0, 1, None);
        give(&tracker, 0, 0, 9, None);
        assert_eq!(tracker.check().duplicated, 2);
        give(&tracker, 0, 4, 10, None);
        give(&tracker, 7, 0, 11, None);
        assert_eq!(tracker.check().unknown, 2);
        tracker.refused(3);
        assert_eq!(tracker.check().refused, 3);

        let tracker = book(Spread::One, 3, 0);
        let astray = Came {
            queue: 0,
            producer: 0,
            number: 1,
            offset: 1,
            key: None,
        };
        tracker.came(&astray, Instant::now());
        assert_eq!(tracker.check().unknown, 1);
    }

    #[test]
    fn the_order_of_a_key_is_that_in_which_consumers_see_it() {
        let tracker = book(Spread::All, 1, 2);
        give(&tracker, 0, 0, 1, Some(0));
        give(&tracker, 1, 0, 2, Some(1));
        give(&tracker, 0, 1, 3, Some(0));
        assert_eq!(tracker.check().out_of_order, 0);
        // A later one of the key came first.
        give(&tracker, 0, 3, 6, Some(1));
        give(&tracker, 0, 2, 5, Some(1));
        assert_eq!(tracker.check().out_of_order, 1);
        // Two of one key at a time.
        let live = |number, offset| Came {
            queue: 0,
            producer: 1,
            number,
            offset,
            key: Some(0),
        };
        tracker.came(&live(1, 7), Instant::now());
        tracker.came(&live(2, 8), Instant::now());
        assert_eq!(tracker.check().out_of_order, 2);
    }

    #[test]
    fn the_time_on_the_way_is_from_sending_to_coming() {
        let tracker = Tracker::new(1, 1, Spread::All, 0);
        let sent = Instant::now();
        tracker.sending(0, 0, sent);
        let came = Came {
            queue: 0,
            producer: 0,
            number: 0,
            offset: 1,
            key: None,
        };
        let at = sent + std::time::Duration::from_micros(1_500);
        assert_eq!(tracker.came(&came, at), Some(1_500));
    }
}
