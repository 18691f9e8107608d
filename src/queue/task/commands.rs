//! The requests to the engine and to one queue's task, and how the task takes them.

use tokio::sync::oneshot;

use super::Task;
use super::hold::Hold;
use super::part::{Answer, LINGERING_WAIT};
use crate::domain::queue::{Item, Outcome, Verb};
use crate::queue::api::{Error, InFlight, InFlightFilter};
use crate::queue::ask::{Acks, Command, Why};

/// Commands taken in one round, so that the journal gets its groups.
const ROUND_MAX: usize = 1_000;

impl Task {
    pub(super) fn take_commands(&mut self, first: Option<Command>) {
        let Some(first) = first else {
            self.ending = Some(Why::Told);
            return;
        };
        let mut next = Some(first);
        for _ in 0..ROUND_MAX {
            match next.take() {
                Some(command) => self.take_command(command),
                None => break,
            }
            if self.hold.is_some() || self.is_yielding {
                return;
            }
            next = self.parts.mailbox.try_recv().ok();
        }
        if let Some(command) = next {
            self.take_command(command);
        }
    }

    fn take_command(&mut self, command: Command) {
        match command {
            Command::Receive {
                request,
                acks,
                reply,
            } => {
                if let Some(Acks { items, reply }) = acks {
                    let is_carried = request.wait >= LINGERING_WAIT;
                    self.settle(Verb::Ack, &items, is_carried, reply);
                }
                self.take_receive(request, reply);
            }
            Command::Settle { verb, items, reply } => self.settle(verb, &items, false, reply),
            Command::InFlight { filter, reply } => {
                let _ = reply.send(Ok(self.in_flight(&filter)));
            }
            Command::Status { reply } => {
                self.waiters.drop_gone();
                self.tell_status(reply);
            }
            Command::Inspect { messages, reply } => {
                let _ = reply.send(Ok(self.inspect(&messages)));
            }
            Command::Act { offset, act, reply } => self.take_act(offset, act, reply),
            Command::Expire { expire, reply } => self.expire(&expire, reply),
            Command::Pin { reply } => {
                self.pin();
                self.machine.journal_scan(self.machine.scanned_through());
                self.answer_later(Answer::Pin { reply });
            }
            Command::Change { declaration, reply } => {
                self.change_settings(declaration.settings);
                self.parts.patterns = declaration.topics.into();
                self.unpin();
                self.answer_later(Answer::Done { reply });
            }
            Command::Hold {
                keeps_redriven,
                reply,
            } => {
                self.hold = Some(Hold::Draining {
                    keeps_redriven,
                    reply,
                });
            }
            Command::Pause { is_paused } => self.parts.is_paused = is_paused,
            Command::Fold { before_turn } => {
                self.folds.want(self.unfolded_turn, before_turn);
            }
            Command::Trim { letters } => {
                // The copy of one that was redriven may be the only one.
                for letter in letters {
                    if !self.machine.is_reopened(letter) {
                        self.machine.remove_letter(letter);
                    }
                }
            }
            Command::RemoveLetter {
                id,
                delivery,
                reply,
            } => self.remove_letter(id, delivery, reply),
            Command::Redrive { new, reply } => self.begin_redrive(new, reply),
            Command::DryRun { new, reply } => self.dry_run(&new, reply),
            Command::CancelRedrive { id, reply } => self.cancel_redrive(&id, reply),
            Command::Yield => self.is_yielding = true,
            Command::End => self.ending = Some(Why::Told),
        }
    }

    pub(super) fn settle(
        &mut self,
        verb: Verb,
        items: &[Item],
        is_carried: bool,
        reply: oneshot::Sender<Result<Vec<Outcome>, Error>>,
    ) {
        let now = self.now();
        let outcomes = self.machine.settle(verb, items, now);
        let metrics = &self.parts.shared.metrics;
        for (outcome, item) in outcomes.iter().zip(items) {
            match outcome {
                Outcome::Acked => {
                    metrics.settled.inc();
                }
                Outcome::Gone { incident: true } => {
                    metrics.incidents.inc();
                    tracing::error!(
                        queue = %self.parts.name,
                        receipt = ?item.receipt,
                        "a receipt names a delivery that was never issued: was the database restored to an earlier state?"
                    );
                }
                _ => {}
            }
        }
        self.answer_later(Answer::Settle {
            reply,
            outcomes,
            is_carried,
        });
    }

    fn in_flight(&self, filter: &InFlightFilter) -> Vec<InFlight> {
        let live = self.machine.live(filter.after).map(|live| InFlight {
            offset: live.offset,
            delivery: live.delivery,
            attempt: live.attempt,
            consumer: live.receive.and_then(|receive| receive.consumer.clone()),
            delivered_at: live.since.into(),
            visible_until: live.deadline.into(),
        });
        live.filter(|live| filter.consumer.is_none() || live.consumer == filter.consumer)
            .take(filter.limit.clamp(1, 1_000))
            .collect()
    }
}
