//! Schedules, as people declare and see them.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::{recurring, wire};
use crate::domain::cloudevents;
use crate::domain::message::Message;
use crate::domain::name::ScheduleName;
use crate::domain::schedule::{Declaration, SCHEDULES_MAX};
pub use crate::store::stream::ScheduleFailure;
use crate::store::stream::{self as sql, ScheduleDeclared, ScheduleRow};
use crate::store::{self, Connection};
use crate::stream::{Declared, Error, Handle};

/// A schedule.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduleDescription {
    /// Its name.
    pub name: ScheduleName,
    /// The declaration.
    pub declaration: Declaration,
    /// The time of the first declaration.
    pub created_at: DateTime<Utc>,
    /// The time of the last change.
    pub changed_at: DateTime<Utc>,
    /// All occurrences up to here are dealt with: published or left out.
    pub through: DateTime<Utc>,
    /// The last occurrence that was published.
    pub last: Option<DateTime<Utc>>,
    /// Occurrences published so far.
    pub published_count: u64,
    /// Occurrences left out so far, since they could not be published.
    pub failed_count: u64,
    /// The last that could not.
    pub failure: Option<ScheduleFailure>,
}

impl ScheduleDescription {
    /// Whether its latest occurrence could not be published.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        let failed = self.failure.as_ref().map(|failure| failure.occurrence_at);
        failed.is_some() && failed > self.last
    }

    /// How long a due occurrence has been waiting to be published.
    #[must_use]
    pub fn lag(&self, now: DateTime<Utc>) -> Duration {
        if self.declaration.is_paused {
            return Duration::ZERO;
        }
        let due = self.declaration.cadence.next_after(self.through);
        due.and_then(|due| (now - due).to_std().ok())
            .unwrap_or_default()
    }
}

impl Handle {
    /// Declares a schedule: it begins now, and again with a change of its cron expression or zone and when it is paused no more.
    ///
    /// # Errors
    /// [`Error::TooManySchedules`], or the database's.
    pub async fn declare_schedule(
        &self,
        name: ScheduleName,
        declaration: Declaration,
    ) -> Result<(ScheduleDescription, Declared), Error> {
        self.scheduling(move |desk| {
            Box::pin(async move { desk.declare(&name, &declaration).await })
        })
        .await
    }

    /// All schedules, by name. One that this version cannot read (a zone that is no more) is in no other's way: it is left out here, is
    /// logged, and counts as failing.
    ///
    /// # Errors
    /// The database's.
    pub async fn schedules(&self) -> Result<Vec<ScheduleDescription>, Error> {
        self.scheduling(|desk| Box::pin(desk.schedules())).await
    }

    /// Finds a schedule.
    ///
    /// # Errors
    /// [`Error::ScheduleNotFound`], or the database's.
    pub async fn schedule(&self, name: &ScheduleName) -> Result<ScheduleDescription, Error> {
        let name = name.clone();
        self.scheduling(move |desk| Box::pin(async move { desk.schedule(&name).await }))
            .await
    }

    /// Deletes a schedule. What it published stays.
    ///
    /// # Errors
    /// [`Error::ScheduleNotFound`], or the database's.
    pub async fn delete_schedule(&self, name: &ScheduleName) -> Result<(), Error> {
        let name = name.clone();
        self.scheduling(move |desk| Box::pin(async move { desk.delete(&name).await }))
            .await
    }
}

/// The message of an occurrence, to check a declaration.
///
/// # Errors
/// The fault of the event.
pub fn check_event(
    name: &ScheduleName,
    declaration: &Declaration,
    now: DateTime<Utc>,
) -> Result<Message, cloudevents::Error> {
    recurring::message(name, declaration, now)
}

fn describe(row: ScheduleRow, now: DateTime<Utc>) -> Result<ScheduleDescription, store::Error> {
    let corrupt = |what: String| store::Error::corrupt("reading the schedules", what);
    Ok(ScheduleDescription {
        name: ScheduleName::parse(&row.name)
            .map_err(|error| corrupt(format!("`{}` {error}", row.name)))?,
        declaration: wire::read(&row.declaration, now)
            .map_err(|error| corrupt(format!("`{}`: {error}", row.name)))?,
        created_at: row.created_at,
        changed_at: row.changed_at,
        through: row.through_at,
        last: row.last_at,
        published_count: row.published_count.unsigned_abs(),
        failed_count: row.failed_count.unsigned_abs(),
        failure: row.failure,
    })
}

pub(super) async fn list(
    connection: &mut Connection,
    witness: DateTime<Utc>,
) -> Result<Vec<ScheduleDescription>, Error> {
    let (rows, now) = sql::list_schedules(connection, witness).await?;
    let described = rows.into_iter().map(|row| describe(row, now));
    Ok(described.filter_map(Result::ok).collect())
}

pub(super) async fn find(
    connection: &mut Connection,
    name: &ScheduleName,
    witness: DateTime<Utc>,
) -> Result<ScheduleDescription, Error> {
    let (rows, now) = sql::list_schedules(connection, witness).await?;
    let row = rows.into_iter().find(|row| row.name == name.as_str());
    let row = row.ok_or_else(|| Error::ScheduleNotFound { name: name.clone() })?;
    Ok(describe(row, now)?)
}

pub(super) async fn declare(
    connection: &mut Connection,
    name: &ScheduleName,
    declaration: &Declaration,
    witness: DateTime<Utc>,
) -> Result<(ScheduleDescription, Declared), Error> {
    let cadence = format!(
        "{}\n{}",
        declaration.cadence.expression(),
        declaration.cadence.zone()
    );
    let text = wire::print(declaration);
    loop {
        let declared = sql::declare_schedule(
            connection,
            name.as_str(),
            &text,
            &cadence,
            declaration.is_paused,
            SCHEDULES_MAX,
            witness,
        );
        let declared = match declared.await? {
            ScheduleDeclared::Created => Declared::Created,
            ScheduleDeclared::Changed => Declared::Changed,
            ScheduleDeclared::Unchanged => Declared::Unchanged,
            ScheduleDeclared::Full => return Err(Error::TooManySchedules),
            ScheduleDeclared::Gone => continue,
        };
        return Ok((find(connection, name, witness).await?, declared));
    }
}

pub(super) async fn delete(connection: &mut Connection, name: &ScheduleName) -> Result<(), Error> {
    match sql::delete_schedule(connection, name.as_str()).await? {
        true => Ok(()),
        false => Err(Error::ScheduleNotFound { name: name.clone() }),
    }
}
