//! Order by key: a later message of a key goes out only when every earlier one is settled, and only while none of the key is
//! in flight. Judged where the queue was surely in order: from the answer to who asked for it on.

use std::collections::{BTreeMap, BTreeSet};

use chrono::TimeDelta;

use super::{Act, BEHIND, Delivered, History, Order, SLACK, Seen, Time, Verb, Whose};

/// When something surely was so, or may have been: from and until.
type Span = (Time, Time);

/// What is known of one message in one generation.
#[derive(Default)]
struct Message<'a> {
    /// By number: the first time that it came.
    came: BTreeMap<u64, &'a Delivered>,
    /// By number: the receive that was given it.
    batches: BTreeSet<u64>,
    /// When it may have been settled, or for its key as good as.
    free: Vec<Span>,
    /// When redrives brought it back.
    reborn: Vec<Time>,
}

/// Faults, each one a line.
pub fn check(history: &History) -> Vec<String> {
    let mut faults = Vec::new();
    let ordered = ordered(history);
    if ordered.is_empty() {
        return faults;
    }
    let starts: BTreeMap<u64, u64> = history
        .renewals()
        .map(|(_, generation, start)| (generation, start))
        .collect();
    let mut keys: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (offset, published) in &history.published {
        if let Some(key) = &published.key {
            keys.entry(key).or_default().push(*offset);
        }
    }
    let generations: BTreeSet<u64> = history.delivered.iter().map(|d| d.generation).collect();
    let holds = matches!(ordered[0].2, Order::Key { holds: true, .. });
    for (key, offsets) in keys {
        for &generation in &generations {
            let start = starts.get(&generation).copied().unwrap_or(1);
            let of_generation = offsets.iter().copied();
            let messages: BTreeMap<u64, Message<'_>> = of_generation
                .map(|offset| (offset, Message::new(history, generation, offset, holds)))
                .collect();
            for (&offset, message) in &messages {
                for came in message.came.values() {
                    let is_ordered = ordered.iter().any(|(from, until, _)| {
                        came.asked.at > *from && came.asked.answered < *until
                    });
                    if is_ordered {
                        let late = Late {
                            key,
                            offset,
                            came,
                            start,
                        };
                        late.check(history, message, &messages, &mut faults);
                    }
                }
            }
        }
    }
    faults
}

/// When the queue surely was in order.
fn ordered(history: &History) -> Vec<(Time, Time, Order)> {
    let mut changes = vec![(Time::MIN_UTC, Time::MIN_UTC, history.rules.order)];
    changes.extend(history.done.iter().filter_map(|done| match done.act {
        Act::Ordered(order) => Some((done.asked.at, done.asked.answered, order)),
        _ => None,
    }));
    let spans = changes.iter().enumerate().map(|(place, (_, from, order))| {
        let until = changes.get(place + 1).map_or(Time::MAX_UTC, |next| next.0);
        (*from, until, *order)
    });
    spans
        .filter(|(_, _, order)| *order != Order::None)
        .collect()
}

