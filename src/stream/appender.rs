//! Group commit: what arrives while one commit is in flight makes up the next.
//!
//! Each group has a number. A call whose connection was lost may or may not have committed; the appender repeats it under the
//! same number until it knows, and the database answers a repeat with the first result. Callers wait only so long, then they
//! are told that the outcome is unknown, while the appender goes on. Nothing else is appended meanwhile: order holds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::mpsc;

use super::Options;
use super::error::{AppendError, Error};
use super::group::{Group, Joined, Router};
use super::handle::State;
use super::inbox::{Pending, Taken};
use super::keys::{self, Counted};
use super::plan::{Counts, Layout, Plan};
use super::scheduled::ScheduledLeaves;
use super::tail::Appended as TailAppended;
use crate::domain::id::{Offset, StreamId};
use crate::store::stream::{self as sql, Append, AppendOutcome, Appended, GroupKey, Previous};
use crate::store::{self, Connection, Database, Retry};
use crate::supervisor::Supervisor;
use crate::{cluster, failpoint};

/// The shortest and the longest pause before a call is repeated or a group is laid out anew.
const REPEAT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

pub(super) struct Appender {
    options: Options,
    db: Database,
    cluster: cluster::Handle,
    state: Arc<State>,
    supervisor: Supervisor,
    inbox: mpsc::Receiver<Pending>,
    tail: mpsc::Sender<Vec<TailAppended>>,
    connection: Option<Connection>,
    router: Router,
    /// The last offset of each stream that this node knows to be committed: where the look for the top starts.
    lasts: HashMap<StreamId, Offset>,
    /// This appender's latest group in each stream.
    previous: HashMap<StreamId, Previous>,
    /// Up to where each log has leaves, as far as known.
    ends: HashMap<StreamId, Offset>,
    /// The leaves of scheduled messages that are there, as far as known.
    scheduled_leaves: ScheduledLeaves,
    /// A member that could not join the last group.
    carried: Option<Taken>,
    /// Keys were counted from another base, or through another end, than the database goes by.
    is_behind: bool,
    number: i64,
    /// The database's clock when it was last read.
    clock: (DateTime<Utc>, Instant),
}

/// Why an attempt did not come to a result.
struct Failure {
    error: store::Error,
    /// Whether the append itself was sent, so that with a lost connection its outcome is unknown.
    was_sent: bool,
}

impl Failure {
    /// Whether the database refuses the group, whenever it is tried. While the outcome of an earlier try is not known, only
    /// a refusal that came after the look for that outcome says so.
    fn is_final(&self, is_unknown: bool) -> bool {
        let is_refused = self.error.retry() == Retry::Never && !self.error.is_connection_lost();
        let is_known = !is_unknown || (self.was_sent && self.error.is_data_refused());
        is_refused && is_known
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        Self {
            error,
            was_sent: false,
        }
    }
}

