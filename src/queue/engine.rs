//! The engine's own task: which queues there are, which slots this process holds, and a task for each queue of those.
//!
//! A slot is recovered when its lease is taken, at the new epoch, and dropped when the epoch is gone. A queue's task that
//! ends by a refused write has its whole slot recovered, since its state in memory ran ahead of the journal.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use super::Options;
use super::command::{Command, Job};
use super::declare::describe;
use super::feed::{self, Dispatch, Feed};
use super::handle::{Known, Shared};
use super::recovery::{self, Recovered};
use super::scans::Scans;
use super::task::{Ended, Parts, Progress, Task, Why};
use super::writer::{Contact, Submission};
use crate::cluster;
use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot, StreamId};
use crate::domain::name::{QueueName, StreamName};
use crate::domain::policy::DEAD_LETTER_RETENTION;
use crate::store::queue::QueueRow;
use crate::store::{self, Database};
use crate::stream;
use crate::supervisor::{OnEnd, Supervisor};

/// How often the watermarks are told to the stream.
const WATERMARK_EVERY: Duration = Duration::from_secs(1);
/// How often the journal is looked at for a turn.
const TURN_EVERY: Duration = Duration::from_secs(2);
/// A slot that could not be recovered is tried again after this.
const RECOVER_AGAIN: Duration = Duration::from_millis(500);
/// What a redrive came to can be looked at for so long.
const REDRIVE_RETENTION: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Loads of payloads at a time, for all queues.
pub(in crate::queue) const READS: usize = 4;

/// One queue, as the engine keeps it.
pub(in crate::queue) struct Owned {
    pub(in crate::queue) row: QueueRow,
    pub(in crate::queue) dispatch: Arc<Dispatch>,
    pub(in crate::queue) feed: Arc<Feed>,
    pub(in crate::queue) progress: Arc<Progress>,
    /// Up to where this generation has settled all that it matches, as far as it is known here.
    pub(in crate::queue) position: Option<(Generation, Offset)>,
    /// The database refused its journal so many times in a row: it is recovered alone, later each time.
    pub(in crate::queue) refusals: u32,
    pub(in crate::queue) refused_at: Option<Instant>,
    /// The task's mailbox, while it runs.
    pub(in crate::queue) mailbox: Option<mpsc::Sender<Command>>,
}

/// A slot that queues hash into.
#[derive(Debug, Default)]
pub(in crate::queue) struct SlotState {
    /// The lease, while it is held.
    pub(in crate::queue) fence: Option<Fence>,
    /// Its queues' state is at hand under this fence.
    pub(in crate::queue) is_recovered: bool,
    /// A change of one of its queues has no known outcome: their rows are read again with their state.
    are_rows_stale: bool,
    /// Tasks that run. A slot is recovered only when none does.
    running: usize,
    recover_at: Option<Instant>,
}

pub(in crate::queue) struct Engine {
    pub(in crate::queue) options: Options,
    pub(in crate::queue) database: Database,
    pub(in crate::queue) stream: stream::Handle,
    pub(in crate::queue) cluster: cluster::Handle,
    pub(in crate::queue) supervisor: Supervisor,
    pub(in crate::queue) shared: Arc<Shared>,
    pub(in crate::queue) writer: mpsc::Sender<Submission>,
    pub(in crate::queue) contact: Arc<Contact>,
    pub(in crate::queue) jobs: mpsc::Receiver<Job>,
    pub(in crate::queue) queues: HashMap<QueueId, Owned>,
    pub(in crate::queue) slots: HashMap<Slot, SlotState>,
    dispatches: HashMap<StreamId, Arc<Dispatch>>,
    /// Streams that queues were declared on.
    pub(in crate::queue) stream_ids: HashMap<StreamName, StreamId>,
    reads: Arc<Semaphore>,
    scans: Scans,
    /// Queues to be recovered alone, and when.
    pub(in crate::queue) alone: HashMap<QueueId, Instant>,
    ended: (mpsc::Sender<Ended>, mpsc::Receiver<Ended>),
    fences: (
        mpsc::Sender<(Slot, Option<Fence>)>,
        mpsc::Receiver<(Slot, Option<Fence>)>,
    ),
}

