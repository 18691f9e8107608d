//! One key that stands still with most of a stream behind it, and many keys that must not notice.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Consumers, peak_resident_mib, size};
use crate::support::{self, Http};

const PATIENCE: Duration = Duration::from_secs(900);

/// Seconds that consumers need for so many messages of a queue.
async fn consume(http: &Http, queue: &str, count: u64) -> f64 {
    let consumers = Consumers::start(http, queue, 4, 1_000);
    let started = Instant::now();
    consumers.wait_for(count, PATIENCE).await;
    let seconds = started.elapsed().as_secs_f64();
    let received = consumers.finish().await;
    assert_eq!(received.times.len() as u64, count);
    assert!(received.times.values().all(|&times| times == 1));
    seconds
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_keys_do_not_notice_one_that_stands_still() {
    let waiting = size("POSTROAD_SOAK_KEY_WAITING", 20_000);
    let others = size("POSTROAD_SOAK_KEY_OTHERS", 2_000);
    let count = others * 3;
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    let ordered = json!({"topics": ["keys.other"], "ordering": "key", "max_in_flight": 10_000});
    let behind = json!({"topics": ["keys.*"], "ordering": "key", "max_in_flight": 10_000});
    http.declare("/v1/queues/plain", &json!({"topics": ["keys.other"]}))
        .await;
    http.declare("/v1/queues/ordered", &ordered).await;
    http.declare("/v1/queues/behind", &behind).await;
    let mut connection = database.connect().await;
    for (topic, key, count) in [
        ("keys.hot", "'hot'", waiting),
        ("keys.other", "'k' || n % $2::bigint", count),
    ] {
        let statement = format!(
            "insert into postroad.outbox (topic, key, payload)
             select '{topic}', {key}, json_build_object('n', n, 'of', $2::bigint)::text from generate_series(1, $1) as n"
        );
        sqlx::query(sqlx::AssertSqlSafe(statement))
            .bind(i64::try_from(count).unwrap())
            .bind(i64::try_from(others).unwrap())
            .execute(&mut connection)
            .await
            .unwrap();
    }
    let all = waiting + count;
    let deadline = Instant::now() + PATIENCE;
    while http.get("/v1/streams/main").await.1["last_offset"].as_u64() != Some(all) {
        assert!(Instant::now() < deadline, "the relay is not through");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The blocker is held, and the queue looks at everything behind it.
    let held = http
        .ok(
            "/v1/queues/behind/receive",
            &json!({"max_messages": 1, "wait_seconds": 20, "visibility_timeout_seconds": 43_200}),
        )
        .await;
    assert_eq!(held["deliveries"][0]["offset"], 1, "{held}");
    while http.get("/v1/queues/behind").await.1["status"]["scanned_through"].as_u64() != Some(all) {
        assert!(Instant::now() < deadline, "the queue has not looked at all");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut seconds = Vec::new();
    for queue in ["plain", "ordered", "behind"] {
        seconds.push(consume(&http, queue, count).await);
    }
    let (_, described) = http.get("/v1/queues/behind").await;
    let status = &described["status"];
    assert_eq!(status["waiting"].as_u64(), Some(waiting - 1), "{status}");
    assert_eq!(status["blocked_keys"][0]["key"], "hot");
    let restarted = Instant::now();
    let peak = peak_resident_mib(program.pid());
    program.kill().await;
    program.start().await;
    let answer = http
        .ok(
            "/v1/queues/behind/receive",
            &json!({"wait_seconds": 20, "max_messages": 1}),
        )
        .await;
    assert_eq!(answer["reason"], "waiting_for_keys", "{answer}");
    let rate = |index: usize| count as f64 / seconds[index];
    println!(
        "{waiting} waiting of one key, {count} of {others} others: {:.0}/s unordered, {:.0}/s in order without that key, \
         {:.0}/s with it; {peak} MiB at most; after a kill it answers in {:.1} s, {} MiB",
        rate(0),
        rate(1),
        rate(2),
        restarted.elapsed().as_secs_f64(),
        peak_resident_mib(program.pid()),
    );
    program.kill().await;
}
