//! A pinned xmin is how other queues on Postgres die: dead rows that no vacuum may take make every statement slower. Here a
//! reader with an old snapshot, and then a writing transaction, stay open during the load, on tables aged beforehand.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use super::{Consumers, Received, quantile, size};
use crate::support;

/// Updates that a table would see from 20,000 heartbeats, and as many that its checkpoints would.
const AGE_UPDATES: u64 = 20_000;

async fn produce(url: String, per_second: u64, seconds: u64, first: u64) -> u64 {
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let per_tick = (per_second / 100).max(1);
    let mut n = first;
    for _ in 0..seconds * 100 {
        tick.tick().await;
        sqlx::query(
            "insert into postroad.outbox (topic, payload)
             select 'held.load', json_build_object('n', n, 'at', extract(epoch from clock_timestamp()))::text
             from generate_series($1::bigint, $1 + $2 - 1) as n",
        )
        .bind(i64::try_from(n).unwrap())
        .bind(i64::try_from(per_tick).unwrap())
        .execute(&mut connection)
        .await
        .unwrap();
        n += per_tick;
    }
    n - first
}

/// Ages what is updated in place: the rows that heartbeats and checkpoints write.
async fn age(connection: &mut PgConnection, updates: u64) {
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "do $$ begin for i in 1..{updates} loop
             update postroad_broker.node set expires_at = expires_at where dead_at is null;
             update postroad_broker.queue_checkpoint set state = state;
             commit;
         end loop; end $$"
    )))
    .execute(connection)
    .await
    .unwrap();
}

/// Dead rows of all tables of ours, and their size in bytes.
async fn dead_rows(connection: &mut PgConnection) -> Vec<(String, i64, i64)> {
    sqlx::query("select pg_stat_force_next_flush()")
        .execute(&mut *connection)
        .await
        .unwrap();
    sqlx::query_as(
        "select relid::regclass::text, n_dead_tup, pg_total_relation_size(relid)
         from pg_stat_all_tables where schemaname in ('postroad', 'postroad_broker') order by 1",
    )
    .fetch_all(connection)
    .await
    .unwrap()
}

/// A stretch of the run in words: messages per second, and the latency's p50 and p99.
fn stretch(received: &Received, from: Instant, to: Instant) -> String {
    let count: usize = received
        .batches
        .iter()
        .filter(|(at, _)| (from..to).contains(at))
        .map(|(_, count)| count)
        .sum();
    let mut latencies: Vec<f64> = received
        .latencies
        .iter()
        .filter(|(at, _)| (from..to).contains(at))
        .map(|(_, latency)| *latency)
        .collect();
    format!(
        "{:.0}/s, p50 {:.1} ms, p99 {:.1} ms",
        count as f64 / (to - from).as_secs_f64(),
        quantile(&mut latencies, 0.5) * 1e3,
        quantile(&mut latencies, 0.99) * 1e3,
    )
}

#[derive(Clone, Copy, Debug)]
enum Held {
    /// What the other two are compared with.
    Nothing,
    Reader,
    Writer,
}

async fn load_with(held: Held) {
    let seconds = size("POSTROAD_SOAK_HELD_SECONDS", 6);
    let per_second = size("POSTROAD_SOAK_HELD_RATE", 1_000);
    let updates = size("POSTROAD_SOAK_AGE", AGE_UPDATES / 10);
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    http.declare("/v1/queues/held", &json!({"topics": ["held.*"]}))
        .await;
    let mut connection = database.connect().await;
    age(&mut connection, updates).await;

    let mut other = database.connect().await;
    let hold = match held {
        Held::Nothing => "select",
        Held::Reader => {
            "begin isolation level repeatable read; select count(*) from postroad.outbox; select count(*) from postroad_broker.message"
        }
        Held::Writer => {
            "begin; insert into postroad.outbox (topic, payload) values ('held.load', '{\"n\": 0}')"
        }
    };
    sqlx::raw_sql(hold).execute(&mut other).await.unwrap();
    let before = dead_rows(&mut connection).await;

    let consumers = Consumers::start(&http, "held", 4, 100);
    let started = Instant::now();
    let produced = produce(database.url.clone(), per_second, seconds, 1).await;
    let ended = Instant::now();
    consumers.wait_for(produced, Duration::from_secs(60)).await;
    let after = dead_rows(&mut connection).await;
    if matches!(held, Held::Writer) {
        sqlx::query("commit").execute(&mut other).await.unwrap();
        consumers
            .wait_for(produced + 1, Duration::from_secs(60))
            .await;
    }
    let received = consumers.finish().await;
    let expected = produced + u64::from(matches!(held, Held::Writer));
    assert_eq!(received.times.len() as u64, expected);
    assert!(received.times.values().all(|&times| times == 1));

    let part = Duration::from_secs((seconds / 6).clamp(1, 10));
    println!(
        "{held:?} held, {seconds} s at {per_second}/s: first {part:?} {}; last {}; in all {}",
        stretch(&received, started, started + part),
        stretch(&received, ended - part, ended),
        stretch(&received, started, ended),
    );
    for (table, dead, bytes) in &after {
        let old = before.iter().find(|(name, ..)| name == table);
        let (old_dead, old_bytes) = old.map_or((0, 0), |(_, dead, bytes)| (*dead, *bytes));
        if *dead > old_dead {
            println!(
                "  {table}: {} dead rows, {} bytes more",
                dead - old_dead,
                bytes - old_bytes
            );
        }
        // One update per heartbeat and second is allowed for; one per group commit is not.
        let allowed = 50 + 10 * i64::try_from(seconds).unwrap();
        assert!(
            dead - old_dead <= allowed,
            "{table} grew by {} dead rows in {seconds} s",
            dead - old_dead
        );
    }
    if matches!(held, Held::Reader) {
        sqlx::query("rollback").execute(&mut other).await.unwrap();
    }
    let (_, queue) = http.get("/v1/queues/held").await;
    assert_eq!(queue["status"]["depth"], Value::from(0), "{queue}");
    assert!(program.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_alone_leaves_no_dead_rows_either() {
    load_with(Held::Nothing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_with_an_old_snapshot_leaves_no_dead_rows_behind_the_load() {
    load_with(Held::Reader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writing_transaction_left_open_holds_up_only_its_own_message() {
    load_with(Held::Writer).await;
}
