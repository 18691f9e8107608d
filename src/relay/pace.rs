//! How long a relay waits between two steps. A step that finds rows costs a commit, however few they are. While few rows
//! come, each is worth a commit: the relay looks again at once. While many come they share a commit, at the price of a few
//! milliseconds, which leaves the processors and the log's device to others. An origin without activity is asked less and
//! less often.

use std::time::{Duration, Instant};

use super::Options;
use crate::supervisor::Backoff;

/// Rows count for about so long.
const MEMORY: Duration = Duration::from_millis(50);
/// This many rows within [`MEMORY`], 1,500 per second, count as many.
const MANY: f64 = 75.0;
/// The pause between steps while many come.
const SHARED: Duration = Duration::from_millis(5);
/// After a step with this part of a page, or more, there is no pause: producers are ahead.
const PAGE_PART: usize = 8;

/// The pace of one session with an origin.
#[derive(Debug)]
pub(super) struct Pace {
    /// Rows of the last steps, each the less the longer ago it was.
    recent: f64,
    stepped_at: Instant,
    /// The pause after the next step that finds nothing.
    idle: Backoff,
}

impl Pace {
    pub(super) fn new(options: &Options, now: Instant) -> Self {
        Self {
            recent: 0.0,
            stepped_at: now,
            idle: Backoff::new(options.poll_min, options.poll_max),
        }
    }

    /// The pause after a step that ended at `now` with this many rows; none where the next step follows at once.
    pub(super) fn after(
        &mut self,
        rows: usize,
        options: &Options,
        now: Instant,
    ) -> Option<Duration> {
        let since = now - self.stepped_at;
        self.stepped_at = now;
        self.recent *= (-since.as_secs_f64() / MEMORY.as_secs_f64()).exp();
        if rows == 0 {
            return Some(self.idle.next_pause());
        }
        self.idle.reset();
        self.recent += f64::from(u32::try_from(rows).unwrap_or(u32::MAX));
        let is_shared = self.recent > MANY && rows * PAGE_PART < options.page_rows;
        is_shared.then_some(SHARED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs steps of a millisecond each, on an origin where this many rows come per millisecond. Returns the share of the time that
    /// the relay waits, and the rows per step at the end.
    fn run(rows_per_ms: f64) -> (f64, usize) {
        let options = Options::default();
        let start = Instant::now();
        let mut pace = Pace::new(&options, start);
        let (mut now, mut waited, mut rows) = (start, Duration::ZERO, 0);
        let mut taken = 0.0;
        while now - start < Duration::from_secs(1) {
            let come = (now - start).as_secs_f64() * 1e3 * rows_per_ms;
            rows = (come - taken) as usize;
            taken += rows as f64;
            now += Duration::from_millis(1);
            let pause = pace.after(rows, &options, now).unwrap_or_default();
            waited += pause;
            now += pause;
        }
        (waited.as_secs_f64(), rows)
    }

    #[test]
    fn few_rows_are_not_kept_waiting() {
        let (waited, rows) = run(1.0);
        assert!(waited < 0.1, "{waited}");
        assert!(rows <= 2, "{rows}");
    }

    #[test]
    fn many_rows_share_a_step() {
        for (rate, least) in [(3.0, 10), (20.0, 100)] {
            let (waited, rows) = run(rate);
            assert!((0.7..0.9).contains(&waited), "{rate}: {waited}");
            assert!(rows >= least, "{rate}: {rows}");
        }
    }

    #[test]
    fn a_relay_that_is_behind_does_not_wait() {
        let (options, now) = (Options::default(), Instant::now());
        let mut pace = Pace::new(&options, now);
        let full = options.page_rows;
        for rows in [full, full / PAGE_PART, full] {
            assert_eq!(pace.after(rows, &options, now), None);
        }
        assert_eq!(
            pace.after(full / PAGE_PART - 1, &options, now),
            Some(SHARED)
        );
    }

    #[test]
    fn an_idle_origin_is_asked_less_and_less_until_a_row_comes() {
        let (options, now) = (Options::default(), Instant::now());
        let mut pace = Pace::new(&options, now);
        let pauses: Vec<Duration> = (0..12)
            .filter_map(|_| pace.after(0, &options, now))
            .collect();
        assert_eq!(pauses[0], options.poll_min);
        assert_eq!(pauses[1], options.poll_min * 2);
        assert_eq!(pauses[11], options.poll_max);
        assert_eq!(pace.after(1, &options, now), None);
        assert_eq!(pace.after(0, &options, now), Some(options.poll_min));
    }
}
