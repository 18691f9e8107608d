//! The verbs: the matrix of docs/protocol.md, one arm per cell.

use std::time::Duration;

use super::record::{End, Record, SettledAs, to_ranges};
use super::{At, Failure, Queue, State, dead_letter_id};
use crate::domain::id::Offset;
use crate::domain::policy::{FREE_RELEASES, VISIBILITY_TIMEOUT_RANGE};
use crate::domain::receipt::Receipt;

/// The acts on deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Done: the message is settled.
    Ack,
    /// Failed: it is tried again later, or is out of attempts.
    Nack,
    /// Still at work: the deadline moves.
    Extend,
    /// Not begun: it goes back and the attempt does not count.
    Release,
    /// It will never succeed: a dead letter.
    Reject,
}

/// One receipt of a request. It is None when this broker did not issue it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Item {
    /// The parsed receipt.
    pub receipt: Option<Receipt>,
    /// For nack and release: not before this much time.
    pub delay: Option<Duration>,
    /// For extend: from now on.
    pub extend_by: Option<Duration>,
    /// For nack and reject: why.
    pub reason: Option<String>,
}

/// The answer to one receipt. The names on the wire are those of docs/protocol.md.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The message is settled.
    Acked,
    /// It goes out again at `due_at`; or it was the last attempt, and it is a dead letter.
    Nacked {
        /// The time when it goes out again.
        due_at: Option<At>,
        /// The dead letter, if it was the last attempt.
        dead_letter: Option<String>,
    },
    /// It goes out again at `due_at`; or it was released too often, and it is a dead letter.
    Released {
        /// The time when it goes out again.
        due_at: Option<At>,
        /// The dead letter, if it was released too often.
        dead_letter: Option<String>,
    },
    /// The deadline moved.
    Extended {
        /// Held until then.
        visible_until: At,
    },
    /// The message is a dead letter.
    Rejected {
        /// The dead letter.
        dead_letter: String,
    },
    /// It was settled before.
    AlreadySettled,
    /// It is a dead letter.
    DeadLettered {
        /// The dead letter.
        dead_letter: String,
        /// The message died with this very delivery.
        is_last: bool,
    },
    /// A later delivery exists, or (for extend) this one was ended by its own consumer.
    Stale {
        /// The current attempt.
        attempt: u32,
    },
    /// The message or the queue's generation is gone. `incident` when the delivery was never issued: the database
    /// was restored to an earlier state.
    Gone {
        /// Whether to log it as an incident.
        incident: bool,
    },
    /// An earlier message of its key, handed out by the same receive, is not settled.
    Blocked,
    /// Not a receipt of this queue.
    Unknown,
}

impl Outcome {
    /// Whether the item counts as settled in the answer's totals: the verb did what it says, now or before. So a repeat of a request
    /// whose answer was lost counts as the first would have.
    #[must_use]
    pub fn is_done(&self, verb: Verb) -> bool {
        match self {
            Self::Acked
            | Self::Nacked { .. }
            | Self::Released { .. }
            | Self::Extended { .. }
            | Self::Rejected { .. } => true,
            Self::AlreadySettled => verb == Verb::Ack,
            // Each of these verbs makes a dead letter, the first two of a last attempt.
            Self::DeadLettered { is_last, .. } => {
                *is_last && matches!(verb, Verb::Nack | Verb::Release | Verb::Reject)
            }
            Self::Stale { .. } | Self::Gone { .. } | Self::Blocked | Self::Unknown => false,
        }
    }
}

