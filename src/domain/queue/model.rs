//! The state machine beside a plain reference: a list of messages, each with its own little state, and no journal. Random
//! receives, verbs, expiries, outages, commits, folds and crashes; both must agree on every answer. The number of cases
//! comes from `PROPTEST_CASES`.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::domain::policy::{FREE_RELEASES, RetryPolicy};
use crate::domain::receipt::Receipt;

const SECOND: i64 = 1_000;
const MAX_ATTEMPTS: u32 = 4;
const MAX_IN_FLIGHT: u32 = 6;
const DELAYS: [i64; 3] = [3 * SECOND, 5 * SECOND, 20 * SECOND];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plain {
    Fresh,
    Live {
        until: i64,
    },
    Waiting {
        end: End,
        due: i64,
    },
    Acked,
    Dead {
        last: u32,
    },
    /// Retention's hard limit passed it, handed out or not.
    Lost {
        was_fresh: bool,
    },
}

#[derive(Debug, Clone)]
struct Message {
    plain: Plain,
    delivery: u32,
    attempts: u32,
    releases: u32,
    timed_out: bool,
}

#[derive(Debug, Clone, Default)]
struct Reference {
    messages: BTreeMap<i64, Message>,
}

impl Reference {
    fn publish(&mut self, offset: i64) {
        self.messages.entry(offset).or_insert(Message {
            plain: Plain::Fresh,
            delivery: 0,
            attempts: 0,
            releases: 0,
            timed_out: false,
        });
    }

    fn live(&self) -> usize {
        let live = |message: &&Message| matches!(message.plain, Plain::Live { .. });
        self.messages.values().filter(live).count()
    }

    fn receive(&mut self, now: i64, count: usize, visible: i64) -> Vec<(i64, u32, u32)> {
        let room = (MAX_IN_FLIGHT as usize).saturating_sub(self.live());
        let mut handed = Vec::new();
        for (&offset, message) in &mut self.messages {
            let is_ready = match message.plain {
                Plain::Fresh => true,
                Plain::Waiting { due, .. } => due <= now,
                _ => false,
            };
            let alone = message.timed_out && message.attempts >= 2;
            if !is_ready || handed.len() >= count.min(room) || alone && !handed.is_empty() {
                continue;
            }
            message.delivery += 1;
            message.plain = Plain::Live {
                until: now + visible,
            };
            handed.push((offset, message.delivery, message.attempts + 1));
            if alone {
                break;
            }
        }
        handed
    }

    fn expire(&mut self, now: i64) {
        for message in self.messages.values_mut() {
            if let Plain::Live { until } = message.plain
                && until <= now
            {
                message.attempts += 1;
                message.timed_out = true;
                let due = match message.attempts {
                    1 | 2 => now,
                    attempts => now + DELAYS[(attempts as usize - 1).min(2)],
                };
                message.plain = match message.attempts >= MAX_ATTEMPTS {
                    true => Plain::Dead {
                        last: message.delivery,
                    },
                    false => Plain::Waiting {
                        end: End::TimedOut,
                        due,
                    },
                };
            }
        }
    }

    fn shift(&mut self, by: i64) {
        for message in self.messages.values_mut() {
            if let Plain::Live { until } = &mut message.plain {
                *until += by;
            }
        }
    }

    fn lose(&mut self, offset: i64) {
        if let Some(message) = self.messages.get_mut(&offset)
            && !matches!(
                message.plain,
                Plain::Acked | Plain::Dead { .. } | Plain::Lost { .. }
            )
        {
            let was_fresh = message.plain == Plain::Fresh;
            message.plain = Plain::Lost { was_fresh };
        }
    }

    fn take_back(&mut self, offset: i64, delivery: u32, now: i64) {
        if let Some(message) = self.messages.get_mut(&offset)
            && message.delivery == delivery
            && let Plain::Live { .. } = message.plain
        {
            message.plain = Plain::Waiting {
                end: End::Unwritten,
                due: now,
            };
        }
    }

