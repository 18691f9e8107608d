//! How many offsets a leaf of the log gets: this depends on how fast the previous one filled, on what its stream keeps, and
//! on a limit in bytes.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::domain::id::StreamId;

/// A leaf that fills faster than this is followed by larger ones.
const FILLS_FAST: Duration = Duration::from_secs(600);
/// A leaf that fills slower than this is followed by smaller ones, so that retention has something to drop.
const FILLS_SLOWLY: Duration = Duration::from_secs(6 * 3_600);
/// How far sizes adapt from the configured one, as factors.
const SMALLEST_FRACTION: i64 = 50;
const LARGEST_MULTIPLE: i64 = 8;
/// The same for keyed streams: unfolded keys are in memory, and each leaf's index is looked at for a key's history.
const SMALLEST_KEYED_FRACTION: i64 = 5;
const LARGEST_KEYED_MULTIPLE: i64 = 1;
/// A leaf has at least this share of what its stream keeps, so that the number of leaves of a stream stays in the hundreds, however
/// slowly it fills and however long it keeps.
const KEPT_FRACTION: i64 = 64;
/// How much larger than the configured size a keyed stream's leaves get for that.
const LARGEST_KEYED_KEPT_MULTIPLE: i64 = 8;

/// How many offsets the next leaf of each stream gets.
#[derive(Debug)]
pub(super) struct LeafSizes {
    pub(super) configured: i64,
    sizes: Mutex<HashMap<StreamId, i64>>,
}

impl LeafSizes {
    pub(super) fn new(configured: i64) -> Self {
        Self {
            configured: configured.max(1),
            sizes: Mutex::default(),
        }
    }

    pub(super) fn get(&self, stream: StreamId) -> i64 {
        let sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        sizes.get(&stream).copied().unwrap_or(self.configured)
    }

    /// Below it no limit in bytes makes a leaf.
    pub(super) fn smallest(&self) -> i64 {
        self.configured / SMALLEST_FRACTION
    }

    pub(super) fn set(&self, stream: StreamId, size: i64) {
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        sizes.insert(stream, size);
    }
}

/// The size after a leaf of `size` offsets that took `filled_in` to fill.
pub(super) fn next_size(configured: i64, is_keyed: bool, size: i64, filled_in: Duration) -> i64 {
    let (smallest, largest) = match is_keyed {
        true => (SMALLEST_KEYED_FRACTION, LARGEST_KEYED_MULTIPLE),
        false => (SMALLEST_FRACTION, LARGEST_MULTIPLE),
    };
    let next = if filled_in < FILLS_FAST {
        size * 2
    } else if filled_in > FILLS_SLOWLY {
        size / 2
    } else {
        size
    };
    next.clamp((configured / smallest).max(1), configured * largest)
}

/// The size of the next leaf of a stream that keeps this many messages.
pub(super) fn size_for_kept(configured: i64, is_keyed: bool, size: i64, kept: i64) -> i64 {
    let least = kept / KEPT_FRACTION;
    let least = match is_keyed {
        true => least.min(configured * LARGEST_KEYED_KEPT_MULTIPLE),
        false => least,
    };
    size.max(least)
}

/// How many offsets a leaf may have, so that several make up a limit in bytes, by what a message has taken so far.
pub(super) fn size_within(limit: u64, bytes: u64, count: i64) -> i64 {
    const LEAVES_PER_LIMIT: u64 = 8;
    const USUAL_BYTES: u64 = 1_024;
    let count = count.max(0).unsigned_abs();
    let each = match count {
        0 => USUAL_BYTES,
        count => (bytes / count).max(64),
    };
    i64::try_from(limit / LEAVES_PER_LIMIT / each).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_stream_that_keeps_all_has_hundreds_of_leaves_and_not_thousands() {
        for is_keyed in [false, true] {
            let (configured, mut size, mut end, mut leaves) = (250_000, 250_000, 0_i64, 0);
            while end < 200_000_000 {
                // Each takes a day to fill.
                size = next_size(configured, is_keyed, size, Duration::from_secs(86_400));
                size = size_for_kept(configured, is_keyed, size, end);
                end += size;
                leaves += 1;
            }
            assert!((64..700).contains(&leaves), "{leaves}");
        }
    }

    #[test]
    fn leaves_grow_while_they_fill_fast_and_shrink_while_slowly() {
        let seconds = Duration::from_secs;
        for (is_keyed, size, filled_in, next) in [
            (false, 1_000, 5, 2_000),
            (false, 8_000, 5, 8_000),
            (false, 1_000, 3_600, 1_000),
            (false, 1_000, 90_000, 500),
            (false, 20, 90_000, 20),
            (true, 1_000, 5, 1_000),
            (true, 1_000, 90_000, 500),
            (true, 200, 90_000, 200),
        ] {
            assert_eq!(next_size(1_000, is_keyed, size, seconds(filled_in)), next);
        }
    }
}
