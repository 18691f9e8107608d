//! An origin, as its relay's session sees it: schema `postroad` in a database that is the broker's own or somebody else's.
//!
//! Every function is one statement or one transaction on the relay's own connection, with a time limit. A session whose
//! statement failed or did not end is dropped with its connection, which is safe because reads, marks and truncations can
//! all be repeated. A statement's snapshot matters in each of them; the header of its text says why it is the right one.
//!
//! This module has the session with its marks; `window` reads new rows, `backlog` finds their places when there are many,
//! `leaf` gives back the space of passed rows.

mod backlog;
pub mod claim;
mod leaf;
mod row;
mod window;

use std::future::Future;

use chrono::{DateTime, Utc};
use sqlx::{AssertSqlSafe, Connection as _, SqlSafeStr as _, SqlStr};
use uuid::Uuid;

use super::bounded::{CONNECT, LONG_STATEMENT, STATEMENT, bounded, connecting};
use super::mapped::{Misfit, Relation};
use super::{Connection, Database, Error, pooler, session, settle};
use crate::domain::mapping::Mapping;

pub use backlog::{Asked, Group, Piece, Range, Where};
pub use claim::{Claim, Claimant, Claimed, Reader};
pub use leaf::{Emptied, LEAF_COUNT, LEAF_PERIOD, Passed};
use row::OWN_SIZE;
pub use row::{OutboxRow, Place};
pub(in crate::store) use row::{SIZE, read_row};
pub(in crate::store) use window::read_identity;
pub use window::{Identity, Ids, Opened};

/// On top of what every session of Postroad sets. A plan made while a leaf was small froze a sequential scan: 150 ms a step
/// instead of 0.3. So plans are not kept, but for that of a window. A policy that hides rows of a table is an expression of the table's
/// owner: it is refused, not evaluated.
const SESSION: [(&str, &str); 7] = [
    ("enable_seqscan", "off"),
    ("plan_cache_mode", "force_custom_plan"),
    ("jit", "off"),
    ("max_parallel_workers_per_gather", "0"),
    ("work_mem", "64MB"),
    ("row_security", "off"),
    ("application_name", "postroad relay"),
];

/// The server's side of a session, by which it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backend {
    pid: i32,
    started_at: DateTime<Utc>,
}

/// A relay's connection to its origin.
#[derive(Debug)]
pub struct Session {
    pub(in crate::store) connection: Connection,
    backend: Option<Backend>,
    keeps_plans: bool,
    reads_backlog: bool,
    /// The table that is read in place of the outbox.
    mapped: Option<Relation>,
}

pub(in crate::store) fn statement<T>(
    doing: &'static str,
    future: impl Future<Output = Result<T, sqlx::Error>>,
) -> impl Future<Output = Result<T, Error>> {
    bounded(doing, LONG_STATEMENT, future)
}

impl Session {
    /// Connects, with the settings of a relay's session. The former session is ended first, if the server still has it: one whose
    /// statement was given up can wait for a lock for hours, and each of them takes one of the places of the origin's producers.
    ///
    /// # Errors
    /// The origin cannot be reached within 10 s, or refuses; [`Error::Pooled`].
    pub async fn open(database: &Database, former: Option<Backend>) -> Result<Self, Error> {
        let mut connection = database.open_unchecked(&SESSION).await?;
        pooler::check(database, &mut connection, &session(&SESSION), false).await?;
        connecting(CONNECT, settle(&mut connection)).await?;
        if let Some(former) = former {
            let ending = sqlx::query(
                "select pg_terminate_backend(a.pid, 1000) from pg_stat_activity as a
                where a.pid = $1 and a.backend_start = $2 and a.pid <> pg_backend_pid()",
            )
            .bind(former.pid)
            .bind(former.started_at)
            .persistent(false)
            .execute(&mut connection);
            match bounded("ending the former session", STATEMENT, ending).await {
                // Another role's, say, where the login was changed. It ends by itself once the server asks after its client.
                Err(error) if !error.is_connection_lost() => {
                    tracing::debug!(%error, "the earlier session could not be ended");
                }
                ended => {
                    ended?;
                }
            }
        }
        let looking = sqlx::query_as::<_, (i32, Option<DateTime<Utc>>)>(
            "select pid, backend_start from pg_stat_activity where pid = pg_backend_pid()",
        )
        .persistent(false)
        .fetch_optional(&mut connection);
        let found = bounded("looking at the session", STATEMENT, looking).await?;
        let backend = found.and_then(|(pid, started_at)| {
            Some(Backend {
                pid,
                started_at: started_at?,
            })
        });
        Ok(Self {
            connection,
            backend,
            keeps_plans: false,
            reads_backlog: false,
            mapped: None,
        })
    }

    /// The server's side of it, for the session after this one.
    #[must_use]
    pub fn backend(&self) -> Option<Backend> {
        self.backend
    }

