//! Protection against a clock that is set back. A queue's times come from the database's clock, which can be set back while
//! another node, or a restarted one, reads it. What was handed out or put off while the clock was ahead would be held for
//! as long as it was.
//!
//! No moment in the state lies ahead of the moment at which it is read, and nothing is held or put off for longer than a
//! request can ask for. So what began ahead of now begins now, and keeps all of its time: nobody gets less time by that,
//! however the clocks of two nodes differ. The correction is journaled, because later records go by the corrected clock.

use super::{At, Entry, Queue, Record, State};
use crate::domain::policy::{DELAY_MAX, VISIBILITY_TIMEOUT_RANGE};

impl Entry {
    fn until(&self) -> At {
        match self.state {
            State::Live { deadline } => deadline,
            State::Ended { due, .. } => due,
        }
    }

    /// Its start and its deadline, if either is too far ahead of `now`.
    fn set_back(&self, now: At) -> Option<(At, At)> {
        let longest = match self.state {
            State::Live { .. } => VISIBILITY_TIMEOUT_RANGE.1,
            State::Ended { .. } => DELAY_MAX,
        };
        let since = self.since.min(now);
        let by = self.since.0.saturating_sub(since.0);
        let until = At(self.until().0.saturating_sub(by)).min(now.plus(longest));
        ((since, until) != (self.since, self.until())).then_some((since, until))
    }
}

impl Queue {
    /// Told the time when the state has been read. Gives how many messages were held beyond what can be.
    pub fn meet_clock(&mut self, now: At) -> usize {
        let ahead = self.entries.values();
        let ahead = ahead.filter(|entry| entry.set_back(now).is_some()).count();
        if ahead > 0 {
            self.commit(Record::SetBack { to: now });
        }
        ahead
    }

    pub(super) fn apply_set_back(&mut self, to: At) {
        for (&offset, entry) in &mut self.entries {
            let Some((since, until)) = entry.set_back(to) else {
                continue;
            };
            let place = (entry.until(), offset);
            entry.since = since;
            match &mut entry.state {
                State::Live { deadline } => {
                    *deadline = until;
                    self.deadlines.remove(&place);
                    self.deadlines.insert((until, offset));
                }
                State::Ended { due, .. } => {
                    *due = until;
                    // One that is due already stays so.
                    if self.delays.remove(&place) {
                        self.delays.insert((until, offset));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Found, Item, Outcome, Random, Receive, Verb, decode, encode};
    use super::*;
    use crate::domain::id::{Generation, Offset, QueueId};
    use crate::domain::policy::Settings;
    use crate::domain::receipt::Receipt;

    const HOUR: i64 = 3_600_000;
    const SECOND: i64 = 1_000;

    fn new_queue() -> Queue {
        let settings = Settings::default();
        let mut queue = Queue::new(
            QueueId(1),
            Generation(1),
            Offset(1),
            settings,
            Random::new(1),
        );
        (1..=4).for_each(|offset| queue.found(Found::at(offset)));
        queue
    }

    /// Hands one message out for 30 s.
    fn take(queue: &mut Queue, now: i64) {
        let visible = Duration::from_secs(30);
        let taken = queue.hand_out(At(now), visible, &Receive::default(), (1, 10), &|_| Some(1));
        assert_eq!(taken.handed.len(), 1);
    }

    fn item(offset: i64) -> Item {
        Item {
            receipt: Some(Receipt {
                queue: QueueId(1),
                generation: Generation(1),
                offset: Offset(offset),
                delivery: 1,
            }),
            ..Item::default()
        }
    }

    fn until(queue: &Queue) -> Vec<i64> {
        queue
            .entries
            .values()
            .map(|entry| entry.until().0)
            .collect()
    }

    /// The queue as a journal has it.
    fn read_again(queue: &mut Queue, journal: &mut Vec<Record>) -> Queue {
        journal.extend(decode(&encode(&queue.take_batch().records)).expect("it was just written"));
        let mut again = new_queue();
        journal.iter().for_each(|record| again.apply(record));
        again
    }

    #[test]
    fn what_began_ahead_of_now_begins_now_and_keeps_its_time() {
        let mut journal = Vec::new();
        let mut queue = new_queue();
        take(&mut queue, 0);
        for _ in 0..3 {
            take(&mut queue, HOUR);
        }
        let later = Item {
            delay: Some(Duration::from_secs(60)),
            ..item(3)
        };
        queue.settle(Verb::Nack, &[later], At(HOUR + 10 * SECOND));
        assert_eq!(
            until(&queue),
            [30, 3_630, 3_670, 3_630].map(|at| at * SECOND)
        );

        let mut queue = read_again(&mut queue, &mut journal);
        // The clock is where it was but for the ten seconds, and these are the last that it may be held for.
        assert_eq!(queue.meet_clock(At(10 * SECOND)), 3);
        assert_eq!(until(&queue), [30, 40, 80, 40].map(|at| at * SECOND));
        assert_eq!(queue.meet_clock(At(10 * SECOND)), 0);
        // Later records go by the clock as it is, for every reader.
        let longer = Item {
            extend_by: Some(Duration::from_secs(7_200)),
            ..item(4)
        };
        let extended = queue.settle(Verb::Extend, &[longer], At(20 * SECOND));
        let visible_until = At(7_220 * SECOND);
        assert_eq!(extended, [Outcome::Extended { visible_until }]);
        let mut queue = read_again(&mut queue, &mut journal);
        assert_eq!(queue.meet_clock(At(25 * SECOND)), 0);
        assert_eq!(until(&queue), [30, 40, 80, 7_220].map(|at| at * SECOND));
        // And it is the state's, too: each is over when it says.
        queue.advance(At(41 * SECOND), At(41 * SECOND));
        assert_eq!((queue.counts().live, queue.counts().delayed), (1, 1));
    }

    #[test]
    fn nothing_is_held_for_longer_than_can_be_asked_for() {
        let mut queue = new_queue();
        take(&mut queue, 0);
        take(&mut queue, 0);
        // The clock is ahead by a year for a while.
        let year = 8_760 * HOUR;
        queue.settle(Verb::Extend, &[item(1)], At(year));
        queue.settle(Verb::Nack, &[item(2)], At(year));
        assert_eq!(queue.meet_clock(At(5 * SECOND)), 2);
        assert_eq!(until(&queue), [12 * HOUR + 5 * SECOND; 2]);
    }

    #[test]
    fn a_clock_that_goes_on_changes_nothing() {
        let mut queue = new_queue();
        take(&mut queue, 0);
        take(&mut queue, 0);
        queue.settle(Verb::Nack, &[item(2)], At(SECOND));
        let before = until(&queue);
        queue.take_batch();
        for moment in [SECOND, 29 * SECOND, HOUR, 1_000 * HOUR] {
            assert_eq!(queue.meet_clock(At(moment)), 0);
        }
        assert_eq!(until(&queue), before);
        assert!(!queue.has_batch());
    }
}