    /// One cell of the matrix, written as PROTOCOL.md has it.
    fn verb(
        &mut self,
        verb: Verb,
        offset: i64,
        delivery: u32,
        delay: Option<i64>,
        now: i64,
    ) -> Outcome {
        let letter = dead_letter_id(Generation(1), Offset(offset));
        let Some(message) = self.messages.get_mut(&offset) else {
            return Outcome::Gone { incident: true };
        };
        match message.plain {
            Plain::Acked | Plain::Lost { was_fresh: true } => return Outcome::AlreadySettled,
            Plain::Lost { was_fresh: false } => return Outcome::Gone { incident: false },
            Plain::Dead { last } if verb == Verb::Ack && last == delivery => {
                message.plain = Plain::Acked;
                return Outcome::Acked;
            }
            Plain::Dead { .. } => {
                return Outcome::DeadLettered {
                    dead_letter: letter,
                };
            }
            _ => {}
        }
        if delivery > message.delivery || message.plain == Plain::Fresh {
            return Outcome::Gone { incident: true };
        }
        if delivery < message.delivery {
            let is_live = matches!(message.plain, Plain::Live { .. });
            let attempt = if is_live {
                message.attempts + 1
            } else {
                message.attempts.max(1)
            };
            return Outcome::Stale { attempt };
        }
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
                message.plain = Plain::Acked;
                Outcome::Acked
            }
            (Verb::Reject, _) => {
                message.plain = Plain::Dead { last: delivery };
                Outcome::Rejected {
                    dead_letter: letter,
                }
            }
            (Verb::Extend, Some(_)) => Outcome::Stale {
                attempt: message.attempts.max(1),
            },
            (Verb::Nack | Verb::Release, Some(End::Nacked)) => Outcome::Nacked {
                due_at,
                dead_letter: None,
            },
            (Verb::Nack | Verb::Release, Some(_)) => Outcome::Released {
                due_at,
                dead_letter: None,
            },
            (Verb::Extend, None) => {
                message.attempts -= u32::from(timed_out);
                message.plain = Plain::Live {
                    until: now + 30 * SECOND,
                };
                Outcome::Extended {
                    visible_until: At(now + 30 * SECOND),
                }
            }
            (Verb::Nack, None) => {
                message.attempts += u32::from(!timed_out);
                if message.attempts >= MAX_ATTEMPTS {
                    message.plain = Plain::Dead { last: delivery };
                    return Outcome::Nacked {
                        due_at: None,
                        dead_letter: Some(letter),
                    };
                }
                let policy = DELAYS[(message.attempts as usize - 1).min(2)];
                let due = now + delay.unwrap_or(policy);
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
                if message.attempts >= MAX_ATTEMPTS {
                    message.plain = Plain::Dead { last: delivery };
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

#[derive(Debug, Clone)]
enum Step {
    Publish(Vec<bool>),
    Receive {
        count: usize,
        visible: i64,
    },
    Verb {
        verb: Verb,
        receipts: Vec<prop::sample::Index>,
        delay: Option<i64>,
    },
    NeverIssued {
        offset: i64,
        ahead: u32,
    },
    TakeBack(prop::sample::Index),
    Wait(i64),
    Outage(i64),
    Lose(i64),
    Position,
    Commit,
    Fold,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    let verb = prop_oneof![
        3 => Just(Verb::Ack),
        3 => Just(Verb::Nack),
        2 => Just(Verb::Extend),
        3 => Just(Verb::Release),
        1 => Just(Verb::Reject),
    ];
    let receipts = proptest::collection::vec(any::<prop::sample::Index>(), 1..4);
    let delay = proptest::option::of(0..10 * SECOND);
    prop_oneof![
        4 => proptest::collection::vec(any::<bool>(), 1..8).prop_map(Step::Publish),
        6 => (1..5usize, SECOND..10 * SECOND).prop_map(|(count, visible)| Step::Receive { count, visible }),
        8 => (verb, receipts, delay).prop_map(|(verb, receipts, delay)| Step::Verb { verb, receipts, delay }),
        1 => (1..40i64, 1..3u32).prop_map(|(offset, ahead)| Step::NeverIssued { offset, ahead }),
        1 => any::<prop::sample::Index>().prop_map(Step::TakeBack),
        5 => (1..15 * SECOND).prop_map(Step::Wait),
        1 => (1..60 * SECOND).prop_map(Step::Outage),
        1 => (1..40i64).prop_map(Step::Lose),
        1 => Just(Step::Position),
        4 => Just(Step::Commit),
        1 => Just(Step::Fold),
        2 => Just(Step::Crash),
    ]
}

/// The machine with a journal around it, and the reference with a copy as of the last commit.
struct Rig {
    machine: Queue,
    checkpoint: Option<Vec<u8>>,
    journal: Vec<Vec<u8>>,
    reference: Reference,
    committed: Reference,
    stream: Vec<bool>,
    issued: Vec<(i64, u32)>,
    now: i64,
}

fn settings() -> Settings {
    let delays = DELAYS
        .map(|delay| Duration::from_millis(delay.unsigned_abs()))
        .to_vec();
    Settings {
        max_attempts: MAX_ATTEMPTS,
        max_in_flight: MAX_IN_FLIGHT,
        retry: RetryPolicy::List { delays },
        ..Settings::default()
    }
}

fn receipt(offset: i64, delivery: u32) -> Receipt {
    Receipt {
        queue: QueueId(1),
        generation: Generation(1),
        offset: Offset(offset),
        delivery,
    }
}

fn millis(value: i64) -> Duration {
    Duration::from_millis(value.unsigned_abs())
}

impl Rig {
    fn new() -> Self {
        Self {
            machine: Queue::new(
                QueueId(1),
                Generation(1),
                Offset(1),
                settings(),
                Random::new(1),
            ),
            checkpoint: None,
            journal: Vec::new(),
            reference: Reference::default(),
            committed: Reference::default(),
            stream: Vec::new(),
            issued: Vec::new(),
            now: 1_000_000,
        }
    }

    fn scan(&mut self) {
        let from = self.machine.scanned_through().0;
        for (index, matches) in self.stream.iter().enumerate().skip(from as usize) {
            if *matches {
                self.machine.found(Found::at(index as i64 + 1));
            }
        }
        self.machine
            .looked_through(Offset(self.stream.len() as i64));
    }

    fn commit(&mut self) {
        let batch = self.machine.take_batch();
        if !batch.is_empty() {
            self.journal.push(encode(&batch.records));
        }
        self.committed = self.reference.clone();
    }

    fn crash(&mut self) {
        let (id, generation, random) = (QueueId(1), Generation(1), Random::new(2));
        self.machine = match &self.checkpoint {
            Some(bytes) => Queue::from_checkpoint(bytes, id, generation, settings(), random)
                .expect("a checkpoint reads"),
            None => Queue::new(id, generation, Offset(1), settings(), random),
        };
        for blob in &self.journal {
            for record in decode(blob).expect("a journal reads") {
                self.machine.apply(&record);
            }
        }
        self.reference = self.committed.clone();
        for (index, matches) in self.stream.iter().enumerate() {
            if *matches {
                self.reference.publish(index as i64 + 1);
            }
        }
        self.scan();
        self.machine.advance(At(self.now), At(self.now));
        self.reference.expire(self.now);
    }

    fn settle(
        &mut self,
        verb: Verb,
        receipts: &[(i64, u32)],
        delay: Option<i64>,
    ) -> Result<(), TestCaseError> {
        let items: Vec<Item> = receipts
            .iter()
            .map(|&(offset, delivery)| Item {
                receipt: Some(receipt(offset, delivery)),
                delay: delay.map(millis),
                ..Item::default()
            })
            .collect();
        let outcomes = self.machine.settle(verb, &items, At(self.now));
        let mut order: Vec<usize> = (0..receipts.len()).collect();
        order.sort_by_key(|&index| receipts[index]);
        for index in order {
            let (offset, delivery) = receipts[index];
            let expected = self.reference.verb(verb, offset, delivery, delay, self.now);
            prop_assert_eq!(
                &outcomes[index],
                &expected,
                "{:?} {:?}",
                verb,
                receipts[index]
            );
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Publish(matches) => {
                for matches in matches {
                    self.stream.push(*matches);
                    if *matches {
                        self.reference.publish(self.stream.len() as i64);
                    }
                }
                self.scan();
            }
            Step::Receive { count, visible } => {
                let taken = self.machine.hand_out(
                    At(self.now),
                    millis(*visible),
                    &Receive::default(),
                    (*count, u64::MAX),
                    &|_| Some(1),
                );
                let handed: Vec<_> = taken
                    .handed
                    .iter()
                    .map(|h| (h.offset.0, h.delivery, h.attempt))
                    .collect();
                prop_assert_eq!(&handed, &self.reference.receive(self.now, *count, *visible));
                self.issued.extend(
                    handed
                        .iter()
                        .map(|&(offset, delivery, _)| (offset, delivery)),
                );
            }
            Step::Verb {
                verb,
                receipts,
                delay,
            } if !self.issued.is_empty() => {
                let receipts: Vec<_> = receipts
                    .iter()
                    .map(|index| *index.get(&self.issued))
                    .collect();
                self.settle(*verb, &receipts, *delay)?;
            }
            Step::NeverIssued { offset, ahead } => {
                if let Some(message) = self.reference.messages.get(offset)
                    && !matches!(
                        message.plain,
                        Plain::Acked | Plain::Dead { .. } | Plain::Lost { .. }
                    )
                {
                    let never = (*offset, message.delivery + ahead);
                    self.settle(Verb::Ack, &[never], None)?;
                }
            }
            Step::TakeBack(index) if !self.issued.is_empty() => {
                let (offset, delivery) = *index.get(&self.issued);
                self.machine
                    .take_back(&receipt(offset, delivery), At(self.now));
                self.machine.advance(At(self.now), At(self.now));
                self.reference.take_back(offset, delivery, self.now);
            }
            Step::Verb { .. } | Step::TakeBack(_) => {}
            Step::Wait(by) => self.now += by,
            Step::Outage(by) => {
                self.now += by;
                self.machine.shift(millis(*by));
                self.reference.shift(*by);
            }
            Step::Lose(offset) => {
                self.machine.lose(vec![Offset(*offset)]);
                self.reference.lose(*offset);
            }
            Step::Position => self.machine.journal_scan(self.machine.scanned_through()),
            Step::Commit => self.commit(),
            Step::Fold => {
                self.machine.journal_scan(self.machine.scanned_through());
                self.commit();
                self.checkpoint = Some(self.machine.checkpoint());
                self.journal.clear();
            }
            Step::Crash => self.crash(),
        }
        self.machine.advance(At(self.now), At(self.now));
        self.reference.expire(self.now);
        self.agree()
    }

    fn agree(&self) -> Result<(), TestCaseError> {
        let counts = self.machine.counts();
        let now = self.now;
        let count = |wanted: &dyn Fn(Plain) -> bool| {
            self.reference
                .messages
                .values()
                .filter(|message| wanted(message.plain))
                .count() as u64
        };
        let expected = Counts {
            fresh: count(&|plain| plain == Plain::Fresh),
            again: count(&|plain| matches!(plain, Plain::Waiting { due, .. } if due <= now)),
            live: count(&|plain| matches!(plain, Plain::Live { .. })),
            waiting: 0,
            lanes: None,
            delayed: count(&|plain| matches!(plain, Plain::Waiting { due, .. } if due > now)),
            dead: count(&|plain| matches!(plain, Plain::Dead { .. })),
        };
        prop_assert_eq!(counts, expected);
        let unsettled = self.reference.messages.iter().find(|(_, message)| {
            !matches!(
                message.plain,
                Plain::Acked | Plain::Dead { .. } | Plain::Lost { .. }
            )
        });
        prop_assert_eq!(
            self.machine.oldest_unsettled().map(|o| o.0),
            unsettled.map(|(&o, _)| o)
        );
        Ok(())
    }
}

proptest! {
    #[test]
    fn the_machine_and_the_reference_agree(steps in proptest::collection::vec(step(), 1..80)) {
        let mut rig = Rig::new();
        for step in &steps {
            rig.step(step)?;
        }
        rig.commit();
        rig.crash();
        rig.agree()?;
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
        settings(),
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
        settings(),
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
        settings(),
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
        ..settings()
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
        ..settings()
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