/// What an engine is given.
pub(in crate::queue) struct Given {
    pub(in crate::queue) options: Options,
    pub(in crate::queue) database: Database,
    pub(in crate::queue) stream: stream::Handle,
    pub(in crate::queue) cluster: cluster::Handle,
    pub(in crate::queue) supervisor: Supervisor,
    pub(in crate::queue) shared: Arc<Shared>,
    pub(in crate::queue) writer: mpsc::Sender<Submission>,
    pub(in crate::queue) contact: Arc<Contact>,
    pub(in crate::queue) scans: Scans,
    pub(in crate::queue) jobs: mpsc::Receiver<Job>,
}

impl Engine {
    pub(in crate::queue) fn new(given: Given) -> Self {
        Self {
            options: given.options,
            database: given.database,
            stream: given.stream,
            cluster: given.cluster,
            supervisor: given.supervisor,
            shared: given.shared,
            writer: given.writer,
            contact: given.contact,
            jobs: given.jobs,
            queues: HashMap::new(),
            slots: HashMap::new(),
            dispatches: HashMap::new(),
            stream_ids: HashMap::new(),
            reads: Arc::new(Semaphore::new(READS)),
            scans: given.scans,
            alone: HashMap::new(),
            ended: mpsc::channel(1_024),
            fences: mpsc::channel(128),
        }
    }

    /// Takes in the queues that there are.
    pub(in crate::queue) fn add_all(&mut self, rows: Vec<QueueRow>) {
        for row in rows {
            self.add(row);
        }
    }

