//! The leases that this node wants, holds, hands over and gives back. This module decides by a view and a moment, and knows
//! neither the database nor the clock: the heartbeat (`task`) carries out the decisions, and `simulation` runs them by
//! seed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::view::{SLOTS, View};
use crate::domain::assignment::Node;
use crate::domain::id::Fence;

#[derive(Debug)]
pub(super) struct State {
    pub(super) wanted: BTreeMap<String, Wanted>,
    /// Leases to give back.
    pub(super) to_release: Vec<String>,
    /// Slots are served here: they are shared out to this node.
    pub(super) serves_slots: bool,
    /// The leases that the previous process at this address wanted: those that it held stay here while this one starts, until the
    /// given time at most.
    pub(super) inherited: Option<(Vec<String>, Instant)>,
    pub(super) is_leaving: bool,
    /// Something waits for the next heartbeat.
    pub(super) is_beat_wanted: bool,
    pub(super) trusted_until: Instant,
}

/// A lease that an engine wants.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) fence: watch::Sender<Option<Fence>>,
    /// The lease is assigned to another node, and still held at this epoch until the engine has finished, or until the given time.
    pub(super) yielding: Option<(Fence, Instant)>,
}

/// The leases that a view made this node give up.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct GivenUp {
    /// Leases whose engines have not finished in time: they are released anyway.
    pub(super) late: Vec<String>,
    /// Leases that are another's, or nobody's, already.
    pub(super) taken_over: Vec<Fence>,
    /// Leases that this node holds without ever having shown them, and that are assigned to another node: a call whose answer was
    /// lost took them before they were reassigned.
    pub(super) unknown: Vec<String>,
    /// Leases that are assigned to another node: their engines finish.
    pub(super) yielding: Vec<(Fence, Node)>,
}

impl State {
    /// The state of a node that has just started, at the address of an earlier one that wanted `inherited`.
    pub(super) fn new(inherited: Vec<String>, trusted_until: Instant) -> Self {
        Self {
            wanted: BTreeMap::new(),
            to_release: Vec::new(),
            serves_slots: false,
            inherited: Some((inherited, trusted_until)),
            is_leaving: false,
            is_beat_wanted: true,
            trusted_until,
        }
    }

    /// The contents of a heartbeat: the leases that this node can hold, and whether it is about to end.
    pub(super) fn signs(&mut self, now: Instant) -> (Vec<String>, bool) {
        self.is_beat_wanted = false;
        let names = self.wanted.keys();
        let mut wants: Vec<String> = names
            .filter(|name| !name.starts_with("slot/"))
            .cloned()
            .collect();
        if self.serves_slots {
            wants.push(SLOTS.to_owned());
        }
        self.inherited.take_if(|(_, until)| *until <= now);
        let inherited = self.inherited.iter().flat_map(|(names, _)| names);
        wants.extend(inherited.cloned());
        wants.sort_unstable();
        wants.dedup();
        (wants, self.is_leaving)
    }

    /// Wants the lease from now on.
    pub(super) fn hold(&mut self, lease: String) -> watch::Receiver<Option<Fence>> {
        self.to_release.retain(|name| *name != lease);
        if let Some(wanted) = self.wanted.get(&lease) {
            return wanted.fence.subscribe();
        }
        let is_slot = lease.starts_with("slot/");
        // Others are assigned once it is known that they are wanted; slots are already.
        self.is_beat_wanted |= !is_slot || !self.serves_slots;
        self.serves_slots |= is_slot;
        let fence = watch::Sender::new(None);
        let receiver = fence.subscribe();
        let yielding = None;
        self.wanted.insert(lease, Wanted { fence, yielding });
        receiver
    }

    /// Notes that no work is under way under the last fence that was shown. Returns whether there is something to release now.
    pub(super) fn yielded(&mut self, lease: &str) -> bool {
        let wanted = self.wanted.get_mut(lease);
        let is_yielded = wanted.is_some_and(|wanted| wanted.yielding.take().is_some());
        if is_yielded {
            self.to_release.push(lease.to_owned());
        }
        is_yielded
    }

