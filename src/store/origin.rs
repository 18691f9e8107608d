//! An origin, as its relay's session sees it: schema `postroad` in a database that is the broker's own or somebody else's.
//!
//! Every function is one statement or one transaction on a connection of the relay's own, bounded in time: a session whose
//! statement failed or did not end is dropped with its connection, which is safe since reads, marks and truncations can all be
//! repeated. A statement's snapshot matters in each of them; the header of its text says why it is the right one.

use std::future::Future;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt as _;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection as _, Row as _, SqlSafeStr as _, SqlStr};
use uuid::Uuid;

use super::bounded::{LONG_STATEMENT, bounded, connecting};
use super::mapped::{Misfit, Relation};
pub use super::outbox_row::{OutboxRow, Place};
use super::outbox_row::{read_place, read_row};
use super::{Connection, Database, Error};
use crate::domain::mapping::Mapping;
use crate::failpoint;

/// The leaves of an outbox, part of its schema.
pub const LEAF_COUNT: i16 = 8;
/// The time for which one leaf is filled, part of the outbox's schema.
pub const LEAF_PERIOD: Duration = Duration::from_secs(300);

/// On top of what every session of Postroad sets. A plan made while a leaf was small froze a sequential scan: 150 ms a step
/// instead of 0.3. So plans are not kept, but for that of a window. A role's statement timeout would end the manifest of a large
/// window, and its read only default a mark.
const SESSION: [(&str, &str); 8] = [
    ("enable_seqscan", "off"),
    ("plan_cache_mode", "force_custom_plan"),
    ("jit", "off"),
    ("max_parallel_workers_per_gather", "0"),
    ("work_mem", "64MB"),
    ("statement_timeout", "0"),
    ("default_transaction_read_only", "off"),
    ("application_name", "postroad relay"),
];

/// A relay's connection to its origin.
#[derive(Debug)]
pub struct Session {
    pub(in crate::store) connection: Connection,
    keeps_plans: bool,
    /// The table that is read in place of the outbox.
    mapped: Option<Relation>,
}

/// Who the origin is at the moment of a window's snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// A standby: its snapshots have no list of transactions in progress.
    pub in_recovery: bool,
    /// The cluster's identifier, made by initdb.
    pub system_identifier: String,
    /// The timeline of its log; rises when a standby is promoted.
    pub timeline: i32,
    /// The backend that answered: a pooler in between can change it.
    pub backend_pid: i32,
    /// Whether the mark asked for exists (or none was asked for).
    pub has_mark: bool,
    /// Whether the last snapshot is from this cluster's future.
    pub is_ahead: bool,
    /// The new snapshot.
    pub snapshot: String,
    /// The origin's clock.
    pub read_at: DateTime<Utc>,
}

/// An opened window.
#[derive(Debug)]
pub struct Opened {
    /// The origin's identity and the window's end.
    pub identity: Identity,
    /// Its rows by seq, or the first of them that came when it is large.
    pub rows: Vec<OutboxRow>,
    /// Whether `rows` is all of it, payloads included.
    pub is_whole: bool,
}

/// A stored position that was passed a grace ago.
#[derive(Debug, Clone, Copy)]
pub struct Passed<'a> {
    /// The broker that stored it.
    pub broker: Uuid,
    /// Its number.
    pub number: i64,
    /// Its snapshot.
    pub snapshot: &'a str,
}

/// How an attempt to empty a leaf ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Emptied {
    /// Its space is back.
    Yes,
    /// It has rows that are not passed for long enough.
    NotYet,
    /// Another session holds a lock on it: its process id, unless a prepared transaction holds it.
    Blocked(Option<i32>),
}

pub(in crate::store) fn statement<T>(
    doing: &'static str,
    future: impl Future<Output = Result<T, sqlx::Error>>,
) -> impl Future<Output = Result<T, Error>> {
    bounded(doing, LONG_STATEMENT, future)
}

