//! Decides which of the ready messages may go out. This is derived from the rest of the state and never stored: every
//! message enters and leaves it when it becomes fresh, is handed out, falls due or is settled.
//!
//! In order by key, only a key's lowest unsettled message is open, and only while none of the key is live and no dead
//! letter before it holds the key. Its later messages are offsets in a set, and cost nothing until their turn comes. With
//! lanes everything that is ready is open, by lane.

use std::collections::{BTreeSet, HashMap};

use roaring::RoaringTreemap;

use super::members::Members;
use super::{Dead, Entry, Mark, Offsets, Queue, State};
use crate::domain::id::Offset;
use crate::domain::message::Priority;
use crate::domain::policy::{Ordering, Settings};

/// Lanes, lowest first.
pub(super) const LANES: usize = 3;
/// More waiting messages than this are taken out together, by one walk over all keys.
const TOGETHER: usize = 8;

/// How the next message is found.
#[derive(Debug, Clone)]
pub(super) enum Order {
    /// By offset.
    Offsets,
    /// By offset, one of each key at a time.
    Keys(Keys),
    /// By lane, and by offset within each.
    Lanes(Lanes),
}

/// The messages that may go out in order by key.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys {
    pub(super) keys: HashMap<i64, Key>,
    /// Open and never handed out: the first of their keys, and those without a key.
    pub(super) fresh: Offsets,
    /// Open and handed out before.
    pub(super) again: BTreeSet<i64>,
    /// The keys of those in `fresh` that have one.
    heads: HashMap<i64, i64>,
    /// By key, dead letters that hold it.
    pub(super) held: HashMap<i64, BTreeSet<i64>>,
    /// The queue is ordered no more: a key stays in order until nothing of it is live.
    pub(super) is_leaving: bool,
}

/// A key with unsettled messages.
#[derive(Debug, Clone, Default)]
pub(super) struct Key {
    /// All that are unsettled.
    pub(super) members: Members,
    pub(super) live: u32,
    open: Option<i64>,
}

/// The messages that may go out by lanes.
#[derive(Debug, Clone, Default)]
pub(super) struct Lanes {
    pub(super) fresh: [Offsets; LANES],
    pub(super) again: [BTreeSet<i64>; LANES],
    /// Handed out and not settled.
    pub(super) entries: [u64; LANES],
    /// How much each lane is owed.
    pub(super) credits: [i64; LANES],
}

pub(super) const fn lane(priority: Priority) -> usize {
    match priority {
        Priority::Low => 0,
        Priority::Normal => 1,
        Priority::High => 2,
    }
}

impl Order {
    /// The order of a queue that has nothing yet.
    pub(super) fn of(settings: &Settings) -> Self {
        match settings.ordering {
            Ordering::Key => Self::Keys(Keys::default()),
            Ordering::None if settings.priorities => Self::Lanes(Lanes::default()),
            Ordering::None => Self::Offsets,
        }
    }
}

impl Keys {
    /// The key that a message's order goes by.
    fn key(&self, mark: Mark) -> Option<i64> {
        mark.key
            .filter(|key| !self.is_leaving || self.keys.contains_key(key))
    }

    pub(super) fn get(&self, key: i64) -> Option<&Key> {
        self.keys.get(&key)
    }

    /// The key of a fresh message that is the next of it.
    pub(super) fn head(&self, offset: i64) -> Option<i64> {
        self.heads.get(&offset).copied()
    }

    /// The dead letters that hold keys.
    pub(super) fn held(&self) -> impl Iterator<Item = (i64, &BTreeSet<i64>)> {
        self.held.iter().map(|(&key, held)| (key, held))
    }

    /// The lowest dead letter that a message of the key waits for: one that comes before it and is not unsettled itself.
    pub(super) fn holder(&self, key: i64, offset: i64) -> Option<i64> {
        let held = self.held.get(&key)?;
        let members = self.keys.get(&key).map(|key| &key.members);
        held.range(..offset)
            .copied()
            .find(|&dead| members.is_none_or(|members| !members.contains(dead)))
    }

