//! The ready messages in the order in which they go out: those that a receive takes, and those to load before it.

use std::collections::{BTreeMap, btree_set};
use std::iter::Peekable;

use super::order::{Keys, LANES, Order};
use super::{Entry, Queue};
use crate::domain::id::Offset;

/// Of ten messages, this many go to each lane while all have some: low, normal, high.
const WEIGHTS: [i64; LANES] = [1, 2, 7];

type Source<'a> = Box<dyn Iterator<Item = i64> + 'a>;

/// Ready messages of one lane, by offset.
struct Ready<'a> {
    fresh: Peekable<Source<'a>>,
    again: Peekable<Source<'a>>,
}

/// A walk over the ready messages. A message that it gives counts as taken once it was accepted.
pub(super) struct Walk<'a> {
    queue: &'a Queue,
    /// One, or a lane each.
    ready: Vec<Ready<'a>>,
    /// Later messages of the keys of those taken, for a queue with batches of keys.
    followers: BTreeMap<i64, i64>,
    /// The key of the last given message, if it has one.
    follows: Option<i64>,
    batches: Option<&'a Keys>,
    /// How many fresh ones may still go.
    room: usize,
    credits: [i64; LANES],
    /// The credits once the last given message is accepted.
    next_credits: [i64; LANES],
    /// The last message accepted had failed before: one that was never handed out goes next, if there is one. So what fails again and again,
    /// and is ready at once each time, takes no more than every other place.
    after_failed: bool,
}

impl<'a> Ready<'a> {
    fn new(fresh: impl Iterator<Item = i64> + 'a, again: btree_set::Range<'a, i64>) -> Self {
        let (fresh, again): (Source<'a>, Source<'a>) = (Box::new(fresh), Box::new(again.copied()));
        Self {
            fresh: fresh.peekable(),
            again: again.peekable(),
        }
    }

    fn peek(&mut self, has_room: bool) -> Option<i64> {
        let fresh = self.fresh.peek().copied().filter(|_| has_room);
        let again = self.again.peek().copied();
        fresh.into_iter().chain(again).min()
    }

    fn pass(&mut self, offset: i64) {
        self.fresh.next_if_eq(&offset);
        self.again.next_if_eq(&offset);
    }
}

impl<'a> Walk<'a> {
    pub(super) fn new(queue: &'a Queue) -> Self {
        let mut credits = [0; LANES];
        let mut batches = None;
        let ready = match &queue.order {
            Order::Offsets => vec![Ready::new(queue.fresh.iter(), queue.again.range(..))],
            Order::Keys(keys) => {
                batches = queue.settings.key_batches.then_some(keys);
                // What was redriven before a seek, or handed out before a restart, waits for the scan: what comes before it
                // in its key may still be to be found.
                let again = keys.again.range(..=queue.scanned);
                vec![Ready::new(keys.fresh.iter(), again)]
            }
            Order::Lanes(lanes) => {
                credits = lanes.credits;
                let lanes = lanes.fresh.iter().zip(&lanes.again);
                lanes
                    .map(|(fresh, again)| Ready::new(fresh.iter(), again.range(..)))
                    .collect()
            }
        };
        Self {
            queue,
            ready: if queue.is_arranging {
                Vec::new()
            } else {
                ready
            },
            followers: BTreeMap::new(),
            follows: None,
            batches,
            room: queue.room(),
            credits,
            next_credits: credits,
            after_failed: queue.after_failed,
        }
    }

    /// The next one. Those that are passed over stay where they are.
    pub(super) fn next(&mut self) -> Option<i64> {
        let has_room = self.room > 0;
        let place = match self.ready.len() {
            LANES => self.lane(has_room)?,
            _ => 0,
        };
        let ready = self.ready.get_mut(place)?;
        let mut followers = self.followers.keys().copied();
        let follower = followers.find(|&offset| has_room || !self.queue.fresh.contains(offset));
        let mut offset = ready.peek(has_room).into_iter().chain(follower).min()?;
        if self.after_failed && has_room && self.queue.has_failed(offset) {
            let mut followers = self.followers.keys().copied();
            let follower = followers.find(|&offset| self.queue.fresh.contains(offset));
            let fresh = ready.fresh.peek().copied().into_iter().chain(follower);
            offset = fresh.min().unwrap_or(offset);
        }
        ready.pass(offset);
        self.follows = self.followers.remove(&offset);
        Some(offset)
    }

    /// Each lane with messages earns its weight, and the one that is owed most pays for all. One that has everything is owed
    /// nothing: what it waited for before is made up for, and does not hold up what is urgent later.
    fn lane(&mut self, has_room: bool) -> Option<usize> {
        let mut credits = self.credits;
        let mut paid = 0;
        let mut next: Option<usize> = None;
        for (place, ready) in self.ready.iter_mut().enumerate() {
            if ready.peek(has_room).is_none() {
                credits[place] = 0;
                continue;
            }
            credits[place] += WEIGHTS[place];
            paid += WEIGHTS[place];
            if next.is_none_or(|next| credits[place] >= credits[next]) {
                next = Some(place);
            }
        }
        let next = next?;
        credits[next] = match paid == WEIGHTS[next] {
            true => 0,
            false => credits[next] - paid,
        };
        self.next_credits = credits;
        Some(next)
    }

