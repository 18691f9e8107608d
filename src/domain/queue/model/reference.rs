//! The plain reference: a list of messages, each with its own little state. No journal, no sets kept beside one another;
//! what may go out is found by looking at all of them.

use std::collections::{BTreeMap, BTreeSet};

use super::super::*;
use super::faults::Fault;
use super::{Mode, Plan};
use crate::domain::message::Priority;

pub(super) const SECOND: i64 = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plain {
    Fresh,
    Live {
        until: i64,
    },
    Waiting {
        end: End,
        due: i64,
    },
    /// Settled, or not of this generation.
    Settled,
    /// Retention's hard limit passed it, handed out or not.
    Lost {
        was_fresh: bool,
    },
}

#[derive(Debug, Clone)]
pub(super) struct Message {
    pub(super) key: Option<i64>,
    pub(super) priority: Priority,
    pub(super) plain: Plain,
    pub(super) delivery: u32,
    pub(super) attempts: u32,
    pub(super) releases: u32,
    pub(super) timed_out: bool,
    /// The time of the receive that may have brought several messages of its key.
    pub(super) batch: Option<i64>,
    pub(super) failures: Vec<(i64, String)>,
    pub(super) is_reopened: bool,
}

/// A dead letter: its message may be unsettled again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dead {
    pub(super) delivery: u32,
    pub(super) attempts: u32,
    pub(super) failures: Vec<(i64, String)>,
    holds: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Reference {
    pub(super) messages: BTreeMap<i64, Message>,
    pub(super) letters: BTreeMap<i64, Dead>,
    pub(super) generation: i64,
    pub(super) settings: Plan,
    /// Keys that are in order until nothing of them is live, though the queue is ordered no more.
    leaving: BTreeSet<i64>,
    /// As of the last commit, there were such keys.
    was_leaving: bool,
    credits: [i64; 3],
    /// The last message that went out had failed before.
    after_failed: bool,
    /// Its fault, if it has one.
    pub(super) fault: Option<Fault>,
}

impl Message {
    pub(super) fn is_unsettled(&self) -> bool {
        matches!(
            self.plain,
            Plain::Fresh | Plain::Live { .. } | Plain::Waiting { .. }
        )
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self.plain, Plain::Live { .. })
    }

    pub(super) fn is_ready(&self, now: i64) -> bool {
        match self.plain {
            Plain::Fresh => true,
            Plain::Waiting { due, .. } => due <= now,
            _ => false,
        }
    }

    fn goes_alone(&self) -> bool {
        self.timed_out && self.attempts >= 2
    }

    pub(super) fn attempt(&self) -> u32 {
        match self.is_live() {
            true => self.attempts + 1,
            false => self.attempts.max(1),
        }
    }

    pub(super) fn fail(&mut self, now: i64, reason: &str) {
        self.failures.push((now, reason.to_owned()));
        let surplus = self.failures.len().saturating_sub(5);
        self.failures.drain(..surplus);
    }

    fn begin_again(&mut self) {
        self.attempts = 0;
        self.releases = 0;
        self.timed_out = false;
        self.batch = None;
        self.failures = Vec::new();
    }
}

impl Reference {
    pub(super) fn new(settings: Plan, fault: Option<Fault>) -> Self {
        Self {
            messages: BTreeMap::new(),
            letters: BTreeMap::new(),
            generation: 1,
            settings,
            leaving: BTreeSet::new(),
            was_leaving: false,
            credits: [0; 3],
            after_failed: false,
            fault,
        }
    }

    pub(super) fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    pub(super) fn publish(&mut self, offset: i64, key: Option<i64>, priority: Priority) {
        self.messages.entry(offset).or_insert(Message {
            key,
            priority,
            plain: Plain::Fresh,
            delivery: 0,
            attempts: 0,
            releases: 0,
            timed_out: false,
            batch: None,
            failures: Vec::new(),
            is_reopened: false,
        });
    }

