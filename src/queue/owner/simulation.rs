//! A slot and its queues between two nodes, by seed: what each node does as the lease comes and goes is the code's own (`tenancy`). Around it
//! are a lease that is handed over in order or taken away, tasks that decide, write and answer, a journal whose writes come late, twice,
//! or with an answer that is lost, and processes that die.
//!
//! Safety: an orderly hand-over refuses nothing that was decided; no delivery of a message whose ack was answered, no number of a delivery twice, no write under an epoch after one of a later. Liveness, when
//! faults stop: all messages are acknowledged in bounded steps, by one owner.

use std::collections::{BTreeMap, BTreeSet};

use super::tenancy::{Change, SlotState};
use crate::domain::id::{Epoch, Fence};
use crate::simulation::{Dice, Fault, are_found, seeds};

const STEPS: u64 = 400;
const CALM: usize = 4_000;
const QUEUES: usize = 2;
const MESSAGES: u64 = 6;
const NODES: usize = 2;

/// Wrong variants, each of which must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    NoEpochCheck,
    /// A slot is read while tasks of a former time run.
    ReadsBesideTasks,
    /// Ignores a write with an unknown outcome: the slot is read again at the same epoch.
    SameEpochAfterACut,
    AnswersEarly,
    /// The lease goes while tasks run.
    LeavesAtOnce,
    /// A refused write does not end the slot's time.
    FencedStays,
    /// Never reports that a lease is yielded.
    NeverVacant,
    /// A lease that came and is to go before the engine heard of it is kept.
    UnseenStays,
    /// The owner goes by a state that is void by then.
    GoesByWhatIsVoid,
}

const WRONG: &[Wrong] = &[
    Wrong::NoEpochCheck,
    Wrong::ReadsBesideTasks,
    Wrong::SameEpochAfterACut,
    Wrong::AnswersEarly,
    Wrong::LeavesAtOnce,
    Wrong::FencedStays,
    Wrong::NeverVacant,
    Wrong::UnseenStays,
    Wrong::GoesByWhatIsVoid,
];

/// A queue's decision: a delivery by its number, or an ack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Deliver(u64, u64),
    Ack(u64),
}

/// A queue's state: by message the deliveries, and what is acknowledged.
#[derive(Debug, Clone, Default)]
struct Memory {
    deliveries: BTreeMap<u64, u64>,
    acked: BTreeSet<u64>,
}

impl Memory {
    fn apply(&mut self, decision: Decision) {
        match decision {
            Decision::Deliver(message, number) => {
                self.deliveries.insert(message, number);
            }
            Decision::Ack(message) => {
                self.acked.insert(message);
            }
        }
    }
}

#[derive(Debug, Clone)]
struct Write {
    fence: Fence,
    node: i64,
    queue: usize,
    /// The same number again is the same write.
    number: u64,
    decisions: Vec<Decision>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    /// Unwritten decisions are void.
    End,
    /// Decisions are written first.
    Yield,
}

#[derive(Debug)]
struct Task {
    queue: usize,
    fence: Fence,
    memory: Memory,
    batch: Vec<Decision>,
    /// The write that the writer has, and whether it is under way.
    submitted: Option<(Write, bool)>,
    told: Told,
}

#[derive(Debug, Default)]
struct Node {
    /// The process: a new one after a kill.
    incarnation: i64,
    state: SlotState,
    /// The fence that the lease's watch shows, and the one that the engine has seen.
    shown: Option<Fence>,
    yielding: bool,
    tasks: Vec<Task>,
    /// The reads beside the engine's task: under which fence, and each queue's state.
    reading: Option<(Fence, Vec<Memory>)>,
    is_asleep: bool,
}

impl Node {
    /// Mailboxes are taken from those that are told something: what they hear first stands.
    fn tell(&mut self, told: Told) {
        let tasks = self.tasks.iter_mut();
        for task in tasks.filter(|task| task.told == Told::Nothing) {
            task.told = told;
        }
    }
}

#[derive(Debug)]
struct Sent {
    write: Write,
    /// Nobody hears of it any more.
    is_orphan: bool,
}

struct Run {
    dice: Dice,
    wrong: Option<Wrong>,
    nodes: [Node; NODES],
    /// The lease: its epoch, and the process that has it.
    epoch: Epoch,
    holder: Option<i64>,
    /// The node that it is assigned to.
    assigned: usize,
    journal: Vec<Write>,
    sent: Vec<Sent>,
    incarnations: i64,
    numbers: u64,
    last_written: Epoch,
    acked: BTreeSet<(usize, u64)>,
    delivered: BTreeSet<(usize, u64, u64)>,
    hand_overs: u64,
    /// Epochs that did not end in order.
    cut_short: BTreeSet<i64>,
}

