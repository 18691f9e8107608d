//! The one place that spawns tasks. A task that ends before it was told to stops the process, since a broker with a
//! missing part would look healthy and deliver nothing.

mod backoff;
mod desk;
mod duty;
mod report;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use backoff::Backoff;
pub use desk::{Closed, Desk, Work};
pub use duty::{Duty, Lease, Next, Routine};
use report::Statuses;
pub use report::{Report, State, Status};

/// Spawns the tasks of one part of the process and ends them together.
#[derive(Debug, Clone)]
pub struct Supervisor {
    tracker: TaskTracker,
    stop: CancellationToken,
    failed: CancellationToken,
    running: Arc<Mutex<Names>>,
    statuses: Statuses,
}

/// The names of tasks that run, and how many of each: there may be 10,000 connections beside 10,000 queues.
type Names = HashMap<Cow<'static, str>, usize>;

/// Takes a task's name off the list of those that run, however the task ends.
struct Running {
    name: Cow<'static, str>,
    list: Arc<Mutex<Names>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut list = lock(&self.list);
        if let Some(count) = list.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                list.remove(&self.name);
            }
        }
    }
}

fn lock(list: &Mutex<Names>) -> std::sync::MutexGuard<'_, Names> {
    list.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Each name as often as a task of it runs.
fn list(names: &Names) -> Vec<String> {
    let each = names.iter();
    each.flat_map(|(name, &count)| std::iter::repeat_n(name.to_string(), count))
        .collect()
}

/// The process's reaction when a task ends before it was told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnEnd {
    /// The part cannot be missing: stop the process.
    StopProcess,
    /// The task serves one client or one request: its end is ordinary.
    Ordinary,
}

impl Supervisor {
    /// A supervisor at the root of a process (or of a test's broker).
    #[must_use]
    pub fn new() -> Self {
        Self {
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
            failed: CancellationToken::new(),
            running: Arc::default(),
            statuses: Arc::default(),
        }
    }

    /// A supervisor whose tasks stop when this one's do, and that can be stopped and waited for alone.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            tracker: TaskTracker::new(),
            stop: self.stop.child_token(),
            failed: self.failed.clone(),
            running: Arc::clone(&self.running),
            statuses: Arc::clone(&self.statuses),
        }
    }

    /// Spawns a task. It is never aborted: it watches [`Supervisor::stopping`] and finishes its write first.
    pub fn spawn<F>(&self, name: impl Into<Cow<'static, str>>, on_end: OnEnd, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let name = name.into();
        let running = Running {
            name: name.clone(),
            list: Arc::clone(&self.running),
        };
        *lock(&self.running).entry(name.clone()).or_default() += 1;
        // Moved into the task below as it is, a future would have its place there twice.
        let task = Box::pin(task);
        let stop = self.stop.clone();
        let failed = self.failed.clone();
        self.tracker.spawn(async move {
            let running = running;
            // A panic must not pass for an ordinary end: the guard reports it while the stack unwinds.
            let guard = failed.clone().drop_guard();
            task.await;
            let _ = guard.disarm();
            if on_end == OnEnd::StopProcess && !stop.is_cancelled() {
                tracing::error!(
                    task = %running.name,
                    "a task ended unexpectedly; stopping the process"
                );
                failed.cancel();
            }
        });
    }

    /// Starts a thread with a stack of this many bytes, for work that would hold up tasks. Like a task it is waited for at the stop;
    /// the one that gives it work must tell it to end. A thread that cannot be started stops the process.
    pub fn spawn_thread(
        &self,
        name: &'static str,
        stack_bytes: usize,
        work: impl FnOnce() + Send + 'static,
    ) {
        let running = Running {
            name: name.into(),
            list: Arc::clone(&self.running),
        };
        *lock(&self.running).entry(name.into()).or_default() += 1;
        let token = self.tracker.token();
        let guard = self.failed.clone().drop_guard();
        let stop = self.stop.clone();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(stack_bytes);
        let started = thread.spawn(move || {
            let (_running, _token) = (running, token);
            work();
            if stop.is_cancelled() {
                let _ = guard.disarm();
            } else {
                tracing::error!(
                    thread = name,
                    "a thread ended unexpectedly; stopping the process"
                );
            }
        });
        if let Err(error) = started {
            tracing::error!(thread = name, error = %error, "a thread cannot be started; stopping the process");
            self.failed.cancel();
        }
    }

    /// Resolves when the tasks are told to stop. Cancel-safe.
    pub async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// Whether the tasks were told to stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// The names of the tasks that run now, of this supervisor and all that share its root.
    #[must_use]
    pub fn running(&self) -> Vec<String> {
        list(&lock(&self.running))
    }

    /// Resolves when some task panicked or ended early: the process must stop. Cancel-safe.
    pub async fn failed(&self) {
        self.failed.cancelled().await;
    }

    /// Tells the tasks to stop and waits for them.
    ///
    /// # Errors
    /// The names of the tasks still running after `deadline`; they are left running.
    pub async fn stop(&self, deadline: Duration) -> Result<(), Vec<String>> {
        self.stop.cancel();
        self.tracker.close();
        match tokio::time::timeout(deadline, self.tracker.wait()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(list(&lock(&self.running))),
        }
    }
}

impl Default for Supervisor {
    fn default() -> Self {
        Self::new()
    }
}

/// Starts a thread that lasts as long as the process: for what must go on when the runtime does not. It must need nothing at the end.
///
/// # Errors
/// The system has no room for another.
pub fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder.spawn(work).map(|_| ())
}

/// Does work that would hold up the tasks of a thread, on a thread for what blocks. What it begins it ends, also when nobody waits for it
/// any more. A panic is the caller's.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work)
        .await
        .map_err(tokio::task::JoinError::try_into_panic)
    {
        Ok(done) => done,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime ends, and this with it.
        Err(Err(_)) => std::future::pending().await,
    }
}

/// Waits. Tokio's timer counts whole milliseconds and rounds up, so a time below one is slept on a thread for what blocks: nothing is
/// lost with it at the stop.
pub async fn pause(time: Duration) {
    if time >= Duration::from_millis(1) {
        return tokio::time::sleep(time).await;
    }
    #[expect(clippy::disallowed_methods, reason = "the thread is there for it")]
    let sleep = move || std::thread::sleep(time);
    let _ = tokio::task::spawn_blocking(sleep).await;
}
