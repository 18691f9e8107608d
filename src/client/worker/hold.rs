//! The deliveries that a worker holds: those that wait for a handler, those being handled, and when to extend each.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::queue::Delivery;
use super::super::verbs::Item;
use super::Job;

/// A delivery that ended, until the broker has heard of it.
#[derive(Debug, Clone)]
pub(super) struct Brief {
    pub(super) item: Item,
    pub(super) offset: i64,
    pub(super) delivery: u32,
    pub(super) attempt: u32,
    pub(super) event_id: String,
}

#[derive(Debug)]
struct Held {
    brief: Brief,
    key: Option<String>,
    lost: CancellationToken,
    /// Taken out when its handler begins.
    job: Option<Job>,
    extend_at: Instant,
}

/// The held deliveries, by a number that each delivery gets here.
#[derive(Debug)]
pub(super) struct Hold {
    held: HashMap<u64, Held>,
    waiting: VecDeque<u64>,
    beats: BTreeSet<(Instant, u64)>,
    /// Keys that are being handled, when handlers go in order.
    busy: Option<HashSet<String>>,
    /// Between extensions.
    every: Duration,
    last: u64,
}

impl Hold {
    pub(super) fn new(every: Duration, is_in_order: bool) -> Self {
        Self {
            held: HashMap::new(),
            waiting: VecDeque::new(),
            beats: BTreeSet::new(),
            busy: is_in_order.then(HashSet::new),
            every,
            last: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn is_anything_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn add(&mut self, delivery: Delivery, now: Instant) {
        self.last += 1;
        let lost = CancellationToken::new();
        let held = Held {
            brief: Brief::of(&delivery),
            key: delivery.event.key.clone(),
            extend_at: now + self.every,
            job: Some(Job {
                delivery,
                lost: lost.clone(),
            }),
            lost,
        };
        self.beats.insert((held.extend_at, self.last));
        self.held.insert(self.last, held);
        self.waiting.push_back(self.last);
    }

    /// The next one whose handler may begin.
    pub(super) fn begin(&mut self) -> Option<(u64, Job)> {
        let may_begin = |number: &u64| match (&self.busy, self.held.get(number)) {
            (Some(busy), Some(held)) => held.key.as_ref().is_none_or(|key| !busy.contains(key)),
            _ => true,
        };
        let place = self.waiting.iter().position(may_begin)?;
        let number = self.waiting.remove(place)?;
        let held = self.held.get_mut(&number)?;
        if let (Some(busy), Some(key)) = (&mut self.busy, &held.key) {
            busy.insert(key.clone());
        }
        Some((number, held.job.take()?))
    }

    /// Takes out one that is over. None if it was lost before.
    pub(super) fn end(&mut self, number: u64) -> Option<Brief> {
        let held = self.held.remove(&number)?;
        self.beats.remove(&(held.extend_at, number));
        if let (Some(busy), Some(key), None) = (&mut self.busy, &held.key, &held.job) {
            busy.remove(key);
        }
        Some(held.brief)
    }

    /// Takes out those that wait: all, or those of the key of this one, which failed.
    pub(super) fn end_waiting(&mut self, failed: Option<u64>) -> Vec<Brief> {
        let key = match failed {
            None => None,
            Some(number) => match self.held.get(&number).and_then(|held| held.key.clone()) {
                Some(key) if self.busy.is_some() => Some(key),
                _ => return Vec::new(),
            },
        };
        let of_key = |number: &u64| {
            let held = self.held.get(number);
            key.is_none() || held.is_some_and(|held| held.key == key)
        };
        let (out, stay) = self.waiting.iter().copied().partition(of_key);
        self.waiting = stay;
        let out: VecDeque<u64> = out;
        out.into_iter()
            .filter_map(|number| self.end(number))
            .collect()
    }

    /// The delivery is somebody else's. Gives whether it was held until now.
    pub(super) fn lose(&mut self, number: u64) -> bool {
        let Some(held) = self.held.get(&number) else {
            return false;
        };
        held.lost.cancel();
        self.beats.remove(&(held.extend_at, number));
        if held.job.is_some() {
            self.waiting.retain(|&waiting| waiting != number);
            self.end(number);
        }
        true
    }

    /// The time when the next delivery must be extended.
    pub(super) fn next_beat(&self) -> Option<Instant> {
        self.beats.first().map(|&(at, _)| at)
    }

    /// Takes deliveries that must be extended by now, or soon, out of the beat, at most `most`.
    pub(super) fn beat(&mut self, now: Instant, most: usize) -> Vec<(u64, Item)> {
        let soon = now + self.every / 4;
        let mut due = Vec::new();
        while due.len() < most
            && let Some(&(at, number)) = self.beats.first()
            && at <= soon
        {
            self.beats.pop_first();
            if let Some(held) = self.held.get(&number) {
                due.push((number, held.brief.item.clone()));
            }
        }
        due
    }

    /// To be extended again, counted from this moment.
    pub(super) fn beat_again(&mut self, number: u64, from: Instant) {
        if let Some(held) = self.held.get_mut(&number)
            && !held.lost.is_cancelled()
        {
            held.extend_at = from + self.every;
            self.beats.insert((held.extend_at, number));
        }
    }

    /// The numbers of those that are being handled.
    pub(super) fn handled(&self) -> Vec<u64> {
        let handled = self.held.iter().filter(|(_, held)| held.job.is_none());
        handled.map(|(&number, _)| number).collect()
    }
}

impl Brief {
    pub(super) fn of(delivery: &Delivery) -> Self {
        Self {
            item: delivery.into(),
            offset: delivery.offset,
            delivery: delivery.delivery,
            attempt: delivery.attempt,
            event_id: delivery.event.id.clone(),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn delivery(offset: i64, key: Option<&str>) -> Delivery {
        let delivery = json!({
            "receipt": format!("r{offset}"), "delivery": 1, "attempt": 1, "offset": offset, "topic": "t",
            "visible_until": "2026-01-01T00:00:00Z",
            "event": {"specversion": "1.0", "id": "i", "source": "/s", "type": "t", "partitionkey": key},
        });
        serde_json::from_str(&delivery.to_string()).unwrap()
    }

    fn hold(is_in_order: bool, keys: &[Option<&str>]) -> (Hold, Instant) {
        let now = Instant::now();
        let mut hold = Hold::new(Duration::from_secs(3), is_in_order);
        for (offset, key) in keys.iter().enumerate() {
            hold.add(delivery(offset as i64, *key), now);
        }
        (hold, now)
    }

    fn begin(hold: &mut Hold) -> Option<(u64, i64)> {
        hold.begin().map(|(number, job)| (number, job.offset))
    }

    #[test]
    fn in_order_a_key_is_handled_by_one_at_a_time() {
        let keys = [Some("a"), Some("a"), None, Some("b"), Some("a")];
        let (mut hold, _) = hold(true, &keys);
        let (first, offset) = begin(&mut hold).unwrap();
        assert_eq!(offset, 0);
        assert_eq!(begin(&mut hold).map(|(_, offset)| offset), Some(2));
        assert_eq!(begin(&mut hold).map(|(_, offset)| offset), Some(3));
        assert_eq!(begin(&mut hold), None, "both that wait are of key a");
        hold.end(first).unwrap();
        let (second, offset) = begin(&mut hold).unwrap();
        assert_eq!((offset, begin(&mut hold)), (1, None));
        // It fails: the later one of its key goes back.
        let later = hold.end_waiting(Some(second));
        assert_eq!(
            later.iter().map(|brief| brief.offset).collect::<Vec<_>>(),
            [4]
        );
        hold.end(second).unwrap();
        assert!(!hold.is_anything_waiting());
        assert_eq!(hold.len(), 2);
    }

    #[test]
    fn without_order_keys_do_not_matter() {
        let (mut hold, _) = hold(false, &[Some("a"), Some("a"), Some("a")]);
        let (first, _) = begin(&mut hold).unwrap();
        assert!(begin(&mut hold).is_some());
        assert!(hold.end_waiting(Some(first)).is_empty());
        assert_eq!(hold.end_waiting(None).len(), 1);
        assert_eq!(hold.handled().len(), 2);
    }

    #[test]
    fn what_is_held_is_extended_at_a_third_of_its_time_until_it_ends_or_is_lost() {
        let (mut hold, now) = hold(false, &[None, None, None, None]);
        let third = Duration::from_secs(3);
        assert_eq!(hold.next_beat(), Some(now + third));
        let (ended, _) = begin(&mut hold).unwrap();
        hold.end(ended).unwrap();
        assert!(hold.beat(now, 1_000).is_empty(), "not yet");
        let due = hold.beat(now + third, 2);
        assert_eq!(due.len(), 2, "so many at a time");
        assert_eq!(hold.beat(now + third, 1_000).len(), 1);
        assert_eq!(hold.next_beat(), None, "not while a call is under way");
        let (number, job) = hold.begin().unwrap();
        assert!(hold.lose(number) && job.lost.is_cancelled());
        hold.beat_again(number, now + third);
        assert_eq!(hold.next_beat(), None, "a lost one is let be");
        assert_eq!(hold.handled(), [number], "until its handler ends");
        let waiting = due[1].0;
        hold.beat_again(waiting, now + third);
        assert_eq!(hold.next_beat(), Some(now + 2 * third));
        assert!(hold.lose(waiting), "one that waits is not begun any more");
        assert_eq!((hold.next_beat(), hold.lose(waiting)), (None, false));
    }
}
