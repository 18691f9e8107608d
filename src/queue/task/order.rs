//! Order by key and lanes, on the task's side. The machine needs attributes of messages that only the log has: the task
//! reads them when a queue is recovered or its order changes. The description names the blocked keys.

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::intake::RETRY;
use super::{Done, Task, log_read_failure};
use crate::domain::id::Offset;
use crate::domain::policy::Settings;
use crate::domain::queue::Found;
use crate::queue::api::{BlockedKey, Status};
use crate::stream::{self, Attributes};

/// Messages asked at a time.
const CHUNK: usize = 50_000;
/// Keys that the description names.
const BLOCKED_KEYS_MAX: usize = 20;

/// How far the marks are known while the machine arranges itself.
#[derive(Debug, Default)]
pub(super) struct Marks {
    through: Offset,
    is_asking: bool,
    /// Rises when the order changes again: earlier questions do not count.
    change: u64,
}

/// Marks that came.
#[derive(Debug)]
pub(super) struct Marked {
    through: Offset,
    change: u64,
    attributes: Result<Vec<Attributes>, stream::Error>,
}

impl Task {
    /// Before the first command is taken: an ack can be refused by order, too.
    pub(super) async fn learn_order(&mut self) {
        let supervisor = self.parts.supervisor.clone();
        while !supervisor.is_stopping() {
            self.ask_marks();
            if !self.machine.is_arranging() {
                return;
            }
            let retry_at = self.intake.retry_at(Instant::now());
            tokio::select! {
                Some(done) = futures_util::StreamExt::next(&mut self.work) => self.finish_work(done),
                () = tokio::time::sleep_until(retry_at) => {}
                () = supervisor.stopping() => {}
            }
        }
    }

    pub(super) fn change_settings(&mut self, settings: Settings) {
        self.machine.change_settings(settings);
        self.forget_marks();
    }

    /// Forgets earlier questions.
    pub(super) fn forget_marks(&mut self) {
        self.marks = Marks {
            change: self.marks.change + 1,
            ..Marks::default()
        };
    }

    /// Asks for the next marks, if the machine needs some.
    pub(super) fn ask_marks(&mut self) {
        if !self.machine.is_arranging() || self.marks.is_asking || !self.intake.may_read() {
            return;
        }
        let offsets = self.machine.unmarked(self.marks.through, CHUNK);
        let Some(&through) = offsets.last() else {
            self.machine.mark(None);
            self.marks.through = Offset(0);
            return;
        };
        self.marks.is_asking = true;
        let (stream, id) = (self.parts.stream.clone(), self.parts.stream_id);
        let (reads, change) = (self.parts.reads.clone(), self.marks.change);
        self.work.push(Box::pin(async move {
            let _permit = reads.acquire_owned().await;
            Done::Marked(Marked {
                through,
                change,
                attributes: stream.attributes(id, offsets).await,
            })
        }));
    }

    pub(super) fn finish_marks(&mut self, marked: Marked) {
        if marked.change != self.marks.change {
            return;
        }
        self.marks.is_asking = false;
        match marked.attributes {
            Ok(attributes) => {
                let found = attributes.into_iter().map(|attributes| Found {
                    offset: attributes.offset,
                    key_hash: attributes.key_hash,
                    priority: attributes.priority,
                });
                let found: Vec<Found> = found.collect();
                self.machine.mark(Some(&found));
                self.marks.through = marked.through;
                self.intake.retry_at = None;
            }
            Err(error) => {
                log_read_failure(&self.parts.name, &error);
                self.intake.retry_at = Some(Instant::now() + RETRY);
            }
        }
    }

    /// Answers with the queue's numbers. The names of keys are in the log.
    pub(super) fn tell_status(&mut self, reply: oneshot::Sender<Status>) {
        let mut status = self.status();
        let blocked = self.machine.blocked_keys(BLOCKED_KEYS_MAX);
        if blocked.is_empty() {
            let _ = reply.send(status);
            return;
        }
        let (stream, id) = (self.parts.stream.clone(), self.parts.stream_id);
        let mut offsets: Vec<Offset> = blocked.iter().map(|blocked| blocked.by).collect();
        offsets.sort_unstable();
        self.work.push(Box::pin(async move {
            let entries = stream.fetch(id, offsets).await.unwrap_or_default();
            let key = |offset: Offset| {
                let entry = entries.iter().find(|entry| entry.offset == offset);
                entry.and_then(|entry| entry.key.clone())
            };
            let blocked = blocked.into_iter().map(|blocked| BlockedKey {
                key: key(blocked.by),
                offset: blocked.by,
                state: blocked.state,
                attempt: blocked.attempt,
                due_at: blocked.due_at.map(Into::into),
                since: blocked.since.into(),
                waiting: blocked.waiting,
            });
            status.blocked_keys = blocked.collect();
            let _ = reply.send(status);
            Done::Told
        }));
    }
}
