//! Copies of dead letters for their queue's `dead_letter_topic`. The letter's row shows from its death on that a copy is
//! due. The copy's id follows from the death, and the log knows it, so a copy whose mark was lost is not published again.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use crate::domain::id::QueueId;
use crate::domain::message::Message;
use crate::domain::name::{QueueName, Topic};
use crate::queue::shared::Shared;
use crate::store::letter::Unforwarded;
use crate::store::{self, Database};
use crate::stream::{self, AppendError, Member};
use crate::supervisor::{Backoff, Duty, Next, Routine, Supervisor};

/// Copies of one append.
const BATCH: i64 = 100;
/// Bytes of payloads of one append, about.
const BATCH_BYTES: i64 = 4 * 1024 * 1024;
/// Letters are looked for this often when nobody says that there are some: after a start, or a failure.
const EVERY: Duration = Duration::from_secs(5);
/// An append that failed is tried again after this.
const RETRY: Duration = Duration::from_secs(1);
/// The namespace of the ids of copies (RFC 9562, name-based).
const NAMESPACE: Uuid = Uuid::from_u128(0x8d5b_61d6_3f3a_4c56_9a0e_5f2a_6d1f_0b7c);

pub(super) struct Forwarder {
    pub(super) database: Database,
    pub(super) stream: stream::Handle,
    pub(super) shared: Arc<Shared>,
}

/// The outcome of copies.
enum Forwarded {
    /// They are in the log.
    Done,
    /// Not now.
    Later,
    /// Never.
    Refused(AppendError),
}

impl Duty for Forwarder {
    type Error = store::Error;

    /// Publishes copies of the next letters.
    async fn pass(&mut self) -> Result<Next, store::Error> {
        let owned = self.owned();
        if owned.is_empty() {
            return Ok(Next::Tick);
        }
        let queues: Vec<QueueId> = owned.keys().copied().collect();
        let letters =
            store::letter::find_unforwarded(&self.database, &queues, BATCH, BATCH_BYTES).await?;
        if letters.is_empty() {
            return Ok(Next::Tick);
        }
        let copies: Vec<Option<Message>> = letters
            .iter()
            .map(|letter| copy_of(letter, owned.get(&letter.queue)?))
            .collect();
        match self
            .publish(copies.iter().flatten().cloned().collect())
            .await
        {
            Forwarded::Done => self.mark(&letters).await?,
            Forwarded::Later => return Ok(Next::Within(RETRY)),
            // One of them is at fault: each alone.
            Forwarded::Refused(_) => {
                for (letter, copy) in letters.iter().zip(copies) {
                    match self.publish(copy.into_iter().collect()).await {
                        Forwarded::Done => {}
                        Forwarded::Later => return Ok(Next::Within(RETRY)),
                        Forwarded::Refused(error) => {
                            self.shared.metrics.forwards_refused.inc();
                            tracing::error!(
                                queue = %letter.queue, letter = %letter.id, topic = letter.topic,
                                error = &error as &dyn std::error::Error,
                                "a dead letter's copy cannot be published; it stays where it is"
                            );
                        }
                    }
                    self.mark(std::slice::from_ref(letter)).await?;
                }
            }
        }
        // Another batch may wait.
        Ok(Next::AtOnce)
    }

    fn failed(&mut self, error: &store::Error) {
        tracing::debug!(
            error = error as &dyn std::error::Error,
            "forwarding dead letters failed; trying again"
        );
    }
}

impl Forwarder {
    pub(super) fn start(self, supervisor: &Supervisor) {
        let routine = Routine::every(EVERY, "queue forwarder")
            .woken_by(&self.shared.forward)
            .backing_off(Backoff::constant(RETRY));
        supervisor.start(routine, self);
    }

    /// The queues whose tasks run here.
    fn owned(&self) -> HashMap<QueueId, QueueName> {
        let queues = self.shared.queues.read();
        let queues = queues.unwrap_or_else(PoisonError::into_inner);
        let owned = queues.values().filter(|known| known.mailbox.is_some());
        owned
            .map(|known| (known.description.id, known.description.name.clone()))
            .collect()
    }

    async fn publish(&self, messages: Vec<Message>) -> Forwarded {
        if messages.is_empty() {
            return Forwarded::Done;
        }
        let count = messages.len() as u64;
        let member = Member::Publish {
            messages,
            check_ids: true,
            as_one: Vec::new(),
        };
        match self.stream.append(member).await {
            Ok(placed) => {
                let duplicates = placed.iter().filter(|placed| placed.duplicate).count() as u64;
                self.shared.metrics.forwarded.inc_by(count - duplicates);
                Forwarded::Done
            }
            Err(
                AppendError::OutcomeUnknown
                | AppendError::Unavailable(_)
                | AppendError::Overloaded
                | AppendError::Stopping,
            ) => Forwarded::Later,
            Err(error) => Forwarded::Refused(error),
        }
    }