    /// The key of a fresh message. One that waits is seldom taken out before its turn: the keys are looked through for it.
    fn key_of_fresh(&self, offset: i64) -> Option<i64> {
        if self.fresh.contains(offset) {
            return self.head(offset);
        }
        let mut all = self.keys.iter();
        let found = all.find(|(_, key)| key.members.contains(offset));
        found.map(|(&key, _)| key)
    }

    fn close(&mut self, offset: i64) {
        if self.fresh.remove(offset) {
            self.heads.remove(&offset);
        } else {
            self.again.remove(&offset);
        }
    }

    fn leave(&mut self, key: i64, offset: i64) {
        let Some(state) = self.keys.get_mut(&key) else {
            return;
        };
        state.members.remove(offset);
        if state.open == Some(offset) {
            state.open = None;
            self.close(offset);
        }
    }

    fn is_open(&self, offset: i64) -> bool {
        self.fresh.contains(offset) || self.again.contains(&offset)
    }
}

impl Queue {
    /// Every message that becomes fresh goes through here.
    pub(super) fn add_fresh(&mut self, offset: i64, mark: Mark) {
        self.fresh.insert(offset);
        match &mut self.order {
            Order::Offsets => {}
            Order::Lanes(lanes) => {
                lanes.fresh[lane(mark.priority)].insert(offset);
            }
            Order::Keys(keys) => match keys.key(mark) {
                None => {
                    keys.fresh.insert(offset);
                }
                Some(key) => {
                    keys.keys.entry(key).or_default().members.insert(offset);
                    self.refresh(key);
                }
            },
        }
    }

    /// Every message that is fresh no more goes through here. Gives its mark, if it was fresh.
    pub(super) fn remove_fresh(&mut self, offset: i64) -> Option<Mark> {
        if !self.fresh.remove(offset) {
            return None;
        }
        let mut mark = Mark::default();
        match &mut self.order {
            Order::Offsets => {}
            Order::Lanes(lanes) => {
                for priority in [Priority::Low, Priority::Normal, Priority::High] {
                    if lanes.fresh[lane(priority)].remove(offset) {
                        mark.priority = priority;
                    }
                }
            }
            Order::Keys(keys) => {
                mark.key = keys.key_of_fresh(offset);
                match mark.key {
                    None => {
                        keys.fresh.remove(offset);
                    }
                    Some(key) => {
                        keys.leave(key, offset);
                        self.refresh(key);
                    }
                }
            }
        }
        Some(mark)
    }

    /// The known order of an unsettled message.
    pub(super) fn mark_of(&self, offset: i64) -> Mark {
        if let Some(entry) = self.entries.get(&offset) {
            return entry.mark;
        }
        let mut mark = Mark::default();
        match &self.order {
            Order::Keys(keys) if self.fresh.contains(offset) => {
                mark.key = keys.key_of_fresh(offset)
            }
            Order::Lanes(lanes) => {
                let all = [Priority::Low, Priority::Normal, Priority::High];
                let found = all
                    .into_iter()
                    .find(|&one| lanes.fresh[lane(one)].contains(offset));
                mark.priority = found.unwrap_or_default();
            }
            Order::Keys(_) | Order::Offsets => {}
        }
        mark
    }

    /// Removes fresh messages that wait for their key, if they are many: call this before calling [`Queue::remove_fresh`] for each.
    pub(super) fn remove_waiting(&mut self, ranges: &[(i64, i64)]) {
        let Order::Keys(keys) = &mut self.order else {
            return;
        };
        let waiting = ranges.iter().flat_map(|&(from, through)| {
            let inside = self.fresh.iter_from(from);
            inside.take_while(move |&offset| offset <= through)
        });
        let waiting = waiting.filter(|&offset| !keys.fresh.contains(offset));
        let gone: RoaringTreemap = waiting.map(|offset| offset as u64).collect();
        if gone.len() <= TOGETHER as u64 {
            return;
        }
        let all = keys.keys.iter_mut();
        let changed =
            all.filter_map(|(&key, state)| state.members.remove_all(&gone).then_some(key));
        let changed: Vec<i64> = changed.collect();
        for offset in gone {
            self.fresh.remove(offset as i64);
        }
        for key in changed {
            self.refresh(key);
        }
    }