    /// All of it is stored.
    pub(super) fn note_commit(&mut self) {
        self.settle_down();
        self.was_leaving = !self.leaving.is_empty();
    }

    /// A crash loses everything that is not stored.
    pub(super) fn forget(&mut self) {
        self.credits = [0; 3];
        self.after_failed = false;
        self.leaving = match self.was_leaving && !self.settings.mode.is_keyed() {
            true => self.live_keys(),
            false => BTreeSet::new(),
        };
        if self.has(Fault::CrashEndsTheOrder) {
            self.leaving.clear();
        }
        if self.has(Fault::CrashForgetsDelays) {
            for message in self.messages.values_mut() {
                if let Plain::Waiting { due, .. } = &mut message.plain {
                    *due = 0;
                }
            }
        }
    }

    pub(super) fn change(&mut self, settings: Plan) {
        let was_keyed = self.settings.mode.is_keyed();
        if settings.mode.is_keyed() {
            self.leaving.clear();
        } else if was_keyed {
            self.leaving = self.live_keys();
        }
        if was_keyed != settings.mode.is_keyed() || settings.mode != self.settings.mode {
            self.credits = [0; 3];
        }
        self.settings = settings;
        if self.has(Fault::ChangesAtOnce) {
            self.leaving.clear();
        }
    }

    fn live_keys(&self) -> BTreeSet<i64> {
        let live = self.messages.values().filter(|message| message.is_live());
        live.filter_map(|message| message.key).collect()
    }

    /// Nothing is in order any longer than until nothing of its key is live.
    pub(super) fn settle_down(&mut self) {
        let live = self.live_keys();
        self.leaving.retain(|key| live.contains(key));
    }

    pub(super) fn is_in_order(&self, key: i64) -> bool {
        self.settings.mode.is_keyed() || self.leaving.contains(&key)
    }

    /// Lanes begin once every key has left its order.
    pub(super) fn has_lanes(&self) -> bool {
        self.settings.mode == Mode::Lanes && self.leaving.is_empty()
    }

    /// Whether order lets a ready message go, with what this receive has taken already.
    pub(super) fn is_open(&self, offset: i64, taken: &BTreeSet<i64>) -> bool {
        let key = self.messages[&offset].key;
        let Some(key) = key.filter(|&key| self.is_in_order(key)) else {
            return true;
        };
        let batches = self.settings.mode == Mode::KeyBatches;
        let (holds, waits) = (self.holds(), !self.has(Fault::KeyDoesNotWait));
        let mut of_key = self
            .messages
            .iter()
            .filter(|(_, other)| other.key == Some(key));
        of_key.all(|(other, message)| {
            let is_taken = batches && taken.contains(other);
            let letter = self.letters.get(other).filter(|_| !message.is_unsettled());
            let is_held = holds && *other < offset && letter.is_some_and(|letter| letter.holds);
            let is_before = waits && *other < offset && message.is_unsettled();
            is_taken || !(message.is_live() || is_before || is_held)
        })
    }

    fn holds(&self) -> bool {
        self.settings.mode == Mode::HeldKeys && !self.has(Fault::LetterHoldsNothing)
    }

