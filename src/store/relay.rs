//! The broker's side of relays: origins, positions, their history, and the rows that could not become messages.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{Connection as _, FromRow as _, Row as _};

use super::cluster::lock_lease;
use super::{Database, Error, repeated};
use crate::domain::id::{Fence, OriginId};
use crate::domain::name::OriginName;

/// An origin's latest position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPosition {
    /// Rises by one with each append of the relay; 0 when it has never appended.
    pub number: i64,
    /// JSON text; none with number 0.
    pub text: Option<String>,
    /// The number up to which the journal is folded into the checkpoint.
    pub folded: i64,
}

/// The state found when a relay takes up its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovered {
    /// The position to go on from.
    Position(StoredPosition),
    /// The lease is no longer held at that epoch.
    Fenced,
}

/// An outbox row that could not become a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RejectedRow {
    /// Its number in the list.
    pub id: i64,
    /// Its number in the outbox.
    pub seq: i64,
    /// Why, as one clause.
    pub reason: String,
    /// The row as a JSON object.
    pub outbox_row: String,
    /// The time when it was rejected.
    pub rejected_at: DateTime<Utc>,
    /// The time when it was resent.
    pub resent_at: Option<DateTime<Utc>>,
}

/// Finds an origin's row, or makes it.
///
/// # Errors
/// The statement failed.
pub async fn insert_origin(database: &Database, name: &OriginName) -> Result<OriginId, Error> {
    let adding = sqlx::query(
        "insert into postroad_broker.origin (name) values ($1) on conflict (name) do nothing",
    )
    .bind(name.as_str())
    .execute(database.pooled());
    adding.await.map_err(Error::query("adding an origin"))?;
    let finding = sqlx::query_scalar("select id from postroad_broker.origin where name = $1")
        .bind(name.as_str())
        .fetch_one(database.pooled());
    let id = finding.await.map_err(Error::query("finding an origin"))?;
    Ok(OriginId(id))
}

/// Reads where a relay goes on. The lease's row first, in a statement of its own: an append whose outcome is unknown holds it
/// until it is decided, and so does a fold of the journal. Then checkpoint and journal in one statement, whose snapshot is
/// later than both.
///
/// # Errors
/// The transaction failed.
pub async fn recover_position(
    database: &Database,
    origin: OriginId,
    fence: &Fence,
) -> Result<Recovered, Error> {
    const DOING: &str = "reading a relay's position";
    let read = async {
        let mut connection = database.pool().acquire().await?;
        let mut transaction = connection.begin().await?;
        if !lock_lease(&mut transaction, fence).await? {
            transaction.rollback().await?;
            return Ok(Recovered::Fenced);
        }
        let latest: Option<(i64, String, i64)> = sqlx::query_as(
            "select number, position, folded
            from (
                select number, position, number as folded
                from postroad_broker.relay_checkpoint where origin_id = $1
                union all
                select number, position, coalesce(
                    (select c.number from postroad_broker.relay_checkpoint as c where c.origin_id = $1), 0)
                from postroad_broker.relay_journal where origin_id = $1
            ) as positions
            order by number desc
            limit 1",
        )
        .bind(origin.0)
        .fetch_optional(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(Recovered::Position(match latest {
            Some((number, text, folded)) => StoredPosition {
                number,
                text: Some(text),
                folded,
            },
            None => StoredPosition {
                number: 0,
                text: None,
                folded: 0,
            },
        }))
    };
    read.await.map_err(Error::query(DOING))
}

/// Folds the journal of all relays into their checkpoints and turns to its other segment, in one transaction. It locks the leases first, in
/// name order as every append does, so no relay's append is in flight. What the turn before left is emptied then, without waiting for a
/// lock: a dump that reads it must not hold up the appends that would queue behind a waiting lock. Returns whether it turned: not while
/// a snapshot is older than the turn before, which needs both segments to have a position that belongs to its log.
///
/// # Errors
/// The transaction failed.
pub async fn fold_journal(database: &Database) -> Result<bool, Error> {
    let fold = async {
        let mut connection = database.pool().acquire().await?;
        let mut transaction = connection.begin().await?;
        sqlx::query(
            "select from postroad_broker.lease where name like 'relay/%' order by name for update",
        )
        .execute(&mut *transaction)
        .await?;
        sqlx::query(
            "insert into postroad_broker.relay_checkpoint (origin_id, number, position)
            select o.id, j.number, j.position
            from postroad_broker.origin o
            cross join lateral (
                select j.number, j.position from postroad_broker.relay_journal j
                where j.origin_id = o.id order by j.number desc limit 1
            ) j
            on conflict (origin_id) do update set number = excluded.number, position = excluded.position
            where relay_checkpoint.number < excluded.number",
        )
        .execute(&mut *transaction)
        .await?;
        let turned = sqlx::query_scalar("select postroad_broker.turn_relay_journal()")
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(turned)
    };
    fold.await
        .map_err(Error::query("folding the journal of the relays"))
}

/// Notes a stored position in the history, and drops what the history no longer needs: all before the newest position that is
/// older than the grace. Fenced, since a history from before the origin went back in time would empty leaves that are not passed.
///
/// # Errors
/// The statement failed.
pub async fn note_history(
    database: &Database,
    origin: OriginId,
    fence: &Fence,
    number: i64,
    position: &str,
    grace: Duration,
) -> Result<(), Error> {
    let noting = sqlx::query(
        "with held as (
            select from postroad_broker.lease where name = $1 and epoch = $2 for share
        ),
        added as (
            insert into postroad_broker.relay_history (origin_id, number, position)
            select $3, $4, $5 from held
            on conflict (origin_id, number) do nothing
        )
        delete from postroad_broker.relay_history
        where origin_id = $3 and exists (select from held) and number < (
            select max(number) from postroad_broker.relay_history
            where origin_id = $3 and passed_at <= clock_timestamp() - make_interval(secs => $6)
        )",
    )
    .bind(&fence.lease)
    .bind(fence.epoch.0)
    .bind(origin.0)
    .bind(number)
    .bind(position)
    .bind(grace.as_secs_f64())
    .execute(database.pooled());
    noting
        .await
        .map_err(Error::query("noting a relay's history"))?;
    Ok(())
}

