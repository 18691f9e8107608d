//! A load over time: counts and latencies in windows of one second, so that changes during the run show.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hdrhistogram::Histogram;

/// Longest latency that is told apart, in microseconds: 10 minutes.
const LATENCY_MAX: u64 = 600_000_000;

/// One second of a run.
#[derive(Debug, Clone)]
pub(super) struct Second {
    pub(super) published: u64,
    /// Deliveries whose settling was answered.
    pub(super) settled: u64,
    /// From just before the commit to the answer with the message, in microseconds.
    pub(super) latency: Histogram<u64>,
}

pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(LATENCY_MAX, 2).expect("two digits up to ten minutes are in bounds")
}

impl Second {
    fn new() -> Self {
        Self {
            published: 0,
            settled: 0,
            latency: histogram(),
        }
    }
}

/// All seconds of a round.
pub(super) struct Series {
    began: Instant,
    seconds: Mutex<Vec<Second>>,
}

impl Series {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            seconds: Mutex::default(),
        }
    }

    pub(super) const fn began(&self) -> Instant {
        self.began
    }

    fn at(&self, at: Instant, note: impl FnOnce(&mut Second)) {
        let place = at.saturating_duration_since(self.began).as_secs();
        let place = usize::try_from(place).unwrap_or(0);
        let mut seconds = self.lock();
        while seconds.len() <= place {
            seconds.push(Second::new());
        }
        note(&mut seconds[place]);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Second>> {
        self.seconds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn published(&self, at: Instant, count: u64) {
        self.at(at, |second| second.published += count);
    }

    pub(super) fn settled(&self, at: Instant, count: u64) {
        self.at(at, |second| second.settled += count);
    }

    /// Times on the way, in microseconds.
    pub(super) fn came(&self, at: Instant, times: &[u64]) {
        self.at(at, |second| {
            for time in times {
                second.latency.saturating_record((*time).max(1));
            }
        });
    }

    /// The seconds from one moment to another that lie wholly between them, or the nearest one to them if none does.
    pub(super) fn between(&self, from: Instant, to: Instant) -> Vec<Second> {
        let first = from
            .saturating_duration_since(self.began)
            .as_millis()
            .div_ceil(1_000);
        let last = to.saturating_duration_since(self.began).as_secs();
        let first = usize::try_from(first).unwrap_or(0);
        let last = usize::try_from(last).unwrap_or(0).max(first + 1);
        let seconds = self.lock();
        let last = last.min(seconds.len());
        seconds
            .get(first.min(last)..last)
            .unwrap_or_default()
            .to_vec()
    }

    /// The latency of what came in these seconds, including those cut by either end.
    pub(super) fn latency(&self, from: Instant, to: Instant) -> Histogram<u64> {
        let place = |at: Instant| {
            usize::try_from(at.saturating_duration_since(self.began).as_secs()).unwrap_or(0)
        };
        let seconds = self.lock();
        let mut all = histogram();
        for second in seconds.iter().take(place(to) + 1).skip(place(from)) {
            all.add(&second.latency).expect("all have the same bounds");
        }
        all
    }

    /// The latency of the last whole second, for the live line.
    pub(super) fn latest(&self) -> Histogram<u64> {
        let place = usize::try_from(self.began.elapsed().as_secs()).unwrap_or(0);
        let seconds = self.lock();
        seconds
            .get(place.saturating_sub(1))
            .map_or_else(histogram, |second| second.latency.clone())
    }
}

/// A quantile in milliseconds; None when nothing was recorded.
pub(super) fn milliseconds(latency: &Histogram<u64>, quantile: f64) -> Option<f64> {
    (!latency.is_empty()).then(|| latency.value_at_quantile(quantile) as f64 / 1_000.0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn seconds_are_kept_apart() {
        let series = Series::new();
        let at = |seconds: f64| series.began() + Duration::from_secs_f64(seconds);
        series.settled(at(0.5), 1);
        series.settled(at(1.5), 10);
        series.settled(at(2.5), 100);
        series.published(at(2.9), 7);
        series.came(at(1.1), &[1_000, 2_000]);
        series.came(at(2.1), &[9_000_000]);
        let settled = |from, to| -> Vec<u64> {
            let seconds = series.between(at(from), at(to));
            seconds.iter().map(|second| second.settled).collect()
        };
        assert_eq!(settled(0.0, 3.0), [1, 10, 100]);
        assert_eq!(settled(0.4, 3.0), [10, 100]);
        assert_eq!(settled(1.0, 2.0), [10]);
        let latency = series.latency(at(1.0), at(1.9));
        assert_eq!(latency.len(), 2);
        let p99 = milliseconds(&latency, 0.99).unwrap_or(0.0);
        assert!((1.98..2.03).contains(&p99), "{p99}");
        assert_eq!(milliseconds(&histogram(), 0.5), None);
    }
}
