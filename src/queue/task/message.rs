//! Single messages of a queue, for people: show a message's state, settle it, end its delivery early.
//!
//! The state machine knows its own messages. For any other message the log decides whether it was settled or never belonged
//! to the queue: is it there, and does its topic match? Acts are decided by the machine's state after the log was read.

use std::sync::Arc;

use super::part::Answer;
use super::{Done, Task};
use crate::domain::id::{Generation, Offset};
use crate::domain::message::Entry;
use crate::domain::name::Topic;
use crate::domain::queue::{At, Inspected, Standing, dead_letter_id};
use crate::queue::api::{Act, Acted, Error, Expire, MessageState, MessageStatus};
use crate::queue::ask::Reply;
use crate::stream;

impl Task {
    /// Says where messages stand, and which of them have dead letters, whose histories are with their rows.
    pub(super) fn inspect(
        &self,
        messages: &[(Offset, Option<Topic>)],
    ) -> (Vec<MessageStatus>, Vec<Offset>) {
        let now = self.now();
        let told = messages.iter().map(|(offset, topic)| {
            let found = self.machine.inspect(*offset, now);
            let state = self.state_of(&found, topic.as_ref());
            status(found, state)
        });
        let dead = messages.iter().map(|(offset, _)| *offset);
        let dead = dead.filter(|&offset| self.machine.death(offset).is_some());
        (told.collect(), dead.collect())
    }

    /// The state of a message; where the machine does not know it, the topic decides.
    fn state_of(&self, found: &Inspected, topic: Option<&Topic>) -> MessageState {
        let patterns = &self.parts.patterns;
        let matches = topic.map(|topic| patterns.iter().any(|pattern| pattern.matches(topic)));
        match (found.standing, matches) {
            (Standing::Fresh, _) => MessageState::Fresh,
            (Standing::Ready, _) => MessageState::Ready,
            (Standing::Waiting, _) => MessageState::Waiting,
            (Standing::Live { .. }, _) => MessageState::Live,
            (Standing::Delayed { .. }, _) => MessageState::Delayed,
            (Standing::Dead, _) => MessageState::Dead,
            (Standing::Lost, _) => MessageState::Lost,
            (_, None) => MessageState::NotFound,
            (_, Some(false)) => MessageState::NotMatching,
            (Standing::BeforeStart, _) => MessageState::BeforeStart,
            (Standing::Passed, _) => MessageState::Settled,
            (Standing::Unseen, _) => MessageState::Fresh,
        }
    }

    /// Acts at once on what the machine has; the log is asked about the rest first.
    pub(super) fn take_act(&mut self, offset: Offset, act: Act, reply: Reply<Acted>) {
        let standing = self.machine.inspect(offset, self.now()).standing;
        if standing.is_unsettled() || matches!(standing, Standing::Dead | Standing::Lost) {
            return self.act(offset, &act, None, reply);
        }
        let (stream, id) = (self.parts.stream.clone(), self.parts.stream_id);
        self.work.push(Box::pin(async move {
            let entries = stream.fetch(id, vec![offset]).await;
            Done::Looked {
                offset,
                act,
                reply,
                entries,
            }
        }));
    }

    pub(super) fn finish_look(
        &mut self,
        (offset, act, reply): (Offset, Act, Reply<Acted>),
        entries: Result<Vec<Arc<Entry>>, stream::Error>,
    ) {
        match entries {
            Ok(entries) => self.act(offset, &act, entries.first(), reply),
            Err(_) => {
                let _ = reply.send(Err(Error::Unavailable {
                    why: "the message could not be read",
                }));
            }
        }
    }

    fn act(&mut self, offset: Offset, act: &Act, entry: Option<&Arc<Entry>>, reply: Reply<Acted>) {
        let now = self.now();
        let found = self.machine.inspect(offset, now);
        let state = self.state_of(&found, entry.map(|entry| &entry.topic));
        let acted = match state {
            MessageState::Dead => Acted::DeadLettered,
            MessageState::Settled => Acted::AlreadySettled,
            MessageState::Lost
            | MessageState::NotMatching
            | MessageState::BeforeStart
            | MessageState::NotFound => Acted::Not(state),
            MessageState::Fresh
            | MessageState::Ready
            | MessageState::Waiting
            | MessageState::Live
            | MessageState::Delayed => {
                let key_hash = entry.and_then(|entry| entry.key_hash);
                self.settle_by_hand(offset, key_hash, act, now)
            }
        };
        if matches!(acted, Acted::Deleted | Acted::Rejected { .. }) {
            self.intake.take(offset);
            tracing::info!(
                queue = %self.parts.name, offset = %offset, ?act, before = ?state, delivery = found.delivery,
                "a person settled a message"
            );
        }
        self.answer_later(Answer::Act { reply, acted });
    }

    fn settle_by_hand(
        &mut self,
        offset: Offset,
        key_hash: Option<i64>,
        act: &Act,
        now: At,
    ) -> Acted {
        let generation: Generation = self.machine.generation();
        let (is_done, acted) = match act {
            Act::Delete => (self.machine.delete(offset, now), Acted::Deleted),
            Act::Reject { reason } => (
                self.machine.condemn(offset, key_hash, reason.clone(), now),
                Acted::Rejected {
                    dead_letter: dead_letter_id(generation, offset),
                },
            ),
        };
        match is_done {
            true => acted,
            false => Acted::AlreadySettled,
        }
    }

    pub(super) fn expire(&mut self, expire: &Expire, reply: Reply<Vec<Offset>>) {
        let before = expire.delivered_before.map(At::from);
        let over = self.machine.expire_now(&expire.whose, before, self.now());
        if !over.is_empty() {
            tracing::info!(
                queue = %self.parts.name, count = over.len(), whose = ?expire.whose,
                "a person ended deliveries early"
            );
        }
        self.answer_later(Answer::Expired {
            reply,
            offsets: over,
        });
    }
}

fn status(found: Inspected, state: MessageState) -> MessageStatus {
    let (visible_until, due_at) = match found.standing {
        Standing::Live { deadline } => (Some(deadline.into()), None),
        Standing::Delayed { due } => (None, Some(due.into())),
        _ => (None, None),
    };
    let is_delivered = found.delivery > 0 && found.receive.is_some();
    MessageStatus {
        offset: found.offset,
        state,
        delivery: found.delivery,
        attempts: found.attempts,
        failures: found.failures,
        dead_letter: None,
        consumer: found
            .receive
            .as_ref()
            .and_then(|receive| receive.consumer.clone()),
        delivered_at: found.since.map(Into::into).filter(|_| {
            // A redriven message that did not go out again has no delivery of its own.
            is_delivered || visible_until.is_some() || found.attempts > 0
        }),
        visible_until,
        due_at,
    }
}
