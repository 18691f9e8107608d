//! The journal's writer: one per process, for all its queues. While one group commit is in flight the next gathers.
//!
//! When the connection is lost the outcome of the group is unknown. The very same group, under the same numbers, is then
//! written again until its outcome is known; nothing else is written meanwhile, and the queues stand still. When Postgres
//! is back, live deadlines move by the length of the outage.

mod aside;
mod gather;
mod submission;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::domain::id::{QueueId, Slot};
use crate::domain::queue::At;
use crate::queue::metrics::Metrics;
use crate::store::journal::{Group, GroupFate, GroupWritten};
use crate::store::{self, Connection, Database, Retry};
use crate::supervisor::{Backoff, Supervisor};
use crate::{cluster, failpoint};
use aside::{Aside, alone};
use gather::{Gathered, Gathering, Held, Numbers, number};
pub(super) use submission::{Contact, Outage, Submission, Written};

/// A call that took longer than this was an outage: the deadlines move by it.
const STALL: Duration = Duration::from_secs(1);
/// With nothing to write, Postgres is asked for a sign of life this often, so that an outage's beginning is known.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Pauses between attempts while Postgres is away.
const PAUSE: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));

pub(super) struct Writer {
    pub(super) database: Database,
    pub(super) cluster: cluster::Handle,
    pub(super) contact: Arc<Contact>,
    pub(super) metrics: Metrics,
    pub(super) supervisor: Supervisor,
    pub(super) submissions: mpsc::Receiver<Submission>,
    /// Chunks of checkpoints: one part of them goes with a group.
    pub(super) folds: mpsc::Receiver<Submission>,
    /// Opened at the start: a server that has no more of them is no reason to fail the first request.
    pub(super) connection: Option<Connection>,
}

/// What became of each slot's part of a group; or of each queue's by itself, after the group was refused.
type Answers = Result<GroupWritten, HashMap<QueueId, Written>>;

/// A leaf of the log that the group's dead letters need is locked by somebody else. Nothing is written.
struct LockedOut;

/// A job for the writer.
enum Next {
    Submission(Submission),
    /// A part that stood aside, by itself.
    Alone(Submission),
    /// Nothing for a while.
    Idle,
    /// Every sender is gone.
    Over,
}

/// The writer's session.
#[derive(Default)]
struct Session {
    connection: Option<Connection>,
    /// The journal's turn, as the last group found it.
    turn: Option<i64>,
}

/// Finds out the fate of a group for slots that were taken over while its outcome was unknown. The lease is another node's, and
/// its row was locked since then, so nothing of the group is still under way.
async fn resolve(
    session: &mut Session,
    group: &Group,
    written: &mut GroupWritten,
) -> Result<(), store::Error> {
    let Some(connection) = session.connection.as_mut() else {
        return Ok(());
    };
    let mut committed = Vec::new();
    for slot in group
        .slots
        .iter()
        .filter(|of| written.fenced.contains(&of.slot))
    {
        match store::journal::find_group(connection, slot).await? {
            GroupFate::Written => committed.push(slot.slot),
            GroupFate::NotWritten => {}
            GroupFate::Unknown => written.unknown.push(slot.slot),
        }
    }
    written.fenced.retain(|slot| !committed.contains(slot));
    Ok(())
}

/// A part of this slot is committed with its group.
fn committed(group: &Group, slot: Slot, written: &GroupWritten) -> Written {
    let slot = group.slots.iter().find(|of| of.slot == slot);
    Written::Committed {
        turn: written.turn,
        number: slot.map_or(0, |slot| slot.number),
    }
}

impl Writer {
    /// Runs until every sender is gone.
    pub(super) async fn run(mut self) {
        let mut session = Session {
            connection: self.connection.take(),
            turn: None,
        };
        let mut numbers = Numbers::new();
        let mut held = Held::default();
        let mut aside = Aside::default();
        loop {
            let gathered = match self.next(&mut held, &mut aside).await {
                Next::Submission(first) => self.gather(first, &mut numbers, &mut held, &aside),
                Next::Alone(part) => alone(part, &mut numbers),
                Next::Over => return,
                Next::Idle => Gathered::default(),
            };
            if self
                .write_all(&mut session, gathered, &mut numbers, &mut aside)
                .await
                .is_none()
            {
                // Told to stop while Postgres is away. Who waits learns that the outcome is not known.
                return;
            }
        }
    }

