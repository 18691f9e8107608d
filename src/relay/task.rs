//! The loop of one origin's relay: hold the lease, learn the position, connect, then step after step until something is
//! amiss. Whatever it is, the session is dropped and the loop begins again from the stored position: nothing that was only
//! in memory outlives a session, since a snapshot without a mark behind it says nothing about a server that restarted.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Options;
use super::caution::Caution;
use super::lookups::Lookups;
use super::pace::Pace;
use super::position::{Gaps, Position};
use super::rotation::Rotation;
use super::status::{State, Status};
use super::trouble::Trouble;
use crate::domain::id::{Fence, OriginId};
use crate::domain::mapping::{Mapping, Pickup};
use crate::domain::name::OriginName;
use crate::store::origin::{Backend, Session};
use crate::store::relay::Recovered;
use crate::store::{self, Database};
use crate::supervisor::{Backoff, Report};
use crate::{cluster, stream, supervisor, topic};

/// How often folds, history and rotation are looked at.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
/// The first pause after trouble.
const RETRY_MIN: Duration = Duration::from_millis(50);

/// One origin's relay.
pub(super) struct Relay {
    pub(super) name: OriginName,
    pub(super) id: OriginId,
    /// The origin is the broker's own database: storing the position flushes the log that the rows are in.
    pub(super) is_local: bool,
    pub(super) source: Database,
    /// The table that is read in place of the outbox.
    pub(super) mapping: Option<Mapping>,
    pub(super) broker: Database,
    pub(super) stream: stream::Handle,
    pub(super) topics: topic::Handle,
    pub(super) cluster: cluster::Handle,
    pub(super) supervisor: supervisor::Supervisor,
    pub(super) options: Arc<Options>,
    pub(super) lookups: Arc<Lookups>,
    pub(super) status: watch::Sender<Status>,
    /// The last session with the origin, which is ended before there is another.
    pub(super) session: Mutex<Option<Backend>>,
}

/// The state of a session with the origin.
pub(super) struct Run<'a> {
    pub(super) relay: &'a Relay,
    pub(super) fence: Fence,
    pub(super) session: Session,
    /// The backend that answered first: behind a pooler the session can change under the relay.
    pub(super) backend_pid: Option<i32>,
    /// The stored position and its number.
    pub(super) number: i64,
    pub(super) position: Option<Position>,
    /// The gaps that the next position records.
    pub(super) gaps: Option<Gaps>,
    /// The number of the position up to which rows have left the outbox. Higher than the stored one only when the broker's
    /// database went back in time.
    pub(super) emptied: i64,
    /// A later snapshot after which nothing was found. Good for this session only: no mark stands behind it.
    pub(super) cursor: Option<String>,
    /// The rows that the stored position took are out of the table, as this session knows.
    pub(super) is_settled: bool,
    /// Other origins of this broker, under which it has relayed this outbox before: messages of it are theirs in the streams.
    pub(super) formers: Vec<OriginId>,
    /// The time of the last search for rows of another server.
    pub(super) foreign_at: Option<Instant>,
    pub(super) rotation: Rotation,
    /// Knowledge of refused rows and of the backlog, from this session and before.
    pub(super) caution: &'a mut Caution,
}

/// The result of a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stepped {
    /// Rows that left the outbox's window.
    pub(super) rows: usize,
}

