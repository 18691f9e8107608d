//! Creating, changing and deleting queues.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{mpsc, oneshot};

use super::Engine;
use super::errand::Errand;
use super::rebuild::Recovered;
use crate::domain::id::{Generation, Offset, QueueId, Slot, StreamId};
use crate::domain::name::{QueueName, StreamName, Topic, TopicPattern};
use crate::domain::policy::{Fault, Start};
use crate::domain::queue::{Queue, Random};
use crate::queue::api::{
    Declaration, Declared, Description, ENDED, Error, RECOVERING, stream_error,
};
use crate::queue::ask::Command;
use crate::queue::options::QUEUES_MAX;
use crate::store::queue::{Inserted, NewQueue, QueueRow};
use crate::{store, stream};

/// How a declaration is carried out.
enum Plan {
    /// There is no queue of this name.
    Make,
    /// There is one, and this is its row and its task.
    Change(Box<QueueRow>, Option<mpsc::Sender<Command>>),
}

impl Errand {
    pub(super) async fn declare(
        &self,
        name: QueueName,
        declaration: Declaration,
    ) -> Result<(Description, Declared), Error> {
        let streams = match &declaration.settings.dead_letter_topic {
            Some(_) => self.stream.list().await.map_err(stream_error)?,
            None => Vec::new(),
        };
        let (of, wanted) = (name.clone(), declaration.clone());
        let plan = self
            .visit(move |engine| engine.begin_declare(of, wanted, &streams))
            .await??;
        let of = name.clone();
        let declared = match plan {
            Plan::Make => self.make(name, declaration).await,
            Plan::Change(row, mailbox) => self.change(*row, mailbox, declaration).await,
        };
        self.visit(move |engine| drop(engine.declaring.remove(&of)))
            .await?;
        declared
    }

    async fn make(
        &self,
        name: QueueName,
        declaration: Declaration,
    ) -> Result<(Description, Declared), Error> {
        if let Start::Time(_) = declaration.start {
            // It is looked for in the log, so the stream has to be there.
            self.forget_stream(&declaration.stream);
        }
        let version = self.visit(|engine| engine.catalogue.version).await?;
        let (stream_id, inserted, former) = self.insert(&name, &declaration).await?;
        match inserted {
            Inserted::New {
                id,
                start_offset,
                created_at,
            } => {
                let row = QueueRow {
                    id,
                    name: name.clone(),
                    stream_id,
                    stream: declaration.stream,
                    patterns: declaration.topics,
                    settings: declaration.settings,
                    start: declaration.start,
                    generation: Generation(1),
                    start_offset,
                    slot: Slot::of(id),
                    is_paused: false,
                    renewal: None,
                    created_at,
                    former,
                };
                let description = describe(&row);
                if !self.visit(move |engine| engine.begin(row, version)).await? {
                    // Another node may have deleted it since.
                    self.look_up(name).await.map_err(deleted)?;
                }
                Ok((description, Declared::Created))
            }
            Inserted::NameTaken => {
                // One whose insert seemed to fail, or another node's.
                self.look_up(name.clone()).await.map_err(deleted)?;
                let found = self.visit(move |engine| engine.plan_change(&name)).await?;
                match found {
                    Some(Plan::Change(row, mailbox)) => {
                        self.change(*row, mailbox, declaration).await
                    }
                    _ => Err(DELETED),
                }
            }
            Inserted::NoStream => Err(Error::StreamNotFound {
                stream: declaration.stream,
            }),
        }
    }

    /// Inserts the row of a new queue. With the stream that it is on, and what is known of a former queue of its name.
    async fn insert(
        &self,
        name: &QueueName,
        declaration: &Declaration,
    ) -> Result<(StreamId, Inserted, Vec<QueueId>), Error> {
        let new = self.new_queue(name, declaration).await?;
        let _statement = self.statement().await;
        let (id, former) = store::queue::next_queue(&self.database, name).await?;
        let inserted = store::queue::insert_queue(&self.database, id, &new).await?;
        if inserted != Inserted::NoStream || !self.forget_stream(&declaration.stream) {
            return Ok((new.stream_id, inserted, former));
        }
        // The one of that name that was known is gone; there may be another.
        let new = self.new_queue(name, declaration).await?;
        let inserted = store::queue::insert_queue(&self.database, id, &new).await?;
        Ok((new.stream_id, inserted, former))
    }

