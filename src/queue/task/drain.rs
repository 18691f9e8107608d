//! When a queue's task takes no commands for a moment. A request that decides much is written in pieces. Deliveries whose time is over,
//! redrives and checkpoints come after the last piece. Consumers without a pause would keep them waiting for ever: so they get a turn.

use std::time::Duration;

use tokio::time::Instant;

/// How long they wait, and how long commands are taken again after a turn.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long commands wait at most.
const LONGEST: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Drain {
    /// The last moment at which one piece waited at most, so that what was due was done.
    turn_at: Instant,
    /// Since when a checkpoint is wanted.
    fold_since: Option<Instant>,
    until: Option<Instant>,
    not_before: Instant,
}

impl Drain {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            turn_at: now,
            fold_since: None,
            until: None,
            not_before: now,
        }
    }

    /// What was due is done.
    pub(super) fn turned(&mut self, now: Instant) {
        self.turn_at = now;
    }

    /// Whether commands wait.
    pub(super) fn is_on(&self) -> bool {
        self.until.is_some()
    }

    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Begins or ends. `has_due`: deliveries that are over, or a redrive. `has_fold`: a checkpoint that has not begun.
    pub(super) fn decide(&mut self, now: Instant, has_due: bool, has_fold: bool) {
        self.fold_since = has_fold.then(|| self.fold_since.unwrap_or(now));
        let is_over = |since: Instant| now.duration_since(since) >= PATIENCE;
        let waits = has_due && is_over(self.turn_at) || self.fold_since.is_some_and(is_over);
        match self.until {
            Some(until) if !waits || until <= now => {
                self.until = None;
                self.not_before = now + PATIENCE;
            }
            None if waits && self.not_before <= now => self.until = Some(now + LONGEST),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_gets_its_turn_and_commands_theirs() {
        let began = Instant::now();
        let at = |millis: u64| began + Duration::from_millis(millis);
        let mut drain = Drain::new(began);
        drain.decide(at(900), true, false);
        assert!(!drain.is_on(), "it has not waited for long");
        drain.decide(at(1_000), false, false);
        assert!(!drain.is_on(), "nothing waits");
        drain.decide(at(1_001), true, false);
        assert_eq!(drain.until(), Some(at(3_001)));
        drain.turned(at(1_500));
        drain.decide(at(1_501), true, false);
        assert!(!drain.is_on(), "it had its turn");
        // A checkpoint, behind pieces that nobody writes.
        drain.decide(at(2_000), false, true);
        drain.decide(at(3_000), false, true);
        assert!(drain.is_on());
        drain.decide(at(5_000), false, true);
        assert!(!drain.is_on(), "commands wait for so long at most");
        drain.decide(at(5_999), false, true);
        assert!(!drain.is_on());
        drain.decide(at(6_000), false, true);
        assert!(drain.is_on());
    }
}
