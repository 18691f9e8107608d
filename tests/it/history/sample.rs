//! Histories without a fault, for faults to be planted in.

use std::collections::BTreeMap;

use chrono::TimeDelta;

use super::*;

pub fn at(milliseconds: i64) -> Time {
    Time::from_timestamp_millis(1_000_000 + milliseconds).unwrap()
}

pub fn asked(from: i64) -> Asked {
    Asked {
        at: at(from),
        answered: at(from + 10),
    }
}

pub fn delivered(from: i64, offset: u64, delivery: u64, attempt: u64) -> Delivered {
    Delivered {
        asked: asked(from),
        generation: 1,
        offset,
        delivery,
        attempt,
        receipt: format!("{offset}/{delivery}"),
        visible_until: at(from + 1_000),
        receive_id: None,
        consumer: "c".to_owned(),
    }
}

pub fn settled(from: i64, verb: Verb, offset: u64, delivery: u64, result: &str) -> Settled {
    let told = Told {
        result: result.to_owned(),
        due_at: matches!(result, "nacked" | "released").then(|| at(from + 300)),
        visible_until: (result == "extended").then(|| at(from + 2_000)),
        has_letter: matches!(result, "rejected" | "dead_lettered"),
    };
    let has_reason = matches!(verb, Verb::Nack | Verb::Reject);
    Settled {
        asked: asked(from),
        verb,
        generation: 1,
        offset,
        delivery,
        reason: has_reason.then(|| format!("{from}")),
        told: Some(told),
    }
}

pub fn done(from: i64, act: Act) -> Done {
    let asked = asked(from);
    Done { asked, act }
}

pub fn death(died_at: i64, delivery: u64, attempts: u64, reasons: &[&str]) -> Death {
    let cause = match reasons.last() {
        Some(&"timed_out") => "out_of_attempts",
        _ => "rejected",
    };
    Death {
        generation: 1,
        delivery,
        attempts,
        cause: cause.to_owned(),
        failures: reasons
            .iter()
            .map(|reason| (at(died_at), (*reason).to_owned()))
            .collect(),
        died_at: at(died_at),
    }
}

/// As the journal has it when each delivery was journaled, in the order in which they came.
pub fn journal(history: &mut History) {
    history.journaled = Vec::new();
    let mut delivered: Vec<&Delivered> = history.delivered.iter().collect();
    delivered.sort_by_key(|delivered| (delivered.asked.at, delivered.offset));
    for (batch, delivered) in delivered.into_iter().enumerate() {
        history.journaled.push(Journaled {
            generation: delivered.generation,
            offset: delivered.offset,
            delivery: delivered.delivery,
            batch: batch as u64,
            is_unwritten: false,
            is_released: false,
        });
    }
}

/// 1 and 2 of a key; 3; 4 rejected; 5 out of attempts, redriven and acknowledged; 6 redelivered in another generation.
pub fn sound() -> History {
    let mut history = History::new(Rules {
        max_attempts: 3..=3,
        order: Order::Key {
            holds: false,
            batches: false,
        },
    });
    for offset in 1..=6 {
        let key = (offset <= 2).then(|| "k".to_owned());
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
        delivered(0, 5, 1, 1),
        delivered(1_100, 5, 2, 2),
        delivered(2_200, 5, 3, 3),
        delivered(4_400, 5, 5, 1),
        delivered(4_400, 6, 1, 1),
        Delivered {
            generation: 2,
            ..delivered(6_000, 6, 1, 1)
        },
    ];
    history.settled = vec![
        settled(1_600, Verb::Ack, 1, 2, "acked"),
        settled(2_100, Verb::Nack, 2, 1, "nacked"),
        settled(2_600, Verb::Release, 2, 2, "released"),
        settled(3_100, Verb::Ack, 2, 3, "acked"),
        settled(3_200, Verb::Ack, 2, 3, "already_settled"),
        settled(100, Verb::Ack, 3, 1, "acked"),
        settled(100, Verb::Reject, 4, 1, "rejected"),
        settled(4_500, Verb::Ack, 5, 5, "acked"),
        settled(6_050, Verb::Ack, 6, 1, "gone"),
        Settled {
            generation: 2,
            ..settled(6_100, Verb::Ack, 6, 1, "acked")
        },
    ];
    let redrive = Redrive {
        id: "r".to_owned(),
        offsets: Some([5].into()),
        key: None,
        cause: Some("out_of_attempts".to_owned()),
        is_dry: false,
        status: "done".to_owned(),
        redriven: 1,
        created_at: Some(at(3_290)),
    };
    history.done = vec![
        done(3_290, Act::Redriven(redrive)),
        done(
            5_000,
            Act::Renewed {
                generation: 2,
                through: 5,
            },
        ),
        done(7_000, Act::Paused(true)),
    ];
    let back = Seen::Redriven {
        id: "r".to_owned(),
        at: at(3_295),
    };
    let timed_out = ["timed_out"; 3];
    history.letters = BTreeMap::from([
        (4, vec![Seen::Died(death(105, 1, 1, &["100"]))]),
        (
            5,
            vec![
                Seen::Died(death(3_200, 3, 3, &timed_out)),
                back,
                Seen::Removed,
            ],
        ),
    ]);
    journal(&mut history);
    // Acknowledged in the first generation would be lost in the second.
    history.published.retain(|&offset, _| offset <= 6);
    history
}

/// A delivery of the sound history.
pub fn find(history: &mut History, offset: u64, delivery: u64) -> &mut Delivered {
    let mut all = history.delivered.iter_mut();
    all.find(|d| (d.offset, d.delivery) == (offset, delivery))
        .unwrap()
}

/// One more, journaled as the others are.
pub fn add(history: &mut History, delivered: Delivered) {
    history.delivered.push(delivered);
    journal(history);
}

/// Plants a fault, and the checkers must name it.
#[track_caller]
pub fn finds(fault: &str, plant: impl FnOnce(&mut History)) {
    finds_in(sound(), fault, plant);
}

#[track_caller]
pub fn finds_in(mut history: History, fault: &str, plant: impl FnOnce(&mut History)) {
    plant(&mut history);
    let faults = check(&history);
    assert!(
        faults.iter().any(|found| found.contains(fault)),
        "{fault}: {faults:?}"
    );
}

#[track_caller]
pub fn finds_nothing(plant: impl FnOnce(&mut History)) {
    let mut history = sound();
    plant(&mut history);
    assert_eq!(check(&history), Vec::<String>::new());
}

/// Held for longer.
pub const LONGER: Verb = Verb::Extend(TimeDelta::seconds(2));

#[test]
fn a_sound_history_has_no_fault() {
    finds_nothing(|_| {});
}
