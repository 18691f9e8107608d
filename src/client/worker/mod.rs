//! The loop around a handler: receive, handle, settle, until told to stop.
//!
//! A fixed number of tasks handle deliveries, and a few more deliveries are held ready. The worker extends each delivery it
//! holds whenever a third of its time has passed, so a slow handler keeps its message; a handler whose message was lost
//! nevertheless is told so. Finished deliveries are acknowledged with the next receive, or at once when none is about to
//! begin. The worker waits for a broker that is unreachable. To stop, it receives no more, finishes within the grace, gives
//! back what it has not begun, and settles everything.

mod hold;
mod run;

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::error::Error;
use super::queue::{Delivery, Queue};
use super::verbs::{Refused, Settled};
use crate::domain::chain;

/// A delivery, as its handler gets it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Job {
    /// The delivery.
    pub delivery: Delivery,
    /// Cancelled when the delivery is lost: it expired and went to somebody else, or a person settled it. What the
    /// handler still does is done twice, or in vain.
    pub lost: CancellationToken,
}

impl Deref for Job {
    type Target = Delivery;

    fn deref(&self) -> &Delivery {
        &self.delivery
    }
}

/// How a handler ended well.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Done {
    /// It is acknowledged.
    Handled,
    /// It goes back, not before this long; the attempt does not count.
    NotNow(Duration),
}

impl From<()> for Done {
    fn from((): ()) -> Self {
        Self::Handled
    }
}

/// How a handler failed. Every error is one, by `?`, to be tried again as the queue's retry policy says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    reason: String,
    delay: Option<Duration>,
    is_final: bool,
}

impl Failure {
    /// It is tried again later, by the queue's retry policy, or becomes a dead letter after its last attempt.
    #[must_use]
    pub fn retry(reason: impl fmt::Display) -> Self {
        Self {
            reason: reason.to_string(),
            delay: None,
            is_final: false,
        }
    }

    /// It can never succeed, and becomes a dead letter at once.
    #[must_use]
    pub fn reject(reason: impl fmt::Display) -> Self {
        Self {
            is_final: true,
            ..Self::retry(reason)
        }
    }

    /// Tried again not before so long, whatever the policy says.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::retry(chain(&error))
    }
}

/// The result of one delivery, as [`Worker::observe`] receives it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Ended {
    /// Its place in the stream.
    pub offset: i64,
    /// Its number.
    pub delivery: u32,
    /// Its attempt.
    pub attempt: u32,
    /// The id of its event.
    pub event_id: String,
    /// The broker's result, or its refusal.
    pub outcome: Result<Settled, Refused>,
}

/// A worker's results, as the broker confirmed them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Handled and acknowledged.
    pub acked: u64,
    /// Failed, to be tried again or dead.
    pub nacked: u64,
    /// Rejected for good.
    pub rejected: u64,
    /// Given back: not now, or not begun at the stop.
    pub released: u64,
    /// Handlers that panicked; they are among those that failed.
    pub panicked: u64,
    /// Lost while they were held: another consumer has them, or had them.
    pub lost: u64,
    /// Outcomes that the broker refused: handled too late, among others.
    pub refused: u64,
}

#[derive(Clone)]
struct Settings {
    concurrency: usize,
    prefetch: usize,
    visibility_timeout: Duration,
    wait: Duration,
    batch_wait: Duration,
    grace: Duration,
    consumer: Option<String>,
    is_in_order: bool,
    observer: Option<Arc<dyn Fn(&Ended) + Send + Sync>>,
}

/// Handles a queue's messages. See the [module above](super) for an example.
#[derive(Clone)]
pub struct Worker {
    queue: Queue,
    settings: Settings,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Worker");
        debug.field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Worker {
    /// A worker that handles one message at a time and holds one more ready.
    #[must_use]
    pub fn new(queue: Queue) -> Self {
        Self {
            queue,
            settings: Settings {
                concurrency: 1,
                prefetch: 1,
                visibility_timeout: Duration::from_secs(30),
                wait: Duration::from_secs(20),
                batch_wait: Duration::ZERO,
                grace: Duration::from_secs(20),
                consumer: None,
                is_in_order: false,
                observer: None,
            },
        }
    }

    /// Handles this many messages at a time, at least one, and holds as many more ready, unless
    /// [`Worker::prefetch`] says otherwise.
    #[must_use]
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.settings.concurrency = handlers.max(1);
        self.settings.prefetch = self.settings.concurrency;
        self
    }

    /// Holds this many messages ready beyond those being handled. 0 is best for long work.
    #[must_use]
    pub fn prefetch(mut self, messages: usize) -> Self {
        self.settings.prefetch = messages;
        self
    }

    /// Holds messages for so long at a time, 1 s to 12 h: how soon another consumer gets them when this one dies. Held
    /// longer than a third of it, they are extended; so it need not be longer than the work takes. 30 s without.
    #[must_use]
    pub fn visibility_timeout(mut self, timeout: Duration) -> Self {
        self.settings.visibility_timeout = timeout;
        self
    }

    /// How long a receive waits for a message, at most 50 s; 20 s without.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.settings.wait = wait;
        self
    }

    /// How long a receive waits for its batch to fill, at most 5 s; it does not without.
    #[must_use]
    pub fn batch_wait(mut self, wait: Duration) -> Self {
        self.settings.batch_wait = wait;
        self
    }

    /// How long handlers may go on after the stop. Those that do not end by then are dropped, and their messages tried
    /// again. 20 s without.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// The name in the list of live deliveries.
    #[must_use]
    pub fn consumer(mut self, name: impl Into<String>) -> Self {
        self.settings.consumer = Some(name.into());
        self
    }

    /// Handles messages of one key one after another, and gives the later ones back when one fails: for queues that hand
    /// out several messages of a key at a time (`key_batches`).
    #[must_use]
    pub fn in_order(mut self) -> Self {
        self.settings.is_in_order = true;
        self
    }

    /// Tells what became of each delivery, once the broker has said so. Called by the worker's own task: return soon.
    #[must_use]
    pub fn observe(mut self, observer: impl Fn(&Ended) + Send + Sync + 'static) -> Self {
        self.settings.observer = Some(Arc::new(observer));
        self
    }

    /// Handles messages until `stop`, then finishes in order. Each handler is a separate task; one that panics has failed.
    /// Dropping the future drops the handlers: their messages come again after the visibility timeout.
    ///
    /// # Errors
    /// A call that no repeat can help: there is no such queue, or a setting is out of its range. Or the broker was unreachable at
    /// the end, beyond the grace and a call's deadline: the work done since then is not acknowledged.
    pub async fn run<H, F, D>(self, stop: CancellationToken, handler: H) -> Result<Report, Error>
    where
        H: Fn(Job) -> F + Send + Sync + 'static,
        F: Future<Output = Result<D, Failure>> + Send + 'static,
        D: Into<Done> + 'static,
    {
        let handler = Arc::new(handler);
        let start = move |job| {
            let handler = Arc::clone(&handler);
            let task: run::Handling = Box::pin(async move { handler(job).await.map(Into::into) });
            task
        };
        run::Run::new(self.queue, self.settings, Box::new(start))
            .until(stop)
            .await
    }
}
