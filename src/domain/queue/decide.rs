//! The queue's own decisions: which messages go out, which deliveries have expired, what the scan found.

use std::collections::BTreeSet;

use super::order::Order;
use super::record::{End, Record, SettledAs, to_ranges};
use super::state::note_failure;
use super::walk::Walk;
use super::{
    At, EmptyReason, Entry, Failure, Found, Letter, Mark, Queue, Receive, State, TIMED_OUT,
};
use crate::domain::id::Offset;

/// Messages handed out and not settled, live or not, after which nothing fresh goes out: each has a place in memory and in
/// every checkpoint, and one with a long delay keeps it for long.
pub const ENTRIES_MAX: usize = 200_000;

/// Deliveries whose time runs out in one call at most: the others follow once these are written.
const EXPIRED_TOGETHER: usize = 10_000;

/// Messages found and not handed out that the record of one receive carries at most.
const JOURNALED_TOGETHER: usize = 10_000;

/// A message decided to go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handed {
    /// The message.
    pub offset: Offset,
    /// The number of the delivery.
    pub delivery: u32,
    /// The number of the attempt.
    pub attempt: u32,
    /// The delivery is held until then.
    pub deadline: At,
}

/// The result of a receive.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Taken {
    /// The messages: by offset, and with lanes in the order of the lanes' turns.
    pub handed: Vec<Handed>,
    /// A ready message stopped the walk since it is not loaded.
    pub needs_load: bool,
}

impl Queue {
    /// A message of a matching topic was found; everything before it was looked at.
    pub fn found(&mut self, found: Found) {
        let Offset(offset) = found.offset;
        if offset <= self.scanned {
            return;
        }
        if !self.is_ahead(offset) && !self.entries.contains_key(&offset) {
            self.add_fresh(offset, found.mark());
        }
        self.scanned = offset;
    }

    /// Everything up to `through` was looked at.
    pub fn looked_through(&mut self, through: Offset) {
        self.scanned = self.scanned.max(through.0);
    }

    /// How many messages may go out for the first time.
    pub(super) fn room(&self) -> usize {
        ENTRIES_MAX.saturating_sub(self.entries.len())
    }

