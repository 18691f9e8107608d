//! The state and how records change it: the one place where it changes durably.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use roaring::RoaringTreemap;

use super::record::{End, Record, SettledAs};
use super::{
    At, Counts, Dead, Entry, FAILURES_KEPT, Failure, LiveDelivery, Mark, Offsets, Order, Pending,
    Queue, REASON_BYTES_MAX, REASON_BYTES_MIN, Random, Receive, State, TIMED_OUT,
};
use crate::domain::id::{Generation, Offset, QueueId};
use crate::domain::policy::Settings;

impl Queue {
    /// A queue that has seen nothing. `start` is the first offset it can deliver.
    #[must_use]
    pub fn new(
        id: QueueId,
        generation: Generation,
        start: Offset,
        settings: Settings,
        random: Random,
    ) -> Self {
        Self {
            id,
            generation,
            former: Vec::new(),
            order: Order::of(&settings),
            is_arranging: false,
            reason_bytes: 0,
            settings,
            random,
            scanned: start.0 - 1,
            journaled: start.0 - 1,
            fresh: Offsets::default(),
            entries: BTreeMap::new(),
            ahead: RoaringTreemap::new(),
            lost: RoaringTreemap::new(),
            dead: BTreeMap::new(),
            reopened: RoaringTreemap::new(),
            start: start.0,
            left_order: false,
            deadlines: BTreeSet::new(),
            delays: BTreeSet::new(),
            again: BTreeSet::new(),
            receives: HashMap::new(),
            passed: Cell::new(i64::MIN),
            pending: Pending::default(),
            after_failed: false,
        }
    }

    /// The queue's number.
    #[must_use]
    pub fn id(&self) -> QueueId {
        self.id
    }

    /// The queue's incarnation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The queue's settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Names the queues that had this one's name before: their receipts are `gone`, not unknown.
    pub fn set_former(&mut self, former: Vec<QueueId>) {
        self.former = former;
    }

    /// The first offset that the queue can deliver.
    #[must_use]
    pub fn start(&self) -> Offset {
        Offset(self.start)
    }

    /// Every message at or below was looked at.
    #[must_use]
    pub fn scanned_through(&self) -> Offset {
        Offset(self.scanned)
    }

    /// As [`Queue::scanned_through`], as far as the journal knows: where the scan goes on after a restart.
    #[must_use]
    pub fn journaled_through(&self) -> Offset {
        Offset(self.journaled)
    }

    /// Everything that matches at or below is settled.
    #[must_use]
    pub fn watermark(&self) -> Offset {
        Offset(
            self.oldest_unsettled()
                .map_or(self.scanned, |oldest| oldest.0 - 1),
        )
    }

    /// The lowest unsettled offset among those looked at, redriven ones aside.
    #[must_use]
    pub fn oldest_unsettled(&self) -> Option<Offset> {
        let fresh = self.fresh.first();
        let entry = self.first_entry();
        match (fresh, entry) {
            (Some(a), Some(b)) => Some(Offset(a.min(b))),
            (a, b) => a.or(b).map(Offset),
        }
    }