impl Session {
    /// Connects, with the settings of a relay's session.
    ///
    /// # Errors
    /// The origin cannot be reached within 10 s, or refuses.
    pub async fn open(database: &Database) -> Result<Self, Error> {
        let options = database.options.clone().options(SESSION);
        let connection = connecting(Connection::connect_with(&options)).await?;
        Ok(Self {
            connection,
            keeps_plans: false,
            mapped: None,
        })
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
            None => own.into_sql_str(),
            Some(relation) => AssertSqlSafe(relation.rewrite(own)).into_sql_str(),
        }
    }

    /// Whether plans that statements have are used again, or made anew for what is in the tables now.
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

    /// Whether this is the backend that took the snapshot, and would take the very same one now: nothing that writes began or
    /// ended. Costs a tenth of opening a window.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn is_unchanged(&mut self, snapshot: &str, backend_pid: i32) -> Result<bool, Error> {
        self.keep_plans(true).await?;
        let asking =
            sqlx::query_scalar("select pg_current_snapshot()::text = $1 and pg_backend_pid() = $2")
                .bind(snapshot)
                .bind(backend_pid)
                .fetch_one(&mut self.connection);
        statement("asking for the origin's snapshot", asking).await
    }

    /// Opens a window after the snapshot `last`, and reads it if it is small: up to `max_rows` rows and `max_bytes` bytes.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn open_window(
        &mut self,
        last: &str,
        mark: Option<Uuid>,
        max_rows: usize,
        max_bytes: usize,
    ) -> Result<Opened, Error> {
        const DOING: &str = "opening a window of the outbox";
        self.keep_plans(true).await?;
        let text = match failpoint::is_mutant("order-by-xid") {
            false => self.text(include_str!("sql/open_outbox_window.sql")),
            true => AssertSqlSafe(include_str!("sql/open_outbox_window.sql").replace(
                "over (order by found.seq rows",
                "over (order by found.xid, found.seq rows",
            ))
            .into_sql_str(),
        };
        let reading = sqlx::query(text)
            .bind(last)
            .bind(mark)
            .bind(i64::try_from(max_rows).unwrap_or(i64::MAX))
            .bind(i64::try_from(max_bytes).unwrap_or(i64::MAX))
            .fetch_all(&mut self.connection);
        let found = statement(DOING, reading).await?;
        let opened = read_opened(&found, max_rows);
        #[cfg(feature = "failpoints")]
        let opened = opened.map(|mut opened| {
            super::mutant::drop_late(&mut opened.rows);
            opened
        });
        opened.map_err(Error::query(DOING))
    }

    /// The places of a window's first `limit` rows after seq `after`, by seq.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn read_manifest(
        &mut self,
        since: &str,
        snapshot: &str,
        after: i64,
        limit: usize,
    ) -> Result<Vec<Place>, Error> {
        self.keep_plans(false).await?;
        let text = self.text(include_str!("sql/read_outbox_manifest.sql"));
        statement("reading the manifest of a window", async {
            let mut rows = sqlx::query(text)
                .bind(since)
                .bind(snapshot)
                .bind(after)
                .bind(i64::try_from(limit).unwrap_or(i64::MAX))
                .fetch(&mut self.connection);
            let mut places = Vec::new();
            while let Some(row) = rows.try_next().await? {
                places.push(read_place(&row)?);
            }
            Ok(places)
        })
        .await
    }

    /// [`Session::read_manifest`] with each row's (source, id).
    ///
    /// # Errors
    /// The statement failed.
    pub async fn read_manifest_ids(
        &mut self,
        since: &str,
        snapshot: &str,
        after: i64,
        limit: usize,
    ) -> Result<Vec<(Place, (String, String))>, Error> {
        self.keep_plans(false).await?;
        let text = self.text(include_str!("sql/read_outbox_manifest_ids.sql"));
        statement("reading the manifest of a re-relay", async {
            let mut rows = sqlx::query(text)
                .bind(since)
                .bind(snapshot)
                .bind(after)
                .bind(i64::try_from(limit).unwrap_or(i64::MAX))
                .fetch(&mut self.connection);
            let mut places = Vec::new();
            while let Some(row) = rows.try_next().await? {
                let source: Option<String> = row.try_get("source")?;
                let id: Option<String> = row.try_get("id")?;
                let ids = (source.unwrap_or_default(), id.unwrap_or_default());
                places.push((read_place(&row)?, ids));
            }
            Ok(places)
        })
        .await
    }

    /// How many rows of a window there are after seq `after`.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn count_window(
        &mut self,
        since: &str,
        snapshot: &str,
        after: i64,
    ) -> Result<u64, Error> {
        self.keep_plans(false).await?;
        let text = self.text(include_str!("sql/count_outbox_window.sql"));
        let counting = sqlx::query_scalar(text)
            .bind(since)
            .bind(snapshot)
            .bind(after)
            .fetch_one(&mut self.connection);
        let count: i64 = statement("counting a window of the outbox", counting).await?;
        Ok(count.unsigned_abs())
    }

    /// The rows at these places, by seq. Fewer, when a row is not where the manifest saw it (VACUUM FULL, a person): the
    /// manifest must be read again.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn read_places(&mut self, places: &[Place]) -> Result<Vec<OutboxRow>, Error> {
        self.keep_plans(false).await?;
        const DOING: &str = "reading a page of the outbox";
        let mut rows = Vec::with_capacity(places.len());
        // A mapped table is one leaf; of a partitioned one, rows of other leaves at the same place have other numbers.
        let leaves = if self.mapped.is_some() { 1 } else { LEAF_COUNT };
        for leaf in 0..leaves {
            let of_leaf = || places.iter().filter(|place| place.leaf == leaf);
            let ctids: Vec<String> = of_leaf()
                .map(|place| format!("({},{})", place.block, place.line))
                .collect();
            if ctids.is_empty() {
                continue;
            }
            let seqs: std::collections::HashSet<i64> = of_leaf().map(|place| place.seq).collect();
            // The leaf is one of eight names of the schema, each with a statement of its own.
            let text = ROWS_BY_PLACE.replace("/*leaf*/", &leaf.to_string());
            let text = match &self.mapped {
                Some(relation) => relation.rewrite(&ROWS_BY_PLACE.replace("_/*leaf*/", "")),
                None => text,
            };
            let reading = sqlx::query(AssertSqlSafe(text))
                .bind(ctids)
                .fetch_all(&mut self.connection);
            for row in statement(DOING, reading).await? {
                let row = read_row(&row).map_err(Error::query(DOING))?;
                if seqs.contains(&row.seq) {
                    rows.push(row);
                }
            }
        }
        rows.sort_by_key(|row| row.seq);
        Ok(rows)
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

    /// The leaves that have something to empty: not the one that is filled now, nor the ones before and after it.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn find_idle_leaves(&mut self) -> Result<Vec<i16>, Error> {
        self.keep_plans(false).await?;
        let looking = sqlx::query_scalar(
            "select leaf::smallint
            from (select (floor(extract(epoch from now()) / 300)::bigint % 8)::integer as filled) as now,
                generate_series(2, 6) as distance, lateral (select (filled + distance) % 8 as leaf) as idle
            where pg_relation_size(format('postroad.outbox_%s', leaf)::regclass) > 0
            order by distance",
        )
        .fetch_all(&mut self.connection);
        statement("looking for leaves to empty", looking).await
    }

    /// The highest number of a position of this broker that an emptied row was passed by; 0 when none was.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn find_emptied(&mut self, broker: Uuid) -> Result<i64, Error> {
        let finding = match &self.mapped {
            None => sqlx::query_scalar(
                "select coalesce(max(number), 0) from postroad.relay_emptied where broker = $1",
            )
            .bind(broker),
            Some(relation) => sqlx::query_scalar(
                "select coalesce(max(number), 0) from postroad.mapped_emptied where broker = $1 and table_name = $2",
            )
            .bind(broker)
            .bind(&relation.table),
        };
        let finding = finding.fetch_one(&mut self.connection);
        statement("reading what was emptied", finding).await
    }

    /// Empties a leaf if every row in it was committed before the snapshot of a position that has been stored for the grace, and
    /// notes the position's number for [`Session::find_emptied`], in the same transaction.
    ///
    /// The order is what makes it safe: first the lock that no transaction with a row in the leaf can be holding against, then, in
    /// a new statement whose snapshot therefore sees whatever they committed, the look for rows that were not passed, then
    /// TRUNCATE. Looking before locking, or with one snapshot for both, lost a committed row.
    ///
    /// # Errors
    /// The transaction failed.
    pub async fn empty_leaf(&mut self, leaf: i16, passed: Passed<'_>) -> Result<Emptied, Error> {
        self.keep_plans(false).await?;
        let snapshot = passed.snapshot;
        // The leaf is one of eight names of the schema.
        let probe = format!(
            "select exists (select from postroad.outbox_{leaf}
                where xid >= pg_snapshot_xmin($1::text::pg_snapshot) and not pg_visible_in_snapshot(xid, $1::text::pg_snapshot))"
        );
        statement("emptying a leaf of the outbox", async {
            // Without a lock first: a leaf that is not ready need not be locked to find out.
            if is_there(&mut self.connection, &probe, snapshot).await? {
                return Ok(Emptied::NotYet);
            }
            let mut transaction = self.connection.begin().await?;
            let lock = format!("lock table postroad.outbox_{leaf} in access exclusive mode nowait");
            let locked = sqlx::query(AssertSqlSafe(lock))
                .execute(&mut *transaction)
                .await;
            if let Err(error) = locked {
                transaction.rollback().await?;
                lock_refused(error)?;
                let pid = find_blocker(&mut self.connection, leaf).await?;
                return Ok(Emptied::Blocked(pid));
            }
            failpoint::reach("outbox.leaf_locked");
            if is_there(&mut transaction, &probe, snapshot).await? {
                transaction.rollback().await?;
                return Ok(Emptied::NotYet);
            }
            sqlx::query(
                "insert into postroad.relay_emptied as noted (broker, number) values ($1, $2)
                on conflict (broker) do update set number = excluded.number, emptied_at = excluded.emptied_at
                where noted.number < excluded.number",
            )
            .bind(passed.broker)
            .bind(passed.number)
            .execute(&mut *transaction)
            .await?;
            sqlx::query(AssertSqlSafe(format!("truncate postroad.outbox_{leaf}")))
                .execute(&mut *transaction)
                .await?;
            failpoint::reach("outbox.leaf_truncated");
            transaction.commit().await?;
            Ok(Emptied::Yes)
        })
        .await
    }
}

