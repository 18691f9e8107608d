//! The engine's own task: the existing queues, the slots that this process holds, and a task for each queue of those.
//!
//! Its loop waits for nothing but the next event. Whatever takes time, a statement or a queue's task, is an errand beside it
//! (`errand`). `slots` handles a slot when its lease comes and goes.

mod behind;
mod catalogue;
mod declare;
mod errand;
mod positions;
mod rebuild;
mod recover;
mod refused;
mod renewal;
#[cfg(test)]
mod simulation;
mod slots;
mod tenancy;
mod watermarks;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot, StreamId};
use crate::domain::name::QueueName;
use crate::domain::policy::DEAD_LETTER_RETENTION;
use crate::queue::api::Declaration;
use crate::queue::ask::{Command, Ended, Job};
use crate::queue::log::feed::{self, Dispatch, Feed};
use crate::queue::log::scans::Scans;
use crate::queue::options::Options;
use crate::queue::shared::{Known, Progress, Shared};
use crate::queue::task::{Parts, Task};
use crate::queue::writer::{Contact, Submission};
use crate::store::queue::QueueRow;
use crate::store::{self, Database};
use crate::supervisor::{OnEnd, Supervisor};
use crate::{cluster, stream};
use behind::Behind;
pub(super) use catalogue::Catalogue;
use declare::describe;
use errand::Errands;
use rebuild::Recovered;
use recover::{RECOVERIES, Recovery};
use tenancy::SlotState;
use watermarks::Told;

/// How often the watermarks are told to the stream.
const WATERMARK_EVERY: Duration = Duration::from_secs(2);
/// How often the journal is looked at for a turn.
const TURN_EVERY: Duration = Duration::from_secs(2);
/// The same while this process wrote nothing into the journal and nothing is left to truncate: other nodes look after their own.
const TURN_AGAIN: Duration = Duration::from_secs(30);
/// How long the result of a redrive can be read.
const REDRIVE_RETENTION: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Loads of payloads at a time, for all queues.
const READS: usize = 4;

/// One queue, as the engine keeps it.
struct Owned {
    row: QueueRow,
    dispatch: Arc<Dispatch>,
    feed: Arc<Feed>,
    progress: Arc<Progress>,
    /// Up to where this generation has settled all that it matches, as far as it is known here.
    position: Option<(Generation, Offset)>,
    /// How many times in a row the database refused its journal: the queue is recovered alone, later each time.
    refusals: u32,
    refused_at: Option<Instant>,
    /// The place that was noted last.
    marked: Option<(Generation, Offset)>,
    /// The task's mailbox, while it runs.
    mailbox: Option<mpsc::Sender<Command>>,
    /// Its state is being read, alone.
    is_recovering: bool,
    /// Its next generation is being begun: nothing but the task that is held knows its state, and no other is started.
    is_renewing: bool,
}

pub(super) struct Engine {
    options: Options,
    database: Database,
    stream: stream::Handle,
    pub(super) cluster: cluster::Handle,
    supervisor: Supervisor,
    shared: Arc<Shared>,
    writer: mpsc::Sender<Submission>,
    folds: mpsc::Sender<Submission>,
    contact: Arc<Contact>,
    jobs: mpsc::Receiver<Job>,
    queues: HashMap<QueueId, Owned>,
    slots: HashMap<Slot, SlotState>,
    dispatches: HashMap<StreamId, Arc<Dispatch>>,
    errands: Errands,
    /// What queues are being declared to be.
    declaring: HashMap<QueueName, Declaration>,
    reads: Arc<Semaphore>,
    scans: Scans,
    /// Queues to be recovered alone, and when.
    alone: HashMap<QueueId, Instant>,
    /// Queues that are not served, since their log is behind them.
    behind: HashMap<QueueId, Behind>,
    /// The known catalogue of queues.
    catalogue: Catalogue,
    /// The reports of other nodes about their slots.
    told: Told,
    /// The journal's turn at the last look.
    turn: Option<i64>,
    /// At the last look that found nothing to turn and nothing to truncate: how many groups this process had written, and when that was.
    turned: Option<(u64, Instant)>,
    ended: (mpsc::Sender<Ended>, mpsc::Receiver<Ended>),
    /// Permits to read stored state.
    recovering: Arc<Semaphore>,
    recoveries: (mpsc::Sender<Recovery>, mpsc::Receiver<Recovery>),
    fences: (
        mpsc::Sender<(Slot, Option<Fence>)>,
        mpsc::Receiver<(Slot, Option<Fence>)>,
    ),
}

