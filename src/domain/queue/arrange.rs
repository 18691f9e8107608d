//! A change of order: because the settings changed, or because the queue was just recovered and knows nothing of keys and
//! lanes. The queue then asks the log about its unsettled messages, and hands out nothing until it knows them.

use super::order::{Keys, Order, lane};
use super::{Dead, Found, Mark, Queue};
use crate::domain::id::Offset;
use crate::domain::message::Priority;
use crate::domain::policy::{Ordering, Settings};

impl Queue {
    /// Changes the settings from now on. Order by key begins for a key once its live deliveries are settled, and ends the same way.
    /// When the order needs the marks of unsettled messages, nothing goes out until they were passed in: see
    /// [`Queue::is_arranging`].
    pub fn change_settings(&mut self, settings: Settings) {
        let before = std::mem::replace(&mut self.settings, settings);
        let (was, is) = (before.ordering, self.settings.ordering);
        if was == is && before.priorities == self.settings.priorities {
            if before.hold_key != self.settings.hold_key
                && let Order::Keys(keys) = &self.order
            {
                let held: Vec<i64> = keys.held.keys().copied().collect();
                held.into_iter().for_each(|key| self.refresh(key));
            }
            return;
        }
        let leaves = matches!(self.order, Order::Keys(_)) && is != Ordering::Key;
        match leaves && !self.is_arranging {
            true => self.leave_order(),
            false => self.begin_order(leaves),
        }
    }

    /// The queue is ordered no more: each key goes on in order until nothing of it is live.
    fn leave_order(&mut self) {
        if let Order::Keys(keys) = &mut self.order {
            keys.is_leaving = true;
            let all: Vec<i64> = keys.keys.keys().copied().collect();
            self.end_order();
            all.into_iter().for_each(|key| self.refresh(key));
        }
    }

    /// Whether the queue is ordered no more, and keys are in order still.
    pub(super) fn is_leaving(&self) -> bool {
        matches!(self.order, Order::Keys(_)) && self.settings.ordering != Ordering::Key
    }

    /// Begins the order again, from the stored state. A queue that was leaving its order leaves it again, by the deliveries that
    /// are live now.
    pub fn arrange(&mut self) {
        self.begin_order(self.left_order && self.settings.ordering != Ordering::Key);
    }

    /// Begins another order; `leaves`: the queue leaves order by key, until live deliveries are settled.
    pub(super) fn begin_order(&mut self, leaves: bool) {
        self.order = match leaves {
            true => Order::Keys(Keys::default()),
            false => Order::of(&self.settings),
        };
        self.is_arranging = false;
        match &mut self.order {
            Order::Offsets => return,
            Order::Lanes(lanes) => {
                lanes.fresh[lane(Priority::Normal)] = self.fresh.clone();
                lanes.again[lane(Priority::Normal)] = self.again.clone();
                lanes.entries[lane(Priority::Normal)] = self.entries.len() as u64;
            }
            Order::Keys(keys) => {
                keys.fresh = self.fresh.clone();
                keys.again = self.again.clone();
                for (&offset, dead) in self.dead.iter().filter(|(_, dead)| dead.holds) {
                    if let Some(key) = dead.mark.key {
                        keys.held.entry(key).or_default().insert(offset);
                    }
                }
            }
        }
        for entry in self.entries.values_mut() {
            entry.mark = Mark::default();
        }
        let nothing = self.fresh.is_empty() && self.entries.is_empty() && self.dead.is_empty();
        self.is_arranging = !nothing;
        if nothing && leaves {
            self.leave_order();
        }
    }

    /// Whether nothing goes out since the order is not known yet: the marks of all that [`Queue::unmarked`] tells are to
    /// be passed to [`Queue::mark`].
    #[must_use]
    pub const fn is_arranging(&self) -> bool {
        self.is_arranging
    }

    /// Unsettled and dead messages after an offset, by offset, at most `count`.
    #[must_use]
    pub fn unmarked(&self, after: Offset, count: usize) -> Vec<Offset> {
        let from = after.0.saturating_add(1);
        let entries = self.entries.range(from..).map(|(&offset, _)| offset);
        // A queue with lanes does not know the keys of those that died, nor one in order of keys their lanes.
        let is_keyed = matches!(self.order, Order::Keys(_));
        let is_unknown = |dead: &Dead| match is_keyed {
            true => !dead.holds && dead.mark.key.is_none(),
            false => dead.mark.priority == Priority::default(),
        };
        let dead = self.dead.range(from..);
        let dead = dead
            .filter(|(_, dead)| is_unknown(dead))
            .map(|(&offset, _)| offset);
        let mut unmarked: Vec<i64> = self.fresh.iter_from(from).take(count).collect();
        unmarked.extend(entries.take(count).chain(dead.take(count)));
        unmarked.sort_unstable();
        unmarked.dedup();
        unmarked.truncate(count);
        unmarked.into_iter().map(Offset).collect()
    }

    /// Learns the marks of messages that are unsettled. Those of a redriven message whose log row is gone are with its
    /// dead letter. `None` says that there is nothing more to come.
    pub fn mark(&mut self, marks: Option<&[Found]>) {
        for found in marks.unwrap_or_default() {
            let offset = found.offset.0;
            if self.fresh.contains(offset) {
                self.remove_fresh(offset);
                self.add_fresh(offset, found.mark());
            } else {
                self.mark_entry(offset, found.mark());
            }
            if let Some(dead) = self.dead.get_mut(&offset) {
                match dead.holds {
                    // Its key is kept under what it died with.
                    true => dead.mark.priority = found.priority,
                    false => dead.mark = found.mark(),
                }
            }
        }
        if marks.is_none() {
            for offset in self.reopened.clone() {
                let offset = offset as i64;
                if let (Some(dead), Some(entry)) =
                    (self.dead.get(&offset), self.entries.get(&offset))
                    && entry.mark == Mark::default()
                {
                    self.mark_entry(offset, dead.mark);
                }
            }
            self.is_arranging = false;
            if self.is_leaving() {
                self.leave_order();
            }
        }
    }

    fn mark_entry(&mut self, offset: i64, mark: Mark) {
        if let Some(mut entry) = self.detach(offset) {
            entry.mark = mark;
            self.attach(offset, entry);
        }
    }
}
