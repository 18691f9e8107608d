//! Seek and purge, which begin a new generation, and pause.
//!
//! An errand holds the queue's task: the task decides nothing more, and its decisions are committed and answered. Then one
//! call raises the generation under the lock of the stream's head, with the state that the next generation begins with. The
//! task goes on in it with its long polls; earlier receipts are `gone`. When the outcome is unknown the task ends, and the
//! queue is read again from the stored state, which is one generation or the other. While the task is held, the queue's
//! watermark is as if it had settled nothing, so that retention does not drop messages that the queue is about to go back
//! to.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::Engine;
use super::errand::Errand;
use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot};
use crate::domain::name::QueueName;
use crate::domain::policy::Start;
use crate::queue::api::{Error, OnLoss, RECOVERING, Renewal, Renewed};
use crate::queue::ask::{Command, Held, Verdict};
use crate::store;
use crate::store::queue::QueueRow;
use crate::store::renewal::{Begun, Renew, RenewOutcome};

/// Where the state comes from that the next generation begins with.
enum Former {
    /// That of a task, which is to be held.
    Task(mpsc::Sender<Command>),
    /// That of a queue whose log is behind it, and that nothing runs for.
    Behind(Vec<u8>),
}

/// A renewal that was asked for, as the engine finds the queue.
enum Asked {
    /// It is a repeat: it was carried out before.
    Done(Renewed),
    New(Box<QueueRow>),
}

impl Errand {
    pub(super) async fn renew(
        &self,
        name: QueueName,
        renewal: Renewal,
        expected: Option<Generation>,
        on_loss: OnLoss,
    ) -> Result<Renewed, Error> {
        let asked = self
            .visit(move |engine| engine.find_renewed(&name, renewal, expected, on_loss))
            .await??;
        let row = match asked {
            Asked::Done(renewed) => return Ok(renewed),
            Asked::New(row) => *row,
        };
        let before_start = match renewal {
            Renewal::Seek(Start::Time(at)) => self.offset_at(row.stream_id, at).await?,
            _ => Offset(0),
        };
        let (id, generation) = (row.id, row.generation);
        let (fence, former) = self
            .visit(move |engine| engine.begin_renewal(id, generation, on_loss))
            .await??;
        // From here on other nodes are told that nothing of the queue is settled. What is being told them of before is written
        // first: coming after the renewal's commit it would have retention drop what the queue goes back to.
        drop(self.telling.lock().await);
        let (state, held) = match former {
            Former::Behind(carried) => (carried, None),
            Former::Task(mailbox) => {
                let keeps_redriven = matches!(renewal, Renewal::Seek(_));
                match hold(&mailbox, keeps_redriven, self.shared.outcome_wait).await {
                    Ok(Held { carried, go_on }) => (carried, Some(go_on)),
                    Err(error) => {
                        self.visit(move |engine| engine.end_renewal(id)).await?;
                        return Err(error);
                    }
                }
            }
        };
        let renew = Renew {
            queue: id,
            fence: &fence,
            incarnation: self.shared.cluster.incarnation(),
            from_generation: generation,
            renewal,
            before_start,
            state: &state,
        };
        let outcome = {
            let _statement = self.statement().await;
            store::renewal::renew_queue(&self.database, renew).await
        };
        self.visit(move |engine| engine.conclude(&row, renewal, held, outcome))
            .await?
    }

