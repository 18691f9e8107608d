//! Names that people choose: topics, patterns over topics, streams, queues, origins. They are parsed once, at the edge.

use std::fmt;
use std::sync::Arc;

/// The longest topic or pattern, in bytes (docs/protocol.md, Parameters).
pub const TOPIC_MAX_BYTES: usize = 255;
/// The longest name of a stream, queue or origin, in bytes.
pub const NAME_MAX_BYTES: usize = 100;

/// Reasons why a name is refused. The text is one clause that completes "`name` …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The name has no characters.
    #[error("must not be empty")]
    Empty,
    /// The name is longer than its limit.
    #[error("is {length} bytes long, at most {limit} are allowed")]
    TooLong {
        /// Bytes in the name.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// A token between dots is empty or has a character that is not allowed.
    #[error(
        "has the token `{token}`: tokens are one or more of A-Z a-z 0-9 _ -, separated by dots"
    )]
    Token {
        /// The offending token.
        token: String,
    },
    /// `>` stands before the last token of a pattern.
    #[error("has `>` before its end: `>` matches the rest and can only be the last token")]
    RestNotLast,
    /// A plain name that paths take for a step.
    #[error("consists of dots only: a name needs a letter, a digit, _ or -")]
    Dots,
    /// A plain name has a character that is not allowed.
    #[error("has the character `{character}`: names are one or more of A-Z a-z 0-9 _ - .")]
    Character {
        /// The offending character.
        character: char,
    },
}

fn is_token(token: &str) -> bool {
    !token.is_empty()
        && token
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

fn check_length(text: &str, limit: usize) -> Result<(), Error> {
    match text.len() {
        0 => Err(Error::Empty),
        length if length > limit => Err(Error::TooLong { length, limit }),
        _ => Ok(()),
    }
}

/// The dot-separated name a message is published to: `orders.created`. Tokens of `[A-Za-z0-9_-]`, 255 bytes at most.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Topic(Arc<str>);

impl Topic {
    /// Parses a topic.
    ///
    /// # Errors
    /// The rule that the text breaks.
    pub fn parse(text: &str) -> Result<Self, Error> {
        check_length(text, TOPIC_MAX_BYTES)?;
        match text.split('.').find(|token| !is_token(token)) {
            Some(token) => Err(Error::Token {
                token: token.to_owned(),
            }),
            None => Ok(Self(text.into())),
        }
    }

    /// The topic as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A pattern over topics: `*` stands for exactly one token, a final `>` for one or more. A topic is its own pattern.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicPattern(Arc<str>);

impl TopicPattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// The rule that the text breaks.
    pub fn parse(text: &str) -> Result<Self, Error> {
        check_length(text, TOPIC_MAX_BYTES)?;
        let mut tokens = text.split('.').peekable();
        while let Some(token) = tokens.next() {
            match token {
                ">" if tokens.peek().is_some() => return Err(Error::RestNotLast),
                ">" | "*" => {}
                token if is_token(token) => {}
                token => {
                    return Err(Error::Token {
                        token: token.to_owned(),
                    });
                }
            }
        }
        Ok(Self(text.into()))
    }

    /// The pattern as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the topic matches.
    #[must_use]
    pub fn matches(&self, topic: &Topic) -> bool {
        let mut topic = topic.0.split('.');
        for token in self.0.split('.') {
            match (token, topic.next()) {
                (_, None) => return false,
                (">", Some(_)) => return true,
                ("*", Some(_)) => {}
                (token, Some(other)) if token == other => {}
                _ => return false,
            }
        }
        topic.next().is_none()
    }

    /// Whether some topic matches both patterns. Streams own disjoint patterns: an overlap is refused.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let mut left = self.0.split('.');
        let mut right = other.0.split('.');
        loop {
            match (left.next(), right.next()) {
                (None, None) => return true,
                (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
                (None, _) | (_, None) => return false,
                (Some("*"), _) | (_, Some("*")) => {}
                (Some(a), Some(b)) if a == b => {}
                _ => return false,
            }
        }
    }
}

macro_rules! plain_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Parses a name of `[A-Za-z0-9_.-]`, 100 bytes at most and not dots alone: in a path, `.` and `..` are steps, which
            /// proxies and clients take before anybody else sees them.
            ///
            /// # Errors
            /// The rule that the text breaks.
            pub fn parse(text: &str) -> Result<Self, Error> {
                check_length(text, NAME_MAX_BYTES)?;
                match text
                    .chars()
                    .find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '_' | '-' | '.'))
                {
                    Some(character) => Err(Error::Character { character }),
                    None if text.bytes().all(|byte| byte == b'.') => Err(Error::Dots),
                    None => Ok(Self(text.into())),
                }
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
    };
}

