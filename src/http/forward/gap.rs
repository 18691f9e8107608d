//! Requests that wait while their queue is between two owners. Each looks again and again, and the more there are the less
//! often each looks. So thousands of long polls, all woken at once because their owner is gone, leave the node room to take
//! over the owner's queues.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::LOOK;

/// This many waiting requests look as often as one.
const AT_ONCE: u32 = 200;
/// Nobody looks less often.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How many wait.
#[derive(Debug, Clone, Default)]
pub(in crate::http) struct Gaps(Arc<AtomicU32>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct InGap(Arc<AtomicU32>);

impl Gaps {
    pub(super) fn enter(&self) -> InGap {
        self.0.fetch_add(1, Ordering::Relaxed);
        InGap(Arc::clone(&self.0))
    }

    /// How long one of them waits before it looks again.
    pub(super) fn pause(&self) -> Duration {
        let times = 1 + self.0.load(Ordering::Relaxed) / AT_ONCE;
        LOOK.saturating_mul(times).min(PAUSE_MAX)
    }
}

impl Drop for InGap {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_wait_the_less_often_each_looks() {
        let gaps = Gaps::default();
        let few: Vec<InGap> = (0..100).map(|_| gaps.enter()).collect();
        assert_eq!(gaps.pause(), LOOK);
        let many: Vec<InGap> = (0..900).map(|_| gaps.enter()).collect();
        assert_eq!(gaps.pause(), LOOK * 6);
        let more: Vec<InGap> = (0..20_000).map(|_| gaps.enter()).collect();
        assert_eq!(gaps.pause(), PAUSE_MAX);
        drop((few, many, more));
        assert_eq!(gaps.pause(), LOOK);
    }
}
