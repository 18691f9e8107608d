//! Recurring messages: the schedules as the duty knows them, and the call that publishes what is due of one.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};

use super::wire;
use crate::domain::cloudevents::{self, Context, Limits};
use crate::domain::message::Message;
use crate::domain::name::{ScheduleName, Topic};
use crate::domain::schedule::{Declaration, Due, occurrence_id};
use crate::store::stream::{self as sql, Fire, Fired, ScheduleRow};
use crate::store::{self, Connection};
use crate::stream::group::Router;
use crate::stream::metrics::Metrics;
use crate::stream::request::key_hash;

/// How often the schedules are read again.
const RELOAD: Duration = Duration::from_millis(500);

/// What the duty knows of the schedules. All of it can be forgotten at any time.
#[derive(Debug, Default)]
pub(super) struct Recurring {
    loaded: HashMap<i64, Loaded>,
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
}

impl Recurring {
    /// Publishes what is due. Returns how long nothing will be.
    pub(super) async fn pass(
        &mut self,
        connection: &mut Connection,
        has_changed: bool,
        metrics: &Metrics,
    ) -> Result<Duration, store::Error> {
        let is_old = self.clock.is_none_or(|(_, read)| read.elapsed() >= RELOAD);
        if is_old || has_changed {
            self.reload(connection).await?;
        }
        let now = self.now();
        let due: Vec<i64> = self
            .loaded
            .iter()
            .filter(|(_, one)| one.next.is_some_and(|next| next <= now))
            .map(|(&id, _)| id)
            .collect();
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
            let fired = fire(connection, &mut self.router, id, one, &due).await?;
            if fired == Fired::Fired {
                metrics
                    .scheduled_occurrences
                    .inc_by(due.occurrences.len() as u64);
                if due.has_skipped {
                    tracing::warn!(schedule = %one.name, "missed occurrences were left out");
                }
                one.through = due.through;
                one.next = one.declaration.cadence.next_after(due.through);
            } else {
                self.clock = None;
            }
        }
        if self.clock.is_none() {
            return Ok(Duration::ZERO);
        }
        let now = self.now();
        let next = self.loaded.values().filter_map(|one| one.next).min();
        let pause = next.map_or(RELOAD, |next| (next - now).to_std().unwrap_or_default());
        Ok(pause.min(RELOAD))
    }

    /// The database's clock, about.
    fn now(&self) -> DateTime<Utc> {
        self.clock.map_or(DateTime::UNIX_EPOCH, |(clock, read)| {
            clock + TimeDelta::from_std(read.elapsed()).unwrap_or_default()
        })
    }

    async fn reload(&mut self, connection: &mut Connection) -> Result<(), store::Error> {
        let asked = Instant::now();
        let (rows, clock) = sql::list_schedules(connection).await?;
        self.clock = Some((clock, asked));
        let is_there = |id: &i64| rows.iter().any(|row| row.id == *id);
        self.loaded.retain(|id, _| is_there(id));
        for row in rows {
            match self.loaded.get_mut(&row.id) {
                Some(one) if one.revision == row.revision => {
                    if one.through != row.through_at {
                        one.through = row.through_at;
                        one.next = next_of(&one.declaration, one.through);
                    }
                }
                _ => {
                    if let Some((id, one)) = load(row, clock) {
                        self.loaded.insert(id, one);
                    }
                }
            }
        }
        Ok(())
    }
}

fn next_of(declaration: &Declaration, through: DateTime<Utc>) -> Option<DateTime<Utc>> {
    match declaration.is_paused {
        true => None,
        false => declaration.cadence.next_after(through),
    }
}

fn load(row: ScheduleRow, clock: DateTime<Utc>) -> Option<(i64, Loaded)> {
    let name = ScheduleName::parse(&row.name).ok()?;
    let declaration = match wire::read(&row.declaration, clock) {
        Ok(declaration) => declaration,
        Err(reason) => {
            tracing::error!(schedule = row.name, reason, "a schedule cannot be read");
            return None;
        }
    };
    let next = next_of(&declaration, row.through_at);
    let one = Loaded {
        name,
        revision: row.revision,
        declaration,
        through: row.through_at,
        next,
    };
    Some((row.id, one))
}

/// The message of an occurrence; why there is none.
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

async fn fire(
    connection: &mut Connection,
    router: &mut Option<Router>,
    id: i64,
    one: &Loaded,
    due: &Due,
) -> Result<Fired, store::Error> {
    let Ok(message) = message(&one.name, &one.declaration, due.through) else {
        // It was checked when it was declared; limits can have changed since.
        tracing::error!(schedule = %one.name, "the event of a schedule cannot be published");
        return Ok(Fired::Moved);
    };
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
        message: &message,
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
