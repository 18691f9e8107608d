//! One message stuck at the start of a long stream: the queue must not feel it, neither in memory nor in time per message.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Consumers, relayed, size};
use crate::support::consumer::items;
use crate::support::process::{cpu_time, peak_resident_bytes, resident_bytes};
use crate::support::{self, Consumer, Http, Program, TestDatabase};

const PATIENCE: Duration = Duration::from_secs(900);
const HOURS: u32 = 43_200;

/// How a queue consumed the stream.
#[derive(Debug)]
#[expect(dead_code, reason = "most of it is printed, not judged")]
struct Run {
    first_half: Duration,
    second_half: Duration,
    cpu: Duration,
    resident: u64,
    peak: u64,
    /// Bytes of the queue's checkpoint and of its rows in the journal.
    stored: (i64, i64),
}

async fn stored(database: &TestDatabase) -> (i64, i64) {
    sqlx::query_as(
        "select (select coalesce(max(octet_length(state)), 0)::bigint from postroad_broker.queue_checkpoint),
            (select coalesce(sum(octet_length(entries)), 0)::bigint from postroad_broker.queue_journal)",
    )
    .fetch_one(&mut database.connect().await)
    .await
    .unwrap()
}

/// Fills the outbox in transactions of 100,000 and waits until all is in the stream.
async fn fill(database: &TestDatabase, program: &Program, topic: &str, count: u64) {
    let mut connection = database.connect().await;
    for first in (1..=count).step_by(100_000) {
        sqlx::query(
            "insert into postroad.outbox (topic, payload)
             select $3, '{\"n\": ' || n || ', \"text\": \"' || repeat('x', 200) || '\"}'
             from generate_series($1::bigint, $2::bigint) as n",
        )
        .bind(i64::try_from(first).unwrap())
        .bind(i64::try_from(count.min(first + 99_999)).unwrap())
        .bind(topic)
        .execute(&mut connection)
        .await
        .unwrap();
        relayed(program, PATIENCE).await;
    }
}

/// A broker of its own, on a stream of its own: two runs of one process would share what the allocator keeps.
async fn run(count: u64, is_stuck: bool) -> Run {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http: Http = program.http.clone();
    let queue = Consumer::declare(&http, "all", &json!({"topics": ["bulk.>"]})).await;
    fill(&database, &program, "bulk.common", count).await;
    let mut stuck = Vec::new();
    if is_stuck {
        stuck = queue.take(1, HOURS).await;
        assert_eq!(stuck[0]["offset"], 1);
    }
    let rest = count - stuck.len() as u64;
    let cpu = cpu_time(program.pid());
    let began = Instant::now();
    let consumers = Consumers::start(&http, "all", 4, 1_000);
    consumers.wait_for(rest / 2, PATIENCE).await;
    let first_half = began.elapsed();
    consumers.wait_for(rest, PATIENCE).await;
    let second_half = began.elapsed() - first_half;
    let received = consumers.finish().await;
    assert_eq!(received.times.len() as u64, rest);
    let run = Run {
        first_half,
        second_half,
        cpu: cpu_time(program.pid()) - cpu,
        resident: resident_bytes(program.pid()),
        peak: peak_resident_bytes(program.pid()),
        stored: stored(&database).await,
    };
    let status = queue.status().await;
    assert_eq!(status["depth"], stuck.len(), "{status}");

    // It comes back with all of it.
    program.kill().await;
    let began = Instant::now();
    program.start().await;
    let status = queue.status().await;
    assert_eq!(
        (&status["depth"], &status["in_flight"]),
        (&json!(stuck.len()), &json!(stuck.len()))
    );
    println!("  recovered in {:?}", began.elapsed());
    if !stuck.is_empty() {
        queue
            .settle_all("ack", &items(&stuck, &json!({})), "acked")
            .await;
        let status = queue.status().await;
        assert_eq!(status["depth"], 0, "{status}");
    }
    run
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_stuck_at_the_start_costs_the_others_nothing() {
    let count = size("POSTROAD_SOAK_STUCK", 20_000);
    let free = run(count, false).await;
    println!("{count} messages with nothing stuck: {free:?}");
    let stuck = run(count, true).await;
    println!("{count} messages with the first one stuck: {stuck:?}");
    // What is stored of the queue is of what is unsettled, not of what was settled beyond it.
    assert!(
        stuck.stored.0 < free.stored.0 + 4_096,
        "the checkpoint grew: {} bytes",
        stuck.stored.0
    );
    assert!(
        stuck.peak < free.peak + free.peak / 4,
        "{} MiB with, {} MiB without",
        stuck.peak >> 20,
        free.peak >> 20
    );
}
