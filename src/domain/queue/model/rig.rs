//! The machine with a log, a journal and the rows of its dead letters around it, and the reference with a copy as of the
//! last commit.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::super::*;
use super::faults::Fault;
use super::reference::{Dead, Message, Plain, Reference, SECOND};
use super::{Mode, Plan, Published, Step};
use crate::domain::policy::{Ordering, RetryPolicy};
use crate::domain::receipt::Receipt;

pub(super) struct Rig {
    machine: Queue,
    plan: Plan,
    is_changing: bool,
    /// The state that the generation or the last fold began with.
    base: Option<Vec<u8>>,
    /// The chunks that are stored, and what the owner knows of them.
    chunks: BTreeMap<ChunkId, Vec<u8>>,
    stored: Stored,
    start: i64,
    journal: Vec<Vec<u8>>,
    letters: BTreeMap<i64, Letter>,
    reference: Reference,
    committed: Reference,
    log: Vec<Option<Published>>,
    /// Messages at or below this offset are no longer in the log.
    floor: i64,
    issued: Vec<(i64, i64, u32)>,
    /// Those known to a consumer: an answer leaves after its commit.
    answered: usize,
    now: i64,
}

pub(super) fn settings(plan: Plan) -> Settings {
    let delays = plan
        .delays
        .map(|delay| Duration::from_millis(delay.unsigned_abs()));
    Settings {
        max_attempts: plan.max_attempts,
        max_in_flight: plan.max_in_flight,
        retry: RetryPolicy::List {
            delays: delays.to_vec(),
        },
        ordering: match plan.mode.is_keyed() {
            true => Ordering::Key,
            false => Ordering::None,
        },
        hold_key: plan.mode == Mode::HeldKeys,
        key_batches: plan.mode == Mode::KeyBatches,
        priorities: plan.mode == Mode::Lanes,
        ..Settings::default()
    }
}

fn millis(value: i64) -> Duration {
    Duration::from_millis(value.unsigned_abs())
}

impl Rig {
    pub(super) fn new(mode: Mode, fault: Option<Fault>) -> Self {
        let is_changing = mode == Mode::Changing;
        let plan = Plan::new(if is_changing { Mode::Offsets } else { mode });
        let (id, generation) = (QueueId(1), Generation(1));
        Self {
            machine: Queue::new(id, generation, Offset(1), settings(plan), Random::new(1)),
            plan,
            is_changing,
            base: None,
            chunks: BTreeMap::new(),
            stored: Stored::default(),
            start: 1,
            journal: Vec::new(),
            letters: BTreeMap::new(),
            reference: Reference::new(plan, fault),
            committed: Reference::new(plan, fault),
            log: Vec::new(),
            floor: 0,
            issued: Vec::new(),
            answered: 0,
            now: 1_000_000,
        }
    }

    fn found(&self, offset: i64) -> Option<Found> {
        let published = usize::try_from(offset - 1)
            .ok()
            .and_then(|index| self.log.get(index))?;
        let published = published.filter(|_| offset > self.floor)?;
        Some(Found {
            offset: Offset(offset),
            key_hash: published.key,
            priority: published.priority,
        })
    }

    fn scan(&mut self) {
        let end = self.log.len() as i64;
        for offset in self.machine.scanned_through().0 + 1..=end {
            if let Some(found) = self.found(offset) {
                self.machine.found(found);
            }
        }
        self.machine.looked_through(Offset(end));
    }

    pub(super) fn commit(&mut self) {
        let batch = self.machine.take_batch();
        if !batch.is_empty() {
            self.journal.push(encode(&batch.records));
        }
        for removed in batch.removed_letters {
            self.letters.remove(&removed.0);
        }
        for letter in batch.letters {
            self.letters.insert(letter.offset.0, letter);
        }
        self.reference.note_commit();
        self.committed = self.reference.clone();
        self.answered = self.issued.len();
    }

    /// Passes in the marks of all that the machine asks for, a few at a time.
    fn learn_order(&mut self) {
        let mut after = Offset(0);
        while self.machine.is_arranging() {
            let unmarked = self.machine.unmarked(after, 3);
            let found: Vec<Found> = unmarked
                .iter()
                .filter_map(|offset| self.found(offset.0))
                .collect();
            match unmarked.last() {
                Some(&last) => {
                    self.machine.mark(Some(&found));
                    after = last;
                }
                None => self.machine.mark(None),
            }
        }
    }

