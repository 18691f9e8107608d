//! The existing streams: declared, described, deleted; and the progress of their queues.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Error;
use super::handle::{Handle, State};
use super::settings::{Declared, Description, Found, SCHEDULED_AHEAD, ScheduledState, Settings};
use crate::domain::id::{Offset, StreamId};
use crate::domain::name::StreamName;
use crate::store::stream::{self as sql, DeclareOutcome, DeleteOutcome, NextScheduled, StreamRow};
use crate::store::{self, Connection, Link, Patience};
use crate::supervisor::{Closed, Work};

/// The most scheduled messages of a stream that are counted for its description.
const WAITING_COUNTED_MAX: i64 = 100_000;

/// A change waits so long for locks that somebody else has, with a pause between two tries.
const HELD_UP: Duration = Duration::from_secs(5);
const HELD_PAUSE: Duration = Duration::from_millis(100);

/// Up to where every queue of a stream has settled, as the queue engine tells it.
#[derive(Debug, Default)]
pub(super) struct Watermarks {
    streams: Mutex<HashMap<StreamId, (Offset, Instant)>>,
}

impl Watermarks {
    pub(super) fn set(&self, stream: StreamId, watermark: Offset, as_of: Instant) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.insert(stream, (watermark, as_of));
    }

    /// The watermark and as of when it is known; `None` until it is told.
    pub(super) fn get(&self, stream: StreamId) -> Option<(Offset, Instant)> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.get(&stream).copied()
    }
}

/// Declares, describes and deletes streams, at a desk.
#[derive(Debug)]
pub(super) struct Catalogue {
    pub(super) link: Link,
    pub(super) state: Arc<State>,
    /// Bytes of streams when they could last be measured.
    pub(super) sizes: HashMap<StreamId, i64>,
}

impl Handle {
    /// Has something done by the catalogue. What fails in the database costs it its connection.
    async fn catalogue<T: Send + 'static>(
        &self,
        work: impl for<'a> FnOnce(&'a mut Catalogue) -> Work<'a, Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let asked = self.shared.catalogue.ask(move |catalogue| {
            Box::pin(async move {
                let answer = work(&mut *catalogue).await;
                if let Err(Error::Store(_)) = &answer {
                    catalogue.link.cut();
                }
                answer
            })
        });
        asked.await.map_err(|Closed| Error::Stopping)?
    }

    /// Declares a stream: creates it, or changes its settings. A message published after the answer goes where the patterns
    /// say.
    ///
    /// # Errors
    /// [`Error::Settings`], [`Error::Overlap`], or the database's.
    pub async fn declare(
        &self,
        name: StreamName,
        settings: Settings,
    ) -> Result<(Description, Declared), Error> {
        settings.validate(&name).map_err(Error::Settings)?;
        self.catalogue(move |catalogue| {
            Box::pin(async move { catalogue.declare(&name, &settings).await })
        })
        .await
    }

    /// Describes a stream.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn describe(&self, name: &StreamName) -> Result<Description, Error> {
        let name = name.clone();
        self.catalogue(move |catalogue| Box::pin(async move { catalogue.describe(&name).await }))
            .await
    }

    /// Finds a stream by name: what a reader needs, and cheaper than [`Handle::describe`].
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn find(&self, name: &StreamName) -> Result<Found, Error> {
        let name = name.clone();
        self.catalogue(move |catalogue| Box::pin(async move { catalogue.find(&name).await }))
            .await
    }

    /// Describes all streams, by name.
    ///
    /// # Errors
    /// The database's.
    pub async fn list(&self) -> Result<Vec<Description>, Error> {
        self.catalogue(|catalogue| Box::pin(catalogue.list())).await
    }

    /// Deletes a stream with its messages; with those that are to come later only if `is_forced`. Its topics fall to `main` from then on.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::HasQueues`], [`Error::HasScheduled`], [`Error::MainIsKept`], or the database's.
    pub async fn delete(&self, name: &StreamName, is_forced: bool) -> Result<(), Error> {
        let name = name.clone();
        self.catalogue(move |catalogue| {
            Box::pin(async move { catalogue.delete(&name, is_forced).await })
        })
        .await
    }
}