async fn is_there(
    connection: &mut Connection,
    probe: &str,
    snapshot: &str,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(AssertSqlSafe(probe.to_owned()))
        .bind(snapshot)
        .fetch_one(connection)
        .await
}

async fn find_blocker(connection: &mut Connection, leaf: i16) -> Result<Option<i32>, sqlx::Error> {
    let pid: Option<Option<i32>> = sqlx::query_scalar(
        "select pid from pg_catalog.pg_locks
        where locktype = 'relation' and granted and relation = $1::text::regclass
            and database = (select oid from pg_catalog.pg_database where datname = current_database())
        order by pid nulls last
        limit 1",
    )
    .bind(format!("postroad.outbox_{leaf}"))
    .fetch_optional(connection)
    .await?;
    Ok(pid.flatten())
}

/// Passes an error on unless it says that the lock is not to be had.
fn lock_refused(error: sqlx::Error) -> Result<(), sqlx::Error> {
    match &error {
        sqlx::Error::Database(refusal) if refusal.code().as_deref() == Some("55P03") => Ok(()),
        _ => Err(error),
    }
}

/// The rows at places of one leaf.
const ROWS_BY_PLACE: &str = "select seq, topic, payload, payload_bytes, key, type, id, source, subject, content_type, data_schema,
        headers::text as headers, expected_version,
        case when time >= '0001-01-01 00:00:00+00' and time < '10000-01-01 00:00:00+00' then time end as time,
        coalesce(time >= '0001-01-01 00:00:00+00' and time < '10000-01-01 00:00:00+00', true) as time_is_valid,
        case when deliver_at >= '0001-01-01 00:00:00+00' and deliver_at < '10000-01-01 00:00:00+00'
            then deliver_at end as deliver_at,
        coalesce(deliver_at >= '0001-01-01 00:00:00+00' and deliver_at < '10000-01-01 00:00:00+00', true)
            as deliver_at_is_valid
    from postroad.outbox_/*leaf*/ where ctid = any($1::text[]::tid[])";

