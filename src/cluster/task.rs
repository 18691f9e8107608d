//! The heartbeat: renew and look, lead, give up, give back, take; one bounded pass per tick or wake-up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::lead::lead;
use super::view::{Observer, SLOTS, View};
use super::{Options, Shared};
use crate::domain::id::Fence;
use crate::failpoint;
use crate::store::cluster::Sign;
use crate::store::{self, Connection, Database};
use crate::supervisor::Supervisor;

/// The shortest and the longest pause before connecting again.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// How often to look while something is on its way here, or this node is leaving.
const HAND_OVER: Duration = Duration::from_millis(50);
/// A node is looked at so long after its time is over.
const AFTER_EXPIRY: Duration = Duration::from_millis(10);

pub(super) struct Heartbeat {
    options: Options,
    db: Database,
    connection: Option<Connection>,
    observer: Observer,
    /// The view of the last heartbeat, and when the next one is due.
    last: Option<(Arc<View>, Instant)>,
    shared: Arc<Shared>,
    supervisor: Supervisor,
}

/// Whole milliseconds.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Heartbeat {
    pub(super) fn new(
        options: Options,
        db: Database,
        (connection, observer): (Connection, Observer),
        shared: Arc<Shared>,
        supervisor: Supervisor,
    ) -> Self {
        Self {
            options,
            db,
            connection: Some(connection),
            observer,
            last: None,
            shared,
            supervisor,
        }
    }

    pub(super) async fn run(mut self) {
        let mut pause = RECONNECT.0;
        while !self.supervisor.is_stopping() {
            let wait = match self.pass().await {
                Ok(wait) => {
                    pause = RECONNECT.0;
                    wait
                }
                Err(error) => {
                    self.shared.metrics.heartbeat_failures.inc();
                    tracing::warn!(error = &error as &dyn std::error::Error, "heartbeat failed");
                    if error.is_connection_spent() {
                        self.connection = None;
                    }
                    pause = (pause * 2).min(RECONNECT.1);
                    pause
                }
            };
            let is_trusted = Instant::now() < self.shared.state().trusted_until;
            self.shared.metrics.trusted.set(i64::from(is_trusted));
            if self.connection.is_some() {
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = self.shared.wake.notified() => {}
                    () = self.supervisor.stopping() => {}
                }
            } else {
                // A wake-up must not shorten the pause between attempts to connect.
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = self.supervisor.stopping() => {}
                }
            }
        }
        self.retire().await;
    }

    async fn connected(&mut self) -> Result<&mut Connection, store::Error> {
        if self.connection.is_none() {
            self.connection = Some(self.db.connect().await?);
        }
        Ok(self.connection.as_mut().expect("connected just above"))
    }

    /// Gives how long there is nothing more to do.
    async fn pass(&mut self) -> Result<Duration, store::Error> {
        if let Some(view) = self.still_good()
            && let Some(pause) = self.make_do(&view).await?
        {
            return Ok(pause);
        }
        self.last = None;
        let mut view = self.beat().await?;
        self.connected().await?;
        if let Some(connection) = &mut self.connection {
            lead(&self.shared, connection, &self.observer, &mut view).await?;
        }
        let view = Arc::new(view);
        self.shared.metrics.note(&view);
        // Before the fences change: who sees one gone must see whose it is to be.
        self.shared.view.send_replace(Arc::clone(&view));
        self.give_up(&view);
        self.give_back().await?;
        let is_waiting = self.take(&view).await?;
        let pause = self.pause(&view, is_waiting);
        self.last = Some((view, Instant::now() + pause));
        Ok(pause)
    }

    /// The view of the last heartbeat, if nobody waits for the next and it is not due.
    fn still_good(&self) -> Option<Arc<View>> {
        let (view, until) = self.last.as_ref()?;
        let is_wanted = std::mem::take(&mut self.shared.state().is_beat_wanted);
        (!is_wanted && Instant::now() < *until).then(|| Arc::clone(view))
    }

    /// Does what there is to do without a heartbeat: a queue of a slot that is assigned already need not wait for one. None if
    /// that is not enough.
    async fn make_do(&mut self, view: &View) -> Result<Option<Duration>, store::Error> {
        self.give_back().await?;
        if self.take(view).await? {
            return Ok(None);
        }
        let until = self.last.as_ref().map(|(_, until)| *until);
        Ok(until.map(|until| until.saturating_duration_since(Instant::now())))
    }

    fn pause(&self, view: &View, is_waiting: bool) -> Duration {
        let next = view.as_of + self.options.heartbeat;
        let mut wait = next.saturating_duration_since(Instant::now());
        if let Some(left) = self.observer.until_expiry(view) {
            let expired_at = view.as_of + left + AFTER_EXPIRY;
            wait = wait.min(expired_at.saturating_duration_since(Instant::now()));
        }
        let state = self.shared.state();
        let is_yielding = state
            .wanted
            .values()
            .any(|wanted| wanted.yielding.is_some());
        if is_waiting || is_yielding || (state.is_leaving && view.has_staying_peers()) {
            wait = wait.min(HAND_OVER);
        }
        wait
    }

    async fn beat(&mut self) -> Result<View, store::Error> {
        let ttl = self.options.ttl;
        loop {
            let incarnation = self.shared.incarnation.load(Ordering::Acquire);
            let (wants, is_leaving) = self.signs();
            let asked = Instant::now();
            let beat = self.db.next_beat();
            let sign = Sign {
                incarnation,
                ttl_millis: millis(ttl),
                wants: &wants,
                is_leaving,
                beat,
            };
            failpoint::reach("node.before_renewal");
            let seen = store::cluster::beat(self.connected().await?, sign).await?;
            if seen.is_renewed {
                self.db.note_beat(incarnation, beat);
                self.shared.state().trusted_until = asked + ttl;
                let mut view = self.observer.view(asked, incarnation, seen);
                // The row was read as it was before.
                for member in &mut view.nodes {
                    if member.row.incarnation == incarnation {
                        member.row.wants.clone_from(&wants);
                        member.row.is_leaving = is_leaving;
                        member.standing = match is_leaving {
                            true => super::Standing::Leaving,
                            false => super::Standing::Live,
                        };
                    }
                }
                return Ok(view);
            }
            tracing::warn!(
                incarnation,
                "this node was declared dead; registering again"
            );
            self.drop_fences();
            let address = self.options.address.clone();
            let url = self.options.url.clone();
            let url = url.unwrap_or_else(|| address.clone());
            let connection = self.connected().await?;
            let (incarnation, ..) =
                store::cluster::register_node(connection, &address, &url, ttl.as_secs_f64())
                    .await?;
            self.shared
                .incarnation
                .store(incarnation, Ordering::Release);
            self.shared.metrics.incarnations.inc();
            tracing::info!(incarnation, address, "node registered");
        }
    }

    /// What the heartbeat says.
    fn signs(&self) -> (Vec<String>, bool) {
        let mut state = self.shared.state();
        state.is_beat_wanted = false;
        let names = state.wanted.keys();
        let mut wants: Vec<String> = names
            .filter(|name| !name.starts_with("slot/"))
            .cloned()
            .collect();
        if state.serves_slots {
            wants.push(SLOTS.to_owned());
        }
        state
            .inherited
            .take_if(|(_, until)| *until <= Instant::now());
        let inherited = state.inherited.iter().flat_map(|(names, _)| names);
        wants.extend(inherited.cloned());
        wants.sort_unstable();
        wants.dedup();
        (wants, state.is_leaving)
    }

    fn drop_fences(&self) {
        let mut state = self.shared.state();
        for wanted in state.wanted.values_mut() {
            wanted.yielding = None;
            wanted.fence.send_if_modified(|held| held.take().is_some());
        }
        self.shared.metrics.leases_held.set(0);
    }

    /// Stops showing leases that are to be another's, or are another's already, and has those released whose engines have
    /// not finished in time.
    fn give_up(&self, view: &View) {
        let now = Instant::now();
        let mut state = self.shared.state();
        let mut late = Vec::new();
        for (name, wanted) in &mut state.wanted {
            if wanted
                .yielding
                .as_ref()
                .is_some_and(|(_, until)| now >= *until)
            {
                tracing::warn!(
                    lease = name,
                    "the lease is given back, and work under it cut short"
                );
                wanted.yielding = None;
                late.push(name.clone());
            }
            let Some(fence) = wanted.fence.borrow().clone() else {
                continue;
            };
            let row = view.leases.get(name);
            // Taken before this view was asked for, so that it has it.
            if row.is_some_and(|row| row.holder != Some(view.own) || row.epoch != fence.epoch) {
                tracing::warn!(
                    lease = name,
                    epoch = fence.epoch.0,
                    "the lease was taken over"
                );
                self.shared.metrics.leases_fenced.inc();
                wanted.fence.send_replace(None);
                continue;
            }
            let assigned = view.assigned.get(name);
            if assigned.is_some_and(|&node| node != view.own && view.is_live(node)) {
                tracing::info!(
                    lease = name,
                    epoch = fence.epoch.0,
                    to = assigned,
                    "lease to be handed over"
                );
                self.shared.metrics.leases_yielded.inc();
                wanted.yielding = Some((fence, now + self.options.ttl / 2));
                wanted.fence.send_replace(None);
            }
        }
        state.to_release.extend(late);
        self.count_held(&state);
    }

    async fn give_back(&mut self) -> Result<(), store::Error> {
        let names = self.shared.state().to_release.clone();
        if names.is_empty() {
            return Ok(());
        }
        let incarnation = self.shared.incarnation.load(Ordering::Acquire);
        failpoint::reach("hand_over.before_release");
        store::cluster::release_leases(self.connected().await?, incarnation, &names).await?;
        tracing::info!(leases = names.join(" "), "leases released");
        let mut state = self.shared.state();
        state.to_release.retain(|name| !names.contains(name));
        self.count_held(&state);
        Ok(())
    }

    /// Takes what is wanted, assigned to this node and free. Gives whether some of it is not free yet.
    async fn take(&mut self, view: &View) -> Result<bool, store::Error> {
        let missing: Vec<String> = {
            let state = self.shared.state();
            let missing = state.wanted.iter().filter(|(name, wanted)| {
                wanted.fence.borrow().is_none()
                    && wanted.yielding.is_none()
                    && view.assigned.get(*name) == Some(&view.own)
                    && !state.to_release.contains(name)
            });
            missing.map(|(name, _)| name.clone()).collect()
        };
        let free = missing.iter().filter(|name| view.is_free(name));
        let names: Vec<String> = free.cloned().collect();
        if names.is_empty() {
            return Ok(!missing.is_empty());
        }
        let silent = self.observer.silent(view);
        let connection = self.connected().await?;
        failpoint::reach("lease.before_take");
        let taken = store::cluster::take_leases(connection, view.own, &names, &silent).await?;
        failpoint::reach("lease.after_take");
        let is_waiting = taken.len() < missing.len();
        for fence in taken {
            self.show(fence);
        }
        self.count_held(&self.shared.state());
        Ok(is_waiting)
    }

    fn show(&self, fence: Fence) {
        tracing::info!(lease = fence.lease, epoch = fence.epoch.0, "lease taken");
        self.shared.metrics.leases_taken.inc();
        let mut state = self.shared.state();
        match state.wanted.get(&fence.lease) {
            Some(wanted) => {
                wanted.fence.send_replace(Some(fence));
            }
            // Released while it was being taken.
            None => state.to_release.push(fence.lease),
        }
    }

    fn count_held(&self, state: &super::State) {
        let wanted = state.wanted.values();
        let held = wanted.filter(|wanted| wanted.fence.borrow().is_some());
        self.shared.metrics.leases_held.set(held.count() as i64);
    }

    /// The orderly end: what this node held is free at once.
    async fn retire(&mut self) {
        let incarnation = self.shared.incarnation.load(Ordering::Acquire);
        let names: Vec<String> = {
            let mut state = self.shared.state();
            let mut names = std::mem::take(&mut state.to_release);
            names.extend(state.wanted.keys().cloned());
            names.push(super::view::LEADER.to_owned());
            names
        };
        self.drop_fences();
        failpoint::reach("hand_over.before_release");
        let done = async {
            let connection = self.connected().await?;
            store::cluster::release_leases(connection, incarnation, &names).await?;
            store::cluster::mark_node_dead(connection, incarnation).await
        };
        if let Err(error) = done.await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the node's end could not be recorded; its leases are free after the ttl"
            );
        }
    }
}