    /// Whether something is ready and may go out.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        let (has_fresh, has_again) = match &self.order {
            Order::Keys(keys) => (!keys.fresh.is_empty(), !keys.again.is_empty()),
            Order::Offsets | Order::Lanes(_) => (!self.fresh.is_empty(), !self.again.is_empty()),
        };
        let is_ready = has_fresh && self.room() > 0 || has_again;
        is_ready && !self.is_full() && !self.is_arranging()
    }

    /// Whether as many deliveries are live as the settings allow.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.deadlines.len() >= self.settings.max_in_flight as usize
    }

    /// The reason why a receive gets nothing.
    #[must_use]
    pub fn empty_reason(&self) -> EmptyReason {
        if self.is_full() {
            EmptyReason::InFlightFull
        } else if self.waiting() > 0 {
            EmptyReason::WaitingForKeys
        } else if self.delays.is_empty() {
            EmptyReason::Empty
        } else {
            EmptyReason::Delayed
        }
    }

    /// The time when the next live delivery expires.
    #[must_use]
    pub fn next_deadline(&self) -> Option<At> {
        self.deadlines.first().map(|&(at, _)| at)
    }

    /// The time when the next delayed message falls due.
    #[must_use]
    pub fn next_due(&self) -> Option<At> {
        self.delays.first().map(|&(at, _)| at)
    }

    /// Hands out ready messages in their order, at most `count` messages and `bytes` bytes, but always one. While other messages are
    /// ready, no two that failed before go out in a row. `size` tells a message's bytes, or None when it is not loaded yet, which
    /// ends the walk.
    pub fn hand_out(
        &mut self,
        now: At,
        visible: std::time::Duration,
        receive: &Receive,
        limits: (usize, u64),
        size: &dyn Fn(Offset) -> Option<u64>,
    ) -> Taken {
        self.seal();
        let (count, bytes) = limits;
        let room = (self.settings.max_in_flight as usize).saturating_sub(self.deadlines.len());
        let count = count.min(room);
        let visible = self
            .settings
            .max_hold
            .map_or(visible, |hold| hold.min(visible));
        let deadline = now.plus(visible);
        let mut taken = Taken::default();
        let (mut first, mut again, mut total) = (Vec::new(), Vec::new(), 0u64);
        let mut walk = Walk::new(self);
        // Those that go alone are passed over when others are under way, and there may be many of them.
        for _ in 0..count.saturating_add(100) {
            if taken.handed.len() >= count {
                break;
            }
            let Some(offset) = walk.next() else { break };
            let entry = self.entries.get(&offset);
            let alone = entry.is_some_and(Entry::goes_alone);
            if alone && !taken.handed.is_empty() {
                continue;
            }
            let Some(size) = size(Offset(offset)) else {
                taken.needs_load = true;
                break;
            };
            total = total.saturating_add(size);
            if total > bytes && !taken.handed.is_empty() {
                break;
            }
            walk.accept(offset);
            let (delivery, attempt) = entry.map_or((1, 1), |entry| {
                (entry.delivery.saturating_add(1), entry.attempts + 1)
            });
            match entry {
                Some(_) => again.push((offset, delivery)),
                None => first.push(offset),
            }
            taken.handed.push(Handed {
                offset: Offset(offset),
                delivery,
                attempt,
                deadline,
            });
            if alone {
                break;
            }
        }
        let (credits, after_failed) = (walk.credits(), walk.after_failed());
        drop(walk);
        if !taken.handed.is_empty() {
            self.after_failed = after_failed;
            if !matches!(self.order, Order::Lanes(_)) {
                taken.handed.sort_unstable_by_key(|handed| handed.offset);
            }
            let last = first.iter().max().copied();
            if let Order::Lanes(lanes) = &mut self.order {
                lanes.credits = credits;
            }
            let in_order = matches!(self.order, Order::Keys(_)) && self.settings.key_batches;
            self.commit(Record::Delivered {
                at: now,
                deadline,
                receive: receive.clone(),
                in_order,
                first: to_ranges(first),
                again,
            });
            if let Some(last) = last {
                self.journal_scan_some(Offset(last));
            }
        }
        taken
    }

    /// The live deliveries of an earlier receive under this id, with the same numbers.
    #[must_use]
    pub fn replay(&self, receive_id: &str) -> Vec<Handed> {
        let Some(offsets) = self.receives.get(receive_id) else {
            return Vec::new();
        };
        offsets
            .iter()
            .filter_map(|&offset| {
                let entry = self.entries.get(&offset)?;
                match entry.state {
                    State::Live { deadline } => Some(Handed {
                        offset: Offset(offset),
                        delivery: entry.delivery,
                        attempt: entry.attempt(),
                        deadline,
                    }),
                    State::Ended { .. } => None,
                }
            })
            .collect()
    }

    /// Lets time pass: delays that fell due are ready again, and deliveries whose deadline is at or before
    /// `expire_through` have run out. The caller moves `expire_through` only while Postgres is known to answer, so
    /// that nobody is charged for an outage. Of very many whose time is over some are left for the next call.
    pub fn advance(&mut self, now: At, expire_through: At) {
        while let Some(&(due, offset)) = self.delays.first()
            && due <= now
        {
            self.delays.pop_first();
            self.again.insert(offset);
            self.fall_due(offset);
        }
        // Deliveries that are over and not written yet are enough at a time.
        let expire_through = match self.is_split() {
            true => At(i64::MIN),
            false => expire_through,
        };
        let over: BTreeSet<i64> = self
            .deadlines
            .iter()
            .take_while(|(deadline, _)| *deadline <= expire_through.min(now))
            .map(|&(_, offset)| offset)
            .take(EXPIRED_TOGETHER)
            .collect();
        for &offset in &over {
            self.expire(offset, now);
            if self.is_split() {
                break;
            }
        }
        if !over.is_empty() {
            self.advance(now, At(i64::MIN));
        }
    }

    pub(super) fn expire(&mut self, offset: i64, now: At) {
        self.seal();
        let Some(entry) = self.entries.get(&offset) else {
            return;
        };
        let attempts = entry.attempts + 1;
        if attempts >= self.settings.max_attempts {
            let failure = Failure {
                at: now,
                reason: TIMED_OUT.to_owned(),
            };
            return self.die(offset, attempts, "out_of_attempts", failure, now);
        }
        let releases = entry.releases;
        // At once twice, since a consumer that died is the likely cause; then by policy.
        let due = if attempts <= 2 {
            now
        } else {
            now.plus(self.retry_delay(attempts))
        };
        self.commit(Record::Ended {
            offset,
            end: End::TimedOut,
            at: now,
            due,
            attempts,
            releases,
            reason: None,
        });
    }

    pub(super) fn retry_delay(&mut self, attempts: u32) -> std::time::Duration {
        let random = self.random.next_unit();
        self.settings.retry.delay(attempts, random)
    }

    /// Settles a message as dead, with its letter.
    pub(super) fn die(
        &mut self,
        offset: i64,
        attempts: u32,
        cause: &'static str,
        failure: Failure,
        now: At,
    ) {
        let Some(entry) = self.entries.get(&offset) else {
            return;
        };
        let delivery = entry.delivery;
        let mut failures = entry.failures.clone();
        note_failure(&mut failures, failure);
        self.pending.write_letter(Letter {
            offset: Offset(offset),
            delivery,
            attempts,
            cause,
            failures,
            died_at: now,
        });
        let Mark { key, priority } = entry.mark;
        let holds = self.settings.hold_key && self.key_of(offset).is_some();
        self.commit(Record::Dead {
            offset,
            delivery,
            at: now,
            key,
            priority,
            holds,
        });
    }

    /// These messages are no longer in the log: settled as a gap. Receipts for them are `gone`.
    pub fn lose(&mut self, offsets: Vec<Offset>) {
        let mut offsets: Vec<i64> = offsets
            .into_iter()
            .map(|offset| offset.0)
            .filter(|offset| self.fresh.contains(*offset) || self.entries.contains_key(offset))
            .collect();
        offsets.sort_unstable();
        offsets.dedup();
        if !offsets.is_empty() {
            self.commit(Record::Settled {
                kind: SettledAs::Gap,
                ranges: to_ranges(offsets),
            });
        }
    }

    /// As [`Queue::lose`], for all unsettled messages up to `through`, except redriven ones, whose payload is with their dead
    /// letter. Returns how many.
    pub fn lose_through(&mut self, through: Offset) -> usize {
        let mut gone: Vec<Offset> = self
            .fresh
            .iter()
            .take_while(|&offset| offset <= through.0)
            .map(Offset)
            .collect();
        gone.extend(
            self.entries
                .range(..=through.0)
                .map(|(&offset, _)| Offset(offset))
                .filter(|&offset| !self.is_reopened(offset)),
        );
        let count = gone.len();
        self.lose(gone);
        count
    }

    /// Live deadlines move by an outage: the consumers could not settle while Postgres was away.
    pub fn shift(&mut self, by: std::time::Duration) {
        let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        if by > 0 && !self.deadlines.is_empty() {
            self.commit(Record::Shifted { by });
        }
    }

    /// As [`Queue::journal_scan`], but no further than a good many messages that were found: with order and lanes, what
    /// goes out first may have millions before it.
    fn journal_scan_some(&mut self, through: Offset) {
        let found = self.fresh.iter_from(self.journaled + 1);
        let mut found = found.take_while(|&offset| offset <= through.0);
        let enough = found.nth(JOURNALED_TOGETHER).map(Offset);
        drop(found);
        self.journal_scan(enough.map_or(through, |enough| through.min(enough)));
    }

    /// Records the scan position: up to `through`, or as far as the scan came. What matched and was not handed out
    /// goes with it.
    pub fn journal_scan(&mut self, through: Offset) {
        let through = through.0.min(self.scanned);
        if through <= self.journaled {
            return;
        }
        let matched = self.fresh.stored_between(self.journaled + 1, through);
        self.commit(Record::Scanned { through, matched });
    }
}
