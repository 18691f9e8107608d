//! A node of a run: the heartbeat's passes, cut at each call, and an engine for each lease.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::database::{Answer, Call};
use super::{HEARTBEAT, TTL, Wrong, wanted};
use crate::cluster::lead::{Anew, Lead};
use crate::cluster::tenure::State;
use crate::cluster::view::{LEADER, Observer, Standing, View};
use crate::domain::id::{Epoch, Fence};
use crate::simulation::{Dice, Fault};

/// The event that the heartbeat waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    Until(i64),
    Registration,
    Beat,
    LeaderLease,
    Assignment,
    Release,
    Take,
}

/// An engine: it writes under what it is shown, and says when it has finished.
#[derive(Debug)]
struct Engine {
    shown: watch::Receiver<Option<Fence>>,
    /// The fence that it works under.
    fence: Option<Fence>,
    /// The number of the write under way; the same again when nobody knows what became of it.
    writing: Option<u64>,
    is_lost: bool,
    written_at: i64,
}

/// The tag of the heartbeat's calls; those of engines are the places of their leases.
const HEART: u64 = u64::MAX;

pub(super) struct Node {
    address: usize,
    wrong: Option<Wrong>,
    /// Rises when the process dies: answers to a former one are nobody's.
    pub(super) life: u64,
    pub(super) is_down: bool,
    pub(super) asleep_until: i64,
    pub(super) has_stuck_engine: bool,
    incarnation: i64,
    observer: Observer,
    state: State,
    waits: Waits,
    asked: i64,
    said: (Vec<String>, bool),
    view: Option<View>,
    /// The assignment that is being written, and the leases being given back.
    next: Option<BTreeMap<String, i64>>,
    releasing: Vec<String>,
    late: Vec<String>,
    engines: BTreeMap<String, Engine>,
    next_write: u64,
}

fn millis(value: i64) -> Duration {
    Duration::from_millis(value.unsigned_abs())
}

impl Node {
    pub(super) fn new(address: usize, wrong: Option<Wrong>) -> Self {
        let mut node = Self {
            address,
            wrong,
            life: 0,
            is_down: false,
            asleep_until: 0,
            has_stuck_engine: false,
            incarnation: 0,
            observer: Observer::new(millis(HEARTBEAT)),
            state: State::new(Vec::new(), Instant::now()),
            waits: Waits::Until(0),
            asked: 0,
            said: (Vec::new(), false),
            view: None,
            next: None,
            releasing: Vec::new(),
            late: Vec::new(),
            engines: BTreeMap::new(),
            next_write: 0,
        };
        node.start();
        node
    }

    fn start(&mut self) {
        self.is_down = false;
        self.incarnation = 0;
        self.observer = Observer::new(millis(HEARTBEAT));
        self.state = State::new(Vec::new(), Instant::now());
        self.waits = Waits::Until(0);
        self.view = None;
        self.late.clear();
        let engines = wanted().into_iter().map(|lease| {
            let engine = Engine {
                shown: self.state.hold(lease.clone()),
                fence: None,
                writing: None,
                is_lost: false,
                written_at: 0,
            };
            (lease, engine)
        });
        self.engines = engines.collect();
    }

    /// kill -9.
    pub(super) fn crash(&mut self) {
        self.life += 1;
        self.is_down = true;
    }

    /// Runs again, if it does not, and stays.
    pub(super) fn restart(&mut self) {
        if self.is_down {
            self.life += 1;
            self.start();
        }
        self.state.is_leaving = false;
    }

    pub(super) fn leave(&mut self) {
        self.state.is_leaving = true;
    }

    pub(super) fn incarnation(&self) -> i64 {
        self.incarnation
    }

    pub(super) fn shown(&self, lease: &str) -> Option<Epoch> {
        let fence = self.engines[lease].shown.borrow().clone();
        fence.map(|fence| fence.epoch)
    }

    pub(super) fn written_at(&self, lease: &str) -> i64 {
        self.engines[lease].written_at
    }