impl Catalogue {
    async fn declare(
        &mut self,
        name: &StreamName,
        settings: &Settings,
    ) -> Result<(Description, Declared), Error> {
        let Settings {
            patterns,
            retention,
            is_keyed,
        } = settings;
        let (mut patience, held) = (Patience::default(), HeldUp::default());
        let outcome = loop {
            // Done once more it finds what it declared.
            let declared = match self.link.get().await {
                Ok(connection) => {
                    sql::declare(connection, name, patterns, retention, *is_keyed).await
                }
                Err(error) => Err(error),
            };
            match declared {
                Ok(outcome) => break outcome,
                Err(error) => {
                    // On another connection.
                    self.link.cut();
                    held.again(error, &mut patience).await?;
                }
            }
        };
        let declared = match outcome {
            DeclareOutcome::Created => Declared::Created,
            DeclareOutcome::Unchanged => Declared::Unchanged,
            DeclareOutcome::Changed => Declared::Changed,
            DeclareOutcome::Full => return Err(Error::TooManyStreams),
            DeclareOutcome::KeyedIsFixed => {
                return Err(Error::KeyedIsFixed { name: name.clone() });
            }
            DeclareOutcome::Overlap {
                pattern,
                other_stream,
                other_pattern,
            } => {
                return Err(Error::Overlap {
                    pattern,
                    other_stream,
                    other_pattern,
                });
            }
        };
        if declared != Declared::Unchanged {
            tracing::info!(stream = name.as_str(), ?declared, "stream declared");
            self.state.maintain.notify_one();
        }
        Ok((self.describe(name).await?, declared))
    }

    async fn describe(&mut self, name: &StreamName) -> Result<Description, Error> {
        let found = self
            .list()
            .await?
            .into_iter()
            .find(|stream| stream.name == *name);
        let mut found = found.ok_or_else(|| Error::NotFound {
            stream: name.to_string(),
        })?;
        if let Some(scheduled) = &mut found.scheduled {
            let connection = self.link.get().await?;
            let count = sql::count_waiting(connection, found.id, WAITING_COUNTED_MAX).await?;
            scheduled.waiting = Some(count);
        }
        Ok(found)
    }

    /// A stream as a reader needs it, without the sizes.
    async fn find(&mut self, name: &StreamName) -> Result<Found, Error> {
        let not_found = || Error::NotFound {
            stream: name.to_string(),
        };
        let connection = self.link.get().await?;
        let streams = sql::load_catalogue(connection).await?.streams;
        let row = streams.into_iter().find(|stream| stream.name == *name);
        let row = row.ok_or_else(not_found)?;
        let head = sql::find_head(connection, row.id).await?;
        Ok(Found {
            id: row.id,
            first_offset: head.ok_or_else(not_found)?.floor.next(),
            is_keyed: row.is_keyed,
        })
    }

    async fn list(&mut self) -> Result<Vec<Description>, Error> {
        let state = Arc::clone(&self.state);
        let connection = self.link.get().await?;
        let streams = sql::load_catalogue(connection).await?.streams;
        measure(connection, &streams, &mut self.sizes).await?;
        let scheduled =
            sql::next_scheduled(connection, SCHEDULED_AHEAD, state.witness.now()).await?;
        let scheduled: HashMap<StreamId, ScheduledState> = scheduled
            .into_iter()
            .map(|next| (next.stream, scheduled_state(&next)))
            .collect();
        let mut descriptions = Vec::with_capacity(streams.len());
        for stream in streams {
            // Deleted since the catalogue was read.
            let Some(head) = sql::find_head(connection, stream.id).await? else {
                continue;
            };
            let floor = head.floor;
            let hint = state.tails.last(stream.id).max(floor);
            let top = skip_held(sql::read_top(connection, stream.id, hint).await)?.flatten();
            descriptions.push(Description {
                id: stream.id,
                name: stream.name,
                patterns: stream.patterns,
                retention: stream.retention,
                is_keyed: stream.is_keyed,
                unsettled_limit_used: state.limits.used(stream.id),
                scheduled: scheduled.get(&stream.id).copied(),
                first_offset: floor.next(),
                last_offset: top.unwrap_or(hint),
                message_bytes: self
                    .sizes
                    .get(&stream.id)
                    .map_or(0, |&bytes| bytes.unsigned_abs()),
                created_at: stream.created_at,
            });
        }
        descriptions.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(descriptions)
    }