/// Forgets an origin's history: it went back in time. Returns false when fenced.
///
/// # Errors
/// The statement failed.
pub async fn delete_history(
    database: &Database,
    origin: OriginId,
    fence: &Fence,
) -> Result<bool, Error> {
    let deleting = sqlx::query_scalar(
        "with held as (
            select from postroad_broker.lease where name = $1 and epoch = $2 for share
        ),
        gone as (
            delete from postroad_broker.relay_history where origin_id = $3 and exists (select from held)
        )
        select exists (select from held)",
    )
    .bind(&fence.lease)
    .bind(fence.epoch.0)
    .bind(origin.0)
    .fetch_one(database.pooled());
    deleting
        .await
        .map_err(Error::query("forgetting a relay's history"))
}

/// The latest position that has been stored for the grace: its number and JSON text.
///
/// # Errors
/// The statement failed.
pub async fn find_passed_position(
    database: &Database,
    origin: OriginId,
    grace: Duration,
) -> Result<Option<(i64, String)>, Error> {
    let finding = sqlx::query_as(
        "select number, position from postroad_broker.relay_history
        where origin_id = $1 and passed_at <= clock_timestamp() - make_interval(secs => $2)
        order by number desc
        limit 1",
    )
    .bind(origin.0)
    .bind(grace.as_secs_f64())
    .fetch_optional(database.pooled());
    finding
        .await
        .map_err(Error::query("finding a passed position"))
}

/// Rejected rows of an origin that have not been resent.
///
/// # Errors
/// The statement failed.
pub async fn count_rejected(database: &Database, origin: OriginId) -> Result<u64, Error> {
    let counting = sqlx::query_scalar(
        "select count(*) from postroad_broker.rejected_message where origin_id = $1 and resent_at is null",
    )
    .bind(origin.0)
    .fetch_one(database.pooled());
    let count: i64 = counting
        .await
        .map_err(Error::query("counting rejected rows"))?;
    Ok(count.unsigned_abs())
}

type RejectedColumns = (
    i64,
    i64,
    String,
    String,
    DateTime<Utc>,
    Option<DateTime<Utc>>,
);

fn rejected_row(columns: RejectedColumns) -> RejectedRow {
    let (id, seq, reason, outbox_row, rejected_at, resent_at) = columns;
    RejectedRow {
        id,
        seq,
        reason,
        outbox_row,
        rejected_at,
        resent_at,
    }
}

/// Rejected rows of an origin after number `after`, oldest first, at most `limit` and at most 16 MiB of rows, but one if there is
/// one. With whether there are more.
///
/// # Errors
/// The statement failed.
pub async fn list_rejected(
    database: &Database,
    origin: OriginId,
    after: i64,
    limit: u32,
) -> Result<(Vec<RejectedRow>, bool), Error> {
    const DOING: &str = "listing rejected rows";
    let listing = sqlx::query(
        "select id, seq, reason, outbox_row, rejected_at, resent_at, has_next
        from (
            select id, seq, reason, outbox_row, rejected_at, resent_at, row_number() over by_id as n,
                lead(id) over by_id is not null as has_next,
                sum(octet_length(outbox_row)) over (by_id rows unbounded preceding) as running_size
            from postroad_broker.rejected_message
            where origin_id = $1 and id > $2
            window by_id as (order by id)
            order by id
            limit $3
        ) as page
        where n = 1 or running_size <= 16777216
        order by id",
    )
    .bind(origin.0)
    .bind(after)
    .bind(i64::from(limit))
    .fetch_all(database.pooled());
    let found = listing.await.map_err(Error::query(DOING))?;
    let read = || {
        let mut rows = Vec::with_capacity(found.len());
        let mut has_next = false;
        for row in &found {
            has_next = row.try_get("has_next")?;
            rows.push(rejected_row(RejectedColumns::from_row(row)?));
        }
        Ok((rows, has_next))
    };
    read().map_err(Error::query(DOING))
}

