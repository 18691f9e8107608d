//! Redrives, as the queue's task runs them: dead letters come back in offset order, at the requested rate, a batch at a
//! time.
//!
//! The effects of a batch are a step: the letters' marks and the counts on the redrive's row, written by the very group
//! that journals the machine's record. So after a kill the row says exactly which letters came back, and the redrive goes
//! on behind them. Letters are read ahead in blocks; the machine knows which of them are still dead when their turn comes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::ahead::{Ahead, Block};
use super::part::Answer;
use super::{Done, Task};
use crate::domain::id::Offset;
use crate::domain::letter::{REDRIVES_MAX, RedriveStatus};
use crate::domain::policy::Ordering;
use crate::queue::api::{DryRun, Error, NewRedrive};
use crate::queue::ask::Reply;
use crate::store;
use crate::store::redrive::{RedriveRow, RedriveStep};

/// Most letters of one batch.
const BATCH_MAX: usize = 1_000;
/// How much time the letters of one batch make up for.
const BATCH_EVERY: Duration = Duration::from_millis(250);
/// A redrive that fell behind its rate makes up for this much at once.
const BEHIND_MAX: Duration = Duration::from_secs(1);
/// A read that failed is tried again after this.
const RETRY: Duration = Duration::from_millis(250);
/// Letters that the queue's scan has not come to are looked at again after this.
const SCAN_AGAIN: Duration = Duration::from_millis(20);

/// The caller that waits for the redrive.
#[derive(Debug)]
enum Asker {
    Nobody,
    /// For its row, with the total.
    Begin(Reply<RedriveRow>),
    /// For the end of a dry run.
    DryRun(Reply<DryRun>),
}

/// One that runs.
#[derive(Debug)]
struct Running {
    row: RedriveRow,
    asker: Asker,
    is_dry: bool,
    /// Its row is committed.
    is_begun: bool,
    /// None while a read has it.
    block: Option<Block>,
    next_at: Instant,
}

/// The redrives of one queue.
#[derive(Debug, Default)]
pub(super) struct Redrives {
    running: Vec<Running>,
    steps: Vec<RedriveStep>,
    retry_at: Option<Instant>,
}

/// The result of a read for a redrive.
#[derive(Debug)]
pub(super) enum Found {
    Counted(String, Result<u64, Error>),
    Block(String, Result<Block, Error>),
}

impl Redrives {
    /// The running redrives, from their rows.
    pub(super) fn new(rows: Vec<RedriveRow>) -> Self {
        let running = rows.into_iter().map(|row| {
            let mut running = Running::new(row, Asker::Nobody);
            running.is_begun = true;
            running
        });
        Self {
            running: running.collect(),
            ..Self::default()
        }
    }

    /// The reads under way will bring nothing: what they were to read is read again.
    pub(super) fn forget_reads(&mut self) {
        for running in &mut self.running {
            running.block = Some(Block::default());
        }
    }

    /// The steps to write with the next group.
    pub(super) fn take_steps(&mut self) -> Vec<RedriveStep> {
        std::mem::take(&mut self.steps)
    }

    pub(super) fn has_steps(&self) -> bool {
        !self.steps.is_empty()
    }

    fn find(&mut self, id: &str) -> Option<&mut Running> {
        self.running.iter_mut().find(|running| running.row.id == id)
    }

    /// The step of a redrive in the next group, with its current numbers. They are totals, so that a group that is written again
    /// changes nothing.
    fn step(&mut self, row: &RedriveRow) -> &mut RedriveStep {
        let place = match self.steps.iter().position(|step| step.id == row.id) {
            Some(place) => place,
            None => {
                self.steps.push(RedriveStep {
                    id: row.id.clone(),
                    ..RedriveStep::default()
                });
                self.steps.len() - 1
            }
        };
        let step = &mut self.steps[place];
        step.through = row.through;
        step.total = row.total;
        step.redriven = row.redriven;
        step.skipped = row.skipped;
        step.late = row.late;
        step
    }
}

impl Running {
    fn new(row: RedriveRow, asker: Asker) -> Self {
        Self {
            row,
            is_dry: matches!(asker, Asker::DryRun(_)),
            asker,
            is_begun: false,
            block: Some(Block::default()),
            next_at: Instant::now(),
        }
    }

    /// How many letters the next batch has.
    fn batch(&self) -> usize {
        let per_batch = |rate: u32| (f64::from(rate) * BATCH_EVERY.as_secs_f64()) as usize;
        let rate = self.row.rate_per_second;
        rate.map_or(BATCH_MAX, |rate| per_batch(rate).clamp(1, BATCH_MAX))
    }

    /// Keeps to the rate, over batches that came late as well.
    fn pace(&mut self, count: usize) {
        let now = Instant::now();
        self.next_at = match self.row.rate_per_second {
            Some(rate) => {
                let takes = Duration::from_secs_f64(count as f64 / f64::from(rate));
                let from = now.checked_sub(BEHIND_MAX).unwrap_or(now);
                self.next_at.max(from) + takes
            }
            None => now,
        };
    }