    async fn delete(&mut self, name: &StreamName, is_forced: bool) -> Result<(), Error> {
        if *name == StreamName::main() {
            return Err(Error::MainIsKept);
        }
        let stream = self.describe(name).await?.id;
        let (mut patience, held) = (Patience::default(), HeldUp::default());
        let outcome = loop {
            // By its number, which no other stream gets.
            let deleted = match self.link.get().await {
                Ok(connection) => sql::delete(connection, stream, is_forced).await,
                Err(error) => Err(error),
            };
            match deleted {
                Ok(outcome) => break outcome,
                Err(error) => {
                    // On another connection.
                    self.link.cut();
                    held.again(error, &mut patience).await?;
                }
            }
        };
        let name = name.clone();
        match outcome {
            DeleteOutcome::Deleted => {}
            DeleteOutcome::HasQueues => return Err(Error::HasQueues { name }),
            DeleteOutcome::HasScheduled => return Err(Error::HasScheduled { name }),
        }
        tracing::info!(stream = name.as_str(), "stream deleted");
        self.state.tails.remove(stream);
        self.state.keys.forget(stream);
        self.state.cache.forget(stream);
        self.state.maintain.notify_one();
        Ok(())
    }
}

/// Measures the streams. One whose log is locked keeps the size that it had.
async fn measure(
    connection: &mut Connection,
    streams: &[StreamRow],
    sizes: &mut HashMap<StreamId, i64>,
) -> Result<(), store::Error> {
    if let Some(all) = skip_held(sql::read_sizes(connection).await)? {
        *sizes = all.into_iter().collect();
        return Ok(());
    }
    sizes.retain(|id, _| streams.iter().any(|stream| stream.id == *id));
    for stream in streams {
        let leaves = sql::read_leaf_sizes(connection, stream.id).await;
        if let Some(leaves) = skip_held(leaves)? {
            let bytes: u64 = leaves.iter().map(|(_, bytes)| bytes).sum();
            sizes.insert(stream.id, i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }
    Ok(())
}

/// None, if somebody has what was to be looked at locked.
fn skip_held<T>(looked: Result<T, store::Error>) -> Result<Option<T>, store::Error> {
    match looked {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_held() => Ok(None),
        Err(error) => Err(error),
    }
}

/// A change that does not get its locks is tried again: each try holds the heads of all streams, so it is a short one.
#[derive(Debug)]
struct HeldUp {
    until: Instant,
}

impl Default for HeldUp {
    fn default() -> Self {
        Self {
            until: Instant::now() + HELD_UP,
        }
    }
}

impl HeldUp {
    async fn again(
        &self,
        error: store::Error,
        patience: &mut Patience,
    ) -> Result<(), store::Error> {
        if !error.is_held() || Instant::now() >= self.until {
            return patience.again(error).await;
        }
        tokio::time::sleep(HELD_PAUSE).await;
        Ok(())
    }
}

fn scheduled_state(next: &NextScheduled) -> ScheduledState {
    let lag = next.due_at.map(|due_at| (next.clock - due_at).to_std());
    ScheduledState {
        next_due_at: next.due_at,
        waiting: None,
        lag: lag.and_then(Result::ok).unwrap_or_default(),
    }
}
