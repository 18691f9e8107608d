//! The one place that spawns tasks. A task that ends before it was told to stops the process, since a broker with a
//! missing part would look healthy and deliver nothing.

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Spawns the tasks of one part of the process and ends them together.
#[derive(Debug, Clone)]
pub struct Supervisor {
    tracker: TaskTracker,
    stop: CancellationToken,
    failed: CancellationToken,
    running: Arc<Mutex<Vec<String>>>,
}

/// Takes a task's name off the list of those that run, however the task ends.
struct Running {
    name: String,
    list: Arc<Mutex<Vec<String>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut list = lock(&self.list);
        if let Some(place) = list.iter().position(|name| *name == self.name) {
            list.swap_remove(place);
        }
    }
}

fn lock(list: &Mutex<Vec<String>>) -> std::sync::MutexGuard<'_, Vec<String>> {
    list.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What the process does when a task ends before it was told to.
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
        }
    }

    /// Spawns a task. It is never aborted: it watches [`Supervisor::stopping`] and finishes its write first.
    pub fn spawn<F>(&self, name: impl Into<String>, on_end: OnEnd, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let name = name.into();
        let running = Running {
            name: name.clone(),
            list: Arc::clone(&self.running),
        };
        lock(&self.running).push(name.clone());
        let stop = self.stop.clone();
        let failed = self.failed.clone();
        self.tracker.spawn(async move {
            let _running = running;
            // A panic must not pass for an ordinary end: the guard reports it while the stack unwinds.
            let guard = failed.clone().drop_guard();
            task.await;
            let _ = guard.disarm();
            if on_end == OnEnd::StopProcess && !stop.is_cancelled() {
                tracing::error!(
                    task = name,
                    "a task ended before it was told to; stopping the process"
                );
                failed.cancel();
            }
        });
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
        lock(&self.running).clone()
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
            Err(_) => Err(lock(&self.running).clone()),
        }
    }
}

impl Default for Supervisor {
    fn default() -> Self {
        Self::new()
    }
}
