//! Users' locks. Called from a task with its own connection, which is never aborted.

use chrono::{DateTime, Utc};

use super::bounded::{HEARTBEAT, bounded};
use super::{Connection, Database, Error};
use crate::domain::name::LockName;

/// How long a place in the line is kept after its owner last asked, in seconds.
const PLACE_SECONDS: f64 = 5.0;

/// A request for a lock.
#[derive(Debug, Clone, PartialEq)]
pub struct Take {
    /// The lock's name.
    pub name: LockName,
    /// For whom.
    pub owner: String,
    /// Renew the lock that is held under this token, and take no other.
    pub token: Option<i64>,
    /// The time to hold it from now.
    pub seconds: f64,
    /// With a place in the line.
    pub waits: bool,
}

/// The holder of a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The name that asked for it.
    pub owner: String,
    /// The fencing token.
    pub token: i64,
    /// The time when it began.
    pub acquired_at: DateTime<Utc>,
    /// The end of its time, unless it is renewed.
    pub expires_at: DateTime<Utc>,
}

/// How a lock stands after a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The holder; one whose time is up does not count.
    pub holder: Option<Holder>,
    /// How many are in the line before the one who asked, or in all.
    pub ahead: u64,
    /// The database's clock.
    pub clock: DateTime<Utc>,
}

/// One who waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiter {
    /// The waiting caller.
    pub owner: String,
    /// The time when it began.
    pub since: DateTime<Utc>,
}

/// A lock as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// The lock's name.
    pub name: LockName,
    /// Its holder.
    pub holder: Option<Holder>,
    /// The token of the present or the last holder.
    pub token: i64,
    /// The first of those who wait, in order.
    pub waiters: Vec<Waiter>,
}

type Columns = (
    Option<String>,
    Option<i64>,
    Option<DateTime<Utc>>,
    Option<DateTime<Utc>>,
    i64,
    DateTime<Utc>,
);

fn holder(
    owner: Option<String>,
    token: Option<i64>,
    acquired_at: Option<DateTime<Utc>>,
    expires_at: Option<DateTime<Utc>>,
    clock: DateTime<Utc>,
) -> Option<Holder> {
    let holder = Holder {
        owner: owner?,
        token: token?,
        acquired_at: acquired_at?,
        expires_at: expires_at?,
    };
    (holder.expires_at > clock).then_some(holder)
}

/// Takes, renews and queues up, in one commit. The answers are in the order of the requests. Two requests with one name and
/// owner must not be in one call.
///
/// # Errors
/// The database's; drop the connection when it was lost.
pub async fn take(connection: &mut Connection, takes: &[Take]) -> Result<Vec<Standing>, Error> {
    let names: Vec<&str> = takes.iter().map(|take| take.name.as_str()).collect();
    let owners: Vec<&str> = takes.iter().map(|take| take.owner.as_str()).collect();
    let tokens: Vec<Option<i64>> = takes.iter().map(|take| take.token).collect();
    let seconds: Vec<f64> = takes.iter().map(|take| take.seconds).collect();
    let waits: Vec<bool> = takes.iter().map(|take| take.waits).collect();
    let taking = sqlx::query_as(
        "select held_by, held_token, held_since, held_until, places_before, clock \
         from postroad_broker.take_user_locks($1, $2, $3, $4, $5, $6)",
    )
    .bind(names)
    .bind(owners)
    .bind(tokens)
    .bind(seconds)
    .bind(waits)
    .bind(PLACE_SECONDS)
    .fetch_all(connection);
    let rows: Vec<Columns> = bounded("taking locks", HEARTBEAT, taking).await?;
    let rows = rows.into_iter();
    Ok(rows
        .map(|(owner, token, since, until, ahead, clock)| Standing {
            holder: holder(owner, token, since, until, clock),
            ahead: ahead.unsigned_abs(),
            clock,
        })
        .collect())
}

