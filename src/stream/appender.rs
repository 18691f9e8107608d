//! Group commit: whatever arrives while one commit is in flight makes up the next.
//!
//! Each group has a number. A call whose connection was lost may or may not have committed; the appender repeats it under
//! the same number until it knows, and the database answers a repeat with the first result. Callers wait for a limited
//! time, and then learn that the outcome is unknown, while the appender goes on. Nothing else is appended meanwhile: order
//! holds.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::mpsc;

use super::Options;
use super::attempt::Failure;
use super::error::AppendError;
use super::group::{Group, Joined, Router};
use super::handle::State;
use super::inbox::Taken;
use super::lanes::{Lanes, Part, Source};
use super::plan::{Layout, Plan};
use super::request::Member;
use super::tail::Appended as TailAppended;
use crate::cluster;
use crate::domain::id::{Offset, StreamId};
use crate::store::stream::{AppendOutcome, Appended, GroupKey, Previous};
use crate::store::{self, Database, Link, Retry};
use crate::supervisor::{Backoff, OnEnd, Supervisor};

/// The pause before a call is repeated or a group is laid out again.
const REPEAT: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
/// After this many parts of a group in a row that did not get their locks, the others are not tried here: it is not a single
/// stream that is held.
const HELD_IN_A_ROW: usize = 3;
/// The share of one lane in the bound on waiting members.
const LANE_FRACTION: usize = 8;
/// The pause between two tries of a lane.
const LANE_PAUSE: Duration = Duration::from_millis(150);
/// A lane gives up so much before its callers do: then they are told that nothing was done.
const LANE_MARGIN: Duration = Duration::from_millis(500);

