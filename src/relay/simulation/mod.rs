//! Two relays of one origin, by seed. Their decisions come from the real code (`decide`, `position`), over an origin whose
//! crashes assign ids again, and a broker whose appends come late, come twice, or lose their answer.
//!
//! Safety: nothing is written under a former epoch, nothing is appended twice, nothing is appended that was not durable,
//! and the versions of a key follow one another (except in runs where the origin went back in time: there history forks,
//! and only loss and doubling are judged). Liveness, when faults stop: within a bounded number of calls everything
//! committed is in the log.

mod driver;
mod origin;

use std::collections::BTreeMap;

use self::driver::{Append, Appended, Asks, Driver};
use self::origin::{Origin, Row};
use crate::simulation::{Dice, Fault, are_found, seeds};

/// Steps with faults.
const STEPS: u64 = 600;
/// Calls within which everything is relayed when they stop.
const CALM: usize = 2_000;

/// Wrong variants, each of which must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    NoMark,
    MarkIsNotFlushed,
    MarkIsNotAsked,
    NoStragglers,
    OrderByXid,
    /// Another cluster's snapshots are taken for this one's.
    OneClusterIsAsGoodAsAnother,
    NoRestamp,
    RerelaysWithoutLooking,
    /// A window that was left in the middle is read from its beginning.
    WindowBeginsAgain,
    CursorOutlivesSession,
    /// The position is not compared with the one that the rows follow.
    NoCompare,
    NoEpochCheck,
    /// The rows in one commit, the position in another.
    PositionApart,
}

const WRONG: &[Wrong] = &[
    Wrong::NoMark,
    Wrong::MarkIsNotFlushed,
    Wrong::MarkIsNotAsked,
    Wrong::NoStragglers,
    Wrong::OrderByXid,
    Wrong::OneClusterIsAsGoodAsAnother,
    Wrong::NoRestamp,
    Wrong::RerelaysWithoutLooking,
    Wrong::WindowBeginsAgain,
    Wrong::CursorOutlivesSession,
    Wrong::NoCompare,
    Wrong::NoEpochCheck,
    Wrong::PositionApart,
];

/// The broker's database.
#[derive(Debug, Default)]
struct Broker {
    epoch: i64,
    number: i64,
    position: Option<String>,
    /// The place of each message in the log.
    log: BTreeMap<u64, usize>,
    versions: BTreeMap<u64, u64>,
}

/// An append under way.
struct Sent {
    append: Append,
    /// The driver that waits for it; None once it was given up.
    by: Option<usize>,
}

struct Run {
    dice: Dice,
    wrong: Option<Wrong>,
    origin: Origin,
    copy: Option<Origin>,
    has_gone_back: bool,
    moves: u32,
    broker: Broker,
    drivers: [Driver; 2],
    sent: Vec<Sent>,
}

impl Run {
    fn new(seed: u64, wrong: Option<Wrong>) -> Self {
        let mut run = Self {
            dice: Dice::new(seed),
            wrong,
            origin: Origin::new(wrong),
            copy: None,
            has_gone_back: false,
            moves: 0,
            broker: Broker::default(),
            drivers: [Driver::new(1, wrong), Driver::new(2, wrong)],
            sent: Vec::new(),
        };
        run.take_over(0);
        run
    }

    /// A relay starts again: nobody waits for the answers to its appends.
    fn orphan(&mut self, driver: usize) {
        for sent in self.sent.iter_mut().filter(|sent| sent.by == Some(driver)) {
            sent.by = None;
        }
    }

    fn take_over(&mut self, driver: usize) {
        self.orphan(driver);
        self.broker.epoch += 1;
        self.drivers[driver].lead(self.broker.epoch);
    }

    fn advance(&mut self, driver: usize) {
        let one = &mut self.drivers[driver];
        if one.is_out {
            return;
        }
        let log = &self.broker.log;
        match one.advance(&mut self.origin, |id| log.contains_key(&id)) {
            Asks::Nothing => {}
            Asks::Stored if one.epoch == self.broker.epoch => {
                let text = self.broker.position.as_deref();
                one.stored(self.broker.number, text, self.origin.session);
            }
            Asks::Stored => one.is_out = true,
            Asks::Append(append) => self.sent.push(Sent {
                append,
                by: Some(driver),
            }),
        }
    }

    /// An append comes through.
    fn deliver(&mut self, place: usize) -> Result<(), Fault> {
        let Sent { append, by } = self.sent.swap_remove(place);
        let outcome = self.append(append)?;
        // The answer is lost now and then.
        let outcome = match self.dice.once_in(12) {
            true => Appended::Unknown,
            false => outcome,
        };
        if let Some(driver) = by {
            self.drivers[driver].appended(outcome);
        }
        Ok(())
    }

