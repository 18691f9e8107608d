//! The settings of a queue: how long a delivery is held, how often and when a message is retried, where the queue starts.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::id::Offset;
use super::name::Topic;

/// Default visibility timeout of a queue (docs/protocol.md, Parameters).
pub const VISIBILITY_TIMEOUT: Duration = Duration::from_secs(30);
/// Shortest and longest visibility timeout.
pub const VISIBILITY_TIMEOUT_RANGE: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(12 * 60 * 60));
/// Longest delay of a nack, a release or a retry.
pub const DELAY_MAX: Duration = Duration::from_secs(12 * 60 * 60);
/// A dead letter is kept for so long, unless the queue says otherwise.
pub const DEAD_LETTER_RETENTION: Duration = Duration::from_secs(14 * 24 * 3_600);
/// Shortest and longest retention of dead letters: a minute, and ten years.
pub const DEAD_LETTER_RETENTION_RANGE: (Duration, Duration) = (
    Duration::from_secs(60),
    Duration::from_secs(3_650 * 24 * 3_600),
);
/// Default of attempts before a message is a dead letter.
pub const MAX_ATTEMPTS: u32 = 16;
/// Most attempts that a queue can ask for.
pub const MAX_ATTEMPTS_MAX: u32 = 1_000;
/// Default and upper bound of live deliveries per queue.
pub const MAX_IN_FLIGHT: u32 = 10_000;
/// Releases of one message that are free of charge; each later one counts as an attempt.
pub const FREE_RELEASES: u32 = 99;
/// Most topic patterns of a queue.
pub const PATTERNS_MAX: usize = 100;
/// Longest reason, in bytes.
pub const REASON_MAX_BYTES: usize = 1_024;
/// Longest consumer name and receive id, in bytes.
pub const CONSUMER_MAX_BYTES: usize = 255;

/// The settings of a queue's deliveries. Stored as JSON in the queue's row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// How long a delivery is held for its consumer when the receive does not say; 1 s to 12 h.
    #[serde(rename = "visibility_timeout_ms", with = "millis")]
    pub visibility_timeout: Duration,
    /// Attempts before a message becomes a dead letter; 1 to 1,000.
    pub max_attempts: u32,
    /// When to retry a message that failed.
    pub retry: RetryPolicy,
    /// Most live deliveries at a time; 1 to 10,000.
    pub max_in_flight: u32,
    /// How long one delivery can be held by extending it; unlimited without.
    #[serde(
        rename = "max_hold_ms",
        with = "optional_millis",
        skip_serializing_if = "Option::is_none"
    )]
    pub max_hold: Option<Duration>,
    /// In which order messages go out.
    pub ordering: Ordering,
    /// In order of keys: after a dead letter its key waits for a person.
    pub hold_key: bool,
    /// In order of keys: a receive may take several messages of one key.
    pub key_batches: bool,
    /// Whether messages go out by three lanes. Not together with order by key.
    pub priorities: bool,
    /// How long a dead letter is kept; a minute to ten years.
    #[serde(rename = "dead_letter_retention_ms", with = "millis")]
    pub dead_letter_retention: Duration,
    /// The topic that gets a copy of each dead letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter_topic: Option<Topic>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            visibility_timeout: VISIBILITY_TIMEOUT,
            max_attempts: MAX_ATTEMPTS,
            retry: RetryPolicy::default(),
            max_in_flight: MAX_IN_FLIGHT,
            max_hold: None,
            ordering: Ordering::None,
            hold_key: false,
            key_batches: false,
            priorities: false,
            dead_letter_retention: DEAD_LETTER_RETENTION,
            dead_letter_topic: None,
        }
    }
}

/// In which order a queue hands messages out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ordering {
    /// By offset as far as they are ready; a failed message does not hold others back.
    None,
    /// At most one message of a key in flight; later ones wait for it, and messages without a key for none.
    Key,
}

