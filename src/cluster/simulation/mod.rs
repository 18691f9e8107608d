//! Several nodes over one database, by seed: the real `Observer`, `View`, `State`, `Lead`, `Anew` and `assign`, in the
//! order in which the heartbeat uses them, with engines that write under the fences they are shown. Calls run late, after
//! their caller has given up, or not at all; answers are lost; nodes sleep beyond their time, die and come back; the
//! database's clock jumps.
//!
//! Safety, at every step: no write under an epoch follows one under a later epoch; an epoch has one owner; no node that was
//! heard from in time counts as dead; nothing is given back under a working engine, unless it is late. Liveness, when
//! faults stop: within bounded time every wanted lease is held by the node that it is assigned to, evenly, and allows
//! writes.

mod database;
mod node;

use std::time::Instant;

use self::database::{Answer, Call, Database};
use self::node::Node;
use super::view::LEADER;
use crate::domain::id::Slot;
use crate::simulation::{Dice, Fault, are_found, seeds};

/// In milliseconds, as all times of a run.
const TTL: i64 = 2_000;
const HEARTBEAT: i64 = 400;
const NODES: usize = 3;
/// Steps with faults.
const STEPS: u64 = 400;
/// How long it may take until everything is in place.
const CALM: i64 = 5 * TTL;

/// The leases that engines want.
fn wanted() -> Vec<String> {
    let slots = [0, 7, 21, 63].map(|slot| Slot(slot).lease_name());
    let others = ["relay/1", "duty/a"].map(str::to_owned);
    slots.into_iter().chain(others).collect()
}

/// Wrong variants, each of which must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    NoEpochCheck,
    EpochStays,
    /// A taker does not look at the holder's row again.
    NobodyIsAskedAgain,
    /// A lease that was taken by a call whose answer was lost, and assigned to another since, is kept.
    UnknownStays,
    /// Only the database's clock judges.
    NobodyWatches,
    /// Does not give back yielded leases.
    ForgetsToRelease,
    /// Gives back a lease once it is assigned to another node, whatever its engine does.
    ReleasesAtOnce,
    /// Does not take its own lease again when it does not know the epoch.
    KnowsNotItsOwn,
    /// The leader does not look at who lives.
    AssignsToTheDead,
}

const WRONG: &[Wrong] = &[
    Wrong::NoEpochCheck,
    Wrong::EpochStays,
    Wrong::NobodyIsAskedAgain,
    Wrong::UnknownStays,
    Wrong::NobodyWatches,
    Wrong::ForgetsToRelease,
    Wrong::ReleasesAtOnce,
    Wrong::KnowsNotItsOwn,
    Wrong::AssignsToTheDead,
];

/// A call under way.
struct Sent {
    /// The sender: a node and the number of its life.
    from: (usize, u64),
    /// For whom in it.
    tag: u64,
    call: Call,
    /// Carried out, and on its way back.
    answer: Option<Answer>,
}

struct Run {
    dice: Dice,
    now: i64,
    base: Instant,
    database: Database,
    nodes: Vec<Node>,
    sent: Vec<Sent>,
}

impl Run {
    fn new(seed: u64, wrong: Option<Wrong>) -> Self {
        Self {
            dice: Dice::new(seed),
            now: 0,
            base: Instant::now(),
            database: Database::new(wrong),
            nodes: (0..NODES)
                .map(|address| Node::new(address, wrong))
                .collect(),
            sent: Vec::new(),
        }
    }

    /// A node goes on where it is.
    fn advance(&mut self, index: usize) -> Result<(), Fault> {
        let node = &mut self.nodes[index];
        if node.is_down || node.asleep_until > self.now {
            return Ok(());
        }
        let calls = node.advance(self.now, self.base, &mut self.dice)?;
        let from = (index, node.life);
        let sent = calls.into_iter().map(|(tag, call)| Sent {
            from,
            tag,
            call,
            answer: None,
        });
        self.sent.extend(sent);
        Ok(())
    }

    /// A call is carried out, or its answer arrives, in any order.
    fn deliver(&mut self, place: usize) -> Result<(), Fault> {
        let sent = &mut self.sent[place];
        let Some(answer) = sent.answer.take() else {
            sent.answer = Some(self.database.call(self.now, sent.call.clone())?);
            return Ok(());
        };
        let (index, life) = sent.from;
        let node = &mut self.nodes[index];
        if node.asleep_until > self.now {
            // It lies in the socket.
            sent.answer = Some(answer);
            return Ok(());
        }
        let sent = self.sent.swap_remove(place);
        self.tell((index, life), sent.tag, Some(answer))
    }

    /// A node hears of a call, and sends what follows.
    fn tell(&mut self, from: (usize, u64), tag: u64, answer: Option<Answer>) -> Result<(), Fault> {
        let node = &mut self.nodes[from.0];
        if node.life == from.1 && !node.is_down {
            let next = node.answered(tag, answer, self.now, self.base)?;
            self.sent.extend(next.map(|call| Sent {
                from,
                tag,
                call,
                answer: None,
            }));
        }
        Ok(())
    }

