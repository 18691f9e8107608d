//! A backlog whose dependency is down: each message is given back again and again with a long reason and waits for its retry. Another queue
//! must not feel it, and what is kept of it has a bound. `POSTROAD_SOAK_REASONS` sets how many messages there are; 200,000 is as many as a
//! queue has in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::size;
use crate::support::consumer::{items, publish};
use crate::support::process::{peak_resident_bytes, resident_bytes};
use crate::support::{self, Consumer, Http, Program};

const ROUNDS: usize = 5;
const AT_ONCE: usize = 1_000;

/// Rounds of another queue until it is told to end: a message published, received and acknowledged.
async fn watch(http: Http, is_over: Arc<AtomicBool>) -> Vec<Duration> {
    let other = Consumer::declare(&http, "other", &json!({"topics": ["other.>"]})).await;
    let mut rounds = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let began = Instant::now();
        publish(&http, "other.a", 1).await;
        let taken = other.take(1, 60).await;
        other
            .settle_all("ack", &items(&taken, &json!({})), "acked")
            .await;
        rounds.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    rounds.sort_unstable();
    rounds
}

/// A text that nothing compresses much.
fn reason() -> String {
    let parts = (0..31).map(|_| uuid::Uuid::new_v4().simple().to_string());
    parts.collect()
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn resident(program: &Program) -> (u64, u64) {
    let pid = program.pid();
    (mib(resident_bytes(pid)), mib(peak_resident_bytes(pid)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_long_reasons_is_kept_within_bounds() {
    let count = usize::try_from(size("POSTROAD_SOAK_REASONS", 3_000)).unwrap();
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    let failing = json!({
        "topics": ["failing.>"], "max_attempts": 1_000, "max_in_flight": 10_000,
        "visibility_timeout_seconds": 43_200
    });
    let failing = Consumer::declare(&http, "failing", &failing).await;
    for _ in 0..count.div_ceil(AT_ONCE) {
        publish(&http, "failing.a", AT_ONCE).await;
    }
    let is_over = Arc::new(AtomicBool::new(false));
    let watched = tokio::spawn(watch(http.clone(), Arc::clone(&is_over)));
    let before = resident(&program);
    for round in 1..=ROUNDS {
        let mut left = count.next_multiple_of(AT_ONCE);
        while left > 0 {
            let taken = failing.take(AT_ONCE.min(left), 43_200).await;
            left -= taken.len();
            // All of a round wait until its end, and the last ones for long.
            let delay = if round < ROUNDS { 1 } else { 43_200 };
            let nack = json!({"delay_seconds": delay, "reason": reason()});
            failing
                .settle_all("nack", &items(&taken, &nack), "nacked")
                .await;
        }
    }
    support::eventually("a turn of the journal that leaves nothing behind", || async {
        let (turn, left): (i64, i64) = sqlx::query_as(
            "select t.turn, (select count(*) from postroad_broker.queue_journal j where j.segment <> t.turn % 4) \
             from postroad_broker.queue_journal_turn t",
        )
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap();
        (count < 10_000 || turn > 0 && left == 0).then_some(())
    })
    .await;
    is_over.store(true, Ordering::Relaxed);
    let rounds = watched.await.unwrap();
    let p99 = rounds[rounds.len() * 99 / 100];
    let (chunks, bytes, largest): (i64, i64, i64) = sqlx::query_as(
        "select count(*), coalesce(sum(octet_length(data)), 0)::bigint, coalesce(max(octet_length(data)), 0)::bigint \
         from postroad_broker.queue_checkpoint_chunk",
    )
    .fetch_one(&mut database.connect().await)
    .await
    .unwrap();
    println!(
        "{count} messages, {ROUNDS} reasons each: the other queue's {} rounds p99 {p99:?}, longest {:?}; MiB resident before {before:?}, now {:?}; \
         {chunks} chunks of {bytes} bytes in all",
        rounds.len(),
        rounds.last(),
        resident(&program),
    );
    assert!(bytes < 64 << 20, "{bytes} bytes of chunks");
    assert!(largest < 512 << 10, "a chunk of {largest} bytes");
    program.kill().await;
    let began = Instant::now();
    program.start().await;
    let failing = Consumer {
        http: program.http.clone(),
        queue: "failing".to_owned(),
    };
    let status = failing.status().await;
    println!(
        "answers {:?} after a kill, MiB resident {:?}",
        began.elapsed(),
        resident(&program)
    );
    assert_eq!(
        status["delayed"],
        count.next_multiple_of(AT_ONCE),
        "{status}"
    );
    program.stop().await;
}