impl Appender {
    #[expect(
        clippy::too_many_arguments,
        reason = "the one place that puts it together"
    )]
    pub(super) fn new(
        options: Options,
        db: Database,
        cluster: cluster::Handle,
        state: Arc<State>,
        supervisor: Supervisor,
        inbox: mpsc::Receiver<Pending>,
        tail: mpsc::Sender<Vec<TailAppended>>,
        lasts: HashMap<StreamId, Offset>,
    ) -> Self {
        Self {
            options,
            db,
            clock: (cluster.now(), Instant::now()),
            cluster,
            state,
            supervisor,
            inbox,
            tail,
            connection: None,
            router: Router::default(),
            lasts,
            previous: HashMap::new(),
            ends: HashMap::new(),
            scheduled_leaves: ScheduledLeaves::default(),
            carried: None,
            is_behind: false,
            number: 0,
        }
    }

    /// Runs until told to stop, then commits what is queued.
    pub(super) async fn run(mut self) {
        loop {
            let first = match self.carried.take() {
                Some(taken) => Some(taken),
                None => self.wait().await,
            };
            let Some(first) = first else { return };
            let group = self.gather(first);
            if !group.is_empty() {
                self.commit(group).await;
            }
        }
    }

    async fn wait(&mut self) -> Option<Taken> {
        loop {
            let pending = tokio::select! {
                pending = self.inbox.recv() => pending,
                () = self.supervisor.stopping(), if !self.inbox.is_closed() => {
                    self.inbox.close();
                    continue;
                }
            };
            // Members whose callers gave up before they were tried are skipped.
            if let Some(taken) = pending?.take() {
                return Some(taken);
            }
        }
    }

    fn gather(&mut self, first: Taken) -> Group {
        let mut group = Group::default();
        let mut next = Some(first);
        while let Some(taken) = next.take() {
            if let Joined::NextGroup(taken) = group.join(taken) {
                self.carried = Some(taken);
                break;
            }
            if group.message_count >= self.options.group_max_messages
                || group.bytes >= self.options.group_max_bytes
            {
                break;
            }
            while let Ok(pending) = self.inbox.try_recv() {
                next = pending.take();
                if next.is_some() {
                    break;
                }
            }
        }
        group
    }

    /// Commits a group and answers its members, however long it takes to know.
    async fn commit(&mut self, group: Group) {
        self.number += 1;
        let mut key = GroupKey {
            incarnation: self.cluster.incarnation(),
            number: self.number,
            born_at: self.clock.0 + TimeDelta::from_std(self.clock.1.elapsed()).unwrap_or_default(),
            catalogue: self.router.version,
        };
        let started = Instant::now();
        let mut pause = REPEAT.0;
        let mut is_unknown = false;
        let (mut is_stale_again, mut is_behind_again) = (false, false);
        let mut plan: Option<Plan<'_>> = None;
        loop {
            match self.attempt(&group, &mut plan, &mut key, is_unknown).await {
                Ok(AppendOutcome::Appended(appended)) => {
                    let layout = plan.take().map(|plan| plan.layout).unwrap_or_default();
                    drop(plan);
                    self.state
                        .metrics
                        .append_seconds
                        .observe(started.elapsed().as_secs_f64());
                    return self.finish(group, key, &layout, &appended).await;
                }
                Ok(AppendOutcome::Stale) => {
                    plan = None;
                    self.router.version = 0;
                    if std::mem::replace(&mut is_stale_again, true) {
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(REPEAT.1);
                    }
                }
                Ok(AppendOutcome::Behind) => {
                    plan = None;
                    self.is_behind = true;
                    if std::mem::replace(&mut is_behind_again, true) {
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(REPEAT.1);
                    }
                }
                Ok(AppendOutcome::Expired { clock }) => {
                    self.clock = (clock, Instant::now());
                    if is_unknown {
                        tracing::error!(
                            number = key.number,
                            "the result of an append is forgotten"
                        );
                        drop(plan);
                        return group.answer_all(|| AppendError::OutcomeUnknown);
                    }
                    key.born_at = clock;
                }
                Err(failure) => {
                    if self.note(&failure) && !is_unknown {
                        is_unknown = true;
                        self.state.metrics.groups_unknown.inc();
                    }
                    let has_time = started.elapsed() < self.options.wait;
                    let may_go_on = has_time || (is_unknown && !self.supervisor.is_stopping());
                    let can_mend = self.can_mend(&failure.error, &mut is_unknown);
                    if !can_mend && failure.is_final(is_unknown) {
                        drop(plan);
                        return Box::pin(self.refuse(group, failure.error)).await;
                    }
                    if !may_go_on {
                        drop(plan);
                        return Self::give_up(group, is_unknown, failure.error);
                    }
                    if failure.error.retry() != Retry::Now {
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(REPEAT.1);
                    }
                }
            }
        }
    }

    /// Whether the failure leaves the outcome unknown. Drops the connection if it is lost.
    fn note(&mut self, failure: &Failure) -> bool {
        tracing::warn!(
            error = &failure.error as &dyn std::error::Error,
            "an append failed"
        );
        if failure.error.is_connection_spent() {
            self.connection = None;
        }
        failure.error.is_connection_lost() && failure.was_sent
    }

    /// Whether the database refused for a reason that the next attempt does away with.
    fn can_mend(&mut self, error: &store::Error, is_unknown: &mut bool) -> bool {
        match error.sqlstate().as_deref() {
            // No leaf takes an offset: others have appended, or leaves are gone. Where each log stands is read again.
            Some("23514") if error.constraint().is_none() => {
                self.ends.clear();
                self.scheduled_leaves.clear();
                true
            }
            // An earlier try of this very group came through after all: its result is there.
            Some("23505")
                if error
                    .constraint()
                    .is_some_and(|name| name.starts_with("append_journal")) =>
            {
                let was_known = !*is_unknown;
                *is_unknown = true;
                was_known
            }
            _ => false,
        }
    }

    fn give_up(group: Group, is_unknown: bool, error: store::Error) {
        let mut error = Some(error);
        for member in group.members {
            let answer = if is_unknown {
                AppendError::OutcomeUnknown
            } else {
                AppendError::Unavailable(error.take())
            };
            let _ = member.taken.reply.send(Err(answer));
        }
    }

    /// The database refuses the group for what one member holds: each goes alone, so that it fails nobody else.
    async fn refuse(&mut self, mut group: Group, error: store::Error) {
        if group.members.len() == 1 {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "an append was refused"
            );
            if let Some(member) = group.members.pop() {
                self.state.metrics.members_refused.inc();
                let _ = member.taken.reply.send(Err(AppendError::Refused(error)));
            }
            return;
        }
        for member in std::mem::take(&mut group.members) {
            self.commit(Group::of(member)).await;
        }
    }

    async fn attempt<'g>(
        &mut self,
        group: &'g Group,
        plan: &mut Option<Plan<'g>>,
        key: &mut GroupKey,
        is_repeat: bool,
    ) -> Result<AppendOutcome, Failure> {
        if self.connection.is_none() {
            self.connection = Some(self.db.connect().await?);
        }
        let connection = self.connection.as_mut().expect("connected just above");
        let plan = match plan {
            Some(plan) => plan,
            None => {
                if self.router.version == 0 {
                    self.router.load(sql::load_catalogue(connection).await?);
                }
                key.catalogue = self.router.version;
                intern(connection, &mut self.router, group).await?;
                let counts = self.count_keys(group).await?;
                let made = Plan::new(group, &mut self.router, &self.lasts, &counts);
                plan.insert(made)
            }
        };
        let connection = self.connection.as_mut().expect("connected just above");
        for (stream, count) in plan.append.streams() {
            let known_end = self.ends.get(&stream).copied();
            if known_end.is_none() {
                let Some(head) = sql::find_head(connection, stream).await? else {
                    return Ok(AppendOutcome::Stale);
                };
                let last = self.lasts.entry(stream).or_default();
                let top = sql::read_top(connection, stream, *last).await?;
                *last = (*last).max(head.floor).max(top.unwrap_or_default());
            }
            let last = self.lasts.get(&stream).copied().unwrap_or_default();
            let through = Offset(last.0 + i64::from(count));
            let size = self.state.leaf_sizes.get(stream);
            match known_end {
                Some(end) if end >= through => {
                    if end.0 - through.0 < size / 2 {
                        self.state.maintain.notify_one();
                    }
                }
                _ => {
                    let extended = sql::extend_log(connection, stream, through, size).await?;
                    let Some(end) = extended else {
                        return Ok(AppendOutcome::Stale);
                    };
                    self.ends.insert(stream, end);
                }
            }
        }
        let missing = self.scheduled_leaves.missing(plan.append.dues());
        if !missing.is_empty() {
            sql::extend_scheduled(connection, sql::ScheduledKind::Message, &missing).await?;
            self.scheduled_leaves.add(&missing);
        }
        self.send(&plan.append, *key, is_repeat)
            .await
            .map_err(|error| Failure {
                error,
                was_sent: true,
            })
    }

    /// Sends what is laid out, the quick way if it can go there.
    async fn send(
        &mut self,
        append: &Append<'_>,
        key: GroupKey,
        is_repeat: bool,
    ) -> Result<AppendOutcome, store::Error> {
        let next = append.plain_stream().filter(|_| !is_repeat);
        let next = next.and_then(|stream| Some((stream, self.previous_in(stream)?)));
        let connection = self.connection.as_mut().expect("connected before");
        failpoint::reach("append.before_call");
        let quick = match next {
            Some((_, previous)) => sql::append_next(connection, key, previous, append).await?,
            None => None,
        };
        let outcome = match (quick, next) {
            (Some(appended), _) => AppendOutcome::Appended(appended),
            (None, next) => {
                if let Some((stream, _)) = next {
                    self.previous.remove(&stream);
                }
                sql::append(connection, key, is_repeat, append).await?
            }
        };
        if let AppendOutcome::Appended(_) = outcome {
            failpoint::reach("append.after_commit");
        }
        Ok(outcome)
    }

    /// This appender's latest group in a stream, if nobody else appends there, as far as it is known. Whoever does, the quick way
    /// is right; but it would be tried in vain.
    fn previous_in(&self, stream: StreamId) -> Option<Previous> {
        let previous = *self.previous.get(&stream)?;
        let is_alone = !self.cluster.view().has_peers();
        (is_alone && self.state.tails.last(stream) <= previous.last).then_some(previous)
    }

    /// Counts the keys that messages of the group expect versions of.
    async fn count_keys<'g>(&mut self, group: &'g Group) -> Result<Counts<'g>, store::Error> {
        let expected = self.router.expected_keys(group);
        let mut counts = Counts::with_capacity(expected.len());
        if expected.is_empty() {
            return Ok(counts);
        }
        let state = Arc::clone(&self.state);
        let connection = self.connection.as_mut().expect("connected before");
        let is_behind = std::mem::take(&mut self.is_behind);
        for (stream, own) in expected {
            let mut counted = state.keys.count(stream, own.iter().copied());
            let last = self.lasts.get(&stream).copied().unwrap_or_default();
            if is_behind || counted.as_ref().is_none_or(|known| known.through < last) {
                let through = match is_behind {
                    false => last,
                    // The log's end, which can be far beyond what this node knows, or before it.
                    true => {
                        let top = sql::read_top(connection, stream, Offset(0)).await?;
                        let is_ahead =
                            |known: &Counted<'_>| top.is_some_and(|top| known.through > top);
                        if counted.as_ref().is_some_and(is_ahead) {
                            state.keys.forget(stream);
                        }
                        top.unwrap_or_default()
                    }
                };
                counted = match keys::catch_up(connection, &state.keys, stream, through).await {
                    Ok(_) => state.keys.count(stream, own.iter().copied()),
                    Err(Error::Store(error)) => return Err(error),
                    Err(error) => {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "keys are not counted"
                        );
                        None
                    }
                };
            }
            counts.insert(stream, counted);
        }
        Ok(counts)
    }

    async fn finish(&mut self, group: Group, key: GroupKey, layout: &Layout, appended: &Appended) {
        let metrics = &self.state.metrics;
        metrics.group_messages.observe(group.message_count as f64);
        let settled = group.settle(layout, appended);
        metrics
            .messages_appended
            .inc_by(settled.appended_count as u64);
        metrics.duplicates.inc_by(settled.duplicate_count as u64);
        metrics.members_refused.inc_by(settled.refused_count as u64);
        self.state
            .schedule
            .note_accepted(metrics, &settled.scheduled);
        for tail in &settled.tails {
            let last = Offset(tail.first.0 + tail.messages.len() as i64 - 1);
            self.lasts.insert(tail.stream, last);
            let previous = Previous {
                number: key.number,
                born_at: key.born_at,
                last,
                last_at: tail.at,
            };
            self.previous.insert(tail.stream, previous);
            self.state.tails.commit(tail.stream, last);
        }
        for (reply, answer) in settled.answers {
            // Nobody waits any more: the append stands.
            let _ = reply.send(answer);
        }
        for tail in &settled.tails {
            let last = Offset(tail.first.0 + tail.messages.len() as i64 - 1);
            let offsets = (tail.first.0..).map(Offset);
            let keys = offsets.zip(&tail.messages);
            let keys = keys.filter_map(|(offset, message)| Some((offset, message.key.as_deref()?)));
            self.state.keys.feed(tail.stream, (tail.first, last), keys);
        }
        if !settled.tails.is_empty() {
            // Ends only with the engine.
            let _ = self.tail.send(settled.tails).await;
        }
    }
}

async fn intern(
    connection: &mut Connection,
    router: &mut Router,
    group: &Group,
) -> Result<(), store::Error> {
    let unknown = router.unknown_topics(group);
    if unknown.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = unknown.iter().map(|topic| topic.as_str()).collect();
    let found: HashMap<String, _> = sql::intern_topics(connection, &names)
        .await?
        .into_iter()
        .map(|(id, name)| (name, id))
        .collect();
    for topic in unknown {
        if let Some(&id) = found.get(topic.as_str()) {
            router.learn(topic, id);
        }
    }
    Ok(())
}
