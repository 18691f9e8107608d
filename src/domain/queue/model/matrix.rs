//! The verbs of the plain reference: one cell of the matrix after another, written as docs/protocol.md has them.

use super::super::*;
use super::faults::Fault;
use super::reference::{Message, Plain, Reference, SECOND};
use crate::domain::policy::FREE_RELEASES;

impl Reference {
    fn others(&self, offset: i64) -> impl Iterator<Item = (i64, &Message)> {
        let key = self.messages[&offset].key;
        let key = key.filter(|&key| self.is_in_order(key));
        let others = self
            .messages
            .iter()
            .map(|(&other, message)| (other, message));
        others
            .filter(move |(other, message)| *other != offset && key.is_some() && message.key == key)
    }

    /// One cell of the matrix.
    pub(super) fn verb(
        &mut self,
        verb: Verb,
        offset: i64,
        delivery: u32,
        delay: Option<i64>,
        now: i64,
    ) -> Outcome {
        let dead_letter = dead_letter_id(Generation(self.generation), Offset(offset));
        let Some(message) = self.messages.get(&offset) else {
            return Outcome::Gone { incident: true };
        };
        match message.plain {
            Plain::Lost { was_fresh: false } => return Outcome::Gone { incident: false },
            Plain::Settled | Plain::Lost { was_fresh: true } => {
                let accepts = !self.has(Fault::LateAckIsRefused);
                return match self.letters.get(&offset) {
                    Some(letter) if accepts && verb == Verb::Ack && letter.delivery == delivery => {
                        self.letters.remove(&offset);
                        Outcome::Acked
                    }
                    Some(letter) => Outcome::DeadLettered {
                        is_last: letter.delivery == delivery,
                        dead_letter,
                    },
                    None => Outcome::AlreadySettled,
                };
            }
            _ => {}
        }
        if delivery > message.delivery || message.plain == Plain::Fresh {
            return Outcome::Gone { incident: true };
        }
        if delivery < message.delivery {
            let attempt = message.attempt();
            return Outcome::Stale { attempt };
        }
        let batch = message.batch;
        let is_earlier = |(other, message): (i64, &Message)| {
            other < offset && message.is_unsettled() && message.batch == batch
        };
        let blocks = !self.has(Fault::BatchInAnyOrder);
        if blocks && verb == Verb::Ack && batch.is_some() && self.others(offset).any(is_earlier) {
            return Outcome::Blocked;
        }
        let is_elsewhere = |(_, other): (i64, &Message)| {
            other.is_live() && (batch.is_none() || other.batch != batch)
        };
        let is_overtaken = self.others(offset).any(is_elsewhere);
        self.verb_of_last(verb, offset, delay, now, is_overtaken, dead_letter)
    }

    /// The receipt is that of the last delivery.
    fn verb_of_last(
        &mut self,
        verb: Verb,
        offset: i64,
        delay: Option<i64>,
        now: i64,
        is_overtaken: bool,
        letter: String,
    ) -> Outcome {
        let (settings, fault) = (self.settings, self.fault);
        let message = self.messages.get_mut(&offset).expect("it is there");
        let (own_end, timed_out, due) = match message.plain {
            Plain::Waiting {
                end: End::TimedOut,
                due,
            } => (None, true, due),
            Plain::Waiting { end, due } => (Some(end), false, due),
            _ => (None, false, 0),
        };
        let due_at = Some(At(due));
        match (verb, own_end) {
            (Verb::Ack, _) => {
                message.plain = Plain::Settled;
                message.is_reopened = false;
                self.letters.remove(&offset);
                Outcome::Acked
            }
            (Verb::Reject, _) => {
                let attempts = message.attempt();
                self.die(offset, now, "rejected", attempts, true);
                Outcome::Rejected {
                    dead_letter: letter,
                }
            }
            (Verb::Extend, Some(_)) if fault != Some(Fault::ExtendRevivesTheNacked) => {
                Outcome::Stale {
                    attempt: message.attempt(),
                }
            }
            (Verb::Extend, None) if timed_out && is_overtaken => Outcome::Stale {
                attempt: message.attempt(),
            },
            (Verb::Nack, Some(_)) if fault == Some(Fault::SecondNackMoves) => Outcome::Nacked {
                due_at: Some(At(now)),
                dead_letter: None,
            },
            (Verb::Nack | Verb::Release, Some(End::Nacked)) => Outcome::Nacked {
                due_at,
                dead_letter: None,
            },
            (Verb::Nack | Verb::Release, Some(_)) => Outcome::Released {
                due_at,
                dead_letter: None,
            },
            (Verb::Extend, _) => {
                message.attempts -=
                    u32::from(timed_out && fault != Some(Fault::RevivedCountsTwice));
                message.plain = Plain::Live {
                    until: now + 30 * SECOND,
                };
                Outcome::Extended {
                    visible_until: At(now + 30 * SECOND),
                }
            }
            (Verb::Nack, None) => {
                let attempts = message.attempts
                    + u32::from(!timed_out || fault == Some(Fault::LateNackCountsTwice));
                if attempts >= settings.max_attempts {
                    self.die(offset, now, "nacked", attempts, true);
                    return Outcome::Nacked {
                        due_at: None,
                        dead_letter: Some(letter),
                    };
                }
                message.attempts = attempts;
                message.fail(now, "nacked");
                let due = now + delay.unwrap_or(settings.delay(attempts));
                message.plain = Plain::Waiting {
                    end: End::Nacked,
                    due,
                };
                Outcome::Nacked {
                    due_at: Some(At(due)),
                    dead_letter: None,
                }
            }
            (Verb::Release, None) => {
                message.attempts -= u32::from(timed_out);
                message.releases += 1;
                message.attempts += u32::from(message.releases > FREE_RELEASES);
                let attempts = message.attempts;
                if attempts >= settings.max_attempts {
                    self.die(offset, now, "released too often", attempts, true);
                    return Outcome::Released {
                        due_at: None,
                        dead_letter: Some(letter),
                    };
                }
                let due = now + delay.unwrap_or(0);
                message.plain = Plain::Waiting {
                    end: End::Released,
                    due,
                };
                Outcome::Released {
                    due_at: Some(At(due)),
                    dead_letter: None,
                }
            }
        }
    }
}