impl Run {
    fn new(seed: u64, wrong: Option<Wrong>) -> Self {
        let mut run = Self {
            dice: Dice::new(seed),
            wrong,
            nodes: Default::default(),
            epoch: Epoch(0),
            holder: None,
            assigned: 0,
            journal: Vec::new(),
            sent: Vec::new(),
            incarnations: 0,
            numbers: 0,
            last_written: Epoch(0),
            acked: BTreeSet::new(),
            delivered: BTreeSet::new(),
            hand_overs: 0,
            cut_short: BTreeSet::new(),
        };
        for node in 0..NODES {
            run.kill(node);
        }
        run
    }

    /// kill -9, and a start. What is on its way to the database still comes through.
    fn kill(&mut self, node: usize) {
        let former = self.nodes[node].incarnation;
        for sent in self
            .sent
            .iter_mut()
            .filter(|sent| sent.write.node == former)
        {
            sent.is_orphan = true;
        }
        self.incarnations += 1;
        self.nodes[node] = Node {
            incarnation: self.incarnations,
            ..Node::default()
        };
    }

    /// The node's lease: taken when it is assigned to the node and free, or its holder is dead; given back when it is another's.
    fn look(&mut self, node: usize) {
        let incarnations = self.nodes.each_ref().map(|node| node.incarnation);
        let one = &mut self.nodes[node];
        let holds = self.holder == Some(one.incarnation);
        if one
            .shown
            .as_ref()
            .is_some_and(|fence| !holds || fence.epoch != self.epoch)
        {
            one.shown = None;
            return;
        }
        if self.assigned != node {
            if one.shown.take().is_some() {
                one.yielding = true;
            } else if holds && !one.yielding {
                self.holder = None;
            }
            return;
        }
        let is_dead = self
            .holder
            .is_some_and(|holder| !incarnations.contains(&holder));
        if one.shown.is_none() && !one.yielding && (holds || is_dead || self.holder.is_none()) {
            self.epoch = Epoch(self.epoch.0 + 1);
            self.holder = Some(one.incarnation);
            one.shown = Some(Fence {
                lease: "slot/00".to_owned(),
                epoch: self.epoch,
            });
            self.hand_overs += 1;
        }
    }

    /// The engine hears of its lease.
    fn hear(&mut self, node: usize) {
        let one = &mut self.nodes[node];
        let told = match one.state.change(one.shown.clone()) {
            Change::Nothing => {
                if self.wrong != Some(Wrong::UnseenStays) {
                    self.leave(node);
                }
                return self.recover(node);
            }
            Change::Yield => Told::Yield,
            Change::Recover { .. } => Told::End,
        };
        one.tell(told);
        self.leave(node);
        self.recover(node);
    }

    fn leave(&mut self, node: usize) {
        let one = &mut self.nodes[node];
        let is_vacant = match self.wrong {
            Some(Wrong::LeavesAtOnce) => one.state.fence.is_none(),
            Some(Wrong::NeverVacant) => false,
            _ => one.state.is_vacant(),
        };
        if is_vacant && std::mem::take(&mut one.yielding) && self.holder == Some(one.incarnation) {
            self.holder = None;
        }
    }

    fn recover(&mut self, node: usize) {
        let one = &mut self.nodes[node];
        let fence = match self.wrong {
            Some(Wrong::ReadsBesideTasks) => {
                let fence = one.state.fence.as_ref();
                fence.filter(|_| !one.state.is_recovered)
            }
            _ => one.state.recovers(),
        };
        let fence = fence.filter(|_| one.reading.is_none());
        let Some(fence) = fence.cloned() else { return };
        if self.epoch != fence.epoch || self.holder != Some(one.incarnation) {
            if one.state.forget(&fence) && one.shown.as_ref() == Some(&fence) {
                one.shown = None;
            }
            return;
        }
        one.state.recovery_began();
        let read = |queue| {
            let mut memory = Memory::default();
            for write in self.journal.iter().filter(|write| write.queue == queue) {
                write.decisions.iter().for_each(|one| memory.apply(*one));
            }
            memory
        };
        one.reading = Some((fence, (0..QUEUES).map(read).collect()));
    }

    /// The engine hears of what was read.
    fn finish_reading(&mut self, node: usize) {
        let one = &mut self.nodes[node];
        let Some((mut fence, memories)) = one.reading.take() else {
            return;
        };
        if !one.state.recovery_ended(&fence) {
            match &one.state.fence {
                Some(present) if self.wrong == Some(Wrong::GoesByWhatIsVoid) => {
                    fence.clone_from(present);
                }
                _ => return self.recover(node),
            }
        }
        one.state.recovered();
        for (queue, memory) in memories.into_iter().enumerate() {
            one.state.task_began();
            one.tasks.push(Task {
                queue,
                fence: fence.clone(),
                memory,
                batch: Vec::new(),
                submitted: None,
                told: Told::Nothing,
            });
        }
    }