    /// The number of a stream. Numbers are never used again, so one that was found is asked for once.
    async fn stream_id(&self, name: &StreamName) -> Result<StreamId, Error> {
        let known = self.known_streams().get(name).copied();
        if let Some(id) = known {
            return Ok(id);
        }
        match self.stream.describe(name).await {
            Ok(stream) => {
                self.known_streams().insert(name.clone(), stream.id);
                Ok(stream.id)
            }
            Err(stream::Error::NotFound { .. }) => Err(Error::StreamNotFound {
                stream: name.clone(),
            }),
            Err(error) => Err(stream_error(error)),
        }
    }

    fn known_streams(&self) -> MutexGuard<'_, HashMap<StreamName, StreamId>> {
        let known = self.stream_ids.lock();
        known.unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the stream asked for by name the next time. Whether its number was known.
    fn forget_stream(&self, name: &StreamName) -> bool {
        self.known_streams().remove(name).is_some()
    }

    async fn new_queue(
        &self,
        name: &QueueName,
        declaration: &Declaration,
    ) -> Result<NewQueue, Error> {
        let stream_id = self.stream_id(&declaration.stream).await?;
        let before_start = match declaration.start {
            Start::Time(at) => self.offset_at(stream_id, at).await?,
            _ => Offset(0),
        };
        Ok(NewQueue {
            name: name.clone(),
            stream_id,
            patterns: declaration.topics.clone(),
            settings: declaration.settings.clone(),
            start: declaration.start,
            before_start,
        })
    }

    /// The last offset before a time.
    pub(super) async fn offset_at(
        &self,
        stream: StreamId,
        at: DateTime<Utc>,
    ) -> Result<Offset, Error> {
        let found = self.stream.offset_at(stream, at).await;
        found.map_err(stream_error)
    }

    async fn change(
        &self,
        row: QueueRow,
        mailbox: Option<mpsc::Sender<Command>>,
        declaration: Declaration,
    ) -> Result<(Description, Declared), Error> {
        if row.stream != declaration.stream {
            return Err(Error::StreamChange {
                queue: row.name,
                stream: row.stream,
            });
        }
        if row.patterns == declaration.topics && row.settings == declaration.settings {
            return Ok((describe(&row), Declared::Unchanged));
        }
        self.shared.check_owned(&row.name, row.slot)?;
        if row.patterns != declaration.topics {
            self.pin(&row, mailbox.as_ref()).await?;
        }
        let (id, slot) = (row.id, row.slot);
        let (topics, settings) = (&declaration.topics, &declaration.settings);
        let updated = {
            let _statement = self.statement().await;
            store::queue::update_queue(&self.database, id, topics, settings).await
        };
        if let Err(error) = updated {
            // It may be done all the same. The stored row says which patterns hold from the journaled position on.
            self.visit(move |engine| engine.read_again(slot)).await?;
            return Err(error.into());
        }
        let changed = declaration.clone();
        let now = self
            .visit(move |engine| engine.note_change(id, &changed))
            .await?;
        let (row, mailbox) = now.unwrap_or((row, None));
        if let Some(mailbox) = mailbox {
            let declaration = Box::new(declaration);
            ask(&mailbox, self.shared.outcome_wait, |reply| {
                Command::Change { declaration, reply }
            })
            .await?;
        }
        Ok((describe(&row), Declared::Changed))
    }

