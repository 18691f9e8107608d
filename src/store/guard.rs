//! Checks that a new connection still leads to the database that this process knows.
//!
//! After a failover or a restore the same URL leads to another history: the last commits may be missing, and other messages
//! have taken their place. Then nothing that this process has in memory can be trusted, and nothing may be written from it.
//! So each new connection is asked for its identity before anything else runs on it. An open connection stays with its
//! postmaster, which never changes its history while it takes writes.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sqlx::PgConnection;
use tokio::sync::watch;
use uuid::Uuid;

/// The identity of a database's history, as far as the server knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct Identity {
    /// The cluster's system identifier.
    system_identifier: String,
    /// The timeline of its log; rises when a standby is promoted, and at the end of a point-in-time recovery.
    timeline: i32,
    /// The database's number.
    database: i64,
}

/// The row of this process's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node {
    incarnation: i64,
    /// The last heartbeat that is known to be committed.
    beat: i64,
}

#[derive(Debug, Default)]
struct Known {
    identity: Option<Identity>,
    node: Option<Node>,
}

/// See above. Lets everything pass until it is told what to expect.
#[derive(Debug)]
pub(in crate::store) struct Guard {
    known: Mutex<Known>,
    /// The last heartbeat that was sent. Begins anywhere, so that no other process's numbers look like these.
    sent: AtomicI64,
    changed: watch::Sender<Option<String>>,
}

/// The findings about a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    identity: Identity,
    beat: Option<i64>,
}

impl Guard {
    pub(in crate::store) fn new() -> Self {
        let (anywhere, _) = Uuid::new_v4().as_u64_pair();
        Self {
            known: Mutex::default(),
            sent: AtomicI64::new((anywhere >> 16) as i64),
            changed: watch::Sender::new(None),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::store) fn expect(&self, identity: Identity) {
        self.known().identity = Some(identity);
    }

    pub(in crate::store) fn next_beat(&self) -> i64 {
        self.sent.fetch_add(1, Ordering::AcqRel) + 1
    }

    pub(in crate::store) fn note_beat(&self, incarnation: i64, beat: i64) {
        self.known().node = Some(Node { incarnation, beat });
    }

    pub(in crate::store) async fn changed(&self) -> String {
        let mut changed = self.changed.subscribe();
        let why = changed.wait_for(Option::is_some).await;
        why.ok().and_then(|why| why.clone()).unwrap_or_default()
    }

    /// Refuses a connection to another history than the one expected.
    pub(in crate::store) async fn check(
        &self,
        connection: &mut PgConnection,
    ) -> Result<(), sqlx::Error> {
        let (identity, node) = {
            let known = self.known();
            (known.identity.clone(), known.node)
        };
        let Some(identity) = identity else {
            return Ok(());
        };
        let Some(found) = look(connection, node.map(|node| node.incarnation)).await? else {
            return Err(sqlx::Error::Protocol("the server is a standby".to_owned()));
        };
        let sent = self.sent.load(Ordering::Acquire);
        let Some(why) = difference(&identity, node, sent, &found) else {
            return Ok(());
        };
        self.changed.send_if_modified(|changed| {
            let is_first = changed.is_none();
            changed.get_or_insert_with(|| why.clone());
            is_first
        });
        Err(sqlx::Error::Protocol(format!(
            "the database has a different history than this process: {why}"
        )))
    }
}

/// The server's answers; None when it is a standby.
async fn look(
    connection: &mut PgConnection,
    incarnation: Option<i64>,
) -> Result<Option<Found>, sqlx::Error> {
    let beat = match incarnation {
        // Before the node is registered nothing is asked of its table.
        None => "$1::bigint",
        Some(_) => "(select n.beat from postroad_broker.node n where n.incarnation = $1)",
    };
    let text = format!(
        "select case when pg_is_in_recovery() then null
                else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer end,
            (select c.system_identifier::text from pg_control_system() c),
            (select d.oid::bigint from pg_database d where d.datname = current_database()), {beat}"
    );
    let (timeline, system_identifier, database, beat): (Option<i32>, String, i64, Option<i64>) =
        sqlx::query_as(sqlx::AssertSqlSafe(text))
            .persistent(false)
            .bind(incarnation)
            .fetch_one(connection)
            .await?;
    Ok(timeline.map(|timeline| Found {
        identity: Identity {
            system_identifier,
            timeline,
            database,
        },
        beat,
    }))
}

/// The identity of the database that a connection leads to; None when it is a standby.
pub(in crate::store) async fn identity(
    connection: &mut PgConnection,
) -> Result<Option<Identity>, sqlx::Error> {
    Ok(look(connection, None).await?.map(|found| found.identity))
}

/// The reason why it is another history, if it is.
fn difference(expected: &Identity, node: Option<Node>, sent: i64, found: &Found) -> Option<String> {
    let now = &found.identity;
    if now.system_identifier != expected.system_identifier {
        return Some(format!(
            "its server has the system identifier {}, and had {}",
            now.system_identifier, expected.system_identifier
        ));
    }
    if now.timeline != expected.timeline {
        return Some(format!(
            "its server is on timeline {}, and was on {}",
            now.timeline, expected.timeline
        ));
    }
    if now.database != expected.database {
        return Some("it is a different database of its server".to_owned());
    }
    let node = node?;
    match found.beat {
        Some(beat) if (node.beat..=sent).contains(&beat) => None,
        Some(_) => Some("it is an older copy: it lacks a heartbeat of this node".to_owned()),
        None => Some("it is an older copy: it lacks this node".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(system: &str, timeline: i32, database: i64, beat: Option<i64>) -> Found {
        Found {
            identity: Identity {
                system_identifier: system.to_owned(),
                timeline,
                database,
            },
            beat,
        }
    }

    #[test]
    fn only_what_this_process_may_have_written_passes() {
        let expected = found("7", 1, 5, None).identity;
        let node = Some(Node {
            incarnation: 3,
            beat: 10,
        });
        for (found, is_other) in [
            (found("7", 1, 5, Some(10)), false),
            // Sent, and its answer not there yet.
            (found("7", 1, 5, Some(11)), false),
            (found("7", 1, 5, Some(9)), true),
            (found("7", 1, 5, Some(12)), true),
            (found("7", 1, 5, None), true),
            (found("7", 2, 5, Some(10)), true),
            (found("8", 1, 5, Some(10)), true),
            (found("7", 1, 6, Some(10)), true),
        ] {
            let why = difference(&expected, node, 11, &found);
            assert_eq!(why.is_some(), is_other, "{found:?}: {why:?}");
        }
        assert_eq!(
            difference(&expected, None, 0, &found("7", 1, 5, None)),
            None
        );
    }
}
