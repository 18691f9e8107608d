//! The duty that publishes due messages.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::mpsc;

use super::recurring::{Acceptance, Recurring};
use crate::cluster;
use crate::domain::chain;
use crate::domain::id::{Offset, StreamId};
use crate::failpoint;
use crate::store::stream::{self as sql, NextScheduled, PublishedScheduled};
use crate::store::{self, Connection, Link, Retry};
use crate::stream::handle::State;
use crate::supervisor::{Backoff, Duty, Lease, Next, Routine, Supervisor};

/// The lease of the node that publishes.
pub(in crate::stream) const LEASE: &str = "duty/scheduled";
/// How often what other nodes accepted is looked for.
const POLL: Duration = Duration::from_secs(1);
/// A stream that failed is tried again after so long: while its log is locked each try keeps all others waiting.
const RETRY: Duration = Duration::from_secs(1);
/// How far ahead of the clock is looked.
const AHEAD: Duration = Duration::from_secs(60);
/// The most messages in one commit: other appends to the stream wait for it.
const BATCH_MESSAGES: i32 = 2_000;
/// The most bytes of payload in one commit, but always one message.
const BATCH_BYTES: i64 = 4 << 20;
/// How far ahead of a publication its leaf is made.
const FILE_AHEAD: TimeDelta = TimeDelta::minutes(10);

pub(in crate::stream) struct Publisher {
    pub(in crate::stream) link: Link,
    pub(in crate::stream) cluster: cluster::Handle,
    pub(in crate::stream) state: Arc<State>,
    pub(in crate::stream) supervisor: Supervisor,
    /// The tail passes on published messages, from the log.
    pub(in crate::stream) tail: mpsc::Sender<(StreamId, Offset)>,
    pub(in crate::stream) acceptance: Acceptance,
    pub(in crate::stream) known: Knows,
    /// Of one stream.
    pub(in crate::stream) trouble: Option<String>,
}

/// The duty's memory between passes. All of it can be forgotten at any time.
#[derive(Debug, Default)]
pub(in crate::stream) struct Knows {
    /// The time until when publications can be filed, as far as known, and since when.
    filed: Option<(DateTime<Utc>, DateTime<Utc>)>,
    /// By stream: the last offset known, and up to where its log has leaves.
    ends: HashMap<StreamId, (Offset, Offset)>,
    /// Streams that failed, and until when they are left alone.
    failed: HashMap<StreamId, Instant>,
    recurring: Recurring,
}

impl Duty for Publisher {
    type Error = store::Error;

    /// Publishes one batch of each stream that has something due.
    async fn pass(&mut self) -> Result<Next, store::Error> {
        let mut connection = self.link.lend().await?;
        // What is accepted from here on says so itself.
        let has_changed = {
            let mut known = self.state.schedule.known();
            known.next = None;
            std::mem::take(&mut known.has_changed)
        };
        let recurring = &mut self.known.recurring;
        let until_occurrence = recurring
            .pass(
                &mut connection,
                has_changed,
                (&self.acceptance, self.state.as_ref()),
            )
            .await?;
        let next = sql::next_scheduled(&mut connection, AHEAD, self.state.witness.now()).await?;
        let mut pause = POLL.min(until_occurrence);
        for one in &next {
            if !self.note_next(one) {
                // Its first: it is counted at once, and has leaves made.
                self.state.schedule.count.notify_one();
            }
            let Some(due_at) = one.due_at else { continue };
            if due_at > one.clock {
                pause = pause.min((due_at - one.clock).to_std().unwrap_or_default());
                continue;
            }
            let again_at = self.known.failed.get(&one.stream);
            if again_at.is_some_and(|&at| Instant::now() < at) {
                continue;
            }
            self.known.failed.remove(&one.stream);
            let publishing = self.publish(&mut connection, one);
            match publishing.await {
                Ok(true) => pause = Duration::ZERO,
                Ok(false) => {}
                // A refusal of one stream, or a lock on its log, is in no other's way.
                Err(error) if is_of_stream(&error) => {
                    self.note_failure(&error);
                    let again_at = Instant::now() + RETRY;
                    self.known.failed.insert(one.stream, again_at);
                }
                Err(error) => return Err(error),
            }
        }
        self.link.keep(connection);
        if !pause.is_zero() {
            let at = self.cluster.now() + pause;
            self.state.schedule.known().next = Some(at);
        }
        Ok(Next::Within(pause))
    }

