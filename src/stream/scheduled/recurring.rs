//! Recurring messages: the schedules as the duty knows them, and the call that publishes the due occurrences of one.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};

use super::{OfSchedules, wire};
use crate::domain::chain;
use crate::domain::cloudevents::{self, Context, Limits};
use crate::domain::message::Message;
use crate::domain::name::{ScheduleName, Topic};
use crate::domain::schedule::{Declaration, Due, occurrence_id};
use crate::store::stream::{self as sql, Fire, Fired, Pass, ScheduleRow};
use crate::store::{self, Connection, Retry};
use crate::stream::group::Router;
use crate::stream::handle::State;
use crate::stream::request::key_hash;

/// How often the schedules are read again.
const RELOAD: Duration = Duration::from_secs(1);
/// How long one that the database refuses waits to be tried again.
const RETRY: Duration = Duration::from_secs(5);

/// A schedule that is further ahead of the clocks than this begins anew. A day, so that no clock that is set back by hours has occurrences
/// published twice.
const FAR: TimeDelta = TimeDelta::days(1);

type Answer = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;
type Check = dyn Fn(Message) -> Answer + Send + Sync;

/// The check of each occurrence before it is published: whether its topic takes the message, and if not, why, as one clause. The
/// engine knows nothing of topic settings. Without a check, every message is taken.
#[derive(Clone, Default)]
pub struct Acceptance(Option<Arc<Check>>);

impl Acceptance {
    /// Asks this.
    pub fn new<F>(check: impl Fn(Message) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        Self(Some(Arc::new(move |message| Box::pin(check(message)))))
    }

    async fn check(&self, message: &Message) -> Result<(), String> {
        match &self.0 {
            Some(check) => check(message.clone()).await,
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Acceptance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_set = self.0.is_some();
        f.debug_struct("Acceptance")
            .field("is_set", &is_set)
            .finish()
    }
}

/// The duty's knowledge of the schedules. All of it can be forgotten at any time.
#[derive(Debug, Default)]
pub(super) struct Recurring {
    loaded: HashMap<i64, Loaded>,
    /// Schedules that this version cannot read, with their revisions.
    unreadable: HashMap<i64, i64>,
    /// The database's clock, and when it was read.
    clock: Option<(DateTime<Utc>, Instant)>,
    router: Option<Router>,
}

#[derive(Debug)]
struct Loaded {
    name: ScheduleName,
    revision: i64,
    declaration: Declaration,
    through: DateTime<Utc>,
    next: Option<DateTime<Utc>>,
    /// The due times of the last occurrence, and of the last one that could not be published.
    last: Option<DateTime<Utc>>,
    failed: Option<DateTime<Utc>>,
    /// The database refused it: not before then.
    retry_at: Option<Instant>,
}

impl Loaded {
    fn is_due(&self, now: DateTime<Utc>) -> bool {
        let is_held = self.retry_at.is_some_and(|at| Instant::now() < at);
        !is_held && self.next.is_some_and(|next| next <= now)
    }

    /// All through there is dealt with.
    fn move_to(&mut self, through: DateTime<Utc>) {
        self.through = through;
        self.next = next_of(&self.declaration, through);
        self.retry_at = None;
    }
}

impl Recurring {
    /// Publishes due occurrences. Returns the time until the next one.
    pub(super) async fn pass(
        &mut self,
        connection: &mut Connection,
        has_changed: bool,
        (acceptance, state): (&Acceptance, &State),
    ) -> Result<Duration, store::Error> {
        let is_old = self.clock.is_none_or(|(_, read)| read.elapsed() >= RELOAD);
        if is_old || has_changed {
            self.reload(connection, state.witness.now()).await?;
        }
        let now = self.now();
        state.schedule.known().schedules = self.look();
        let metrics = &state.metrics;
        let due = self.loaded.iter().filter(|(_, one)| one.is_due(now));
        let due: Vec<i64> = due.map(|(&id, _)| id).collect();
        for id in due {
            let Some(one) = self.loaded.get_mut(&id) else {
                continue;
            };
            let due = one
                .declaration
                .cadence
                .due(one.through, now, one.declaration.misfire);
            if due.through == one.through {
                // The clock went back since.
                self.clock = None;
                continue;
            }
            let publishing = publish(
                connection,
                &mut self.router,
                (id, &*one),
                &due,
                (acceptance, state.witness.now()),
            );
            match publishing.await? {
                Outcome::Published => {
                    metrics
                        .scheduled_occurrences
                        .inc_by(due.occurrences.len() as u64);
                    if due.has_skipped {
                        tracing::warn!(schedule = %one.name, "left out occurrences that were missed");
                    }
                    one.last = due.occurrences.last().copied().or(one.last);
                    one.move_to(due.through);
                }
                Outcome::LeftOut => {
                    metrics
                        .occurrences_failed
                        .inc_by(due.occurrences.len() as u64);
                    one.failed = due.occurrences.last().copied();
                    one.move_to(due.through);
                }
                Outcome::Refused => {
                    one.failed = due.occurrences.last().copied();
                    one.retry_at = Some(Instant::now() + RETRY);
                }
                Outcome::Moved => self.clock = None,
            }
        }
        state.schedule.known().schedules = self.look();
        if self.clock.is_none() {
            return Ok(Duration::ZERO);
        }
        let now = self.now();
        let next = self.loaded.values().filter(|one| one.retry_at.is_none());
        let next = next.filter_map(|one| one.next).min();
        let pause = next.map_or(RELOAD, |next| (next - now).to_std().unwrap_or_default());
        Ok(pause.min(RELOAD))
    }

