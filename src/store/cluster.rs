//! Nodes, leases, and what makes this broker this broker.

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::bounded::{HEARTBEAT, bounded};
use super::{Connection, Database, Error};
use crate::domain::id::{Epoch, Fence};

/// What is written once about a broker: all its nodes share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerIdentity {
    /// Names the broker, in `source` attributes and in marks.
    pub id: Uuid,
    /// The key of the MAC in receipts. Never logged or shown.
    pub receipt_key: ReceiptKey,
}

/// 32 random bytes whose Debug shows none of them.
#[derive(Clone, PartialEq, Eq)]
pub struct ReceiptKey(pub [u8; 32]);

impl std::fmt::Debug for ReceiptKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReceiptKey(…)")
    }
}

/// Reads the broker's row, writing it on the first start.
///
/// # Errors
/// The database's.
pub async fn broker_identity(database: &Database) -> Result<BrokerIdentity, Error> {
    const DOING: &str = "reading the broker's identity";
    let mut connection = database.connect().await?;
    // Four random UUIDs hold 488 random bits; the digest spreads them over 256.
    let mut digest = Sha256::new();
    for _ in 0..4 {
        digest.update(Uuid::new_v4().as_bytes());
    }
    bounded(
        DOING,
        HEARTBEAT,
        sqlx::query(
            "insert into postroad_broker.broker (receipt_key) values ($1) on conflict do nothing",
        )
        .bind(&digest.finalize()[..])
        .execute(&mut connection),
    )
    .await?;
    let (id, key): (Uuid, Vec<u8>) = bounded(
        DOING,
        HEARTBEAT,
        sqlx::query_as("select id, receipt_key from postroad_broker.broker")
            .fetch_one(&mut connection),
    )
    .await?;
    let key = <[u8; 32]>::try_from(key).map_err(|key| Error::Corrupt {
        doing: DOING,
        what: format!("a receipt key of {} bytes", key.len()),
    })?;
    Ok(BrokerIdentity {
        id,
        receipt_key: ReceiptKey(key),
    })
}

/// How the server was set up, as far as promises rest on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSafety {
    /// The settings that make an acknowledged write less than durable: `fsync`, `full_page_writes`, `synchronous_commit`.
    pub unsafe_settings: Vec<&'static str>,
    /// Whether it is a standby, which can neither be written to nor say which transactions run.
    pub is_standby: bool,
}

/// Reads whether the server keeps what it acknowledges.
///
/// # Errors
/// The database's.
pub async fn read_server_safety(connection: &mut Connection) -> Result<ServerSafety, Error> {
    let (fsync, full_page_writes, synchronous_commit, is_standby): (bool, bool, bool, bool) =
        bounded(
            "reading the server's settings",
            HEARTBEAT,
            sqlx::query_as(
                "select current_setting('fsync')::bool, current_setting('full_page_writes')::bool, \
             current_setting('synchronous_commit') not in ('off', 'local'), pg_is_in_recovery()",
            )
            .fetch_one(connection),
        )
        .await?;
    let settings = [
        ("fsync", fsync),
        ("full_page_writes", full_page_writes),
        ("synchronous_commit", synchronous_commit),
    ];
    Ok(ServerSafety {
        unsafe_settings: settings
            .into_iter()
            .filter_map(|(name, is_on)| (!is_on).then_some(name))
            .collect(),
        is_standby,
    })
}

/// Inserts a node row: a new incarnation. Returns its number and the database's clock.
///
/// # Errors
/// The database's.
pub async fn insert_node(
    connection: &mut Connection,
    address: &str,
    ttl_seconds: f64,
) -> Result<(i64, DateTime<Utc>), Error> {
    bounded(
        "registering the node",
        HEARTBEAT,
        sqlx::query_as(
            "insert into postroad_broker.node (address, expires_at) \
         values ($1, clock_timestamp() + make_interval(secs => $2)) \
         returning incarnation, clock_timestamp()",
        )
        .bind(address)
        .bind(ttl_seconds)
        .fetch_one(connection),
    )
    .await
}

