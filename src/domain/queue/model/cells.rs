//! Cells of the machine that a random walk seldom reaches, or reaches only after long waits.

use std::time::Duration;

use super::super::*;
use super::reference::SECOND;
use super::rig::settings;
use super::{Mode, Plan};
use crate::domain::message::Priority;
use crate::domain::receipt::Receipt;

fn receipt(offset: i64, delivery: u32) -> Receipt {
    Receipt {
        queue: QueueId(1),
        generation: Generation(1),
        offset: Offset(offset),
        delivery,
    }
}

fn drain(queue: &mut Queue, now: i64, count: usize) -> Vec<(i64, u32)> {
    let receive = Receive {
        consumer: None,
        receive_id: Some("r".into()),
    };
    let taken = queue.hand_out(
        At(now),
        Duration::from_secs(30),
        &receive,
        (count, 10),
        &|_| Some(4),
    );
    taken
        .handed
        .iter()
        .map(|handed| (handed.offset.0, handed.attempt))
        .collect()
}

#[test]
fn receives_are_bounded_by_bytes_and_replayed_by_id() {
    let mut queue = Queue::new(
        QueueId(1),
        Generation(1),
        Offset(1),
        settings(Plan::new(Mode::Offsets)),
        Random::new(1),
    );
    (1..=5).for_each(|offset| queue.found(Found::at(offset)));
    assert_eq!(
        drain(&mut queue, 0, 5),
        [(1, 1), (2, 1)],
        "ten bytes hold two of four"
    );
    let replayed: Vec<i64> = queue
        .replay("r")
        .iter()
        .map(|handed| handed.offset.0)
        .collect();
    assert_eq!(replayed, [1, 2]);
    let large = queue.hand_out(
        At(0),
        Duration::from_secs(1),
        &Receive::default(),
        (5, 1),
        &|_| Some(4),
    );
    assert_eq!(large.handed.len(), 1, "one is always handed out");
    let unloaded = queue.hand_out(
        At(0),
        Duration::from_secs(1),
        &Receive::default(),
        (5, 1),
        &|_| None,
    );
    assert!(unloaded.handed.is_empty() && unloaded.needs_load);
}

#[test]
fn the_hundredth_release_counts() {
    let mut queue = Queue::new(
        QueueId(1),
        Generation(1),
        Offset(1),
        settings(Plan::new(Mode::Offsets)),
        Random::new(1),
    );
    queue.found(Found::at(1));
    for delivery in 1..=103 {
        let attempt = if delivery <= 100 { 1 } else { delivery - 99 };
        assert_eq!(drain(&mut queue, 0, 1), [(1, attempt)]);
        let items = [Item {
            receipt: Some(receipt(1, delivery)),
            ..Item::default()
        }];
        let outcome = &queue.settle(Verb::Release, &items, At(0))[0];
        let is_dead = matches!(
            outcome,
            Outcome::Released {
                dead_letter: Some(_),
                ..
            }
        );
        assert_eq!(is_dead, delivery == 103, "{delivery}: {outcome:?}");
        queue.advance(At(0), At(0));
    }
}

#[test]
fn lost_messages_are_gone_and_other_generations_too() {
    let mut queue = Queue::new(
        QueueId(1),
        Generation(1),
        Offset(1),
        settings(Plan::new(Mode::Offsets)),
        Random::new(1),
    );
    queue.found(Found::at(1));
    queue.found(Found::at(2));
    drain(&mut queue, 0, 1);
    queue.lose(vec![Offset(1), Offset(2), Offset(7)]);
    let older = Receipt {
        generation: Generation(0),
        ..receipt(1, 1)
    };
    let other = Receipt {
        queue: QueueId(2),
        ..receipt(1, 1)
    };
    let items = [Some(receipt(1, 1)), Some(older), Some(other), None].map(|receipt| Item {
        receipt,
        ..Item::default()
    });
    let gone = Outcome::Gone { incident: false };
    let expected = [gone.clone(), gone, Outcome::Unknown, Outcome::Unknown];
    assert_eq!(queue.settle(Verb::Ack, &items, At(0)), expected);
    assert_eq!(queue.watermark(), Offset(2));
}