    /// Every dead letter that comes goes through here.
    pub(super) fn bury(&mut self, offset: i64, dead: Dead) {
        self.unbury(offset);
        self.dead.insert(offset, dead);
        if let Order::Keys(keys) = &mut self.order
            && dead.holds
            && let Some(key) = dead.mark.key
        {
            keys.held.entry(key).or_default().insert(offset);
            self.refresh(key);
        }
    }

    /// Every dead letter that goes goes through here.
    pub(super) fn unbury(&mut self, offset: i64) -> Option<Dead> {
        let dead = self.dead.remove(&offset)?;
        if let Order::Keys(keys) = &mut self.order
            && let Some(key) = dead.mark.key
            && let Some(held) = keys.held.get_mut(&key)
        {
            held.remove(&offset);
            if held.is_empty() {
                keys.held.remove(&key);
            }
            self.refresh(key);
        }
        Some(dead)
    }

    /// An entry came: see [`Queue::attach`].
    pub(super) fn enter(&mut self, offset: i64, mark: Mark, state: State) {
        match &mut self.order {
            Order::Offsets => {}
            Order::Lanes(lanes) => lanes.entries[lane(mark.priority)] += 1,
            Order::Keys(keys) => {
                if let Some(key) = keys.key(mark) {
                    let of_key = keys.keys.entry(key).or_default();
                    of_key.members.insert(offset);
                    of_key.live += u32::from(matches!(state, State::Live { .. }));
                    self.refresh(key);
                }
            }
        }
    }

    /// An entry went: see [`Queue::detach`].
    pub(super) fn exit(&mut self, offset: i64, entry: &Entry) {
        match &mut self.order {
            Order::Offsets => {}
            Order::Lanes(lanes) => {
                let lane = lane(entry.mark.priority);
                lanes.entries[lane] = lanes.entries[lane].saturating_sub(1);
                lanes.again[lane].remove(&offset);
            }
            Order::Keys(keys) => match keys.key(entry.mark) {
                None => {
                    keys.again.remove(&offset);
                }
                Some(key) => {
                    keys.leave(key, offset);
                    if let State::Live { .. } = entry.state
                        && let Some(of_key) = keys.keys.get_mut(&key)
                    {
                        of_key.live = of_key.live.saturating_sub(1);
                    }
                    self.refresh(key);
                }
            },
        }
    }

    /// An entry's delay is over: it is in `again`.
    pub(super) fn fall_due(&mut self, offset: i64) {
        let Some(mark) = self.entries.get(&offset).map(|entry| entry.mark) else {
            return;
        };
        match &mut self.order {
            Order::Offsets => {}
            Order::Lanes(lanes) => {
                lanes.again[lane(mark.priority)].insert(offset);
            }
            Order::Keys(keys) => match keys.key(mark) {
                None => {
                    keys.again.insert(offset);
                }
                Some(key) => self.refresh(key),
            },
        }
    }

    /// Opens the key's first message if it may go out, and no other.
    pub(super) fn refresh(&mut self, key: i64) {
        let holds = self.settings.hold_key;
        let Order::Keys(keys) = &mut self.order else {
            return;
        };
        let Some(state) = keys.keys.get(&key) else {
            return;
        };
        let Some(first) = state.members.first() else {
            keys.keys.remove(&key);
            return self.end_order();
        };
        if keys.is_leaving && state.live == 0 {
            return self.dissolve(key);
        }
        let is_ready = self.fresh.contains(first) || self.again.contains(&first);
        let is_open = is_ready && state.live == 0 && !(holds && keys.holder(key, first).is_some());
        let open = is_open.then_some(first);
        let before = state.open;
        if before == open {
            return;
        }
        if let Some(before) = before {
            keys.close(before);
        }
        if let Some(first) = open {
            if self.fresh.contains(first) {
                keys.fresh.insert(first);
                keys.heads.insert(first, key);
            } else {
                keys.again.insert(first);
            }
        }
        if let Some(state) = keys.keys.get_mut(&key) {
            state.open = open;
        }
    }