    fn is_abandoned(&self) -> bool {
        matches!(&self.asker, Asker::DryRun(reply) if reply.is_closed())
    }
}

impl Task {
    /// Begins a redrive. Its row is written with the next group; only then are letters read: those that died before are
    /// committed by then.
    pub(super) fn begin_redrive(&mut self, new: NewRedrive, reply: Reply<RedriveRow>) {
        if let Some(running) = self.redrives.find(&new.id) {
            let row = Box::new(running.row.clone());
            return self.answer_later(Answer::Redrive { reply, row });
        }
        if self.redrives.running.len() >= REDRIVES_MAX {
            let _ = reply.send(Err(Error::TooManyRedrives {
                limit: REDRIVES_MAX,
            }));
            return;
        }
        let row = self.new_row(&new);
        let step = self.redrives.step(&row);
        step.created_at = Some(row.created_at);
        step.selection = Some(new.selection);
        step.rate_per_second = new.rate_per_second;
        self.answer_later(Answer::Begun { id: new.id });
        let running = Running::new(row, Asker::Begin(reply));
        self.redrives.running.push(running);
    }

    fn new_row(&self, new: &NewRedrive) -> RedriveRow {
        RedriveRow {
            id: new.id.clone(),
            created_at: self.now().into(),
            selection: new.selection.clone(),
            rate_per_second: new.rate_per_second,
            status: RedriveStatus::Running,
            finished_at: None,
            total: None,
            redriven: 0,
            skipped: 0,
            late: 0,
            through: Offset(0),
        }
    }

    /// Counts the effects of a redrive. Like a redrive, it waits for decisions that are not committed yet.
    pub(super) fn dry_run(&mut self, new: &NewRedrive, reply: Reply<DryRun>) {
        if self.redrives.running.len() >= REDRIVES_MAX {
            let _ = reply.send(Err(Error::TooManyRedrives {
                limit: REDRIVES_MAX,
            }));
            return;
        }
        let row = self.new_row(new);
        self.answer_later(Answer::Begun { id: new.id.clone() });
        let running = Running::new(row, Asker::DryRun(reply));
        self.redrives.running.push(running);
    }

    /// The redrive's row is committed.
    pub(super) fn redrive_is_begun(&mut self, id: &str) {
        if let Some(running) = self.redrives.find(id) {
            running.is_begun = true;
        }
    }

    /// Ends a redrive where it stands. Answered after the commit.
    pub(super) fn cancel_redrive(&mut self, id: &str, reply: Reply<()>) {
        self.finish_redrive(id, RedriveStatus::Cancelled);
        self.answer_later(Answer::Done { reply });
    }

    fn finish_redrive(&mut self, id: &str, status: RedriveStatus) {
        let place = self.redrives.running.iter().position(|r| r.row.id == id);
        let Some(place) = place else {
            return;
        };
        let mut running = self.redrives.running.remove(place);
        let now = self.now().into();
        running.row.status = status;
        running.row.finished_at = Some(now);
        if status == RedriveStatus::Done {
            // Letters that were counted and were gone when their turn came.
            let left = running
                .row
                .total
                .unwrap_or(0)
                .saturating_sub(running.row.redriven);
            running.row.skipped = running.row.skipped.max(left);
        }
        match running.asker {
            Asker::DryRun(reply) => {
                let _ = reply.send(Ok(DryRun {
                    matching: running.row.redriven,
                    late: running.row.late,
                }));
                return;
            }
            Asker::Begin(reply) => {
                let row = Box::new(running.row.clone());
                self.answer_later(Answer::Redrive { reply, row });
            }
            Asker::Nobody => {}
        }
        let step = self.redrives.step(&running.row);
        step.status = Some(status);
        step.at = Some(now);
        tracing::info!(queue = %self.parts.name, redrive = id, status = status.as_str(), redriven = running.row.redriven, "a redrive ended");
    }

    /// The time of the next work for a redrive.
    pub(super) fn redrive_at(&self, instant: Instant) -> Option<Instant> {
        if let Some(retry_at) = self.redrives.retry_at {
            return Some(retry_at);
        }
        if self.machine.redrive_room() == 0 {
            return None;
        }
        let ready = self.redrives.running.iter();
        let ready = ready.filter(|running| running.is_begun && running.block.is_some());
        ready.map(|running| running.next_at.max(instant)).min()
    }

    /// Whatever redrives can do now.
    pub(super) fn redrive(&mut self) {
        let now = Instant::now();
        if self.redrives.retry_at.is_some_and(|at| at > now) {
            return;
        }
        self.redrives.retry_at = None;
        self.redrives
            .running
            .retain(|running| !running.is_abandoned());
        let due = self.redrives.running.iter();
        let due = due.filter(|r| r.is_begun && r.block.is_some() && r.next_at <= now);
        let due: Vec<String> = due.map(|running| running.row.id.clone()).collect();
        for id in due {
            self.redrive_one(&id);
        }
    }

