//! The verbs, and the result for each delivery. A refused one is an error.

use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::Method;
use serde::{Deserialize, Serialize};

use super::call::Call;
use super::error::Error;
use super::queue::{Delivery, Queue};
pub use crate::domain::queue::Verb;

/// Most receipts of one request.
pub(super) const BATCH_MAX: usize = 1_000;

/// One delivery that a verb is about.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Item {
    receipt: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    delay_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    visibility_timeout_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Bytes of a reason.
const REASON_MAX_BYTES: usize = 1_024;

impl Item {
    /// About the delivery of this receipt.
    #[must_use]
    pub fn new(receipt: impl Into<String>) -> Self {
        Self {
            receipt: receipt.into(),
            delay_seconds: None,
            visibility_timeout_seconds: None,
            reason: None,
        }
    }

    /// For nack and release: not again before so long, at most 12 h.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay_seconds = Some(delay.as_secs_f64());
        self
    }

    /// For extend: held for so long from now on, 1 s to 12 h.
    #[must_use]
    pub fn visibility_timeout(mut self, timeout: Duration) -> Self {
        self.visibility_timeout_seconds = Some(timeout.as_secs_f64());
        self
    }

    /// Sets the reason of a nack or reject, cut to the 1,024 bytes that are kept; an empty one means none.
    #[must_use]
    pub fn reason(mut self, reason: &str) -> Self {
        let mut reason = reason.replace('\0', "");
        let mut end = reason.len().min(REASON_MAX_BYTES);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason.truncate(end);
        self.reason = Some(reason).filter(|reason| !reason.is_empty());
        self
    }

    /// The receipt.
    #[must_use]
    pub fn receipt(&self) -> &str {
        &self.receipt
    }
}

impl From<&Delivery> for Item {
    fn from(delivery: &Delivery) -> Self {
        Self::new(&delivery.receipt)
    }
}

/// The effect of a verb.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settled {
    /// Done.
    Acked,
    /// For an ack: it was done before, by this ack sent once more, or by somebody else's.
    AlreadySettled,
    /// It is tried again at that time, or has become this dead letter.
    Nacked {
        /// The time when it goes out again.
        due_at: Option<DateTime<Utc>>,
        /// The dead letter that it has become, if it ran out of attempts.
        dead_letter: Option<String>,
    },
    /// It goes out again at that time.
    Released {
        /// The time when it goes out again.
        due_at: Option<DateTime<Utc>>,
        /// The dead letter that it has become, if it was released too often.
        dead_letter: Option<String>,
    },
    /// It is held until then.
    Extended {
        /// It is held until then.
        visible_until: DateTime<Utc>,
    },
    /// It is this dead letter now.
    Rejected {
        /// Its id.
        dead_letter: String,
    },
}

/// A delivery that a verb had no effect on: its holder should not believe otherwise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the broker refused to {verb} a delivery: {refusal}", verb = verb_name(*.verb))]
pub struct Refused {
    /// The requested verb.
    pub verb: Verb,
    /// The receipt.
    pub receipt: String,
    /// The reason for the refusal.
    pub refusal: Refusal,
}

/// Reasons why a verb had no effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It was settled before.
    #[error("it is already settled")]
    AlreadySettled,
    /// It is a dead letter.
    #[error("it has become the dead letter {dead_letter}")]
    DeadLettered {
        /// Its id.
        dead_letter: String,
    },
    /// It expired and was handed out again, as this attempt; or, for an extend, its own consumer ended it.
    #[error("a later delivery exists, attempt {attempt}")]
    Stale {
        /// The current attempt.
        attempt: u32,
    },
    /// The message is gone: the queue was purged, moved or created again, or retention's hard limit passed it.
    #[error("it is gone")]
    Gone,
    /// An earlier message of its key in the same batch is not settled.
    #[error("an earlier message of its key is not settled")]
    Blocked,
    /// Not a receipt of this queue.
    #[error("the broker does not know it")]
    Unknown,
    /// Something newer than this client.
    #[error("`{0}`")]
    Other(String),
}

impl Refusal {
    /// True if the delivery no longer belongs to this consumer. Work on it is in vain.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        !matches!(self, Self::Blocked | Self::Other(_))
    }
}

/// The result for each delivery, in the order of the request.
#[derive(Debug, Clone, Default, PartialEq)]
#[must_use = "a delivery may be refused"]
pub struct Outcomes(Vec<Result<Settled, Refused>>);

impl Outcomes {
    /// All of them, or the first that was refused.
    ///
    /// # Errors
    /// The first that was refused.
    pub fn all(self) -> Result<Vec<Settled>, Refused> {
        self.0.into_iter().collect()
    }

    /// The refused deliveries.
    pub fn refused(&self) -> impl Iterator<Item = &Refused> {
        self.0.iter().filter_map(|outcome| outcome.as_ref().err())
    }

    /// One by one, in the order sent.
    pub fn iter(&self) -> std::slice::Iter<'_, Result<Settled, Refused>> {
        self.0.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn read(verb: Verb, wire: Settlement) -> Self {
        let outcomes = wire.deliveries.into_iter().map(|wire| wire.outcome(verb));
        Self(outcomes.collect())
    }
}

