//! What a queue promises, through the real program that is killed with -9 and started again at random: consumers do at random
//! whatever they may, and a checker that knows only the promises judges what they were told.
//!
//! Prints its seed. POSTROAD_TEST_SEED repeats what the consumers do, if not what they meet; POSTROAD_TEST_RANDOM_SECONDS sets
//! the length.

mod checker;
mod history;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use self::checker::Rules;
use self::history::{History, Letter, Published, Recorder};
use self::worker::{Dice, Worker};
use super::size;
use crate::support::consumer::publish_events;
use crate::support::{self, Http, TestDatabase};

const WORKERS: u64 = 5;
const QUEUE: &str = "billing";
const KEYS: usize = 8;

fn seed() -> u64 {
    let given = std::env::var("POSTROAD_TEST_SEED").ok();
    given
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0)
}

/// Publishes a few messages now and then, some with a key.
async fn produce(http: Http, recorder: Arc<Recorder>, mut dice: Dice, is_over: Arc<AtomicBool>) {
    let mut number = 0;
    while !is_over.load(Ordering::Relaxed) {
        let mut keys = Vec::new();
        let events: Vec<Value> = (0..=dice.below(6))
            .map(|_| {
                number += 1;
                let mut event = json!({
                    "specversion": "1.0", "id": format!("m-{number}"), "source": "/random", "type": "t", "data": number,
                });
                let key = dice.is_lucky(0.8).then(|| format!("k{}", dice.below(KEYS)));
                if let Some(key) = &key {
                    event["partitionkey"] = json!(key);
                }
                keys.push(key);
                event
            })
            .collect();
        let placed = publish_events(&http, "orders.created", &events).await;
        for (key, placed) in keys.into_iter().zip(placed) {
            let offset = placed["offset"].as_u64().unwrap();
            let published = Published { key };
            recorder.lock().published.insert(offset, published);
        }
        tokio::time::sleep(Duration::from_millis(dice.below(60) as u64)).await;
    }
}

/// Acts until told to stop, then helps to empty the queue.
async fn work(mut worker: Worker, is_over: Arc<AtomicBool>, is_empty: Arc<AtomicBool>) {
    while !is_over.load(Ordering::Relaxed) {
        worker.step().await;
    }
    while !is_empty.load(Ordering::Relaxed) {
        worker.drain().await;
    }
}

async fn letters(database: &TestDatabase, history: &mut History) {
    let rows: Vec<(i64, i32, String, chrono::DateTime<chrono::Utc>)> = sqlx::query_as(
        "select d.\"offset\", d.attempts, d.cause, d.died_at from postroad_broker.dead_letter d
         join postroad_broker.queue q on q.id = d.queue_id where q.name = $1",
    )
    .bind(QUEUE)
    .fetch_all(&mut database.connect().await)
    .await
    .unwrap();
    for (offset, attempts, cause, died_at) in rows {
        let letter = Letter {
            attempts: u64::from(attempts.unsigned_abs()),
            cause,
            died_at,
        };
        history.letters.insert(offset.unsigned_abs(), letter);
    }
}

/// Consumers, a producer and a killer, on a queue of these members. Gives the faults that the checker finds.
async fn run(members: Value, rules: Rules) {
    let seed = seed();
    let length = Duration::from_secs(size("POSTROAD_TEST_RANDOM_SECONDS", 10) as u64);
    println!("POSTROAD_TEST_SEED={seed}");
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let mut declaration = json!({
        "topics": ["orders.*"], "max_attempts": rules.max_attempts, "retry": {"delays_seconds": [0, 0.2]},
    });
    for (name, value) in members.as_object().unwrap() {
        declaration[name] = value.clone();
    }
    let path = format!("/v1/queues/{QUEUE}");
    program.http.declare(&path, &declaration).await;
    let recorder = Arc::new(Recorder::default());
    let (is_over, is_empty) = (Arc::default(), Arc::default());
    let mut dice = Dice::new(seed);
    let producer = tokio::spawn(produce(
        program.http.clone(),
        Arc::clone(&recorder),
        Dice::new(seed.wrapping_add(1)),
        Arc::clone(&is_over),
    ));
    let workers: Vec<_> = (0..WORKERS)
        .map(|number| {
            let worker = Worker::new(
                program.http.clone(),
                QUEUE,
                format!("worker-{number}"),
                Arc::clone(&recorder),
                seed.wrapping_add(100 + number),
            );
            tokio::spawn(work(worker, Arc::clone(&is_over), Arc::clone(&is_empty)))
        })
        .collect();
    let until = Instant::now() + length;
    let mut kills = 0;
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(200 + dice.below(1_300) as u64)).await;
        program.kill().await;
        program.start().await;
        kills += 1;
    }
    is_over.store(true, Ordering::Relaxed);
    producer.await.unwrap();
    support::eventually("an empty queue", || async {
        let (_, queue) = program.http.get(&path).await;
        (queue["status"]["depth"] == 0).then_some(())
    })
    .await;
    is_empty.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.await.unwrap();
    }
    let mut history = recorder.lock().clone();
    letters(&database, &mut history).await;
    println!(
        "{} published, {} deliveries, {} verbs, {} without an answer, {} dead letters, {kills} kills",
        history.published.len(),
        history.delivered.len(),
        history.settled.len(),
        history.settled.iter().filter(|s| s.told.is_none()).count(),
        history.letters.len(),
    );
    let faults = checker::check(&history, rules);
    assert!(
        faults.is_empty(),
        "POSTROAD_TEST_SEED={seed}:\n{}",
        faults.join("\n")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_keeps_its_promises_while_the_program_is_killed_at_random() {
    let rules = Rules {
        max_attempts: 5,
        is_ordered: false,
    };
    run(json!({}), rules).await;
}