/// A row and its place, null where there is none but this.
fn numbered(row: &PgRow) -> Result<(Option<i64>, &PgRow), sqlx::Error> {
    Ok((row.try_get("n")?, row))
}

fn read_opened(found: &[PgRow], max_rows: usize) -> Result<Opened, sqlx::Error> {
    let mut found = found.iter().map(numbered).collect::<Result<Vec<_>, _>>()?;
    // As they come, but nobody promises that.
    found.sort_by_key(|(n, _)| *n);
    let (_, first) = found.first().ok_or(sqlx::Error::RowNotFound)?;
    let identity = read_identity(first)?;
    let mut rows = Vec::new();
    let mut is_whole = true;
    if first.try_get::<Option<i64>, _>("seq")?.is_some() {
        is_whole = found.len() <= max_rows;
        for (_, row) in found {
            is_whole &= row.try_get::<Option<bool>, _>("is_whole")?.unwrap_or(false);
            rows.push(read_row(row)?);
        }
    }
    Ok(Opened {
        identity,
        rows,
        is_whole,
    })
}

pub(in crate::store) fn read_identity(first: &PgRow) -> Result<Identity, sqlx::Error> {
    Ok(Identity {
        in_recovery: first.try_get("in_recovery")?,
        system_identifier: first.try_get("system_identifier")?,
        timeline: first.try_get("timeline")?,
        backend_pid: first.try_get("backend_pid")?,
        has_mark: first.try_get("has_mark")?,
        is_ahead: first.try_get("is_ahead")?,
        snapshot: first.try_get("snapshot")?,
        read_at: first.try_get("read_at")?,
    })
}
