//! Histories of a run, and the offline checkers that judge them: pure code that knows nothing of the broker but what it
//! promises. What clients asked and were told is one part of a history; what the database was seen to commit (by triggers of
//! the test's own, see `support::audit`) is the other.
//!
//! A request is written down with the time at which it was sent and the time at which its answer was there. One that got no
//! answer, or one that says that the outcome is not known, may have been carried out or not: `told` is None.
//!
//! `log` judges the way from a transaction into the stream (I1 to I7), `queue` deliveries, settlements and attempts (I8, I9),
//! `order` keys (I10), `owners` leases and what was written under them (I11, I12), `liveness` that all is done once faults stop
//! (I13), `letters` dead letters and redrives, `generations` what a seek leaves behind. Each has tests that plant the faults that it exists for.

mod generations;
pub mod letters;
pub mod liveness;
pub mod log;
pub mod order;
pub mod owners;
mod pauses;
pub mod queue;
#[cfg(test)]
mod sample;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard};

use chrono::{DateTime, TimeDelta, Utc};

pub type Time = DateTime<Utc>;

/// The clocks of the broker and of the test are cut to milliseconds.
pub const SLACK: TimeDelta = TimeDelta::milliseconds(5);

/// The broker's time is that of its database, read once at its start: it is behind by the time that the answer took.
pub const BEHIND: TimeDelta = TimeDelta::seconds(1);

/// A request: when it was sent (one that is repeated until it is answered: at first), and when its answer was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    pub at: Time,
    pub answered: Time,
}

/// A message as it was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub key: Option<String>,
}

/// A message that came to a consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivered {
    pub asked: Asked,
    pub generation: u64,
    pub offset: u64,
    pub delivery: u64,
    pub attempt: u64,
    pub receipt: String,
    pub visible_until: Time,
    pub receive_id: Option<String>,
    pub consumer: String,
}

/// What may be done to a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Ack,
    Nack,
    /// Held for so long from then on.
    Extend(TimeDelta),
    Release,
    Reject,
}

impl Verb {
    /// Its place in the API.
    pub fn path(self) -> &'static str {
        match self {
            Self::Ack => "ack",
            Self::Nack => "nack",
            Self::Extend(_) => "extend",
            Self::Release => "release",
            Self::Reject => "reject",
        }
    }
}

/// What the answer said of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub result: String,
    pub due_at: Option<Time>,
    pub visible_until: Option<Time>,
    pub has_letter: bool,
}

/// A verb for one delivery; `told` is None when nobody knows what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    pub asked: Asked,
    pub verb: Verb,
    pub generation: u64,
    pub offset: u64,
    pub delivery: u64,
    pub reason: Option<String>,
    pub told: Option<Told>,
}

impl Settled {
    pub fn is_told(&self, result: &str) -> bool {
        self.told.as_ref().is_some_and(|told| told.result == result)
    }

    /// Whether a letter was told of.
    pub fn has_letter(&self) -> bool {
        self.told.as_ref().is_some_and(|told| told.has_letter)
    }
}

/// Which deliveries a person ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    Consumer(String),
    Offsets(Vec<u64>),
}

/// The order that a queue keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    None,
    Key { holds: bool, batches: bool },
}

/// What a person did to the queue. People ask until they are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Another generation began behind this offset.
    Renewed {
        generation: u64,
        through: u64,
    },
    /// Deleted a message, or found it settled.
    Deleted(u64),
    /// Made a message a dead letter, or found it settled.
    Rejected {
        offset: u64,
        reason: String,
    },
    Expired(Whose),
    /// Removed a dead letter, or found none.
    LetterRemoved {
        generation: u64,
        offset: u64,
    },
    Redriven(Redrive),
    Paused(bool),
    Ordered(Order),
}

/// An act and when it was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    pub asked: Asked,
    pub act: Act,
}