/// When to retry a message that failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RetryPolicy {
    /// `initial * factor^(attempt - 1)`, at most `cap`, plus or minus a random part.
    Exponential {
        /// Delay after the first attempt.
        #[serde(rename = "initial_ms", with = "millis")]
        initial: Duration,
        /// Growth per attempt; 1 to 10.
        factor: f64,
        /// Longest delay.
        #[serde(rename = "cap_ms", with = "millis")]
        cap: Duration,
        /// Random part: 0.2 means up to 20 % less or more; 0 to 1.
        jitter: f64,
    },
    /// One delay per attempt; the last one holds for all later ones. No random part.
    List {
        /// The delays, 1 to 100 of them.
        #[serde(rename = "delays_ms", with = "list_millis")]
        delays: Vec<Duration>,
    },
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::Exponential {
            initial: Duration::from_secs(1),
            factor: 2.0,
            cap: Duration::from_secs(15 * 60),
            jitter: 0.2,
        }
    }
}

impl RetryPolicy {
    /// The delay after the attempt of this number (from 1). `random` is uniform in 0 to 1.
    #[must_use]
    pub fn delay(&self, attempt: u32, random: f64) -> Duration {
        let step = attempt.saturating_sub(1);
        match self {
            Self::Exponential {
                initial,
                factor,
                cap,
                jitter,
            } => {
                let grown = initial.as_secs_f64() * factor.powi(step.min(1_000) as i32);
                let capped = if grown.is_finite() {
                    grown.min(cap.as_secs_f64())
                } else {
                    cap.as_secs_f64()
                };
                let spread = capped * jitter * (2.0 * random.clamp(0.0, 1.0) - 1.0);
                Duration::from_secs_f64((capped + spread).clamp(0.0, DELAY_MAX.as_secs_f64()))
            }
            Self::List { delays } => delays
                .get(step as usize)
                .or(delays.last())
                .copied()
                .unwrap_or_default(),
        }
    }
}

/// An invalid value of a declaration. Reads as "`field` reason".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {reason}")]
pub struct Fault {
    /// The field, as the API names it.
    pub field: &'static str,
    /// The allowed values, in one clause.
    pub reason: String,
}

fn within<T: PartialOrd>(
    field: &'static str,
    value: &T,
    range: (&T, &T),
    allowed: &str,
) -> Result<(), Fault> {
    if value >= range.0 && value <= range.1 {
        return Ok(());
    }
    Err(Fault {
        field,
        reason: format!("must be {allowed}"),
    })
}

impl Settings {
    /// Checks every value against its range.
    ///
    /// # Errors
    /// The first value out of its range, or one that does not go with the others.
    pub fn check(&self) -> Result<(), Fault> {
        let (shortest, longest) = VISIBILITY_TIMEOUT_RANGE;
        within(
            "visibility_timeout_seconds",
            &self.visibility_timeout,
            (&shortest, &longest),
            "from 1 to 43200",
        )?;
        within(
            "max_attempts",
            &self.max_attempts,
            (&1, &MAX_ATTEMPTS_MAX),
            "from 1 to 1000",
        )?;
        within(
            "max_in_flight",
            &self.max_in_flight,
            (&1, &MAX_IN_FLIGHT),
            "from 1 to 10000",
        )?;
        if let Some(hold) = &self.max_hold {
            let week = Duration::from_secs(7 * 24 * 60 * 60);
            within(
                "max_hold_seconds",
                hold,
                (&shortest, &week),
                "from 1 to 604800",
            )?;
        }
        let (shortest, longest) = DEAD_LETTER_RETENTION_RANGE;
        within(
            "dead_letter_retention_seconds",
            &self.dead_letter_retention,
            (&shortest, &longest),
            "from 60 to 315360000",
        )?;
        let is_ordered = self.ordering == Ordering::Key;
        for (field, is_set) in [
            ("hold_key", self.hold_key),
            ("key_batches", self.key_batches),
        ] {
            if is_set && !is_ordered {
                return Err(Fault {
                    field,
                    reason: "needs `ordering` to be `key`".into(),
                });
            }
        }
        if self.priorities && is_ordered {
            return Err(Fault {
                field: "priorities",
                reason: "cannot be combined with `ordering: key`".into(),
            });
        }
        self.retry.check()
    }
}

