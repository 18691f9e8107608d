//! Judges a history: nothing lost, nothing that was settled comes again, nothing comes before its time, attempts are counted
//! exactly, keys keep their order. It knows nothing of the broker but what PROTOCOL says. Its tests plant the faults.

use std::collections::BTreeMap;

use chrono::TimeDelta;

use super::history::{Delivered, History, Settled, Time, Verb};

/// The queue that the history is of.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub max_attempts: u64,
    pub is_ordered: bool,
}

/// The clocks of the broker and of the test are cut to milliseconds.
const SLACK: TimeDelta = TimeDelta::milliseconds(5);

/// One message's part of the history.
#[derive(Default)]
struct Message<'a> {
    /// By number: the first time that it came, and repeats under the receive's id.
    deliveries: BTreeMap<u64, Vec<&'a Delivered>>,
    settled: Vec<&'a Settled>,
}

/// Faults, each one a line.
pub fn check(history: &History, rules: Rules) -> Vec<String> {
    let mut messages: BTreeMap<u64, Message<'_>> = BTreeMap::new();
    for delivered in &history.delivered {
        let message = messages.entry(delivered.offset).or_default();
        let same = message.deliveries.entry(delivered.delivery).or_default();
        same.push(delivered);
    }
    for settled in &history.settled {
        let message = messages.entry(settled.offset).or_default();
        message.settled.push(settled);
    }
    let mut faults = Vec::new();
    for offset in history.published.keys() {
        let message = messages.get(offset);
        // Only an ack settles without a letter. "Already settled" is no proof: somebody must have done it.
        let is_done = message.is_some_and(|message| {
            let mut settled = message.settled.iter();
            settled.any(|s| is_told(s, "acked") || s.told.is_none() && s.verb == Verb::Ack)
        });
        if !is_done && !history.letters.contains_key(offset) {
            faults.push(format!("{offset} is lost: nobody settled it"));
        }
    }
    for (offset, message) in &messages {
        if !history.published.contains_key(offset) {
            faults.push(format!("{offset} was never published"));
        }
        message.check(*offset, rules, &mut faults);
    }
    for (offset, letter) in &history.letters {
        let is_out = letter.cause == "out_of_attempts";
        if letter.attempts > rules.max_attempts || is_out && letter.attempts != rules.max_attempts {
            faults.push(format!("{offset} died after {} attempts", letter.attempts));
        }
        let acked = messages.get(offset).and_then(Message::acked);
        if acked.is_some() {
            faults.push(format!("{offset} was acknowledged and is a dead letter"));
        }
    }
    if rules.is_ordered {
        check_keys(history, &messages, &mut faults);
    }
    faults
}

fn is_told(settled: &Settled, result: &str) -> bool {
    let told = settled.told.as_ref();
    told.is_some_and(|told| told.result == result)
}

/// Whether the message may be settled by it.
fn may_settle(settled: &Settled) -> bool {
    match &settled.told {
        Some(told) => {
            told.has_letter || matches!(told.result.as_str(), "acked" | "already_settled")
        }
        None => matches!(settled.verb, Verb::Ack | Verb::Reject | Verb::Nack),
    }
}

/// Whether nobody may get the message after this answer.
fn is_final(settled: &Settled) -> bool {
    settled.told.is_some() && may_settle(settled)
}