    /// A connection is lost: before the call came through, after it, or so that the call comes through late.
    fn lose(&mut self, place: usize) -> Result<(), Fault> {
        let (index, life) = self.sent[place].from;
        let tag = self.sent[place].tag;
        match self.dice.roll(3) {
            0 if self.sent[place].answer.is_none() => self.sent[place].from.1 = u64::MAX,
            _ => {
                self.sent.swap_remove(place);
            }
        }
        self.tell((index, life), tag, None)
    }

    fn fault(&mut self) -> Result<(), Fault> {
        let index = self.dice.place(self.nodes.len());
        match self.dice.roll(12) {
            0..4 if !self.sent.is_empty() => {
                let place = self.dice.place(self.sent.len());
                self.lose(place)
            }
            4..6 => {
                self.nodes[index].asleep_until = self.now + self.dice.roll(3 * TTL as u64) as i64;
                Ok(())
            }
            6 | 7 => {
                self.nodes[index].crash();
                Ok(())
            }
            8 => {
                self.nodes[index].leave();
                Ok(())
            }
            9 => {
                let jump = self.dice.roll(3_600_000) as i64;
                let ahead = [-jump, jump, 0][self.dice.place(3)];
                self.database.ahead = ahead;
                self.database.steady_since = self.now;
                Ok(())
            }
            10 => {
                self.nodes[index].has_stuck_engine ^= true;
                Ok(())
            }
            _ => {
                self.nodes[index].restart();
                Ok(())
            }
        }
    }

    fn step(&mut self) -> Result<(), Fault> {
        self.now += self.dice.roll(60) as i64;
        let moves = (self.nodes.len() + self.sent.len()) as u64;
        let picked = self.dice.roll(moves) as usize;
        match picked.checked_sub(self.nodes.len()) {
            None => self.advance(picked),
            Some(place) => self.deliver(place),
        }
    }

    fn run(&mut self) -> Result<(), Fault> {
        for _ in 0..STEPS {
            match self.dice.once_in(14) {
                true => self.fault()?,
                false => self.step()?,
            }
        }
        // Some of those that died never come back.
        for (index, node) in self.nodes.iter_mut().enumerate() {
            if index == 0 || !node.is_down || self.dice.once_in(2) {
                node.restart();
            }
            node.asleep_until = 0;
            node.has_stuck_engine = false;
        }
        let until = self.now + CALM;
        while self.now < until {
            self.now += 40;
            for index in 0..self.nodes.len() {
                self.advance(index)?;
            }
            // All that is under way comes through and back; what is sent meanwhile waits for the next round.
            for place in (0..self.sent.len()).rev() {
                self.deliver(place)?;
                if self
                    .sent
                    .get(place)
                    .is_some_and(|sent| sent.answer.is_some())
                {
                    self.deliver(place)?;
                }
            }
        }
        self.is_in_place()
    }

    fn is_in_place(&self) -> Result<(), Fault> {
        let nodes: Vec<&Node> = self.nodes.iter().filter(|node| !node.is_down).collect();
        let numbers: Vec<i64> = nodes.iter().map(|node| node.incarnation()).collect();
        for lease in wanted() {
            let holder = self.database.assigned().get(&lease);
            let holder = holder.ok_or(format!("{lease} is assigned to nobody"))?;
            let place = numbers.iter().position(|number| number == holder);
            let place = place.ok_or(format!("{lease} is assigned to {holder}, who is gone"))?;
            let epoch = self.database.epoch(&lease);
            let node = nodes[place];
            let shown = node.shown(&lease);
            if epoch != shown.map(|epoch| (epoch, Some(*holder))) {
                return Err(format!(
                    "{lease}: {holder} is to hold it and knows of {shown:?}; it is {epoch:?}"
                ));
            }
            if node.written_at(&lease) < self.now - TTL {
                return Err(format!("{lease}: {holder} does not write"));
            }
        }
        let counts = numbers.iter().map(|number| {
            let assigned = self.database.assigned().iter();
            let own = assigned.filter(|(name, node)| name.starts_with("slot/") && *node == number);
            own.count()
        });
        let counts: Vec<usize> = counts.collect();
        let spread = counts.iter().max().zip(counts.iter().min());
        match spread {
            Some((most, least)) if most - least <= 1 => Ok(()),
            _ => Err(format!("slots are shared out as {counts:?}")),
        }
    }
}

fn simulate(seed: u64, wrong: Option<Wrong>) -> Result<(), Fault> {
    Run::new(seed, wrong).run()
}

#[test]
fn leases_are_safe_under_faults_and_in_place_when_they_stop() {
    let name = "cluster::simulation::leases_are_safe_under_faults_and_in_place_when_they_stop";
    seeds(name, 100, |seed| simulate(seed, None));
}

#[test]
fn every_wrong_variant_is_found() {
    are_found(WRONG, 400, |seed, wrong| simulate(seed, Some(wrong)));
}

#[test]
fn runs_come_to_what_they_are_for() {
    let (mut takes, mut writes) = (0, 0);
    for seed in 0..10 {
        let mut run = Run::new(seed, None);
        run.run().expect("the seeds of every day pass");
        takes += run.database.takes;
        writes += run.database.writes;
    }
    // A run in which nothing is taken over and nothing written shows nothing.
    assert!(takes > 150 && writes > 4_000, "{takes} {writes}");
}