    /// Has the queue look no further, and its scan position committed with all that was found: after a restart the new
    /// topics must neither hide what the former ones found nor bring what they had passed over.
    async fn pin(
        &self,
        row: &QueueRow,
        mailbox: Option<&mpsc::Sender<Command>>,
    ) -> Result<(), Error> {
        let mailbox = mailbox.ok_or(RECOVERING)?;
        if self.contact.outage().borrow().standing {
            return Err(Error::Unavailable {
                why: "Postgres cannot be reached",
            });
        }
        let bound = self.shared.outcome_wait;
        let pinned = ask(mailbox, bound, |reply| Command::Pin { reply }).await;
        if pinned.is_err() {
            let declaration = Box::new(describe(row).declaration);
            let (reply, _) = oneshot::channel();
            let _ = mailbox.send(Command::Change { declaration, reply }).await;
        }
        pinned
    }

    pub(super) async fn delete(&self, name: QueueName) -> Result<(), Error> {
        let found = move |engine: &mut Engine| {
            let id = engine.find(&name).ok_or(Error::NotFound { queue: name })?;
            if let Some(owned) = engine.queues.get(&id) {
                engine.check_owned(&owned.row)?;
            }
            Ok::<_, Error>(id)
        };
        let id = self.visit(found).await??;
        {
            let _statement = self.statement().await;
            store::queue::delete_queue(&self.database, id).await?;
        }
        self.visit(move |engine| engine.forget(id)).await
    }
}

const DELETED: Error = Error::Unavailable {
    why: "it was deleted by another request at the same moment",
};

/// A queue that was there a moment ago could not be found.
fn deleted(error: Error) -> Error {
    match error {
        Error::NotFound { .. } => DELETED,
        error => error,
    }
}

impl Engine {
    /// Takes note of a declaration that is about to be carried out, unless it is refused.
    fn begin_declare(
        &mut self,
        name: QueueName,
        declaration: Declaration,
        streams: &[stream::Description],
    ) -> Result<Plan, Error> {
        self.check_forward(&name, &declaration, streams)?;
        let plan = match self.plan_change(&name) {
            Some(plan) => plan,
            None => {
                let limit = self.options.queues_max.min(QUEUES_MAX);
                let made = self.declaring.keys();
                let made = made.filter(|name| self.find(name).is_none()).count();
                if self.queues.len() + made >= limit {
                    return Err(Error::TooManyQueues { limit });
                }
                Plan::Make
            }
        };
        self.declaring.insert(name, declaration);
        Ok(plan)
    }

    fn plan_change(&self, name: &QueueName) -> Option<Plan> {
        let owned = self.queues.get(&self.find(name)?)?;
        let row = Box::new(owned.row.clone());
        Some(Plan::Change(row, owned.mailbox.clone()))
    }

    /// Refuses a topic for dead letters that would bring them back to this queue: by its own patterns, or by the dead letters
    /// of others that take them.
    fn check_forward(
        &self,
        name: &QueueName,
        declaration: &Declaration,
        streams: &[stream::Description],
    ) -> Result<(), Error> {
        let Some(first) = &declaration.settings.dead_letter_topic else {
            return Ok(());
        };
        let owner = |topic: &Topic| {
            let claims = |patterns: &[TopicPattern]| patterns.iter().any(|p| p.matches(topic));
            let owner = streams.iter().find(|s| claims(&s.patterns));
            owner.map_or_else(StreamName::main, |stream| stream.name.clone())
        };
        let mut topics = vec![first.clone()];
        let mut next = 0;
        while let Some(topic) = topics.get(next).cloned() {
            next += 1;
            let stream = owner(&topic);
            let takes = |of: &StreamName, patterns: &[TopicPattern]| {
                *of == stream && patterns.iter().any(|pattern| pattern.matches(&topic))
            };
            if takes(&declaration.stream, &declaration.topics) {
                let reason = match next {
                    1 => "cannot be a topic that the queue itself matches".to_owned(),
                    _ => format!(
                        "leads back to this queue through the dead letters of other queues on `{topic}`"
                    ),
                };
                return Err(Error::Invalid(Fault {
                    field: "dead_letter_topic",
                    reason,
                }));
            }
            for (other, stream, patterns, further) in self.forwarded() {
                if other != name && takes(stream, patterns) && !topics.contains(further) {
                    topics.push(further.clone());
                }
            }
        }
        Ok(())
    }