/// The inputs of an engine.
pub(super) struct Given {
    pub(super) options: Options,
    pub(super) database: Database,
    pub(super) stream: stream::Handle,
    pub(super) cluster: cluster::Handle,
    pub(super) supervisor: Supervisor,
    pub(super) shared: Arc<Shared>,
    pub(super) writer: mpsc::Sender<Submission>,
    pub(super) folds: mpsc::Sender<Submission>,
    pub(super) contact: Arc<Contact>,
    pub(super) scans: Scans,
    pub(super) jobs: mpsc::Receiver<Job>,
    pub(super) catalogue: Catalogue,
}

impl Engine {
    pub(super) fn new(given: Given) -> Self {
        let errands = Errands::new(
            given.database.clone(),
            given.stream.clone(),
            Arc::clone(&given.shared),
            Arc::clone(&given.contact),
        );
        Self {
            options: given.options,
            database: given.database,
            stream: given.stream,
            cluster: given.cluster,
            supervisor: given.supervisor,
            shared: given.shared,
            writer: given.writer,
            folds: given.folds,
            contact: given.contact,
            jobs: given.jobs,
            queues: HashMap::new(),
            slots: HashMap::new(),
            dispatches: HashMap::new(),
            errands,
            declaring: HashMap::new(),
            reads: Arc::new(Semaphore::new(READS)),
            scans: given.scans,
            alone: HashMap::new(),
            behind: HashMap::new(),
            catalogue: given.catalogue,
            told: Told::default(),
            turn: None,
            turned: None,
            ended: mpsc::channel(1_024),
            recovering: Arc::new(Semaphore::new(RECOVERIES)),
            recoveries: mpsc::channel(1_024),
            fences: mpsc::channel(128),
        }
    }

    /// Takes in the queues that there are.
    pub(super) fn add_all(&mut self, rows: Vec<QueueRow>) {
        for row in rows {
            self.add(row);
        }
    }

    pub(super) async fn run(mut self) {
        let mut watermarks = tokio::time::interval(WATERMARK_EVERY);
        let mut turn = tokio::time::interval(TURN_EVERY);
        let mut trim = tokio::time::interval(self.options.trim_every);
        let mut positions = tokio::time::interval(self.options.positions_every);
        for tick in [&mut watermarks, &mut turn, &mut trim, &mut positions] {
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
        let supervisor = self.supervisor.clone();
        let mut views = self.cluster.views();
        while !supervisor.is_stopping() {
            let slots = self.slots.values().filter_map(|slot| slot.recover_at);
            let recover_at = slots.chain(self.alone.values().copied()).min();
            tokio::select! {
                job = self.jobs.recv() => match job {
                    Some(job) => self.carry_out(job),
                    None => return,
                },
                Some(visit) = self.errands.visits.recv() => visit(&mut self),
                Some((slot, fence)) = self.fences.1.recv() => self.change_fence(slot, fence),
                Some(ended) = self.ended.1.recv() => self.note_end(&ended),
                Some(recovery) = self.recoveries.1.recv() => self.note_recovery(recovery),
                () = sleep_until(recover_at) => self.recover_due(),
                Ok(()) = views.changed() => {
                    let view = Arc::clone(&views.borrow_and_update());
                    self.follow_catalogue(&view);
                }
                _ = watermarks.tick() => self.tell_watermarks(),
                _ = turn.tick() => self.turn_journal(),
                _ = trim.tick() => self.trim_letters(),
                _ = positions.tick() => {
                    self.write_positions();
                    self.write_marks();
                }
                () = supervisor.stopping() => {}
            }
        }
        // The queues' tasks flush by themselves; their leases go back when they have. A task that is held is told by its errand
        // how to go on.
        while self.errands.are_under_way() || self.slots.values().any(|slot| slot.running > 0) {
            tokio::select! {
                Some(visit) = self.errands.visits.recv() => visit(&mut self),
                Some(ended) = self.ended.1.recv() => self.forget_task(&ended),
                else => break,
            }
        }
        for slot in self.slots.keys() {
            self.cluster.release(&slot.lease_name());
        }
    }

    fn add(&mut self, row: QueueRow) {
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
                marked: None,
                mailbox: None,
                is_recovering: false,
                is_renewing: false,
            },
        );
        self.shared.metrics.queues.set(self.queues.len() as i64);
        match self.slots.entry(slot) {
            Entry::Occupied(mut occupied) => occupied.get_mut().void_recovery(),
            Entry::Vacant(vacant) => {
                vacant.insert(SlotState::default());
                self.hold(slot);
            }
        }
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

