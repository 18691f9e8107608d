//! Producers that write a business row, a ledger row and a message in one transaction, under the key's row lock, with everything
//! that transactions do: rollbacks, savepoints beyond what a backend caches, late commits.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinHandle;

use super::{Origin, connect, execute};
use crate::history::log::{Fate, Sent, Transaction};

/// The keys are few and hot.
pub const KEYS: i64 = 5;

/// The tables of the business, with the rights that the producers need on them.
pub async fn open(origin: &Origin) {
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        "create table item (key text primary key, version bigint not null default 0);
        create table ledger (id text primary key, key text, version bigint);
        insert into item (key) select 'k' || n from generate_series(1, 5) as n;
        grant select, insert, update on item, ledger to shop_producer;",
    )
    .await;
}

/// The same origin, whose producers' messages are all due at one time from now.
pub async fn later(origin: &Origin, ahead: &str) -> Origin {
    let text = format!(
        "create table due (at timestamptz not null); grant select on due to shop_producer;
        insert into due values (now() + interval '{ahead}')"
    );
    execute(&mut origin.owner().await, &text).await;
    Origin {
        layout: Layout::Later,
        ..origin.clone()
    }
}

/// One producer's random choices, from a seed.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// What the producers insert into: the outbox, or a table that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Own,
    /// The outbox, each message due at the time in the table `due`.
    Later,
    Debezium,
    Numbered,
}

impl Layout {
    /// Inserts a message of the key's version, and returns its id.
    const fn sold(self) -> &'static str {
        match self {
            Self::Own => {
                "insert into postroad.outbox (topic, key, payload)
                select 'orders.sold', key, json_build_object('version', version)::text from item where key = 'k' || $1::bigint
                returning id"
            }
            Self::Later => {
                "insert into postroad.outbox (topic, key, payload, deliver_at)
                select 'orders.sold', key, json_build_object('version', version)::text, due.at from item, due where key = 'k' || $1::bigint
                returning id"
            }
            Self::Debezium => {
                "insert into outboxevent (id, aggregatetype, aggregateid, type, payload)
                select gen_random_uuid(), 'item', key, 'sold', jsonb_build_object('version', version) from item where key = 'k' || $1::bigint
                returning id::text"
            }
            Self::Numbered => {
                "insert into shop.events (kind, sku, body)
                select 'sold', key, json_build_object('version', version) from item where key = 'k' || $1::bigint
                returning event_id::text"
            }
        }
    }

    /// Inserts a message without a version, and returns its id.
    const fn noted(self) -> &'static str {
        match self {
            Self::Own => {
                "insert into postroad.outbox (topic, payload_bytes) values ('orders.noted', '\\x00ff') returning id"
            }
            Self::Later => {
                "insert into postroad.outbox (topic, payload_bytes, deliver_at) select 'orders.noted', '\\x00ff', at from due returning id"
            }
            Self::Debezium => {
                "insert into outboxevent (id, aggregatetype, aggregateid, type)
                values (gen_random_uuid(), 'note', 'n', 'noted') returning id::text"
            }
            Self::Numbered => {
                "insert into shop.events (kind) values ('noted') returning event_id::text"
            }
        }
    }
}

/// A version of a key: the row lock first, then the message.
pub async fn sell(connection: &mut PgConnection, key: i64) -> Result<Sent, sqlx::Error> {
    sell_in(Layout::Own, connection, key).await
}

pub async fn sell_in(
    layout: Layout,
    connection: &mut PgConnection,
    key: i64,
) -> Result<Sent, sqlx::Error> {
    sqlx::query(
        "with locked as (update item set version = version + 1 where key = 'k' || $1::bigint returning key, version)
        select from locked",
    )
    .bind(key)
    .execute(&mut *connection)
    .await?;
    let text = format!(
        "with message (id) as ({})
        insert into ledger (id, key, version) select message.id, item.key, item.version from message, item where item.key = 'k' || $1::bigint
        returning id, key, version",
        layout.sold()
    );
    let selling = sqlx::query_as(sqlx::AssertSqlSafe(text)).bind(key);
    let (id, key, version): (String, String, i64) = selling.fetch_one(&mut *connection).await?;
    Ok(Sent {
        id,
        version: Some((key, version.unsigned_abs())),
        offset: None,
    })
}

/// A message without a key: no lock stands in the way of its commit order.
pub async fn note(connection: &mut PgConnection) -> Result<Sent, sqlx::Error> {
    note_in(Layout::Own, connection).await
}

