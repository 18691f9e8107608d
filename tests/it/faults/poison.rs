//! A message that kills whoever takes it: consumers, and the program with them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::at_once;
use crate::support::consumer::{items, publish};
use crate::support::{self, Consumer, Program, TestDatabase};

const ATTEMPTS: u32 = 5;
const POISON: u64 = 4;

/// Consumers that die with the poison, until nothing is left. `is_fatal` tells by the attempt whether the program dies too.
/// Gives the attempts of the poison with the size of its batch, and the highest attempt of each of the others.
async fn run(
    program: &mut Program,
    consumer: &Consumer,
    is_fatal: fn(u64) -> bool,
) -> (Vec<(u64, usize)>, BTreeMap<u64, u64>) {
    let (mut poison, mut others) = (Vec::new(), BTreeMap::new());
    let body = json!({"wait_seconds": 2, "visibility_timeout_seconds": 1});
    while consumer.status().await["depth"] != 0 {
        let answer = consumer.receive(&body).await;
        let deliveries = answer["deliveries"].as_array().unwrap();
        let number = |delivery: &Value, member: &str| delivery[member].as_u64().unwrap();
        let killer = deliveries.iter().find(|d| number(d, "offset") == POISON);
        for delivery in deliveries {
            if number(delivery, "offset") != POISON {
                others.insert(number(delivery, "offset"), number(delivery, "attempt"));
            }
        }
        match killer {
            Some(killer) => {
                let attempt = number(killer, "attempt");
                poison.push((attempt, deliveries.len()));
                if is_fatal(attempt) {
                    program.kill().await;
                    program.start().await;
                }
            }
            None if deliveries.is_empty() => {}
            None => {
                consumer
                    .settle_all("ack", &items(deliveries, &json!({})), "acked")
                    .await;
            }
        }
    }
    (poison, others)
}

async fn check(database: &TestDatabase, poison: &[(u64, usize)], others: &BTreeMap<u64, u64>) {
    let attempts: Vec<u64> = poison.iter().map(|(attempt, _)| *attempt).collect();
    assert_eq!(attempts, [1, 2, 3, 4, 5]);
    assert!(
        poison[2..].iter().all(|(_, batch)| *batch == 1),
        "alone from its third attempt on: {poison:?}"
    );
    assert_eq!(others.len(), 9);
    // They were in its first two batches, no longer.
    assert!(others.values().all(|attempt| *attempt <= 3), "{others:?}");
    let letters: Vec<(i64, i32, String, i64)> = sqlx::query_as(
        "select \"offset\", attempts, cause, jsonb_array_length(failures)::bigint from postroad_broker.dead_letter",
    )
    .fetch_all(&mut database.connect().await)
    .await
    .unwrap();
    let attempts = i64::from(ATTEMPTS);
    assert_eq!(
        letters,
        [(
            POISON as i64,
            ATTEMPTS as i32,
            "out_of_attempts".to_owned(),
            attempts
        )]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_message_that_kills_consumers_dies_in_exactly_its_attempts() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(ATTEMPTS)).await;
    publish(&program.http, "orders.created", 10).await;
    let (poison, others) = run(&mut program, &consumer, |_| false).await;
    check(&database, &poison, &others).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_message_that_kills_the_broker_dies_in_exactly_its_attempts() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(ATTEMPTS)).await;
    publish(&program.http, "orders.created", 10).await;
    let (poison, others) = run(&mut program, &consumer, |_| true).await;
    check(&database, &poison, &others).await;
}
