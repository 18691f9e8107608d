//! Dead letters from outside the state machine: their ids, and filters that select them.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::id::{Generation, Offset};
use super::name::TopicPattern;
use super::word::words;

/// Most dead letters named one by one in a redrive.
pub const LETTER_IDS_MAX: usize = 1_000;
/// Most redrives of a queue at a time.
pub const REDRIVES_MAX: usize = 100;
/// Dead letters per second that a redrive can ask for.
pub const REDRIVE_RATE_MAX: u32 = 10_000;
/// Longest id of a redrive, in bytes.
pub const REDRIVE_ID_MAX_BYTES: usize = 100;

/// Names a dead letter in its queue: the generation that the message died in, and its offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LetterId {
    /// The queue's incarnation.
    pub generation: Generation,
    /// The message.
    pub offset: Offset,
}

impl fmt::Display for LetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.generation, self.offset)
    }
}

/// A text that names no dead letter. Completes "`text` …".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is not the id of a dead letter, such as 1-17")]
pub struct LetterIdError;

impl LetterId {
    /// Parses an id as it is shown.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> Result<Self, LetterIdError> {
        let number = |text: &str| {
            let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
            let number = text.parse::<i64>().ok().filter(|_| is_plain);
            number.ok_or(LetterIdError)
        };
        let (generation, offset) = text.split_once('-').ok_or(LetterIdError)?;
        Ok(Self {
            generation: Generation(number(generation)?),
            offset: Offset(number(offset)?),
        })
    }
}

impl Serialize for LetterId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LetterId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

words! {
    /// The reasons why a message dies.
    pub enum Cause {
        /// A consumer or a person rejected it.
        Rejected = "rejected",
        /// It failed as often as the queue allows.
        OutOfAttempts = "out_of_attempts",
    }
}

impl Cause {
    /// Parses the word; the error completes "`text` …".
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        Self::of(text).ok_or("is neither `rejected` nor `out_of_attempts`")
    }
}

words! {
    /// How far a redrive is.
    pub enum RedriveStatus {
        /// It brings letters back.
        Running = "running",
        /// All of its letters were looked at.
        Done = "done",
        /// A person ended it.
        Cancelled = "cancelled",
    }
}

/// A filter on dead letters: it selects those that match every given part. The schema's function `dead_letter_fits` reads the
/// stored form.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Selection {
    /// Only these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ids: Option<Vec<LetterId>>,
    /// Only those that died so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// Only of topics that match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic: Option<TopicPattern>,
    /// Only of this ordering key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Only those one of whose failures has this in its reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Only those that died after this moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub died_after: Option<DateTime<Utc>>,
    /// Only those that died before this moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub died_before: Option<DateTime<Utc>>,
}

impl Selection {
    /// The messages that can be meant at all; None when any can.
    #[must_use]
    pub fn offsets(&self) -> Option<Vec<Offset>> {
        let ids = self.ids.as_ref()?;
        Some(ids.iter().map(|id| id.offset).collect())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_are_shown() {
        let id = LetterId::parse("3-17").unwrap();
        assert_eq!((id.generation, id.offset), (Generation(3), Offset(17)));
        assert_eq!(id.to_string(), "3-17");
        for text in [
            "",
            "3",
            "3-",
            "-3",
            "3-17-1",
            "03-1",
            "3-+1",
            "3-0",
            "1-99999999999999999999",
        ] {
            assert_eq!(LetterId::parse(text), Err(LetterIdError), "{text}");
        }
    }

    #[test]
    fn selections_round_trip() {
        let selection = Selection {
            ids: Some(vec![LetterId::parse("1-2").unwrap()]),
            cause: Some(Cause::OutOfAttempts),
            topic: Some(TopicPattern::parse("orders.*").unwrap()),
            died_after: Some(DateTime::UNIX_EPOCH),
            ..Selection::default()
        };
        let text = serde_json::to_string(&selection).unwrap();
        let shown = r#"{"ids":["1-2"],"cause":"out_of_attempts","topic":"orders.*","died_after":"1970-01-01T00:00:00Z"}"#;
        assert_eq!(text, shown);
        assert_eq!(serde_json::from_str::<Selection>(&text).unwrap(), selection);
        assert_eq!(serde_json::to_string(&Selection::default()).unwrap(), "{}");
    }
}