/// One rejected row.
///
/// # Errors
/// The statement failed.
pub async fn find_rejected(
    database: &Database,
    origin: OriginId,
    id: i64,
) -> Result<Option<RejectedRow>, Error> {
    let finding = sqlx::query_as::<_, RejectedColumns>(
        "select id, seq, reason, outbox_row, rejected_at, resent_at
        from postroad_broker.rejected_message
        where origin_id = $1 and id = $2",
    )
    .bind(origin.0)
    .bind(id)
    .fetch_optional(database.pooled());
    let row = finding
        .await
        .map_err(Error::query("finding a rejected row"))?;
    Ok(row.map(rejected_row))
}

/// Marks a rejected row as resent.
///
/// # Errors
/// The statement failed.
pub async fn mark_resent(database: &Database, origin: OriginId, id: i64) -> Result<(), Error> {
    repeated(|_| async move {
        let marking = sqlx::query(
            "update postroad_broker.rejected_message set resent_at = clock_timestamp()
            where origin_id = $1 and id = $2 and resent_at is null",
        )
        .bind(origin.0)
        .bind(id)
        .execute(database.pooled());
        marking
            .await
            .map_err(Error::query("marking a rejected row as resent"))?;
        Ok(())
    })
    .await
}

/// Deletes rejected rows of an origin up to a number, or the one with it, at most `limit`. Returns how many were there.
///
/// # Errors
/// The statement failed; it can be repeated.
pub async fn delete_rejected(
    database: &Database,
    origin: OriginId,
    ids: std::ops::RangeInclusive<i64>,
    limit: u32,
) -> Result<u64, Error> {
    let deleting = sqlx::query(
        "delete from postroad_broker.rejected_message where id in (
            select id from postroad_broker.rejected_message
            where origin_id = $1 and id between $2 and $3 order by id limit $4
        )",
    )
    .bind(origin.0)
    .bind(*ids.start())
    .bind(*ids.end())
    .bind(i64::from(limit))
    .execute(database.pooled());
    let deleted = deleting
        .await
        .map_err(Error::query("deleting rejected rows"))?;
    Ok(deleted.rows_affected())
}

/// How much of an origin's rejected rows is kept, the youngest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RejectedBounds {
    /// The most to return.
    pub rows: u64,
    /// The most bytes.
    pub bytes: u64,
    /// None that is older.
    pub age: Duration,
}

/// Up to which number an origin's rejected rows are beyond the bounds; none when no row is.
///
/// # Errors
/// The statement failed.
pub async fn find_rejected_beyond(
    database: &Database,
    origin: OriginId,
    bounds: RejectedBounds,
) -> Result<Option<i64>, Error> {
    let finding = sqlx::query_scalar(
        "select max(id)
        from (
            select id, rejected_at, row_number() over by_id as n,
                sum(octet_length(outbox_row)) over (by_id rows unbounded preceding) as bytes
            from postroad_broker.rejected_message
            where origin_id = $1
            window by_id as (order by id desc)
        ) as kept
        where n > $2 or bytes > $3 or rejected_at < clock_timestamp() - make_interval(secs => $4)",
    )
    .bind(origin.0)
    .bind(i64::try_from(bounds.rows).unwrap_or(i64::MAX))
    .bind(i64::try_from(bounds.bytes).unwrap_or(i64::MAX))
    .bind(bounds.age.as_secs_f64())
    .fetch_one(database.pooled());
    finding
        .await
        .map_err(Error::query("looking at rejected rows"))
}

/// For each (seq, outbox row), whether it is in the origin's list of rejected rows, resent or not.
///
/// # Errors
/// The statement failed.
pub async fn find_listed_rejected(
    database: &Database,
    origin: OriginId,
    rows: Vec<(i64, String)>,
) -> Result<Vec<bool>, Error> {
    let (seqs, texts): (Vec<i64>, Vec<String>) = rows.into_iter().unzip();
    let finding = sqlx::query_scalar(
        "select exists (
            select from postroad_broker.rejected_message as listed
            where listed.origin_id = $1 and listed.seq = asked.seq
                and hashtextextended(listed.outbox_row, 0) = hashtextextended(asked.outbox_row, 0)
                and listed.outbox_row = asked.outbox_row
        )
        from unnest($2::bigint[], $3::text[]) with ordinality as asked (seq, outbox_row, n)
        order by n",
    )
    .bind(origin.0)
    .bind(seqs)
    .bind(texts)
    .fetch_all(database.pooled());
    finding
        .await
        .map_err(Error::query("looking up rejected rows"))
}