    pub(super) fn find(&self, name: &QueueName) -> Option<QueueId> {
        let known = self.shared.queues.read();
        let known = known.unwrap_or_else(PoisonError::into_inner);
        known.get(name).map(|known| known.description.id)
    }

    /// Starts a queue that was just made, of which nothing is to be recovered. False when it was not: the catalogue has
    /// changed since that version, and with it perhaps the queue.
    fn begin(&mut self, row: QueueRow, version: i64) -> bool {
        if self.queues.contains_key(&row.id) {
            // What a heartbeat brought was quicker.
            return true;
        }
        if self.catalogue.version != version {
            return false;
        }
        let (id, slot) = (row.id, row.slot);
        let mut machine = Queue::new(
            id,
            row.generation,
            row.start_offset,
            row.settings.clone(),
            Random::new(id.0 as u64),
        );
        machine.set_former(row.former.clone());
        self.add(row);
        let state = self.slots.get(&slot);
        if let Some(state) = state
            && state.is_recovered
            && let Some(fence) = state.fence.clone()
        {
            self.start_task(Recovered::new(machine), &fence);
        }
        true
    }

    /// Takes in a queue that is found in the database. One whose slot is recovered already has to be recovered alone.
    pub(super) fn take_over(&mut self, row: QueueRow) {
        let id = row.id;
        self.add(row);
        self.recover_alone(id);
    }

    /// The queue is declared anew. With its row and its task now; None when it was deleted meanwhile.
    fn note_change(
        &mut self,
        id: QueueId,
        declaration: &Declaration,
    ) -> Option<(QueueRow, Option<mpsc::Sender<Command>>)> {
        let owned = self.queues.get_mut(&id)?;
        owned.row.patterns.clone_from(&declaration.topics);
        owned.row.settings.clone_from(&declaration.settings);
        let now = (owned.row.clone(), owned.mailbox.clone());
        self.show_row(id);
        Some(now)
    }

    /// The queues, those included that are being declared, that forward dead letters: what each takes, and to which topic it
    /// forwards.
    fn forwarded(
        &self,
    ) -> impl Iterator<Item = (&QueueName, &StreamName, &[TopicPattern], &Topic)> {
        let known = self.queues.values().map(|owned| {
            let row = &owned.row;
            (&row.name, &row.stream, &row.patterns[..], &row.settings)
        });
        let declared = self.declaring.iter();
        let declared = declared.map(|(name, of)| (name, &of.stream, &of.topics[..], &of.settings));
        known
            .chain(declared)
            .filter_map(|(name, stream, patterns, settings)| {
                let further = settings.dead_letter_topic.as_ref()?;
                Some((name, stream, patterns, further))
            })
    }
}

/// Has a queue's task do something, and waits until it is committed.
async fn ask(
    mailbox: &mpsc::Sender<Command>,
    bound: Duration,
    command: impl FnOnce(oneshot::Sender<Result<(), Error>>) -> Command,
) -> Result<(), Error> {
    let (reply, answer) = oneshot::channel();
    let asking = async {
        let sent = mailbox.send(command(reply)).await;
        sent.map_err(|_| ENDED)?;
        answer.await.unwrap_or(Err(ENDED))
    };
    let answer = tokio::time::timeout(bound, asking).await;
    answer.unwrap_or(Err(Error::Unavailable {
        why: "the writes of the change could not be finished in time",
    }))
}

pub(super) fn describe(row: &QueueRow) -> Description {
    Description {
        id: row.id,
        name: row.name.clone(),
        stream_id: row.stream_id,
        declaration: Declaration {
            stream: row.stream.clone(),
            topics: row.patterns.clone(),
            start: row.start,
            settings: row.settings.clone(),
        },
        generation: row.generation,
        start_offset: row.start_offset,
        is_paused: row.is_paused,
        created_at: row.created_at,
        status: None,
        log_behind: None,
    }
}
