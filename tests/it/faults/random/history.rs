//! What consumers asked of a queue and what they were told, in their own words, for the checker to judge afterwards.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use chrono::{DateTime, TimeDelta, Utc};

pub type Time = DateTime<Utc>;

/// A request: when it was sent, and when its answer was there. One that got no answer, or one that says that the outcome is
/// not known, may have been carried out or not.
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
    pub offset: u64,
    pub delivery: u64,
    pub attempt: u64,
    pub receipt: String,
    pub visible_until: Time,
    pub receive_id: Option<String>,
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
    pub offset: u64,
    pub delivery: u64,
    pub told: Option<Told>,
}

/// A dead letter as it is at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    pub attempts: u64,
    pub cause: String,
    pub died_at: Time,
}

/// All of one queue.
#[derive(Debug, Clone, Default)]
pub struct History {
    pub published: BTreeMap<u64, Published>,
    pub delivered: Vec<Delivered>,
    pub settled: Vec<Settled>,
    pub letters: BTreeMap<u64, Letter>,
}

/// A history that several consumers write.
#[derive(Debug, Default)]
pub struct Recorder(Mutex<History>);

impl Recorder {
    pub fn lock(&self) -> MutexGuard<'_, History> {
        self.0.lock().unwrap()
    }
}
