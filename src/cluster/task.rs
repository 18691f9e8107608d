//! The heartbeat: renew and look, lead, give up, give back, take; one bounded pass per tick or wake-up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::lead::lead;
use super::tenure::State;
use super::view::{Observer, View};
use super::{Options, Pulse, Shared};
use crate::domain::id::Fence;
use crate::failpoint;
use crate::store::cluster::Sign;
use crate::store::{self, Connection, Database, Link};
use crate::supervisor::{Backoff, Duty, Next, Routine, Supervisor};

/// The pause before connecting again.
const RECONNECT: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(1));
/// How often to look while something is on its way here, or this node is leaving.
const HAND_OVER: Duration = Duration::from_millis(50);
/// A node is looked at so long after its time is over.
const AFTER_EXPIRY: Duration = Duration::from_millis(10);

pub(super) struct Heartbeat {
    options: Options,
    db: Database,
    link: Link,
    observer: Observer,
    /// The view of the last heartbeat, and when the next one is due.
    last: Option<(Arc<View>, Instant)>,
    shared: Arc<Shared>,
}

/// Whole milliseconds.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Duty for Heartbeat {
    type Error = store::Error;

    async fn pass(&mut self) -> Result<Next, store::Error> {
        let pause = self.renew().await?;
        self.show_trust();
        Ok(Next::Within(pause))
    }

    fn failed(&mut self, error: &store::Error) {
        self.shared.metrics.heartbeat_failures.inc();
        tracing::warn!(error = error as &dyn std::error::Error, "heartbeat failed");
        self.explain(error);
        self.link.heed(error);
        self.show_trust();
    }

    async fn end(&mut self) {
        self.retire().await;
    }
}

impl Heartbeat {
    pub(super) fn new(
        options: Options,
        db: Database,
        (connection, observer): (Connection, Observer),
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            options,
            link: Link::plain(&db).with(connection),
            db,
            observer,
            last: None,
            shared,
        }
    }

    pub(super) fn start(self, supervisor: &Supervisor) {
        let routine = Routine::every(self.options.heartbeat, "cluster heartbeat")
            .woken_by(&self.shared.wake)
            .backing_off(RECONNECT);
        supervisor.start(routine, self);
    }

    fn show_trust(&self) {
        let is_trusted = Instant::now() < self.shared.state().trusted_until;
        self.shared.metrics.trusted.set(i64::from(is_trusted));
    }

    /// Keeps the reason why the heartbeat failed, for callers that ask whether writes come through.
    fn explain(&self, error: &store::Error) {
        let mut pulse = self.shared.pulse();
        // That it was not answered says less than what was found out about that.
        if pulse.why.is_none() || !error.is_timed_out() {
            pulse.why = Some(error.explained());
        }
    }

    async fn connected(&mut self) -> Result<&mut Connection, store::Error> {
        if !self.link.is_up() {
            let mut connection = self.link.lend().await?;
            if self.shared.silence().is_some() {
                let why = store::cluster::why_no_commit(&mut connection).await?;
                self.shared.pulse().why = why.map(str::to_owned);
            }
            self.link.keep(connection);
        }
        self.link.get().await
    }

    /// Gives how long there is nothing more to do.
    async fn renew(&mut self) -> Result<Duration, store::Error> {
        if let Some(view) = self.still_good()
            && let Some(pause) = self.make_do(&view).await?
        {
            return Ok(pause);
        }
        self.last = None;
        let mut view = self.beat().await?;
        self.connected().await?;
        let connection = self.link.get().await?;
        lead(&self.shared, connection, &self.observer, &mut view).await?;
        let view = Arc::new(view);
        self.shared.metrics.note(&view);
        // Before the fences change: whoever sees one gone must see its new node.
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
        if is_waiting || state.is_yielding() || (state.is_leaving && view.has_staying_peers()) {
            wait = wait.min(HAND_OVER);
        }
        wait
    }

    async fn beat(&mut self) -> Result<View, store::Error> {
        let ttl = self.options.ttl;
        loop {
            let incarnation = self.shared.incarnation.load(Ordering::Acquire);
            let (wants, is_leaving) = self.shared.state().signs(Instant::now());
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
            *self.shared.pulse() = Pulse {
                at: Instant::now(),
                why: None,
            };
            self.shared.meet_clock(seen.clock);
            if seen.is_renewed {
                self.db.note_beat(incarnation, beat);
                self.shared.state().trusted_until = asked + ttl;
                let mut view = self
                    .observer
                    .view((asked, Instant::now()), incarnation, seen);
                view.note_own(&wants, is_leaving);
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

    fn drop_fences(&self) {
        self.shared.state().drop_fences();
        self.shared.metrics.leases_held.set(0);
    }

    fn give_up(&self, view: &View) {
        let mut state = self.shared.state();
        let given_up = state.give_up(view, Instant::now(), self.options.ttl / 2);
        self.count_held(&state);
        drop(state);
        let metrics = &self.shared.metrics;
        for lease in given_up.late {
            tracing::warn!(
                lease,
                "giving back the lease, and cutting work under it short"
            );
        }
        for lease in given_up.unknown {
            tracing::info!(
                lease,
                "giving back a lease that an unanswered request had taken"
            );
        }
        for Fence { lease, epoch } in given_up.taken_over {
            tracing::warn!(lease, epoch = epoch.0, "the lease was taken over");
            metrics.leases_fenced.inc();
        }
        for (Fence { lease, epoch }, to) in given_up.yielding {
            tracing::info!(lease, epoch = epoch.0, to, "handing over the lease");
            metrics.leases_yielded.inc();
        }
    }

    async fn give_back(&mut self) -> Result<(), store::Error> {
        let names = self.shared.state().to_release.clone();
        if names.is_empty() {
            return Ok(());
        }
        let incarnation = self.shared.incarnation.load(Ordering::Acquire);
        failpoint::reach("hand_over.before_release");
        let connection = self.connected().await?;
        let left = store::cluster::release_leases(connection, incarnation, &names).await?;
        let released: Vec<String> = names
            .into_iter()
            .filter(|name| !left.contains(name))
            .collect();
        tracing::info!(leases = released.join(" "), "leases released");
        let mut state = self.shared.state();
        state.released(&released);
        self.count_held(&state);
        Ok(())
    }

    /// Takes leases that are wanted, assigned to this node and free. Returns whether some of them are not free yet.
    async fn take(&mut self, view: &View) -> Result<bool, store::Error> {
        let missing = self.shared.state().missing(view);
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
        self.shared.state().show(fence);
    }

    fn count_held(&self, state: &State) {
        self.shared
            .metrics
            .leases_held
            .set(state.held_count() as i64);
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
                "the node's end could not be recorded; its leases become free after node_ttl_seconds"
            );
        }
    }
}