impl RetryPolicy {
    fn check(&self) -> Result<(), Fault> {
        match self {
            Self::Exponential {
                initial,
                factor,
                cap,
                jitter,
            } => {
                let none = Duration::ZERO;
                within(
                    "retry.initial_seconds",
                    initial,
                    (&none, &DELAY_MAX),
                    "from 0 to 43200",
                )?;
                within("retry.factor", factor, (&1.0, &10.0), "from 1 to 10")?;
                within(
                    "retry.cap_seconds",
                    cap,
                    (&none, &DELAY_MAX),
                    "from 0 to 43200",
                )?;
                within("retry.jitter", jitter, (&0.0, &1.0), "from 0 to 1")
            }
            Self::List { delays } => {
                within(
                    "retry.delays_seconds",
                    &delays.len(),
                    (&1, &100),
                    "a list of 1 to 100",
                )?;
                match delays.iter().any(|delay| *delay > DELAY_MAX) {
                    true => Err(Fault {
                        field: "retry.delays_seconds",
                        reason: "must hold numbers from 0 to 43200".into(),
                    }),
                    false => Ok(()),
                }
            }
        }
    }
}

/// The place where a queue begins, fixed when the queue is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "at", content = "value", rename_all = "snake_case")]
pub enum Start {
    /// At the oldest message that the stream still has.
    Earliest,
    /// After the newest message at the moment of the declaration.
    Latest,
    /// At this offset; the message of this offset is the first.
    Offset(Offset),
    /// At the first message appended at or after this time.
    Time(DateTime<Utc>),
}

mod millis {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

mod optional_millis {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Duration>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::millis::serialize(value, to),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(Duration::from_millis))
    }
}

mod list_millis {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &[Duration], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(
            value
                .iter()
                .map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)),
        )
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<Duration>, D::Error> {
        Ok(Vec::<u64>::deserialize(from)?
            .into_iter()
            .map(Duration::from_millis)
            .collect())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_cap_and_stay_within_the_jitter() {
        let policy = RetryPolicy::default();
        for (attempt, random, seconds) in [
            (1, 0.5, 1.0),
            (2, 0.5, 2.0),
            (3, 0.0, 3.2),
            (3, 1.0, 4.8),
            (11, 0.5, 900.0),
            (u32::MAX, 0.5, 900.0),
        ] {
            let delay = policy.delay(attempt, random).as_secs_f64();
            assert!(
                (delay - seconds).abs() < 1e-6,
                "{attempt} {random}: {delay}"
            );
        }
        let list = RetryPolicy::List {
            delays: vec![Duration::from_secs(5), Duration::from_secs(7)],
        };
        let seconds = [1, 2, 3, 99].map(|attempt| list.delay(attempt, 0.9).as_secs());
        assert_eq!(seconds, [5, 7, 7, 7]);
    }

    #[test]
    fn settings_round_trip_and_are_checked() {
        let settings = Settings {
            max_hold: Some(Duration::from_secs(60)),
            dead_letter_topic: Some(Topic::parse("dead.letters").unwrap()),
            ..Settings::default()
        };
        let text = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&text).unwrap(), settings);
        assert_eq!(
            serde_json::from_str::<Settings>("{}").unwrap(),
            Settings::default()
        );
        assert_eq!(settings.check(), Ok(()));
        let keyed = Settings {
            ordering: Ordering::Key,
            hold_key: true,
            key_batches: true,
            ..Settings::default()
        };
        assert_eq!(keyed.check(), Ok(()));
        for (field, settings) in [
            (
                "priorities",
                Settings {
                    priorities: true,
                    ..keyed.clone()
                },
            ),
            (
                "hold_key",
                Settings {
                    ordering: Ordering::None,
                    ..keyed.clone()
                },
            ),
            (
                "key_batches",
                Settings {
                    key_batches: true,
                    ..Settings::default()
                },
            ),
        ] {
            assert_eq!(settings.check().unwrap_err().field, field);
        }
        let short = Settings {
            visibility_timeout: Duration::from_millis(999),
            ..Settings::default()
        };
        assert_eq!(
            short.check().unwrap_err().field,
            "visibility_timeout_seconds"
        );
    }
}