impl Relay {
    pub(super) async fn run(self) {
        let mut lease = self.cluster.hold(self.id.lease_name());
        let mut retry = Backoff::new(RETRY_MIN, self.options.retry_max);
        let mut caution = Caution::new(self.options.manifest_rows);
        let report = self.report();
        loop {
            let fence = lease.borrow_and_update().clone();
            let trouble = match fence {
                Some(fence) => {
                    report.begins();
                    let held = self.hold_session(&fence, &lease, &mut retry, &report, &mut caution);
                    held.await
                }
                None => Trouble::LeaseLost,
            };
            self.note(&trouble);
            match trouble {
                Trouble::Stopping => break,
                Trouble::LeaseLost if lease.borrow().is_none() => {
                    // Nothing is under way: if the lease is assigned to another node, it can go.
                    self.cluster.yielded(&self.id.lease_name());
                    report.stands_by();
                    tokio::select! {
                        changed = lease.changed() => if changed.is_err() {
                            self.supervisor.stopping().await;
                        },
                        () = self.supervisor.stopping() => {}
                    }
                    if self.supervisor.is_stopping() {
                        self.note(&Trouble::Stopping);
                        break;
                    }
                }
                trouble => {
                    let pause = jittered(retry.next_pause());
                    report.failed(trouble.describe(), pause);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = self.supervisor.stopping() => {}
                    }
                }
            }
        }
        self.cluster.release(&self.id.lease_name());
    }

    /// Where its sessions say how they are doing, as duties do. (The states of a relay say more: `GET /v1/origins`.)
    fn report(&self) -> Report {
        let lease = Cow::from(self.id.lease_name());
        self.supervisor.report(self.task_name(), Some(lease))
    }

    pub(super) fn task_name(&self) -> String {
        format!("relay/{}", self.name)
    }

    fn note(&self, trouble: &Trouble) {
        let state = trouble.state();
        let detail = match trouble {
            Trouble::Stopping | Trouble::LeaseLost => None,
            other => Some(other.describe()),
        };
        let (old, _) = self.state();
        match (&detail, old == state) {
            (Some(detail), false) => {
                tracing::warn!(origin = %self.name, state = state.as_str(), detail, "relay paused");
            }
            (Some(detail), true) => {
                tracing::debug!(origin = %self.name, state = state.as_str(), detail, "relay still paused");
            }
            (None, false) => {
                tracing::info!(origin = %self.name, state = state.as_str(), "this node no longer runs the relay");
            }
            (None, true) => {}
        }
        self.set_state(state, detail);
    }

    fn former(&self) -> Option<Backend> {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> (State, Option<String>) {
        let status = self.status.borrow();
        (status.state, status.detail.clone())
    }

    pub(super) fn set_state(&self, state: State, detail: Option<String>) {
        let now = self.cluster.now();
        self.status.send_if_modified(|status| {
            let is_new = status.state != state;
            if is_new {
                status.state = state;
                status.state_since = now;
            }
            let is_news = is_new || status.detail != detail;
            status.detail = detail;
            is_news
        });
    }

    /// Relays under the lease until something is amiss, and returns what.
    async fn hold_session(
        &self,
        fence: &Fence,
        lease: &watch::Receiver<Option<Fence>>,
        retry: &mut Backoff,
        report: &Report,
        caution: &mut Caution,
    ) -> Trouble {
        let mut run = match self.begin(fence, caution).await {
            Ok(run) => run,
            Err(trouble) => return self.told(trouble, fence),
        };
        let trouble = run.steps(lease.clone(), retry, report).await;
        self.told(trouble, fence)
    }

    /// A refused write: the lease has another epoch, which the cluster must hear of.
    fn told(&self, trouble: Trouble, fence: &Fence) -> Trouble {
        if matches!(trouble, Trouble::LeaseLost) {
            self.cluster.fenced(fence);
        }
        trouble
    }

    async fn begin<'a>(
        &'a self,
        fence: &Fence,
        caution: &'a mut Caution,
    ) -> Result<Run<'a>, Trouble> {
        if self.supervisor.is_stopping() {
            return Err(Trouble::Stopping);
        }
        let recovered = store::relay::recover_position(&self.broker, self.id, fence).await;
        let stored = match recovered.map_err(Trouble::Broker)? {
            Recovered::Position(stored) => stored,
            Recovered::Fenced => return Err(Trouble::LeaseLost),
        };
        let position: Option<Position> = match stored.text.as_deref().map(serde_json::from_str) {
            Some(Ok(position)) => Some(position),
            Some(Err(error)) => return Err(Trouble::Position(error)),
            None => None,
        };
        let gaps = position.as_ref().and_then(|position| position.gaps);
        self.show_gaps(gaps);
        if matches!(self.state().0, State::Waiting) {
            self.set_state(State::Connecting, None);
        }
        let opening = Session::open(&self.source, self.former());
        let mut session = opening.await.map_err(Trouble::Origin)?;
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = session.backend();
        let formers = self.take_hold(&mut session).await?;
        let emptied = session.find_emptied(self.reader()).await;
        let emptied = emptied.map_err(Trouble::Origin)?;
        let rejected = store::relay::count_rejected(&self.broker, self.id).await;
        let rejected = rejected.map_err(Trouble::Broker)?;
        self.status.send_modify(|status| {
            status.position = stored.number;
            status.rejected_count = rejected;
        });
        Ok(Run {
            relay: self,
            fence: fence.clone(),
            session,
            backend_pid: None,
            number: stored.number,
            position,
            gaps,
            emptied,
            cursor: None,
            is_settled: false,
            formers,
            foreign_at: None,
            rotation: Rotation::new(stored.folded),
            caution,
        })
    }

    /// How the origin's rows are picked up.
    pub(super) fn pickup(&self) -> Pickup {
        self.mapping
            .as_ref()
            .map_or(Pickup::Snapshot, |mapping| mapping.pickup)
    }
}

impl Run<'_> {
    async fn steps(
        &mut self,
        mut lease: watch::Receiver<Option<Fence>>,
        retry: &mut Backoff,
        report: &Report,
    ) -> Trouble {
        let options = &self.relay.options;
        let mut pace = Pace::new(options, Instant::now());
        let mut upkeep_at = Instant::now();
        let mut has_stepped = false;
        loop {
            if self.relay.supervisor.is_stopping() {
                return Trouble::Stopping;
            }
            if lease.borrow_and_update().as_ref() != Some(&self.fence) {
                return Trouble::LeaseLost;
            }
            let stepped = match self.step().await {
                Ok(stepped) => stepped,
                // Nothing was appended, and the position is as it was.
                Err(trouble @ Trouble::RowsRefused { .. }) => {
                    self.relay.note(&trouble);
                    continue;
                }
                Err(trouble) => return trouble,
            };
            retry.reset();
            if !std::mem::replace(&mut has_stepped, true) {
                report.recovered();
            }
            self.relay.set_state(State::Running, None);
            if Instant::now() >= upkeep_at {
                if let Err(trouble) = self.upkeep().await {
                    return trouble;
                }
                upkeep_at = Instant::now() + UPKEEP_INTERVAL;
            }
            let Some(time) = pace.after(stepped.rows, options, Instant::now()) else {
                continue;
            };
            tokio::select! {
                () = supervisor::pause(time) => {}
                () = self.relay.supervisor.stopping() => {}
                _ = lease.changed() => {}
            }
        }
    }
}

/// Between half of the pause and all of it, so that relays that lost one server do not come back to it as one.
fn jittered(pause: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 1_000;
    let thousandths = 500 + u32::try_from(random).unwrap_or_default() / 2;
    pause * thousandths / 1_000
}
