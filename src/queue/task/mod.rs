//! One queue's task: the pure state machine, with the mailbox, the journal, the feed and the clock around it.
//!
//! The state in memory runs ahead of the journal; answers do not. Decisions since the last submission go to the writer as
//! one part, one part at a time, and answers leave when the part that holds their decisions, or any later one, is
//! committed. A refused or fenced part ends the task: its state is dropped, and the slot's owner reads it again.

mod ahead;
mod commands;
mod drain;
mod fold;
mod hold;
mod intake;
mod letters;
mod message;
mod order;
mod part;
mod receive;
mod redrive;
mod rejoin;
mod waiters;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::domain::id::{Fence, Offset, Slot, StreamId};
use crate::domain::message::Entry;
use crate::domain::name::{QueueName, TopicPattern};
use crate::domain::queue::{At, Queue, Verb};
use crate::domain::receipt::Receipt;
use crate::queue::api::{Act, Acted, ENDED, Error, Promises, Received, Status};
use crate::queue::ask::{Acks, Command, Ended, Why};
use crate::queue::log::feed::{Dispatch, Feed};
use crate::queue::log::letters::{Fetched, Letters};
use crate::queue::log::scans::Scans;
use crate::queue::shared::{Progress, Shared};
use crate::queue::writer::{Contact, Outage, Submission};
use crate::store::redrive::RedriveRow;
use crate::supervisor::Supervisor;
use crate::{cluster, failpoint, store, stream};
use drain::Drain;
use fold::{Folds, folded};
use hold::{Hold, told};
use intake::{Intake, Loaded};
use order::{Marked, Marks};
use part::{Answer, Submitted, committed};
use redrive::Redrives;
use rejoin::Rejoin;
use waiters::Waiters;

/// How often the scan position of a quiet queue is journaled, if it moved far enough to be worth a row.
const POSITION_EVERY: Duration = Duration::from_secs(30);
const POSITION_WORTH: i64 = 10_000;

/// The parts of a task.
pub(super) struct Parts {
    pub(super) name: QueueName,
    pub(super) stream_id: StreamId,
    pub(super) slot: Slot,
    pub(super) fence: Fence,
    pub(super) patterns: Arc<[TopicPattern]>,
    /// Nothing is handed out.
    pub(super) is_paused: bool,
    pub(super) shared: Arc<Shared>,
    pub(super) letters: Letters,
    pub(super) stream: stream::Handle,
    pub(super) cluster: cluster::Handle,
    pub(super) dispatch: Arc<Dispatch>,
    pub(super) feed: Arc<Feed>,
    pub(super) mailbox: mpsc::Receiver<Command>,
    pub(super) writer: mpsc::Sender<Submission>,
    /// The channel of checkpoints' chunks: they give way to everything else.
    pub(super) folds: mpsc::Sender<Submission>,
    pub(super) contact: Arc<Contact>,
    pub(super) reads: Arc<Semaphore>,
    pub(super) scans: Scans,
    pub(super) progress: Arc<Progress>,
    pub(super) supervisor: Supervisor,
}

/// The results of work beside the task's loop.
enum Done {
    Scanned(Result<stream::Scanned, stream::Error>),
    Loaded(Loaded),
    Replayed {
        receive_id: String,
        reply: oneshot::Sender<Result<Received, Error>>,
        fetched: Result<Fetched, stream::Error>,
    },
    Looked {
        offset: Offset,
        act: Act,
        reply: oneshot::Sender<Result<Acted, Error>>,
        entries: Result<Vec<Arc<Entry>>, stream::Error>,
    },
    Marked(Marked),
    Redrive(redrive::Found),
    Probed,
    Told,
}

type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

pub(super) struct Task {
    parts: Parts,
    machine: Queue,
    intake: Intake,
    marks: Marks,
    work: FuturesUnordered<Work>,
    waiters: Waiters,
    promises: Promises,
    redrives: Redrives,
    /// Each with the number of the piece of decisions that it waits for.
    answers: Vec<(u64, Answer)>,
    submitted: Option<Submitted>,
    /// The time since when decisions wait to be submitted.
    decided_at: Option<Instant>,
    /// The time until when decisions without urgency wait for others.
    linger_until: Option<Instant>,
    /// The consumers that are likely to be back after the last part.
    rejoin: Rejoin,
    /// The time until when decisions wait for them.
    rejoin_until: Option<Instant>,
    returned: (
        mpsc::UnboundedSender<Vec<Receipt>>,
        mpsc::UnboundedReceiver<Vec<Receipt>>,
    ),
    outage: watch::Receiver<Outage>,
    moved: i64,
    is_probing: bool,
    drain: Drain,
    folds: Folds,
    /// The turn of the first journal row that no checkpoint holds yet.
    unfolded_turn: Option<i64>,
    position_at: Instant,
    ending: Option<Why>,
    /// The slot is assigned to another node: finish.
    is_yielding: bool,
    /// Nothing is decided, since a new generation is about to begin.
    hold: Option<Hold>,
}

