//! Topic settings: a JSON Schema for payloads, and for publishing over HTTP a maximum size and a rate. They are declared by
//! pattern, kept in the database, and applied by every node from memory: the node that takes a declaration applies it
//! before it answers, the others within a second.
//!
//! The task asks for the version once a second and reads all settings when it has risen. While the database is unreachable
//! the last ones stay in force. Schemas and sizes are the same everywhere; a rate is each node's own.
//!
//! Schemas are compiled and applied on separate threads (`asking`). Small, plain payloads are checked where they arrive:
//! that costs a few microseconds, and handing them to another thread would cost more.

mod asking;
mod rate;
mod rules;
mod schema;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use crate::domain::chain;
use crate::domain::message::Message;
use crate::domain::name::TopicPattern;
use crate::store::topic::{self as sql, Declared as Stored, SettingsRow};
use crate::store::{self, Database};
use crate::supervisor::{OnEnd, Report, Supervisor};

use asking::{Asking, Most, Question, Stopped};

pub use rules::{Applied, Rules};
pub use schema::{MISMATCHES_MAX, Mismatch, SCHEMA_MAX_BYTES, Schema};

/// The most patterns that may have settings.
pub const SETTINGS_MAX_COUNT: usize = 1_000;
/// How often a node looks for what others changed.
const POLL: Duration = Duration::from_secs(1);
const NAME: &str = "topic settings";
/// Jobs that wait.
const JOBS_MAX: usize = 256;
/// The bound on payloads that are checked where they come in: steps and bytes in all.
const BRIEF_STEPS: u64 = 20_000;
const BRIEF_BYTES: usize = 16 << 10;

/// The declared settings for the topics of a pattern.
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

/// Settings as they are kept, and as this node applies them.
#[derive(Debug, Clone)]
pub struct Description {
    /// As they were declared.
    pub settings: Arc<SettingsRow>,
    /// The reason why the declared schema is not applied, as one clause that follows "the schema".
    pub schema_fault: Option<Arc<str>>,
}

/// Payloads that are not what the schemas of their topics say: the place of each among those asked about, the pattern whose schema it is,
/// and where the payload does not match.
pub type Mismatched = Vec<(usize, TopicPattern, Vec<Mismatch>)>;

/// The result of a declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// The pattern had no settings.
    Created,
    /// It had, and has these now.
    Changed,
}

/// Reasons why settings could not be declared or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a JSON Schema, or one that cannot be evaluated.
    #[error("the schema {0}")]
    Schema(String),
    /// The pattern has no settings.
    #[error("the topics `{pattern}` have no settings")]
    NotFound {
        /// The pattern asked for.
        pattern: TopicPattern,
    },
    /// There are as many as there may be.
    #[error("{SETTINGS_MAX_COUNT} patterns already have settings, which is the limit")]
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
    asking: Asking,
}

impl Handle {
    /// The current rules.
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
        self.ask(|reply| Job::Declare(pattern, settings, reply))
            .await
    }

    /// The settings of a pattern.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database's.
    pub async fn describe(&self, pattern: &TopicPattern) -> Result<Description, Error> {
        let all = self.list().await?;
        let found = all
            .into_iter()
            .find(|found| found.settings.pattern == *pattern);
        found.ok_or_else(|| Error::NotFound {
            pattern: pattern.clone(),
        })
    }

    /// The settings of all patterns, by pattern.
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

    /// Asks the schemas of the messages' topics: all messages, or until `most_faults` have been found.
    ///
    /// # Errors
    /// [`Error::Stopping`].
    pub async fn find_mismatches(
        &self,
        messages: &[Message],
        most_faults: usize,
    ) -> Result<Mismatched, Error> {
        let most = Most {
            of_one: MISMATCHES_MAX,
            of_all: most_faults,
        };
        self.find(messages, most).await
    }

    async fn find(&self, messages: &[Message], most: Most) -> Result<Mismatched, Error> {
        let rules = self.rules();
        let (mut steps, mut bytes) = (BRIEF_STEPS, BRIEF_BYTES);
        let (mut asked, mut questions) = (Vec::new(), Vec::new());
        for (place, message) in messages.iter().enumerate() {
            // Nothing is declared at all.
            let Some(applied) = rules.of(&message.topic) else {
                break;
            };
            let Some((pattern, schema)) = &applied.schema else {
                continue;
            };
            let left = bytes.checked_sub(message.data.bytes().len());
            bytes = left.unwrap_or(0);
            if left.is_some() && schema.check_briefly(&message.data, &mut steps).is_some() {
                continue;
            }
            asked.push((place, pattern.clone()));
            questions.push(Question {
                schema: Arc::clone(schema),
                data: message.data.clone(),
            });
        }
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        let answers = self.asking.ask(questions, most).await;
        let answers = answers.map_err(|Stopped| Error::Stopping)?;
        let mismatched = asked.into_iter().zip(answers);
        Ok(mismatched
            .filter_map(|((place, pattern), answer)| Some((place, pattern, answer.err()?)))
            .collect())
    }

    /// The messages that their topics' schemas refuse: their places, each with the reason as one clause.
    ///
    /// # Errors
    /// [`Error::Stopping`].
    pub async fn find_refusals(&self, messages: &[Message]) -> Result<Vec<(usize, String)>, Error> {
        let most = Most {
            of_one: 1,
            of_all: usize::MAX,
        };
        let mut refusals = Vec::new();
        for (place, pattern, mismatches) in self.find(messages, most).await? {
            if let Some(first) = mismatches.first() {
                let at = match first.pointer.as_str() {
                    "" => String::new(),
                    pointer => format!(" at {pointer}"),
                };
                let reason = format!(
                    "the payload does not match the schema of `{pattern}`{at}: {}",
                    first.detail
                );
                refusals.push((place, reason));
            }
        }
        Ok(refusals)
    }

    /// The reason why one of the broker's own messages may not go to its topic, by its size or its schema, as one clause. `most`
    /// bounds every topic.
    ///
    /// # Errors
    /// [`Error::Stopping`].
    pub async fn find_refusal_within(
        &self,
        message: &Message,
        most: usize,
    ) -> Result<Option<String>, Error> {
        let own = self
            .rules()
            .of(&message.topic)
            .and_then(|applied| applied.max_bytes);
        let own = own.and_then(|own| usize::try_from(own).ok());
        let most = own.map_or(most, |own| own.min(most));
        let size = message.data.bytes().len();
        if size > most {
            let reason = format!("the payload is {size} bytes long, at most {most} are allowed");
            return Ok(Some(reason));
        }
        let refusals = self.find_refusals(std::slice::from_ref(message)).await?;
        Ok(refusals.into_iter().next().map(|(_, reason)| reason))
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
    let asking = Asking::start(supervisor);
    let rules = asking.run(move || Rules::new(version, rows, &Rules::default()));
    let rules = rules.await.map_err(|Stopped| Error::Stopping)?;
    let (rules, watched) = watch::channel(Arc::new(rules));
    let (jobs, inbox) = mpsc::channel(JOBS_MAX);
    let task = Task {
        db,
        supervisor: supervisor.clone(),
        rules,
        asking: asking.clone(),
    };
    supervisor.spawn(NAME, OnEnd::StopProcess, task.run(inbox));
    Ok(Handle {
        rules: watched,
        jobs,
        asking,
    })
}