impl Queue {
    /// Carries out one request, evaluated as one in offset order whatever the order sent. Answers in the order sent.
    pub fn settle(&mut self, verb: Verb, items: &[Item], now: At) -> Vec<Outcome> {
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|&index| {
            items[index]
                .receipt
                .map(|receipt| (receipt.offset, receipt.delivery))
        });
        let mut outcomes = vec![Outcome::Unknown; items.len()];
        let mut acked = Vec::new();
        for index in order {
            self.seal();
            outcomes[index] = self.settle_one(verb, &items[index], now, &mut acked);
        }
        if !acked.is_empty() {
            // One record for the whole request: the entries are out already, so applying it again only sets `ahead`.
            self.commit(Record::Settled {
                kind: SettledAs::Acked,
                ranges: to_ranges(acked),
            });
        }
        outcomes
    }

    fn settle_one(&mut self, verb: Verb, item: &Item, now: At, acked: &mut Vec<i64>) -> Outcome {
        let Some(receipt) = item.receipt else {
            return Outcome::Unknown;
        };
        if receipt.queue != self.id {
            return match self.former.contains(&receipt.queue) {
                true => Outcome::Gone { incident: false },
                false => Outcome::Unknown,
            };
        }
        let offset = receipt.offset.0;
        if receipt.generation != self.generation || self.lost.contains(offset as u64) {
            return Outcome::Gone {
                incident: receipt.generation > self.generation,
            };
        }
        let Some(entry) = self.entries.get(&offset) else {
            return self.settle_settled(verb, &receipt, acked);
        };
        if receipt.delivery > entry.delivery {
            return Outcome::Gone { incident: true };
        }
        if receipt.delivery < entry.delivery {
            return Outcome::Stale {
                attempt: entry.attempt(),
            };
        }
        match (entry.state, verb) {
            (_, Verb::Ack) if self.is_blocked(offset) => Outcome::Blocked,
            (_, Verb::Ack) => {
                self.detach(offset);
                acked.push(offset);
                Outcome::Acked
            }
            (_, Verb::Reject) => self.reject(offset, item, now),
            (State::Live { .. }, Verb::Nack) => {
                let attempts = entry.attempts + 1;
                self.nack(offset, attempts, item, now)
            }
            // The attempt was charged when its time ran out.
            (
                State::Ended {
                    end: End::TimedOut, ..
                },
                Verb::Nack,
            ) => {
                let attempts = entry.attempts;
                self.nack(offset, attempts, item, now)
            }
            (State::Live { .. }, Verb::Release) => {
                let attempts = entry.attempts;
                self.release(offset, attempts, End::Released, item.delay, now)
            }
            (
                State::Ended {
                    end: End::TimedOut, ..
                },
                Verb::Release,
            ) => {
                let attempts = entry.attempts.saturating_sub(1);
                self.release(offset, attempts, End::Released, item.delay, now)
            }
            (State::Live { .. }, Verb::Extend) => {
                let attempts = entry.attempts;
                self.extend(offset, attempts, item, now)
            }
            // Held by another receive meanwhile, its key has no second place.
            (State::Ended { .. }, Verb::Extend) if self.is_overtaken(offset) => Outcome::Stale {
                attempt: entry.attempt(),
            },
            (
                State::Ended {
                    end: End::TimedOut, ..
                },
                Verb::Extend,
            ) => {
                let attempts = entry.attempts.saturating_sub(1);
                self.extend(offset, attempts, item, now)
            }
            (
                State::Ended {
                    end: End::Nacked,
                    due,
                },
                Verb::Nack | Verb::Release,
            ) => Outcome::Nacked {
                due_at: Some(due),
                dead_letter: None,
            },
            (State::Ended { due, .. }, Verb::Nack | Verb::Release) => Outcome::Released {
                due_at: Some(due),
                dead_letter: None,
            },
            (State::Ended { .. }, Verb::Extend) => Outcome::Stale {
                attempt: entry.attempt(),
            },
        }
    }

    /// The message has no entry: settled, dead, or never handed out.
    fn settle_settled(&mut self, verb: Verb, receipt: &Receipt, acked: &mut [i64]) -> Outcome {
        let offset = receipt.offset.0;
        if acked.contains(&offset) {
            return Outcome::AlreadySettled;
        }
        if let Some(dead) = self.dead.get(&offset) {
            if verb == Verb::Ack && receipt.delivery == dead.delivery {
                self.remove_letter(receipt.offset);
                return Outcome::Acked;
            }
            return Outcome::DeadLettered {
                is_last: receipt.delivery == dead.delivery,
                dead_letter: dead_letter_id(self.generation, receipt.offset),
            };
        }
        let settled =
            self.is_ahead(offset) || offset <= self.journaled && !self.fresh.contains(offset);
        if settled {
            Outcome::AlreadySettled
        } else {
            Outcome::Gone { incident: true }
        }
    }

    /// Removes a dead letter: its message is settled like any other from then on.
    pub fn remove_letter(&mut self, offset: Offset) {
        self.pending.remove_letters(&[offset]);
        self.commit(Record::LetterRemoved { offset: offset.0 });
    }

    fn nack(&mut self, offset: i64, attempts: u32, item: &Item, now: At) -> Outcome {
        if attempts >= self.settings.max_attempts {
            let reason = item.reason.clone().unwrap_or_else(|| "nacked".to_owned());
            self.die(
                offset,
                attempts,
                "out_of_attempts",
                Failure { at: now, reason },
                now,
            );
            return Outcome::Nacked {
                due_at: None,
                dead_letter: Some(dead_letter_id(self.generation, Offset(offset))),
            };
        }
        let delay = match item.delay {
            Some(delay) => delay,
            None => self.retry_delay(attempts),
        };
        let due = now.plus(delay);
        let releases = self.entries.get(&offset).map_or(0, |entry| entry.releases);
        self.commit(Record::Ended {
            offset,
            end: End::Nacked,
            at: now,
            due,
            attempts,
            releases,
            reason: item.reason.clone(),
        });
        Outcome::Nacked {
            due_at: Some(due),
            dead_letter: None,
        }
    }

    fn release(
        &mut self,
        offset: i64,
        mut attempts: u32,
        end: End,
        delay: Option<Duration>,
        now: At,
    ) -> Outcome {
        let mut releases = self.entries.get(&offset).map_or(0, |entry| entry.releases);
        if end == End::Released {
            releases = releases.saturating_add(1);
            if releases > FREE_RELEASES {
                attempts += 1;
            }
        }
        if attempts >= self.settings.max_attempts {
            let failure = Failure {
                at: now,
                reason: "released too often".to_owned(),
            };
            self.die(offset, attempts, "out_of_attempts", failure, now);
            return Outcome::Released {
                due_at: None,
                dead_letter: Some(dead_letter_id(self.generation, Offset(offset))),
            };
        }
        let due = now.plus(delay.unwrap_or_default());
        self.commit(Record::Ended {
            offset,
            end,
            at: now,
            due,
            attempts,
            releases,
            reason: None,
        });
        Outcome::Released {
            due_at: Some(due),
            dead_letter: None,
        }
    }

    /// The answer never reached the wire: the delivery goes back at once and nothing is charged.
    pub fn take_back(&mut self, receipt: &Receipt, now: At) {
        if receipt.queue != self.id || receipt.generation != self.generation {
            return;
        }
        let offset = receipt.offset.0;
        let Some(entry) = self.entries.get(&offset) else {
            return;
        };
        if entry.delivery == receipt.delivery
            && let State::Live { .. } = entry.state
        {
            let (attempts, releases) = (entry.attempts, entry.releases);
            self.commit(Record::Ended {
                offset,
                end: End::Unwritten,
                at: now,
                due: now,
                attempts,
                releases,
                reason: None,
            });
        }
    }

    fn extend(&mut self, offset: i64, attempts: u32, item: &Item, now: At) -> Outcome {
        let (shortest, longest) = VISIBILITY_TIMEOUT_RANGE;
        let by = item
            .extend_by
            .unwrap_or(self.settings.visibility_timeout)
            .clamp(shortest, longest);
        let mut deadline = now.plus(by);
        if let (Some(hold), Some(entry)) = (self.settings.max_hold, self.entries.get(&offset)) {
            deadline = deadline.min(entry.since.plus(hold)).max(now);
        }
        self.commit(Record::Extended {
            offset,
            deadline,
            attempts,
        });
        Outcome::Extended {
            visible_until: deadline,
        }
    }

    fn reject(&mut self, offset: i64, item: &Item, now: At) -> Outcome {
        let attempts = self.entries.get(&offset).map_or(1, super::Entry::attempt);
        let reason = item.reason.clone().unwrap_or_else(|| "rejected".to_owned());
        self.die(
            offset,
            attempts,
            "rejected",
            Failure { at: now, reason },
            now,
        );
        Outcome::Rejected {
            dead_letter: dead_letter_id(self.generation, Offset(offset)),
        }
    }
}