impl<'a> Message<'a> {
    fn new(history: &'a History, generation: u64, offset: u64, holds: bool) -> Self {
        let mut message = Self::default();
        let is_meant = |g: u64, o: u64| g == generation && o == offset;
        for delivered in history
            .delivered
            .iter()
            .filter(|d| is_meant(d.generation, d.offset))
        {
            message.came.entry(delivered.delivery).or_insert(delivered);
        }
        let journaled = history
            .journaled
            .iter()
            .filter(|j| is_meant(j.generation, j.offset));
        message.batches = journaled.map(|journaled| journaled.batch).collect();
        for settled in history
            .settled
            .iter()
            .filter(|s| is_meant(s.generation, s.offset))
        {
            // A node that repeats an ack to the next owner, since the former one did not answer, may be told that it is settled.
            let is_repeated =
                history.acked.contains(&(generation, offset)) && settled.is_told("already_settled");
            let is_of_ack = settled.told.is_none() || is_repeated;
            let may_settle = settled.is_told("acked") || is_of_ack && settled.verb == Verb::Ack;
            if may_settle {
                let until = settled
                    .told
                    .as_ref()
                    .map_or(Time::MAX_UTC, |_| settled.asked.answered);
                message.free.push((settled.asked.at, until));
            }
        }
        let mut rejected = BTreeSet::new();
        for done in &history.done {
            match &done.act {
                Act::Deleted(other) | Act::LetterRemoved { offset: other, .. }
                    if *other == offset => {}
                Act::Rejected {
                    offset: other,
                    reason,
                } if *other == offset => {
                    rejected.insert(reason);
                }
                _ => continue,
            }
            message.free.push((done.asked.at, done.asked.answered));
        }
        let mut died = None;
        for seen in history.letters.get(&offset).into_iter().flatten() {
            match seen {
                Seen::Died(death) if death.generation == generation => {
                    let last = death.failures.last();
                    let by_hand = last.is_some_and(|(_, reason)| rejected.contains(reason));
                    if !holds || by_hand {
                        died = Some(message.free.len());
                        let until = death.died_at + BEHIND;
                        message.free.push((death.died_at - SLACK, until));
                    }
                }
                Seen::Redriven { at, .. } => {
                    message.reborn.push(*at);
                    if let Some(place) = died.take() {
                        let until = &mut message.free[place].1;
                        *until = (*until).min(*at - TimeDelta::milliseconds(1));
                    }
                }
                _ => {}
            }
        }
        message
    }
}

/// A delivery that came in order, or should have.
struct Late<'a> {
    key: &'a str,
    offset: u64,
    came: &'a Delivered,
    start: u64,
}

impl Late<'_> {
    fn check(
        &self,
        history: &History,
        own: &Message<'_>,
        messages: &BTreeMap<u64, Message<'_>>,
        faults: &mut Vec<String>,
    ) {
        let came = self.came;
        for (&other, message) in messages {
            let is_together = message.batches.intersection(&own.batches).next().is_some();
            if other == self.offset || is_together {
                continue;
            }
            if other < self.offset && other >= self.start && !self.is_free(message) {
                faults.push(format!(
                    "key {}: {} came as delivery {} while {other} was unsettled",
                    self.key, self.offset, came.delivery
                ));
            }
            for live in message.came.values() {
                let is_before = live.asked.answered < came.asked.at;
                let may_be = is_before && live.visible_until > came.asked.answered;
                if may_be && live_until(history, message, other, live) > came.asked.answered {
                    faults.push(format!(
                        "key {}: {} came as delivery {} while {other} was in flight: {came:?}, {live:?}",
                        self.key, self.offset, came.delivery
                    ));
                }
            }
        }
    }

    /// Whether an earlier message may have been settled since it was last surely not.
    fn is_free(&self, earlier: &Message<'_>) -> bool {
        let came = earlier
            .came
            .values()
            .filter(|d| d.asked.answered <= self.came.asked.at);
        let came = came.map(|delivered| delivered.asked.at);
        let reborn = earlier
            .reborn
            .iter()
            .copied()
            .filter(|at| *at + BEHIND < self.came.asked.at);
        let unsettled = came.chain(reborn).max().unwrap_or(Time::MIN_UTC);
        let mut free = earlier.free.iter();
        free.any(|(from, until)| *until >= unsettled && *from <= self.came.asked.answered + SLACK)
    }
}

/// Until when a delivery was surely in flight.
fn live_until(history: &History, message: &Message<'_>, offset: u64, live: &Delivered) -> Time {
    let of_this = history.settled.iter().filter(|s| {
        (s.generation, s.offset, s.delivery) == (live.generation, offset, live.delivery)
    });
    let ends = of_this.map(|settled| match settled.verb {
        // One that came late may have made the time shorter.
        Verb::Extend(by) => settled.asked.at + by,
        _ => settled.asked.at,
    });
    let by_hand = history.done.iter().filter(|done| match &done.act {
        Act::Expired(Whose::Consumer(name)) => *name == live.consumer,
        Act::Expired(Whose::Offsets(offsets)) => offsets.contains(&offset),
        Act::Renewed { .. } => true,
        Act::Deleted(other) | Act::Rejected { offset: other, .. } => *other == offset,
        _ => false,
    });
    let by_hand = by_hand
        .filter(|done| done.asked.answered >= live.asked.at)
        .map(|done| done.asked.at);
    let died = message
        .free
        .iter()
        .map(|(from, _)| *from)
        .filter(|from| *from >= live.asked.at);
    ends.chain(by_hand)
        .chain(died)
        .fold(live.visible_until - SLACK, Time::min)
}

