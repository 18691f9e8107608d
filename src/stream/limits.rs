//! How near each stream's unsettled messages are to its hard limit, beyond which retention drops them. The broker warns
//! from one half on: in the log once an hour, in a metric and in the stream's description.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::metrics::Metrics;
use crate::domain::id::StreamId;
use crate::domain::name::StreamName;
use crate::domain::retention::Retention;

/// The share from which on it is warned.
const WARN_FROM: f64 = 0.5;
const WARN_PAUSE: Duration = Duration::from_secs(3_600);

/// The messages of a stream that some queue has not settled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unsettled {
    /// The time when its oldest message was appended.
    pub(super) since: DateTime<Utc>,
    /// Bytes on disk, about.
    pub(super) bytes: u64,
}

/// The shares of the hard limits that are used up.
#[derive(Debug, Default)]
pub(super) struct Limits {
    streams: Mutex<HashMap<StreamId, Share>>,
}

#[derive(Debug)]
struct Share {
    name: StreamName,
    used: f64,
    warned_at: Option<Instant>,
}

/// The share of its hard limits that a stream has used up, the larger one.
fn share(retention: &Retention, unsettled: Option<Unsettled>, now: DateTime<Utc>) -> f64 {
    let Some(unsettled) = unsettled else {
        return 0.0;
    };
    let age = (now - unsettled.since).to_std().unwrap_or_default();
    let by_age = retention
        .unsettled
        .map_or(0.0, |limit| age.as_secs_f64() / limit.as_secs_f64());
    let by_bytes = retention
        .unsettled_bytes
        .map_or(0.0, |limit| unsettled.bytes as f64 / limit as f64);
    by_age.max(by_bytes).min(1.0)
}

impl Limits {
    fn streams(&self) -> MutexGuard<'_, HashMap<StreamId, Share>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn used(&self, stream: StreamId) -> Option<f64> {
        self.streams().get(&stream).map(|share| share.used)
    }

    /// Notes how a stream stands, and warns.
    pub(super) fn note(
        &self,
        metrics: &Metrics,
        stream: (StreamId, &StreamName, &Retention),
        unsettled: Option<Unsettled>,
        now: DateTime<Utc>,
    ) {
        let (id, name, retention) = stream;
        let mut streams = self.streams();
        if !retention.has_hard_limit() {
            if streams.remove(&id).is_some() {
                metrics.forget_limit(name);
            }
            return;
        }
        let used = share(retention, unsettled, now);
        metrics.limit_used(name, used);
        let share = streams.entry(id).or_insert_with(|| Share {
            name: name.clone(),
            used,
            warned_at: None,
        });
        share.used = used;
        if used < WARN_FROM {
            share.warned_at = None;
        } else if share.warned_at.is_none_or(|at| at.elapsed() >= WARN_PAUSE) {
            share.warned_at = Some(Instant::now());
            tracing::warn!(
                stream = name.as_str(),
                used = format!("{:.0} %", used * 100.0),
                "unsettled messages come near the stream's hard limit, beyond which they are dropped"
            );
        }
    }

    /// Forgets streams that are gone.
    pub(super) fn keep(&self, metrics: &Metrics, is_there: impl Fn(StreamId) -> bool) {
        self.streams().retain(|&id, share| {
            let keeps = is_there(id);
            if !keeps {
                metrics.forget_limit(&share.name);
            }
            keeps
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_share_counts() {
        let now = DateTime::from_timestamp(1_700_000_000, 0).unwrap_or_default();
        let limits = |seconds, bytes| Retention {
            unsettled: Some(Duration::from_secs(seconds)),
            unsettled_bytes: bytes,
            ..Retention::default()
        };
        let unsettled = Some(Unsettled {
            since: now - chrono::TimeDelta::seconds(50),
            bytes: 700,
        });
        assert!((share(&limits(100, None), unsettled, now) - 0.5).abs() < 1e-9);
        assert!((share(&limits(100, Some(1_000)), unsettled, now) - 0.7).abs() < 1e-9);
        assert!((share(&limits(10, Some(1_000)), unsettled, now) - 1.0).abs() < 1e-9);
        assert!(share(&limits(10, Some(1_000)), None, now).abs() < 1e-9);
    }
}