    pub(super) fn crash(&mut self) {
        self.issued.truncate(self.answered);
        let (id, generation) = (QueueId(1), Generation(self.committed.generation));
        let (settings, random) = (settings(self.plan), Random::new(2));
        let start = Offset(self.start);
        let state = self.base.as_deref();
        let carried = state.and_then(|bytes| {
            Queue::from_carried(
                bytes,
                id,
                generation,
                start,
                settings.clone(),
                random.clone(),
            )
            .expect("the state of a generation's beginning reads")
        });
        self.machine = match (carried, state) {
            (Some(machine), _) => machine,
            (None, Some(bytes)) => {
                let read = Queue::from_checkpoint(bytes, id, generation, settings, random);
                let (mut machine, names) = read.expect("a checkpoint reads");
                for name in names {
                    let chunk = machine.take_chunk(&self.chunks[&name]);
                    chunk.expect("a chunk reads");
                }
                machine
            }
            (None, None) => Queue::new(id, generation, start, settings, random),
        };
        for blob in &self.journal {
            for record in decode(blob).expect("a journal reads") {
                self.machine.apply(&record);
            }
        }
        self.machine.arrange();
        self.learn_order();
        self.stored = Stored::default();
        self.reference = self.committed.clone();
        self.reference.forget();
        self.publish_from(1);
        self.scan();
        self.machine.lose_through(Offset(self.floor));
        self.reference.lose_through(self.floor);
        self.pass();
    }

    fn publish_from(&mut self, first: i64) {
        for offset in first..=self.log.len() as i64 {
            if let Some(found) = self.found(offset) {
                self.reference
                    .publish(offset, found.key_hash, found.priority);
            }
        }
    }

    fn pass(&mut self) {
        self.machine.advance(At(self.now), At(self.now));
        self.reference.expire_over(self.now);
        self.reference.settle_down();
    }

    fn begin_generation(&mut self, start: i64, keeps_redriven: bool) {
        self.commit();
        let carried = self.machine.carried(keeps_redriven, At(self.now));
        let generation = Generation(self.reference.generation + 1);
        self.machine = self
            .machine
            .next_generation(&carried, generation, Offset(start))
            .expect("its own state reads");
        self.learn_order();
        self.base = Some(carried);
        self.start = start;
        self.journal.clear();
        self.reference
            .begin_generation(start, self.floor, keeps_redriven, self.now);
        self.committed = self.reference.clone();
        self.scan();
    }

    fn receipt(&self, (generation, offset, delivery): (i64, i64, u32)) -> Receipt {
        Receipt {
            queue: self.machine.id(),
            generation: Generation(generation),
            offset: Offset(offset),
            delivery,
        }
    }