#[cfg(test)]
mod tests {
    use super::super::sample::{
        asked, at, delivered, done, find, finds, finds_in, finds_nothing, journal, settled, sound,
    };
    use super::super::*;

    fn of_key(history: &mut History, offset: u64, key: &str) {
        let key = Some(key.to_owned());
        history.published.insert(offset, Published { key });
    }

    #[test]
    fn a_key_out_of_order_is_found() {
        finds(
            "key k: 2 came as delivery 1 while 1 was unsettled",
            |history| {
                find(history, 2, 1).asked = asked(1_400);
            },
        );
        // The last delivery of the first is live then.
        finds(
            "key k: 2 came as delivery 1 while 1 was in flight",
            |history| {
                find(history, 2, 1).asked = asked(1_550);
            },
        );
        // Not in order then, or not surely.
        finds_nothing(|history| {
            find(history, 2, 1).asked = asked(1_400);
            history.done.push(done(1_000, Act::Ordered(Order::None)));
        });
        finds_in(sound(), "while 1 was unsettled", |history| {
            find(history, 2, 1).asked = asked(1_400);
            history.done.push(done(1_000, Act::Ordered(Order::None)));
            history.done.push(done(
                1_200,
                Act::Ordered(Order::Key {
                    holds: false,
                    batches: false,
                }),
            ));
        });
    }

    #[test]
    fn a_redriven_message_comes_before_the_later_ones_of_its_key() {
        // 5 was redriven at 3295, came at 4400 and was acknowledged at 4500; 6 came at 4400.
        let keyed = |history: &mut History| {
            of_key(history, 5, "m");
            of_key(history, 6, "m");
        };
        finds(
            "key m: 6 came as delivery 1 while 5 was unsettled",
            |history| keyed(history),
        );
        finds_nothing(|history| {
            keyed(history);
            find(history, 6, 1).asked = asked(4_600);
        });
        // After its death and before it was redriven.
        finds_nothing(|history| {
            keyed(history);
            find(history, 6, 1).asked = asked(3_250);
            history
                .settled
                .push(settled(3_280, Verb::Release, 6, 1, "released"));
        });
    }

    #[test]
    fn a_batch_of_a_key_comes_together() {
        let together = |history: &mut History| {
            of_key(history, 3, "m");
            of_key(history, 4, "m");
        };
        finds(
            "key m: 4 came as delivery 1 while 3 was unsettled",
            |history| {
                together(history);
                history.settled.retain(|settled| settled.offset != 3);
            },
        );
        finds_nothing(|history| {
            together(history);
            for journaled in history
                .journaled
                .iter_mut()
                .filter(|j| j.offset == 3 || j.offset == 4)
            {
                journaled.batch = 1_000;
            }
        });
    }

    #[test]
    fn a_held_key_that_goes_on_is_found() {
        let held = |history: &mut History| {
            history.rules.order = Order::Key {
                holds: true,
                batches: false,
            };
            history.published.insert(
                7,
                Published {
                    key: Some("h".to_owned()),
                },
            );
            of_key(history, 4, "h");
            history.delivered.push(Delivered {
                ..delivered(2_000, 7, 1, 1)
            });
            history
                .settled
                .push(settled(2_100, Verb::Ack, 7, 1, "acked"));
            history
                .done
                .retain(|done| !matches!(done.act, Act::Renewed { .. }));
            history.delivered.retain(|d| d.generation == 1);
            history
                .settled
                .retain(|s| s.generation == 1 && s.offset != 6);
            history
                .settled
                .push(settled(4_600, Verb::Ack, 6, 1, "acked"));
            journal(history);
        };
        finds(
            "key h: 7 came as delivery 1 while 4 was unsettled",
            |history| held(history),
        );
        finds_nothing(|history| {
            held(history);
            history.done.push(done(
                1_000,
                Act::LetterRemoved {
                    generation: 1,
                    offset: 4,
                },
            ));
            history.letters.get_mut(&4).unwrap().push(Seen::Removed);
            assert!(at(1_000) < at(2_000));
        });
    }
}