    fn look(&self) -> OfSchedules {
        let all = self.loaded.values();
        let is_failing = |one: &&Loaded| one.failed.is_some() && one.failed > one.last;
        OfSchedules {
            failing_count: all.clone().filter(is_failing).count() + self.unreadable.len(),
            next_due_at: all.filter_map(|one| one.next).min(),
        }
    }

    /// The database's clock, about.
    fn now(&self) -> DateTime<Utc> {
        self.clock.map_or(DateTime::UNIX_EPOCH, |(clock, read)| {
            clock + TimeDelta::from_std(read.elapsed()).unwrap_or_default()
        })
    }

    async fn reload(
        &mut self,
        connection: &mut Connection,
        witness: DateTime<Utc>,
    ) -> Result<(), store::Error> {
        let asked = Instant::now();
        let (rows, clock) = sql::list_schedules(connection, witness).await?;
        self.clock = Some((clock, asked));
        let is_there = |id: &i64| rows.iter().any(|row| row.id == *id);
        self.loaded.retain(|id, _| is_there(id));
        self.unreadable.retain(|id, _| is_there(id));
        for mut row in rows {
            if is_far_ahead(row.through_at, clock, witness)
                && begin_anew(connection, &row, clock).await?
            {
                row.through_at = clock;
            }
            match self.loaded.get_mut(&row.id) {
                Some(one) if one.revision == row.revision => {
                    if one.through != row.through_at {
                        one.move_to(row.through_at);
                    }
                    one.last = row.last_at;
                    one.failed = row.failure.map(|failure| failure.occurrence_at);
                }
                _ if self.unreadable.get(&row.id) == Some(&row.revision) => {}
                _ => match load(&row, clock) {
                    Ok(one) => {
                        self.unreadable.remove(&row.id);
                        self.loaded.insert(row.id, one);
                    }
                    Err(reason) => {
                        tracing::error!(
                            schedule = row.name,
                            reason,
                            "a stored schedule cannot be read"
                        );
                        self.loaded.remove(&row.id);
                        self.unreadable.insert(row.id, row.revision);
                    }
                },
            }
        }
        Ok(())
    }
}

/// Whether a schedule is dealt with so far ahead of both clocks that they must have been ahead when it was.
fn is_far_ahead(through: DateTime<Utc>, clock: DateTime<Utc>, witness: DateTime<Utc>) -> bool {
    let is_agreed = (clock - witness).abs() <= TimeDelta::minutes(1);
    is_agreed && through > clock + FAR
}

/// Has a schedule go on from now on: it would be silent until the time that the clocks were ahead. What it published by their time it
/// publishes again when that comes.
async fn begin_anew(
    connection: &mut Connection,
    row: &ScheduleRow,
    clock: DateTime<Utc>,
) -> Result<bool, store::Error> {
    let pass = Pass {
        schedule: row.id,
        revision: row.revision,
        from: row.through_at,
        to: clock,
        failed: 0,
        failure: None,
    };
    tracing::warn!(
        schedule = row.name,
        through = %row.through_at,
        "a schedule has published by clocks that were far ahead; it begins anew from now on"
    );
    sql::pass_schedule(connection, &pass).await
}

fn next_of(declaration: &Declaration, through: DateTime<Utc>) -> Option<DateTime<Utc>> {
    match declaration.is_paused {
        true => None,
        false => declaration.cadence.next_after(through),
    }
}

fn load(row: &ScheduleRow, clock: DateTime<Utc>) -> Result<Loaded, String> {
    let declaration = wire::read(&row.declaration, clock)?;
    let next = next_of(&declaration, row.through_at);
    let failure = row.failure.as_ref();
    Ok(Loaded {
        name: ScheduleName::parse(&row.name).map_err(|error| error.to_string())?,
        revision: row.revision,
        declaration,
        through: row.through_at,
        next,
        last: row.last_at,
        failed: failure.map(|failure| failure.occurrence_at),
        retry_at: None,
    })
}

/// The message of an occurrence, or the reason why there is none.
pub(super) fn message(
    name: &ScheduleName,
    declaration: &Declaration,
    due_at: DateTime<Utc>,
) -> Result<Message, cloudevents::Error> {
    let event = declaration.event(name, due_at);
    let id = || occurrence_id(name, due_at).to_string();
    let context = Context {
        topic: &declaration.topic,
        limits: Limits {
            message_bytes: usize::MAX,
            ..Limits::default()
        },
        new_id: &|_| id(),
    };
    let request = cloudevents::Request {
        body: Bytes::from(event.clone()),
        ..cloudevents::Request::default()
    };
    cloudevents::parse_event(&event, "", 0, &request, &context)
}

/// The outcome of occurrences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// They are accepted.
    Published,
    /// They cannot be published: the schedule has moved over them, and says why.
    LeftOut,
    /// The database refuses them: the schedule is where it was, and says why.
    Refused,
    /// The schedule is another by now, or elsewhere, or streams are: nothing was done.
    Moved,
}

