//! Errands: whatever takes time is carried out beside the engine's loop. An errand waits for queues' tasks and for the
//! database. In between it visits the engine, to read what it knows and to tell it what has become of a queue. A visit
//! never waits, and so the loop never does: a task that does not answer holds up its own queue only, and no other queue's
//! fence, recovery or watermark.
//!
//! The errands of one queue follow each other, in the order in which they were asked for.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};

use super::Engine;
use crate::domain::id::StreamId;
use crate::domain::name::{QueueName, StreamName};
use crate::queue::api::Error;
use crate::queue::ask::{Job, Reply};
use crate::queue::shared::Shared;
use crate::queue::writer::Contact;
use crate::store::Database;
use crate::stream;
use crate::supervisor::OnEnd;

/// Errands that wait for another one of their queue.
const LINE_MAX: usize = 100;
/// Statements of changes at a time: one may wait for a lock of somebody else, and the pool is for others too.
const STATEMENTS: usize = 2;

/// What an errand does in the engine's loop.
pub(super) type Visit = Box<dyn FnOnce(&mut Engine) + Send>;
type Work = Box<dyn FnOnce(Errand) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// What an errand has with it.
#[derive(Clone)]
pub(super) struct Errand {
    visits: mpsc::Sender<Visit>,
    statements: Arc<Semaphore>,
    pub(super) database: Database,
    pub(super) stream: stream::Handle,
    pub(super) shared: Arc<Shared>,
    pub(super) contact: Arc<Contact>,
    /// Held while it is found out and written down how far the queues are.
    pub(super) telling: Arc<tokio::sync::Mutex<()>>,
    /// Streams that queues were declared on.
    pub(super) stream_ids: Arc<Mutex<HashMap<StreamName, StreamId>>>,
}

/// The errands that are under way.
pub(super) struct Errands {
    errand: Errand,
    pub(super) visits: mpsc::Receiver<Visit>,
    /// Changes under way, by queue, and what waits for each.
    lines: HashMap<QueueName, VecDeque<Work>>,
    running: usize,
    /// Duties under way.
    duties: HashSet<&'static str>,
}

impl Errands {
    pub(super) fn new(
        database: Database,
        stream: stream::Handle,
        shared: Arc<Shared>,
        contact: Arc<Contact>,
    ) -> Self {
        let (sender, visits) = mpsc::channel(1_024);
        Self {
            errand: Errand {
                visits: sender,
                statements: Arc::new(Semaphore::new(STATEMENTS)),
                database,
                stream,
                shared,
                contact,
                telling: Arc::default(),
                stream_ids: Arc::default(),
            },
            visits,
            lines: HashMap::new(),
            running: 0,
            duties: HashSet::new(),
        }
    }

    /// Whether changes are under way.
    pub(super) fn are_under_way(&self) -> bool {
        self.running > 0
    }

    /// Whether the duty of this name is under way.
    pub(super) fn is_busy(&self, duty: &str) -> bool {
        self.duties.contains(duty)
    }
}

impl Errand {
    /// Does something in the engine's loop.
    pub(super) async fn visit<T: Send + 'static>(
        &self,
        visit: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let visit: Visit = Box::new(move |engine| drop(reply.send(visit(engine))));
        let sent = self.visits.send(visit).await;
        sent.map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)
    }

    /// To be held while a statement of a change runs, never while a task is waited for.
    pub(super) async fn statement(&self) -> Option<SemaphorePermit<'_>> {
        self.statements.acquire().await.ok()
    }
}

impl Engine {
    pub(super) fn carry_out(&mut self, job: Job) {
        match job {
            Job::Declare {
                name,
                declaration,
                reply,
            } => self.change_queue(name.clone(), reply, |errand| async move {
                errand.declare(name, *declaration).await
            }),
            Job::Delete { name, reply } => {
                self.change_queue(name.clone(), reply, |errand| async move {
                    errand.delete(name).await
                });
            }
            Job::Renew {
                name,
                renewal,
                expected_generation,
                on_loss,
                reply,
            } => self.change_queue(name.clone(), reply, move |errand| async move {
                let renewed = errand.renew(name, renewal, expected_generation, on_loss);
                renewed.await
            }),
            Job::Pause {
                name,
                is_paused,
                reply,
            } => self.change_queue(name.clone(), reply, move |errand| async move {
                errand.set_paused(name, is_paused).await
            }),
            Job::Find { name, reply } => {
                let look = |errand: Errand| async move { errand.look_up(name).await };
                self.send_out(None, work(reply, Turn::Now, look));
            }
        }
    }

    /// Carries out a change of a queue, after those that were asked for before.
    fn change_queue<T, F>(
        &mut self,
        queue: QueueName,
        reply: Reply<T>,
        change: impl FnOnce(Errand) -> F + Send + 'static,
    ) where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let Some(line) = self.errands.lines.get_mut(&queue) else {
            self.errands.lines.insert(queue.clone(), VecDeque::new());
            return self.send_out(Some(queue), work(reply, Turn::Now, change));
        };
        if line.len() >= LINE_MAX {
            let _ = reply.send(Err(Error::Unavailable {
                why: "too many changes of it wait already",
            }));
            return;
        }
        line.push_back(work(reply, Turn::Later, change));
    }

    fn send_out(&mut self, queue: Option<QueueName>, work: Work) {
        self.errands.running += 1;
        let errand = self.errands.errand.clone();
        let visits = errand.visits.clone();
        self.supervisor
            .spawn("queue change", OnEnd::Ordinary, async move {
                work(errand).await;
                let end: Visit = Box::new(move |engine| engine.end_errand(queue));
                let _ = visits.send(end).await;
            });
    }

    fn end_errand(&mut self, queue: Option<QueueName>) {
        self.errands.running -= 1;
        let Some(queue) = queue else {
            return;
        };
        let line = self.errands.lines.get_mut(&queue);
        let next = line.and_then(VecDeque::pop_front);
        match next.filter(|_| !self.supervisor.is_stopping()) {
            Some(next) => self.send_out(Some(queue), next),
            // Whoever waits at the process's end is told so by the loss of the reply.
            None => drop(self.errands.lines.remove(&queue)),
        }
    }

    /// Has a duty's statements run beside the loop, unless those of the last time still do.
    pub(super) fn beside<F>(
        &mut self,
        duty: &'static str,
        work: impl FnOnce(Errand) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        if !self.errands.duties.insert(duty) {
            return;
        }
        let errand = self.errands.errand.clone();
        let visits = errand.visits.clone();
        self.supervisor.spawn(duty, OnEnd::Ordinary, async move {
            work(errand).await;
            let end: Visit = Box::new(move |engine| {
                engine.errands.duties.remove(duty);
            });
            let _ = visits.send(end).await;
        });
    }
}

/// When an errand's turn comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Now,
    /// After another one. Nothing is done for somebody who was told meanwhile that the outcome is not known, so that the
    /// line behind a queue that does not answer is never longer than those who still wait.
    Later,
}

fn work<T, F>(
    reply: Reply<T>,
    turn: Turn,
    change: impl FnOnce(Errand) -> F + Send + 'static,
) -> Work
where
    T: Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    Box::new(move |errand| {
        Box::pin(async move {
            if turn == Turn::Later && reply.is_closed() {
                return;
            }
            let _ = reply.send(change(errand).await);
        })
    })
}
