//! kill -9 of the program in the middle of a redrive: what came back, came back once, and the redrive says how many.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use super::{at_once, size};
use crate::support::consumer::{items, patiently, publish};
use crate::support::{self, Consumer, Http};

/// Deliveries by offset: the number of the delivery and of the attempt.
type Seen = Arc<Mutex<BTreeMap<u64, Vec<(u64, u64)>>>>;

const REDRIVE: &str = "/v1/queues/billing/redrives/after-the-fix";

async fn consume(consumer: Consumer, seen: Seen, count: usize) {
    let body = json!({"wait_seconds": 1, "max_messages": 500});
    while seen.lock().unwrap().len() < count {
        let answer = consumer.receive(&body).await;
        let deliveries = answer["deliveries"].as_array().unwrap();
        for delivery in deliveries {
            let number = |member: &str| delivery[member].as_u64().unwrap();
            let numbers = (number("delivery"), number("attempt"));
            seen.lock()
                .unwrap()
                .entry(number("offset"))
                .or_default()
                .push(numbers);
        }
        if !deliveries.is_empty() {
            consumer.settle("ack", &items(deliveries, &json!({}))).await;
        }
    }
}

async fn redriven(http: &Http) -> u64 {
    let redrive = patiently(http, Method::GET, REDRIVE, None).await;
    redrive["redriven"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_survives_two_kills_and_brings_each_message_back_once() {
    let (count, rate) = (size("POSTROAD_TEST_REDRIVES", 1_500), 1_000);
    let cluster = support::cluster().await;
    let url = cluster.create_database("shop").await;
    let mut program = support::program(&url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(3)).await;
    publish(&program.http, "orders.created", count).await;
    let mut rejected = 0;
    while rejected < count {
        let taken = consumer.take(1_000.min(count - rejected), 60).await;
        let items = items(&taken, &json!({"reason": "no stock"}));
        consumer.settle_all("reject", &items, "rejected").await;
        rejected += taken.len();
    }
    let request = json!({"redrive_id": "after-the-fix", "rate_per_second": rate});
    let began = Instant::now();
    let path = "/v1/queues/billing/redrives";
    let begun = patiently(&program.http, Method::POST, path, Some(&request)).await;
    assert_eq!(begun["total"], count, "{begun}");
    let seen = Seen::default();
    let consumed = tokio::spawn(consume(consumer.clone(), Arc::clone(&seen), count));
    for part in 1..=2 {
        let wanted = (count * part / 3) as u64;
        let patience = Duration::from_secs(60 + wanted / 100);
        tokio::time::timeout(patience, async {
            while redriven(&program.http).await < wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("the redrive goes on");
        program.kill().await;
        program.start().await;
        // Asked again, as a client does that was not answered.
        let repeated = patiently(&program.http, Method::POST, path, Some(&request)).await;
        assert_eq!(repeated["created_at"], begun["created_at"]);
    }
    let patience = Duration::from_secs(60 + count as u64 / 100);
    tokio::time::timeout(patience, consumed)
        .await
        .expect("all come back in time")
        .unwrap();
    let ended = support::eventually("the redrive to end", || async {
        let redrive = patiently(&program.http, Method::GET, REDRIVE, None).await;
        (redrive["status"] == "done").then_some(redrive)
    })
    .await;
    let took = began.elapsed();
    let numbers =
        |redrive: &Value| ["total", "redriven", "skipped"].map(|name| redrive[name].clone());
    assert_eq!(numbers(&ended), [json!(count), json!(count), json!(0)]);
    // The first delivery died; the second number was used up by the redrive.
    let is_once = |deliveries: &&Vec<_>| **deliveries == [(3, 1)];
    let once = seen.lock().unwrap().values().filter(is_once).count();
    assert_eq!(once, count, "each is delivered once");
    let left = patiently(
        &program.http,
        Method::GET,
        "/v1/queues/billing/dead-letters",
        None,
    )
    .await;
    assert_eq!(left["dead_letters"], json!([]));
    let status = consumer.status().await;
    assert_eq!(
        (&status["depth"], &status["dead_letters"]),
        (&json!(0), &json!(0))
    );
    println!(
        "{count} dead letters redriven at {rate}/s over two kills in {:.1} s, each delivered once",
        took.as_secs_f64()
    );
}