    fn next_of(
        &self,
        now: i64,
        passed: &BTreeSet<i64>,
        taken: &BTreeSet<i64>,
    ) -> Option<(i64, [i64; 3])> {
        let is_next = |offset: &i64, message: &Message| {
            message.is_ready(now) && !passed.contains(offset) && self.is_open(*offset, taken)
        };
        let all = self
            .messages
            .iter()
            .filter(|(offset, message)| is_next(offset, message));
        // The next of some: one that failed lets one go first that was never handed out.
        let head = |all: &[(i64, &Message)]| {
            let &(first, message) = all.first()?;
            let yields = self.after_failed
                && message.plain != Plain::Fresh
                && message.attempts > 0
                && !self.has(Fault::FailedGoFirst);
            let mut fresh = all
                .iter()
                .filter(|(_, message)| message.plain == Plain::Fresh);
            let fresh = fresh.next().filter(|_| yields);
            Some(fresh.map_or(first, |&(offset, _)| offset))
        };
        let all: Vec<(i64, &Message)> = all.map(|(&offset, message)| (offset, message)).collect();
        if !self.has_lanes() {
            return head(&all).map(|offset| (offset, self.credits));
        }
        let lanes = [Priority::Low, Priority::Normal, Priority::High];
        let heads: [Option<i64>; 3] = lanes.map(|lane| {
            let of_lane = all.iter().filter(|(_, message)| message.priority == lane);
            head(&of_lane.copied().collect::<Vec<_>>())
        });
        let weights = [1, 2, 7 + i64::from(self.has(Fault::LanesAreUneven))];
        let mut credits = self.credits;
        let mut sum = 0;
        for lane in 0..3 {
            match heads[lane] {
                Some(_) => {
                    credits[lane] += weights[lane];
                    sum += weights[lane];
                }
                None => credits[lane] = 0,
            }
        }
        let waiting = (0..3).filter(|&lane| heads[lane].is_some());
        let others = waiting.clone().count() > 1;
        let lane = waiting.max_by_key(|&lane| (credits[lane], lane))?;
        credits[lane] = if others { credits[lane] - sum } else { 0 };
        heads[lane].map(|offset| (offset, credits))
    }

    pub(super) fn receive(&mut self, now: i64, count: usize, visible: i64) -> Vec<(i64, u32, u32)> {
        let live = self
            .messages
            .values()
            .filter(|message| message.is_live())
            .count();
        let most =
            self.settings.max_in_flight as usize + usize::from(self.has(Fault::OneTooManyInFlight));
        let count = count.min(most.saturating_sub(live));
        let (mut passed, mut taken) = (BTreeSet::new(), BTreeSet::new());
        let mut handed = Vec::new();
        while handed.len() < count
            && let Some((offset, credits)) = self.next_of(now, &passed, &taken)
        {
            passed.insert(offset);
            let alone = self.messages[&offset].goes_alone() && !self.has(Fault::PoisonHasCompany);
            if alone && !handed.is_empty() {
                continue;
            }
            self.credits = credits;
            let batch = (self.settings.mode == Mode::KeyBatches).then_some(now);
            let message = self.messages.get_mut(&offset).expect("it is ready");
            message.delivery += 1;
            message.batch = batch;
            message.plain = Plain::Live {
                until: now + visible,
            };
            self.after_failed = message.attempts > 0;
            let message = &self.messages[&offset];
            taken.insert(offset);
            handed.push((offset, message.delivery, message.attempts + 1));
            if alone {
                break;
            }
        }
        if !self.has_lanes() {
            handed.sort_unstable();
        }
        handed
    }

    pub(super) fn die(&mut self, offset: i64, now: i64, reason: &str, attempts: u32, holds: bool) {
        let holds = holds && self.holds() && self.messages[&offset].key.is_some();
        let message = self.messages.get_mut(&offset).expect("it is unsettled");
        message.fail(now, reason);
        message.plain = Plain::Settled;
        message.is_reopened = false;
        let dead = Dead {
            delivery: message.delivery,
            attempts,
            failures: std::mem::take(&mut message.failures),
            holds,
        };
        self.letters.insert(offset, dead);
    }

    pub(super) fn expire(&mut self, offset: i64, now: i64) {
        let message = self.messages.get_mut(&offset).expect("it is live");
        let attempts = message.attempts + 1;
        if attempts >= self.settings.max_attempts {
            return self.die(offset, now, "timed_out", attempts, true);
        }
        message.attempts = attempts;
        message.timed_out = true;
        message.fail(now, "timed_out");
        let due = match attempts {
            1 | 2 => now,
            _ => now + self.settings.delay(attempts),
        };
        message.plain = Plain::Waiting {
            end: End::TimedOut,
            due,
        };
    }