    /// The key's messages go their own ways from now on.
    fn dissolve(&mut self, key: i64) {
        let Order::Keys(keys) = &mut self.order else {
            return;
        };
        let Some(state) = keys.keys.remove(&key) else {
            return;
        };
        if let Some(open) = state.open {
            keys.close(open);
        }
        for offset in state.members.iter() {
            if self.fresh.contains(offset) {
                keys.fresh.insert(offset);
            } else if self.again.contains(&offset) {
                keys.again.insert(offset);
            }
        }
        self.end_order();
    }

    pub(super) fn end_order(&mut self) {
        if let Order::Keys(keys) = &self.order
            && keys.is_leaving
            && keys.keys.is_empty()
        {
            self.begin_order(false);
            // The message at hand may be in neither set at this moment.
            self.is_arranging = matches!(self.order, Order::Lanes(_));
        }
    }

    /// Whether the message could go out now, were it ready: no other of its key comes first.
    #[must_use]
    pub fn is_open(&self, offset: Offset) -> bool {
        match &self.order {
            Order::Keys(keys) => keys.is_open(offset.0),
            Order::Offsets | Order::Lanes(_) => true,
        }
    }

    /// Ready messages that wait for an earlier one of their key.
    pub(super) fn waiting(&self) -> u64 {
        match &self.order {
            Order::Offsets | Order::Lanes(_) => 0,
            Order::Keys(keys) => {
                let ready = self.fresh.len() + self.again.len() as u64;
                ready - keys.fresh.len() - keys.again.len() as u64
            }
        }
    }

    /// Unsettled messages by lane, lowest first, if the queue has lanes.
    pub(super) fn lanes(&self) -> Option<[u64; LANES]> {
        match &self.order {
            Order::Lanes(lanes) => Some(std::array::from_fn(|lane| {
                lanes.fresh[lane].len() + lanes.entries[lane]
            })),
            Order::Offsets | Order::Keys(_) => None,
        }
    }

    /// The key that orders the message, if the queue is in order by key and the message was handed out.
    pub(super) fn key_of(&self, offset: i64) -> Option<(i64, &Key)> {
        let Order::Keys(keys) = &self.order else {
            return None;
        };
        let key = keys.key(self.entries.get(&offset)?.mark)?;
        Some((key, keys.get(key)?))
    }

    /// Whether an earlier message of the key, handed out by the same receive, is unsettled.
    pub(super) fn is_blocked(&self, offset: i64) -> bool {
        let batch = |offset: i64| self.entries.get(&offset).and_then(|entry| entry.batch);
        let (Some(own), Some((_, key))) = (batch(offset), self.key_of(offset)) else {
            return false;
        };
        let earlier = key.members.iter().take_while(|&other| other < offset);
        earlier.into_iter().any(|other| batch(other) == Some(own))
    }

    /// Whether another receive has a message of the key: this one cannot come to life again.
    pub(super) fn is_overtaken(&self, offset: i64) -> bool {
        let Some((_, key)) = self.key_of(offset) else {
            return false;
        };
        if key.live == 0 {
            return false;
        }
        let entry = |offset: i64| self.entries.get(&offset);
        let mut live = key.members.iter().filter_map(entry);
        let live = live.find(|entry| matches!(entry.state, State::Live { .. }));
        let own = entry(offset).and_then(|entry| entry.batch);
        own.is_none() || live.is_some_and(|live| live.batch != own)
    }
}
