//! The heartbeat: renew, take, give back; one bounded pass per tick or wake-up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Options, Shared};
use crate::domain::id::Fence;
use crate::store::{self, Connection, Database};
use crate::supervisor::Supervisor;

/// The shortest and the longest pause before connecting again.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

pub(super) struct Heartbeat {
    options: Options,
    db: Database,
    connection: Option<Connection>,
    shared: Arc<Shared>,
    supervisor: Supervisor,
}

impl Heartbeat {
    pub(super) fn new(
        options: Options,
        db: Database,
        connection: Connection,
        shared: Arc<Shared>,
        supervisor: Supervisor,
    ) -> Self {
        Self {
            options,
            db,
            connection: Some(connection),
            shared,
            supervisor,
        }
    }

    pub(super) async fn run(mut self) {
        let mut pause = RECONNECT.0;
        let mut renew_at = Instant::now() + self.options.heartbeat;
        while !self.supervisor.is_stopping() {
            let wait = match self.pass(&mut renew_at).await {
                Ok(()) => {
                    pause = RECONNECT.0;
                    renew_at.saturating_duration_since(Instant::now())
                }
                Err(error) => {
                    self.shared.metrics.heartbeat_failures.inc();
                    tracing::warn!(error = &error as &dyn std::error::Error, "heartbeat failed");
                    if error.is_connection_spent() {
                        self.connection = None;
                    }
                    renew_at = Instant::now();
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

    async fn pass(&mut self, renew_at: &mut Instant) -> Result<(), store::Error> {
        if Instant::now() >= *renew_at {
            self.renew().await?;
            *renew_at = Instant::now() + self.options.heartbeat;
        }
        self.give_back().await?;
        self.take().await
    }

    async fn renew(&mut self) -> Result<(), store::Error> {
        let incarnation = self.shared.incarnation.load(Ordering::Acquire);
        let ttl = self.options.ttl;
        let asked = Instant::now();
        let connection = self.connected().await?;
        if store::cluster::renew_node(connection, incarnation, ttl.as_secs_f64()).await? {
            self.shared.state().trusted_until = asked + ttl;
            return Ok(());
        }
        tracing::warn!(
            incarnation,
            "this node was declared dead; registering again"
        );
        self.drop_fences();
        let address = self.options.address.clone();
        let connection = self.connected().await?;
        let asked = Instant::now();
        let (incarnation, _) =
            store::cluster::insert_node(connection, &address, ttl.as_secs_f64()).await?;
        self.shared
            .incarnation
            .store(incarnation, Ordering::Release);
        self.shared.state().trusted_until = asked + ttl;
        self.shared.metrics.incarnations.inc();
        tracing::info!(incarnation, address, "node registered");
        Ok(())
    }

    fn drop_fences(&self) {
        let state = self.shared.state();
        for sender in state.wanted.values() {
            sender.send_if_modified(|held| held.take().is_some());
        }
        self.shared.metrics.leases_held.set(0);
    }

    async fn give_back(&mut self) -> Result<(), store::Error> {
        let names = self.shared.state().to_release.clone();
        if names.is_empty() {
            return Ok(());
        }
        let incarnation = self.shared.incarnation.load(Ordering::Acquire);
        store::cluster::release_leases(self.connected().await?, incarnation, &names).await?;
        tracing::info!(leases = names.join(" "), "leases released");
        let mut state = self.shared.state();
        state.to_release.retain(|name| !names.contains(name));
        self.count_held(&state);
        Ok(())
    }

    async fn take(&mut self) -> Result<(), store::Error> {
        let names: Vec<String> = {
            let state = self.shared.state();
            let missing = state
                .wanted
                .iter()
                .filter(|(_, held)| held.borrow().is_none());
            missing.map(|(name, _)| name.clone()).collect()
        };
        if names.is_empty() {
            return Ok(());
        }
        let incarnation = self.shared.incarnation.load(Ordering::Acquire);
        let taken =
            store::cluster::take_leases(self.connected().await?, incarnation, &names).await?;
        for fence in taken {
            self.show(fence);
        }
        self.count_held(&self.shared.state());
        Ok(())
    }

    fn show(&self, fence: Fence) {
        tracing::info!(lease = fence.lease, epoch = fence.epoch.0, "lease taken");
        self.shared.metrics.leases_taken.inc();
        let mut state = self.shared.state();
        match state.wanted.get(&fence.lease) {
            Some(sender) => {
                sender.send_replace(Some(fence));
            }
            // Released while it was being taken.
            None => state.to_release.push(fence.lease),
        }
    }

    fn count_held(&self, state: &super::State) {
        let held = state.wanted.values().filter(|held| held.borrow().is_some());
        self.shared.metrics.leases_held.set(held.count() as i64);
    }

    /// The orderly end: what this node held is free at once.
    async fn retire(&mut self) {
        let incarnation = self.shared.incarnation.load(Ordering::Acquire);
        let names: Vec<String> = {
            let mut state = self.shared.state();
            let mut names = std::mem::take(&mut state.to_release);
            names.extend(state.wanted.keys().cloned());
            names
        };
        self.drop_fences();
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