impl Message<'_> {
    fn acked(&self) -> Option<&Settled> {
        let mut acked = self.settled.iter().filter(|s| is_told(s, "acked"));
        acked.next().copied()
    }

    fn check(&self, offset: u64, rules: Rules, faults: &mut Vec<String>) {
        self.check_repeats(offset, faults);
        self.check_ends(offset, faults);
        let firsts: Vec<&Delivered> = self.deliveries.values().map(|same| same[0]).collect();
        for delivered in &firsts {
            let (attempt, delivery) = (delivered.attempt, delivered.delivery);
            if attempt == 0 || attempt > delivery.min(rules.max_attempts) {
                faults.push(format!(
                    "{offset}: delivery {delivery} is attempt {attempt}"
                ));
            }
        }
        for pair in firsts.windows(2) {
            let [before, after] = pair else { continue };
            let rise = after.attempt.checked_sub(before.attempt);
            let most = after.delivery - before.delivery;
            if rise.is_none_or(|rise| rise > most) {
                faults.push(format!(
                    "{offset}: attempt {} at delivery {}, then {} at {}",
                    before.attempt, before.delivery, after.attempt, after.delivery
                ));
            } else if most == 1 {
                self.check_next(before, after, faults);
            }
        }
    }

    /// One delivery comes twice only to one who asks again under the receive's id.
    fn check_repeats(&self, offset: u64, faults: &mut Vec<String>) {
        for (delivery, same) in &self.deliveries {
            let first = same[0];
            for again in &same[1..] {
                let is_repeat = first.receive_id.is_some() && first.receive_id == again.receive_id;
                if !is_repeat || first.receipt != again.receipt {
                    faults.push(format!(
                        "{offset}: delivery {delivery} came to two receives"
                    ));
                }
            }
        }
    }

    /// What was settled does not come again, neither later nor under a higher number.
    fn check_ends(&self, offset: u64, faults: &mut Vec<String>) {
        for settled in &self.settled {
            if matches!(
                settled.told.as_ref().map(|told| told.result.as_str()),
                Some("gone" | "unknown")
            ) {
                faults.push(format!("{offset}: a receipt is not known: {settled:?}"));
            }
            let later = self
                .deliveries
                .iter()
                .filter(|(number, _)| **number > settled.delivery);
            let later: Vec<&&Delivered> = later.flat_map(|(_, same)| same).collect();
            if is_told(settled, "acked") && !later.is_empty() {
                faults.push(format!(
                    "{offset}: delivery {} was acknowledged, and delivery {} came",
                    settled.delivery, later[0].delivery
                ));
            }
            let mut all = self.deliveries.values().flatten();
            if is_final(settled)
                && let Some(delivered) = all.find(|d| d.asked.at > settled.asked.answered)
            {
                faults.push(format!(
                    "{offset}: settled by delivery {}, and delivery {} came to a receive after the answer",
                    settled.delivery, delivered.delivery
                ));
            }
        }
    }

    /// The next delivery: not before its time, and the attempt counted or not as the end of the former says.
    fn check_next(&self, before: &Delivered, after: &Delivered, faults: &mut Vec<String>) {
        let of_before: Vec<&Settled> = self
            .settled
            .iter()
            .copied()
            .filter(|settled| settled.delivery == before.delivery)
            .collect();
        let is_unclear = of_before
            .iter()
            .any(|s| s.told.is_none() && matches!(s.verb, Verb::Nack | Verb::Release));
        if is_unclear {
            return;
        }
        let told = |result| of_before.iter().find(|s| is_told(s, result));
        let ended = told("nacked").or(told("released"));
        let expected = match told("released") {
            Some(_) => before.attempt,
            None => before.attempt + 1,
        };
        if after.attempt != expected {
            faults.push(format!(
                "{}: attempt {} at delivery {}, then {}, expected {expected}",
                before.offset, before.attempt, before.delivery, after.attempt
            ));
        }
        let due = match ended.and_then(|settled| settled.told.as_ref()) {
            Some(told) => told.due_at,
            None => Some(deadline(before, &of_before)),
        };
        if let Some(due) = due
            && after.asked.answered + SLACK < due
        {
            faults.push(format!(
                "{}: delivery {} came {} early",
                before.offset,
                after.delivery,
                due - after.asked.answered
            ));
        }
    }
}

/// Until when a delivery was surely held: an extension without an answer may have made it shorter.
fn deadline(delivered: &Delivered, settled: &[&Settled]) -> Time {
    let mut deadline = delivered.visible_until;
    let mut extensions: Vec<&&Settled> = settled
        .iter()
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
    deadline
}