#[test]
fn holds_are_bounded_when_the_queue_says_so() {
    let hold = Settings {
        max_hold: Some(Duration::from_secs(40)),
        ..settings(Plan::new(Mode::Offsets))
    };
    let mut queue = Queue::new(QueueId(1), Generation(1), Offset(1), hold, Random::new(1));
    queue.found(Found::at(1));
    drain(&mut queue, 0, 1);
    let items = [Item {
        receipt: Some(receipt(1, 1)),
        ..Item::default()
    }];
    let outcome = queue.settle(Verb::Extend, &items, At(20 * SECOND));
    assert_eq!(
        outcome,
        [Outcome::Extended {
            visible_until: At(40 * SECOND)
        }]
    );
}

#[test]
fn unsettled_messages_have_a_bound() {
    let many = ENTRIES_MAX + 5;
    let wide = Settings {
        max_in_flight: many as u32,
        ..settings(Plan::new(Mode::Offsets))
    };
    let mut queue = Queue::new(QueueId(1), Generation(1), Offset(1), wide, Random::new(1));
    (1..=many as i64).for_each(|offset| queue.found(Found::at(offset)));
    let all = (many, u64::MAX);
    let take = |queue: &mut Queue, now: i64| {
        let receive = Receive::default();
        let taken = queue.hand_out(At(now), Duration::from_secs(60), &receive, all, &|_| {
            Some(1)
        });
        taken.handed.len()
    };
    assert_eq!(take(&mut queue, 0), ENTRIES_MAX);
    let delayed = [Item {
        receipt: Some(receipt(7, 1)),
        delay: Some(Duration::from_secs(1)),
        ..Item::default()
    }];
    queue.settle(Verb::Nack, &delayed, At(0));
    queue.advance(At(0), At(0));
    assert!(!queue.has_ready());
    assert_eq!(take(&mut queue, 0), 0, "nothing fresh");
    assert_eq!(queue.empty_reason(), EmptyReason::Delayed);
    queue.advance(At(SECOND), At(0));
    assert_eq!(take(&mut queue, SECOND), 1, "what is due again goes out");
    let acked = [Item {
        receipt: Some(receipt(9, 1)),
        ..Item::default()
    }];
    queue.settle(Verb::Ack, &acked, At(SECOND));
    assert_eq!(take(&mut queue, SECOND), 1, "a settled one makes room");
}

#[test]
fn what_died_in_a_lane_comes_back_in_its_key() {
    let mut queue = Queue::new(
        QueueId(1),
        Generation(1),
        Offset(1),
        settings(Plan::new(Mode::Lanes)),
        Random::new(1),
    );
    let found = [1, 2].map(|offset| Found {
        offset: Offset(offset),
        key_hash: Some(7),
        priority: Priority::High,
    });
    found.into_iter().for_each(|found| queue.found(found));
    assert_eq!(drain(&mut queue, 0, 1), [(1, 1)]);
    let items = [Item {
        receipt: Some(receipt(1, 1)),
        ..Item::default()
    }];
    queue.settle(Verb::Reject, &items, At(0));
    queue.change_settings(settings(Plan::new(Mode::Keys)));
    assert_eq!(queue.unmarked(Offset(0), 9), [Offset(1), Offset(2)]);
    queue.mark(Some(&found));
    queue.mark(None);
    let letter = Reborn {
        offset: Offset(1),
        delivery: 1,
    };
    queue.redrive(&[letter], At(0));
    queue.advance(At(0), At(0));
    assert_eq!(drain(&mut queue, 0, 2), [(1, 1)], "the second waits for it");
}
