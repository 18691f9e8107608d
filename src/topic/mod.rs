//! Settings of topics: a JSON Schema for payloads, and for publishing over HTTP a largest size and a rate. Declared by pattern,
//! kept in the database, and applied by every node from memory: the node that takes a declaration applies it before it
//! answers, the others within a second.
//!
//! The task asks for the version once a second and reads all settings when it has risen. While the database is away the last ones
//! go on. Schemas and sizes are the same everywhere; a rate is each node's own.

mod rate;
mod rules;
mod schema;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use crate::domain::message::Message;
use crate::domain::name::TopicPattern;
use crate::store::topic::{self as sql, Declared as Stored, SettingsRow};
use crate::store::{self, Database};
use crate::supervisor::{OnEnd, Supervisor};

pub use rules::{Applied, Rules};
pub use schema::{MISMATCHES_MAX, Mismatch, SCHEMA_MAX_BYTES, Schema};

/// The most patterns that may have settings.
pub const SETTINGS_MAX_COUNT: usize = 1_000;
/// How often a node looks for what others changed.
const POLL: Duration = Duration::from_secs(1);
/// Jobs that wait.
const JOBS_MAX: usize = 256;

/// What is declared for the topics of a pattern.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    /// JSON Schema, as text, for payloads from HTTP and from outboxes.
    pub schema: Option<String>,
    /// The largest payload over HTTP, in bytes.
    pub max_bytes: Option<u32>,
    /// Messages per second over HTTP, on each node.
    pub rate_per_second: Option<f64>,
    /// Messages that may come at once; what comes in a second without it.
    pub burst: Option<u32>,
}

/// Settings as they are kept.
pub type Description = SettingsRow;

/// What a declaration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// The pattern had no settings.
    Created,
    /// It had, and has these now.
    Changed,
}

/// Why settings could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The schema is none, or not one that can be asked.
    #[error("the schema {0}")]
    Schema(String),
    /// The pattern has no settings.
    #[error("the topics `{pattern}` have no settings")]
    NotFound {
        /// The pattern asked for.
        pattern: TopicPattern,
    },
    /// There are as many as there may be.
    #[error("{SETTINGS_MAX_COUNT} patterns have settings, and no more may")]
    TooMany,
    /// The task has ended.
    #[error("the broker is stopping")]
    Stopping,
    /// The database could not do it.
    #[error("the database could not be used")]
    Store(#[from] store::Error),
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

#[derive(Debug)]
enum Job {
    Declare(TopicPattern, Settings, Reply<(Description, Declared)>),
    Delete(TopicPattern, Reply<()>),
    List(Reply<Vec<Description>>),
}

/// The settings of topics. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    rules: watch::Receiver<Arc<Rules>>,
    jobs: mpsc::Sender<Job>,
}

impl Handle {
    /// The rules of now.
    #[must_use]
    pub fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.borrow())
    }

    /// Declares settings in place of what the pattern had. This node applies them once it answers.
    ///
    /// # Errors
    /// [`Error::Schema`], [`Error::TooMany`], or the database's.
    pub async fn declare(
        &self,
        pattern: TopicPattern,
        settings: Settings,
    ) -> Result<(Description, Declared), Error> {
        if let Some(text) = &settings.schema {
            Schema::compile(text).map_err(Error::Schema)?;
        }
        self.ask(|reply| Job::Declare(pattern, settings, reply))
            .await
    }

    /// What a pattern has.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn describe(&self, pattern: &TopicPattern) -> Result<Description, Error> {
        let all = self.list().await?;
        let found = all.into_iter().find(|row| row.pattern == *pattern);
        found.ok_or_else(|| Error::NotFound {
            pattern: pattern.clone(),
        })
    }

    /// What all patterns have, by pattern.
    ///
    /// # Errors
    /// The database's.
    pub async fn list(&self) -> Result<Vec<Description>, Error> {
        self.ask(Job::List).await
    }

    /// Deletes what a pattern has.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn delete(&self, pattern: &TopicPattern) -> Result<(), Error> {
        self.ask(|reply| Job::Delete(pattern.clone(), reply)).await
    }

    /// Takes messages out of the rates of their topics: all, or none.
    ///
    /// # Errors
    /// How long to wait, and the pattern whose rate is used up.
    pub fn admit(&self, messages: &[Message]) -> Result<(), (Duration, TopicPattern)> {
        let rules = self.rules();
        let mut counts: HashMap<TopicPattern, (Arc<rate::Bucket>, u64)> = HashMap::new();
        for message in messages {
            let Some(applied) = rules.of(&message.topic) else {
                return Ok(());
            };
            if let Some((pattern, bucket)) = &applied.bucket {
                let counted = counts.entry(pattern.clone());
                counted.or_insert_with(|| (Arc::clone(bucket), 0)).1 += 1;
            }
        }
        let now = Instant::now();
        let waits = counts.iter().filter_map(|(pattern, (bucket, count))| {
            Some((bucket.wait(*count, now)?, pattern.clone()))
        });
        if let Some(longest) = waits.max() {
            return Err(longest);
        }
        // Another request can have come in between: then a little is owed.
        for (bucket, count) in counts.values() {
            bucket.take(*count, now);
        }
        Ok(())
    }

    async fn ask<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.jobs.send(job(reply)).await;
        sent.map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)?
    }
}

