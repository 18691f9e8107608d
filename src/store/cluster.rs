//! Nodes, leases, and the identity of this broker.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::bounded::{HEARTBEAT, bounded};
use super::{Connection, Database, Error};
use crate::domain::id::{Epoch, Fence};

/// The identity of a broker, written once: all its nodes share it.
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

/// Registers a node: a new incarnation, at whose address all former ones are dead. Returns its number, the database's clock, and
/// what the last one wanted if nobody had taken it for dead.
///
/// # Errors
/// The database's.
pub async fn register_node(
    connection: &mut Connection,
    address: &str,
    url: &str,
    ttl_seconds: f64,
) -> Result<(i64, DateTime<Utc>, Vec<String>), Error> {
    bounded(
        "registering the node",
        HEARTBEAT,
        sqlx::query_as(
            "select new_incarnation, clock, former_wants from postroad_broker.register_node($1, $2, $3)",
        )
        .bind(address)
        .bind(url)
        .bind(ttl_seconds)
        .fetch_one(connection),
    )
    .await
}

/// The reason why commits of this user's sessions do not end, if the server shows one.
///
/// # Errors
/// The database's.
pub async fn why_no_commit(connection: &mut Connection) -> Result<Option<&'static str>, Error> {
    let waits: bool = bounded(
        "looking for commits that wait",
        HEARTBEAT,
        sqlx::query_scalar(
            "select exists (
                select from pg_catalog.pg_stat_activity a
                 where a.datname = current_database() and a.wait_event_type = 'IPC' and a.wait_event = 'SyncRep')",
        )
        .fetch_one(connection),
    )
    .await?;
    Ok(waits.then_some(
        "commits wait for a synchronous standby that is missing (synchronous_standby_names)",
    ))
}

/// The contents of a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sign<'a> {
    /// The node.
    pub incarnation: i64,
    /// How long it lives from now on, in milliseconds.
    pub ttl_millis: u64,
    /// The leases that it can hold.
    pub wants: &'a [String],
    /// It is about to end.
    pub is_leaving: bool,
    /// The heartbeat's number, from [`Database::next_beat`].
    pub beat: i64,
}

/// A node that nobody has marked dead.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeRow {
    /// Its number.
    pub incarnation: i64,
    /// Names the listening process.
    pub address: String,
    /// The URL at which other nodes reach it.
    pub url: String,
    /// The time when it began.
    pub started_at: DateTime<Utc>,
    /// The end of its time without a further heartbeat, by the database's clock.
    pub expires_at: DateTime<Utc>,
    /// How long it lives without one, in seconds.
    pub ttl_seconds: f64,
    /// The leases that it can hold.
    pub wants: Vec<String>,
    /// It is about to end.
    pub is_leaving: bool,
}

/// A lease as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRow {
    /// Its name.
    pub name: String,
    /// The epoch of its last taking.
    pub epoch: Epoch,
    /// The node that has it.
    pub holder: Option<i64>,
    /// The time when it was last taken.
    pub acquired_at: Option<DateTime<Utc>>,
}

/// The result of a heartbeat.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Whether the node lives on; a dead incarnation stays so.
    pub is_renewed: bool,
    /// The database's clock.
    pub clock: DateTime<Utc>,
    /// The version of the catalogue of queues.
    pub queues_version: i64,
    /// Nodes by number.
    pub nodes: Vec<NodeRow>,
    /// Leases by name.
    pub leases: Vec<LeaseRow>,
    /// The assignment of leases to nodes.
    pub assigned: Vec<(String, i64)>,
    /// Deliveries in a second out of each slot, about; empty when no node has said.
    pub loads: Vec<u64>,
}

/// Renews a node row and reads all nodes, leases and assignments, in one statement.
///
/// # Errors
/// The database's.
pub async fn beat(connection: &mut Connection, sign: Sign<'_>) -> Result<Seen, Error> {
    const DOING: &str = "renewing the node";
    let row = bounded(
        DOING,
        HEARTBEAT,
        sqlx::query(include_str!("sql/beat.sql"))
            .bind(sign.incarnation)
            .bind(Duration::from_millis(sign.ttl_millis).as_secs_f64())
            .bind(sign.wants)
            .bind(sign.is_leaving)
            .bind(sign.beat)
            .fetch_one(connection),
    )
    .await?;
    read_seen(&row).map_err(Error::query(DOING))
}