/// Gives back the locks that are held under these tokens, in one commit, and says which were.
///
/// # Errors
/// The database's; drop the connection when it was lost.
pub async fn release(
    connection: &mut Connection,
    locks: &[(LockName, i64)],
) -> Result<Vec<String>, Error> {
    let names: Vec<&str> = locks.iter().map(|(name, _)| name.as_str()).collect();
    let tokens: Vec<i64> = locks.iter().map(|&(_, token)| token).collect();
    let releasing = sqlx::query_scalar("select postroad_broker.release_user_locks($1, $2)")
        .bind(names)
        .bind(tokens)
        .fetch_all(connection);
    bounded("releasing locks", HEARTBEAT, releasing).await
}

/// Deletes rows of locks that have been free for a day, at most a thousand. Returns how many.
///
/// # Errors
/// The database's; drop the connection when it was lost.
pub async fn forget(connection: &mut Connection) -> Result<i64, Error> {
    let forgetting =
        sqlx::query_scalar("select postroad_broker.forget_user_locks()").fetch_one(connection);
    bounded("forgetting free locks", HEARTBEAT, forgetting).await
}

const READING: &str = "reading locks";

type Row = (
    String,
    Option<String>,
    i64,
    Option<DateTime<Utc>>,
    Option<DateTime<Utc>>,
    Vec<String>,
    Vec<DateTime<Utc>>,
    DateTime<Utc>,
);

/// The columns of a page of locks, which a subquery finds: those who wait are looked up for these alone.
macro_rules! describe {
    ($page:literal) => {
        concat!(
            "select l.name, l.owner, l.token, l.acquired_at, nullif(l.expires_at, '-infinity'),
                coalesce(w.owners, '{}'), coalesce(w.since, '{}'), clock_timestamp()
            from (",
            $page,
            ") l
            left join lateral (
                select array_agg(f.owner order by f.ticket) as owners, array_agg(f.since order by f.ticket) as since
                from (
                    select w.owner, w.since, w.ticket from postroad_broker.user_lock_waiter w
                    where w.name = l.name and w.expires_at > clock_timestamp()
                    order by w.ticket
                    limit 100
                ) f
            ) w on true
            order by l.name"
        )
    };
}

/// Locks that are held, by name after a name; with the first hundred of those who wait.
///
/// # Errors
/// The statement failed.
pub async fn list(
    database: &Database,
    after: Option<&LockName>,
    limit: i64,
) -> Result<Vec<Described>, Error> {
    let rows: Vec<Row> = sqlx::query_as(describe!(
        "select * from postroad_broker.user_lock u
         where u.name > $1 and u.owner is not null and u.expires_at > clock_timestamp()
         order by u.name
         limit $2"
    ))
    .bind(after.map_or("", LockName::as_str))
    .bind(limit)
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query(READING))?;
    rows.into_iter().map(described).collect()
}

/// A lock, if it is known, held or not; with the first hundred of those who wait.
///
/// # Errors
/// The statement failed.
pub async fn find(database: &Database, name: &LockName) -> Result<Vec<Described>, Error> {
    let rows: Vec<Row> = sqlx::query_as(describe!(
        "select * from postroad_broker.user_lock u where u.name = $1"
    ))
    .bind(name.as_str())
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query(READING))?;
    rows.into_iter().map(described).collect()
}

fn described(row: Row) -> Result<Described, Error> {
    let (name, owner, token, acquired_at, expires_at, owners, since, clock) = row;
    let waiters = owners.into_iter().zip(since);
    Ok(Described {
        name: LockName::parse(&name).map_err(|error| Error::Corrupt {
            doing: READING,
            what: format!("the lock `{name}` {error}"),
        })?,
        holder: holder(owner, Some(token), acquired_at, expires_at, clock),
        token,
        waiters: waiters
            .map(|(owner, since)| Waiter { owner, since })
            .collect(),
    })
}
