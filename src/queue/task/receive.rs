//! A queue's receives: those that wait, their deliveries, and those that are repeated under their id.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::intake::Intake;
use super::part::Answer;
use super::waiters::Waiter;
use super::{Done, Task};
use crate::domain::id::Offset;
use crate::domain::message::Entry;
use crate::domain::queue::{EmptyReason, Handed, Queue, Receive};
use crate::domain::receipt::Receipt;
use crate::queue::api::{Delivery, Error, ReceiveRequest, Received};
use crate::queue::api::{Handout, Promise};
use crate::queue::ask::Reply;
use crate::queue::log::letters::Fetched;
use crate::stream;

/// Long polls per queue.
const WAITERS_MAX: usize = 10_000;
/// A receive without a wait waits this long at most for a scan or a load that is under way.
const GRACE: Duration = Duration::from_secs(1);
const GRACE_STEP: Duration = Duration::from_millis(5);

/// Whether a receive would gain nothing by waiting for more: as many messages, or bytes, as it can be handed are there.
fn is_full(machine: &Queue, intake: &Intake, request: &ReceiveRequest) -> bool {
    let limit = machine.settings().max_in_flight as usize;
    let room = limit.saturating_sub(machine.counts().live as usize);
    let wanted = (request.max_messages as usize).min(room);
    let ready = machine.ready(wanted);
    let sizes = ready.iter().map_while(|&offset| intake.size(offset));
    let (loaded, bytes) = sizes.fold((0, 0), |(count, sum), size| (count + 1, sum + size));
    let is_loaded = loaded == ready.len() || !intake.is_loading();
    bytes >= request.max_bytes || ready.len() >= wanted && is_loaded
}

impl Task {
    pub(super) fn take_receive(&mut self, request: ReceiveRequest, reply: Reply<Received>) {
        self.intake.received();
        if let Some(receive_id) = &request.receive_id {
            self.take_back_returned();
            let handed = self.machine.replay(receive_id);
            if !handed.is_empty() {
                let offsets = handed.iter().map(|handed| handed.offset).collect();
                return self.replay(receive_id.clone(), offsets, reply);
            }
        }
        if request.wait.is_zero() && self.machine.is_full() {
            let limit = self.machine.settings().max_in_flight;
            let _ = reply.send(Err(Error::InFlightFull { limit }));
            return;
        }
        if self.waiters.len() >= WAITERS_MAX {
            self.waiters.drop_gone();
        }
        if self.waiters.len() >= WAITERS_MAX {
            let _ = reply.send(Err(Error::TooManyWaiters { limit: WAITERS_MAX }));
            return;
        }
        let since = Instant::now();
        let until = since + request.wait;
        let replaced = self.waiters.add(Waiter {
            request,
            reply,
            since,
            until,
        });
        if let Some(replaced) = replaced {
            let _ = replaced.reply.send(Ok(self.empty()));
        }
    }

    fn replay(&mut self, receive_id: String, offsets: Vec<Offset>, reply: Reply<Received>) {
        let (source, reopened) = (self.source(), self.reopened(&offsets));
        self.work.push(Box::pin(async move {
            let fetched = source.fetch(offsets, &reopened).await;
            Done::Replayed {
                receive_id,
                reply,
                fetched,
            }
        }));
    }

    /// Hands out ready messages, to the longest waiter first.
    pub(super) fn serve(&mut self) {
        if self.parts.is_paused {
            return;
        }
        while self.machine.has_ready() {
            let (machine, intake) = (&self.machine, &self.intake);
            let is_full = |request: &ReceiveRequest| is_full(machine, intake, request);
            let Some((number, waiter)) = self.waiters.next(Instant::now(), is_full) else {
                break;
            };
            let request = &waiter.request;
            let receive = Receive {
                consumer: request.consumer.clone(),
                receive_id: request.receive_id.clone(),
            };
            let visible = request
                .visibility_timeout
                .unwrap_or(self.machine.settings().visibility_timeout);
            let limits = (request.max_messages as usize, request.max_bytes);
            let now = self.now();
            let intake = &self.intake;
            let taken = self
                .machine
                .hand_out(now, visible, &receive, limits, &|offset| {
                    intake.size(offset)
                });
            if taken.handed.is_empty() {
                break;
            }
            let handed: Vec<(Handed, Arc<Entry>)> = taken
                .handed
                .into_iter()
                .filter_map(|handed| Some((handed, self.intake.take(handed.offset)?)))
                .collect();
            self.parts
                .shared
                .metrics
                .deliveries
                .inc_by(handed.len() as u64);
            let delivered = &self.parts.progress.delivered;
            delivered.fetch_add(handed.len() as u64, Ordering::Relaxed);
            if let Some(waiter) = self.waiters.remove(number) {
                let promise = self.promise(&handed, waiter.request.receive_id);
                self.answer_later(Answer::Receive {
                    reply: waiter.reply,
                    handed,
                    promise: Some(promise),
                });
            }
        }
        self.load_ahead(!self.waiters.is_empty());
    }