    /// Accepts the last given message: it goes out.
    pub(super) fn accept(&mut self, offset: i64) {
        self.credits = self.next_credits;
        self.after_failed = self.queue.has_failed(offset);
        if self.queue.fresh.contains(offset) {
            self.room -= 1;
        }
        let Some(keys) = self.batches else {
            return;
        };
        let entry = self.queue.entries.get(&offset);
        let key = self
            .follows
            .or_else(|| keys.head(offset))
            .or_else(|| entry.and_then(|entry| entry.mark.key));
        if let Some(key) = key
            && let Some(follower) = self.queue.follower(keys, key, offset)
        {
            self.followers.insert(follower, key);
        }
    }

    pub(super) const fn credits(&self) -> [i64; LANES] {
        self.credits
    }

    pub(super) const fn after_failed(&self) -> bool {
        self.after_failed
    }
}

impl Queue {
    fn has_failed(&self, offset: i64) -> bool {
        self.entries.get(&offset).is_some_and(Entry::has_failed)
    }

    /// The next message of a key after one that goes out, if it can go with it.
    fn follower(&self, keys: &Keys, key: i64, offset: i64) -> Option<i64> {
        let next = keys.get(key)?.members.first_from(offset + 1)?;
        let is_ready =
            next <= self.scanned && (self.fresh.contains(next) || self.again.contains(&next));
        let is_held = self.settings.hold_key && keys.holder(key, next).is_some();
        (is_ready && !is_held).then_some(next)
    }

    /// The ready messages, in the order in which they go out, at most `count`.
    #[must_use]
    pub fn ready(&self, count: usize) -> Vec<Offset> {
        let mut walk = Walk::new(self);
        let mut ready = Vec::new();
        while ready.len() < count
            && let Some(offset) = walk.next()
        {
            walk.accept(offset);
            ready.push(Offset(offset));
        }
        ready
    }

    /// As [`Queue::ready`], and what follows these in their keys, by offset: worth a load together, since it is ready as
    /// soon as these are settled.
    #[must_use]
    pub fn upcoming(&self, count: usize) -> Vec<Offset> {
        let mut upcoming = self.ready(count);
        if let Order::Keys(keys) = &self.order
            && !upcoming.is_empty()
        {
            let each = (count - upcoming.len()) / upcoming.len();
            let ready = std::mem::take(&mut upcoming);
            for offset in ready {
                upcoming.push(offset);
                let key = keys
                    .head(offset.0)
                    .or_else(|| self.entries.get(&offset.0)?.mark.key);
                let Some(key) = key.and_then(|key| keys.get(key)) else {
                    continue;
                };
                let mut from = offset.0;
                for _ in 0..each {
                    let Some(next) = key.members.first_from(from + 1) else {
                        break;
                    };
                    upcoming.push(Offset(next));
                    from = next;
                }
            }
        }
        upcoming.sort_unstable();
        upcoming.dedup();
        upcoming
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{At, Found, Item, Random, Receive, Verb};
    use super::*;
    use crate::domain::id::{Generation, QueueId};
    use crate::domain::policy::Settings;
    use crate::domain::receipt::Receipt;

    /// Receives that settle what they get: the first ten messages fail each time and are ready at once, the others are done.
    #[test]
    fn messages_that_fail_again_and_again_leave_every_other_place_to_the_others() {
        for most in [1, 10] {
            let settings = Settings {
                max_attempts: 1_000,
                ..Settings::default()
            };
            let (id, random) = (QueueId(1), Random::new(1));
            let mut queue = Queue::new(id, Generation(1), Offset(1), settings, random);
            (1..=110).for_each(|offset| queue.found(Found::at(offset)));
            let mut handed_out = 0;
            while queue.watermark() < Offset(110) && queue.counts().fresh > 0 {
                queue.advance(At(1), At(i64::MIN));
                let (second, receive) = (Duration::from_secs(1), Receive::default());
                let taken = queue.hand_out(At(1), second, &receive, (most, u64::MAX), &|_| Some(1));
                handed_out += taken.handed.len();
                let offsets: Vec<Offset> = taken.handed.iter().map(|one| one.offset).collect();
                assert!(offsets.is_sorted(), "{offsets:?}");
                for handed in taken.handed {
                    let receipt = Some(Receipt {
                        queue: QueueId(1),
                        generation: Generation(1),
                        offset: handed.offset,
                        delivery: handed.delivery,
                    });
                    let (verb, delay) = match handed.offset <= Offset(10) {
                        true => (Verb::Nack, Some(Duration::ZERO)),
                        false => (Verb::Ack, None),
                    };
                    let item = Item {
                        receipt,
                        delay,
                        ..Item::default()
                    };
                    queue.settle(verb, &[item], At(1));
                }
            }
            assert!((190..=220).contains(&handed_out), "{handed_out}");
        }
    }
}
