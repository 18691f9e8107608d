//! Dead letters and redrives: each death has its cause, each letter the last of its message's failures, and what comes back
//! comes back by a redrive that meant it, once.

use std::collections::{BTreeMap, BTreeSet};

use super::{Act, Asked, BEHIND, Death, History, Redrive, SLACK, Seen, Settled, Verb};

/// The reason of an attempt whose time ran out.
const TIMED_OUT: &str = "timed_out";
/// Failures that a letter keeps.
const FAILURES_KEPT: usize = 5;

/// Faults, each one a line.
pub fn check(history: &History) -> Vec<String> {
    let mut faults = Vec::new();
    let redrives = history.done.iter().filter_map(|done| match &done.act {
        Act::Redriven(redrive) => Some((redrive.id.as_str(), redrive)),
        _ => None,
    });
    let redrives: BTreeMap<&str, &Redrive> = redrives.collect();
    let mut came_back: BTreeMap<&str, u64> = BTreeMap::new();
    for (&offset, seen) in &history.letters {
        let mut last: Option<&Death> = None;
        let mut is_back = false;
        for seen in seen {
            match seen {
                Seen::Died(death) => {
                    let is_twice = last.is_some_and(|last| last.generation == death.generation);
                    if is_twice && !is_back {
                        faults.push(format!("{offset} died twice in one life"));
                    }
                    check_death(history, offset, death, &mut faults);
                    (last, is_back) = (Some(death), false);
                }
                Seen::Redriven { id, .. } => {
                    *came_back.entry(id).or_default() += 1;
                    let redrive = redrives.get(id.as_str()).copied();
                    check_redriven(history, offset, last, redrive, &mut faults);
                    is_back = true;
                }
                Seen::Unmarked => is_back = false,
                Seen::Removed => {
                    if !may_be_removed(history, offset) {
                        faults.push(format!(
                            "{offset}: its dead letter is gone, and nobody asked for that"
                        ));
                    }
                    (last, is_back) = (None, false);
                }
            }
        }
        if is_back {
            faults.push(format!(
                "{offset}: its dead letter is on its way back for ever"
            ));
        }
    }
    for redrive in redrives.values() {
        let seen = came_back.get(redrive.id.as_str()).copied().unwrap_or(0);
        if seen != redrive.redriven {
            faults.push(format!(
                "redrive {} says {}, {seen} came back",
                redrive.id, redrive.redriven
            ));
        }
    }
    for settled in history
        .settled
        .iter()
        .filter(|settled| settled.has_letter())
    {
        check_told(history, settled, &mut faults);
    }
    faults
}

/// Who is told of a letter finds it.
fn check_told(history: &History, settled: &Settled, faults: &mut Vec<String>) {
    let (generation, delivery) = (settled.generation, settled.delivery);
    let mut deaths = history.deaths(settled.offset);
    // A former delivery's receipt is told of the death of a later one.
    if !deaths.any(|death| {
        death.generation == generation && death.delivery >= delivery
            || death.generation < generation
    }) {
        faults.push(format!(
            "{}: no dead letter of delivery {delivery}",
            settled.offset
        ));
    }
}

fn may_be_removed(history: &History, offset: u64) -> bool {
    let mut settled = history
        .settled
        .iter()
        .filter(|settled| settled.offset == offset);
    let mut done = history.done.iter();
    // Told of its own ack by a node that asked twice.
    let is_repeated = |s: &Settled| {
        s.is_told("already_settled") && history.acked.contains(&(s.generation, offset))
    };
    let is_ack = |s: &Settled| s.verb == Verb::Ack && (s.told.is_none() || is_repeated(s));
    settled.any(|s| s.is_told("acked") || is_ack(s))
        || done.any(|done| match &done.act {
            Act::Deleted(other) => *other == offset,
            Act::LetterRemoved { offset: other, .. } => *other == offset,
            _ => false,
        })
}