pub(super) struct Appender {
    options: Options,
    db: Database,
    pub(super) cluster: cluster::Handle,
    pub(super) state: Arc<State>,
    supervisor: Supervisor,
    source: Source,
    lanes: Lanes,
    tail: mpsc::Sender<Vec<TailAppended>>,
    pub(super) link: Link,
    pub(super) router: Router,
    /// The last offset of each stream that this node knows to be committed: where the look for the top starts.
    pub(super) lasts: HashMap<StreamId, Offset>,
    /// This appender's latest group in each stream.
    pub(super) previous: HashMap<StreamId, Previous>,
    /// Up to where each log has leaves, as far as known.
    pub(super) ends: HashMap<StreamId, Offset>,
    /// A member that could not join the last group.
    carried: Option<Taken>,
    /// Keys were counted from another base, or through another end, than the database goes by.
    pub(super) is_behind: bool,
    /// The number of the node's latest group: its lanes count on with it.
    number: Arc<AtomicI64>,
    /// The database's clock when it was last read.
    clock: (DateTime<Utc>, Instant),
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
        source: Source,
        tail: mpsc::Sender<Vec<TailAppended>>,
        lasts: HashMap<StreamId, Offset>,
    ) -> Self {
        let bytes = options.waiting_max_bytes / LANE_FRACTION;
        Self {
            link: Link::of_appender(&db, source.is_lane()),
            lanes: Lanes::new(bytes, state.metrics.lanes.clone()),
            options,
            db,
            clock: (cluster.now(), Instant::now()),
            cluster,
            state,
            supervisor,
            source,
            tail,
            router: Router::default(),
            lasts,
            previous: HashMap::new(),
            ends: HashMap::new(),
            carried: None,
            is_behind: false,
            number: Arc::default(),
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
                let (members, bytes) = (group.members.len(), group.bytes);
                self.commit(group).await;
                self.source.done(members, bytes);
            }
        }
    }

    async fn wait(&mut self) -> Option<Taken> {
        loop {
            let taken = tokio::select! {
                taken = self.source.recv() => taken?,
                () = self.supervisor.stopping(), if self.source.is_open() => {
                    self.source.close();
                    continue;
                }
            };
            // Members whose callers gave up before they were tried are skipped.
            if let Some(taken) = taken {
                return Some(taken);
            }
        }
    }

    fn gather(&mut self, first: Taken) -> Group {
        let mut group = Group::default();
        let mut next = self.pass_on(first);
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
            while let Some(taken) = self.source.try_recv() {
                next = taken.and_then(|taken| self.pass_on(taken));
                if next.is_some() {
                    break;
                }
            }
        }
        group
    }

    /// Passes a member of a stream that is held on to its lane.
    fn pass_on(&mut self, taken: Taken) -> Option<Taken> {
        if self.lanes.is_empty() {
            return Some(taken);
        }
        let parts = self.router.parts(&taken.member);
        self.lanes.pass(&parts, taken)
    }

    /// The group does not get its locks: tries each part of it alone, and sends held parts to a lane.
    async fn part(&mut self, group: Group) -> bool {
        let mut groups = group.by_part(&mut self.router);
        if groups.len() == 1 {
            let (parts, group) = groups.remove(0);
            self.hold(&parts, group);
            return true;
        }
        let mut held = 0;
        for (parts, group) in groups {
            if held >= HELD_IN_A_ROW {
                self.hold(&parts, group);
            } else if self.commit(group).await {
                held += 1;
            } else {
                held = 0;
            }
        }
        held > 0
    }

    fn hold(&mut self, parts: &BTreeSet<Part>, group: Group) {
        let streams: BTreeSet<i32> = parts.iter().map(|(stream, _)| stream.0).collect();
        tracing::warn!(
            ?streams,
            "another session holds a lock on the log of a stream: messages published there wait for it, other streams do not"
        );
        let members = group.members.into_iter().map(|member| member.taken);
        let Some(source) = self.lanes.hold(parts, members.collect()) else {
            return;
        };
        let mut lane = Self::new(
            self.options.clone(),
            self.db.clone(),
            self.cluster.clone(),
            Arc::clone(&self.state),
            self.supervisor.clone(),
            source,
            self.tail.clone(),
            self.lasts.clone(),
        );
        lane.number = Arc::clone(&self.number);
        lane.clock = self.clock;
        let run: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(lane.run());
        self.supervisor.spawn("stream lane", OnEnd::Ordinary, run);
    }

    /// Commits a group and answers its members, however long it takes to know. Whether it went to a lane instead.
    async fn commit(&mut self, group: Group) -> bool {
        let number = self.number.fetch_add(1, Ordering::AcqRel) + 1;
        let mut key = GroupKey {
            incarnation: self.cluster.incarnation(),
            number,
            born_at: self.clock.0 + TimeDelta::from_std(self.clock.1.elapsed()).unwrap_or_default(),
            catalogue: self.router.version,
            witness: self.state.witness.now(),
        };
        let started = Instant::now();
        let mut backoff = REPEAT;
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
                    self.finish(group, key, &layout, &appended).await;
                    return false;
                }
                Ok(AppendOutcome::Stale) => {
                    plan = None;
                    self.router.version = 0;
                    if std::mem::replace(&mut is_stale_again, true) {
                        backoff.wait().await;
                    }
                }
                Ok(AppendOutcome::Behind) => {
                    plan = None;
                    self.is_behind = true;
                    if std::mem::replace(&mut is_behind_again, true) {
                        backoff.wait().await;
                    }
                }
                Ok(AppendOutcome::Expired { clock }) => {
                    self.clock = (clock, Instant::now());
                    if is_unknown {
                        tracing::error!(
                            number = key.number,
                            "the broker's database has forgotten the result of an append"
                        );
                        drop(plan);
                        group.answer_all(|| AppendError::OutcomeUnknown);
                        return false;
                    }
                    key.born_at = clock;
                }
                Err(failure) => {
                    if self.note(&failure) && !is_unknown {
                        is_unknown = true;
                        self.state.metrics.groups_unknown.inc();
                    }
                    let is_held = failure.error.is_held() && !is_unknown;
                    if is_held && !self.source.is_lane() {
                        drop(plan);
                        return Box::pin(self.part(group)).await;
                    }
                    let mut has_time = started.elapsed() < self.options.wait;
                    if is_held {
                        let waited = group.members.iter().map(|m| m.taken.at.elapsed()).max();
                        has_time = !self.supervisor.is_stopping()
                            && waited.unwrap_or_default() + LANE_MARGIN < self.options.wait;
                    }
                    let may_go_on = has_time || (is_unknown && !self.supervisor.is_stopping());
                    let is_full = failure.error.is_out_of_memory() && !is_unknown;
                    if is_full && Self::is_divisible(&group, has_time) {
                        // Never the same again and again: members alone, and a relay's page in the pieces that the relay makes of it.
                        drop(plan);
                        Box::pin(self.refuse(group, failure.error)).await;
                        return false;
                    }
                    let can_mend = self.can_mend(&failure.error, &mut is_unknown);
                    if !can_mend && failure.is_final(is_unknown) {
                        drop(plan);
                        Box::pin(self.refuse(group, failure.error)).await;
                        return false;
                    }
                    if !may_go_on {
                        drop(plan);
                        Self::give_up(group, is_unknown, failure.error);
                        return false;
                    }
                    if is_held {
                        tokio::time::sleep(LANE_PAUSE).await;
                    } else if failure.error.retry() != Retry::Now {
                        backoff.wait().await;
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
        self.link.heed(&failure.error);
        failure.error.is_connection_lost() && failure.was_sent
    }

    /// Whether the database refused for a reason that the next attempt does away with.
    fn can_mend(&mut self, error: &store::Error, is_unknown: &mut bool) -> bool {
        if error.is_leaf_missing() {
            // Others have appended, or leaves are gone. Where each log stands is read again.
            self.ends.clear();
            return true;
        }
        // An earlier try of this very group came through after all: its result is there.
        error.is_already_written() && !std::mem::replace(is_unknown, true)
    }

    fn is_divisible(group: &Group, has_time: bool) -> bool {
        let is_page = |member: &Member| matches!(member, Member::Relay { messages, .. } if messages.len() > 1);
        group.members.len() > 1
            || (!has_time && group.members.iter().any(|m| is_page(&m.taken.member)))
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
                let refusal = match error.is_topic_limit_reached() {
                    true => AppendError::TooManyTopics,
                    false => AppendError::Refused(error),
                };
                let _ = member.taken.reply.send(Err(refusal));
            }
            return;
        }
        for member in std::mem::take(&mut group.members) {
            self.commit(Group::of(member)).await;
        }
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
