//! A rate with a burst: a bucket that fills, and from which a request takes its messages.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Messages per second, and how many may come at once.
#[derive(Debug)]
pub(super) struct Bucket {
    per_second: f64,
    burst: f64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    pub(super) fn new(per_second: f64, burst: u64, now: Instant) -> Self {
        let burst = float(burst);
        Self {
            per_second,
            burst,
            state: Mutex::new(State {
                tokens: burst,
                at: now,
            }),
        }
    }

    /// Whether it is a bucket of this rate, so that a change elsewhere does not fill it.
    pub(super) fn is(&self, per_second: f64, burst: u64) -> bool {
        (self.per_second, self.burst) == (per_second, float(burst))
    }

    /// How long to wait until this many messages may come; none if they may come now. More than the burst may come when the bucket
    /// is full.
    pub(super) fn wait(&self, count: u64, now: Instant) -> Option<Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.fill(&mut state, now);
        let lacking = float(count).min(self.burst) - state.tokens;
        (lacking > 0.0).then(|| Duration::from_secs_f64((lacking / self.per_second).min(86_400.0)))
    }

    /// Takes this many out. A negative level is owed.
    pub(super) fn take(&self, count: u64, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.fill(&mut state, now);
        state.tokens -= float(count);
    }

    fn fill(&self, state: &mut State, now: Instant) {
        let passed = now.saturating_duration_since(state.at).as_secs_f64();
        state.tokens = self
            .burst
            .min(passed.mul_add(self.per_second, state.tokens));
        state.at = now.max(state.at);
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are small")]
const fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_the_rate_through_and_a_burst_at_once() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let bucket = Bucket::new(10.0, 5, start);
        assert_eq!(bucket.wait(5, start), None);
        bucket.take(5, start);
        assert_eq!(bucket.wait(1, start), Some(Duration::from_millis(100)));
        assert_eq!(bucket.wait(1, at(0.1)), None);
        assert_eq!(bucket.wait(5, at(0.1)), Some(Duration::from_millis(400)));
        // Never more than the burst.
        assert_eq!(bucket.wait(5, at(100.0)), None);
        // A request beyond the burst comes when the bucket is full, and is paid for afterwards.
        bucket.take(25, at(100.0));
        assert_eq!(
            bucket.wait(1, at(100.0)),
            Some(Duration::from_millis(2_100))
        );
        assert_eq!(bucket.wait(1, at(102.2)), None);
        assert!(bucket.is(10.0, 5) && !bucket.is(10.0, 6));
    }
}
