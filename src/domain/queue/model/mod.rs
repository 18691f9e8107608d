//! The state machine beside a plain reference: random receives, verbs, expiries, outages, commits, folds, crashes,
//! hand-overs, seeks, purges, redrives, changed settings and other acts of people, in every kind of order and between all
//! of them. Both must agree on every answer and every count, and the rows of the dead letters on every failure. It runs
//! more than 100,000 sequences; the environment variable `PROPTEST_CASES` sets another number for each order. `faults`
//! shows that the comparison can fail.

mod cells;
mod faults;
mod matrix;
mod reference;
mod rig;

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};

use self::faults::Fault;
use self::reference::SECOND;
use self::rig::Rig;
use super::Verb;
use crate::domain::message::Priority;

/// Sequences per order.
const CASES: u32 = 17_000;
/// Sequences within which a wrong reference is found.
const FAULT_CASES: u32 = 20_000;
/// Proptest's number when the environment gives none.
const PROPTESTS_OWN: u32 = 256;
const STEPS_MAX: usize = 20;
/// One sequence in this many goes on until nothing is left.
const REST_EVERY: usize = 6;
/// Offsets that steps name: sequences are short, and it is the low ones that have a history.
const OFFSETS: std::ops::Range<i64> = 1..14;

/// The orders that a queue can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Offsets,
    Keys,
    HeldKeys,
    KeyBatches,
    Lanes,
    /// Begins by offset, and changes.
    Changing,
}

const MODES: [Mode; 5] = [
    Mode::Offsets,
    Mode::Keys,
    Mode::HeldKeys,
    Mode::KeyBatches,
    Mode::Lanes,
];

impl Mode {
    fn is_keyed(self) -> bool {
        matches!(self, Self::Keys | Self::HeldKeys | Self::KeyBatches)
    }
}

/// The settings of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    mode: Mode,
    max_attempts: u32,
    max_in_flight: u32,
    /// Between attempts, the last one for all later ones.
    delays: [i64; 3],
}

impl Plan {
    fn new(mode: Mode) -> Self {
        Self {
            mode,
            max_attempts: 4,
            max_in_flight: 6,
            delays: [3 * SECOND, 5 * SECOND, 20 * SECOND],
        }
    }

    fn delay(&self, attempts: u32) -> i64 {
        self.delays[(attempts as usize - 1).min(2)]
    }
}

#[derive(Debug, Clone, Copy)]
struct Published {
    key: Option<i64>,
    priority: Priority,
}

#[derive(Debug, Clone)]
enum Step {
    Publish(Vec<Option<Published>>),
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
    Drop(i64),
    Position,
    Commit,
    Fold,
    Crash,
    HandOver,
    Seek {
        start: i64,
        keeps_redriven: bool,
    },
    Purge,
    Redrive(Vec<i64>),
    RemoveLetter(i64),
    Delete(i64),
    Condemn(i64),
    Expire(Vec<i64>),
    Hold(bool),
    /// A queue that changes its order.
    Order(Mode),
    Tune {
        max_attempts: u32,
        max_in_flight: u32,
        factor: i64,
    },
}

fn published() -> impl Strategy<Value = Option<Published>> {
    let lane = prop_oneof![
        Just(Priority::Low),
        Just(Priority::Normal),
        Just(Priority::High)
    ];
    let message = (proptest::option::weighted(0.8, 0..3i64), lane);
    proptest::option::weighted(
        0.8,
        message.prop_map(|(key, priority)| Published { key, priority }),
    )
}

