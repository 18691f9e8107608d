//! kill -9 of the program with a queue in the middle of its work.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::at_once;
use crate::support::consumer::{items, publish, time};
use crate::support::{self, Consumer};

fn offset(value: &Value) -> u64 {
    value["offset"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_with_a_thousand_in_flight_forgets_no_deadline_delay_or_attempt() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(16)).await;
    publish(&program.http, "orders.created", 1_000).await;
    for _ in 0..2 {
        let taken = consumer.take(1_000, 3_600).await;
        consumer
            .settle_all("nack", &items(&taken, &json!({})), "nacked")
            .await;
    }
    let taken = consumer.take(1_000, 3_600).await;
    assert!(
        taken
            .iter()
            .all(|d| d["attempt"] == 3 && d["delivery"] == 3)
    );
    // Due while the program is away or soon after: 20 nacked, 10 released, 5 whose time is short.
    let nacked = items(&taken[..20], &json!({"delay_seconds": 4}));
    let released = items(&taken[20..30], &json!({"delay_seconds": 3.5}));
    let short = items(&taken[30..35], &json!({"visibility_timeout_seconds": 3}));
    let long = items(&taken[35..36], &json!({"visibility_timeout_seconds": 7200}));
    // Not before this moment, and then as this attempt.
    let mut expected: BTreeMap<u64, (String, u64)> = BTreeMap::new();
    for (verb, items, result, member, attempt, from) in [
        ("nack", &nacked, "nacked", "due_at", 4, 0),
        ("release", &released, "released", "due_at", 3, 20),
        ("extend", &short, "extended", "visible_until", 4, 30),
    ] {
        let outcomes = consumer.settle_all(verb, items, result).await;
        for (outcome, delivery) in outcomes.iter().zip(&taken[from..]) {
            let at = outcome[member].as_str().unwrap().to_owned();
            expected.insert(offset(delivery), (at, attempt));
        }
    }
    consumer.settle_all("extend", &long, "extended").await;
    let acked = items(&taken[36..50], &json!({}));
    consumer.settle_all("ack", &acked, "acked").await;
    let (before, numbers) = (consumer.in_flight().await, consumer.status().await);
    assert_eq!(before.len(), 1_000 - 30 - 14);

    program.kill().await;
    program.start().await;
    assert_eq!(consumer.in_flight().await, before, "as before the kill");
    let after = consumer.status().await;
    for count in ["depth", "in_flight", "delayed", "watermark", "dead_letters"] {
        assert_eq!(after[count], numbers[count], "{count}");
    }
    let none = consumer.receive(&json!({"wait_seconds": 0})).await;
    assert_eq!(none["deliveries"], json!([]), "nothing before its time");
    let soonest = expected.values().map(|(at, _)| at).min().unwrap();
    assert_eq!(time(&none["next_due_at"]), time(&json!(soonest)));

    let again = consumer.take(expected.len(), 3_600).await;
    let live: BTreeMap<u64, Value> = consumer
        .in_flight()
        .await
        .into_iter()
        .map(|live| (offset(&live), live))
        .collect();
    for delivery in &again {
        let (due_at, attempt) = &expected[&offset(delivery)];
        let delivered_at = time(&live[&offset(delivery)]["delivered_at"]);
        assert!(delivered_at >= time(&json!(due_at)), "{delivery}: {due_at}");
        assert_eq!(delivery["attempt"], *attempt, "{delivery}");
        assert_eq!(delivery["delivery"], 4, "{delivery}");
    }
    let kept = items(&taken[35..], &json!({}));
    let settled = consumer.settle("ack", &kept).await;
    let counts = ["acked", "already_settled"]
        .map(|result| settled.iter().filter(|s| s["result"] == result).count());
    assert_eq!(counts, [951, 14], "receipts of before settle");
    program.kill().await;
    program.start().await;
    let numbers = consumer.status().await;
    assert_eq!(
        (&numbers["depth"], &numbers["in_flight"]),
        (&json!(35), &json!(35))
    );
    consumer
        .settle_all("ack", &items(&again, &json!({})), "acked")
        .await;
}
