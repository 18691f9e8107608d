//! Deliveries, settlements and attempts: nothing is lost, what was settled does not come again, nothing comes before its time,
//! delivery numbers strictly rise, attempts are exact.

use std::collections::{BTreeMap, BTreeSet};

use super::{Act, Death, Delivered, History, Journaled, SLACK, Seen, Settled, Time, Verb, Whose};

/// A message in a generation.
type Place = (u64, u64);

/// One message's part of the history, in one generation.
#[derive(Default)]
struct Part<'a> {
    /// Every delivery that the journal has.
    journaled: BTreeMap<u64, &'a Journaled>,
    /// Those that came to somebody: the first time, and repeats under the receive's id.
    came: BTreeMap<u64, Vec<&'a Delivered>>,
    settled: Vec<&'a Settled>,
}

/// Faults, each one a line.
pub fn check(history: &History) -> Vec<String> {
    let mut faults = Vec::new();
    let mut parts: BTreeMap<Place, Part<'_>> = BTreeMap::new();
    for journaled in &history.journaled {
        let part = parts
            .entry((journaled.generation, journaled.offset))
            .or_default();
        let last = part.journaled.keys().next_back().copied();
        if last.is_some_and(|last| last >= journaled.delivery) {
            faults.push(format!(
                "{}: delivery {} was journaled after {last:?}",
                journaled.offset, journaled.delivery
            ));
        }
        part.journaled.insert(journaled.delivery, journaled);
    }
    for delivered in &history.delivered {
        let part = parts
            .entry((delivered.generation, delivered.offset))
            .or_default();
        part.came
            .entry(delivered.delivery)
            .or_default()
            .push(delivered);
    }
    for settled in &history.settled {
        let part = parts
            .entry((settled.generation, settled.offset))
            .or_default();
        part.settled.push(settled);
    }
    for (&(generation, offset), part) in &parts {
        if !history.published.contains_key(&offset) {
            faults.push(format!("{offset} was never published"));
        }
        let judge = Judge {
            history,
            generation,
            offset,
            part,
        };
        judge.check(&mut faults);
    }
    check_losses(history, &parts, &mut faults);
    super::generations::check(history, &mut faults);
    super::pauses::check(history, &mut faults);
    faults
}

/// Only an ack, a person or a dead letter settles a message. "Already settled" is no proof: somebody must have done it.
fn check_losses(history: &History, parts: &BTreeMap<Place, Part<'_>>, faults: &mut Vec<String>) {
    let last = history
        .renewals()
        .max_by_key(|(_, generation, _)| *generation);
    let (generation, start) = last.map_or((1, 1), |(_, generation, start)| (generation, start));
    for &offset in history.published.range(start..).map(|(offset, _)| offset) {
        let part = parts.get(&(generation, offset));
        let is_journaled = history.acked.contains(&(generation, offset));
        let is_acked = part.is_some_and(|part| {
            let mut acks = part.settled.iter().filter(|s| s.verb == Verb::Ack);
            acks.any(|ack| match &ack.told {
                None => true,
                Some(told) => {
                    told.result == "acked" || is_journaled && told.result == "already_settled"
                }
            })
        });
        let by_hand = history.done.iter().any(|done| match &done.act {
            Act::Deleted(other) => *other == offset,
            Act::LetterRemoved { offset: other, .. } => *other == offset,
            _ => false,
        });
        if is_journaled && !is_acked && !by_hand {
            faults.push(format!(
                "{offset} was acknowledged, and nobody asked for that"
            ));
        }
        if !is_acked && !by_hand && !history.has_letter(offset) {
            let asked = part.map(|part| &part.settled[..]).unwrap_or_default();
            let journaled = part.map(|part| part.journaled.keys().collect::<Vec<_>>());
            faults.push(format!(
                "{offset} is lost: nobody settled it; deliveries {journaled:?}, asked for {asked:?}"
            ));
        }
    }
}