/// A redrive as it was at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redrive {
    pub id: String,
    /// The letters asked for: all without.
    pub offsets: Option<BTreeSet<u64>>,
    pub key: Option<String>,
    pub cause: Option<String>,
    pub is_dry: bool,
    /// `done` or `cancelled`.
    pub status: String,
    pub redriven: u64,
    pub created_at: Option<Time>,
}

/// A delivery that the journal has: it was handed out, whether its answer came to anybody or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journaled {
    pub generation: u64,
    pub offset: u64,
    pub delivery: u64,
    /// Those that one receive was given have the same number.
    pub batch: u64,
    /// The journal says that its answer never reached the wire.
    pub is_unwritten: bool,
    /// The journal says that it was released: by its consumer, or by the node that was to hand it on and could not.
    pub is_released: bool,
}

/// What was seen of a dead letter's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Died(Death),
    /// On its way back.
    Redriven {
        id: String,
        at: Time,
    },
    /// Not on its way back any more: the queue was purged.
    Unmarked,
    Removed,
}

/// A message that became a dead letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    pub generation: u64,
    pub delivery: u64,
    pub attempts: u64,
    pub cause: String,
    /// Moments and reasons, oldest first.
    pub failures: Vec<(Time, String)>,
    pub died_at: Time,
}

/// All of one queue.
#[derive(Debug, Clone)]
pub struct History {
    /// What was answered 2xx.
    pub published: BTreeMap<u64, Published>,
    pub delivered: Vec<Delivered>,
    pub settled: Vec<Settled>,
    pub done: Vec<Done>,
    /// In the order of the commits.
    pub journaled: Vec<Journaled>,
    /// By generation and offset: what the journal has as acknowledged, or as a dead letter that was removed. Where a node passes requests on, it repeats one that another
    /// was killed over, and its client is told `already_settled` of its own ack.
    pub acked: BTreeSet<(u64, u64)>,
    /// By message, in the order of the commits.
    pub letters: BTreeMap<u64, Vec<Seen>>,
    pub rules: Rules,
}

/// The queue that a history is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Least and most that it ever had.
    pub max_attempts: RangeInclusive<u64>,
    /// In the beginning.
    pub order: Order,
}

impl History {
    pub fn new(rules: Rules) -> Self {
        Self {
            published: BTreeMap::new(),
            delivered: Vec::new(),
            settled: Vec::new(),
            done: Vec::new(),
            journaled: Vec::new(),
            acked: BTreeSet::new(),
            letters: BTreeMap::new(),
            rules,
        }
    }

    /// The generations that were begun: when that was asked for and answered, and the first offset of each.
    pub fn renewals(&self) -> impl Iterator<Item = (Asked, u64, u64)> {
        self.done.iter().filter_map(|done| match done.act {
            Act::Renewed {
                generation,
                through,
            } => Some((done.asked, generation, through + 1)),
            _ => None,
        })
    }

    /// The deaths of a message, in order.
    pub fn deaths(&self, offset: u64) -> impl Iterator<Item = &Death> {
        let seen = self.letters.get(&offset).into_iter().flatten();
        seen.filter_map(|seen| match seen {
            Seen::Died(death) => Some(death),
            _ => None,
        })
    }

    /// Whether a message has a dead letter at the end.
    pub fn has_letter(&self, offset: u64) -> bool {
        let last = self.letters.get(&offset).and_then(|seen| seen.last());
        last.is_some_and(|last| *last != Seen::Removed)
    }
}

/// A history that several clients write.
#[derive(Debug)]
pub struct Recorder(Mutex<History>);

impl Recorder {
    pub fn new(rules: Rules) -> Self {
        Self(Mutex::new(History::new(rules)))
    }

    pub fn lock(&self) -> MutexGuard<'_, History> {
        self.0.lock().unwrap()
    }
}

/// Judges a queue's history by all that a queue promises. Faults, each one a line.
pub fn check(history: &History) -> Vec<String> {
    let mut faults = queue::check(history);
    faults.extend(letters::check(history));
    faults.extend(order::check(history));
    faults
}
