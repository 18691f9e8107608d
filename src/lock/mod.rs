//! Locks for users: leases by name, each with a fencing token that only ever rises, and a waiting line.
//!
//! A lock is a row; the database judges its times, and any node serves any lock. The task takes all requested locks in one
//! commit, and asks again for those that wait: when a lock was released here, when a lock's time is up, and twice a second
//! for what other nodes do. Lists for people are read beside it. The line is in the database too: a waiter keeps its place
//! for five seconds after it last asked, even when its long poll or its node ends.
//!
//! Every request may be repeated: an owner that asks again gets the lock that it has, under the same token.

mod lists;
mod task;

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::domain::name::LockName;
use crate::store::{self, Database};
use crate::supervisor::{OnEnd, Supervisor};

use lists::List;

pub use crate::store::lock::{Described, Holder, Waiter};

/// The most requests that wait on a node.
pub const WAITERS_MAX: usize = 10_000;
/// Jobs on their way to the task.
const JOBS_MAX: usize = 1_000;

/// A request for a lock.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The lock's name.
    pub name: LockName,
    /// For whom: no two that could hold the lock at a time may have the same.
    pub owner: String,
    /// Renew the lock that is held under this token, and take no other.
    pub token: Option<i64>,
    /// The time to hold it, from the moment it is given, by the database's clock.
    pub ttl: Duration,
    /// How long to wait in line for it.
    pub wait: Duration,
}

/// Reasons why a lock could not be acquired.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Another has it, or comes before.
    #[error("{}", held(name, holder.as_ref(), *ahead))]
    Held {
        /// The lock's name.
        name: LockName,
        /// The holder; None when others are only ahead in line.
        holder: Option<Holder>,
        /// How many come before.
        ahead: u64,
    },
    /// It is no longer held under this token: its time was up, and another owner has had it since.
    #[error("the lock `{name}` is no longer held under token {token}")]
    Lost {
        /// The lock's name.
        name: LockName,
        /// The token that was held.
        token: i64,
    },
    /// Nobody has it, and nobody had it in the last day.
    #[error("nobody holds the lock `{name}`, and nobody has held it in the last day")]
    NotFound {
        /// The lock's name.
        name: LockName,
    },
    /// As many wait on this node as may.
    #[error("{WAITERS_MAX} requests for locks already wait on this node, which is the limit")]
    TooManyWaiters,
    /// The outcome of the request is unknown. A repeat is safe.
    #[error("it is unknown whether the request was carried out; repeating it is safe")]
    OutcomeUnknown,
    /// The task has ended.
    #[error("the broker is stopping")]
    Stopping,
    /// The database could not do it.
    #[error("the database could not be used")]
    Store(#[source] Arc<store::Error>),
}

fn held(name: &LockName, holder: Option<&Holder>, ahead: u64) -> String {
    match holder {
        Some(holder) => format!(
            "the lock `{name}` is held by `{}`, and {ahead} others are ahead in line",
            holder.owner
        ),
        None => format!("the lock `{name}` is free, and {ahead} others are ahead in line"),
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error.is_connection_lost() {
            true => Self::OutcomeUnknown,
            false => Self::Store(Arc::new(error)),
        }
    }
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

#[derive(Debug)]
enum Job {
    Acquire {
        request: Request,
        until: Instant,
        reply: Reply<Holder>,
    },
    Release {
        name: LockName,
        token: i64,
        reply: Reply<()>,
    },
}

/// The locks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    jobs: mpsc::Sender<Job>,
    lists: mpsc::Sender<List>,
}

#[derive(Debug, Clone, Default)]
struct Metrics {
    waiters: Gauge,
    acquired: Counter,
    lost: Counter,
}

/// Starts the task that takes locks.
#[must_use]
pub fn start(database: Database, supervisor: &Supervisor, registry: &mut Registry) -> Handle {
    let metrics = Metrics::default();
    registry.register(
        "postroad_lock_waiters",
        "Requests for locks that wait on this node",
        metrics.waiters.clone(),
    );
    registry.register(
        "postroad_locks_acquired",
        "Locks that this node gave out, renewals aside",
        metrics.acquired.clone(),
    );
    registry.register(
        "postroad_lock_renewals_lost",
        "Renewals that came after another owner had the lock",
        metrics.lost.clone(),
    );
    let (jobs, inbox) = mpsc::channel(JOBS_MAX);
    let (lists, asked) = mpsc::channel(JOBS_MAX);
    let reading = lists::run(database.clone(), supervisor.clone(), asked);
    supervisor.spawn("lock lists", OnEnd::StopProcess, reading);
    let task = task::Task::new(&database, supervisor.clone(), metrics);
    supervisor.spawn("locks", OnEnd::StopProcess, task.run(inbox));
    Handle { jobs, lists }
}

impl Handle {
    /// Acquires a lock, or renews it. The caller counts the time from before it asked.
    ///
    /// # Errors
    /// [`Error::Held`] after the wait, [`Error::Lost`] for a renewal that comes too late, [`Error::TooManyWaiters`], or the
    /// database's.
    pub async fn acquire(&self, request: Request) -> Result<Holder, Error> {
        let until = Instant::now() + request.wait;
        self.ask(|reply| Job::Acquire {
            request,
            until,
            reply,
        })
        .await
    }

    /// Gives a lock back. It is no error if the lock is no longer held under the token.
    ///
    /// # Errors
    /// The database's.
    pub async fn release(&self, name: LockName, token: i64) -> Result<(), Error> {
        self.ask(|reply| Job::Release { name, token, reply }).await
    }

    /// A lock, who holds it, and who waits.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn describe(&self, name: &LockName) -> Result<Described, Error> {
        let one = Some(name.clone());
        let mut found = self.read(one, None, 1).await?;
        found
            .pop()
            .ok_or_else(|| Error::NotFound { name: name.clone() })
    }

    /// Locks that are held, by name, after a name.
    ///
    /// # Errors
    /// The database's.
    pub async fn list(&self, after: Option<LockName>, limit: i64) -> Result<Vec<Described>, Error> {
        self.read(None, after, limit).await
    }

    async fn read(
        &self,
        one: Option<LockName>,
        after: Option<LockName>,
        limit: i64,
    ) -> Result<Vec<Described>, Error> {
        let (reply, answer) = oneshot::channel();
        let list = List {
            one,
            after,
            limit,
            reply,
        };
        self.lists.send(list).await.map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)?
    }

    async fn ask<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.jobs.send(job(reply)).await;
        sent.map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)?
    }
}
