//! A desk: one task that does what callers ask for, one after the other, with what it alone has.
//!
//! A caller who goes away leaves nothing half done: the work goes on without it. So a connection may be used here, which a
//! dropped future would leave inside a statement.

use std::borrow::Cow;
use std::fmt;
use std::pin::Pin;

use tokio::sync::{mpsc, oneshot};

use super::{OnEnd, Supervisor};

/// Work at a desk, on its way.
pub type Work<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

type Job<S> = Box<dyn for<'a> FnOnce(&'a mut S) -> Work<'a, ()> + Send>;

/// The desk was told to stop: the work is not done, or its outcome is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// The way to a desk that has an `S`. Cheap to clone.
pub struct Desk<S> {
    jobs: mpsc::Sender<Job<S>>,
}

impl<S> Clone for Desk<S> {
    fn clone(&self) -> Self {
        Self {
            jobs: self.jobs.clone(),
        }
    }
}

impl<S> fmt::Debug for Desk<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

impl<S: Send + 'static> Desk<S> {
    /// Opens a desk. At most `waiting_max` callers wait in line; further ones wait to be let in.
    #[must_use]
    pub fn open(
        supervisor: &Supervisor,
        name: impl Into<Cow<'static, str>>,
        waiting_max: usize,
        has: S,
    ) -> Self {
        let (sender, jobs) = mpsc::channel(waiting_max);
        let run = run(supervisor.clone(), jobs, has);
        supervisor.spawn(name, OnEnd::StopProcess, run);
        Self { jobs: sender }
    }

    /// Has something done, and waits for it.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn ask<T: Send + 'static>(
        &self,
        work: impl for<'a> FnOnce(&'a mut S) -> Work<'a, T> + Send + 'static,
    ) -> Result<T, Closed> {
        let (reply, answer) = oneshot::channel();
        let job: Job<S> = Box::new(move |has| {
            Box::pin(async move {
                // A caller that went away does not read the answer.
                let _ = reply.send(work(has).await);
            })
        });
        self.jobs.send(job).await.map_err(|_| Closed)?;
        answer.await.map_err(|_| Closed)
    }
}

async fn run<S>(supervisor: Supervisor, mut jobs: mpsc::Receiver<Job<S>>, mut has: S) {
    loop {
        let job = tokio::select! {
            job = jobs.recv() => job,
            () = supervisor.stopping() => None,
        };
        match job {
            Some(job) => job(&mut has).await,
            // Told to stop, or every way to it is gone: then there is nothing to do until the stop.
            None => return supervisor.stopping().await,
        }
    }
}