    async fn mark(&self, letters: &[Unforwarded]) -> Result<(), store::Error> {
        let marks: Vec<_> = letters
            .iter()
            .map(|letter| (letter.queue, letter.id.offset, letter.delivery))
            .collect();
        store::letter::mark_forwarded(&self.database, &marks).await
    }
}

/// The copy as a separate event: the payload unchanged, and its origin in attributes.
fn copy_of(letter: &Unforwarded, queue: &QueueName) -> Option<Message> {
    let original = &letter.copy.message;
    let death = format!("{}:{}:{}", letter.queue, letter.id, letter.delivery);
    let mut extensions = original.extensions.clone();
    let reason = letter.failures.last().map(|failure| failure.reason.clone());
    for (name, value) in [
        ("postroadqueue", Some(Value::from(queue.as_str()))),
        ("postroadletter", Some(letter.id.to_string().into())),
        ("postroadcause", Some(letter.cause.as_str().into())),
        ("postroadattempts", Some(letter.attempts.into())),
        ("postroadreason", reason.map(Value::from)),
        ("postroaddiedat", Some(letter.died_at.to_rfc3339().into())),
        ("postroadtopic", Some(original.topic.as_str().into())),
        ("postroadid", Some(original.id.as_str().into())),
        ("postroadsource", Some(original.source.as_str().into())),
    ] {
        if let Some(value) = value {
            extensions.insert(name.to_owned(), value);
        }
    }
    let kind = original.kind.clone();
    Some(Message {
        id: Uuid::new_v5(&NAMESPACE, death.as_bytes()).to_string(),
        source: format!("/postroad/queues/{queue}"),
        kind: kind.or_else(|| Some(original.topic.to_string())),
        topic: Topic::parse(&letter.topic).ok()?,
        extensions,
        ..original.clone()
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use bytes::Bytes;
    use chrono::DateTime;

    use super::*;
    use crate::domain::id::Offset;
    use crate::domain::letter::LetterId;
    use crate::domain::message::Data;
    use crate::domain::queue::{At, Failure};
    use crate::store::letter::Copy;

    #[test]
    fn a_copy_says_where_it_comes_from_and_has_one_id_for_one_death() {
        let mut letter = Unforwarded {
            queue: QueueId(3),
            id: LetterId::parse("2-17").unwrap(),
            delivery: 5,
            attempts: 4,
            cause: "out_of_attempts".into(),
            failures: vec![Failure {
                at: At(0),
                reason: "no stock".into(),
            }],
            died_at: DateTime::UNIX_EPOCH,
            topic: "dead.orders".into(),
            copy: Copy {
                offset: Offset(17),
                appended_at: DateTime::UNIX_EPOCH,
                message: Message {
                    id: "a".into(),
                    source: "/shop".into(),
                    kind: None,
                    topic: Topic::parse("orders.created").unwrap(),
                    key: Some("k".into()),
                    subject: None,
                    time: None,
                    data_content_type: None,
                    data_schema: None,
                    data: Data::Json(Bytes::from_static(b"{\"a\": 1.0}")),
                    extensions: serde_json::Map::new(),
                    expected_version: None,
                },
            },
        };
        let queue = QueueName::parse("billing").unwrap();
        let copy = copy_of(&letter, &queue).unwrap();
        let event = String::from_utf8(copy.to_event_json().to_vec()).unwrap();
        let id = &copy.id;
        assert_eq!(
            event,
            format!(
                "{{\"specversion\":\"1.0\",\"id\":\"{id}\",\"source\":\"/postroad/queues/billing\",\"type\":\"orders.created\",\
                 \"partitionkey\":\"k\",\"postroadattempts\":4,\"postroadcause\":\"out_of_attempts\",\
                 \"postroaddiedat\":\"1970-01-01T00:00:00+00:00\",\"postroadid\":\"a\",\"postroadletter\":\"2-17\",\
                 \"postroadqueue\":\"billing\",\"postroadreason\":\"no stock\",\"postroadsource\":\"/shop\",\
                 \"postroadtopic\":\"orders.created\",\"data\":{{\"a\": 1.0}}}}"
            )
        );
        for name in copy.extensions.keys() {
            let is_plain = name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            assert!(is_plain && name.len() <= 20, "{name}");
        }
        assert_eq!(copy_of(&letter, &queue).unwrap().id, *id);
        letter.delivery += 1;
        assert_ne!(copy_of(&letter, &queue).unwrap().id, *id);
    }
}