    /// Wants the lease no more.
    pub(super) fn release(&mut self, lease: &str) {
        if let Some(wanted) = self.wanted.remove(lease) {
            wanted.fence.send_replace(None);
            self.to_release.push(lease.to_owned());
        }
    }

    /// A write under this fence was refused. Whether it was shown.
    pub(super) fn fenced(&self, fence: &Fence) -> bool {
        self.wanted.get(&fence.lease).is_some_and(|wanted| {
            wanted
                .fence
                .send_if_modified(|held| held.take_if(|held| held == fence).is_some())
        })
    }

    /// Drops all fences because this incarnation was declared dead.
    pub(super) fn drop_fences(&mut self) {
        for wanted in self.wanted.values_mut() {
            wanted.yielding = None;
            wanted.fence.send_if_modified(|held| held.take().is_some());
        }
    }

    /// Stops showing leases that are assigned to another node, or already held by one, and releases those whose engines have not
    /// finished within `finish_within`.
    pub(super) fn give_up(
        &mut self,
        view: &View,
        now: Instant,
        finish_within: Duration,
    ) -> GivenUp {
        let mut given_up = GivenUp::default();
        for (name, wanted) in &mut self.wanted {
            let is_late = |(_, until): &mut (Fence, Instant)| now >= *until;
            if wanted.yielding.take_if(is_late).is_some() {
                given_up.late.push(name.clone());
            }
            let Some(fence) = wanted.fence.borrow().clone() else {
                continue;
            };
            let row = view.leases.get(name);
            // Taken before this view was asked for, so that it has it.
            if row.is_some_and(|row| row.holder != Some(view.own) || row.epoch != fence.epoch) {
                wanted.fence.send_replace(None);
                given_up.taken_over.push(fence);
                continue;
            }
            let assigned = view.assigned.get(name).copied();
            if let Some(node) = assigned.filter(|&node| node != view.own && view.is_live(node)) {
                wanted.yielding = Some((fence.clone(), now + finish_within));
                wanted.fence.send_replace(None);
                given_up.yielding.push((fence, node));
            }
        }
        self.to_release.extend(given_up.late.iter().cloned());
        given_up.unknown = self.unknown(view);
        self.to_release.extend(given_up.unknown.iter().cloned());
        given_up
    }

    fn unknown(&self, view: &View) -> Vec<String> {
        let own = view.leases.values();
        let own = own.filter(|row| row.holder == Some(view.own));
        let unknown = own.filter(|row| {
            let is_others = |&node: &Node| node != view.own && view.is_live(node);
            let is_idle =
                |wanted: &Wanted| wanted.fence.borrow().is_none() && wanted.yielding.is_none();
            view.assigned.get(&row.name).is_some_and(is_others)
                && self.wanted.get(&row.name).is_none_or(is_idle)
                && !self.to_release.contains(&row.name)
        });
        unknown.map(|row| row.name.clone()).collect()
    }

    /// They are given back.
    pub(super) fn released(&mut self, names: &[String]) {
        self.to_release.retain(|name| !names.contains(name));
    }

    /// Leases that are wanted and not held, assigned to this node, and not on their way back.
    pub(super) fn missing(&self, view: &View) -> Vec<String> {
        let missing = self.wanted.iter().filter(|(name, wanted)| {
            wanted.fence.borrow().is_none()
                && wanted.yielding.is_none()
                && view.assigned.get(*name) == Some(&view.own)
                && !self.to_release.contains(name)
        });
        missing.map(|(name, _)| name.clone()).collect()
    }

    /// A lease was taken.
    pub(super) fn show(&mut self, fence: Fence) {
        match self.wanted.get(&fence.lease) {
            Some(wanted) => {
                wanted.fence.send_replace(Some(fence));
            }
            // Released while it was being taken.
            None => self.to_release.push(fence.lease),
        }
    }

    pub(super) fn is_yielding(&self) -> bool {
        let mut wanted = self.wanted.values();
        wanted.any(|wanted| wanted.yielding.is_some())
    }

    pub(super) fn held_count(&self) -> usize {
        let wanted = self.wanted.values();
        let held = wanted.filter(|wanted| wanted.fence.borrow().is_some());
        held.count()
    }
}
