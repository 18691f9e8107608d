//! The leaves of an outbox: filled in turn, and emptied by TRUNCATE once all their rows were passed for long enough.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{AssertSqlSafe, Connection as _};

use super::{Reader, Session, lock_refused, statement};
use crate::failpoint;
use crate::store::{Connection, Error};

/// The leaves of an outbox, part of its schema.
pub const LEAF_COUNT: i16 = 8;
/// The time for which one leaf is filled, part of the outbox's schema.
pub const LEAF_PERIOD: Duration = Duration::from_secs(300);

/// A stored position that was passed a grace ago.
#[derive(Debug, Clone, Copy)]
pub struct Passed<'a> {
    /// The reader that stored it.
    pub reader: Reader,
    /// The broker's clock now.
    pub now: DateTime<Utc>,
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

impl Session {
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

    /// A time by the broker's clock before which none of the outbox's rows was committed: each came after its leaf was emptied last. None,
    /// when a leaf that has rows was never emptied.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn find_oldest(&mut self) -> Result<Option<DateTime<Utc>>, Error> {
        self.keep_plans(false).await?;
        let finding = sqlx::query_scalar(
            "select case when bool_and(noted.emptied_at is not null) then min(noted.emptied_at) end
            from generate_series(0, 7) as leaves (leaf)
            left join postroad.outbox_leaf as noted on noted.leaf = leaves.leaf
            where pg_relation_size(format('postroad.outbox_%s', leaves.leaf)::regclass) > 0",
        )
        .fetch_one(&mut self.connection);
        statement("finding the age of the outbox", finding).await
    }

    /// The highest number of a position of this reader that an emptied row was passed by; 0 when none was.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn find_emptied(&mut self, reader: Reader) -> Result<i64, Error> {
        let finding = match &self.mapped {
            None => sqlx::query_scalar(
                "select coalesce(max(number), 0) from postroad.relay_emptied where broker = $1 and origin_id = $2",
            )
            .bind(reader.broker)
            .bind(reader.origin.0),
            Some(relation) => sqlx::query_scalar(
                "select coalesce(max(number), 0) from postroad.mapped_emptied where broker = $1 and origin_id = $2 and table_name = $3",
            )
            .bind(reader.broker)
            .bind(reader.origin.0)
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
        // The leaf is one of eight names of the schema. What the snapshot does not show has an id from its xmax on, or one of those that
        // were in progress in it: each is looked for by the index. All rows since the oldest of those would be walked through otherwise.
        let probe = format!(
            "select exists (select from postroad.outbox_{leaf} where xid >= pg_snapshot_xmax($1::text::pg_snapshot))
                or exists (select from pg_snapshot_xip($1::text::pg_snapshot) as held (xid),
                    lateral (select from postroad.outbox_{leaf} as o where o.xid = held.xid limit 1) as o)"
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
                "insert into postroad.relay_emptied as noted (broker, origin_id, number) values ($1, $2, $3)
                on conflict (broker, origin_id) do update set number = excluded.number, emptied_at = excluded.emptied_at
                where noted.number < excluded.number",
            )
            .bind(passed.reader.broker)
            .bind(passed.reader.origin.0)
            .bind(passed.number)
            .execute(&mut *transaction)
            .await?;
            sqlx::query(AssertSqlSafe(format!("truncate postroad.outbox_{leaf}")))
                .execute(&mut *transaction)
                .await?;
            sqlx::query(
                "insert into postroad.outbox_leaf (leaf, emptied_at) values ($1, $2)
                on conflict (leaf) do update set emptied_at = excluded.emptied_at",
            )
            .bind(leaf)
            .bind(passed.now)
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
