//! How background work is doing, by name: for people who look, and for tests.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Supervisor;

/// What a piece of background work is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// A pass is under way.
    Running,
    /// The last pass came through, and the next is not due.
    Waiting,
    /// The last pass failed, and is tried again.
    Failing,
    /// Another node has the lease.
    StandingBy,
}

/// The work of one name, as of now.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its task's.
    pub name: Cow<'static, str>,
    /// The lease that it runs under.
    pub lease: Option<Cow<'static, str>>,
    /// What it is about.
    pub state: State,
    /// Since when.
    pub since: Instant,
    /// Passes that ended, those that failed included.
    pub passes: u64,
    /// Passes that have failed since the last one that came through.
    pub failures_in_a_row: u32,
    /// When the last pass ended, and how long it took.
    pub last_pass: Option<(Instant, Duration)>,
    /// When a pass or a part of one failed last, and why, with its causes.
    pub last_error: Option<(Instant, String)>,
    /// When the next pass is due at the latest. None while one is under way, and where only a wake-up brings one.
    pub next_at: Option<Instant>,
}

/// The statuses of all work, by name.
pub(super) type Statuses = Arc<Mutex<BTreeMap<Cow<'static, str>, Arc<Mutex<Status>>>>>;

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a piece of work says how it is doing. Its status ends with it.
#[derive(Debug)]
pub struct Report {
    status: Arc<Mutex<Status>>,
    all: Statuses,
}

impl Report {
    /// A pass begins.
    pub fn begins(&self) {
        let mut status = lock(&self.status);
        status.turn(State::Running);
        // Each pass has a beginning of its own, also where one follows the other.
        status.since = Instant::now();
        status.next_at = None;
    }

    /// The pass came through, with trouble of a part perhaps. The next is due after `pause` at the latest.
    pub fn passed(&self, pause: Option<Duration>, trouble: Option<String>) {
        let mut status = lock(&self.status);
        status.end_pass(pause);
        status.failures_in_a_row = 0;
        if let Some(trouble) = trouble {
            status.last_error = Some((Instant::now(), trouble));
        }
        status.turn(State::Waiting);
    }

    /// A pass that lasts has got to where those before it failed.
    pub fn recovered(&self) {
        lock(&self.status).failures_in_a_row = 0;
    }

    /// The pass failed. The next is due after `pause`.
    pub fn failed(&self, why: String, pause: Duration) {
        let mut status = lock(&self.status);
        status.end_pass(Some(pause));
        status.failures_in_a_row += 1;
        status.last_error = Some((Instant::now(), why));
        status.turn(State::Failing);
    }

    /// Another node has the lease.
    pub fn stands_by(&self) {
        let mut status = lock(&self.status);
        status.next_at = None;
        status.turn(State::StandingBy);
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        let name = lock(&self.status).name.clone();
        // Another one of the name may have begun meanwhile.
        if all
            .get(&name)
            .is_some_and(|status| Arc::ptr_eq(status, &self.status))
        {
            all.remove(&name);
        }
    }
}

impl Status {
    fn turn(&mut self, state: State) {
        if self.state != state {
            self.state = state;
            self.since = Instant::now();
        }
    }

    fn end_pass(&mut self, pause: Option<Duration>) {
        let now = Instant::now();
        self.passes += 1;
        self.last_pass = Some((now, now.duration_since(self.since)));
        self.next_at = pause.and_then(|pause| now.checked_add(pause));
    }
}

impl Supervisor {
    /// A place for work of a name to say how it is doing. Duties that [`Supervisor::start`] starts have one.
    #[must_use]
    pub fn report(
        &self,
        name: impl Into<Cow<'static, str>>,
        lease: Option<Cow<'static, str>>,
    ) -> Report {
        let name = name.into();
        let status = Arc::new(Mutex::new(Status {
            name: name.clone(),
            lease,
            state: State::Waiting,
            since: Instant::now(),
            passes: 0,
            failures_in_a_row: 0,
            last_pass: None,
            last_error: None,
            next_at: None,
        }));
        lock(&self.statuses).insert(name, Arc::clone(&status));
        Report {
            status,
            all: Arc::clone(&self.statuses),
        }
    }

    /// How the background work is doing, by name: of this supervisor and all that share its root.
    #[must_use]
    pub fn statuses(&self) -> Vec<Status> {
        let all = lock(&self.statuses);
        all.values().map(|status| lock(status).clone()).collect()
    }
}
