//! One key that stands still with most of a stream behind it, and many keys that must not notice.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Consumers, peak_resident_mib, quantile, relayed, size};
use crate::support::process::cpu_time;
use crate::support::{self, Consumer, Http, Program, TestDatabase};

const PATIENCE: Duration = Duration::from_secs(900);
/// With less waiting than this, memory is that of any process.
const MEASURED_FROM: u64 = 1_000_000;
const RESIDENT_MAX_MIB: u64 = 250;

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

/// Inserts so many messages of so many keys, and waits until they are in the stream.
async fn fill(
    database: &TestDatabase,
    program: &Program,
    (topic, prefix): (&str, &str),
    (count, keys): (u64, u64),
) {
    let statement = "insert into postroad.outbox (topic, key, payload)
        select $1, $2 || n % $4::bigint, json_build_object('n', n)::text from generate_series(1, $3::bigint) as n";
    sqlx::query(statement)
        .bind(topic)
        .bind(prefix)
        .bind(i64::try_from(count).unwrap())
        .bind(i64::try_from(keys).unwrap())
        .execute(&mut database.connect().await)
        .await
        .unwrap();
    relayed(program, PATIENCE).await;
}

async fn looked_at_all(queues: &[&Consumer], offset: u64) {
    let deadline = Instant::now() + PATIENCE;
    for queue in queues {
        while queue.status().await["scanned_through"] != offset {
            assert!(Instant::now() < deadline, "a queue has not looked at all");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Rates of each queue, a round each: in turns, and each goes first in as many rounds as another. All have the same
/// messages, and the ordered ones have looked at them before anyone begins; the other keeps fewer offsets in memory and
/// looks at the rest as it goes.
async fn rounds(
    (database, program): (&TestDatabase, &Program),
    queues: [&Consumer; 3],
    (others, waiting): (u64, u64),
) -> Vec<[f64; 3]> {
    let count = others * 3;
    let mut rates = Vec::new();
    for round in 0..size("POSTROAD_SOAK_KEY_ROUNDS", 1) {
        let (topic, keys) = (("keys.other", "k"), (count, others));
        fill(database, program, topic, keys).await;
        looked_at_all(&queues[1..], waiting + count * (round + 1)).await;
        let mut rate = [0.0; 3];
        let first = usize::try_from(round).unwrap() % queues.len();
        for place in (0..queues.len()).map(|turn| (first + turn) % queues.len()) {
            rate[place] = count as f64 / consume(&program.http, &queues[place].queue, count).await;
        }
        rates.push(rate);
    }
    rates
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_keys_do_not_notice_one_that_stands_still() {
    let waiting = size("POSTROAD_SOAK_KEY_WAITING", 20_000);
    let others = size("POSTROAD_SOAK_KEY_OTHERS", 2_000);
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    let ordered = json!({"topics": ["keys.other"], "ordering": "key", "max_in_flight": 10_000});
    let behind = json!({"topics": ["keys.*"], "ordering": "key", "max_in_flight": 10_000});
    let plain = Consumer::declare(&http, "plain", &json!({"topics": ["keys.other"]})).await;
    let ordered = Consumer::declare(&http, "ordered", &ordered).await;
    let behind = Consumer::declare(&http, "behind", &behind).await;
    fill(&database, &program, ("keys.hot", "hot"), (waiting, 1)).await;
    // The blocker is held, and the queue looks at everything behind it.
    let held = behind.take(1, 43_200).await;
    assert_eq!(held[0]["offset"], 1, "{held:?}");
    looked_at_all(&[&behind], waiting).await;
    let of = (&database, &program);
    let rates = rounds(of, [&plain, &ordered, &behind], (others, waiting)).await;
    let status = behind.status().await;
    assert_eq!(status["waiting"].as_u64(), Some(waiting - 1), "{status}");
    let (_, described) = http.get("/v1/queues/behind").await;
    let blocked = &described["status"]["blocked_keys"];
    assert_eq!(blocked[0]["key"], "hot0", "{blocked}");

    let peak = peak_resident_mib(program.pid());
    program.kill().await;
    let killed = Instant::now();
    program.start().await;
    let started = killed.elapsed();
    let answer = behind.receive(&json!({"wait_seconds": 0})).await;
    assert_eq!(answer["reason"], "waiting_for_keys", "{answer}");
    let answered = killed.elapsed();
    let cpu = cpu_time(program.pid());
    let peak_after = peak_resident_mib(program.pid());
    println!(
        "after a kill: ready in {started:.1?}, and it answers in {answered:.1?}, for {cpu:.1?} of its processor time, {peak_after} MiB"
    );
    let median = |of: fn(&[f64; 3]) -> f64| {
        let mut values: Vec<f64> = rates.iter().map(of).collect();
        quantile(&mut values, 0.5)
    };
    println!(
        "{waiting} waiting of one key, {} of {others} others, median of {} rounds: {:.0}/s unordered, {:.0}/s in order \
         without that key, {:.0}/s with it, {:.1} % of it in the median; {peak} MiB at most; rounds: {rates:.0?}",
        others * 3,
        rates.len(),
        median(|rate| rate[0]),
        median(|rate| rate[1]),
        median(|rate| rate[2]),
        100.0 * median(|rate| rate[2] / rate[1]),
    );
    if waiting >= MEASURED_FROM {
        assert!(peak.max(peak_after) < RESIDENT_MAX_MIB);
    }
    program.kill().await;
}
