//! The plain reference: a list of messages, each with its own little state. No journal, no sets kept beside one another;
//! what may go out is found by looking at all of them.

use std::collections::{BTreeMap, BTreeSet};

use super::super::*;
use super::Mode;
use crate::domain::message::Priority;
use crate::domain::policy::FREE_RELEASES;

pub(super) const SECOND: i64 = 1_000;
pub(super) const MAX_ATTEMPTS: u32 = 4;
pub(super) const MAX_IN_FLIGHT: u32 = 6;
pub(super) const DELAYS: [i64; 3] = [3 * SECOND, 5 * SECOND, 20 * SECOND];

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
    /// When the receive was that may have brought several of its key.
    batch: Option<i64>,
    failures: Vec<(i64, String)>,
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
    mode: Mode,
    pub(super) holds: bool,
    credits: [i64; 3],
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

    fn attempt(&self) -> u32 {
        match self.is_live() {
            true => self.attempts + 1,
            false => self.attempts.max(1),
        }
    }

    fn fail(&mut self, now: i64, reason: &str) {
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
    pub(super) fn new(mode: Mode) -> Self {
        Self {
            messages: BTreeMap::new(),
            letters: BTreeMap::new(),
            generation: 1,
            mode,
            holds: mode == Mode::HeldKeys,
            credits: [0; 3],
        }
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

    /// What is not stored is lost with a crash.
    pub(super) fn forget(&mut self) {
        self.credits = [0; 3];
    }

    fn is_keyed(&self) -> bool {
        matches!(self.mode, Mode::Keys | Mode::HeldKeys | Mode::KeyBatches)
    }

    /// Whether order lets a ready message go, with what this receive has taken already.
    pub(super) fn is_open(&self, offset: i64, taken: &BTreeSet<i64>) -> bool {
        let Some(key) = self.messages[&offset].key.filter(|_| self.is_keyed()) else {
            return true;
        };
        let batches = self.mode == Mode::KeyBatches;
        let mut of_key = self
            .messages
            .iter()
            .filter(|(_, other)| other.key == Some(key));
        of_key.all(|(other, message)| {
            let is_taken = batches && taken.contains(other);
            let letter = self.letters.get(other).filter(|_| !message.is_unsettled());
            let is_held =
                self.holds && *other < offset && letter.is_some_and(|letter| letter.holds);
            let is_before = *other < offset && message.is_unsettled();
            is_taken || !(message.is_live() || is_before || is_held)
        })
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
        let mut all = self
            .messages
            .iter()
            .filter(|(offset, message)| is_next(offset, message));
        if self.mode != Mode::Lanes {
            return all.next().map(|(&offset, _)| (offset, self.credits));
        }
        let lanes = [Priority::Low, Priority::Normal, Priority::High];
        let mut heads: [Option<i64>; 3] = [None; 3];
        for (&offset, message) in all {
            let lane = lanes.iter().position(|&lane| lane == message.priority);
            heads[lane.expect("a lane")].get_or_insert(offset);
        }
        let weights = [1, 2, 7];
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
        let count = count.min((MAX_IN_FLIGHT as usize).saturating_sub(live));
        let (mut passed, mut taken) = (BTreeSet::new(), BTreeSet::new());
        let mut handed = Vec::new();
        while handed.len() < count
            && let Some((offset, credits)) = self.next_of(now, &passed, &taken)
        {
            passed.insert(offset);
            let alone = self.messages[&offset].goes_alone();
            if alone && !handed.is_empty() {
                continue;
            }
            self.credits = credits;
            let batch = (self.mode == Mode::KeyBatches).then_some(now);
            let message = self.messages.get_mut(&offset).expect("it is ready");
            message.delivery += 1;
            message.batch = batch;
            message.plain = Plain::Live {
                until: now + visible,
            };
            taken.insert(offset);
            handed.push((offset, message.delivery, message.attempts + 1));
            if alone {
                break;
            }
        }
        handed
    }

    fn die(&mut self, offset: i64, now: i64, reason: &str, attempts: u32, holds: bool) {
        let holds = holds && self.holds && self.messages[&offset].key.is_some();
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
        if attempts >= MAX_ATTEMPTS {
            return self.die(offset, now, "timed_out", attempts, true);
        }
        message.attempts = attempts;
        message.timed_out = true;
        message.fail(now, "timed_out");
        let due = match attempts {
            1 | 2 => now,
            _ => now + DELAYS[(attempts as usize - 1).min(2)],
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
        if let Some(message) = self.messages.get_mut(&offset)
            && message.delivery == delivery
            && message.is_live()
        {
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
        message.delivery = letter.delivery + 1;
        message.is_reopened = true;
        message.plain = Plain::Waiting {
            end: End::Unwritten,
            due: now,
        };
        true
    }

    /// A new generation from `start` on; `floor`: what is at or below is not in the log any more.
    pub(super) fn begin_generation(
        &mut self,
        start: i64,
        floor: i64,
        keeps_redriven: bool,
        now: i64,
    ) {
        self.generation += 1;
        self.forget();
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

    fn others(&self, offset: i64) -> impl Iterator<Item = (i64, &Message)> {
        let key = self.messages[&offset].key.filter(|_| self.is_keyed());
        let others = self
            .messages
            .iter()
            .map(|(&other, message)| (other, message));
        others
            .filter(move |(other, message)| *other != offset && key.is_some() && message.key == key)
    }

    /// One cell of the matrix, written as PROTOCOL.md has it.
    pub(super) fn verb(
        &mut self,
        verb: Verb,
        offset: i64,
        delivery: u32,
        delay: Option<i64>,
        now: i64,
    ) -> Outcome {
        let dead_letter = dead_letter_id(Generation(self.generation), Offset(offset));
        let Some(message) = self.messages.get(&offset) else {
            return Outcome::Gone { incident: true };
        };
        match message.plain {
            Plain::Lost { was_fresh: false } => return Outcome::Gone { incident: false },
            Plain::Settled | Plain::Lost { was_fresh: true } => {
                return match self.letters.get(&offset) {
                    Some(letter) if verb == Verb::Ack && letter.delivery == delivery => {
                        self.letters.remove(&offset);
                        Outcome::Acked
                    }
                    Some(_) => Outcome::DeadLettered { dead_letter },
                    None => Outcome::AlreadySettled,
                };
            }
            _ => {}
        }
        if delivery > message.delivery || message.plain == Plain::Fresh {
            return Outcome::Gone { incident: true };
        }
        if delivery < message.delivery {
            let attempt = message.attempt();
            return Outcome::Stale { attempt };
        }
        let batch = message.batch;
        let is_earlier = |(other, message): (i64, &Message)| {
            other < offset && message.is_unsettled() && message.batch == batch
        };
        if verb == Verb::Ack && batch.is_some() && self.others(offset).any(is_earlier) {
            return Outcome::Blocked;
        }
        let is_elsewhere = |(_, other): (i64, &Message)| {
            other.is_live() && (batch.is_none() || other.batch != batch)
        };
        let is_overtaken = self.others(offset).any(is_elsewhere);
        self.verb_of_last(verb, offset, delay, now, is_overtaken, dead_letter)
    }

    /// The receipt is that of the last delivery.
    fn verb_of_last(
        &mut self,
        verb: Verb,
        offset: i64,
        delay: Option<i64>,
        now: i64,
        is_overtaken: bool,
        letter: String,
    ) -> Outcome {
        let message = self.messages.get_mut(&offset).expect("it is there");
        let (own_end, timed_out, due) = match message.plain {
            Plain::Waiting {
                end: End::TimedOut,
                due,
            } => (None, true, due),
            Plain::Waiting { end, due } => (Some(end), false, due),
            _ => (None, false, 0),
        };
        let due_at = Some(At(due));
        match (verb, own_end) {
            (Verb::Ack, _) => {
                message.plain = Plain::Settled;
                message.is_reopened = false;
                self.letters.remove(&offset);
                Outcome::Acked
            }
            (Verb::Reject, _) => {
                let attempts = message.attempt();
                self.die(offset, now, "rejected", attempts, true);
                Outcome::Rejected {
                    dead_letter: letter,
                }
            }
            (Verb::Extend, Some(_)) => Outcome::Stale {
                attempt: message.attempt(),
            },
            (Verb::Extend, None) if timed_out && is_overtaken => Outcome::Stale {
                attempt: message.attempt(),
            },
            (Verb::Nack | Verb::Release, Some(End::Nacked)) => Outcome::Nacked {
                due_at,
                dead_letter: None,
            },
            (Verb::Nack | Verb::Release, Some(_)) => Outcome::Released {
                due_at,
                dead_letter: None,
            },
            (Verb::Extend, None) => {
                message.attempts -= u32::from(timed_out);
                message.plain = Plain::Live {
                    until: now + 30 * SECOND,
                };
                Outcome::Extended {
                    visible_until: At(now + 30 * SECOND),
                }
            }
            (Verb::Nack, None) => {
                let attempts = message.attempts + u32::from(!timed_out);
                if attempts >= MAX_ATTEMPTS {
                    self.die(offset, now, "nacked", attempts, true);
                    return Outcome::Nacked {
                        due_at: None,
                        dead_letter: Some(letter),
                    };
                }
                message.attempts = attempts;
                message.fail(now, "nacked");
                let policy = DELAYS[(attempts as usize - 1).min(2)];
                let due = now + delay.unwrap_or(policy);
                message.plain = Plain::Waiting {
                    end: End::Nacked,
                    due,
                };
                Outcome::Nacked {
                    due_at: Some(At(due)),
                    dead_letter: None,
                }
            }
            (Verb::Release, None) => {
                message.attempts -= u32::from(timed_out);
                message.releases += 1;
                message.attempts += u32::from(message.releases > FREE_RELEASES);
                let attempts = message.attempts;
                if attempts >= MAX_ATTEMPTS {
                    self.die(offset, now, "released too often", attempts, true);
                    return Outcome::Released {
                        due_at: None,
                        dead_letter: Some(letter),
                    };
                }
                let due = now + delay.unwrap_or(0);
                message.plain = Plain::Waiting {
                    end: End::Released,
                    due,
                };
                Outcome::Released {
                    due_at: Some(At(due)),
                    dead_letter: None,
                }
            }
        }
    }
}