    /// Deliveries that go back unless an answer that carries them is written.
    fn promise(
        &mut self,
        handed: &[(Handed, Arc<Entry>)],
        receive_id: Option<String>,
    ) -> Arc<Promise> {
        let receipts = handed.iter().map(|(handed, _)| self.receipt(handed));
        let promise = Promise::new(self.returned.0.clone(), receipts.collect());
        if let Some(receive_id) = receive_id {
            self.promises.keep(receive_id, &promise);
        }
        promise
    }

    fn receipt(&self, handed: &Handed) -> Receipt {
        Receipt {
            queue: self.machine.id(),
            generation: self.machine.generation(),
            offset: handed.offset,
            delivery: handed.delivery,
        }
    }

    /// Answers those whose wait is over. While a scan or a load is under way, a short wait is stretched a little:
    /// "empty" would be a guess.
    pub(super) fn end_waits(&mut self) {
        let now = Instant::now();
        while let Some((until, number)) = self.waiters.next_end()
            && until <= now
        {
            let standing = self.is_standing();
            let looking = !standing && !self.parts.is_paused && self.is_looking();
            let Some(mut waiter) = self.waiters.remove(number) else {
                break;
            };
            if looking && now < waiter.since + GRACE {
                waiter.until = now + GRACE_STEP;
                self.waiters.put(number, waiter);
                continue;
            }
            let answer = match standing {
                true => Err(Error::Unavailable {
                    why: "Postgres cannot be reached",
                }),
                false => Ok(self.empty()),
            };
            let _ = waiter.reply.send(answer);
        }
    }

    pub(super) fn empty(&self) -> Received {
        let reason = match self.parts.is_paused {
            true => EmptyReason::Paused,
            false => self.machine.empty_reason(),
        };
        let due = match reason {
            EmptyReason::InFlightFull => self.machine.next_deadline(),
            _ => self
                .machine
                .next_due()
                .into_iter()
                .chain(self.machine.next_deadline())
                .min(),
        };
        Received {
            next_due_at: due.map(Into::into),
            ..Received::nothing(reason)
        }
    }

    pub(super) fn received(
        &self,
        handed: Vec<(Handed, Arc<Entry>)>,
        promise: Option<Arc<Promise>>,
    ) -> Received {
        let deliveries: Vec<Delivery> = handed
            .into_iter()
            .map(|(handed, entry)| Delivery {
                receipt: (self.parts.shared.keys)
                    .seal(self.parts.stream_id, &self.receipt(&handed)),
                delivery: handed.delivery,
                attempt: handed.attempt,
                entry,
                visible_until: handed.deadline.into(),
            })
            .collect();
        Received {
            acked: Vec::new(),
            reason: deliveries.is_empty().then_some(EmptyReason::Empty),
            deliveries,
            next_due_at: None,
            handout: Handout::new(promise),
        }
    }

    /// Answers a repeated receive with those of its deliveries that still live.
    pub(super) fn finish_replay(
        &mut self,
        receive_id: &str,
        reply: Reply<Received>,
        fetched: Result<Fetched, stream::Error>,
    ) {
        let Ok(Fetched { entries, .. }) = fetched else {
            let _ = reply.send(Err(Error::Unavailable {
                why: "its messages could not be read",
            }));
            return;
        };
        // What was given back by now is not repeated; what is repeated is not given back from here on.
        self.take_back_returned();
        let promise = self.promises.find(receive_id);
        let mut entries = entries.into_iter().peekable();
        let handed = self.machine.replay(receive_id);
        // Both by offset.
        let handed = handed.into_iter().filter_map(|handed| {
            while entries.next_if(|e| e.offset < handed.offset).is_some() {}
            let entry = entries.next_if(|e| e.offset == handed.offset)?;
            Some((handed, entry))
        });
        self.answer_later(Answer::Receive {
            handed: handed.collect(),
            reply,
            promise,
        });
    }
}