    pub(super) async fn set_paused(&self, name: QueueName, is_paused: bool) -> Result<(), Error> {
        let of = name.clone();
        let found = self
            .visit(move |engine| engine.find_to_pause(&of, is_paused))
            .await??;
        let Some((id, slot)) = found else {
            return Ok(());
        };
        let updated = {
            let _statement = self.statement().await;
            store::renewal::set_paused(&self.database, id, is_paused).await
        };
        if let Err(error) = updated {
            // It may be done all the same.
            self.visit(move |engine| engine.read_again(slot)).await?;
            return match error.is_connection_lost() {
                true => Err(Error::OutcomeUnknown),
                false => Err(error.into()),
            };
        }
        let mailbox = self
            .visit(move |engine| engine.note_paused(id, is_paused))
            .await?;
        if let Some(mailbox) = mailbox {
            let _ = mailbox.send(Command::Pause { is_paused }).await;
        }
        let act = if is_paused { "paused" } else { "resumed" };
        tracing::info!(queue = %name, act, "a person paused or resumed the queue");
        Ok(())
    }
}

impl Engine {
    /// The queue that is to be renewed, unless that is refused.
    fn find_renewed(
        &self,
        name: &QueueName,
        renewal: Renewal,
        expected: Option<Generation>,
        on_loss: OnLoss,
    ) -> Result<Asked, Error> {
        let id = self.find(name).ok_or_else(|| Error::NotFound {
            queue: name.clone(),
        })?;
        let row = &self.queues.get(&id).ok_or(Error::Stopping)?.row;
        self.check_owned(row)?;
        if let Some(expected) = expected.filter(|expected| *expected != row.generation) {
            return repeated(row, renewal, expected).map(Asked::Done);
        }
        let log_behind = self.shared.find(name)?.description.log_behind;
        if let Some(behind) = log_behind.filter(|_| on_loss == OnLoss::Refuse) {
            return Err(behind.error(name));
        }
        Ok(Asked::New(Box::new(row.clone())))
    }

    /// From now on no task of the queue is started, until the renewal is over.
    fn begin_renewal(
        &mut self,
        id: QueueId,
        generation: Generation,
        on_loss: OnLoss,
    ) -> Result<(Fence, Former), Error> {
        let is_standing = self.contact.outage().borrow().standing;
        let carried = self.behind.get(&id).map(|behind| behind.carried.clone());
        let owned = self.queues.get_mut(&id).ok_or(RECOVERING)?;
        let state = self.slots.get(&owned.row.slot);
        let fence = state.and_then(|state| state.fence.clone());
        let fence = fence.ok_or(RECOVERING)?;
        if owned.row.generation != generation {
            return Err(RECOVERING);
        }
        let former = match (carried, &owned.mailbox) {
            (Some(carried), _) if on_loss == OnLoss::Accept => Former::Behind(carried),
            (Some(_), _) => return Err(RECOVERING),
            (None, Some(_)) if is_standing => {
                return Err(Error::Unavailable {
                    why: "Postgres cannot be reached",
                });
            }
            (None, Some(mailbox)) => Former::Task(mailbox.clone()),
            (None, None) => return Err(RECOVERING),
        };
        owned.is_renewing = true;
        Ok((fence, former))
    }

    /// The queue's task goes on, or is started again if it has ended meanwhile.
    fn end_renewal(&mut self, id: QueueId) {
        self.forget_renewal(id);
        self.recover_alone(id);
    }

    fn forget_renewal(&mut self, id: QueueId) {
        if let Some(owned) = self.queues.get_mut(&id) {
            owned.is_renewing = false;
        }
    }