    pub(in crate::queue) async fn run(mut self) {
        let mut watermarks = tokio::time::interval(WATERMARK_EVERY);
        let mut turn = tokio::time::interval(TURN_EVERY);
        let mut trim = tokio::time::interval(self.options.trim_every);
        let mut positions = tokio::time::interval(self.options.positions_every);
        for tick in [&mut watermarks, &mut turn, &mut trim, &mut positions] {
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
        let supervisor = self.supervisor.clone();
        while !supervisor.is_stopping() {
            let slots = self.slots.values().filter_map(|slot| slot.recover_at);
            let recover_at = slots.chain(self.alone.values().copied()).min();
            tokio::select! {
                job = self.jobs.recv() => match job {
                    Some(job) => self.carry_out(job).await,
                    None => return,
                },
                Some((slot, fence)) = self.fences.1.recv() => self.change_fence(slot, fence).await,
                Some(ended) = self.ended.1.recv() => self.note_end(ended).await,
                () = sleep_until(recover_at) => self.recover_due().await,
                _ = watermarks.tick() => self.tell_watermarks().await,
                _ = turn.tick() => self.turn_journal().await,
                _ = trim.tick() => self.trim_letters().await,
                _ = positions.tick() => self.write_positions().await,
                () = supervisor.stopping() => {}
            }
        }
        // The queues' tasks flush by themselves; their leases go back when they have.
        while self.slots.values().any(|slot| slot.running > 0) {
            match self.ended.1.recv().await {
                Some(ended) => self.forget_task(&ended),
                None => break,
            }
        }
        for slot in self.slots.keys() {
            self.cluster.release(&slot.lease_name());
        }
    }

    pub(in crate::queue) fn add(&mut self, row: QueueRow) {
        let dispatch = self.dispatch(row.stream_id);
        let feed = dispatch.subscribe(row.id, row.patterns.clone().into());
        let slot = row.slot;
        let progress = Arc::new(Progress::default());
        let known = Known {
            description: describe(&row),
            mailbox: None,
            progress: Arc::clone(&progress),
        };
        self.write_known().insert(row.name.clone(), known);
        self.queues.insert(
            row.id,
            Owned {
                row,
                dispatch,
                feed,
                progress,
                position: None,
                refusals: 0,
                refused_at: None,
                mailbox: None,
            },
        );
        self.shared.metrics.queues.set(self.queues.len() as i64);
        if let Entry::Vacant(vacant) = self.slots.entry(slot) {
            vacant.insert(SlotState::default());
            self.hold(slot);
        }
    }

    fn hold(&self, slot: Slot) {
        let fence = self.cluster.hold(slot.lease_name());
        let changes = self.fences.0.clone();
        let supervisor = self.supervisor.clone();
        self.supervisor.spawn(
            format!("queue slot {slot}"),
            OnEnd::Ordinary,
            follow_fence(slot, fence, changes, supervisor),
        );
    }

    fn dispatch(&mut self, stream: StreamId) -> Arc<Dispatch> {
        if let Some(dispatch) = self.dispatches.get(&stream) {
            return Arc::clone(dispatch);
        }
        let dispatch = Arc::new(Dispatch::new(stream));
        self.dispatches.insert(stream, Arc::clone(&dispatch));
        let task = feed::run(
            Arc::clone(&dispatch),
            self.stream.clone(),
            self.supervisor.clone(),
        );
        self.supervisor
            .spawn(format!("dispatch stream {stream}"), OnEnd::Ordinary, task);
        dispatch
    }

    pub(in crate::queue) fn write_known(
        &self,
    ) -> std::sync::RwLockWriteGuard<'_, HashMap<QueueName, Known>> {
        self.shared
            .queues
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn change_fence(&mut self, slot: Slot, fence: Option<Fence>) {
        let Some(state) = self.slots.get_mut(&slot) else {
            return;
        };
        if state.fence == fence {
            return;
        }
        state.fence = fence;
        self.drop_slot(slot).await;
        self.recover(slot).await;
    }

    /// Ends the slot's tasks; what they have in memory is void.
    async fn drop_slot(&mut self, slot: Slot) {
        if let Some(state) = self.slots.get_mut(&slot) {
            state.is_recovered = false;
        }
        let of_slot = self
            .queues
            .values_mut()
            .filter(|owned| owned.row.slot == slot);
        let mailboxes: Vec<_> = of_slot.filter_map(|owned| owned.mailbox.take()).collect();
        for mailbox in mailboxes {
            let _ = mailbox.send(Command::End).await;
        }
        let mut known = self.write_known();
        for known in known.values_mut() {
            if Slot::of(known.description.id) == slot {
                known.mailbox = None;
            }
        }
    }

    async fn note_end(&mut self, ended: Ended) {
        self.forget_task(&ended);
        if ended.why == Why::Fenced {
            self.shared.metrics.fenced.inc();
            tracing::warn!(queue = %ended.queue, slot = %ended.slot, epoch = %ended.fence.epoch, "the slot was taken over: its queues are dropped");
        }
        if ended.why == Why::Refused && self.recover_alone_later(&ended) {
            return;
        }
        if ended.why != Why::Told {
            // Also when the writer ended: what was sent before may still be under way on a connection that was lost, and
            // must not be written behind the recovery's read. A new epoch shuts it out.
            self.cluster.fenced(&ended.fence);
            self.forget_fence(&ended.fence, ended.slot).await;
        }
        self.recover(ended.slot).await;
    }

    async fn forget_fence(&mut self, fence: &Fence, slot: Slot) {
        let Some(state) = self.slots.get_mut(&slot) else {
            return;
        };
        if state.fence.as_ref() == Some(fence) {
            state.fence = None;
            self.drop_slot(slot).await;
        }
    }

    /// Has the slot's queues read again, their rows included.
    pub(in crate::queue) async fn read_again(&mut self, slot: Slot) {
        self.drop_slot(slot).await;
        if let Some(state) = self.slots.get_mut(&slot) {
            state.are_rows_stale = true;
            state.recover_at = Some(Instant::now());
        }
    }

    fn forget_task(&mut self, ended: &Ended) {
        if let Some(slot) = self.slots.get_mut(&ended.slot) {
            slot.running = slot.running.saturating_sub(1);
        }
    }

    async fn recover_due(&mut self) {
        let now = Instant::now();
        let due = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.recover_at.is_some_and(|at| at <= now));
        let due: Vec<Slot> = due.map(|(&slot, _)| slot).collect();
        for slot in due {
            self.recover(slot).await;
        }
        self.recover_due_alone().await;
    }

