//! Creating, changing and deleting queues.

use std::sync::PoisonError;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{mpsc, oneshot};

use super::Engine;
use super::rebuild::Recovered;
use crate::domain::id::{Generation, Offset, QueueId, Slot, StreamId};
use crate::domain::name::{QueueName, StreamName, Topic, TopicPattern};
use crate::domain::policy::{Fault, Start};
use crate::domain::queue::{Queue, Random};
use crate::queue::api::{Declaration, Declared, Description, ENDED, Error, stream_error};
use crate::queue::ask::Command;
use crate::queue::options::QUEUES_MAX;
use crate::store::queue::{Inserted, NewQueue, QueueRow};
use crate::{store, stream};

impl Engine {
    pub(super) async fn declare(
        &mut self,
        name: QueueName,
        declaration: Declaration,
    ) -> Result<(Description, Declared), Error> {
        self.check_forward(&name, &declaration).await?;
        if let Some(id) = self.find(&name) {
            return self.change(id, declaration).await;
        }
        if self.queues.len() >= self.options.queues_max.min(QUEUES_MAX) {
            return Err(Error::TooManyQueues {
                limit: self.options.queues_max.min(QUEUES_MAX),
            });
        }
        if let Start::Time(_) = declaration.start {
            // It is looked for in the log, so the stream has to be there.
            self.stream_ids.remove(&declaration.stream);
        }
        let mut new = self.new_queue(name.clone(), &declaration).await?;
        let (id, former) = store::queue::next_queue(&self.database, &name).await?;
        let mut inserted = store::queue::insert_queue(&self.database, id, &new).await?;
        if inserted == Inserted::NoStream && self.stream_ids.remove(&declaration.stream).is_some() {
            // The one of that name that was known is gone; there may be another.
            new = self.new_queue(name.clone(), &declaration).await?;
            inserted = store::queue::insert_queue(&self.database, id, &new).await?;
        }
        match inserted {
            Inserted::New {
                id,
                start_offset,
                created_at,
            } => {
                let row = QueueRow {
                    id,
                    name,
                    stream_id: new.stream_id,
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
                Ok((self.begin(row), Declared::Created))
            }
            Inserted::NameTaken => {
                // One whose insert seemed to fail, or another node's.
                if let Some(row) = store::queue::find_queue(&self.database, &name).await? {
                    self.take_in(row).await;
                }
                match self.find(&name) {
                    Some(id) => self.change(id, declaration).await,
                    None => Err(Error::Unavailable {
                        why: "it was deleted by another request at the same moment",
                    }),
                }
            }
            Inserted::NoStream => Err(Error::StreamNotFound {
                stream: declaration.stream,
            }),
        }
    }

    /// Refuses a topic for dead letters that would bring them back to this queue: by its own patterns, or by the dead letters
    /// of others that take them.
    async fn check_forward(
        &self,
        name: &QueueName,
        declaration: &Declaration,
    ) -> Result<(), Error> {
        let Some(first) = &declaration.settings.dead_letter_topic else {
            return Ok(());
        };
        let streams = self.stream.list().await.map_err(stream_error)?;
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
            for other in self.queues.values().map(|owned| &owned.row) {
                if let Some(further) = &other.settings.dead_letter_topic
                    && other.name != *name
                    && takes(&other.stream, &other.patterns)
                    && !topics.contains(further)
                {
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

    /// The number of a stream. Numbers are never used again, so one that was found is asked for once.
    async fn stream_id(&mut self, name: &StreamName) -> Result<StreamId, Error> {
        if let Some(&id) = self.stream_ids.get(name) {
            return Ok(id);
        }
        match self.stream.describe(name).await {
            Ok(stream) => {
                self.stream_ids.insert(name.clone(), stream.id);
                Ok(stream.id)
            }
            Err(stream::Error::NotFound { .. }) => Err(Error::StreamNotFound {
                stream: name.clone(),
            }),
            Err(error) => Err(stream_error(error)),
        }
    }

    async fn new_queue(
        &mut self,
        name: QueueName,
        declaration: &Declaration,
    ) -> Result<NewQueue, Error> {
        let stream_id = self.stream_id(&declaration.stream).await?;
        let before_start = match declaration.start {
            Start::Time(at) => self.offset_at(stream_id, at).await?,
            _ => Offset(0),
        };
        Ok(NewQueue {
            name,
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

    /// Starts a queue that was just made: it has nothing to recover.
    fn begin(&mut self, row: QueueRow) -> Description {
        let description = describe(&row);
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
        description
    }

    /// Takes in a queue that is found in the database. One whose slot is recovered already has to be recovered alone.
    pub(super) fn take_over(&mut self, row: QueueRow) {
        let id = row.id;
        self.add(row);
        self.recover_alone(id);
    }

    async fn change(
        &mut self,
        id: QueueId,
        declaration: Declaration,
    ) -> Result<(Description, Declared), Error> {
        let Some(owned) = self.queues.get(&id) else {
            return Err(Error::Stopping);
        };
        let (row, mailbox) = (owned.row.clone(), owned.mailbox.clone());
        if row.stream != declaration.stream {
            return Err(Error::StreamChange {
                queue: row.name,
                stream: row.stream,
            });
        }
        if row.patterns == declaration.topics && row.settings == declaration.settings {
            return Ok((describe(&row), Declared::Unchanged));
        }
        self.check_owned(&row)?;
        if row.patterns != declaration.topics {
            self.pin(&row, mailbox.as_ref()).await?;
        }
        let (topics, settings) = (&declaration.topics, &declaration.settings);
        let updated = store::queue::update_queue(&self.database, id, topics, settings).await;
        if let Err(error) = updated {
            // It may be done all the same. The stored row says which patterns hold from the journaled position on.
            self.read_again(row.slot).await;
            return Err(error.into());
        }
        if let Some(owned) = self.queues.get_mut(&id) {
            owned.row.patterns.clone_from(&declaration.topics);
            owned.row.settings.clone_from(&declaration.settings);
        }
        self.show_row(id);
        if let Some(mailbox) = mailbox {
            let declaration = Box::new(declaration);
            ask(&mailbox, self.shared.outcome_wait, |reply| {
                Command::Change { declaration, reply }
            })
            .await?;
        }
        let row = self.queues.get(&id).map_or(row, |owned| owned.row.clone());
        Ok((describe(&row), Declared::Changed))
    }

    /// Has the queue look no further, and its scan position committed with all that was found: after a restart the new
    /// topics must neither hide what the former ones found nor bring what they had passed over.
    async fn pin(
        &self,
        row: &QueueRow,
        mailbox: Option<&mpsc::Sender<Command>>,
    ) -> Result<(), Error> {
        let Some(mailbox) = mailbox else {
            return Err(Error::Unavailable {
                why: "its state is being recovered",
            });
        };
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

    pub(super) async fn delete(&mut self, name: &QueueName) -> Result<(), Error> {
        let Some(id) = self.find(name) else {
            return Err(Error::NotFound {
                queue: name.clone(),
            });
        };
        if let Some(owned) = self.queues.get(&id) {
            self.check_owned(&owned.row)?;
        }
        store::queue::delete_queue(&self.database, id).await?;
        self.forget(id).await;
        Ok(())
    }
}

/// Has a queue's task do something, and waits until it is committed.
async fn ask(
    mailbox: &mpsc::Sender<Command>,
    bound: Duration,
    command: impl FnOnce(oneshot::Sender<Result<(), Error>>) -> Command,
) -> Result<(), Error> {
    let (reply, answer) = oneshot::channel();
    let sent = mailbox.send(command(reply)).await;
    sent.map_err(|_| ENDED)?;
    match tokio::time::timeout(bound, answer).await {
        Ok(answer) => answer.unwrap_or(Err(ENDED)),
        Err(_) => Err(Error::Unavailable {
            why: "the writes of the change could not be finished in time",
        }),
    }
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