    /// Returns the next message to send.
    pub(super) fn advance(
        &mut self,
        now: i64,
        base: Instant,
        dice: &mut Dice,
    ) -> Result<Vec<(u64, Call)>, Fault> {
        let mut calls = self.advance_engines(dice);
        if let Waits::Until(until) = self.waits
            && until <= now
        {
            let call = match self.view.clone() {
                _ if self.incarnation == 0 => {
                    self.waits = Waits::Registration;
                    let address = self.address;
                    Some(Call::Register { address })
                }
                // A wake-up between heartbeats goes by the last view.
                Some(view) if now < self.asked + HEARTBEAT => self.give_back(&view, now)?,
                _ => Some(self.beat(now, base)),
            };
            calls.extend(call.map(|call| (HEART, call)));
        }
        Ok(calls)
    }

    fn advance_engines(&mut self, dice: &mut Dice) -> Vec<(u64, Call)> {
        let mut calls = Vec::new();
        for (place, (lease, engine)) in self.engines.iter_mut().enumerate() {
            let shown = engine.shown.borrow().clone();
            let is_busy = engine.writing.is_some();
            if is_busy && !engine.is_lost {
                continue;
            }
            if shown != engine.fence && !is_busy {
                if self.has_stuck_engine && shown.is_none() {
                    continue;
                }
                if shown.is_none() {
                    self.state.yielded(lease);
                }
                engine.fence = shown;
            }
            let Some(fence) = engine.fence.clone() else {
                continue;
            };
            if is_busy || dice.once_in(2) {
                engine.is_lost = false;
                self.next_write += 1;
                let number = *engine.writing.get_or_insert(self.next_write);
                let node = self.incarnation;
                let call = Call::Write {
                    node,
                    fence,
                    number,
                };
                calls.push((place as u64, call));
            }
        }
        calls
    }

    fn engine_answered(&mut self, place: usize, answer: Option<Answer>, now: i64) {
        let engine = self.engines.values_mut().nth(place);
        let Some(engine) = engine else { return };
        match answer {
            // The same write again, until it is known what became of it.
            None => engine.is_lost = true,
            Some(Answer::Written(true)) => {
                engine.writing = None;
                engine.written_at = now;
            }
            Some(_) => {
                engine.writing = None;
                if let Some(fence) = engine.fence.take() {
                    self.state.fenced(&fence);
                }
            }
        }
    }

    fn beat(&mut self, now: i64, base: Instant) -> Call {
        self.view = None;
        self.asked = now;
        self.said = self.state.signs(base + millis(now));
        self.waits = Waits::Beat;
        let (wants, is_leaving) = self.said.clone();
        Call::Beat {
            node: self.incarnation,
            wants,
            is_leaving,
        }
    }

    /// Takes an answer, or the loss of the connection. Returns the next message to send.
    pub(super) fn answered(
        &mut self,
        tag: u64,
        answer: Option<Answer>,
        now: i64,
        base: Instant,
    ) -> Result<Option<Call>, Fault> {
        if tag != HEART {
            self.engine_answered(tag as usize, answer, now);
            return Ok(None);
        }
        let Some(answer) = answer else {
            self.view = None;
            self.waits = Waits::Until(now + 100);
            return Ok(None);
        };
        match (answer, self.waits) {
            (Answer::Registered(incarnation), _) => {
                self.incarnation = incarnation;
                Ok(Some(self.beat(now, base)))
            }
            (Answer::Seen(seen), _) if !seen.is_renewed => {
                self.state.drop_fences();
                self.waits = Waits::Registration;
                let address = self.address;
                Ok(Some(Call::Register { address }))
            }
            (Answer::Seen(seen), _) => {
                let moments = (base + millis(self.asked), base + millis(now));
                self.state.trusted_until = moments.0 + millis(TTL);
                let mut view = self.observer.view(moments, self.incarnation, seen);
                view.note_own(&self.said.0, self.said.1);
                self.lead(view, now, base)
            }
            (Answer::Taken(fences), Waits::LeaderLease) => match fences.into_iter().next() {
                Some(fence) => self.assign(&fence, now, base),
                None => self.look(now, base),
            },
            (Answer::Assigned(leads), _) => {
                if let Some(next) = self.next.take().filter(|_| leads)
                    && let Some(view) = &mut self.view
                {
                    view.assigned = next;
                }
                self.look(now, base)
            }
            (Answer::Released, _) => {
                self.late.retain(|lease| !self.releasing.contains(lease));
                if self.wrong != Some(Wrong::ForgetsToRelease) {
                    self.state.released(&self.releasing);
                }
                let view = self.view.clone();
                view.map_or(Ok(None), |view| Ok(self.take(&view, now)))
            }
            (Answer::Taken(fences), _) => {
                for fence in fences {
                    self.state.show(fence);
                }
                self.pause(now);
                Ok(None)
            }
            (Answer::Written(_), _) => Ok(None),
        }
    }