    /// Reads the state of the slot's queues and starts their tasks, once the lease is held and no former task runs.
    async fn recover(&mut self, slot: Slot) {
        let Some(state) = self.slots.get_mut(&slot) else {
            return;
        };
        state.recover_at = None;
        let Some(fence) = state.fence.clone() else {
            return;
        };
        if state.is_recovered || state.running > 0 || self.supervisor.is_stopping() {
            return;
        }
        let recovered = match self.freshen_rows(slot).await {
            Ok(()) => {
                let rows = self.queues.values().map(|owned| &owned.row);
                let rows: Vec<&QueueRow> = rows.filter(|row| row.slot == slot).collect();
                recovery::recover(&self.database, &fence, slot, &rows).await
            }
            Err(error) => Err(error.into()),
        };
        match recovered {
            Ok(machines) => {
                if let Some(state) = self.slots.get_mut(&slot) {
                    state.is_recovered = true;
                }
                for recovered in machines {
                    self.start_task(recovered, &fence);
                }
            }
            Err(recovery::Error::Fenced) => {
                self.cluster.fenced(&fence);
                self.forget_fence(&fence, slot).await;
            }
            Err(error) => {
                tracing::error!(%slot, error = &error as &dyn std::error::Error, "recovering queues failed; trying again");
                if let Some(state) = self.slots.get_mut(&slot) {
                    state.recover_at = Some(Instant::now() + RECOVER_AGAIN);
                }
            }
        }
    }

    /// Reads the rows of the slot's queues again, if a change of one has no known outcome.
    async fn freshen_rows(&mut self, slot: Slot) -> Result<(), store::Error> {
        if !self.slots.get(&slot).is_some_and(|s| s.are_rows_stale) {
            return Ok(());
        }
        for row in store::queue::find_queues(&self.database).await? {
            if let Some(owned) = self.queues.get_mut(&row.id)
                && row.slot == slot
            {
                let id = row.id;
                owned.row = row;
                self.show_row(id);
            }
        }
        if let Some(state) = self.slots.get_mut(&slot) {
            state.are_rows_stale = false;
        }
        Ok(())
    }

    /// Lets the dispatcher and the handles see what the queue's row says.
    pub(in crate::queue) fn show_row(&self, id: QueueId) {
        let Some(owned) = self.queues.get(&id) else {
            return;
        };
        let patterns = owned.row.patterns.clone().into();
        owned.dispatch.subscribe(id, patterns);
        if let Some(known) = self.write_known().get_mut(&owned.row.name) {
            known.description = describe(&owned.row);
        }
    }

    pub(in crate::queue) fn start_task(&mut self, recovered: Recovered, fence: &Fence) {
        let Recovered {
            machine,
            unfolded,
            redrives,
        } = recovered;
        let Some(owned) = self.queues.get_mut(&machine.id()) else {
            return;
        };
        self.alone.remove(&machine.id());
        owned.position = Some((machine.generation(), machine.journaled_through()));
        let (mailbox, commands) = mpsc::channel(1_024);
        owned.mailbox = Some(mailbox.clone());
        let row = &owned.row;
        let (name, slot) = (row.name.clone(), row.slot);
        owned.dispatch.detach(&owned.feed);
        let parts = Parts {
            name: name.clone(),
            stream_id: row.stream_id,
            slot,
            fence: fence.clone(),
            patterns: row.patterns.clone().into(),
            is_paused: row.is_paused,
            shared: Arc::clone(&self.shared),
            letters: self.shared.task_letters.clone(),
            stream: self.stream.clone(),
            cluster: self.cluster.clone(),
            dispatch: Arc::clone(&owned.dispatch),
            feed: Arc::clone(&owned.feed),
            mailbox: commands,
            writer: self.writer.clone(),
            contact: Arc::clone(&self.contact),
            reads: Arc::clone(&self.reads),
            scans: self.scans.clone(),
            progress: Arc::clone(&owned.progress),
            supervisor: self.supervisor.clone(),
        };
        let task = Task::new(parts, machine, unfolded, redrives);
        let ended = self.ended.0.clone();
        if let Some(state) = self.slots.get_mut(&slot) {
            state.running += 1;
        }
        self.supervisor
            .spawn(format!("queue {name}"), OnEnd::Ordinary, async move {
                let last_word = task.run().await;
                let _ = ended.send(last_word).await;
            });
        if let Some(known) = self.write_known().get_mut(&name) {
            known.mailbox = Some(mailbox);
        }
    }

