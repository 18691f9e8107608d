//! Waits until the database is up, fit for use and migrated.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{Error, START};
use crate::http::Readiness;
use crate::store::history::{self, Present};
use crate::store::migrate::{self, Grants};
use crate::store::{Database, server};
use crate::supervisor::Backoff;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a wait that goes on is mentioned.
const MENTION_EVERY: Duration = Duration::from_secs(60);

/// Waits until the database answers, checks it, brings its schemas up to date, and finds out which history it is in: none
/// of those that are `void`. Gives what that and all before it are known by.
pub(super) async fn prepare(
    database: &Database,
    void: &[Uuid],
    readiness: &Readiness,
) -> Result<Vec<Uuid>, Error> {
    readiness.not_ready(START, "connecting to the database");
    wait_until_up(database, readiness).await?;
    readiness.not_ready(
        START,
        "the database is being migrated, by this process or another",
    );
    // The server can still go away in between; what was done is done again then.
    // Once more after the longest pause, then it is given up.
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE * 2);
    loop {
        match migrate_all(database, void).await {
            Ok((grants, present)) => {
                if grants == Grants::Skipped {
                    tracing::warn!(
                        database = %database.place(),
                        "the roles postroad_producer_… and postroad_relay_… of this database are missing, and this user may not create them; \
                         services that use other roles cannot write to the outbox"
                    );
                }
                return Ok(present.salts);
            }
            Err(error) if error.is_setup_wrong() || backoff.upcoming() > LONGEST_PAUSE => {
                return Err(unusable(database, &error));
            }
            Err(error) => {
                let why = error.explained();
                readiness.not_ready(START, format!("migrating the database: {why}"));
                let pause = backoff.next_pause();
                tracing::warn!(error = why, "migrating failed; trying again in {pause:?}");
                sleep(pause).await;
            }
        }
    }
}

async fn migrate_all(
    database: &Database,
    void: &[Uuid],
) -> Result<(Grants, Present), crate::store::Error> {
    migrate::broker(database).await?;
    let grants = migrate::origin(database).await?;
    let present = history::begin(database, void).await?;
    if present.is_begun {
        tracing::error!(
            era = present.era,
            database = %database.place(),
            "the broker's database has a new history: it was failed over or restored. Acknowledged work that is not in \
             it is lost; relays read again what outboxes still hold. GET /v1/cluster has the histories"
        );
    }
    Ok((grants, present))
}

async fn wait_until_up(database: &Database, readiness: &Readiness) -> Result<(), Error> {
    let place = database.place();
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut mentioned: Option<Instant> = None;
    loop {
        match server::look(database).await {
            Ok(server) => {
                if mentioned.is_some() {
                    tracing::info!(database = %place, "the database is up");
                }
                return match server.refusal() {
                    Some(reason) => Err(Error::Refused { place, reason }),
                    None => Ok(()),
                };
            }
            Err(error) if error.is_setup_wrong() => return Err(unusable(database, &error)),
            Err(error) => {
                let why = error.explained();
                readiness.not_ready(START, format!("waiting for the database: {why}"));
                if mentioned.is_none_or(|at| at.elapsed() >= MENTION_EVERY) {
                    tracing::warn!(database = %place, error = why, "waiting for the database");
                    mentioned = Some(Instant::now());
                }
            }
        }
        backoff.wait().await;
    }
}

/// An error that waiting does not put right, with what to do about it.
fn unusable(database: &Database, error: &crate::store::Error) -> Error {
    Error::Refused {
        place: database.place(),
        reason: error.explained(),
    }
}