    fn failed(&mut self, error: &store::Error) {
        self.note_failure(error);
        self.known = Knows::default();
    }

    fn trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    fn stands_by(&mut self) {
        self.state.schedule.forget();
    }
}

impl Publisher {
    pub(in crate::stream) fn start(self, lease: Lease) {
        let routine = Routine::every(POLL, "stream schedule")
            .woken_by(&self.state.schedule.wake)
            .under(lease)
            .backing_off(Backoff::constant(POLL));
        self.supervisor.clone().start(routine, self);
    }

    fn note_failure(&mut self, error: &store::Error) {
        self.trouble = Some(chain(error));
        self.state.metrics.scheduled_failures.inc();
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "publishing scheduled messages failed"
        );
    }

    /// Publishes a batch. Whether there may be more.
    async fn publish(
        &mut self,
        connection: &mut Connection,
        next: &NextScheduled,
    ) -> Result<bool, store::Error> {
        let stream = next.stream;
        self.file(connection, next.files_until).await?;
        let (mut last, mut end) = match self.known.ends.get(&stream) {
            Some(&known) => known,
            None => {
                let Some(head) = sql::find_head(connection, stream).await? else {
                    return Ok(false);
                };
                let top = sql::read_top(connection, stream, head.floor).await?;
                (top.unwrap_or(head.floor), Offset(0))
            }
        };
        let through = Offset(last.0 + i64::from(BATCH_MESSAGES));
        if end < through {
            let size = self.state.leaf_sizes.get(stream);
            match sql::extend_log(connection, stream, through, size).await? {
                Some(extended) => end = extended,
                None => return Ok(false),
            }
        }
        failpoint::reach("scheduled.before_publish");
        let witness = self.state.witness.now();
        let most = (BATCH_MESSAGES, BATCH_BYTES);
        let published = sql::publish_scheduled(connection, stream, last, most, witness).await;
        failpoint::reach("scheduled.after_publish");
        match published {
            Ok(PublishedScheduled::Moved { last: now, count }) => {
                last = now;
                self.known.ends.insert(stream, (last, end));
                self.state.metrics.scheduled_published.inc_by(count);
                self.state.metrics.messages_appended.inc_by(count);
                self.state.schedule.note_gone(stream, count);
                // Ends only with the engine.
                let _ = self.tail.send((stream, last)).await;
                Ok(true)
            }
            Ok(PublishedScheduled::Idle | PublishedScheduled::Gone) => Ok(false),
            // No leaf takes an offset or a horizon: others have appended, or leaves are gone. All is looked up again.
            Err(error) if error.is_leaf_missing() => {
                self.known.ends.remove(&stream);
                self.known.filed = None;
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the leaf in which a move of a horizon is filed at this time, and some minutes later.
    async fn file(
        &mut self,
        connection: &mut Connection,
        at: DateTime<Utc>,
    ) -> Result<(), store::Error> {
        let is_there = |(from, until): (DateTime<Utc>, DateTime<Utc>)| from <= at && at < until;
        if !self.known.filed.is_some_and(is_there) {
            sql::extend_publications(connection, at).await?;
            sql::extend_publications(connection, at + FILE_AHEAD).await?;
            self.known.filed = Some((at, at + FILE_AHEAD / 2));
        }
        Ok(())
    }

    /// Notes what comes next. Whether the stream is known.
    fn note_next(&self, next: &NextScheduled) -> bool {
        let mut known = self.state.schedule.known();
        let Some(stream) = known.streams.get_mut(&next.stream) else {
            return false;
        };
        stream.next_due_at = next.due_at;
        true
    }
}

/// Whether the trouble is one stream's.
fn is_of_stream(error: &store::Error) -> bool {
    error.is_held() || (error.retry() == Retry::Never && error.is_answered())
}