impl Task {
    /// `unfolded`: whether the journal has rows of the queue that no checkpoint holds. `redrives`: those that run.
    pub(super) fn new(
        parts: Parts,
        mut machine: Queue,
        unfolded: bool,
        redrives: Vec<RedriveRow>,
    ) -> Self {
        let outage = parts.contact.outage();
        let moved = outage.borrow().moved;
        let intake = Intake::new(&parts.stream, parts.stream_id);
        let set_back = machine.meet_clock(At::from(parts.cluster.now()));
        if set_back > 0 {
            tracing::warn!(
                queue = %parts.name, messages = set_back,
                "the database's clock was ahead when messages were handed out or delayed: their time begins now"
            );
        }
        parts
            .progress
            .watermark
            .store(machine.watermark().0, Ordering::Release);
        Self {
            machine,
            intake,
            marks: Marks::default(),
            work: FuturesUnordered::new(),
            waiters: Waiters::default(),
            promises: Promises::default(),
            redrives: Redrives::new(redrives),
            answers: Vec::new(),
            submitted: None,
            decided_at: None,
            linger_until: None,
            rejoin: Rejoin::default(),
            rejoin_until: None,
            returned: mpsc::unbounded_channel(),
            outage,
            moved,
            is_probing: false,
            drain: Drain::new(Instant::now()),
            folds: Folds::default(),
            unfolded_turn: unfolded.then_some(i64::MIN),
            position_at: Instant::now() + POSITION_EVERY,
            ending: None,
            is_yielding: false,
            hold: None,
            parts,
        }
    }

    pub(super) async fn run(mut self) -> Ended {
        let supervisor = self.parts.supervisor.clone();
        self.learn_order().await;
        while self.ending.is_none() && !self.is_yielding && !supervisor.is_stopping() {
            self.round();
            let wake_at = self.wake_at();
            tokio::select! {
                command = self.parts.mailbox.recv(), if self.hold.is_none() && !self.drain.is_on() => self.take_commands(command),
                Some(first) = self.returned.1.recv() => self.take_back(first),
                verdict = told(&mut self.hold) => self.go_on(verdict),
                written = committed(&mut self.submitted) => self.finish_part(written),
                written = folded(&mut self.folds) => self.finish_fold(written),
                Some(done) = self.work.next() => self.finish_work(done),
                () = self.parts.feed.filled() => {}
                () = self.intake.floor_raised() => {}
                _ = self.outage.changed() => {}
                () = tokio::time::sleep_until(wake_at) => {}
                () = supervisor.stopping() => {}
            }
        }
        let why = match self.ending {
            Some(why) => self.end(why).await,
            None => self.flush().await,
        };
        self.await_fold().await;
        self.parts.progress.idle.store(false, Ordering::Release);
        Ended {
            queue: self.machine.id(),
            slot: self.parts.slot,
            fence: self.parts.fence,
            why,
        }
    }

    fn now(&self) -> At {
        At::from(self.parts.cluster.now())
    }

    /// The journal has nothing of the generation that has just begun: its checkpoint was written with it.
    fn begin_unfolded(&mut self) {
        self.unfolded_turn = None;
        self.folds = Folds::default();
        self.is_probing = false;
    }

    /// Whether decisions wait for their commit.
    fn is_writing(&self) -> bool {
        self.submitted.is_some() || self.machine.has_batch()
    }

    fn is_standing(&self) -> bool {
        self.outage.borrow().standing
    }

    /// Everything that can be decided now.
    fn round(&mut self) {
        if self.hold.is_some() {
            return self.hold_round();
        }
        // In this order: a confirmation after an outage is told after the outage's move of the deadlines.
        let mut confirmed = self.parts.contact.confirmed();
        let mut outage = *self.outage.borrow_and_update();
        if failpoint::is_mutant("expiry-while-away") {
            (confirmed, outage.standing, outage.moved) = (self.now(), false, self.moved);
        }
        let moved = outage.moved - self.moved;
        if moved > 0 {
            self.moved = outage.moved;
            self.machine
                .shift(Duration::from_millis(moved.unsigned_abs()));
        }
        self.take_in();
        self.ask_marks();
        self.give_up_dropped();
        if !outage.standing {
            // A redrive's step is written with the piece that records it, which has to be the next one.
            if !self.machine.is_split() {
                self.drain.turned(Instant::now());
                self.redrive();
            }
            let now = self.now();
            self.machine.advance(now, confirmed);
            let is_over = |deadline: At| deadline <= now;
            if self.next_deadline().is_some_and(is_over) && !self.is_probing {
                self.probe();
            }
            self.serve();
        }
        self.end_waits();
        self.journal_position();
        self.submit_unless_lingering();
        self.fold_on();
        self.decide_drain();
        self.note_idle();
        self.note_counts();
    }