    /// Tells the task that was held, if one runs, and the caller.
    fn conclude(
        &mut self,
        row: &QueueRow,
        renewal: Renewal,
        held: Option<oneshot::Sender<Verdict>>,
        outcome: Result<RenewOutcome, store::Error>,
    ) -> Result<Renewed, Error> {
        match outcome {
            Ok(RenewOutcome::Renewed(begun)) => {
                let Begun {
                    generation,
                    start_offset,
                    at_floor,
                    ahead,
                } = begun;
                self.begin_generation(row.id, renewal, begun);
                self.forget_behind(row.id);
                if let Some(held) = held {
                    let _ = held.send(Verdict::Renewed {
                        generation,
                        start_offset,
                    });
                }
                // One that nothing runs for, or whose task has ended meanwhile.
                self.end_renewal(row.id);
                self.shared.metrics.renewals.inc();
                tracing::info!(
                    queue = %row.name, ?renewal, generation = %generation, start_offset = %start_offset,
                    "the queue begins a new generation: earlier receipts are gone"
                );
                Ok(Renewed {
                    generation,
                    through_offset: Offset(start_offset.0 - 1),
                    at_floor,
                    ahead,
                })
            }
            Ok(outcome) => {
                drop(held);
                self.forget_renewal(row.id);
                self.read_again(row.slot);
                Err(match outcome {
                    RenewOutcome::Gone => Error::NotFound {
                        queue: row.name.clone(),
                    },
                    _ => RECOVERING,
                })
            }
            Err(error) => {
                // Done or not: what is stored says. Nothing of the former generation is answered before that is read.
                drop(held);
                self.forget_renewal(row.id);
                self.read_again(row.slot);
                match error.is_connection_lost() {
                    true => Err(Error::OutcomeUnknown),
                    false => Err(error.into()),
                }
            }
        }
    }

    fn begin_generation(&mut self, id: QueueId, renewal: Renewal, begun: Begun) {
        if let Some(owned) = self.queues.get_mut(&id) {
            owned.row.renewal = Some(store::renewal::Renewed {
                renewal,
                from_generation: owned.row.generation,
                at_floor: begun.at_floor,
                ahead: begun.ahead,
            });
            owned.row.generation = begun.generation;
            owned.row.start_offset = begun.start_offset;
        }
        self.show_row(id);
    }

    /// The queue that is to be paused or to go on, and its slot. None when it is so already.
    fn find_to_pause(
        &self,
        name: &QueueName,
        is_paused: bool,
    ) -> Result<Option<(QueueId, Slot)>, Error> {
        let id = self.find(name).ok_or_else(|| Error::NotFound {
            queue: name.clone(),
        })?;
        let row = &self.queues.get(&id).ok_or(Error::Stopping)?.row;
        self.check_owned(row)?;
        Ok((row.is_paused != is_paused).then_some((id, row.slot)))
    }

    /// The row says so now. With the task that is to be told.
    fn note_paused(&mut self, id: QueueId, is_paused: bool) -> Option<mpsc::Sender<Command>> {
        let owned = self.queues.get_mut(&id)?;
        owned.row.is_paused = is_paused;
        let mailbox = owned.mailbox.clone();
        self.show_row(id);
        mailbox
    }
}

/// The answer when the generation is not the one expected: that of the first request, if this is its repeat.
fn repeated(row: &QueueRow, renewal: Renewal, expected: Generation) -> Result<Renewed, Error> {
    match row.renewal {
        Some(done) if done.from_generation == expected && done.renewal == renewal => Ok(Renewed {
            generation: row.generation,
            through_offset: Offset(row.start_offset.0 - 1),
            at_floor: done.at_floor,
            ahead: done.ahead,
        }),
        _ => Err(Error::GenerationMoved {
            queue: row.name.clone(),
            expected,
            found: row.generation,
        }),
    }
}

/// Has the task decide nothing more, and waits until what it has decided is committed. On an error the task goes on as it
/// was, also when it comes to the request later.
async fn hold(
    mailbox: &mpsc::Sender<Command>,
    keeps_redriven: bool,
    bound: Duration,
) -> Result<Held, Error> {
    let (reply, mut answer) = oneshot::channel();
    let command = Command::Hold {
        keeps_redriven,
        reply,
    };
    let holding = async {
        mailbox.send(command).await.ok()?;
        (&mut answer).await.ok()
    };
    match tokio::time::timeout(bound, holding).await {
        Ok(held) => held.ok_or(RECOVERING),
        Err(_) => {
            // It may have answered at this very moment, and then waits to be told how to go on.
            answer.close();
            answer.try_recv().map_err(|_| Error::Unavailable {
                why: "its decisions could not be written in time",
            })
        }
    }
}