    async fn carry_out(&mut self, job: Job) {
        match job {
            Job::Declare {
                name,
                declaration,
                reply,
            } => {
                let _ = reply.send(self.declare(name, *declaration).await);
            }
            Job::Delete { name, reply } => {
                let _ = reply.send(self.delete(&name).await);
            }
            Job::Renew {
                name,
                renewal,
                expected_generation,
                reply,
            } => {
                let _ = reply.send(self.renew(&name, renewal, expected_generation).await);
            }
            Job::Pause {
                name,
                is_paused,
                reply,
            } => {
                let _ = reply.send(self.set_paused(&name, is_paused).await);
            }
        }
    }

    /// Tells each stream how far all its queues have settled. One with no queues is told that nothing is needed.
    async fn tell_watermarks(&self) {
        let mut lowest: HashMap<StreamId, i64> = HashMap::new();
        for owned in self.queues.values() {
            let mut watermark = owned.progress.watermark.load(Ordering::Acquire);
            if let Some(through) = owned.idle_through() {
                watermark = watermark.max(through.0);
            }
            let watermark = match owned.mailbox {
                Some(_) => watermark,
                // Not recovered: nothing is known of it but where it began.
                None => owned.row.start_offset.0 - 1,
            };
            let lowest = lowest.entry(owned.row.stream_id).or_insert(i64::MAX);
            *lowest = watermark.min(*lowest);
        }
        for (&stream, &watermark) in &lowest {
            self.stream.set_watermark(stream, Offset(watermark));
        }
        let unread = store::queue::find_streams_without_queues(&self.database).await;
        for stream in unread.unwrap_or_default() {
            if !lowest.contains_key(&stream) {
                self.stream.set_watermark(stream, Offset(i64::MAX));
            }
        }
    }

    /// Has queues remove dead letters that were kept long enough: a bounded number each time.
    async fn trim_letters(&self) {
        let seconds = REDRIVE_RETENTION.as_secs_f64();
        let _ = store::redrive::delete_old_redrives(&self.database, seconds).await;
        let seconds = DEAD_LETTER_RETENTION.as_secs_f64();
        let old = match store::letter::find_old_letters(&self.database, seconds).await {
            Ok(old) => old,
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "looking for old dead letters failed; trying again"
                );
                return;
            }
        };
        for (queue, letters) in old {
            let owned = self.queues.get(&queue);
            if let Some(mailbox) = owned.and_then(|owned| owned.mailbox.as_ref()) {
                let _ = mailbox.try_send(Command::Trim { letters });
            }
        }
    }

    /// Turns the journal when its segment is full, and asks queues for checkpoints that keep an old one from going.
    async fn turn_journal(&self) {
        let full_after = self.options.journal_full_after.as_secs_f64();
        let turned = store::journal::turn_journal(
            &self.database,
            self.options.journal_full_bytes,
            full_after,
        )
        .await;
        match turned {
            Ok((_, 0)) => {}
            Ok((turn, _)) => {
                for owned in self.queues.values() {
                    if let Some(mailbox) = &owned.mailbox {
                        let _ = mailbox.try_send(Command::Fold { before_turn: turn });
                    }
                }
            }
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "turning the journal failed; trying again"
                );
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Passes a lease's changes on, the first state included.
async fn follow_fence(
    slot: Slot,
    mut fence: watch::Receiver<Option<Fence>>,
    changes: mpsc::Sender<(Slot, Option<Fence>)>,
    supervisor: Supervisor,
) {
    loop {
        let now = fence.borrow_and_update().clone();
        if changes.send((slot, now)).await.is_err() {
            return;
        }
        let changed = tokio::select! {
            changed = fence.changed() => changed.is_ok(),
            () = supervisor.stopping() => false,
        };
        if !changed {
            return;
        }
    }
}