    /// The next job: what stands aside and what has just come by turns, and chunks of checkpoints when there is nothing else.
    async fn next(&mut self, held: &mut Held, aside: &mut Aside) -> Next {
        let now = tokio::time::Instant::now();
        let was_aside = std::mem::replace(&mut held.was_aside, false);
        if let Some(first) = held.take() {
            return Next::Submission(first);
        }
        if was_aside && let Ok(first) = self.submissions.try_recv() {
            return Next::Submission(first);
        }
        if let Some(part) = aside.take(now) {
            held.was_aside = true;
            return Next::Alone(part);
        }
        let idle_at = now + HEARTBEAT;
        let wake_at = aside.due_at(now).map_or(idle_at, |at| at.min(idle_at));
        tokio::select! {
            biased;
            first = self.submissions.recv() => first.map_or(Next::Over, Next::Submission),
            Some(first) = self.folds.recv() => Next::Submission(first),
            () = tokio::time::sleep_until(wake_at) => match aside.take(wake_at) {
                Some(part) => Next::Alone(part),
                None => Next::Idle,
            }
        }
    }

    /// Writes the group and answers who waits for it, but for parts that are locked out: those stand aside. None when told to stop while
    /// Postgres is away.
    async fn write_all(
        &self,
        session: &mut Session,
        gathered: Gathered,
        numbers: &mut Numbers,
        aside: &mut Aside,
    ) -> Option<()> {
        let mut next = Some(gathered);
        while let Some(gathered) = next.take() {
            let answers = match self.write(session, &gathered.group, numbers).await? {
                Ok(answers) => answers,
                Err(LockedOut) => {
                    let now = tokio::time::Instant::now();
                    next = aside.put(gathered, numbers, now, self.supervisor.is_stopping());
                    continue;
                }
            };
            aside.written();
            let Gathered {
                group,
                waiting,
                probes,
            } = gathered;
            for (queue, slot, done) in waiting {
                let written = match &answers {
                    Ok(written) if written.unknown.contains(&slot) => Written::Unknown,
                    Ok(written) if written.fenced.contains(&slot) => Written::Fenced,
                    Ok(written) => committed(&group, slot, written),
                    Err(each) => each.get(&queue).copied().unwrap_or(Written::Refused),
                };
                let _ = done.send(written);
            }
            for probe in probes {
                let _ = probe.send(());
            }
        }
        Some(())
    }

    /// Puts a group together from the parts that have arrived, and one part of a checkpoint.
    fn gather(
        &mut self,
        first: Submission,
        numbers: &mut Numbers,
        held: &mut Held,
        aside: &Aside,
    ) -> Gathered {
        // One that may be locked out makes nobody wait.
        let is_apart = |submission: &Submission| !aside.is_empty() && submission.has_letters();
        if is_apart(&first) {
            return alone(first, numbers);
        }
        let mut gathering = Gathering::default();
        let mut next = Some(first);
        while let Some(submission) = next.take() {
            if is_apart(&submission) {
                held.part = Some(submission);
                break;
            }
            if let Err(submission) = gathering.add(submission, numbers) {
                held.part = Some(submission);
                break;
            }
            if gathering.is_full() {
                break;
            }
            next = self.submissions.try_recv().ok();
        }
        if gathering.folding.is_none() {
            let fold = held.fold.take().or_else(|| self.folds.try_recv().ok());
            if let Some(fold) = fold
                && let Err(fold) = gathering.add(fold, numbers)
            {
                held.fold = Some(fold);
            }
        }
        let mut gathered = gathering.gathered;
        gathered.group.slots = gathering.slots.into_values().collect();
        gathered
    }

