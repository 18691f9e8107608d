//! A large backlog through the whole path, and a queue that wants almost nothing of a long stream.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Consumers, peak_resident_mib, size};
use crate::support::{self, Http};

/// What the issue allows the broker for a backlog of 1,000,000 messages of 256 bytes.
const RESIDENT_MAX_MIB: u64 = 200;
const PATIENCE: Duration = Duration::from_secs(300);

async fn wait_for_offset(http: &Http, offset: u64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, stream) = http.get("/v1/streams/main").await;
        if stream["last_offset"].as_u64() == Some(offset) {
            return;
        }
        assert!(Instant::now() < deadline, "{offset} not reached: {stream}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Reads what a queue has to give, without waiting for more, and acknowledges it.
async fn drain(http: &Http, queue: &str, count: usize) -> Vec<Value> {
    let mut found = Vec::new();
    while found.len() < count {
        let answer = http
            .ok(
                &format!("/v1/queues/{queue}/receive"),
                &json!({"max_messages": 1000, "wait_seconds": 10}),
            )
            .await;
        let deliveries = answer["deliveries"].as_array().unwrap().clone();
        assert!(!deliveries.is_empty(), "{} of {count} came", found.len());
        let receipts: Vec<Value> = deliveries
            .iter()
            .map(|delivery| json!({"receipt": delivery["receipt"]}))
            .collect();
        http.ok(
            &format!("/v1/queues/{queue}/ack"),
            &json!({"deliveries": receipts}),
        )
        .await;
        found.extend(deliveries);
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_relayed_and_consumed_in_bounded_memory() {
    let count = size("POSTROAD_SOAK_BACKLOG", 30_000);
    let rare_every = count / 100;
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    http.declare("/v1/queues/all", &json!({"topics": ["bulk.>"]}))
        .await;
    program.kill().await;

    // One transaction: all of it becomes visible at once, as after an import. 256 bytes of payload.
    let mut connection = database.connect().await;
    sqlx::query(
        "insert into postroad.outbox (topic, payload)
         select case when n % $2 = 0 then 'bulk.rare' else 'bulk.common' end,
            '{\"n\": ' || n || ', \"text\": \"' || repeat('x', 236 - length(n::text)) || '\"}'
         from generate_series(1, $1) as n",
    )
    .bind(i64::try_from(count).unwrap())
    .bind(i64::try_from(rare_every).unwrap())
    .execute(&mut connection)
    .await
    .unwrap();

    let started = Instant::now();
    program.start().await;
    let consumers = Consumers::start(&http, "all", 4, 1000);
    wait_for_offset(&http, count).await;
    let relayed = started.elapsed();
    consumers.wait_for(count, PATIENCE).await;
    let consumed = started.elapsed();
    let received = consumers.finish().await;
    assert_eq!(received.times.len() as u64, count);
    assert!(received.times.values().all(|&times| times == 1));
    let resident = peak_resident_mib(program.pid());
    println!(
        "backlog of {count}: relayed in {relayed:?} ({:.0}/s), consumed in {consumed:?} ({:.0}/s), broker's peak {resident} MiB",
        count as f64 / relayed.as_secs_f64(),
        count as f64 / consumed.as_secs_f64(),
    );
    assert!(resident < RESIDENT_MAX_MIB, "{resident} MiB");

    // A queue from the start of the stream that wants one message in rare_every.
    let wanted = (count / rare_every) as usize;
    let asked = Instant::now();
    http.declare(
        "/v1/queues/rare",
        &json!({"topics": ["bulk.rare"], "start": "earliest"}),
    )
    .await;
    let found = drain(&http, "rare", wanted).await;
    println!("a new queue: {wanted} of {count} in {:?}", asked.elapsed());
    let numbers: Vec<u64> = found
        .iter()
        .map(|delivery| delivery["event"]["data"]["n"].as_u64().unwrap())
        .collect();
    let expected: Vec<u64> = (1..=count).filter(|n| n % rare_every == 0).collect();
    assert_eq!(numbers, expected);

    program.kill().await;
    let asked = Instant::now();
    program.start().await;
    let ready = asked.elapsed();
    let (_, empty) = http
        .post("/v1/queues/rare/receive", &json!({"wait_seconds": 0}))
        .await;
    assert_eq!(empty["deliveries"], json!([]), "{empty}");
    println!(
        "after a restart (ready in {ready:?}) it answers in {:?}, broker's peak {} MiB",
        asked.elapsed() - ready,
        peak_resident_mib(program.pid())
    );
    assert!(program.stop().await.success());
}