fn check_redriven(
    history: &History,
    offset: u64,
    death: Option<&Death>,
    redrive: Option<&Redrive>,
    faults: &mut Vec<String>,
) {
    let (Some(redrive), Some(death)) = (redrive, death) else {
        faults.push(format!("{offset} was redriven, and nobody asked for that"));
        return;
    };
    let key = history
        .published
        .get(&offset)
        .and_then(|published| published.key.as_ref());
    let is_meant = !redrive.is_dry
        && redrive
            .offsets
            .as_ref()
            .is_none_or(|offsets| offsets.contains(&offset))
        && redrive
            .key
            .as_ref()
            .is_none_or(|wanted| key == Some(wanted))
        && redrive
            .cause
            .as_ref()
            .is_none_or(|cause| *cause == death.cause)
        && redrive
            .created_at
            .is_none_or(|created_at| death.died_at <= created_at + SLACK);
    if !is_meant {
        faults.push(format!(
            "{offset} was redriven by {}, which does not mean it",
            redrive.id
        ));
    }
}

fn check_death(history: &History, offset: u64, death: &Death, faults: &mut Vec<String>) {
    let of_offset = || {
        history
            .settled
            .iter()
            .filter(|settled| settled.offset == offset)
    };
    let of_death = |s: &&Settled| s.generation == death.generation && s.delivery == death.delivery;
    let by_hand = history.done.iter().filter_map(|done| match &done.act {
        Act::Rejected {
            offset: other,
            reason,
        } if *other == offset => Some(reason),
        _ => None,
    });
    let by_hand: BTreeSet<&String> = by_hand.collect();
    let last = death.failures.last();
    let is_rejected = of_offset().filter(of_death).any(|s| s.verb == Verb::Reject)
        || last.is_some_and(|(_, reason)| by_hand.contains(reason));
    if death.cause == "rejected" && !is_rejected {
        faults.push(format!("{offset} is rejected, and nobody asked for that"));
    }
    let count = death.failures.len();
    if count > FAILURES_KEPT
        || count < FAILURES_KEPT.min(death.attempts.try_into().unwrap_or(usize::MAX))
    {
        faults.push(format!(
            "{offset}: {count} failures of {} attempts",
            death.attempts
        ));
    }
    if !death.failures.is_sorted_by_key(|(at, _)| *at)
        || last.is_none_or(|(at, _)| *at != death.died_at)
    {
        faults.push(format!(
            "{offset}: the failures are not in order, or the last is not the death"
        ));
    }
    for (at, reason) in &death.failures {
        let mut asked = of_offset().filter(|settled| settled.reason.as_ref() == Some(reason));
        let fits = |s: &Settled| {
            s.asked.at <= *at + BEHIND && (s.told.is_none() || *at <= s.asked.answered + SLACK)
        };
        if reason != TIMED_OUT && !by_hand.contains(reason) && !asked.any(fits) {
            let asked: Vec<Asked> = of_offset()
                .filter(|s| s.reason.as_ref() == Some(reason))
                .map(|s| s.asked)
                .collect();
            faults.push(format!(
                "{offset}: nobody failed at {at} with the reason {reason:?}, but {asked:?}"
            ));
        }
    }
    check_complete(history, offset, death, faults);
}