/// Publishes occurrences, or leaves them out. One schedule that cannot go on is in nobody else's way.
async fn publish(
    connection: &mut Connection,
    router: &mut Option<Router>,
    (id, one): (i64, &Loaded),
    due: &Due,
    (acceptance, witness): (&Acceptance, DateTime<Utc>),
) -> Result<Outcome, store::Error> {
    let pass = Pass {
        schedule: id,
        revision: one.revision,
        from: one.through,
        to: due.through,
        failed: 0,
        failure: None,
    };
    let Some(&last) = due.occurrences.last() else {
        return Ok(match sql::pass_schedule(connection, &pass).await? {
            true => Outcome::Published,
            false => Outcome::Moved,
        });
    };
    let message = message(&one.name, &one.declaration, last);
    let message = message.map_err(|error| format!("the event is not valid: {error}"));
    let message = match message {
        Ok(message) => acceptance.check(&message).await.map(|()| message),
        refused => refused,
    };
    let (pass, reason, outcome) = match message {
        Ok(message) => {
            let error = match fire(connection, router, (id, one), due, (&message, witness)).await {
                Ok(Fired::Fired) => return Ok(Outcome::Published),
                Ok(Fired::Moved | Fired::Stale) => return Ok(Outcome::Moved),
                Err(error) => error,
            };
            if error.is_held() {
                // Somebody holds the stream's log: the other schedules go on.
                return Ok(Outcome::Refused);
            }
            // No leaf takes the time: all is looked up again.
            if error.is_leaf_missing() || !error.is_answered() || error.retry() != Retry::Never {
                return Err(error);
            }
            let pass = Pass {
                to: one.through,
                ..pass
            };
            let reason = format!("the database refuses the message: {}", chain(&error));
            (pass, reason, Outcome::Refused)
        }
        Err(reason) => {
            let failed = due.occurrences.len();
            (Pass { failed, ..pass }, reason, Outcome::LeftOut)
        }
    };
    tracing::warn!(schedule = %one.name, reason, "an occurrence could not be published");
    let pass = Pass {
        failure: Some((last, &reason)),
        ..pass
    };
    Ok(match sql::pass_schedule(connection, &pass).await? {
        true => outcome,
        false => Outcome::Moved,
    })
}

async fn fire(
    connection: &mut Connection,
    router: &mut Option<Router>,
    (id, one): (i64, &Loaded),
    due: &Due,
    (message, witness): (&Message, DateTime<Utc>),
) -> Result<Fired, store::Error> {
    let router = match router {
        Some(router) => router,
        None => {
            let mut fresh = Router::default();
            fresh.load(sql::load_catalogue(connection).await?);
            router.insert(fresh)
        }
    };
    let stream = router.route(&one.declaration.topic);
    let topic = intern(connection, &one.declaration.topic).await?;
    let fire = Fire {
        catalogue: router.version,
        schedule: id,
        revision: one.revision,
        from: one.through,
        to: due.through,
        stream,
        topic,
        key_hash: message.key.as_deref().map(key_hash),
        occurrences: due
            .occurrences
            .iter()
            .map(|&at| (occurrence_id(&one.name, at).to_string(), at))
            .collect(),
        message,
        witness,
    };
    let fired = sql::fire_schedule(connection, &fire).await?;
    if fired == Fired::Stale {
        router.version = 0;
        router.load(sql::load_catalogue(connection).await?);
    }
    Ok(fired)
}

async fn intern(
    connection: &mut Connection,
    topic: &Topic,
) -> Result<crate::domain::id::TopicId, store::Error> {
    let found = sql::intern_topics(connection, &[topic.as_str()]).await?;
    let found = found.first().map(|(id, _)| *id);
    found.ok_or_else(|| store::Error::corrupt("interning topics", topic.to_string()))
}