/// A loop of its own, not a duty: jobs and looks at the table change one thing, in turn.
struct Task {
    db: Database,
    supervisor: Supervisor,
    rules: watch::Sender<Arc<Rules>>,
    asking: Asking,
}

impl Task {
    async fn run(self, mut inbox: mpsc::Receiver<Job>) {
        let report = self.supervisor.report(NAME, None);
        loop {
            let job = tokio::select! {
                job = inbox.recv() => job,
                () = self.supervisor.stopping() => return,
                () = tokio::time::sleep(POLL) => {
                    self.poll(&report).await;
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

    async fn poll(&self, report: &Report) {
        report.begins();
        let version = self.rules.borrow().version;
        let looked = match sql::read_version(&self.db).await {
            Ok(found) if found == version => Ok(()),
            Ok(_) => self.reload().await.map(|_| ()),
            Err(error) => Err(error.into()),
        };
        match looked {
            Ok(()) => report.passed(Some(POLL), None),
            Err(error) => {
                report.failed(chain(&error), POLL);
                tracing::debug!(error = %error, "reading the topic settings failed; the current ones stay");
            }
        }
    }

    /// Reads all settings if they have changed, applies them, and returns them.
    async fn reload(&self) -> Result<Vec<Description>, Error> {
        let known = self.rules.borrow().version;
        if sql::read_version(&self.db).await? != known {
            let (version, rows) = sql::list(&self.db).await?;
            let before = Arc::clone(&self.rules.borrow());
            let rules = self.asking.run(move || Rules::new(version, rows, &before));
            let rules = rules.await.map_err(|Stopped| Error::Stopping)?;
            self.rules.send_replace(Arc::new(rules));
        }
        let rules = self.rules.borrow();
        let declared = rules.declared().into_iter();
        let described = declared.map(|rule| Description {
            settings: Arc::clone(&rule.row),
            schema_fault: rule.schema_fault.clone(),
        });
        Ok(described.collect())
    }

    async fn declare(
        &self,
        pattern: TopicPattern,
        settings: Settings,
    ) -> Result<(Description, Declared), Error> {
        if let Some(text) = settings.schema.clone() {
            let (pattern, rules) = (pattern.clone(), Arc::clone(&self.rules.borrow()));
            let checked = self.asking.run(move || {
                let schema = Schema::compile(&text)?;
                rules.has_room(&pattern, &schema)
            });
            let checked = checked.await.map_err(|Stopped| Error::Stopping)?;
            checked.map_err(Error::Schema)?;
        }
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
        let all = self.reload().await?;
        let found = all
            .into_iter()
            .find(|found| found.settings.pattern == pattern);
        // Deleted by another node meanwhile.
        let found = found.ok_or(Error::NotFound { pattern })?;
        Ok((found, declared))
    }

    async fn delete(&self, pattern: TopicPattern) -> Result<(), Error> {
        if !sql::delete(&self.db, &pattern).await? {
            return Err(Error::NotFound { pattern });
        }
        self.reload().await.map(|_| ())
    }
}