pub async fn note_in(layout: Layout, connection: &mut PgConnection) -> Result<Sent, sqlx::Error> {
    let text = format!(
        "with message (id) as ({}) insert into ledger (id) select id from message returning id",
        layout.noted()
    );
    let noting = sqlx::query_as(sqlx::AssertSqlSafe(text));
    let (id,): (String,) = noting.fetch_one(connection).await?;
    Ok(Sent {
        id,
        version: None,
        offset: None,
    })
}

/// One transaction of a producer, whichever it rolls. What it was told of it goes into the history, also when it fails.
async fn transact(
    layout: Layout,
    connection: &mut PgConnection,
    dice: &mut Dice,
    history: &mut Vec<Transaction>,
) -> Result<(), sqlx::Error> {
    let (mut sent, mut fate) = (Vec::new(), Fate::Failed);
    let work = write(layout, connection, dice, &mut sent, &mut fate, history).await;
    history.push(Transaction { fate, sent });
    work
}

/// Sets the fate to unknown while the commit is under way.
async fn write(
    layout: Layout,
    connection: &mut PgConnection,
    dice: &mut Dice,
    sent: &mut Vec<Sent>,
    fate: &mut Fate,
    history: &mut Vec<Transaction>,
) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let kind = dice.roll(40);
    if kind == 0 {
        // More subtransactions than a backend lists in shared memory (64), each with rows of its own.
        for _ in 0..70 {
            let mut savepoint = transaction.begin().await?;
            sent.push(note_in(layout, &mut savepoint).await?);
            savepoint.commit().await?;
        }
    }
    if kind < 8 {
        sent.push(note_in(layout, &mut transaction).await?);
        // Late: others overtake it.
        tokio::time::sleep(Duration::from_millis(dice.roll(20))).await;
    }
    let mut savepoint = transaction.begin().await?;
    let sold = sell_in(layout, &mut savepoint, 1 + dice.roll(KEYS as u64) as i64).await?;
    if dice.roll(6) == 0 {
        let (fate, sent) = (Fate::Failed, vec![sold]);
        history.push(Transaction { fate, sent });
        savepoint.rollback().await?;
    } else {
        sent.push(sold);
        savepoint.commit().await?;
    }
    if dice.roll(6) == 0 {
        return transaction.rollback().await;
    }
    *fate = Fate::Unknown;
    transaction.commit().await?;
    *fate = Fate::Committed;
    Ok(())
}

/// Producers at work until told to stop. They reconnect when the server restarts under them.
pub struct Producers {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Vec<Transaction>>>,
}

impl Producers {
    pub fn start(origin: &Origin, count: u64, settings: &'static str) -> Self {
        Self::start_slow(origin, count, settings, 0, Arc::default())
    }

    /// Producers that roll by a seed, and rest for so many milliseconds between two transactions.
    pub fn start_slow(
        origin: &Origin,
        count: u64,
        settings: &'static str,
        seed: u64,
        rest: Arc<AtomicU64>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let layout = origin.layout;
        let tasks = (0..count).map(|number| {
            let url = origin.producer_url();
            let (stop, rest) = (Arc::clone(&stop), Arc::clone(&rest));
            tokio::spawn(async move {
                let mut dice = Dice::new(seed.wrapping_add(number + 1));
                let mut history = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut connection) = PgConnection::connect(&url).await else {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                        continue;
                    };
                    if sqlx::raw_sql(settings)
                        .execute(&mut connection)
                        .await
                        .is_err()
                    {
                        continue;
                    }
                    while !stop.load(Ordering::Relaxed) {
                        let transaction =
                            transact(layout, &mut connection, &mut dice, &mut history);
                        if transaction.await.is_err() {
                            break;
                        }
                        let millis = rest.load(Ordering::Relaxed);
                        if millis > 0 {
                            tokio::time::sleep(Duration::from_millis(millis)).await;
                        }
                    }
                }
                history
            })
        });
        Self {
            tasks: tasks.collect(),
            stop,
        }
    }

    /// Gives what they did and were told of it.
    pub async fn finish(self) -> Vec<Transaction> {
        self.stop.store(true, Ordering::Relaxed);
        let mut history = Vec::new();
        for task in self.tasks {
            history.extend(task.await.unwrap());
        }
        history
    }
}

/// What committed, from the ledger, and that every key is at the version of its last message.
pub async fn committed(origin: &Origin) -> HashSet<String> {
    let mut connection = connect(&origin.url).await;
    let mismatched: i64 = sqlx::query_scalar(
        "select count(*) from item where version <> (select count(*) from ledger where ledger.key = item.key)",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!(mismatched, 0, "the producers' own tables agree");
    sqlx::query_scalar("select id from ledger")
        .fetch_all(&mut connection)
        .await
        .unwrap()
        .into_iter()
        .collect()
}