    /// The queue's numbers.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            fresh: self.fresh.len(),
            again: self.again.len() as u64,
            live: self.deadlines.len() as u64,
            delayed: self.delays.len() as u64,
            waiting: self.waiting(),
            lanes: self.lanes(),
            dead: (self.dead.len() as u64).saturating_sub(self.reopened.len()),
        }
    }

    /// The live deliveries after an offset, by offset.
    pub fn live(&self, after: Offset) -> impl Iterator<Item = LiveDelivery> + '_ {
        self.entries
            .range(after.0.saturating_add(1)..)
            .filter_map(|(&offset, entry)| match entry.state {
                State::Live { deadline } => Some(LiveDelivery {
                    offset: Offset(offset),
                    delivery: entry.delivery,
                    attempt: entry.attempt(),
                    since: entry.since,
                    deadline,
                    receive: entry.receive.clone(),
                }),
                State::Ended { .. } => None,
            })
    }

    /// Decides durably: applies the record and puts it up for the journal.
    pub(super) fn commit(&mut self, record: Record) {
        self.remove_letters_of(&record);
        self.apply(&record);
        self.pending.push(record);
    }

    /// Changes the state as the record says. Total: a record that does not fit the state changes what it can.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Delivered {
                at,
                deadline,
                receive,
                in_order,
                first,
                again,
            } => {
                let receive = (*receive != Receive::default()).then(|| Arc::new(receive.clone()));
                let delivered = Delivered {
                    at: *at,
                    deadline: *deadline,
                    batch: in_order.then_some(*at),
                    receive,
                };
                self.apply_deliveries(&delivered, first, again);
            }
            Record::Settled { kind, ranges } => {
                self.remove_waiting(ranges);
                for &(from, through) in ranges {
                    for offset in from..=through {
                        let takes_letter = self.takes_letter(offset, *kind);
                        self.apply_settled(offset, *kind);
                        if takes_letter {
                            self.unbury(offset);
                        }
                    }
                }
            }
            Record::Dead {
                offset,
                delivery,
                at,
                key,
                priority,
                holds,
            } => {
                self.apply_settled(*offset, SettledAs::Deleted);
                let dead = Dead {
                    delivery: *delivery,
                    at: *at,
                    mark: Mark {
                        key: *key,
                        priority: *priority,
                    },
                    holds: *holds,
                };
                self.bury(*offset, dead);
            }
            Record::LetterRemoved { offset } => {
                self.unbury(*offset);
            }
            Record::Redriven { at, letters } => self.apply_redriven(*at, letters),
            Record::Ended { .. } => self.apply_ended(record),
            Record::Extended {
                offset,
                deadline,
                attempts,
            } => self.apply_extended(*offset, *deadline, *attempts),
            Record::Shifted { by } => self.apply_shifted(*by),
            Record::SetBack { to } => self.apply_set_back(*to),
            Record::OrderLeft { leaves } => self.left_order = *leaves,
            Record::Scanned { through, matched } => {
                // A live queue has found all of it before, and knows the marks.
                for offset in self.fresh.missing_of(matched) {
                    let offset = offset as i64;
                    if !self.entries.contains_key(&offset) && !self.is_ahead(offset) {
                        self.add_fresh(offset, Mark::default());
                    }
                }
                self.journaled = self.journaled.max(*through);
                self.scanned = self.scanned.max(*through);
                if self.journaled >= 0 {
                    self.ahead.remove_range(..=self.journaled as u64);
                }
            }
        }
    }

    pub(super) fn is_ahead(&self, offset: i64) -> bool {
        self.ahead.contains(offset as u64)
    }

    /// All are out before the first is in: each message of a batch of one key is the next of its key then.
    fn apply_deliveries(&mut self, new: &Delivered, first: &[(i64, i64)], again: &[(i64, u32)]) {
        let mut entries = Vec::with_capacity(again.len() + first.len());
        for &(offset, delivery) in again {
            let before = self.detach(offset);
            let mark = before.as_ref().map(|entry| entry.mark).unwrap_or_default();
            entries.push((offset, new.entry(delivery, before, mark)));
        }
        for offset in first.iter().flat_map(|&(from, through)| from..=through) {
            let fresh = self.remove_fresh(offset);
            let before = self.detach(offset);
            let mark = before.as_ref().map(|entry| entry.mark).or(fresh);
            entries.push((offset, new.entry(1, before, mark.unwrap_or_default())));
        }
        for (offset, entry) in entries {
            self.attach(offset, entry);
        }
    }

    fn apply_settled(&mut self, offset: i64, kind: SettledAs) {
        self.remove_fresh(offset);
        let entry = self.detach(offset);
        self.reopened.remove(offset as u64);
        if kind == SettledAs::Gap && entry.is_some() {
            self.lost.insert(offset as u64);
        }
        if offset > self.journaled {
            self.ahead.insert(offset as u64);
        }
    }

    fn apply_ended(&mut self, record: &Record) {
        let Record::Ended {
            offset,
            end,
            at,
            due,
            attempts,
            releases,
            reason,
        } = record
        else {
            return;
        };
        let Some(mut entry) = self.detach(*offset) else {
            return;
        };
        entry.state = State::Ended {
            end: *end,
            due: *due,
        };
        entry.attempts = *attempts;
        entry.releases = *releases;
        let reason = match end {
            End::TimedOut => {
                entry.timed_out = true;
                Some(TIMED_OUT.to_owned())
            }
            End::Nacked => Some(reason.clone().unwrap_or_else(|| "nacked".to_owned())),
            End::Released | End::Unwritten => None,
        };
        if let Some(reason) = reason {
            self.keep_failure(&mut entry, Failure { at: *at, reason });
        }
        self.attach(*offset, entry);
    }

    /// Keeps how an attempt failed, as far as the queue's budget for reasons goes. The entry is not among the others at this moment.
    fn keep_failure(&self, entry: &mut Entry, mut failure: Failure) {
        let room = REASON_BYTES_MAX.saturating_sub(self.reason_bytes);
        note_failure(&mut entry.failures, failure.clone());
        if entry.reason_bytes() <= room {
            return;
        }
        if failure.reason.len() > room.max(REASON_BYTES_MIN) {
            let end = failure.reason.floor_char_boundary(REASON_BYTES_MIN);
            failure.reason.truncate(end);
            failure.reason.shrink_to_fit();
        }
        entry.failures = vec![failure];
    }

    /// Bytes of the reasons of all unsettled messages.
    #[must_use]
    pub fn reason_bytes(&self) -> usize {
        self.reason_bytes
    }

    /// One that is live stays where it is: its key has not been without a live message for a moment.
    fn apply_extended(&mut self, offset: i64, new: At, attempts: u32) {
        if let Some(entry) = self.entries.get_mut(&offset)
            && let State::Live { deadline } = &mut entry.state
        {
            self.deadlines.remove(&(*deadline, offset));
            self.deadlines.insert((new, offset));
            *deadline = new;
            entry.attempts = attempts;
        } else if let Some(mut entry) = self.detach(offset) {
            entry.state = State::Live { deadline: new };
            entry.attempts = attempts;
            self.attach(offset, entry);
        }
    }

    fn apply_shifted(&mut self, by: i64) {
        let live: Vec<i64> = self.deadlines.iter().map(|&(_, offset)| offset).collect();
        self.deadlines.clear();
        for offset in live {
            if let Some(entry) = self.entries.get_mut(&offset)
                && let State::Live { deadline } = &mut entry.state
            {
                deadline.0 = deadline.0.saturating_add(by);
                entry.since.0 = entry.since.0.saturating_add(by);
                self.deadlines.insert((*deadline, offset));
            }
        }
    }

    /// Takes an entry out, with everything derived from it.
    pub(super) fn detach(&mut self, offset: i64) -> Option<Entry> {
        let entry = self.entries.remove(&offset)?;
        self.reason_bytes -= entry.reason_bytes();
        match entry.state {
            State::Live { deadline } => {
                self.deadlines.remove(&(deadline, offset));
            }
            State::Ended { due, .. } => {
                self.delays.remove(&(due, offset));
                self.again.remove(&offset);
            }
        }
        if let Some(id) = entry
            .receive
            .as_ref()
            .and_then(|receive| receive.receive_id.as_ref())
            && let Some(offsets) = self.receives.get_mut(id)
        {
            offsets.remove(&offset);
            if offsets.is_empty() {
                self.receives.remove(id);
            }
        }
        self.exit(offset, &entry);
        Some(entry)
    }

    /// Puts an entry in, with everything derived from it. An ended one waits in `delays` until time is passed in.
    pub(super) fn attach(&mut self, offset: i64, entry: Entry) {
        match entry.state {
            State::Live { deadline } => {
                self.deadlines.insert((deadline, offset));
                if let Some(id) = entry
                    .receive
                    .as_ref()
                    .and_then(|receive| receive.receive_id.as_ref())
                {
                    self.receives.entry(id.clone()).or_default().insert(offset);
                }
            }
            State::Ended { due, .. } => {
                self.delays.insert((due, offset));
            }
        }
        if !self.reopened.contains(offset as u64) {
            self.passed.set(self.passed.get().min(offset));
        }
        let (mark, state) = (entry.mark, entry.state);
        self.reason_bytes += entry.reason_bytes();
        self.entries.insert(offset, entry);
        self.enter(offset, mark, state);
    }
}

/// The common parts of the deliveries of one receive.
struct Delivered {
    at: At,
    deadline: At,
    batch: Option<At>,
    receive: Option<Arc<Receive>>,
}

impl Delivered {
    fn entry(&self, delivery: u32, before: Option<Entry>, mark: Mark) -> Entry {
        Entry {
            delivery,
            since: self.at,
            batch: self.batch,
            mark,
            state: State::Live {
                deadline: self.deadline,
            },
            receive: self.receive.clone(),
            attempts: before.as_ref().map_or(0, |entry| entry.attempts),
            releases: before.as_ref().map_or(0, |entry| entry.releases),
            timed_out: before.as_ref().is_some_and(|entry| entry.timed_out),
            failures: before.map(|entry| entry.failures).unwrap_or_default(),
        }
    }
}

/// Keeps the last few.
pub(super) fn note_failure(failures: &mut Vec<Failure>, failure: Failure) {
    if failures.len() >= FAILURES_KEPT {
        failures.remove(0);
    }
    failures.push(failure);
}