plain_name!(
    /// The name of a stream.
    StreamName
);
plain_name!(
    /// The name of a queue.
    QueueName
);
plain_name!(
    /// The name of an origin, a database with an outbox.
    OriginName
);
plain_name!(
    /// The name of a schedule of recurring messages.
    ScheduleName
);
plain_name!(
    /// The name of a user's lock.
    LockName
);

impl StreamName {
    /// The stream that takes what no other stream's patterns claim. Always there.
    #[must_use]
    pub fn main() -> Self {
        Self("main".into())
    }
}

impl OriginName {
    /// The broker's own database, an origin by default.
    #[must_use]
    pub fn local() -> Self {
        Self("local".into())
    }
}

macro_rules! text_traits {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:?})", stringify!($name), &*self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                Self::parse(text)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                Self::parse(&text)
                    .map_err(|error| serde::de::Error::custom(format!("`{text}` {error}")))
            }
        }
    )*};
}

text_traits!(
    Topic,
    TopicPattern,
    StreamName,
    QueueName,
    OriginName,
    ScheduleName,
    LockName
);

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn topics_and_patterns_parse() {
        for (text, topic, pattern) in [
            ("orders", true, true),
            ("orders.created", true, true),
            ("orders.*", false, true),
            ("orders.>", false, true),
            (">", false, true),
            ("*.created", false, true),
            ("orders.>.x", false, false),
            ("", false, false),
            ("orders..x", false, false),
            (".orders", false, false),
            ("orders.", false, false),
            ("orders.cre ated", false, false),
            ("orders.é", false, false),
        ] {
            assert_eq!(Topic::parse(text).is_ok(), topic, "topic {text}");
            assert_eq!(TopicPattern::parse(text).is_ok(), pattern, "pattern {text}");
        }
        assert!(Topic::parse(&"a".repeat(255)).is_ok());
        assert!(Topic::parse(&"a".repeat(256)).is_err());
    }

    #[test]
    fn names_are_no_steps_of_a_path() {
        for name in [".", "..", "...", &".".repeat(100)] {
            assert_eq!(QueueName::parse(name), Err(Error::Dots));
            assert_eq!(StreamName::parse(name), Err(Error::Dots));
            assert_eq!(OriginName::parse(name), Err(Error::Dots));
            assert_eq!(ScheduleName::parse(name), Err(Error::Dots));
            assert_eq!(LockName::parse(name), Err(Error::Dots));
            assert!(Topic::parse(name).is_err() && TopicPattern::parse(name).is_err());
        }
        for name in [".a", "a.", "..-", "._.", "a..b"] {
            assert!(QueueName::parse(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn patterns_match() {
        for (pattern, topic, matches) in [
            ("orders.*", "orders.created", true),
            ("orders.*", "orders", false),
            ("orders.*", "orders.created.eu", false),
            ("orders.>", "orders.created.eu", true),
            ("orders.>", "orders", false),
            (">", "orders", true),
            ("*.created", "orders.created", true),
            ("orders", "orders", true),
            ("orders", "order", false),
        ] {
            let found = TopicPattern::parse(pattern)
                .unwrap()
                .matches(&Topic::parse(topic).unwrap());
            assert_eq!(found, matches, "{pattern} {topic}");
        }
    }

    #[test]
    fn patterns_overlap() {
        for (left, right, overlaps) in [
            ("orders.*", "orders.created", true),
            ("orders.*", "orders.>", true),
            ("orders.>", "orders", false),
            ("orders.*", "*.created", true),
            ("orders.*.eu", "orders.created", false),
            (">", "a.b.c", true),
            ("a.b", "a.c", false),
            ("*", "a.b", false),
        ] {
            let a = TopicPattern::parse(left).unwrap();
            let b = TopicPattern::parse(right).unwrap();
            assert_eq!(a.overlaps(&b), overlaps, "{left} {right}");
            assert_eq!(b.overlaps(&a), overlaps, "{right} {left}");
        }
    }
}