    /// From now on the session reads this table in place of the outbox, if it is as the mapping says.
    ///
    /// # Errors
    /// A statement failed.
    pub async fn map(&mut self, mapping: &Mapping) -> Result<Result<(), Misfit>, Error> {
        self.keep_plans(false).await?;
        let looked = super::mapped::look(&mut self.connection, mapping).await?;
        Ok(looked.map(|relation| self.mapped = Some(relation)))
    }

    pub(in crate::store) fn relation(&self) -> Result<&Relation, Error> {
        self.mapped.as_ref().ok_or_else(|| Error::Corrupt {
            doing: "reading a mapped table",
            what: "the session reads none".to_owned(),
        })
    }

    /// A statement over the outbox, or over the table in its place.
    fn text(&self, own: &'static str) -> SqlStr {
        match &self.mapped {
            None => AssertSqlSafe(own.replace(SIZE, OWN_SIZE)).into_sql_str(),
            Some(relation) => AssertSqlSafe(relation.rewrite(own)).into_sql_str(),
        }
    }

    /// Sets whether statements reuse their plans, or get new ones for the present contents of the tables.
    async fn keep_plans(&mut self, keeps: bool) -> Result<(), Error> {
        if self.keeps_plans != keeps {
            let text = match keeps {
                true => "set plan_cache_mode = force_generic_plan",
                false => "set plan_cache_mode = force_custom_plan",
            };
            let setting = sqlx::query(text).execute(&mut self.connection);
            statement("choosing how to plan", setting).await?;
            self.keeps_plans = keeps;
        }
        Ok(())
    }

    /// Whether the outbox is there and whole. Its index is what pg_restore makes last, so an outbox that is still being
    /// restored does not pass for one that is empty.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn is_installed(&mut self) -> Result<bool, Error> {
        statement(
            "looking for the outbox",
            sqlx::query_scalar(
                "select exists (select from pg_catalog.pg_index where indexrelid = to_regclass('postroad.outbox_xid') and indisvalid)
                    and to_regclass('postroad.relay_mark') is not null",
            )
            .fetch_one(&mut self.connection),
        )
        .await
    }

    /// Leaves a mark. Committed when this returns, and with it everything that an earlier snapshot showed: the log is one.
    ///
    /// # Errors
    /// The statement failed: the mark may or may not be there, which is harmless.
    pub async fn insert_mark(&mut self, mark: Uuid) -> Result<(), Error> {
        let inserting = match &self.mapped {
            None => sqlx::query("insert into postroad.relay_mark (id) values ($1)").bind(mark),
            Some(relation) => {
                sqlx::query("insert into postroad.mapped_mark (id, table_name) values ($1, $2)")
                    .bind(mark)
                    .bind(&relation.table)
            }
        };
        let inserting = inserting.execute(&mut self.connection);
        statement("leaving a mark in the origin", inserting).await?;
        Ok(())
    }

    /// Empties the table of marks but for the one of the stored position, in one transaction. Does nothing (and returns
    /// false) when somebody reads the table: a dump must not make the relay wait.
    ///
    /// # Errors
    /// The transaction failed.
    pub async fn fold_marks(&mut self, kept: Uuid) -> Result<bool, Error> {
        self.keep_plans(false).await?;
        if self.mapped.is_some() {
            return self.fold_mapped_marks(kept).await;
        }
        statement("folding the marks", async {
            let mut transaction = self.connection.begin().await?;
            let locked =
                sqlx::query("lock table postroad.relay_mark in access exclusive mode nowait")
                    .execute(&mut *transaction)
                    .await;
            if let Err(error) = locked {
                transaction.rollback().await?;
                return lock_refused(error).map(|()| false);
            }
            sqlx::query("truncate postroad.relay_mark")
                .execute(&mut *transaction)
                .await?;
            sqlx::query("insert into postroad.relay_mark (id) values ($1)")
                .bind(kept)
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await?;
            Ok(true)
        })
        .await
    }

    /// Gives rows that carry transaction ids of another life of the database an id of this one, and moves the sequence past
    /// the highest number. Returns how many rows.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn restamp(&mut self) -> Result<i64, Error> {
        self.keep_plans(false).await?;
        let calling = match &self.mapped {
            None => sqlx::query_scalar("select postroad.relay_restamp()"),
            Some(relation) => {
                sqlx::query_scalar("select postroad.mapped_restamp($1)").bind(&relation.table)
            }
        };
        let calling = calling.fetch_one(&mut self.connection);
        statement("restamping the outbox", calling).await
    }
}

/// Passes an error on unless it says that the lock is not to be had.
fn lock_refused(error: sqlx::Error) -> Result<(), sqlx::Error> {
    match &error {
        sqlx::Error::Database(refusal) if refusal.code().as_deref() == Some("55P03") => Ok(()),
        _ => Err(error),
    }
}
