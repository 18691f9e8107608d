//! Seek and purge, which begin a new generation, and pause.
//!
//! The engine holds the queue's task: the task decides nothing more, and its decisions are committed and answered. Then one
//! call raises the generation under the lock of the stream's head, with the state that the next generation begins with. The
//! task goes on in it with its long polls; earlier receipts are `gone`. When the outcome is unknown the task ends, and the
//! queue is read again from the stored state, which is one generation or the other. While the task is held, the queue's
//! watermark is as if it had settled nothing, so that retention does not drop messages that the queue is about to go back
//! to.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::Engine;
use crate::domain::id::{Generation, Offset, QueueId};
use crate::domain::name::QueueName;
use crate::domain::policy::Start;
use crate::queue::api::{Error, OnLoss, RECOVERING, Renewal, Renewed};
use crate::queue::ask::{Command, Held, Verdict};
use crate::store;
use crate::store::queue::QueueRow;
use crate::store::renewal::{Begun, Renew, RenewOutcome};

impl Engine {
    pub(super) async fn renew(
        &mut self,
        name: &QueueName,
        renewal: Renewal,
        expected: Option<Generation>,
        on_loss: OnLoss,
    ) -> Result<Renewed, Error> {
        let id = self.find(name).ok_or_else(|| Error::NotFound {
            queue: name.clone(),
        })?;
        let (row, mailbox) = match self.queues.get(&id) {
            Some(owned) => (owned.row.clone(), owned.mailbox.clone()),
            None => return Err(Error::Stopping),
        };
        self.check_owned(&row)?;
        if let Some(expected) = expected.filter(|expected| *expected != row.generation) {
            return repeated(&row, renewal, expected);
        }
        let log_behind = self.shared.find(name)?.description.log_behind;
        if let Some(behind) = log_behind.filter(|_| on_loss == OnLoss::Refuse) {
            return Err(behind.error(name));
        }
        let before_start = match renewal {
            Renewal::Seek(Start::Time(at)) => self.offset_at(row.stream_id, at).await?,
            _ => Offset(0),
        };
        if log_behind.is_some() {
            return self.renew_behind(&row, renewal, before_start).await;
        }
        let state = self.slots.get(&row.slot);
        let fence = state.and_then(|state| state.fence.clone());
        let (Some(mailbox), Some(fence)) = (mailbox, fence) else {
            return Err(RECOVERING);
        };
        if self.contact.outage().borrow().standing {
            return Err(Error::Unavailable {
                why: "Postgres cannot be reached",
            });
        }
        let keeps_redriven = matches!(renewal, Renewal::Seek(_));
        let held = match hold(&mailbox, keeps_redriven, self.shared.outcome_wait).await {
            Ok(held) => held,
            Err(error) => {
                // It may be held all the same, and then ends since nobody tells it how to go on.
                self.read_again(row.slot).await;
                return Err(error);
            }
        };
        let renew = Renew {
            queue: id,
            fence: &fence,
            incarnation: self.cluster.incarnation(),
            from_generation: row.generation,
            renewal,
            before_start,
            state: &held.carried,
        };
        let outcome = store::renewal::renew_queue(&self.database, renew).await;
        self.conclude(&row, renewal, Some(held), outcome).await
    }

    /// Tells the task that was held, if one runs, and the caller.
    pub(super) async fn conclude(
        &mut self,
        row: &QueueRow,
        renewal: Renewal,
        held: Option<Held>,
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
                if let Some(held) = held {
                    let _ = held.go_on.send(Verdict::Renewed {
                        generation,
                        start_offset,
                    });
                }
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
                self.read_again(row.slot).await;
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
                self.read_again(row.slot).await;
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

    pub(super) async fn set_paused(
        &mut self,
        name: &QueueName,
        is_paused: bool,
    ) -> Result<(), Error> {
        let id = self.find(name).ok_or_else(|| Error::NotFound {
            queue: name.clone(),
        })?;
        let Some(owned) = self.queues.get(&id) else {
            return Err(Error::Stopping);
        };
        self.check_owned(&owned.row)?;
        if owned.row.is_paused == is_paused {
            return Ok(());
        }
        let slot = owned.row.slot;
        let updated = store::renewal::set_paused(&self.database, id, is_paused).await;
        if let Err(error) = updated {
            // It may be done all the same.
            self.read_again(slot).await;
            return match error.is_connection_lost() {
                true => Err(Error::OutcomeUnknown),
                false => Err(error.into()),
            };
        }
        let mut mailbox = None;
        if let Some(owned) = self.queues.get_mut(&id) {
            owned.row.is_paused = is_paused;
            mailbox.clone_from(&owned.mailbox);
        }
        self.show_row(id);
        if let Some(mailbox) = mailbox {
            let _ = mailbox.send(Command::Pause { is_paused }).await;
        }
        let act = if is_paused { "paused" } else { "resumed" };
        tracing::info!(queue = %name, act, "a person paused or resumed the queue");
        Ok(())
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

/// Has the task decide nothing more, and waits until what it has decided is committed.
async fn hold(
    mailbox: &mpsc::Sender<Command>,
    keeps_redriven: bool,
    bound: Duration,
) -> Result<Held, Error> {
    let (reply, answer) = oneshot::channel();
    let command = Command::Hold {
        keeps_redriven,
        reply,
    };
    let holding = async {
        mailbox.send(command).await.ok()?;
        answer.await.ok()
    };
    match tokio::time::timeout(bound, holding).await {
        Ok(held) => held.ok_or(RECOVERING),
        Err(_) => Err(Error::Unavailable {
            why: "its decisions could not be written in time",
        }),
    }
}