    fn note_counts(&self) {
        let (counts, progress) = (self.machine.counts(), &self.parts.progress);
        let depth = counts.fresh + counts.again + counts.live + counts.delayed;
        for (noted, now) in [
            (&progress.depth, depth),
            (&progress.live, counts.live),
            (&progress.delayed, counts.delayed),
            (&progress.dead, counts.dead),
            (&progress.waiters, self.waiters.len() as u64),
        ] {
            noted.store(now, Ordering::Relaxed);
        }
        progress
            .is_paused
            .store(self.parts.is_paused, Ordering::Relaxed);
    }

    /// A deadline is over, and Postgres was not heard of since: nobody is charged before it answers.
    fn probe(&mut self) {
        let (reply, answer) = oneshot::channel();
        if self.parts.writer.try_send(Submission::Probe(reply)).is_ok() {
            self.is_probing = true;
            self.work.push(Box::pin(async move {
                let _ = answer.await;
                Done::Probed
            }));
        }
    }

    fn decide_drain(&mut self) {
        let instant = Instant::now();
        if self.is_standing() {
            return self.drain.decide(instant, false, false);
        }
        let is_over = |deadline: At| deadline <= self.now();
        let has_due = self.machine.next_deadline().is_some_and(is_over)
            || self.redrive_at(instant).is_some_and(|at| at <= instant);
        self.drain.decide(instant, has_due, self.folds.waits());
    }

    /// The time when the next delivery expires; while there is much to write, expired ones wait for that.
    fn next_deadline(&self) -> Option<At> {
        let deadline = self.machine.next_deadline();
        deadline.filter(|_| !self.machine.is_split())
    }

    fn wake_at(&self) -> Instant {
        if self.hold.is_some() {
            return self.wake_held_at();
        }
        let instant = Instant::now();
        let now = self.now();
        let mut wake_at = self.intake.retry_at(instant);
        if let Some(until) = self.drain.until() {
            wake_at = wake_at.min(until);
        }
        // Nothing is journaled meanwhile, so its time may be over for long.
        let has_position = !self.is_quiet() || self.intake.has_loaded();
        if has_position && !self.is_standing() {
            wake_at = wake_at.min(self.position_at);
        }
        if !self.is_standing()
            && !self.machine.is_split()
            && let Some(at) = self.redrive_at(instant)
        {
            wake_at = wake_at.min(at);
        }
        let ends = self.waiters.next_end().map(|(until, _)| until);
        // Nobody is served, so a batch's time to fill may be over for long.
        let is_served = !self.parts.is_paused && !self.is_standing();
        let fills = self.waiters.fills_until().filter(|_| is_served);
        let submits = self.linger_until.or(self.rejoin_until);
        for until in [ends, fills, submits].into_iter().flatten() {
            wake_at = wake_at.min(until);
        }
        if !self.is_standing() {
            let deadline = self.next_deadline().filter(|_| !self.is_probing);
            for at in [deadline, self.machine.next_due()].into_iter().flatten() {
                // A millisecond later, since both clocks are cut to milliseconds.
                wake_at = wake_at.min(instant + at.since(now) + Duration::from_millis(1));
            }
        }
        wake_at
    }

    fn take_back_returned(&mut self) {
        if let Ok(first) = self.returned.1.try_recv() {
            self.take_back(first);
        }
    }

    fn take_back(&mut self, first: Vec<Receipt>) {
        let now = self.now();
        let mut next = Some(first);
        while let Some(receipts) = next {
            self.parts
                .shared
                .metrics
                .unwritten
                .inc_by(receipts.len() as u64);
            for receipt in &receipts {
                self.machine.take_back(receipt, now);
            }
            next = self.returned.1.try_recv().ok();
        }
    }