    /// A task ends, and the engine hears why.
    fn end(&mut self, node: usize, place: usize, is_known: bool) {
        let one = &mut self.nodes[node];
        let task = one.tasks.swap_remove(place);
        one.state.task_ended();
        self.leave(node);
        let forgets = match self.wrong {
            Some(Wrong::FencedStays) => false,
            _ => !is_known,
        };
        let one = &mut self.nodes[node];
        if forgets {
            if one.shown.as_ref() == Some(&task.fence) {
                one.shown = None;
            }
            if one.state.forget(&task.fence) {
                one.tell(Told::End);
            }
        }
        self.recover(node);
    }

    /// A task goes on: it decides, submits, or ends.
    fn work(&mut self, node: usize) -> Result<(), Fault> {
        let one = &mut self.nodes[node];
        if one.tasks.is_empty() {
            return Ok(());
        }
        let place = self.dice.place(one.tasks.len());
        let task = &mut one.tasks[place];
        if let Some((write, is_sent)) = &mut task.submitted {
            if !*is_sent {
                // The very same again: nobody knows what became of it.
                *is_sent = true;
                let write = write.clone();
                let is_orphan = false;
                self.sent.push(Sent { write, is_orphan });
            }
            return Ok(());
        }
        let is_over = match task.told {
            Told::End => true,
            Told::Yield => task.batch.is_empty(),
            Told::Nothing => false,
        };
        if is_over {
            self.end(node, place, true);
            return Ok(());
        }
        if task.told == Told::Nothing && self.dice.once_in(2) {
            let message = self.dice.roll(MESSAGES);
            if task.memory.acked.contains(&message) {
                // A repeat, whose first answer was lost: settled already, if that is committed.
                return match task.batch.is_empty() {
                    true => {
                        let queue = task.queue;
                        self.answer(queue, &[Decision::Ack(message)])
                    }
                    false => Ok(()),
                };
            }
            let last = task.memory.deliveries.get(&message).copied();
            let decision = match last {
                Some(_) if self.dice.once_in(2) => Decision::Ack(message),
                last => Decision::Deliver(message, last.unwrap_or(0) + 1),
            };
            task.memory.apply(decision);
            task.batch.push(decision);
            if self.wrong == Some(Wrong::AnswersEarly) {
                let queue = task.queue;
                return self.answer(queue, &[decision]);
            }
        } else if !task.batch.is_empty() {
            self.numbers += 1;
            let write = Write {
                fence: task.fence.clone(),
                node: one.incarnation,
                queue: task.queue,
                number: self.numbers,
                decisions: std::mem::take(&mut task.batch),
            };
            task.submitted = Some((write.clone(), true));
            let is_orphan = false;
            self.sent.push(Sent { write, is_orphan });
        }
        Ok(())
    }