/// The reason of each nack that was told of is there, as far as the letter goes back.
fn check_complete(history: &History, offset: u64, death: &Death, faults: &mut Vec<String>) {
    let Some((first, _)) = death.failures.first() else {
        return;
    };
    let is_of_death = |generation: u64| generation == death.generation;
    let came = history
        .delivered
        .iter()
        .filter(|d| d.offset == offset && is_of_death(d.generation));
    let begun = came
        .filter(|d| d.attempt == 1 && d.delivery <= death.delivery)
        .map(|d| d.delivery)
        .max();
    let Some(begun) = begun else {
        return;
    };
    for delivery in begun..=death.delivery {
        let of_delivery = history.settled.iter().filter(|s| {
            s.offset == offset
                && is_of_death(s.generation)
                && s.delivery == delivery
                && s.verb == Verb::Nack
        });
        let of_delivery: Vec<&Settled> = of_delivery.collect();
        let mut told = of_delivery.iter().filter(|s| s.is_told("nacked"));
        let is_kept = told.any(|s| s.asked.at > *first + SLACK);
        let reasons: BTreeSet<&String> = of_delivery
            .iter()
            .filter_map(|s| s.reason.as_ref())
            .collect();
        let is_there = death
            .failures
            .iter()
            .any(|(_, reason)| reasons.contains(reason));
        if is_kept && !is_there {
            faults.push(format!(
                "{offset}: the reason of delivery {delivery} is not with the letter"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{at, death, done, finds, finds_nothing, settled};
    use super::super::*;

    fn first_death(history: &mut History, offset: u64) -> &mut Death {
        match history.letters.get_mut(&offset).unwrap().first_mut() {
            Some(Seen::Died(death)) => death,
            other => panic!("{other:?}"),
        }
    }

    fn redrive(history: &mut History) -> &mut Redrive {
        let redrives = history
            .done
            .iter_mut()
            .filter_map(|done| match &mut done.act {
                Act::Redriven(redrive) => Some(redrive),
                _ => None,
            });
        redrives.into_iter().next().unwrap()
    }

    #[test]
    fn a_death_without_a_cause_is_found() {
        finds("3 is rejected, and nobody asked", |history| {
            history
                .letters
                .insert(3, vec![Seen::Died(death(500, 1, 1, &["x"]))]);
        });
        finds("4 died twice in one life", |history| {
            let again = history.letters[&4][0].clone();
            history.letters.get_mut(&4).unwrap().push(again);
        });
        finds("3: no dead letter of delivery 1", |history| {
            history
                .settled
                .push(settled(200, Verb::Nack, 3, 1, "dead_lettered"));
        });
        finds("5: its dead letter is gone", |history| {
            history.settled.retain(|settled| settled.offset != 5);
        });
        let told_later = |history: &mut History| {
            let mut acks = history.settled.iter_mut().filter(|s| s.offset == 5);
            acks.next().unwrap().told.as_mut().unwrap().result = "already_settled".to_owned();
        };
        finds("5: its dead letter is gone", told_later);
        finds_nothing(|history| {
            told_later(history);
            history.acked.insert((1, 5));
        });
        finds_nothing(|history| {
            history.settled.retain(|settled| settled.offset != 5);
            history.done.push(done(
                4_500,
                Act::LetterRemoved {
                    generation: 1,
                    offset: 5,
                },
            ));
        });
    }

    #[test]
    fn a_wrong_history_of_a_letter_is_found() {
        finds("nobody failed at", |history| {
            first_death(history, 4)
                .failures
                .insert(0, (at(50), "made up".to_owned()));
        });
        finds("nobody failed at", |history| {
            let death = first_death(history, 4);
            (death.died_at, death.failures[0].0) = (at(500), at(500));
        });
        finds("2 failures of 3 attempts", |history| {
            first_death(history, 5).failures.pop();
        });
        finds("the last is not the death", |history| {
            first_death(history, 5).died_at = at(3_100)
        });
        finds(
            "the reason of delivery 2 is not with the letter",
            |history| {
                history
                    .settled
                    .push(settled(3_205, Verb::Nack, 5, 2, "nacked"));
                first_death(history, 5).failures[0].0 = at(3_100);
            },
        );
    }

    #[test]
    fn a_wrong_redrive_is_found() {
        finds("redrive r says 2, 1 came back", |history| {
            redrive(history).redriven = 2
        });
        finds("5 was redriven by r, which does not mean it", |history| {
            redrive(history).is_dry = true
        });
        finds("5 was redriven by r, which does not mean it", |history| {
            redrive(history).offsets = Some([6].into());
        });
        finds("5 was redriven by r, which does not mean it", |history| {
            redrive(history).cause = Some("rejected".to_owned());
        });
        finds("5 was redriven by r, which does not mean it", |history| {
            redrive(history).key = Some("k".to_owned());
        });
        finds("5 was redriven by r, which does not mean it", |history| {
            redrive(history).created_at = Some(at(3_000));
        });
        finds("5 was redriven, and nobody asked", |history| {
            history
                .done
                .retain(|done| !matches!(done.act, Act::Redriven(_)));
        });
        finds("on its way back for ever", |history| {
            history.letters.get_mut(&5).unwrap().pop();
        });
    }
}