/// A later message of a key comes only when every earlier one is settled.
fn check_keys(history: &History, messages: &BTreeMap<u64, Message<'_>>, faults: &mut Vec<String>) {
    let mut keys: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (offset, published) in &history.published {
        if let Some(key) = &published.key {
            keys.entry(key).or_default().push(*offset);
        }
    }
    for (key, offsets) in keys {
        for pair in offsets.windows(2) {
            let [earlier, later] = pair else { continue };
            let first = messages.get(later).and_then(|message| {
                let came = message.deliveries.values().flatten();
                came.map(|delivered| delivered.asked.answered).min()
            });
            let Some(first) = first else { continue };
            let asks = messages.get(earlier).map(|m| m.settled.iter());
            let ends = asks.into_iter().flatten();
            let ends = ends.filter(|s| may_settle(s)).map(|s| s.asked.at);
            let died = history.letters.get(earlier).map(|letter| letter.died_at);
            let settled = ends.chain(died).min();
            if settled.is_none_or(|settled| settled > first + SLACK) {
                faults.push(format!(
                    "key {key}: {later} came at {first}, {earlier} was settled {settled:?} at the earliest"
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::history::{Asked, Letter, Published, Told};
    use super::*;

    fn at(milliseconds: i64) -> Time {
        Time::from_timestamp_millis(1_000_000 + milliseconds).unwrap()
    }

    fn asked(from: i64) -> Asked {
        Asked {
            at: at(from),
            answered: at(from + 10),
        }
    }

    fn delivered(from: i64, offset: u64, delivery: u64, attempt: u64) -> Delivered {
        Delivered {
            asked: asked(from),
            offset,
            delivery,
            attempt,
            receipt: format!("{offset}/{delivery}"),
            visible_until: at(from + 1_000),
            receive_id: None,
        }
    }

    fn settled(from: i64, verb: Verb, offset: u64, delivery: u64, result: &str) -> Settled {
        let told = Told {
            result: result.to_owned(),
            due_at: matches!(result, "nacked" | "released").then(|| at(from + 300)),
            visible_until: (result == "extended").then(|| at(from + 2_000)),
            has_letter: matches!(result, "rejected" | "dead_lettered"),
        };
        Settled {
            asked: asked(from),
            verb,
            offset,
            delivery,
            told: Some(told),
        }
    }

    const RULES: Rules = Rules {
        max_attempts: 3,
        is_ordered: true,
    };

    /// A history without fault: 1 and 2 of a key, 3 without, 4 dead.
    fn sound() -> History {
        let mut history = History::default();
        for (offset, key) in [(1, Some("k")), (2, Some("k")), (3, None), (4, None)] {
            let key = key.map(str::to_owned);
            history.published.insert(offset, Published { key });
        }
        history.delivered = vec![
            delivered(0, 1, 1, 1),
            delivered(1_500, 1, 2, 2),
            delivered(2_000, 2, 1, 1),
            delivered(2_500, 2, 2, 2),
            delivered(3_000, 2, 3, 2),
            delivered(0, 3, 1, 1),
            delivered(0, 4, 1, 1),
        ];
        history.settled = vec![
            settled(1_600, Verb::Ack, 1, 2, "acked"),
            settled(2_100, Verb::Nack, 2, 1, "nacked"),
            settled(2_600, Verb::Release, 2, 2, "released"),
            settled(3_100, Verb::Ack, 2, 3, "acked"),
            settled(3_200, Verb::Ack, 2, 3, "already_settled"),
            settled(100, Verb::Ack, 3, 1, "acked"),
            settled(100, Verb::Reject, 4, 1, "rejected"),
        ];
        history.letters.insert(
            4,
            Letter {
                attempts: 1,
                cause: "rejected".to_owned(),
                died_at: at(105),
            },
        );
        history
    }

    /// Plants a fault, and the checker must name it.
    fn finds(fault: &str, plant: impl FnOnce(&mut History)) {
        let mut history = sound();
        plant(&mut history);
        let faults = check(&history, RULES);
        assert!(
            faults.iter().any(|found| found.contains(fault)),
            "{fault}: {faults:?}"
        );
    }

    #[test]
    fn a_sound_history_has_no_fault() {
        assert_eq!(check(&sound(), RULES), Vec::<String>::new());
    }

    #[test]
    fn what_may_be_either_is_no_fault() {
        let mut history = sound();
        // An ack without an answer may have settled it, or not.
        history.settled.retain(|settled| settled.offset != 3);
        let mut unknown = settled(100, Verb::Ack, 3, 1, "acked");
        unknown.told = None;
        history.settled.push(unknown);
        assert_eq!(check(&history, RULES), Vec::<String>::new());
        history.delivered.push(delivered(1_100, 3, 2, 2));
        assert_eq!(check(&history, RULES), Vec::<String>::new());
        // So may a nack: the next attempt may be early or not, counted or not.
        let mut unknown = settled(1_200, Verb::Nack, 3, 2, "nacked");
        unknown.told = None;
        history.settled.push(unknown);
        history.delivered.push(delivered(1_300, 3, 3, 3));
        assert_eq!(check(&history, RULES), Vec::<String>::new());
    }

    #[test]
    fn losses_are_found() {
        finds("3 is lost", |history| {
            history.settled.retain(|settled| settled.offset != 3);
        });
        finds("4 is lost", |history| history.letters.clear());
        finds("3 is lost", |history| {
            let acked = history.settled.iter_mut().find(|s| s.offset == 3).unwrap();
            acked.told.as_mut().unwrap().result = "already_settled".to_owned();
        });
        finds("9 was never published", |history| {
            history.delivered.push(delivered(0, 9, 1, 1));
        });
    }

    #[test]
    fn what_comes_after_its_end_is_found() {
        finds("delivery 2 came", |history| {
            history.delivered.push(delivered(1_500, 3, 2, 2));
        });
        finds("came to a receive after the answer", |history| {
            history.delivered.push(delivered(1_500, 4, 2, 2));
        });
        finds("acknowledged and is a dead letter", |history| {
            let letter = history.letters[&4].clone();
            history.letters.insert(3, letter);
        });
        finds("a receipt is not known", |history| {
            history.settled.push(settled(500, Verb::Ack, 3, 1, "gone"));
        });
    }

    #[test]
    fn what_comes_early_or_twice_is_found() {
        // Before its deadline, before an extended one, before the end of its delay.
        finds("delivery 2 came PT0.19S early", |history| {
            let delivered = history.delivered.iter_mut().find(|d| d.delivery == 2);
            delivered.unwrap().asked = asked(800);
        });
        finds("early", |history| {
            history.settled.push(settled(
                900,
                Verb::Extend(TimeDelta::seconds(2)),
                1,
                1,
                "extended",
            ));
        });
        finds("2: delivery 2 came", |history| {
            history.delivered[3].asked = asked(2_200);
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
    }

    #[test]
    fn wrong_attempts_are_found() {
        finds("then 3, expected 2", |history| {
            history.delivered[4].attempt = 3;
        });
        finds("then 1, expected 2", |history| {
            history.delivered[1].attempt = 1;
        });
        finds("attempt 2 at delivery 2, then 1", |history| {
            history.delivered[4].attempt = 1;
        });
        finds("delivery 1 is attempt 2", |history| {
            history.delivered[5].attempt = 2;
        });
        finds("delivery 4 is attempt 4", |history| {
            history.delivered.push(delivered(9_000, 3, 4, 4));
        });
        finds("died after 2 attempts", |history| {
            let letter = history.letters.get_mut(&4).unwrap();
            letter.cause = "out_of_attempts".to_owned();
            letter.attempts = 2;
        });
    }

    #[test]
    fn a_key_out_of_order_is_found() {
        finds("key k: 2 came", |history| {
            history.delivered[2].asked = asked(1_400);
        });
    }
}
