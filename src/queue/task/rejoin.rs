//! Consumers that come back together. While messages wait, a consumer that was just answered is back in a moment. A part
//! that began without those consumers would leave them to the next part: two halves would take turns, each waiting for the
//! other's commit, with twice the commits. So the part waits until as many consumers are back as before, for about as long
//! as the last part took. Consumers that work on their messages for a while do not come back in time: after parts that
//! waited in vain, the next ones go without waiting.

use std::time::Duration;

use tokio::time::Instant;

/// The wait is never set shorter, since the timer counts in milliseconds, nor longer.
const BOUNDS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(5));
/// The weight of a wait in vain; a successful one weighs 1.
const VAIN: u32 = 2;
/// The weight that counts most. A wait in vain is followed by 2^(weight / 2) parts without: 32 at most.
const WEIGHT_MAX: u32 = 10;

/// The consumers that are likely to be back after a commit.
#[derive(Debug, Default)]
pub(super) struct Rejoin {
    /// Answers that are worth waiting for, and until when; none while parts go without.
    awaited: Option<(usize, Instant)>,
    has_waited: bool,
    weight: u32,
    /// Parts that go without waiting yet.
    skip: u32,
}

impl Rejoin {
    /// After a commit that took so long: `answered` by it, while others came, who are `waiting`.
    pub(super) fn commit(&mut self, answered: usize, waiting: usize, took: Duration, now: Instant) {
        self.awaited = match self.skip {
            0 => Some((answered + waiting, now + took.clamp(BOUNDS.0, BOUNDS.1))),
            _ => None,
        };
        self.skip = self.skip.saturating_sub(1);
    }

    /// The time until when to wait for more; none once all are back, or the time is over.
    pub(super) fn until(&mut self, waiting: usize, now: Instant) -> Option<Instant> {
        let (answers, until) = self.awaited?;
        let waits = waiting < answers && now < until;
        self.has_waited |= waits;
        waits.then_some(until)
    }

    /// A part goes, with this many answers: the wait was worth it if three in four are back.
    pub(super) fn submit(&mut self, waiting: usize) {
        let has_waited = std::mem::take(&mut self.has_waited);
        let Some((answers, _)) = self.awaited.take().filter(|_| has_waited) else {
            return;
        };
        if waiting * 4 >= answers * 3 {
            self.weight = self.weight.saturating_sub(1);
        } else {
            self.weight = (self.weight + VAIN).min(WEIGHT_MAX);
            self.skip = 1 << (self.weight / VAIN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn after(answered: usize, waiting: usize, took: Duration, now: Instant) -> Rejoin {
        let mut rejoin = Rejoin::default();
        rejoin.commit(answered, waiting, took, now);
        rejoin
    }

    #[test]
    fn a_part_waits_for_all_that_were_there_and_no_longer_than_a_commit() {
        let now = Instant::now();
        let mut rejoin = after(2, 1, MS * 3, now);
        assert_eq!(rejoin.until(1, now), Some(now + MS * 3));
        assert_eq!(rejoin.until(2, now + MS * 2), Some(now + MS * 3));
        assert_eq!(rejoin.until(3, now), None);
        assert_eq!(rejoin.until(2, now + MS * 3), None);
    }

    #[test]
    fn one_consumer_waits_for_nobody() {
        let now = Instant::now();
        assert_eq!(after(1, 0, MS, now).until(1, now), None);
    }

    #[test]
    fn the_wait_is_bounded() {
        let now = Instant::now();
        for (took, most) in [(Duration::ZERO, BOUNDS.0), (MS * 900, BOUNDS.1)] {
            assert_eq!(after(2, 0, took, now).until(1, now), Some(now + most));
        }
    }

    /// How many of 100 parts wait, where `come` says how many of four consumers each part finds back.
    fn waits(come: &[usize]) -> usize {
        let now = Instant::now();
        let mut rejoin = Rejoin::default();
        let waits = come.iter().cycle().take(100).filter(|&&back| {
            rejoin.commit(4, 0, MS, now);
            let waits = rejoin.until(1, now).is_some();
            rejoin.submit(back);
            waits
        });
        waits.count()
    }

    #[test]
    fn waits_in_vain_become_rare_and_others_do_not() {
        assert_eq!(waits(&[4]), 100);
        assert_eq!(waits(&[3]), 100);
        assert!((5..10).contains(&waits(&[2])));
        // Nobody waited, so nothing is said of waiting.
        let mut rejoin = after(4, 0, MS, Instant::now());
        rejoin.submit(0);
        assert_eq!(rejoin.weight, 0);
        // A part in which all come, and one for which nobody does: as of acks one by one, and the receive after them.
        assert!(waits(&[4, 1]) < 25);
        // Some are late now and then.
        assert!(waits(&[4, 4, 4, 4, 1]) > 60);
    }
}