fn step() -> impl Strategy<Value = Step> {
    let verb = prop_oneof![
        3 => Just(Verb::Ack),
        3 => Just(Verb::Nack),
        2 => Just(Verb::Extend),
        2 => Just(Verb::Release),
        2 => Just(Verb::Reject),
    ];
    let receipts = proptest::collection::vec(any::<prop::sample::Index>(), 1..4);
    let delay = proptest::option::of(0..10 * SECOND);
    let offsets = || proptest::collection::vec(OFFSETS, 1..4);
    let consumers = prop_oneof![
        8 => proptest::collection::vec(published(), 1..6).prop_map(Step::Publish),
        12 => (1..5usize, SECOND..10 * SECOND).prop_map(|(count, visible)| Step::Receive { count, visible }),
        16 => (verb, receipts, delay).prop_map(|(verb, receipts, delay)| Step::Verb { verb, receipts, delay }),
        1 => (OFFSETS, 1..3u32).prop_map(|(offset, ahead)| Step::NeverIssued { offset, ahead }),
        2 => any::<prop::sample::Index>().prop_map(Step::TakeBack),
        10 => (1..15 * SECOND).prop_map(Step::Wait),
    ];
    let world = prop_oneof![
        1 => (1..60 * SECOND).prop_map(Step::Outage),
        1 => OFFSETS.prop_map(Step::Lose),
        1 => OFFSETS.prop_map(Step::Drop),
        1 => Just(Step::Position),
        6 => Just(Step::Commit),
        2 => Just(Step::Fold),
        3 => Just(Step::Crash),
        2 => Just(Step::HandOver),
    ];
    let people = prop_oneof![
        1 => (OFFSETS, any::<bool>()).prop_map(|(start, keeps_redriven)| Step::Seek { start, keeps_redriven }),
        1 => Just(Step::Purge),
        6 => offsets().prop_map(Step::Redrive),
        1 => OFFSETS.prop_map(Step::RemoveLetter),
        1 => OFFSETS.prop_map(Step::Delete),
        2 => OFFSETS.prop_map(Step::Condemn),
        2 => offsets().prop_map(Step::Expire),
        1 => any::<bool>().prop_map(Step::Hold),
        2 => prop::sample::select(&MODES[..]).prop_map(Step::Order),
        1 => (2..6u32, 1..8u32, 1..4i64).prop_map(|(max_attempts, max_in_flight, factor)| {
            Step::Tune { max_attempts, max_in_flight, factor }
        }),
    ];
    prop_oneof![48 => consumers, 15 => world, 12 => people]
}

/// Compares the machine with the reference, which has this fault.
fn compare(mode: Mode, fault: Option<Fault>) -> Result<(), TestError<Vec<Step>>> {
    // Reads the environment.
    let asked = ProptestConfig::default();
    let cases = match (fault, asked.cases) {
        (Some(_), _) => FAULT_CASES,
        (None, PROPTESTS_OWN) => CASES,
        (None, cases) => cases,
    };
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        // That there is one is enough.
        max_shrink_iters: if fault.is_some() {
            0
        } else {
            asked.max_shrink_iters
        },
        ..asked
    };
    let mut runner = match fault {
        // Found in every run, or in none.
        Some(_) => {
            TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
        }
        None => TestRunner::new(config),
    };
    let steps = proptest::collection::vec(step(), 1..STEPS_MAX);
    runner.run(&steps, |steps| {
        let mut rig = Rig::new(mode, fault);
        for step in &steps {
            rig.step(step)?;
        }
        rig.commit();
        rig.letters_agree()?;
        rig.crash();
        rig.agree()?;
        match steps.len() % REST_EVERY {
            0 => rig.come_to_rest(),
            _ => Ok(()),
        }
    })
}

fn agree(mode: Mode) {
    if let Err(error) = compare(mode, None) {
        panic!("{error}");
    }
}

#[test]
fn the_machine_and_the_reference_agree() {
    agree(Mode::Offsets);
}

#[test]
fn they_agree_in_order_of_keys() {
    agree(Mode::Keys);
}

#[test]
fn they_agree_in_order_of_keys_that_dead_letters_hold() {
    agree(Mode::HeldKeys);
}

#[test]
fn they_agree_in_batches_of_keys() {
    agree(Mode::KeyBatches);
}

#[test]
fn they_agree_by_lanes() {
    agree(Mode::Lanes);
}

#[test]
fn they_agree_while_the_settings_change() {
    agree(Mode::Changing);
}