    fn settle(
        &mut self,
        verb: Verb,
        receipts: &[(i64, i64, u32)],
        delay: Option<i64>,
    ) -> Result<(), TestCaseError> {
        let items: Vec<Item> = receipts
            .iter()
            .map(|&receipt| Item {
                receipt: Some(self.receipt(receipt)),
                delay: delay.map(millis),
                ..Item::default()
            })
            .collect();
        let outcomes = self.machine.settle(verb, &items, At(self.now));
        let mut order: Vec<usize> = (0..receipts.len()).collect();
        order.sort_by_key(|&index| (receipts[index].1, receipts[index].2));
        for index in order {
            let (generation, offset, delivery) = receipts[index];
            let expected = match generation == self.reference.generation {
                true => self.reference.verb(verb, offset, delivery, delay, self.now),
                false => Outcome::Gone { incident: false },
            };
            self.reference.settle_down();
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

    fn receive(&mut self, count: usize, visible: i64) -> Result<(), TestCaseError> {
        let taken = self.machine.hand_out(
            At(self.now),
            millis(visible),
            &Receive::default(),
            (count, u64::MAX),
            &|_| Some(1),
        );
        let handed: Vec<_> = taken
            .handed
            .iter()
            .map(|handed| (handed.offset.0, handed.delivery, handed.attempt))
            .collect();
        prop_assert_eq!(&handed, &self.reference.receive(self.now, count, visible));
        let generation = self.reference.generation;
        let issued = handed
            .iter()
            .map(|&(offset, delivery, _)| (generation, offset, delivery));
        self.issued.extend(issued);
        Ok(())
    }

    pub(super) fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Publish(published) => {
                let first = self.log.len() as i64 + 1;
                self.log.extend(published);
                self.publish_from(first);
                self.scan();
            }
            Step::Receive { count, visible } => self.receive(*count, *visible)?,
            Step::Verb {
                verb,
                receipts,
                delay,
            } if !self.issued.is_empty() => {
                let receipts = receipts.iter().map(|index| *index.get(&self.issued));
                let receipts: Vec<_> = receipts.collect();
                self.settle(*verb, &receipts, *delay)?;
            }
            Step::NeverIssued { offset, ahead } => {
                if let Some(message) = self.reference.messages.get(offset)
                    && message.is_unsettled()
                    && !self.reference.letters.contains_key(offset)
                {
                    let never = (self.reference.generation, *offset, message.delivery + ahead);
                    self.settle(Verb::Ack, &[never], None)?;
                }
            }
            Step::TakeBack(index) if !self.issued.is_empty() => {
                let issued = *index.get(&self.issued);
                self.machine.take_back(&self.receipt(issued), At(self.now));
                if issued.0 == self.reference.generation {
                    self.reference.take_back(issued.1, issued.2, self.now);
                }
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
            // A queue by offset does not know keys, and could not learn them any more.
            Step::Drop(_) if self.is_changing => {}
            Step::Drop(floor) => {
                self.floor = self.floor.max((*floor).min(self.log.len() as i64));
                self.machine.lose_through(Offset(self.floor));
                self.reference.lose_through(self.floor);
            }
            Step::Position => self.machine.journal_scan(self.machine.scanned_through()),
            Step::Commit => self.commit(),
            Step::Fold => {
                self.machine.journal_scan(self.machine.scanned_through());
                self.commit();
                let checkpoint = self.machine.checkpoint(&self.stored);
                let new = checkpoint.chunks.into_iter();
                self.chunks.extend(new.map(|chunk| (chunk.id, chunk.data)));
                self.chunks
                    .retain(|name, _| checkpoint.names.contains(name));
                self.stored.note(checkpoint.names);
                self.base = Some(checkpoint.head);
                self.journal.clear();
            }
            Step::Crash => self.crash(),
            Step::HandOver => {
                self.commit();
                self.crash();
            }
            Step::Seek {
                start,
                keeps_redriven,
            } => {
                let end = self.log.len() as i64 + 1;
                self.begin_generation((*start).min(end), *keeps_redriven);
            }
            Step::Purge => self.begin_generation(self.log.len() as i64 + 1, false),
            _ => self.act(step)?,
        }
        self.pass();
        // What has to be learned again waits for the next pass.
        self.learn_order();
        self.pass();
        self.agree()
    }

    /// Liveness: once faults have stopped, everything left is handed out and acknowledged in bounded steps.
    pub(super) fn come_to_rest(&mut self) -> Result<(), TestCaseError> {
        // What a dead letter holds would wait for a person.
        self.step(&Step::Hold(false))?;
        let mut rounds = 0;
        loop {
            let counts = self.machine.counts();
            let left = counts.fresh + counts.again + counts.live + counts.delayed;
            if left == 0 {
                return Ok(());
            }
            rounds += 1;
            prop_assert!(rounds < 400, "{left} are left: {counts:?}");
            // Whatever is delayed or in flight is over.
            self.step(&Step::Wait(60 * SECOND))?;
            let known = self.issued.len();
            self.receive(8, 10 * SECOND)?;
            self.commit();
            let receipts = self.issued[known..].to_vec();
            self.settle(Verb::Ack, &receipts, None)?;
            self.step(&Step::Commit)?;
        }
    }

    /// Carries out a person's act.
    fn act(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let (now, at) = (self.now, At(self.now));
        match step {
            Step::Redrive(offsets) => {
                let offsets: BTreeSet<i64> = offsets.iter().copied().collect();
                let letters = offsets.iter().filter_map(|&offset| {
                    let delivery = self.reference.letters.get(&offset)?.delivery;
                    let offset = Offset(offset);
                    Some(Reborn { offset, delivery })
                });
                let back = self.machine.redrive(&letters.collect::<Vec<_>>(), at);
                let expected = offsets
                    .into_iter()
                    .filter(|&offset| self.reference.redrive(offset, now));
                prop_assert_eq!(back, expected.map(Offset).collect::<Vec<_>>());
            }
            Step::RemoveLetter(offset) => {
                let is_settled = |message: &Message| !message.is_unsettled();
                if self.reference.messages.get(offset).is_some_and(is_settled)
                    && self.reference.letters.remove(offset).is_some()
                {
                    self.machine.remove_letter(Offset(*offset));
                }
            }
            Step::Delete(offset) if *offset <= self.log.len() as i64 => {
                self.machine.delete(Offset(*offset), at);
                self.reference.delete(*offset);
            }
            Step::Condemn(offset) if *offset <= self.log.len() as i64 => {
                self.machine.condemn(Offset(*offset), None, None, at);
                self.reference.condemn(*offset, now);
            }
            Step::Expire(offsets) => {
                let whose = Whose::Offsets(offsets.iter().copied().map(Offset).collect());
                self.machine.expire_now(&whose, None, at);
                let offsets: BTreeSet<i64> = offsets.iter().copied().collect();
                for offset in offsets {
                    if self
                        .reference
                        .messages
                        .get(&offset)
                        .is_some_and(Message::is_live)
                    {
                        self.reference.expire(offset, now);
                    }
                }
            }
            Step::Hold(holds) if matches!(self.plan.mode, Mode::Keys | Mode::HeldKeys) => {
                let mode = if *holds { Mode::HeldKeys } else { Mode::Keys };
                self.change(Plan { mode, ..self.plan });
            }
            Step::Order(mode) if self.is_changing => {
                self.change(Plan {
                    mode: *mode,
                    ..self.plan
                });
            }
            Step::Tune {
                max_attempts,
                max_in_flight,
                factor,
            } => {
                let delays = Plan::new(Mode::Offsets).delays.map(|delay| delay * factor);
                self.change(Plan {
                    mode: self.plan.mode,
                    max_attempts: *max_attempts,
                    max_in_flight: *max_in_flight,
                    delays,
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// The row is written before the queue hears of it.
    fn change(&mut self, plan: Plan) {
        self.plan = plan;
        self.machine.change_settings(settings(plan));
        self.learn_order();
        self.reference.change(plan);
        self.committed.change(plan);
    }

    /// Everything that can be asked of the machine is as the reference has it.
    pub(super) fn agree(&self) -> Result<(), TestCaseError> {
        let now = self.now;
        let messages = &self.reference.messages;
        let count = |wanted: &dyn Fn(&Message) -> bool| {
            messages.values().filter(|message| wanted(message)).count() as u64
        };
        let again = |message: &Message| message.plain != Plain::Fresh && message.is_ready(now);
        let waits = |offset: i64| !self.reference.is_open(offset, &BTreeSet::new());
        let waiting = messages
            .iter()
            .filter(|(offset, message)| message.is_ready(now) && waits(**offset));
        let is_dead = |offset: &&i64| {
            !messages
                .get(offset)
                .is_some_and(|message| message.is_reopened)
        };
        let by_lane = [Priority::Low, Priority::Normal, Priority::High]
            .map(|lane| count(&|message| message.is_unsettled() && message.priority == lane));
        let expected = Counts {
            fresh: count(&|message| message.plain == Plain::Fresh),
            again: count(&again),
            live: count(&Message::is_live),
            delayed: count(
                &|message| matches!(message.plain, Plain::Waiting { due, .. } if due > now),
            ),
            waiting: waiting.count() as u64,
            lanes: self.reference.has_lanes().then_some(by_lane),
            dead: self.reference.letters.keys().filter(is_dead).count() as u64,
        };
        prop_assert_eq!(self.machine.counts(), expected);
        let oldest = messages
            .iter()
            .find(|(_, message)| message.is_unsettled() && !message.is_reopened);
        prop_assert_eq!(
            self.machine.oldest_unsettled().map(|offset| offset.0),
            oldest.map(|(&offset, _)| offset)
        );
        Ok(())
    }

    /// After a commit: the rows of the dead letters are as the reference has them.
    pub(super) fn letters_agree(&self) -> Result<(), TestCaseError> {
        let plain = |letter: &Letter| {
            let failures = letter.failures.iter();
            let failures: Vec<_> = failures
                .map(|failure| (failure.at.0, failure.reason.clone()))
                .collect();
            (letter.delivery, letter.attempts, failures)
        };
        let rows: Vec<_> = self
            .letters
            .iter()
            .map(|(&offset, letter)| (offset, plain(letter)))
            .collect();
        let expected = |dead: &Dead| (dead.delivery, dead.attempts, dead.failures.clone());
        let letters = self.committed.letters.iter();
        let letters: Vec<_> = letters
            .map(|(&offset, dead)| (offset, expected(dead)))
            .collect();
        prop_assert_eq!(rows, letters);
        Ok(())
    }
}
