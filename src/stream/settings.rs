//! A stream's declaration and its description.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::domain::id::{Offset, StreamId};
use crate::domain::name::{StreamName, TopicPattern};
use crate::domain::retention::Retention;

/// The most patterns that one stream can own.
pub const PATTERN_MAX_COUNT: usize = 1_000;
/// The least retention in bytes: partitions cannot be small enough to keep less.
pub const RETENTION_MIN_BYTES: u64 = 1 << 20;

/// A stream's settings, as declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The topics that the stream owns. `main` has none: it takes all that no other stream owns.
    pub patterns: Vec<TopicPattern>,
    /// How long its messages are kept.
    pub retention: Retention,
    /// Whether its keys are indexed, and its messages may expect versions of them. Fixed once it has had a message.
    pub is_keyed: bool,
}

/// The rule that settings break.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// Two patterns of the same stream match the same topic.
    #[error("pattern `{pattern}` overlaps `{other}` of the same stream")]
    PatternsOverlap {
        /// The later pattern.
        pattern: TopicPattern,
        /// The earlier pattern.
        other: TopicPattern,
    },
    /// More patterns than a stream can own.
    #[error("{count} patterns, at most {PATTERN_MAX_COUNT} are allowed")]
    TooManyPatterns {
        /// Patterns declared.
        count: usize,
    },
    /// A stream other than `main` without a pattern would never hold a message.
    #[error("at least one pattern is needed")]
    NoPatterns,
    /// `main` takes what no other stream claims.
    #[error("stream `main` owns no patterns: it takes what no other stream claims")]
    PatternsOfMain,
    /// The hard limit would drop messages before the retention of settled ones.
    #[error("the limit for unsettled messages is shorter than the retention of settled ones")]
    LimitBelowRetention,
    /// Fewer bytes than a partition has.
    #[error("a retention must be at least {RETENTION_MIN_BYTES} bytes")]
    TooFewBytes,
    /// A retention of nothing, or of more than a hundred years.
    #[error("a retention must be from 1 second to 100 years")]
    OutOfRange,
}

impl Settings {
    /// Checks the rules that concern this stream alone; that patterns of streams are disjoint is checked by the declare.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self, name: &StreamName) -> Result<(), SettingsError> {
        let is_main = *name == StreamName::main();
        if is_main && !self.patterns.is_empty() {
            return Err(SettingsError::PatternsOfMain);
        }
        if !is_main && self.patterns.is_empty() {
            return Err(SettingsError::NoPatterns);
        }
        if self.patterns.len() > PATTERN_MAX_COUNT {
            return Err(SettingsError::TooManyPatterns {
                count: self.patterns.len(),
            });
        }
        for (place, pattern) in self.patterns.iter().enumerate() {
            if let Some(other) = self.patterns[..place].iter().find(|p| p.overlaps(pattern)) {
                return Err(SettingsError::PatternsOverlap {
                    pattern: pattern.clone(),
                    other: other.clone(),
                });
            }
        }
        let allowed = Duration::from_secs(1)..=Duration::from_secs(100 * 366 * 86_400);
        let Retention {
            settled,
            settled_bytes,
            unsettled,
            unsettled_bytes,
        } = self.retention;
        let mut ages = settled.iter().chain(&unsettled);
        let mut sizes = settled_bytes.iter().chain(&unsettled_bytes);
        if !ages.all(|age| allowed.contains(age)) {
            return Err(SettingsError::OutOfRange);
        }
        if !sizes.all(|&bytes| bytes >= RETENTION_MIN_BYTES) {
            return Err(SettingsError::TooFewBytes);
        }
        // What drops everything may not come before what drops only what is settled.
        if unsettled.is_some_and(|limit| settled.is_none_or(|settled| limit < settled)) {
            return Err(SettingsError::LimitBelowRetention);
        }
        let is_less = |limit| settled_bytes.is_some_and(|settled| limit < settled);
        if unsettled_bytes.is_some_and(is_less) {
            return Err(SettingsError::LimitBelowRetention);
        }
        Ok(())
    }
}

/// How far ahead a description looks for scheduled messages.
pub const SCHEDULED_AHEAD: Duration = Duration::from_secs(86_400);

/// The result of a declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// The stream is new.
    Created,
    /// It was there with these settings.
    Unchanged,
    /// It was there with other settings, which these have replaced.
    Changed,
}

/// A stream as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// Its number.
    pub id: StreamId,
    /// Its name.
    pub name: StreamName,
    /// The topics that it owns.
    pub patterns: Vec<TopicPattern>,
    /// How long its messages are kept.
    pub retention: Retention,
    /// Whether its keys are indexed.
    pub is_keyed: bool,
    /// The first offset still there; one past `last_offset` when all are gone.
    pub first_offset: Offset,
    /// The last offset given out; `Offset(0)` before the first message.
    pub last_offset: Offset,
    /// Bytes on disk of its messages, about.
    pub message_bytes: u64,
    /// The share of the hard limits, from 0 to 1, that unsettled messages use, as last seen by the node that does retention; `None`
    /// without a hard limit, or where it is not known.
    pub unsettled_limit_used: Option<f64>,
    /// Its scheduled messages; `None` if it never had any.
    pub scheduled: Option<ScheduledState>,
    /// The time of its creation.
    pub created_at: DateTime<Utc>,
}

/// How a stream stands with the messages that are to enter it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduledState {
    /// The due time of the next one, cancelled or not, if it is within [`SCHEDULED_AHEAD`]; in the past while publishing is late.
    pub next_due_at: Option<DateTime<Utc>>,
    /// How long it has been due.
    pub lag: Duration,
    /// How many there are, 100,000 at most; `None` where streams are listed.
    pub waiting: Option<i64>,
}

/// A stream, as who reads it needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Its number.
    pub id: StreamId,
    /// The first offset still there; one past the last when all are gone.
    pub first_offset: Offset,
    /// Whether its keys are indexed.
    pub is_keyed: bool,
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn check(name: &str, patterns: &[&str], settled: u64, unsettled: Option<u64>) -> String {
        Settings {
            patterns: patterns
                .iter()
                .map(|p| TopicPattern::parse(p).unwrap())
                .collect(),
            retention: Retention {
                settled: Some(Duration::from_secs(settled)),
                unsettled: unsettled.map(Duration::from_secs),
                ..Retention::default()
            },
            is_keyed: false,
        }
        .validate(&StreamName::parse(name).unwrap())
        .map_or_else(|error| error.to_string(), |()| "valid".to_owned())
    }

    #[test]
    fn settings_name_the_rule_they_break() {
        assert_eq!(check("orders", &["orders.>"], 60, None), "valid");
        assert_eq!(check("main", &[], 60, Some(60)), "valid");
        assert!(check("main", &["a"], 60, None).contains("owns no patterns"));
        assert!(check("orders", &[], 60, None).contains("at least one pattern"));
        assert!(check("orders", &["a.*", "a.b"], 60, None).contains("`a.b` overlaps `a.*`"));
        assert!(check("orders", &["a"], 60, Some(59)).contains("shorter"));
        assert!(check("orders", &["a"], 0, None).contains("from 1 second"));
    }
}