/// Renews a node row. `false`: the incarnation is dead, and stays so.
///
/// # Errors
/// The database's.
pub async fn renew_node(
    connection: &mut Connection,
    incarnation: i64,
    ttl_seconds: f64,
) -> Result<bool, Error> {
    let renewed = bounded("renewing the node", HEARTBEAT, sqlx::query(
        "update postroad_broker.node set expires_at = clock_timestamp() + make_interval(secs => $2) \
         where incarnation = $1 and dead_at is null",
    )
    .bind(incarnation)
    .bind(ttl_seconds)
    .execute(connection)).await?;
    Ok(renewed.rows_affected() == 1)
}

/// Deletes node rows that are a day out of date and hold nothing. A few rows per deploy.
///
/// # Errors
/// The database's.
pub async fn delete_old_nodes(connection: &mut Connection) -> Result<(), Error> {
    bounded(
        "deleting old nodes",
        HEARTBEAT,
        sqlx::query(
            "delete from postroad_broker.node n \
         where n.expires_at < (select clock_timestamp()) - interval '1 day' \
           and not exists (select from postroad_broker.lease l where l.holder = n.incarnation)",
        )
        .execute(connection),
    )
    .await?;
    Ok(())
}

/// Takes what can be taken of these leases, in one call. See the function in `migrations/broker`.
///
/// # Errors
/// The database's.
pub async fn take_leases(
    connection: &mut Connection,
    incarnation: i64,
    names: &[String],
) -> Result<Vec<Fence>, Error> {
    let taken: Vec<(String, i64)> = bounded(
        "taking leases",
        HEARTBEAT,
        sqlx::query_as("select lease_name, lease_epoch from postroad_broker.take_leases($1, $2)")
            .bind(incarnation)
            .bind(names)
            .fetch_all(connection),
    )
    .await?;
    Ok(taken
        .into_iter()
        .map(|(lease, epoch)| Fence {
            lease,
            epoch: Epoch(epoch),
        })
        .collect())
}

/// Gives leases back: free for the next taker, at whose taking the epoch rises.
///
/// # Errors
/// The database's.
pub async fn release_leases(
    connection: &mut Connection,
    incarnation: i64,
    names: &[String],
) -> Result<(), Error> {
    bounded(
        "releasing leases",
        HEARTBEAT,
        sqlx::query(
            "with locked as ( \
             select name from postroad_broker.lease where name = any ($2) and holder = $1 \
             order by name for no key update) \
         update postroad_broker.lease l set holder = null from locked where l.name = locked.name",
        )
        .bind(incarnation)
        .bind(names)
        .execute(connection),
    )
    .await?;
    Ok(())
}

/// Locks a lease's row in a transaction. Whether the fence is still its own: what is read or written after that is nobody else's before
/// the transaction ends.
pub(in crate::store) async fn lock_lease(
    transaction: &mut Connection,
    fence: &Fence,
) -> Result<bool, sqlx::Error> {
    let locking = sqlx::query_scalar(
        "select epoch from postroad_broker.lease where name = $1 for no key update",
    );
    let epoch: Option<i64> = locking
        .bind(&fence.lease)
        .fetch_optional(transaction)
        .await?;
    Ok(epoch == Some(fence.epoch.0))
}

/// Marks an incarnation dead: the orderly end of a process.
///
/// # Errors
/// The database's.
pub async fn mark_node_dead(connection: &mut Connection, incarnation: i64) -> Result<(), Error> {
    bounded(
        "ending the node",
        HEARTBEAT,
        sqlx::query(
            "update postroad_broker.node set dead_at = clock_timestamp() \
         where incarnation = $1 and dead_at is null",
        )
        .bind(incarnation)
        .execute(connection),
    )
    .await?;
    Ok(())
}