    fn redrive_one(&mut self, id: &str) {
        let room = self.machine.redrive_room();
        let (is_ordered, scanned) = (
            self.machine.settings().ordering == Ordering::Key,
            self.machine.scanned_through(),
        );
        let Some(running) = self.redrives.find(id) else {
            return;
        };
        if running.row.total.is_none() && !running.is_dry {
            return self.count_letters(id);
        }
        if room == 0 && !running.is_dry {
            return;
        }
        let Some(block) = &running.block else {
            return;
        };
        if block.is_ready(scanned) {
            let reach = match is_ordered {
                true => block.letters_through(scanned),
                false => usize::MAX,
            };
            if reach == 0 && !block.letters.is_empty() {
                // After a seek: what comes before these in their keys is still to be found.
                running.next_at = Instant::now() + SCAN_AGAIN;
                return;
            }
            return self.redrive_batch(id, room.min(reach));
        }
        let Some(block) = running.block.take() else {
            return;
        };
        let ahead = Ahead {
            selection: running.row.selection.clone(),
            before: running.row.created_at,
            after: running.row.through,
            letters: self.parts.letters.clone(),
            stream: self.parts.stream.clone(),
            stream_id: self.parts.stream_id,
            queue: self.machine.id(),
            patterns: Arc::clone(&self.parts.patterns),
            is_ordered,
            scan_to: scanned,
        };
        let id = id.to_owned();
        self.work.push(Box::pin(async move {
            let block = ahead.read(block).await;
            Done::Redrive(Found::Block(id, block))
        }));
    }

    fn count_letters(&mut self, id: &str) {
        let (letters, queue) = (self.parts.letters.clone(), self.machine.id());
        let Some(running) = self.redrives.find(id) else {
            return;
        };
        running.block = None;
        let (selection, before) = (running.row.selection.clone(), running.row.created_at);
        let id = id.to_owned();
        self.work.push(Box::pin(async move {
            let total = letters
                .ask(move |database| async move {
                    store::redrive::count_redrivable(&database, queue, &selection, before).await
                })
                .await;
            Done::Redrive(Found::Counted(id, total))
        }));
    }

    /// Brings the next letters of the block back, or counts them for a dry run.
    fn redrive_batch(&mut self, id: &str, room: usize) {
        let now = self.now();
        let Some(running) = self.redrives.find(id) else {
            return;
        };
        let Some(mut block) = running.block.take() else {
            return;
        };
        let most = if running.is_dry {
            BATCH_MAX
        } else {
            running.batch().min(room)
        };
        let batch = block.take_batch(most);
        let is_dry = running.is_dry;
        let back = match is_dry {
            true => batch.iter().map(|letter| letter.offset).collect(),
            false => self.machine.redrive(&batch, now),
        };
        let is_late = |&&offset: &&Offset| {
            let next = block.take_next(offset);
            next.is_some_and(|next| self.machine.is_done_with(next))
        };
        let late = back.iter().filter(is_late).count();
        let is_over = block.letters.is_empty() && block.is_end;
        let through = match block.letters.is_empty() {
            true => block.through.or(batch.last().map(|letter| letter.offset)),
            false => batch.last().map(|letter| letter.offset),
        };
        let Some(running) = self.redrives.find(id) else {
            return;
        };
        running.pace(batch.len());
        let row = &mut running.row;
        row.through = row.through.max(through.unwrap_or_default());
        row.redriven += back.len() as u64;
        row.skipped += (batch.len() - back.len()) as u64;
        row.late += late as u64;
        let row = row.clone();
        running.block = Some(block);
        if !is_dry {
            self.parts.shared.metrics.redriven.inc_by(back.len() as u64);
            let step = self.redrives.step(&row);
            step.at = Some(now.into());
            step.offsets.extend(back);
        }
        if is_over {
            self.finish_redrive(id, RedriveStatus::Done);
        }
    }

    pub(super) fn finish_found(&mut self, found: Found) {
        let failed = match found {
            Found::Counted(id, total) => self.finish_count(&id, total),
            Found::Block(id, block) => self.finish_block(&id, block),
        };
        if let Err(error) = failed {
            self.redrives.retry_at = Some(Instant::now() + RETRY);
            tracing::debug!(queue = %self.parts.name, error = &error as &dyn std::error::Error, "reading for a redrive failed; trying again");
        }
    }

    fn finish_count(&mut self, id: &str, total: Result<u64, Error>) -> Result<(), Error> {
        let Some(running) = self.redrives.find(id) else {
            return Ok(());
        };
        running.block = Some(Block::default());
        let asker = std::mem::replace(&mut running.asker, Asker::Nobody);
        let total = total.map(|total| running.row.total = Some(total));
        let row = running.row.clone();
        if total.is_ok() {
            self.redrives.step(&row);
        }
        if let Asker::Begin(reply) = asker {
            // Without a total when it could not be counted yet.
            let row = Box::new(row);
            self.answer_later(Answer::Redrive { reply, row });
        }
        total
    }

    fn finish_block(&mut self, id: &str, block: Result<Block, Error>) -> Result<(), Error> {
        let Some(running) = self.redrives.find(id) else {
            return Ok(());
        };
        match block {
            Ok(block) => running.block = Some(block),
            Err(error) => {
                running.block = Some(Block::default());
                return Err(error);
            }
        }
        Ok(())
    }
}