    pub(super) fn expire_over(&mut self, now: i64) {
        let is_over =
            |message: &Message| matches!(message.plain, Plain::Live { until } if until <= now);
        let over: Vec<i64> = self
            .messages
            .iter()
            .filter(|(_, message)| is_over(message))
            .map(|(&offset, _)| offset)
            .collect();
        for offset in over {
            self.expire(offset, now);
        }
    }

    pub(super) fn shift(&mut self, by: i64) {
        if self.has(Fault::OutageCosts) {
            return;
        }
        for message in self.messages.values_mut() {
            if let Plain::Live { until } = &mut message.plain {
                *until += by;
            }
        }
    }

    pub(super) fn lose(&mut self, offset: i64) {
        if let Some(message) = self.messages.get_mut(&offset)
            && message.is_unsettled()
        {
            let was_fresh = message.plain == Plain::Fresh;
            message.plain = Plain::Lost { was_fresh };
            if std::mem::take(&mut message.is_reopened) {
                self.letters.remove(&offset);
            }
        }
    }

    pub(super) fn lose_through(&mut self, floor: i64) {
        let low = self.messages.range(..=floor);
        let gone = low.filter(|(_, message)| !message.is_reopened);
        let gone: Vec<i64> = gone.map(|(&offset, _)| offset).collect();
        for offset in gone {
            self.lose(offset);
        }
    }

    pub(super) fn take_back(&mut self, offset: i64, delivery: u32, now: i64) {
        let is_charged = self.has(Fault::UnwrittenCounts);
        if let Some(message) = self.messages.get_mut(&offset)
            && message.delivery == delivery
            && message.is_live()
        {
            message.attempts += u32::from(is_charged);
            message.plain = Plain::Waiting {
                end: End::Unwritten,
                due: now,
            };
        }
    }

    pub(super) fn delete(&mut self, offset: i64) {
        if let Some(message) = self.messages.get_mut(&offset)
            && message.is_unsettled()
        {
            message.plain = Plain::Settled;
            message.is_reopened = false;
            self.letters.remove(&offset);
        }
    }

    pub(super) fn condemn(&mut self, offset: i64, now: i64) {
        if let Some(message) = self.messages.get(&offset)
            && message.is_unsettled()
        {
            let attempts = message.attempts + u32::from(message.is_live());
            self.die(offset, now, "rejected", attempts, false);
        }
    }

    /// Whether it came back.
    pub(super) fn redrive(&mut self, offset: i64, now: i64) -> bool {
        let (Some(letter), Some(message)) =
            (self.letters.get(&offset), self.messages.get_mut(&offset))
        else {
            return false;
        };
        if message.is_unsettled() {
            return false;
        }
        message.begin_again();
        let is_new = self.fault != Some(Fault::RedriveRepeatsTheNumber);
        message.delivery = letter.delivery + u32::from(is_new);
        message.is_reopened = true;
        message.plain = Plain::Waiting {
            end: End::Unwritten,
            due: now,
        };
        true
    }

    /// A new generation from `start` on; `floor`: messages at or below it are no longer in the log.
    pub(super) fn begin_generation(
        &mut self,
        start: i64,
        floor: i64,
        keeps_redriven: bool,
        now: i64,
    ) {
        self.generation += 1;
        self.forget();
        if self.has(Fault::SeekForgetsLetters) {
            self.letters.clear();
        }
        for (&offset, message) in &mut self.messages {
            if message.is_reopened && keeps_redriven {
                let delivery = message.delivery;
                message.begin_again();
                message.delivery = delivery;
                message.plain = Plain::Waiting {
                    end: End::Unwritten,
                    due: now,
                };
                continue;
            }
            message.begin_again();
            message.delivery = 0;
            message.is_reopened = false;
            message.plain = match offset >= start && offset > floor {
                true => Plain::Fresh,
                false => Plain::Settled,
            };
        }
    }
}