/// Reads the settings and starts the task that keeps them.
///
/// # Errors
/// The database's.
pub async fn start(db: Database, supervisor: &Supervisor) -> Result<Handle, Error> {
    let (version, rows) = sql::list(&db).await?;
    let rules = Rules::new(version, rows, &Rules::default());
    let (rules, watched) = watch::channel(Arc::new(rules));
    let (jobs, inbox) = mpsc::channel(JOBS_MAX);
    let task = Task {
        db,
        supervisor: supervisor.clone(),
        rules,
    };
    supervisor.spawn("topic settings", OnEnd::StopProcess, task.run(inbox));
    Ok(Handle {
        rules: watched,
        jobs,
    })
}

struct Task {
    db: Database,
    supervisor: Supervisor,
    rules: watch::Sender<Arc<Rules>>,
}

impl Task {
    async fn run(self, mut inbox: mpsc::Receiver<Job>) {
        loop {
            let job = tokio::select! {
                job = inbox.recv() => job,
                () = self.supervisor.stopping() => return,
                () = tokio::time::sleep(POLL) => {
                    self.poll().await;
                    continue;
                }
            };
            // A caller that went away does not read the answer.
            match job {
                Some(Job::Declare(pattern, settings, reply)) => {
                    let _ = reply.send(self.declare(pattern, settings).await);
                }
                Some(Job::Delete(pattern, reply)) => {
                    let _ = reply.send(self.delete(pattern).await);
                }
                Some(Job::List(reply)) => {
                    let _ = reply.send(self.reload().await);
                }
                // Every handle is gone.
                None => return self.supervisor.stopping().await,
            }
        }
    }

    async fn poll(&self) {
        let version = self.rules.borrow().version;
        let looked = match sql::read_version(&self.db).await {
            Ok(found) if found == version => return,
            Ok(_) => self.reload().await.map(|_| ()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = looked {
            tracing::debug!(error = %error, "the settings of topics stay as they are");
        }
    }

    /// Reads all settings, applies them, and returns them.
    async fn reload(&self) -> Result<Vec<Description>, Error> {
        let (version, rows) = sql::list(&self.db).await?;
        if self.rules.borrow().version != version {
            let rules = Rules::new(version, rows.clone(), &self.rules.borrow());
            self.rules.send_replace(Arc::new(rules));
        }
        Ok(rows)
    }

    async fn declare(
        &self,
        pattern: TopicPattern,
        settings: Settings,
    ) -> Result<(Description, Declared), Error> {
        let numbers = (
            settings.max_bytes.map(i64::from),
            settings.rate_per_second,
            settings.burst.map(i64::from),
        );
        let most = i64::try_from(SETTINGS_MAX_COUNT).unwrap_or(i64::MAX);
        let schema = settings.schema.as_deref();
        let declared = match sql::declare(&self.db, &pattern, schema, numbers, most).await? {
            Stored::Created => Declared::Created,
            Stored::Changed => Declared::Changed,
            Stored::TooMany => return Err(Error::TooMany),
        };
        let rows = self.reload().await?;
        let row = rows.into_iter().find(|row| row.pattern == pattern);
        // Deleted by another node meanwhile.
        let row = row.ok_or(Error::NotFound { pattern })?;
        Ok((row, declared))
    }

    async fn delete(&self, pattern: TopicPattern) -> Result<(), Error> {
        if !sql::delete(&self.db, &pattern).await? {
            return Err(Error::NotFound { pattern });
        }
        self.reload().await.map(|_| ())
    }
}