fn read_seen(row: &PgRow) -> Result<Seen, sqlx::Error> {
    let incarnations: Vec<i64> = row.try_get(3)?;
    let addresses: Vec<String> = row.try_get(4)?;
    let urls: Vec<String> = row.try_get(5)?;
    let started_ats: Vec<DateTime<Utc>> = row.try_get(6)?;
    let expires_ats: Vec<DateTime<Utc>> = row.try_get(7)?;
    let ttls: Vec<f64> = row.try_get(8)?;
    let wants: Vec<String> = row.try_get(9)?;
    let are_leaving: Vec<bool> = row.try_get(10)?;
    let names: Vec<String> = row.try_get(11)?;
    let epochs: Vec<i64> = row.try_get(12)?;
    let holders: Vec<Option<i64>> = row.try_get(13)?;
    let acquired_ats: Vec<Option<DateTime<Utc>>> = row.try_get(14)?;
    let assigned_names: Vec<String> = row.try_get(15)?;
    let assigned_nodes: Vec<i64> = row.try_get(16)?;
    let loads: Vec<String> = row.try_get(17)?;
    let nodes = incarnations
        .into_iter()
        .zip(addresses)
        .zip(urls)
        .zip(started_ats)
        .zip(expires_ats)
        .zip(ttls)
        .zip(wants)
        .zip(are_leaving);
    let nodes = nodes.map(
        |(((((((incarnation, address), url), started_at), expires_at), ttl), wants), leaving)| {
            NodeRow {
                incarnation,
                address,
                url,
                started_at,
                expires_at,
                ttl_seconds: ttl,
                wants: wants.split_whitespace().map(str::to_owned).collect(),
                is_leaving: leaving,
            }
        },
    );
    let leases = names
        .into_iter()
        .zip(epochs)
        .zip(holders)
        .zip(acquired_ats)
        .map(|(((name, epoch), holder), acquired_at)| LeaseRow {
            name,
            epoch: Epoch(epoch),
            holder,
            acquired_at,
        });
    Ok(Seen {
        is_renewed: row.try_get(0)?,
        clock: row.try_get(1)?,
        queues_version: row.try_get(2)?,
        nodes: nodes.collect(),
        leases: leases.collect(),
        assigned: assigned_names.into_iter().zip(assigned_nodes).collect(),
        loads: sum_loads(&loads),
    })
}

/// The loads of the slots, summed over all nodes.
fn sum_loads(nodes: &[String]) -> Vec<u64> {
    let mut sums: Vec<u64> = Vec::new();
    for node in nodes {
        let loads = node.split_whitespace();
        let loads = loads.map(|load| load.parse().unwrap_or_default());
        for (slot, load) in loads.enumerate() {
            match sums.get_mut(slot) {
                Some(sum) => *sum += load,
                None => sums.push(load),
            }
        }
    }
    sums
}

/// Reports the load of a node's slots, for the leader.
///
/// # Errors
/// The database's.
pub async fn note_loads(database: &Database, incarnation: i64, loads: &[i32]) -> Result<(), Error> {
    let noting =
        sqlx::query("update postroad_broker.node set slot_loads = $2 where incarnation = $1")
            .bind(incarnation)
            .bind(loads)
            .execute(database.pooled());
    noting
        .await
        .map_err(Error::query("noting the loads of slots"))?;
    Ok(())
}

/// Writes the assignment: `assigned`, and nobody for the leases in `gone`. `false`: the caller no longer leads, and nothing is
/// written.
///
/// # Errors
/// The database's.
pub async fn write_assignment(
    connection: &mut Connection,
    incarnation: i64,
    leader: &Fence,
    assigned: &[(String, i64)],
    gone: &[String],
) -> Result<bool, Error> {
    let names: Vec<&str> = assigned.iter().map(|(name, _)| name.as_str()).collect();
    let nodes: Vec<i64> = assigned.iter().map(|&(_, node)| node).collect();
    bounded(
        "writing the assignment",
        HEARTBEAT,
        sqlx::query_scalar("select postroad_broker.write_assignment($1, $2, $3, $4, $5)")
            .bind(incarnation)
            .bind(leader.epoch.0)
            .bind(names)
            .bind(nodes)
            .bind(gone)
            .fetch_one(connection),
    )
    .await
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

/// Takes what can be taken of these leases, in one call. See the function in `migrations/broker`. `silent`: nodes from which
/// the caller has not heard for their whole time to live, with what their rows said all the while.
///
/// # Errors
/// The database's.
pub async fn take_leases(
    connection: &mut Connection,
    incarnation: i64,
    names: &[String],
    silent: &[(i64, DateTime<Utc>)],
) -> Result<Vec<Fence>, Error> {
    let (silent, since): (Vec<i64>, Vec<DateTime<Utc>>) = silent.iter().copied().unzip();
    #[cfg(feature = "failpoints")]
    super::mutant::read_early(connection, names).await;
    let taken: Vec<(String, i64)> = bounded(
        "taking leases",
        HEARTBEAT,
        sqlx::query_as(
            "select lease_name, lease_epoch from postroad_broker.take_leases($1, $2, $3, $4)",
        )
        .bind(incarnation)
        .bind(names)
        .bind(silent)
        .bind(since)
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

/// Gives leases back: free for the next taker, at whose taking the epoch rises. Gives those that it still holds, since a write
/// under way has their rows locked: nobody's heartbeat waits for that.
///
/// # Errors
/// The database's.
pub async fn release_leases(
    connection: &mut Connection,
    incarnation: i64,
    names: &[String],
) -> Result<Vec<String>, Error> {
    bounded(
        "releasing leases",
        HEARTBEAT,
        sqlx::query_scalar(
            "with locked as ( \
             select name from postroad_broker.lease where name = any ($2) and holder = $1 \
             order by name for no key update skip locked), \
         released as ( \
             update postroad_broker.lease l set holder = null from locked where l.name = locked.name \
             returning l.name) \
         select l.name from postroad_broker.lease l \
         where l.name = any ($2) and l.holder = $1 and l.name not in (select r.name from released r)",
        )
        .bind(incarnation)
        .bind(names)
        .fetch_all(connection),
    )
    .await
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
