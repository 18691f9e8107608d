//! kill -9 of Postgres, and of the program, under a load of publishes and acks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Victim, at_once, size};
use crate::support::consumer::{items, publish_ids, stream_ids};
use crate::support::{self, Consumer, Http};

const PRODUCERS: usize = 3;
const CONSUMERS: usize = 3;

/// What consumers saw and were told, by offset.
#[derive(Default)]
struct History {
    /// The delivery that was acked, with a 200, and whether that was the first answer rather than a repeat's.
    acked: Mutex<BTreeMap<u64, (u64, bool)>>,
    /// Deliveries, in the order in which they came.
    delivered: Mutex<Vec<(u64, u64, u64)>>,
}

impl History {
    fn deliver(&self, delivery: &Value) {
        let number = |member: &str| delivery[member].as_u64().unwrap();
        let seen = (number("offset"), number("delivery"), number("attempt"));
        self.delivered.lock().unwrap().push(seen);
    }

    fn ack(&self, delivery: &Value, outcome: &Value) {
        let number = |member: &str| delivery[member].as_u64().unwrap();
        let (offset, delivery) = (number("offset"), number("delivery"));
        let mut acked = self.acked.lock().unwrap();
        match outcome["result"].as_str().unwrap() {
            "acked" => {
                let before = acked.insert(offset, (delivery, true));
                let is_first = before.is_none_or(|(_, is_first)| !is_first);
                assert!(is_first, "{offset} was acked twice");
            }
            // A repeat of an ack whose answer was lost; or somebody else was faster, who says more.
            "already_settled" => {
                acked.entry(offset).or_insert((delivery, false));
            }
            // Its time was up, and it is somebody else's by now.
            "stale" => {}
            other => panic!("{other}"),
        }
    }
}

async fn produce(
    http: Http,
    producer: usize,
    published: Arc<Mutex<BTreeMap<String, u64>>>,
    is_over: Arc<AtomicBool>,
) {
    for number in 0.. {
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        let ids: Vec<String> = (0..5).map(|n| format!("{producer}-{number}-{n}")).collect();
        let placed = publish_ids(&http, "orders.created", &ids).await;
        let mut published = published.lock().unwrap();
        for (id, placed) in ids.into_iter().zip(placed) {
            published.insert(id, placed["offset"].as_u64().unwrap());
        }
    }
}

async fn consume(consumer: Consumer, history: Arc<History>, wanted: Arc<AtomicUsize>) {
    while history.acked.lock().unwrap().len() < wanted.load(Ordering::Relaxed) {
        let body = json!({"wait_seconds": 1, "max_messages": 20, "visibility_timeout_seconds": 5});
        let answer = consumer.receive(&body).await;
        let deliveries = answer["deliveries"].as_array().unwrap();
        for delivery in deliveries {
            history.deliver(delivery);
        }
        if deliveries.is_empty() {
            continue;
        }
        let outcomes = consumer.settle("ack", &items(deliveries, &json!({}))).await;
        for (delivery, outcome) in deliveries.iter().zip(&outcomes) {
            history.ack(delivery, outcome);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_postgres_loses_nothing_acknowledged_and_redelivers_nothing_acked() {
    kill_under_load(Victim::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_program_loses_nothing_acknowledged_and_redelivers_nothing_acked() {
    kill_under_load(Victim::Program).await;
}

async fn kill_under_load(victim: Victim) {
    let cluster = support::cluster().await;
    let url = cluster.create_database("shop").await;
    let mut program = support::program(&url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(16)).await;
    let (published, history) = (Arc::default(), Arc::new(History::default()));
    let (is_over, wanted) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(usize::MAX)),
    );
    let producers: Vec<_> = (0..PRODUCERS)
        .map(|producer| {
            let (published, is_over) = (Arc::clone(&published), Arc::clone(&is_over));
            tokio::spawn(produce(program.http.clone(), producer, published, is_over))
        })
        .collect();
    let consumers: Vec<_> = (0..CONSUMERS)
        .map(|_| {
            let (history, wanted) = (Arc::clone(&history), Arc::clone(&wanted));
            tokio::spawn(consume(consumer.clone(), history, wanted))
        })
        .collect();
    for _ in 0..size("POSTROAD_TEST_KILLS", 3) {
        let before = history.acked.lock().unwrap().len();
        support::eventually("acks", || async {
            (history.acked.lock().unwrap().len() > before + 200).then_some(())
        })
        .await;
        victim.kill(&mut program, &cluster).await;
    }
    is_over.store(true, Ordering::Relaxed);
    for producer in producers {
        producer.await.unwrap();
    }
    wanted.store(published.lock().unwrap().len(), Ordering::Relaxed);
    for consumer in consumers {
        tokio::time::timeout(Duration::from_secs(60), consumer)
            .await
            .expect("all messages are acked in time")
            .unwrap();
    }
    let published = published.lock().unwrap().clone();
    check(&program.http, &published, &history).await;
    let numbers = consumer.status().await;
    assert_eq!(
        (&numbers["depth"], &numbers["dead_letters"]),
        (&json!(0), &json!(0))
    );
}

async fn check(http: &Http, published: &BTreeMap<String, u64>, history: &History) {
    let stream = stream_ids(http, "main").await;
    let found: BTreeMap<String, u64> = stream.iter().map(|(o, id)| (id.clone(), *o)).collect();
    assert_eq!(found.len(), stream.len(), "no id twice");
    assert_eq!(
        &found, published,
        "all that was published, where it was said to be"
    );
    let acked = history.acked.lock().unwrap();
    assert!(acked.keys().eq(published.values().collect::<BTreeSet<_>>()));
    let delivered = history.delivered.lock().unwrap();
    let late = delivered
        .iter()
        .filter(|(offset, delivery, _)| acked[offset].0 < *delivery);
    assert_eq!(late.count(), 0, "delivered after its ack was answered");
    let is_again = |seen: &&(u64, u64, u64)| seen.2 > 1;
    println!(
        "{} published, {} deliveries, {} at a second attempt",
        published.len(),
        delivered.len(),
        delivered.iter().filter(is_again).count(),
    );
}