    fn write_known(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<QueueName, Known>> {
        self.shared
            .queues
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the dispatcher and the handles see what the queue's row says.
    fn show_row(&mut self, id: QueueId) {
        let Some(owned) = self.queues.get(&id) else {
            return;
        };
        if let Some(state) = self.slots.get_mut(&owned.row.slot) {
            state.void_recovery();
        }
        let patterns = owned.row.patterns.clone().into();
        owned.dispatch.subscribe(id, patterns);
        if let Some(known) = self.write_known().get_mut(&owned.row.name) {
            let log_behind = known.description.log_behind;
            known.description = describe(&owned.row);
            known.description.log_behind = log_behind;
        }
    }

    fn start_task(&mut self, recovered: Recovered, fence: &Fence) {
        let owned = self.queues.get(&recovered.machine.id());
        if owned.is_none_or(|owned| owned.is_renewing) {
            // What was read may be of the generation that ends. It is read again when the next one has begun.
            return;
        }
        if let Some(end) = recovered.log_end {
            return self.note_behind(recovered, end);
        }
        let Recovered {
            machine,
            unfolded,
            redrives,
            ..
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
            folds: self.folds.clone(),
            contact: Arc::clone(&self.contact),
            reads: Arc::clone(&self.reads),
            scans: self.scans.clone(),
            progress: Arc::clone(&owned.progress),
            supervisor: self.supervisor.clone(),
        };
        let task = Task::new(parts, machine, unfolded, redrives);
        let ended = self.ended.0.clone();
        if let Some(state) = self.slots.get_mut(&slot) {
            state.task_began();
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

    /// Sends a task something without waiting: its mailbox may be full while it does not answer.
    fn post(&self, mailbox: &mpsc::Sender<Command>, command: Command) {
        if let Err(TrySendError::Full(command)) = mailbox.try_send(command) {
            let mailbox = mailbox.clone();
            self.supervisor
                .spawn("queue post", OnEnd::Ordinary, async move {
                    let _ = mailbox.send(command).await;
                });
        }
    }

    /// Has queues remove dead letters that were kept long enough: a bounded number each time.
    fn trim_letters(&mut self) {
        // This process' own count since its start, and its machine's clock: no clock that jumps ahead deletes anything by itself.
        let witness = self.cluster.now().min(chrono::Utc::now());
        self.beside("queue trim", move |errand| async move {
            let database = &errand.database;
            let seconds = REDRIVE_RETENTION.as_secs_f64();
            let _ = store::redrive::delete_old_redrives(database, seconds, witness).await;
            let seconds = DEAD_LETTER_RETENTION.as_secs_f64();
            match store::letter::find_old_letters(database, seconds, witness).await {
                Ok(old) => {
                    let _ = errand.visit(|engine| engine.post_trims(old)).await;
                }
                Err(error) => tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "looking for old dead letters failed; trying again"
                ),
            }
        });
    }

    fn post_trims(&self, old: Vec<(QueueId, Vec<Offset>)>) {
        for (queue, letters) in old {
            let owned = self.queues.get(&queue);
            if let Some(mailbox) = owned.and_then(|owned| owned.mailbox.as_ref()) {
                let _ = mailbox.try_send(Command::Trim { letters });
            }
        }
    }

    /// Turns the journal when its segment is full, and asks queues for checkpoints that keep an old one from going.
    fn turn_journal(&mut self) {
        let groups = self.shared.metrics.groups.get();
        let is_as_it_was =
            |&(then, at): &(u64, Instant)| then == groups && at.elapsed() < TURN_AGAIN;
        if self.turned.as_ref().is_some_and(is_as_it_was) {
            return;
        }
        self.turned = None;
        let full_bytes = self.options.journal_full_bytes;
        let full_after = self.options.journal_full_after.as_secs_f64();
        self.beside("queue journal", move |errand| async move {
            let turned = store::journal::turn_journal(&errand.database, full_bytes, full_after);
            match turned.await {
                Ok((turn, left)) => {
                    let _ = errand
                        .visit(move |engine| engine.note_turn(groups, turn, left))
                        .await;
                }
                Err(error) => tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "turning the journal failed; trying again"
                ),
            }
        });
    }

    /// The journal is at this turn, and so many queues keep an old segment from going. `groups`: how many this process had
    /// written before the look.
    fn note_turn(&mut self, groups: u64, turn: i64, left: i32) {
        let former = self.turn.replace(turn);
        if left == 0 {
            // A turn leaves a segment to truncate at the next look.
            let is_still = former == Some(turn);
            self.turned = is_still.then(|| (groups, Instant::now()));
            return;
        }
        for owned in self.queues.values() {
            if let Some(mailbox) = &owned.mailbox {
                let _ = mailbox.try_send(Command::Fold { before_turn: turn });
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