    fn append(&mut self, append: Append) -> Result<Appended, Fault> {
        if append.epoch != self.broker.epoch && self.wrong != Some(Wrong::NoEpochCheck) {
            return Ok(Appended::Fenced);
        }
        if append.from != self.broker.number && self.wrong != Some(Wrong::NoCompare) {
            return Ok(Appended::Moved);
        }
        if append.epoch != self.broker.epoch {
            return Err(format!(
                "something is written under epoch {} while the lease is at {}",
                append.epoch, self.broker.epoch
            ));
        }
        for row in &append.rows {
            self.take_in(row)?;
        }
        if self.wrong == Some(Wrong::PositionApart) && self.dice.once_in(6) {
            return Ok(Appended::Unknown);
        }
        self.broker.number = append.to;
        self.broker.position = Some(append.position);
        Ok(Appended::Done)
    }

    fn take_in(&mut self, row: &Row) -> Result<(), Fault> {
        let next = self.broker.log.len();
        if self.broker.log.insert(row.id, next).is_some() {
            return Err(format!("message {} is appended twice", row.id));
        }
        if !self.origin.durable.contains(&row.id) {
            return Err(format!("message {} is appended and not durable", row.id));
        }
        let last = self.broker.versions.entry(row.key).or_default();
        let before = std::mem::replace(last, row.version);
        if before + 1 != row.version && !self.has_gone_back {
            return Err(format!(
                "key {}: version {} follows {before}",
                row.key, row.version
            ));
        }
        Ok(())
    }

    fn fault(&mut self) {
        let driver = self.dice.place(2);
        match self.dice.roll(16) {
            0..5 => self.origin.crash(),
            5..8 => self.take_over(driver),
            8 | 9 => {
                self.orphan(driver);
                self.drivers[driver].begin();
            }
            10 => self.copy = Some(self.origin.clone()),
            11 if self.dice.once_in(4) => {
                if let Some(copy) = &self.copy {
                    self.has_gone_back = true;
                    self.origin.put_back(copy);
                }
            }
            // Each time there are more rows of one number: at most as many as a chunk of the manifest can tell apart.
            12 if self.dice.once_in(4) && self.moves < 2 => {
                self.moves += 1;
                self.has_gone_back = true;
                self.copy = None;
                self.origin.move_to_new_cluster();
            }
            _ if !self.sent.is_empty() => {
                // Given up, and still on its way: or lost.
                let place = self.dice.place(self.sent.len());
                let by = self.sent[place].by.take();
                if self.dice.once_in(2) {
                    self.sent.swap_remove(place);
                }
                if let Some(driver) = by {
                    self.drivers[driver].appended(Appended::Unknown);
                }
            }
            _ => self.origin.flush(),
        }
    }

    fn run(&mut self) -> Result<(), Fault> {
        for _ in 0..STEPS {
            match self.dice.roll(20) {
                0 => self.fault(),
                1..7 => self.origin.produce(&mut self.dice),
                7..10 if !self.sent.is_empty() => {
                    let place = self.dice.place(self.sent.len());
                    self.deliver(place)?;
                }
                _ => {
                    let driver = self.dice.place(2);
                    self.advance(driver);
                }
            }
        }
        self.origin.end_all();
        for _ in 0..CALM {
            let leads = self
                .drivers
                .iter()
                .position(|driver| !driver.is_out && driver.epoch == self.broker.epoch);
            let Some(driver) = leads else {
                self.take_over(0);
                continue;
            };
            match self.sent.is_empty() {
                true => self.advance(driver),
                false => self.deliver(0)?,
            }
        }
        let log = &self.broker.log;
        let mut lost = self
            .origin
            .committed()
            .filter(|row| !log.contains_key(&row.id));
        if let Some(row) = lost.next() {
            return Err(format!("message {} is lost", row.id));
        }
        let leader = self
            .drivers
            .iter()
            .find(|one| one.epoch == self.broker.epoch);
        match leader {
            Some(one) if one.is_resting || !self.sent.is_empty() => Ok(()),
            // Between two looks, or in the middle of one.
            Some(_) => Err("the relay has not come to rest".to_owned()),
            None => Err("nobody leads".to_owned()),
        }
    }
}

fn simulate(seed: u64, wrong: Option<Wrong>) -> Result<(), Fault> {
    Run::new(seed, wrong).run()
}

#[test]
fn what_committed_is_appended_once_and_in_order_whatever_is_forgotten() {
    let name =
        "relay::simulation::what_committed_is_appended_once_and_in_order_whatever_is_forgotten";
    seeds(name, 600, |seed| simulate(seed, None));
}

#[test]
fn every_wrong_variant_is_found() {
    are_found(WRONG, 5_000, |seed, wrong| simulate(seed, Some(wrong)));
}

#[test]
fn runs_come_to_what_they_are_for() {
    let (mut messages, mut rerelays, mut large) = (0, 0, 0);
    for seed in 0..50 {
        let mut run = Run::new(seed, None);
        run.run().expect("the seeds of every day pass");
        messages += run.broker.log.len();
        rerelays += run.drivers.iter().map(|one| one.rerelays).sum::<u64>();
        large += run.drivers.iter().map(|one| one.large).sum::<u64>();
    }
    assert!(
        messages > 1_000 && rerelays > 60 && large > 50,
        "{messages} {rerelays} {large}"
    );
}
