//! The lock task: takes everything requested at a time in one call, and asks again until each lock is acquired or its wait
//! is over.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Error, Holder, Job, Metrics, Reply, Request, WAITERS_MAX};
use crate::domain::name::LockName;
use crate::store::lock::{self as sql, Standing, Take};
use crate::store::{self, Database, Link};
use crate::supervisor::Supervisor;

/// How often those who wait are asked for again, for what other nodes do, and after trouble with the database.
const AGAIN: Duration = Duration::from_millis(500);
/// After a lock's time is up: the database's clock and ours are read a little apart.
const AFTER_EXPIRY: Duration = Duration::from_millis(5);
/// The most requests in one call.
const BATCH_MAX: usize = 1_000;
/// How often rows of free locks are looked for.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// A request that is not answered yet.
struct Asked {
    take: Take,
    until: Instant,
    /// The time to ask next.
    due: Instant,
    reply: Reply<Holder>,
}

pub(super) struct Task {
    supervisor: Supervisor,
    metrics: Metrics,
    link: Link,
    asked: Vec<Asked>,
    releases: Vec<(LockName, i64, Reply<()>)>,
    forget_at: Instant,
}

impl Task {
    pub(super) fn new(database: &Database, supervisor: Supervisor, metrics: Metrics) -> Self {
        Self {
            link: Link::plain(database),
            supervisor,
            metrics,
            asked: Vec::new(),
            releases: Vec::new(),
            forget_at: Instant::now() + FORGET_EVERY,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Job>) {
        // Before the first request needs it: a server may have no more of them then.
        if let Err(error) = self.link.get().await {
            self.told(error, &mut true);
        }
        loop {
            let due = self.asked.iter().map(|asked| asked.due).min();
            let due = due.map_or(self.forget_at, |due| due.min(self.forget_at));
            tokio::select! {
                job = inbox.recv() => match job {
                    Some(job) => self.take_in(job),
                    // Every handle is gone.
                    None => return self.supervisor.stopping().await,
                },
                () = tokio::time::sleep_until(due) => {}
                () = self.supervisor.stopping() => return self.end(inbox),
            }
            let mut taken = 1;
            while taken < BATCH_MAX
                && let Ok(job) = inbox.try_recv()
            {
                self.take_in(job);
                taken += 1;
            }
            self.release().await;
            self.take().await;
            self.forget().await;
            self.metrics.waiters.set(self.asked.len() as i64);
        }
    }

    fn end(self, mut inbox: mpsc::Receiver<Job>) {
        inbox.close();
        for asked in self.asked {
            let _ = asked.reply.send(Err(Error::Stopping));
        }
    }

    fn take_in(&mut self, job: Job) {
        match job {
            Job::Acquire {
                request,
                until,
                reply,
            } if self.asked.len() < WAITERS_MAX => {
                let Request {
                    name,
                    owner,
                    token,
                    ttl,
                    wait,
                } = request;
                self.asked.push(Asked {
                    take: Take {
                        name,
                        owner,
                        token,
                        seconds: ttl.as_secs_f64(),
                        waits: !wait.is_zero(),
                    },
                    until,
                    due: Instant::now(),
                    reply,
                });
            }
            Job::Acquire { reply, .. } => drop(reply.send(Err(Error::TooManyWaiters))),
            Job::Release { name, token, reply } => self.releases.push((name, token, reply)),
        }
    }

    async fn release(&mut self) {
        let releases = std::mem::take(&mut self.releases);
        if releases.is_empty() {
            return;
        }
        let locks: Vec<(LockName, i64)> = releases
            .iter()
            .map(|(name, token, _)| (name.clone(), *token))
            .collect();
        let released = self.write_releases(&locks).await;
        let outcome = match released {
            Ok(names) => {
                let now = Instant::now();
                let names: HashSet<&str> = names.iter().map(String::as_str).collect();
                for asked in &mut self.asked {
                    if names.contains(asked.take.name.as_str()) {
                        asked.due = now;
                    }
                }
                Ok(())
            }
            Err(error) => Err(error),
        };
        for (_, _, reply) in releases {
            let _ = reply.send(outcome.clone());
        }
    }

    /// Asks for the due locks. Requests whose caller has gone are dropped.
    async fn take(&mut self) {
        self.asked.retain(|asked| !asked.reply.is_closed());
        let now = Instant::now();
        let mut pairs = HashSet::new();
        let mut batch = Vec::new();
        for asked in std::mem::take(&mut self.asked) {
            let may_come = batch.len() < BATCH_MAX && asked.due <= now;
            match may_come && pairs.insert((asked.take.name.clone(), asked.take.owner.clone())) {
                true => batch.push(asked),
                false => self.asked.push(asked),
            }
        }
        if batch.is_empty() {
            return;
        }
        let takes: Vec<Take> = batch.iter().map(|asked| asked.take.clone()).collect();
        match self.write_takes(&takes).await {
            Ok(standings) => {
                for (asked, standing) in batch.into_iter().zip(standings) {
                    self.answer(asked, standing);
                }
            }
            Err(error) => {
                for asked in batch {
                    self.wait_or_fail(asked, &error);
                }
            }
        }
    }

    fn answer(&mut self, mut asked: Asked, standing: Standing) {
        let Standing {
            holder,
            ahead,
            clock,
        } = standing;
        let (take, now) = (&asked.take, Instant::now());
        match holder {
            Some(holder)
                if holder.owner == take.owner
                    && take.token.is_none_or(|token| token == holder.token) =>
            {
                if holder.acquired_at == clock {
                    self.metrics.acquired.inc();
                }
                let _ = asked.reply.send(Ok(holder));
            }
            holder => {
                if let Some(token) = take.token {
                    self.metrics.lost.inc();
                    let name = take.name.clone();
                    let _ = asked.reply.send(Err(Error::Lost { name, token }));
                } else if asked.until <= now {
                    let name = take.name.clone();
                    let held = Error::Held {
                        name,
                        holder,
                        ahead,
                    };
                    let _ = asked.reply.send(Err(held));
                } else {
                    let left = holder.map(|holder| (holder.expires_at - clock).to_std());
                    let left = left.map_or(AGAIN, |left| left.unwrap_or_default() + AFTER_EXPIRY);
                    asked.due = (now + left.min(AGAIN)).min(asked.until);
                    self.asked.push(asked);
                }
            }
        }
    }

    /// Requests with time left wait until the database is back: the repeat finds the effect of the first request.
    fn wait_or_fail(&mut self, mut asked: Asked, error: &Error) {
        let now = Instant::now();
        if asked.until <= now
            || matches!(error, Error::Store(error) if error.retry() == store::Retry::Never)
        {
            let _ = asked.reply.send(Err(error.clone()));
        } else {
            asked.due = (now + AGAIN).min(asked.until);
            self.asked.push(asked);
        }
    }

    async fn forget(&mut self) {
        let now = Instant::now();
        if now < self.forget_at {
            return;
        }
        self.forget_at = now + FORGET_EVERY;
        // A node that nobody asks for locks need not look.
        if let Some(connection) = self.link.existing()
            && let Err(error) = sql::forget(connection).await
        {
            self.told(error, &mut true);
        }
    }

    async fn write_takes(&mut self, takes: &[Take]) -> Result<Vec<Standing>, Error> {
        let mut is_repeat = !self.link.is_up();
        loop {
            let taken = match self.link.get().await {
                Ok(connection) => sql::take(connection, takes).await,
                Err(error) => Err(error),
            };
            match taken {
                Ok(standings) => return Ok(standings),
                Err(error) => {
                    if let Some(error) = self.told(error, &mut is_repeat) {
                        return Err(error);
                    }
                }
            }
        }
    }

    async fn write_releases(&mut self, locks: &[(LockName, i64)]) -> Result<Vec<String>, Error> {
        let mut is_repeat = !self.link.is_up();
        loop {
            let released = match self.link.get().await {
                Ok(connection) => sql::release(connection, locks).await,
                Err(error) => Err(error),
            };
            match released {
                Ok(names) => return Ok(names),
                Err(error) => {
                    if let Some(error) = self.told(error, &mut is_repeat) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// The error to report for a failed statement. None to repeat it at once: the connection was lost, perhaps long ago, and every
    /// statement here may be repeated.
    fn told(&mut self, error: store::Error, is_repeat: &mut bool) -> Option<Error> {
        let is_spent = error.is_connection_spent();
        self.link.heed(&error);
        if is_spent && !std::mem::replace(is_repeat, true) {
            return None;
        }
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "locks could not be served"
        );
        Some(error.into())
    }
}
