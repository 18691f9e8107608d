//! Single messages of a queue, for people: what has become of one, settle it, end its delivery before its time.
//!
//! The machine tells what it has; whether a message that it does not have was settled or never was the queue's, the log says:
//! is it there, and does its topic match. What is decided is decided on the machine's word of the moment after the log was read.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use tokio::sync::oneshot;

use super::api::Error;
use super::command::Command;
use super::handle::{Handle, invalid};
use super::part::Answer;
use super::task::{Done, Task};
use crate::domain::id::{Generation, Offset};
use crate::domain::letter::LetterId;
use crate::domain::message::Entry;
use crate::domain::name::{QueueName, Topic};
use crate::domain::policy::{CONSUMER_MAX_BYTES, REASON_MAX_BYTES};
use crate::domain::queue::{At, Failure, Inspected, Standing, Whose, dead_letter_id};
use crate::store;
use crate::store::letter::History;
use crate::stream;

/// Most messages that one request looks at.
pub const INSPECT_MAX: usize = 1_000;

/// Where a message stands in a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageState {
    /// Never handed out, and may go out now or when the queue gets there.
    Fresh,
    /// Handed out before, and due again.
    Ready,
    /// Held back by an earlier message of its key.
    Waiting,
    /// Handed out, and held by a consumer.
    Live,
    /// Held back by time.
    Delayed,
    /// A dead letter.
    Dead,
    /// Acked, or deleted by a person.
    Settled,
    /// Retention's hard limit dropped it before it was settled.
    Lost,
    /// The queue does not take its topic.
    NotMatching,
    /// The queue began after it.
    BeforeStart,
    /// There is no such message, or no more.
    NotFound,
}

/// What a queue knows of one message.
#[derive(Debug, Clone, PartialEq)]
pub struct MessageStatus {
    /// The message.
    pub offset: Offset,
    /// Where it stands.
    pub state: MessageState,
    /// The number of its last delivery; 0 before the first.
    pub delivery: u32,
    /// Attempts made, one under way included.
    pub attempts: u32,
    /// How its last attempts failed, oldest first, at most five. A dead letter's are those of former lives, too.
    pub failures: Vec<Failure>,
    /// Its dead letter, also while the message is on its way back.
    pub dead_letter: Option<LetterId>,
    /// Who has it or had it last, if the receive said so.
    pub consumer: Option<String>,
    /// When its last delivery began.
    pub delivered_at: Option<DateTime<Utc>>,
    /// While it is live: until when it is held.
    pub visible_until: Option<DateTime<Utc>>,
    /// While it is delayed: until when.
    pub due_at: Option<DateTime<Utc>>,
}

/// What a person does to a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Settle it in this queue.
    Delete,
    /// Make it a dead letter, also while a consumer holds it.
    Reject {
        /// Why, at most 1,024 bytes.
        reason: Option<String>,
    },
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acted {
    /// It is settled.
    Deleted,
    /// It is a dead letter.
    Rejected {
        /// The letter.
        dead_letter: String,
    },
    /// It was settled before.
    AlreadySettled,
    /// It is a dead letter already; that is deleted by its own id.
    DeadLettered,
    /// Nothing was done: it is not there, or not the queue's.
    Not(MessageState),
}

/// Which deliveries end before their time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expire {
    /// Whose.
    pub whose: Whose,
    /// Only those that began before: so that a repeat ends none that began since.
    pub delivered_before: Option<DateTime<Utc>>,
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

impl Handle {
    /// Says where messages stand, in the order asked. `None` for the topic of one that the log does not have.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`] for more than 1,000, [`Error::Unavailable`], [`Error::Stopping`], or the
    /// database's.
    pub async fn inspect(
        &self,
        queue: &QueueName,
        messages: Vec<(Offset, Option<Topic>)>,
    ) -> Result<Vec<MessageStatus>, Error> {
        if messages.len() > INSPECT_MAX {
            return Err(invalid("messages", "must be at most 1000"));
        }
        let id = self.shared.find(queue)?.description.id;
        let bound = self.shared.outcome_wait;
        let (mut told, dead) = self
            .tell(queue, bound, |reply| Command::Inspect { messages, reply })
            .await?;
        if !dead.is_empty() {
            let read = move |database: store::Database| async move {
                store::letter::find_histories(&database, id, &dead).await
            };
            for letter in self.shared.letters.ask(read).await? {
                let meant = told
                    .iter_mut()
                    .filter(|told| told.offset == letter.id.offset);
                meant.for_each(|told| told.add_letter(&letter));
            }
        }
        Ok(told)
    }

    /// Settles a message, in this queue only. Answered after the commit. Repeating it is safe: it finds the message settled.
    ///
    /// # Errors
    /// [`Error::NotFound`] for the queue, [`Error::Invalid`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`].
    pub async fn act(&self, queue: &QueueName, offset: Offset, act: Act) -> Result<Acted, Error> {
        if let Act::Reject {
            reason: Some(reason),
        } = &act
            && (reason.len() > REASON_MAX_BYTES || reason.contains('\0'))
        {
            return Err(invalid(
                "reason",
                "must be at most 1024 bytes long, without the character U+0000",
            ));
        }
        let bound = self.shared.outcome_wait;
        self.tell(queue, bound, |reply| Command::Act { offset, act, reply })
            .await
    }

    /// Ends live deliveries as if their time were up: the attempts count, and the messages go out again as after any expiry.
    /// Answered after the commit, with the messages. What is not live is not touched.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::Unavailable`], [`Error::OutcomeUnknown`], [`Error::Stopping`].
    pub async fn expire(&self, queue: &QueueName, expire: Expire) -> Result<Vec<Offset>, Error> {
        match &expire.whose {
            Whose::Consumer(name) if name.is_empty() || name.len() > CONSUMER_MAX_BYTES => {
                return Err(invalid("consumer", "must be 1 to 255 bytes long"));
            }
            Whose::Offsets(offsets) if offsets.is_empty() || offsets.len() > INSPECT_MAX => {
                return Err(invalid("offsets", "must be a list of 1 to 1000"));
            }
            _ => {}
        }
        let bound = self.shared.outcome_wait;
        self.tell(queue, bound, |reply| Command::Expire { expire, reply })
            .await
    }
}

impl Task {
    /// Says where messages stand, and which of them have dead letters, whose histories are with their rows.
    pub(in crate::queue) fn inspect(
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

    /// What the machine does not know, the topic says.
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
    pub(in crate::queue) fn take_act(&mut self, offset: Offset, act: Act, reply: Reply<Acted>) {
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

    pub(in crate::queue) fn finish_look(
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

    pub(in crate::queue) fn expire(&mut self, expire: &Expire, reply: Reply<Vec<Offset>>) {
        let before = expire.delivered_before.map(At::from);
        let over = self.machine.expire_now(&expire.whose, before, self.now());
        if !over.is_empty() {
            tracing::info!(
                queue = %self.parts.name, count = over.len(), whose = ?expire.whose,
                "a person ended deliveries before their time"
            );
        }
        self.answer_later(Answer::Expired {
            reply,
            offsets: over,
        });
    }
}

impl MessageStatus {
    fn add_letter(&mut self, letter: &History) {
        self.dead_letter = Some(letter.id);
        if self.state == MessageState::Dead {
            self.delivery = letter.delivery;
            self.attempts = letter.attempts;
            self.failures.clone_from(&letter.failures);
        }
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