    /// A client is told.
    fn answer(&mut self, queue: usize, decisions: &[Decision]) -> Result<(), Fault> {
        for decision in decisions {
            match *decision {
                Decision::Ack(message) => {
                    self.acked.insert((queue, message));
                }
                Decision::Deliver(message, number) => {
                    if !self.delivered.insert((queue, message, number)) {
                        return Err(format!("two deliveries of {message} are number {number}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// A write comes through; its answer, or that it is lost, reaches its task.
    fn deliver(&mut self, place: usize, is_calm: bool) -> Result<(), Fault> {
        let Sent { write, is_orphan } = self.sent.swap_remove(place);
        let is_held = self.epoch == write.fence.epoch && self.holder == Some(write.node);
        let is_written = is_held || self.wrong == Some(Wrong::NoEpochCheck);
        if is_written
            && self
                .journal
                .iter()
                .all(|other| other.number != write.number)
        {
            if write.fence.epoch < self.last_written {
                return Err(format!(
                    "a write under {} after one under {}",
                    write.fence.epoch, self.last_written
                ));
            }
            self.last_written = write.fence.epoch;
            for decision in &write.decisions {
                if let Decision::Deliver(message, _) = decision
                    && self.acked.contains(&(write.queue, *message))
                {
                    return Err(format!("{message} is delivered after its ack was answered"));
                }
            }
            self.journal.push(write.clone());
        }
        if is_orphan {
            return Ok(());
        }
        let of_write = |task: &Task| {
            let submitted = task.submitted.as_ref();
            submitted.is_some_and(|(own, _)| own.number == write.number)
        };
        let nodes = self.nodes.iter().enumerate();
        let mut found =
            nodes.filter_map(|(node, one)| Some((node, one.tasks.iter().position(of_write)?)));
        let Some((node, place)) = found.next() else {
            return Ok(());
        };
        let task = &mut self.nodes[node].tasks[place];
        if !is_calm && self.dice.once_in(8) {
            if let Some((_, is_sent)) = &mut task.submitted {
                *is_sent = false;
            }
            return Ok(());
        }
        task.submitted = None;
        if is_written {
            return self.answer(write.queue, &write.decisions);
        }
        if task.told == Told::Yield && !self.cut_short.contains(&write.fence.epoch.0) {
            return Err("what was decided is refused in an orderly hand-over".to_owned());
        }
        self.end(node, place, false);
        Ok(())
    }

    fn fault(&mut self) {
        let node = self.dice.place(NODES);
        match self.dice.roll(12) {
            0 | 1 => self.kill(node),
            2..5 => self.assigned = self.dice.place(NODES),
            5 => {
                // Taken for dead: another takes over, and it does not know.
                self.assigned = self.dice.place(NODES);
                self.cut_short.insert(self.epoch.0);
                self.holder = None;
            }
            6 => self.nodes[node].is_asleep ^= true,
            7 => {
                // A change of a queue has no known outcome: the slot is read again, at the same epoch.
                let one = &mut self.nodes[node];
                one.state.drop_state();
                one.tell(Told::End);
                self.recover(node);
            }
            _ if !self.sent.is_empty() => {
                // The writer ends: what it had is under way all the same, and nobody knows.
                let place = self.dice.place(self.sent.len());
                self.sent[place].is_orphan = true;
                let number = self.sent[place].write.number;
                for node in 0..NODES {
                    let tasks = self.nodes[node].tasks.iter();
                    let mut tasks = tasks.map(|task| task.submitted.as_ref());
                    let cut =
                        tasks.position(|own| own.is_some_and(|(own, _)| own.number == number));
                    if let Some(cut) = cut {
                        let is_known = self.wrong == Some(Wrong::SameEpochAfterACut);
                        if is_known {
                            self.nodes[node].state.drop_state();
                            self.nodes[node].tell(Told::End);
                        }
                        self.end(node, cut, is_known);
                    }
                }
            }
            _ => {}
        }
    }

    fn step(&mut self, is_calm: bool) -> Result<(), Fault> {
        let node = self.dice.place(NODES);
        if self.nodes[node].is_asleep {
            return Ok(());
        }
        match self.dice.roll(8) {
            0 => self.look(node),
            1 => self.hear(node),
            4 if self.nodes[node].reading.is_some() => self.finish_reading(node),
            2 | 3 if !self.sent.is_empty() => {
                let place = self.dice.place(self.sent.len());
                self.deliver(place, is_calm)?;
            }
            _ => self.work(node)?,
        }
        Ok(())
    }

    fn run(&mut self) -> Result<(), Fault> {
        for _ in 0..STEPS {
            match self.dice.once_in(16) {
                true => self.fault(),
                false => self.step(false)?,
            }
        }
        self.nodes
            .iter_mut()
            .for_each(|node| node.is_asleep = false);
        for _ in 0..CALM {
            self.step(true)?;
        }
        let all = QUEUES * MESSAGES as usize;
        if self.acked.len() != all {
            return Err(format!("{} of {all} are acknowledged", self.acked.len()));
        }
        let owners = self.nodes.iter().filter(|node| node.state.is_recovered);
        match owners.count() {
            1 => Ok(()),
            count => Err(format!("{count} nodes serve the slot")),
        }
    }
}

fn simulate(seed: u64, wrong: Option<Wrong>) -> Result<(), Fault> {
    Run::new(seed, wrong).run()
}

#[test]
fn a_slot_moves_between_nodes_and_nothing_answered_is_forgotten() {
    let name =
        "queue::owner::simulation::a_slot_moves_between_nodes_and_nothing_answered_is_forgotten";
    seeds(name, 600, |seed| simulate(seed, None));
}

#[test]
fn every_wrong_variant_is_found() {
    are_found(WRONG, 20_000, |seed, wrong| simulate(seed, Some(wrong)));
}

#[test]
fn runs_come_to_what_they_are_for() {
    let (mut hand_overs, mut writes) = (0, 0);
    for seed in 0..50 {
        let mut run = Run::new(seed, None);
        run.run().expect("the seeds of every day pass");
        hand_overs += run.hand_overs;
        writes += run.journal.len();
    }
    assert!(hand_overs > 200 && writes > 1_000, "{hand_overs} {writes}");
}