impl IntoIterator for Outcomes {
    type Item = Result<Settled, Refused>;
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a> IntoIterator for &'a Outcomes {
    type Item = &'a Result<Settled, Refused>;
    type IntoIter = std::slice::Iter<'a, Result<Settled, Refused>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The answer to a verb.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Settlement {
    deliveries: Vec<WireOutcome>,
}

#[derive(Debug, Deserialize)]
struct WireOutcome {
    receipt: String,
    result: String,
    due_at: Option<DateTime<Utc>>,
    visible_until: Option<DateTime<Utc>>,
    dead_letter: Option<String>,
    attempt: Option<u32>,
}

impl WireOutcome {
    fn outcome(self, verb: Verb) -> Result<Settled, Refused> {
        let dead_letter = || self.dead_letter.clone().unwrap_or_default();
        let refusal = match (self.result.as_str(), self.visible_until) {
            ("acked", _) => return Ok(Settled::Acked),
            ("already_settled", _) if verb == Verb::Ack => return Ok(Settled::AlreadySettled),
            ("nacked", _) => {
                return Ok(Settled::Nacked {
                    due_at: self.due_at,
                    dead_letter: self.dead_letter,
                });
            }
            ("released", _) => {
                return Ok(Settled::Released {
                    due_at: self.due_at,
                    dead_letter: self.dead_letter,
                });
            }
            ("extended", Some(visible_until)) => return Ok(Settled::Extended { visible_until }),
            ("rejected", _) => {
                return Ok(Settled::Rejected {
                    dead_letter: dead_letter(),
                });
            }
            ("already_settled", _) => Refusal::AlreadySettled,
            ("dead_lettered", _) => Refusal::DeadLettered {
                dead_letter: dead_letter(),
            },
            ("stale", _) => Refusal::Stale {
                attempt: self.attempt.unwrap_or_default(),
            },
            ("gone", _) => Refusal::Gone,
            ("blocked", _) => Refusal::Blocked,
            ("unknown", _) => Refusal::Unknown,
            (other, _) => Refusal::Other(other.to_owned()),
        };
        Err(Refused {
            verb,
            receipt: self.receipt,
            refusal,
        })
    }
}

fn verb_name(verb: Verb) -> &'static str {
    match verb {
        Verb::Ack => "ack",
        Verb::Nack => "nack",
        Verb::Extend => "extend",
        Verb::Release => "release",
        Verb::Reject => "reject",
    }
}

impl Queue {
    /// Settles a delivery: done. That it was done before is a success.
    ///
    /// # Errors
    /// [`Error::Refused`], or a failed call.
    pub async fn ack(&self, delivery: impl Into<Item>) -> Result<Settled, Error> {
        self.settle_one(Verb::Ack, delivery.into()).await
    }

    /// Gives a delivery back as failed: it is tried again later, or is out of attempts and becomes a dead letter.
    ///
    /// # Errors
    /// [`Error::Refused`], or a failed call.
    pub async fn nack(&self, delivery: impl Into<Item>) -> Result<Settled, Error> {
        self.settle_one(Verb::Nack, delivery.into()).await
    }

    /// Holds a delivery for longer, from now on.
    ///
    /// # Errors
    /// [`Error::Refused`], or a failed call.
    pub async fn extend(&self, delivery: impl Into<Item>) -> Result<Settled, Error> {
        self.settle_one(Verb::Extend, delivery.into()).await
    }

    /// Gives a delivery back unhandled: the attempt does not count.
    ///
    /// # Errors
    /// [`Error::Refused`], or a failed call.
    pub async fn release(&self, delivery: impl Into<Item>) -> Result<Settled, Error> {
        self.settle_one(Verb::Release, delivery.into()).await
    }

    /// Refuses a delivery for good: it becomes a dead letter.
    ///
    /// # Errors
    /// [`Error::Refused`], or a failed call.
    pub async fn reject(&self, delivery: impl Into<Item>) -> Result<Settled, Error> {
        self.settle_one(Verb::Reject, delivery.into()).await
    }

    async fn settle_one(&self, verb: Verb, item: Item) -> Result<Settled, Error> {
        let receipt = item.receipt.clone();
        let outcomes = self.settle(verb, vec![item]).await?;
        let outcome = outcomes.into_iter().next();
        let nothing = || Refused {
            verb,
            receipt,
            refusal: Refusal::Other("it has no result".to_owned()),
        };
        Ok(outcome.ok_or_else(nothing)??)
    }

    /// Carries out a verb for many deliveries, 1,000 per request, and returns the result for each, in order.
    ///
    /// # Errors
    /// A failed call. Requests before it took effect; sending the same again is safe.
    pub async fn settle(&self, verb: Verb, items: Vec<Item>) -> Result<Outcomes, Error> {
        #[derive(Serialize)]
        struct Body<'a> {
            deliveries: &'a [Item],
        }
        let mut outcomes = Outcomes::default();
        for deliveries in items.chunks(BATCH_MAX) {
            let path = self.path(&format!("/{}", verb_name(verb)));
            let call = Call::new(Method::POST, path).json(&Body { deliveries })?;
            let settlement = self.client().ask(call).await?;
            outcomes.0.extend(Outcomes::read(verb, settlement));
        }
        Ok(outcomes)
    }
}