    fn silent(&self, view: &View) -> Vec<(i64, i64)> {
        if self.wrong == Some(Wrong::NobodyWatches) {
            return Vec::new();
        }
        let silent = self.observer.silent(view).into_iter();
        silent
            .map(|(node, expires_at)| (node, expires_at.timestamp_millis()))
            .collect()
    }

    fn lead(&mut self, mut view: View, now: i64, base: Instant) -> Result<Option<Call>, Fault> {
        if self.wrong == Some(Wrong::AssignsToTheDead) {
            for member in &mut view.nodes {
                member.standing = Standing::Live;
            }
        }
        let silent = self.silent(&view);
        let lead = Lead::of(&view, self.state.is_leaving);
        self.view = Some(view);
        match lead {
            Lead::Held(fence) => self.assign(&fence, now, base),
            Lead::Free => {
                self.waits = Waits::LeaderLease;
                Ok(Some(Call::Take {
                    node: self.incarnation,
                    names: vec![LEADER.to_owned()],
                    silent,
                }))
            }
            Lead::Others => self.look(now, base),
        }
    }

    fn assign(&mut self, fence: &Fence, now: i64, base: Instant) -> Result<Option<Call>, Fault> {
        let anew = self.view.as_ref().and_then(|view| Anew::of(view, false));
        let Some(anew) = anew else {
            return self.look(now, base);
        };
        self.next = Some(anew.next);
        self.waits = Waits::Assignment;
        Ok(Some(Call::Assign {
            node: self.incarnation,
            epoch: fence.epoch,
            changed: anew.changed,
            gone: anew.gone,
        }))
    }

    /// By the view: gives up, gives back, takes.
    fn look(&mut self, now: i64, base: Instant) -> Result<Option<Call>, Fault> {
        let Some(view) = self.view.clone() else {
            return Ok(None);
        };
        let given_up = self
            .state
            .give_up(&view, base + millis(now), millis(TTL / 2));
        self.late.extend(given_up.late);
        if self.wrong == Some(Wrong::UnknownStays) {
            self.state.released(&given_up.unknown);
        }
        if self.wrong == Some(Wrong::ReleasesAtOnce) {
            for (fence, _) in given_up.yielding {
                self.state.yielded(&fence.lease);
            }
        }
        self.give_back(&view, now)
    }

    fn give_back(&mut self, view: &View, now: i64) -> Result<Option<Call>, Fault> {
        self.releasing = self.state.to_release.clone();
        if self.releasing.is_empty() {
            return Ok(self.take(view, now));
        }
        for lease in &self.releasing {
            let engine = &self.engines[lease];
            let row = view.leases.get(lease);
            let is_present = row.map(|row| row.epoch) == engine.fence.as_ref().map(|f| f.epoch);
            if engine.writing.is_some()
                && is_present
                && engine.shown.borrow().is_none()
                && !self.late.contains(lease)
            {
                return Err(format!(
                    "{} gives {lease} back under a write",
                    self.incarnation
                ));
            }
        }
        self.waits = Waits::Release;
        let (node, names) = (self.incarnation, self.releasing.clone());
        Ok(Some(Call::Release { node, names }))
    }

    fn take(&mut self, view: &View, now: i64) -> Option<Call> {
        let missing = self.state.missing(view);
        let is_own = |name: &String| {
            let row = view.leases.get(name);
            row.is_some_and(|row| row.holder == Some(view.own))
        };
        let is_known = |name: &&String| self.wrong != Some(Wrong::KnowsNotItsOwn) || !is_own(name);
        let free = missing.iter().filter(|name| view.is_free(name));
        let names: Vec<String> = free.filter(is_known).cloned().collect();
        if names.is_empty() {
            self.pause(now);
            return None;
        }
        self.waits = Waits::Take;
        Some(Call::Take {
            node: self.incarnation,
            names,
            silent: self.silent(view),
        })
    }

    fn pause(&mut self, now: i64) {
        self.waits = Waits::Until(now + HEARTBEAT / 8);
    }
}
