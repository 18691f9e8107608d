//! The ways in which a call can fail, typed: no answer, a problem document, one refused delivery.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use super::verbs::Refused;
use crate::domain::name;
use crate::domain::problem::problem_kinds;

/// The reasons why a call fails. Calls are repeated automatically where a repeat can help, so an error here means that the
/// call was tried for as long as [`super::Options::deadline`] says.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer, or one that broke off: the broker is unreachable, or has just stopped. A write may or may not have happened;
    /// the same call again is safe.
    #[error("{call} got no answer")]
    NoAnswer {
        /// Method and path.
        call: String,
        /// The HTTP client's error.
        #[source]
        source: reqwest::Error,
    },
    /// The broker, or something before it, refused the call.
    #[error("{call} was refused: {problem}")]
    Problem {
        /// Method and path.
        call: String,
        /// The broker's problem document.
        problem: Box<Problem>,
    },
    /// The broker did the call and refused this delivery.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A worker stopped and could not report the results of its deliveries: the broker was unreachable for too long. Those messages
    /// come again.
    #[error("the worker stopped before it could report the results of {count} deliveries")]
    Untold {
        /// How many.
        count: usize,
    },
    /// The answer is not what the contract says.
    #[error("{call} gave an unexpected answer")]
    Answer {
        /// Method and path.
        call: String,
        /// The difference in the JSON.
        #[source]
        source: serde_json::Error,
    },
    /// The value to publish has no JSON form.
    #[error("the payload cannot be written as JSON")]
    Payload(#[source] serde_json::Error),
    /// A queue's, stream's or topic's name breaks the rules of names.
    #[error(transparent)]
    Name(#[from] name::Error),
    /// The HTTP client could not be made.
    #[error("making an HTTP client failed")]
    Client(#[source] reqwest::Error),
}

impl Error {
    /// True if the same call may succeed later: the broker is unreachable, starting or overloaded.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NoAnswer { source, .. } => !source.is_builder(),
            Self::Problem { problem, .. } => problem.is_transient(),
            _ => false,
        }
    }

    /// The broker's problem document, if the answer was one.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem { problem, .. } => Some(problem),
            _ => None,
        }
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $slug:literal, $status:literal, $title:literal;)*) => {
        /// The kinds of problem. Each has a page in `docs/problems`.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum ProblemKind {
            $($(#[$doc])* $name,)*
            /// One that this client does not know, or an answer that is no problem document: what stands in its `type`.
            Other(String),
        }

        impl ProblemKind {
            fn of(uri: &str) -> Self {
                match uri.rsplit('/').next().unwrap_or_default() {
                    $($slug => Self::$name,)*
                    _ => Self::Other(uri.to_owned()),
                }
            }
        }
    };
}

problem_kinds!(kinds);

/// A refusal's problem document (RFC 9457).
#[derive(Debug, Clone)]
pub struct Problem {
    /// Its kind.
    pub kind: ProblemKind,
    /// The HTTP status.
    pub status: u16,
    /// Details of this occurrence.
    pub detail: String,
    /// The request's id, as it stands in the broker's log.
    pub request_id: Option<String>,
    /// The parts of the request that break rules.
    pub errors: Vec<ProblemField>,
    /// How long to wait before a repeat, if it was said.
    pub retry_after: Option<Duration>,
    /// The version that the key is at, of a [`ProblemKind::VersionConflict`].
    pub version: Option<i64>,
}

/// A part of the request that breaks a rule.
#[derive(Debug, Clone, Deserialize)]
pub struct ProblemField {
    /// A JSON pointer into the body.
    pub pointer: Option<String>,
    /// A parameter of the path or the query.
    pub parameter: Option<String>,
    /// A header.
    pub header: Option<String>,
    /// The fault.
    pub detail: String,
}

#[derive(Deserialize)]
struct Document {
    #[serde(rename = "type")]
    kind: String,
    detail: Option<String>,
    request_id: Option<String>,
    #[serde(default)]
    errors: Vec<ProblemField>,
    version: Option<i64>,
}

/// As much of an answer that is no problem document as an error shows.
const SHOWN_CHARS: usize = 200;

impl Problem {
    pub(super) fn read(status: u16, retry_after: Option<Duration>, body: &[u8]) -> Self {
        if let Ok(document) = serde_json::from_slice::<Document>(body) {
            return Self {
                kind: ProblemKind::of(&document.kind),
                status,
                detail: document.detail.unwrap_or_default(),
                request_id: document.request_id,
                errors: document.errors,
                retry_after,
                version: document.version,
            };
        }
        let text = String::from_utf8_lossy(body);
        Self {
            kind: ProblemKind::Other(String::new()),
            status,
            detail: text.chars().take(SHOWN_CHARS).collect(),
            request_id: None,
            errors: Vec::new(),
            retry_after,
            version: None,
        }
    }

    /// Too much at once, no owner, stopping, or a proxy without a broker behind it. A failure of the broker's own, 500,
    /// is not among them: it would come again.
    fn is_transient(&self) -> bool {
        matches!(self.status, 408 | 421 | 429 | 502 | 503 | 504)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.status, self.detail)?;
        match &self.request_id {
            Some(id) => write!(f, " (request {id})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::problem::Kind;

    #[test]
    fn every_kind_that_the_broker_answers_has_a_name_here() {
        for kind in Kind::ALL {
            let found = ProblemKind::of(&kind.uri());
            let name = format!("{kind:?}");
            assert_eq!(format!("{found:?}"), name, "{}", kind.slug());
        }
        let other = ProblemKind::of("/problems/teapot");
        assert_eq!(other, ProblemKind::Other("/problems/teapot".to_owned()));
    }
}