    /// Writes until the outcome is known. Holds what became of each part by itself, after the group as a whole was
    /// refused. None when told to stop while Postgres is away.
    async fn write(
        &self,
        session: &mut Session,
        group: &Group,
        numbers: &mut Numbers,
    ) -> Option<Result<Answers, LockedOut>> {
        let answers = match self.write_known(session, group).await? {
            Ok(written) => Ok(written),
            Err(error) if error.is_held() => return Some(Err(LockedOut)),
            Err(error) if group.parts.len() <= 1 => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the journal of a queue was refused"
                );
                Err(HashMap::new())
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "a group commit of several queues was refused; writing each queue alone"
                );
                Err(self.write_each(session, group, numbers).await?)
            }
        };
        Some(Ok(answers))
    }

    /// Writes each part by itself, so that a refused one fails nobody else. Each has its own number: a used number stands for a
    /// group that is written, and the refused group of all parts is not.
    async fn write_each(
        &self,
        session: &mut Session,
        group: &Group,
        numbers: &mut Numbers,
    ) -> Option<HashMap<QueueId, Written>> {
        let mut each = HashMap::new();
        for part in &group.parts {
            let Some(slot) = group.slots.iter().find(|slot| slot.slot == part.slot) else {
                continue;
            };
            let alone = Group {
                slots: vec![number(numbers, part.slot, slot.fence.clone())],
                parts: vec![part.clone()],
            };
            let written = match self.write_known(session, &alone).await? {
                Ok(written) if written.fenced.is_empty() => committed(&alone, part.slot, &written),
                Ok(written) if written.unknown.is_empty() => Written::Fenced,
                Ok(_) => Written::Unknown,
                Err(error) => {
                    tracing::error!(queue = %part.queue, error = &error as &dyn std::error::Error, "the journal of a queue was refused");
                    Written::Refused
                }
            };
            each.insert(part.queue, written);
        }
        Some(each)
    }

    async fn write_known(
        &self,
        session: &mut Session,
        group: &Group,
    ) -> Option<Result<GroupWritten, store::Error>> {
        let mut backoff = PAUSE;
        let mut repeats = 0u32;
        loop {
            let began = (At::from(self.cluster.now()), Instant::now());
            let mut attempt = self.attempt(session, group, repeats > 0).await;
            if repeats > 0
                && let Ok(written) = &mut attempt
                && let Err(error) = resolve(session, group, written).await
            {
                attempt = Err(error);
            }
            match attempt {
                Ok(written) => {
                    self.confirm(began);
                    return Some(Ok(written));
                }
                Err(error) if error.retry() == Retry::Never && !error.is_connection_lost() => {
                    return Some(Err(error));
                }
                // A group that may still be under way on a lost connection keeps its number, and so waits for the lock: under another one
                // it could be written twice.
                Err(error) if error.is_held() && repeats == 0 => return Some(Err(error)),
                Err(error) => {
                    session.connection = None;
                    repeats += 1;
                    self.metrics.group_repeats.inc();
                    if error.retry() == Retry::Now && repeats < 10 {
                        continue;
                    }
                    self.stand_still(&error);
                }
            }
            if self.supervisor.is_stopping() && repeats > 20 {
                return None;
            }
            backoff.wait().await;
        }
    }

    async fn attempt(
        &self,
        session: &mut Session,
        group: &Group,
        is_repeat: bool,
    ) -> Result<GroupWritten, store::Error> {
        let connection = match &mut session.connection {
            Some(connection) => connection,
            none => none.insert(self.database.connect().await?),
        };
        if group.parts.is_empty() {
            store::journal::probe(connection).await?;
            return Ok(GroupWritten {
                turn: 0,
                fenced: Vec::new(),
                unknown: Vec::new(),
            });
        }
        let began = Instant::now();
        let incarnation = self.cluster.incarnation();
        failpoint::reach("settlement.before_call");
        if group.parts.iter().any(|part| part.checkpoint.is_some()) {
            failpoint::reach("checkpoint.before_write");
        }
        let plainly = match session.turn {
            Some(turn) if !is_repeat => {
                store::journal::write_journal(connection, incarnation, turn, group).await?
            }
            _ => None,
        };
        let written = match plainly {
            Some(written) => written,
            None => store::journal::write_group(connection, incarnation, group).await?,
        };
        failpoint::reach("settlement.after_commit");
        session.turn = Some(written.turn);
        self.metrics.groups.inc();
        self.metrics
            .group_seconds
            .observe(began.elapsed().as_secs_f64());
        Ok(written)
    }

    fn stand_still(&self, error: &store::Error) {
        self.contact.outage.send_if_modified(|outage| {
            let begins = !outage.standing;
            outage.standing = true;
            begins
        });
        if self.metrics.standing.set(1) == 0 {
            tracing::warn!(
                error = error as &dyn std::error::Error,
                "Postgres cannot be reached: queues stand still"
            );
        }
    }

    /// Postgres carried out a call that began then. After an outage the deadlines move, before anything can expire.
    fn confirm(&self, (began, instant): (At, Instant)) {
        // An outage counts from the last call that succeeded, a heartbeat ago at most, and lasts until one does again,
        // whatever group that one is of: those in between may have been refused.
        let is_standing = self.contact.outage.borrow().standing;
        let away_since = is_standing.then(|| self.contact.confirmed());
        let stalled_since = (instant.elapsed() > STALL).then_some(began);
        let Some(since) = away_since.or(stalled_since) else {
            self.contact.confirmed.fetch_max(began.0, Ordering::AcqRel);
            return;
        };
        let now = At::from(self.cluster.now());
        let by = now.0.saturating_sub(since.0).max(0);
        self.contact.outage.send_modify(|outage| {
            outage.standing = false;
            outage.moved += by;
        });
        self.metrics.standing.set(0);
        tracing::info!(
            milliseconds = by,
            "Postgres answers again: deadlines of live deliveries moved by the length of the outage"
        );
        // After the move is told: a queue that sees this moment as confirmed has seen the move too.
        self.contact.confirmed.fetch_max(began.0, Ordering::AcqRel);
    }
}
