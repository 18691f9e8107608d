//! The pause between tries that fail.

use std::time::Duration;

/// A pause that doubles with each try that fails, up to a bound, until one comes through.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// From the first pause to the longest.
    #[must_use]
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// The same pause each time.
    #[must_use]
    pub const fn constant(pause: Duration) -> Self {
        Self::new(pause, pause)
    }

    /// The pause after a try that failed.
    pub fn next_pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(self.longest);
        pause
    }

    /// The pause that [`Backoff::next_pause`] gives next.
    #[must_use]
    pub const fn upcoming(&self) -> Duration {
        self.next
    }

    /// A try came through.
    pub const fn reset(&mut self) {
        self.next = self.first;
    }

    /// Waits for the next pause. Cancel-safe.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next_pause()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_until_a_try_comes_through() {
        let millis = Duration::from_millis;
        let mut backoff = Backoff::new(millis(20), millis(100));
        let pauses: Vec<Duration> = (0..5).map(|_| backoff.next_pause()).collect();
        assert_eq!(pauses, [20, 40, 80, 100, 100].map(millis));
        assert_eq!(backoff.upcoming(), millis(100));
        backoff.reset();
        assert_eq!(backoff.next_pause(), millis(20));
        let mut constant = Backoff::constant(millis(7));
        assert_eq!([(); 3].map(|()| constant.next_pause()), [7; 3].map(millis));
    }
}