/// A message in a generation, with what is known of it.
struct Judge<'a> {
    history: &'a History,
    generation: u64,
    offset: u64,
    part: &'a Part<'a>,
}

impl Judge<'_> {
    fn check(&self, faults: &mut Vec<String>) {
        self.check_repeats(faults);
        self.check_ends(faults);
        self.check_attempts(faults);
        for (number, came) in &self.part.came {
            if let Some(next) = self.part.came.get(&(number + 1)) {
                self.check_time(came[0], next[0], faults);
            }
        }
    }

    /// The death that ended this delivery's life.
    fn death(&self, delivery: u64) -> Option<&Death> {
        let mut deaths = self.history.deaths(self.offset);
        deaths.find(|death| death.generation == self.generation && death.delivery == delivery)
    }

    /// One delivery comes twice only to one who asks again under the receive's id, and none comes that the journal has not.
    fn check_repeats(&self, faults: &mut Vec<String>) {
        let offset = self.offset;
        for (delivery, same) in &self.part.came {
            if !self.part.journaled.contains_key(delivery) {
                faults.push(format!(
                    "{offset}: delivery {delivery} came and was never journaled"
                ));
            }
            let first = same[0];
            for again in &same[1..] {
                let is_repeat = first.receive_id.is_some() && first.receive_id == again.receive_id;
                if !is_repeat || first.receipt != again.receipt || first.attempt != again.attempt {
                    faults.push(format!(
                        "{offset}: delivery {delivery} came to two receives"
                    ));
                }
            }
        }
    }

    /// What was settled does not come again, neither later nor under a higher number, unless it died and was redriven.
    fn check_ends(&self, faults: &mut Vec<String>) {
        let offset = self.offset;
        let acked: Vec<&&Settled> = self
            .part
            .settled
            .iter()
            .filter(|s| s.is_told("acked"))
            .collect();
        if acked.len() > 1 {
            faults.push(format!("{offset} was acknowledged {} times", acked.len()));
        }
        let last = self.part.journaled.keys().next_back().copied().unwrap_or(0);
        for settled in &self.part.settled {
            let number = settled.delivery;
            if settled.is_told("acked") && last > number {
                faults.push(format!(
                    "{offset}: delivery {number} was acknowledged, and delivery {last} came"
                ));
            }
            if settled.is_told("stale")
                && !matches!(settled.verb, Verb::Extend(_))
                && !self.is_followed(number)
            {
                faults.push(format!(
                    "{offset}: delivery {number} is said to be stale, and is the last"
                ));
            }
            let is_final = settled.is_told("acked") || settled.is_told("already_settled");
            let mut all = self.part.came.values().flatten();
            if is_final && let Some(delivered) = all.find(|d| d.asked.at > settled.asked.answered) {
                faults.push(format!(
                    "{offset}: settled by delivery {number}, and delivery {} came to a receive after the answer",
                    delivered.delivery
                ));
            }
        }
    }

    /// Whether a later delivery is there, or the number of one was used up by a redrive.
    fn is_followed(&self, number: u64) -> bool {
        let has_later = self.part.journaled.range(number + 1..).next().is_some();
        has_later || self.is_redriven(number)
    }

    /// Whether the letter of a death with this number or a later one was redriven.
    fn is_redriven(&self, number: u64) -> bool {
        let mut is_meant = false;
        let seen = self.history.letters.get(&self.offset).into_iter().flatten();
        for seen in seen {
            match seen {
                Seen::Died(death) => is_meant = death.delivery >= number,
                Seen::Redriven { .. } if is_meant => return true,
                _ => {}
            }
        }
        false
    }

    /// Attempts are exact: every delivery that the journal has counts unless it was given back.
    fn check_attempts(&self, faults: &mut Vec<String>) {
        let offset = self.offset;
        let most = *self.history.rules.max_attempts.end();
        let mut before: Option<(u64, BTreeSet<u64>)> = None;
        for (&number, journaled) in &self.part.journaled {
            let possible = match &before {
                None => BTreeSet::from([1]),
                Some((last, _)) if number > last + 1 => {
                    // The number of the redrive is one that nobody ever gets.
                    let death = number - 2;
                    let is_reborn =
                        death >= *last && self.death(death).is_some() && self.is_redriven(death);
                    if !is_reborn {
                        faults.push(format!("{offset}: delivery {number} after {last}"));
                    }
                    BTreeSet::from([1])
                }
                Some((last, attempts)) => {
                    if self.death(*last).is_some() {
                        faults.push(format!(
                            "{offset}: died with delivery {last}, and delivery {number} came"
                        ));
                    }
                    attempts.clone()
                }
            };
            if before.is_none() && number > 1 && self.history.deaths(offset).next().is_none() {
                faults.push(format!(
                    "{offset}: the first delivery has the number {number}"
                ));
            }
            let came = self.part.came.get(&number).map(|came| came[0].attempt);
            if let Some(attempt) =
                came.filter(|attempt| !possible.contains(attempt) || *attempt > most)
            {
                faults.push(format!(
                    "{offset}: delivery {number} is attempt {attempt}, expected {possible:?}"
                ));
            }
            let attempts = came.map_or(possible, |attempt| BTreeSet::from([attempt]));
            if let Some(death) = self.death(number) {
                self.check_death(death, &attempts, faults);
            }
            before = Some((number, self.after(journaled, &attempts)));
        }
    }

    /// The attempts that the next delivery may be.
    fn after(&self, journaled: &Journaled, attempts: &BTreeSet<u64>) -> BTreeSet<u64> {
        let of_this = || {
            self.part
                .settled
                .iter()
                .filter(|s| s.delivery == journaled.delivery)
        };
        // What came to nobody a node may give back, as its consumer would.
        let has_come = self.part.came.contains_key(&journaled.delivery);
        let is_given_back = journaled.is_unwritten || journaled.is_released && !has_come;
        let is_released = is_given_back || of_this().any(|s| s.is_told("released"));
        let may_be = of_this().any(|s| s.told.is_none() && s.verb == Verb::Release);
        let counted = attempts
            .iter()
            .filter(|_| !is_released)
            .map(|attempt| attempt + 1);
        let kept = attempts.iter().filter(|_| is_released || may_be).copied();
        counted.chain(kept).collect()
    }

    fn check_death(&self, death: &Death, attempts: &BTreeSet<u64>, faults: &mut Vec<String>) {
        let is_out = death.cause == "out_of_attempts";
        let rules = &self.history.rules.max_attempts;
        // One that was given back before it was rejected has made one attempt less.
        let lower = attempts
            .iter()
            .filter(|_| !is_out)
            .map(|attempt| attempt - 1);
        let possible: BTreeSet<u64> = attempts.iter().copied().chain(lower).collect();
        if !possible.contains(&death.attempts) || is_out && !rules.contains(&death.attempts) {
            faults.push(format!(
                "{}: died after {} attempts with delivery {}, expected {possible:?} within {rules:?}",
                self.offset, death.attempts, death.delivery
            ));
        }
    }

    /// The next delivery comes not before its time.
    fn check_time(&self, before: &Delivered, after: &Delivered, faults: &mut Vec<String>) {
        let of_before = || {
            self.part
                .settled
                .iter()
                .filter(|s| s.delivery == before.delivery)
        };
        let is_unclear =
            of_before().any(|s| s.told.is_none() && matches!(s.verb, Verb::Nack | Verb::Release));
        let is_unwritten = self
            .part
            .journaled
            .get(&before.delivery)
            .is_some_and(|j| j.is_unwritten);
        if is_unclear || is_unwritten {
            return;
        }
        let ended = of_before().find(|s| s.is_told("nacked") || s.is_told("released"));
        let due = match ended.and_then(|settled| settled.told.as_ref()) {
            Some(told) => told.due_at,
            None => Some(self.deadline(before)),
        };
        if let Some(due) = due
            && after.asked.answered + SLACK < due
        {
            faults.push(format!(
                "{}: delivery {} came {} early",
                self.offset,
                after.delivery,
                due - after.asked.answered
            ));
        }
    }

    /// Until when a delivery was surely held: an extension without an answer may have made it shorter, and a person may have
    /// ended it.
    fn deadline(&self, delivered: &Delivered) -> Time {
        let mut deadline = delivered.visible_until;
        let of_this = self
            .part
            .settled
            .iter()
            .filter(|s| s.delivery == delivered.delivery);
        let mut extensions: Vec<&&Settled> = of_this
            .filter(|s| matches!(s.verb, Verb::Extend(_)))
            .collect();
        extensions.sort_by_key(|settled| settled.asked.at);
        for settled in extensions {
            match (&settled.told, settled.verb) {
                (Some(told), _) => deadline = told.visible_until.unwrap_or(deadline),
                (None, Verb::Extend(by)) => deadline = deadline.min(settled.asked.at + by),
                (None, _) => {}
            }
        }
        let by_hand = self.history.done.iter().filter(|done| match &done.act {
            Act::Expired(Whose::Consumer(name)) => *name == delivered.consumer,
            Act::Expired(Whose::Offsets(offsets)) => offsets.contains(&self.offset),
            _ => false,
        });
        let by_hand = by_hand.filter(|done| done.asked.answered >= delivered.asked.at);
        by_hand.map(|done| done.asked.at).fold(deadline, Time::min)
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{
        LONGER, add, asked, delivered, done, find, finds, finds_nothing, settled,
    };
    use super::super::*;

    #[test]
    fn what_may_be_either_is_no_fault() {
        finds_nothing(|history| {
            // An ack without an answer may have settled it, or not.
            history.settled.retain(|settled| settled.offset != 3);
            let mut unknown = settled(100, Verb::Ack, 3, 1, "acked");
            unknown.told = None;
            history.settled.push(unknown);
            add(history, delivered(1_100, 3, 2, 2));
            // So may a release: the next attempt may be early or not, counted or not.
            let mut unknown = settled(1_200, Verb::Release, 3, 2, "released");
            unknown.told = None;
            history.settled.push(unknown);
            add(history, delivered(1_300, 3, 3, 2));
            history
                .settled
                .push(settled(1_400, Verb::Ack, 3, 3, "acked"));
            // Deleted, whoever had it; and in a generation of before.
            history.settled.retain(|settled| settled.offset != 1);
            history.done.push(done(1_600, Act::Deleted(1)));
        });
    }

    #[test]
    fn losses_are_found() {
        let restart = |history: &mut History| {
            history
                .done
                .retain(|done| !matches!(done.act, Act::Renewed { .. }))
        };
        finds("3 was acknowledged, and nobody asked", |history| {
            restart(history);
            history.settled.retain(|settled| settled.offset != 3);
            history.acked.insert((1, 3));
        });
        // A node asked twice for its client: told so, it counts as far as the journal has it.
        let told_later = |history: &mut History| {
            let mut of_last = history.settled.iter_mut().filter(|s| s.generation == 2);
            of_last.next().unwrap().told.as_mut().unwrap().result = "already_settled".to_owned();
        };
        finds("6 is lost", told_later);
        finds_nothing(|history| {
            told_later(history);
            history.acked.insert((2, 6));
        });
        finds("3 is lost", |history| {
            restart(history);
            history.settled.retain(|settled| settled.offset != 3);
        });
        finds("4 is lost", |history| {
            restart(history);
            history.letters.remove(&4);
        });
        finds("9 was never published", |history| {
            add(history, delivered(0, 9, 1, 1))
        });
    }

    #[test]
    fn what_comes_after_its_end_is_found() {
        finds("acknowledged, and delivery 2 came", |history| {
            add(history, delivered(1_500, 3, 2, 2))
        });
        finds("came to a receive after the answer", |history| {
            find(history, 3, 1).asked = asked(200)
        });
        finds("died with delivery 1, and delivery 2 came", |history| {
            add(history, delivered(1_500, 4, 2, 2))
        });
        finds("3 was acknowledged 2 times", |history| {
            history.settled.push(settled(500, Verb::Ack, 3, 1, "acked"));
        });
        finds("said to be stale, and is the last", |history| {
            history
                .settled
                .push(settled(1_590, Verb::Nack, 1, 2, "stale"));
        });
    }

    #[test]
    fn what_comes_early_or_twice_is_found() {
        finds("1: delivery 2 came PT0.19S early", |history| {
            find(history, 1, 2).asked = asked(800)
        });
        finds("1: delivery 2 came", |history| {
            history.settled.push(settled(900, LONGER, 1, 1, "extended"));
        });
        finds("2: delivery 2 came", |history| {
            find(history, 2, 2).asked = asked(2_200)
        });
        finds("came to two receives", |history| {
            let again = history.delivered[0].clone();
            history.delivered.push(again);
        });
        finds("came to two receives", |history| {
            history.delivered[0].receive_id = Some("a".to_owned());
            let mut again = history.delivered[0].clone();
            again.receive_id = Some("b".to_owned());
            history.delivered.push(again);
        });
        finds("came and was never journaled", |history| {
            history.journaled.retain(|j| j.offset != 3)
        });
        finds("journaled after", |history| {
            let first = history.journaled[0].clone();
            history.journaled.push(first);
        });
    }

    #[test]
    fn a_person_who_ends_a_delivery_makes_it_come_early() {
        finds_nothing(|history| {
            find(history, 1, 2).asked = asked(800);
            history
                .done
                .push(done(700, Act::Expired(Whose::Offsets(vec![1]))));
        });
        finds("early", |history| {
            find(history, 1, 2).asked = asked(800);
            history
                .done
                .push(done(700, Act::Expired(Whose::Consumer("d".to_owned()))));
        });
    }

    #[test]
    fn wrong_attempts_are_found() {
        finds("delivery 3 is attempt 3, expected {2}", |history| {
            find(history, 2, 3).attempt = 3
        });
        finds("delivery 2 is attempt 1, expected {2}", |history| {
            find(history, 1, 2).attempt = 1
        });
        finds("delivery 1 is attempt 2, expected {1}", |history| {
            find(history, 3, 1).attempt = 2
        });
        finds("delivery 5 is attempt 4, expected {1}", |history| {
            find(history, 5, 5).attempt = 4
        });
        // One that nobody got counts, if it was not given back.
        finds("delivery 2 is attempt 2, expected {1}", |history| {
            history.journaled[0].is_unwritten = true;
            let first = history.journaled[0].clone();
            find(history, first.offset, 1).attempt = 1;
            assert_eq!(first.offset, 1);
        });
        // Released, and nobody asked for that who had it.
        finds("delivery 2 is attempt 1, expected {2}", |history| {
            history.journaled[0].is_released = true;
            find(history, 1, 2).attempt = 1;
        });
        finds_nothing(|history| {
            let first = history.journaled[0].clone();
            history.journaled[0].is_released = true;
            history
                .delivered
                .retain(|d| (d.offset, d.delivery) != (first.offset, 1));
            history
                .settled
                .retain(|s| (s.offset, s.delivery) != (first.offset, 1));
            for later in &mut history.delivered {
                if later.offset == first.offset {
                    later.attempt -= 1;
                }
            }
        });
        finds("5: delivery 5 after 3", |history| {
            history.letters.remove(&5);
        });
        finds("the first delivery has the number 2", |history| {
            history
                .journaled
                .retain(|j| (j.offset, j.delivery) != (1, 1));
        });
        finds("5: died after 2 attempts", |history| {
            let Some(Seen::Died(death)) = history.letters.get_mut(&5).unwrap().first_mut() else {
                panic!("it died");
            };
            death.attempts = 2;
        });
    }
}
