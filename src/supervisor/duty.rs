//! The shape of background work: passes, and pauses between them.
//!
//! A pass is bounded, and harmless if it is done again: the next one is the retry. It takes no input. What it is told, by a
//! wake-up, is only that it is worth looking. The loop here waits for a wake-up, the tick, the lease or the stop; it never drops a
//! pass halfway.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::{Backoff, OnEnd, Report, Supervisor};
use crate::domain::chain;
use crate::domain::id::Fence;

/// The pause after a pass that failed, unless the routine has another.
const AGAIN: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));

/// One piece of background work.
pub trait Duty: Send + 'static {
    /// Why a pass failed.
    type Error: Error + Send;

    /// Does what there is to do, and says when there may be more.
    fn pass(&mut self) -> impl Future<Output = Result<Next, Self::Error>> + Send;

    /// A pass failed: drops what may be stale, counts, and tells the log.
    fn failed(&mut self, error: &Self::Error);

    /// Trouble of a part of the last pass that ended nothing else, such as that of one stream: for the status.
    fn trouble(&mut self) -> Option<String> {
        None
    }

    /// Another node has the lease, looked at each tick.
    fn stands_by(&mut self) {}

    /// The stop, after the last pass.
    fn end(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// When the next pass is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// There is more to do.
    AtOnce,
    /// At the routine's tick, or when woken.
    Tick,
    /// After this, or when woken.
    Within(Duration),
    /// When woken, but not before this.
    Woken(Duration),
}

/// How a duty runs: its name, and what it waits for.
#[derive(Debug)]
pub struct Routine {
    name: Cow<'static, str>,
    tick: Duration,
    wake: Option<Arc<Notify>>,
    lease: Option<Lease>,
    backoff: Backoff,
}

impl Routine {
    /// A pass each tick.
    #[must_use]
    pub fn every(tick: Duration, name: impl Into<Cow<'static, str>>) -> Self {
        Self {
            name: name.into(),
            tick,
            wake: None,
            lease: None,
            backoff: AGAIN,
        }
    }

    /// And one whenever this is notified.
    #[must_use]
    pub fn woken_by(mut self, wake: &Arc<Notify>) -> Self {
        self.wake = Some(Arc::clone(wake));
        self
    }

    /// While this node holds the lease only.
    #[must_use]
    pub fn under(mut self, lease: Lease) -> Self {
        self.lease = Some(lease);
        self
    }

    /// With these pauses after passes that fail. No wake-up shortens them.
    #[must_use]
    pub fn backing_off(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }
}

/// The lease that a duty runs under.
pub struct Lease {
    name: Cow<'static, str>,
    fence: watch::Receiver<Option<Fence>>,
    /// Says that nothing is under way any more.
    give_back: Option<Box<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Lease {
    /// A lease that is held while `fence` shows one. When it shows none, `give_back` is called as soon as no pass is under way.
    #[must_use]
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        fence: watch::Receiver<Option<Fence>>,
        give_back: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            fence,
            give_back: Some(Box::new(give_back)),
        }
    }

    /// The same, for another duty: its passes may go on after the lease was given back.
    #[must_use]
    pub fn beside(&self) -> Self {
        Self {
            name: self.name.clone(),
            fence: self.fence.clone(),
            give_back: None,
        }
    }

    fn is_held(&mut self) -> bool {
        self.fence.borrow_and_update().is_some()
    }

    fn give_back(&self) {
        if let Some(give_back) = &self.give_back {
            give_back();
        }
    }
}

/// Resolves when the lease comes or goes. Cancel-safe.
async fn changed(lease: &mut Option<Lease>) {
    if let Some(lease) = lease
        && lease.fence.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Resolves when woken. Cancel-safe.
async fn woken(wake: Option<&Notify>) {
    match wake {
        Some(wake) => wake.notified().await,
        None => std::future::pending().await,
    }
}

/// Resolves after this, or never. Cancel-safe.
async fn over(pause: Option<Duration>) {
    match pause {
        Some(pause) => tokio::time::sleep(pause).await,
        None => std::future::pending().await,
    }
}

/// The pause before a pass: nothing but the lease ends the first part early, a wake-up ends the second.
#[derive(Debug, Clone, Copy)]
struct Pause {
    surely: Duration,
    further: Option<Duration>,
}

impl Pause {
    const fn new(next: Next, tick: Duration) -> Self {
        let (surely, further) = match next {
            Next::AtOnce => (Duration::ZERO, Some(Duration::ZERO)),
            Next::Tick => (Duration::ZERO, Some(tick)),
            Next::Within(pause) => (Duration::ZERO, Some(pause)),
            Next::Woken(pause) => (pause, None),
        };
        Self { surely, further }
    }

    const fn after_failure(pause: Duration) -> Self {
        Self {
            surely: pause,
            further: Some(Duration::ZERO),
        }
    }

    /// How long it takes if nobody wakes the duty.
    fn longest(self) -> Option<Duration> {
        self.further.map(|further| self.surely + further)
    }
}

impl Routine {
    async fn wait(&mut self, pause: Pause, supervisor: &Supervisor) {
        if !pause.surely.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(pause.surely) => {}
                () = changed(&mut self.lease) => return,
                () = supervisor.stopping() => return,
            }
        }
        if pause.further == Some(Duration::ZERO) {
            return;
        }
        tokio::select! {
            () = over(pause.further) => {}
            () = woken(self.wake.as_deref()) => {}
            () = changed(&mut self.lease) => {}
            () = supervisor.stopping() => {}
        }
    }

    async fn run(mut self, mut duty: impl Duty, supervisor: Supervisor, report: Report) {
        while !supervisor.is_stopping() {
            let is_held = self.lease.as_mut().is_none_or(Lease::is_held);
            let pause = if is_held {
                report.begins();
                match duty.pass().await {
                    Ok(next) => {
                        self.backoff.reset();
                        let pause = Pause::new(next, self.tick);
                        report.passed(pause.longest(), duty.trouble());
                        pause
                    }
                    Err(error) => {
                        duty.failed(&error);
                        let pause = self.backoff.next_pause();
                        report.failed(chain(&error), pause);
                        Pause::after_failure(pause)
                    }
                }
            } else {
                duty.stands_by();
                if let Some(lease) = &self.lease {
                    lease.give_back();
                }
                report.stands_by();
                Pause::new(Next::Within(self.tick), self.tick)
            };
            self.wait(pause, &supervisor).await;
        }
        duty.end().await;
    }
}

impl Supervisor {
    /// Starts a duty. It ends with the stop, after its pass.
    pub fn start(&self, routine: Routine, duty: impl Duty) {
        let lease = routine.lease.as_ref().map(|lease| lease.name.clone());
        let report = self.report(routine.name.clone(), lease);
        let name = routine.name.clone();
        let run = routine.run(duty, self.clone(), report);
        self.spawn(name, OnEnd::StopProcess, run);
    }
}