    fn status(&self) -> Status {
        let counts = self.machine.counts();
        let oldest = self.machine.oldest_unsettled();
        let idle = self.parts.progress.idle.load(Ordering::Acquire);
        // An idle queue is not told of what it does not match.
        let done = if idle {
            self.parts.dispatch.done()
        } else {
            Offset(0)
        };
        Status {
            depth: counts.fresh + counts.again + counts.live + counts.delayed,
            in_flight: counts.live,
            delayed: counts.delayed,
            ready: counts.fresh + counts.again - counts.waiting,
            waiting: counts.waiting,
            lanes: counts.lanes,
            blocked_keys: Vec::new(),
            dead_letters: counts.dead,
            waiters: self.waiters.len() as u64,
            watermark: self.machine.watermark().max(done),
            scanned_through: self.machine.scanned_through().max(done),
            oldest_unsettled: oldest,
            oldest_unsettled_at: oldest.and_then(|offset| self.intake.appended_at(offset)),
            ahead: self.machine.start().0 > self.intake.log_end().max(done).0 + 1,
            standing_still: self.is_standing(),
        }
    }

    /// The position of a queue that has something to do, and nobody who does it, is worth a row now and then: it is where the
    /// scan goes on after a restart. Those with nothing to do share a row of their slot (`positions.rs`).
    fn journal_position(&mut self) {
        let now = Instant::now();
        if now < self.position_at || self.is_standing() {
            return;
        }
        self.position_at = now + POSITION_EVERY;
        self.intake.forget_if_unused();
        if self.is_quiet() {
            return;
        }
        let behind = self.machine.scanned_through().0 - self.machine.journaled_through().0;
        if behind >= POSITION_WORTH {
            self.machine.journal_scan(self.machine.scanned_through());
        }
    }

    fn finish_work(&mut self, done: Done) {
        match done {
            Done::Probed => self.is_probing = false,
            Done::Told => {}
            Done::Marked(marked) => self.finish_marks(marked),
            Done::Redrive(found) => self.finish_found(found),
            Done::Scanned(scanned) => self.finish_scan(scanned),
            Done::Loaded(loaded) => self.finish_load(loaded),
            Done::Looked {
                offset,
                act,
                reply,
                entries,
            } => self.finish_look((offset, act, reply), entries),
            Done::Replayed {
                receive_id,
                reply,
                fetched,
            } => self.finish_replay(&receive_id, reply, fetched),
        }
    }

    /// Ends before the process does. Waits for the parts that the writer has: the next reader of the state must find them written,
    /// or never written. Callers that wait for something else learn that nothing was decided.
    async fn end(&mut self, why: Why) -> Why {
        self.ending = Some(why);
        for waiter in self.waiters.take_all() {
            let _ = waiter.reply.send(Err(ENDED));
        }
        self.parts.mailbox.close();
        while let Ok(command) = self.parts.mailbox.try_recv() {
            command.refuse(&|| ENDED);
        }
        if self.submitted.is_some() {
            let written = committed(&mut self.submitted).await;
            self.finish_part(written);
        }
        self.ending.unwrap_or(why)
    }

    /// Told to stop: long polls answer, and decisions are written, with the scan position. When the slot is assigned to another
    /// node, long polls go on there, and so do requests that were not looked at yet.
    async fn flush(&mut self) -> Why {
        self.await_verdict().await;
        if let Some(why) = self.ending {
            return self.end(why).await;
        }
        let queue = self.parts.name.clone();
        let elsewhere = || Error::NotOwner {
            queue: queue.clone(),
        };
        if self.is_yielding {
            self.parts.mailbox.close();
        }
        for waiter in self.waiters.take_all() {
            let answer = match self.is_yielding {
                true => Err(elsewhere()),
                false => Ok(self.empty()),
            };
            let _ = waiter.reply.send(answer);
        }
        while let Ok(command) = self.parts.mailbox.try_recv() {
            match command {
                Command::Settle { verb, items, reply } => self.settle(verb, &items, false, reply),
                command if self.is_yielding => command.refuse(&elsewhere),
                Command::Receive { reply, acks, .. } => {
                    if let Some(Acks { items, reply }) = acks {
                        self.settle(Verb::Ack, &items, false, reply);
                    }
                    let _ = reply.send(Ok(self.empty()));
                }
                _ => {}
            }
        }
        self.take_back_returned();
        self.machine.journal_scan(self.machine.scanned_through());
        loop {
            self.submit();
            if let Some(why) = self.ending {
                return why;
            }
            if self.submitted.is_none() {
                return Why::Told;
            }
            let written = committed(&mut self.submitted).await;
            self.finish_part(written);
        }
    }
}

/// Whether an error of the stream is worth a word: an outage is told by the writer.
fn log_read_failure(queue: &QueueName, error: &stream::Error) {
    // Of a scan that is shared, one queue is told what failed.
    let is_told = matches!(error, stream::Error::Stopping)
        || matches!(error, stream::Error::Store(error) if error.retry() == store::Retry::Backoff);
    if !is_told {
        tracing::warn!(%queue, error = error as &dyn std::error::Error, "reading messages for a queue failed");
    }
}
