//! The task's side of a new generation: the task holds still, is told how to go on, and goes on in place.

use std::sync::atomic::Ordering;

use futures_util::stream::FuturesUnordered;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Task;
use super::intake::Intake;
use crate::queue::api::Promises;
use crate::queue::ask::{Held, Verdict, Why};

/// A task's state of being held.
#[derive(Debug)]
pub(super) enum Hold {
    /// Its decisions are being written.
    Draining {
        keeps_redriven: bool,
        reply: oneshot::Sender<Held>,
    },
    /// It waits.
    Still {
        carried: Vec<u8>,
        verdict: oneshot::Receiver<Verdict>,
    },
}

impl Task {
    /// A round of a held task: nothing is decided, long polls end as they were asked to.
    pub(super) fn hold_round(&mut self) {
        self.end_waits();
        self.submit();
        let is_drained = !self.is_writing() && !self.folds.is_sent() && self.answers.is_empty();
        let Some(Hold::Draining { .. }) = self.hold.as_ref().filter(|_| is_drained) else {
            return;
        };
        let Some(Hold::Draining {
            keeps_redriven,
            reply,
        }) = self.hold.take()
        else {
            return;
        };
        let progress = &self.parts.progress;
        progress.idle.store(false, Ordering::SeqCst);
        progress.watermark.store(0, Ordering::Release);
        let carried = self.machine.carried(keeps_redriven, self.now());
        let (go_on, verdict) = oneshot::channel();
        let held = Held {
            carried: carried.clone(),
            go_on,
        };
        self.hold = Some(Hold::Still { carried, verdict });
        if reply.send(held).is_err() {
            // Nobody waits for it any more, and nothing was done.
            self.hold = None;
            let watermark = self.machine.watermark().0;
            self.parts
                .progress
                .watermark
                .store(watermark, Ordering::Release);
        }
    }

    /// The time when a held task has work of its own: the end of a long poll.
    pub(super) fn wake_held_at(&self) -> Instant {
        let far = Instant::now() + std::time::Duration::from_secs(3_600);
        self.waiters.next_end().map_or(far, |(until, _)| until)
    }

    /// Goes on as told; or as before, if it is not still yet and nobody waits for that.
    pub(super) fn go_on(&mut self, verdict: Option<Verdict>) {
        let Some(Hold::Still { carried, .. }) = self.hold.take() else {
            return;
        };
        let Some(Verdict::Renewed {
            generation,
            start_offset,
        }) = verdict
        else {
            self.ending = Some(Why::Told);
            return;
        };
        let next = self
            .machine
            .next_generation(&carried, generation, start_offset);
        match next {
            Ok(next) => self.machine = next,
            Err(error) => {
                tracing::error!(queue = %self.parts.name, error = &error as &dyn std::error::Error, "the state of a new generation cannot be read");
                self.ending = Some(Why::Refused);
                return;
            }
        }
        self.parts.dispatch.detach(&self.parts.feed);
        let received_at = self.intake.received_at();
        self.intake = Intake::new(&self.parts.stream, self.parts.stream_id);
        self.intake.set_received_at(received_at);
        // Reads under way are of the former generation. A repeated receive among them asks again.
        self.work = FuturesUnordered::new();
        self.promises = Promises::default();
        self.redrives.forget_reads();
        self.forget_marks();
        self.begin_unfolded();
        let watermark = self.machine.watermark().0;
        self.parts
            .progress
            .watermark
            .store(watermark, Ordering::Release);
    }

    /// Told to stop while held: which generation it is in must be known before anything is flushed.
    pub(super) async fn await_verdict(&mut self) {
        match &mut self.hold {
            Some(Hold::Still { verdict, .. }) => {
                let verdict = verdict.await.ok();
                self.go_on(verdict);
            }
            // Nobody gets to carry it out.
            Some(Hold::Draining { .. }) => self.hold = None,
            None => {}
        }
    }
}

/// The instruction to a held task; None when there will be none. Never resolves when the task is not held. Cancel-safe.
pub(super) async fn told(hold: &mut Option<Hold>) -> Option<Verdict> {
    match hold {
        Some(Hold::Still { verdict, .. }) => verdict.await.ok(),
        Some(Hold::Draining { reply, .. }) => {
            reply.closed().await;
            None
        }
        None => std::future::pending().await,
    }
}
