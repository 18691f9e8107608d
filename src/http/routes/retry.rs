//! The retry policy on the wire, and the delays that it leads to.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Number;
use utoipa::ToSchema;

use super::queues::TWELVE_HOURS;
use crate::domain::policy::RetryPolicy;
use crate::http::extract::Check;

/// Delays that the preview lists.
const PREVIEW_MAX: usize = 100;

/// Either the first four, with defaults of 1, 2, 900 and 0.2, or `delays_seconds`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Retry {
    /// The delay after the first attempt.
    #[schema(minimum = 0, maximum = 43200)]
    initial_seconds: Option<f64>,
    /// The growth of the delay per attempt.
    #[schema(minimum = 1, maximum = 10)]
    factor: Option<f64>,
    /// The longest delay.
    #[schema(minimum = 0, maximum = 43200)]
    cap_seconds: Option<f64>,
    /// The random part of the delay: 0.2 means up to 20 % less or more.
    #[schema(minimum = 0, maximum = 1)]
    jitter: Option<f64>,
    /// One delay per attempt. The last one applies to all further attempts.
    #[schema(min_items = 1, max_items = 100)]
    delays_seconds: Option<Vec<f64>>,
}

/// When to retry a message that failed.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum RetryNow {
    Growing {
        initial_seconds: Seconds,
        factor: f64,
        cap_seconds: Seconds,
        jitter: f64,
    },
    List {
        delays_seconds: Vec<Seconds>,
    },
}

/// The delays that the retry policy leads to, without their random part. After an expiry the first two retries are immediate.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RetrySchedule {
    /// The delay after each attempt except the last; at most the first hundred.
    delays_seconds: Vec<Seconds>,
    /// The sum of all delays: the least time from the first failure to the dead letter.
    total_seconds: Seconds,
}

impl RetrySchedule {
    pub(super) fn new(policy: &RetryPolicy, max_attempts: u32) -> Self {
        // The middle of the random part is zero.
        let delays = (1..max_attempts).map(|attempt| policy.delay(attempt, 0.5));
        Self {
            delays_seconds: delays.clone().take(PREVIEW_MAX).map(seconds).collect(),
            total_seconds: seconds(delays.sum()),
        }
    }
}

/// Seconds as a JSON number, without a fraction when they are whole.
#[derive(Debug, Serialize, ToSchema)]
#[schema(value_type = f64)]
pub(super) struct Seconds(Number);

pub(super) fn seconds(duration: Duration) -> Seconds {
    Seconds(match duration.subsec_nanos() {
        0 => duration.as_secs().into(),
        _ => Number::from_f64(duration.as_secs_f64()).expect("a duration is finite"),
    })
}

impl From<RetryPolicy> for RetryNow {
    fn from(policy: RetryPolicy) -> Self {
        match policy {
            RetryPolicy::Exponential {
                initial,
                factor,
                cap,
                jitter,
            } => Self::Growing {
                initial_seconds: seconds(initial),
                factor,
                cap_seconds: seconds(cap),
                jitter,
            },
            RetryPolicy::List { delays } => Self::List {
                delays_seconds: delays.into_iter().map(seconds).collect(),
            },
        }
    }
}

impl Retry {
    pub(super) fn checked(self, check: &mut Check) -> RetryPolicy {
        if let Some(delays) = self.delays_seconds {
            let others = [
                self.initial_seconds,
                self.factor,
                self.cap_seconds,
                self.jitter,
            ];
            if others.iter().any(Option::is_some) {
                check.fault(
                    "/retry/delays_seconds",
                    "`delays_seconds` cannot be combined with the other fields",
                );
            }
            if delays.is_empty() || delays.len() > 100 {
                check.fault(
                    "/retry/delays_seconds",
                    "`delays_seconds` must have 1 to 100 numbers",
                );
            }
            let delays = delays.iter().take(100).enumerate().map(|(index, value)| {
                check.seconds(
                    &format!("/retry/delays_seconds/{index}"),
                    *value,
                    0.0..=TWELVE_HOURS,
                )
            });
            return RetryPolicy::List {
                delays: delays.collect(),
            };
        }
        RetryPolicy::Exponential {
            initial: check.seconds(
                "/retry/initial_seconds",
                self.initial_seconds.unwrap_or(1.0),
                0.0..=TWELVE_HOURS,
            ),
            factor: check.number("/retry/factor", self.factor.unwrap_or(2.0), 1.0..=10.0),
            cap: check.seconds(
                "/retry/cap_seconds",
                self.cap_seconds.unwrap_or(900.0),
                0.0..=TWELVE_HOURS,
            ),
            jitter: check.number("/retry/jitter", self.jitter.unwrap_or(0.2), 0.0..=1.0),
        }
    }
}
