//! Limits how many rows the relays of this process look up in the streams at a time. Each relay has them in memory while
//! the log is read, and may begin at once: when many origins went back in time together, each takes fewer rows.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The most rows that one relay looks up at a time, about 60 bytes each.
pub(super) const ROWS_MAX: usize = 1_000_000;
/// All of them together, but for the fewest that each may.
const ALL_ROWS_MAX: usize = 2_000_000;
/// The fewest: below, the log would be read too often.
const ROWS_MIN: usize = 50_000;

/// The rest of the bound.
#[derive(Debug)]
pub(super) struct Lookups {
    free: AtomicUsize,
}

/// Rows that one relay may look up, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Grant<'a> {
    from: &'a Lookups,
    taken: usize,
}

impl Default for Lookups {
    fn default() -> Self {
        Self {
            free: AtomicUsize::new(ALL_ROWS_MAX),
        }
    }
}

impl Lookups {
    /// Never waits.
    pub(super) fn take(&self) -> Grant<'_> {
        let mut taken = 0;
        let take = |free: usize| {
            taken = free.min(ROWS_MAX);
            Some(free - taken)
        };
        let _ = self
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        Grant { from: self, taken }
    }
}

impl Grant<'_> {
    pub(super) fn rows(&self) -> usize {
        self.taken.max(ROWS_MIN)
    }
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        self.from.free.fetch_add(self.taken, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_at_once_look_up_fewer_each_and_none_waits() {
        let lookups = Lookups::default();
        {
            let grants: Vec<Grant<'_>> = (0..100).map(|_| lookups.take()).collect();
            let rows: Vec<usize> = grants.iter().map(Grant::rows).collect();
            assert_eq!(rows[..3], [ROWS_MAX, ROWS_MAX, ROWS_MIN]);
            assert!(rows.iter().sum::<usize>() <= ALL_ROWS_MAX + 100 * ROWS_MIN);
        }
        assert_eq!(lookups.take().rows(), ROWS_MAX);
    }
}
