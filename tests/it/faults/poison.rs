//! A message that kills whoever takes it: consumers, and the program with them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Value, json};

use super::{at_once, size};
use crate::support::consumer::{items, publish};
use crate::support::{self, Consumer, Program, TestDatabase};

const ATTEMPTS: u32 = 5;
const POISON: u64 = 4;

/// Consumers that die with the poison, until nothing is left. `kills` tells by the attempt how often the program dies too.
/// Gives the attempts of the poison with the size of its batch, and the highest attempt of each of the others.
async fn run(
    program: &mut Program,
    consumer: &Consumer,
    kills: fn(u64) -> u64,
) -> (Vec<(u64, usize)>, BTreeMap<u64, u64>) {
    let (mut poison, mut others) = (Vec::new(), BTreeMap::new());
    support::eventually("all messages in the queue", || async {
        (consumer.status().await["depth"] == 10).then_some(())
    })
    .await;
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
                for _ in 0..kills(attempt) {
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
    // The depth is of what is decided, the letter comes with its commit.
    let mut connection = database.connect().await;
    let letters: Vec<(i64, i32, String, i64)> = loop {
        let letters = sqlx::query_as(
            "select \"offset\", attempts, cause, jsonb_array_length(failures)::bigint from postroad_broker.dead_letter",
        )
        .fetch_all(&mut connection)
        .await
        .unwrap();
        if !letters.is_empty() {
            break letters;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
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
    let (poison, others) = run(&mut program, &consumer, |_| 0).await;
    check(&database, &poison, &others).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_message_that_kills_the_broker_dies_in_exactly_its_attempts() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(ATTEMPTS)).await;
    publish(&program.http, "orders.created", 10).await;
    let (poison, others) = run(&mut program, &consumer, |_| 1).await;
    check(&database, &poison, &others).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_dies_again_and_again_with_a_message_counts_it_once() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(ATTEMPTS)).await;
    publish(&program.http, "orders.created", 10).await;
    // Each restart is over before the message's second is, or after it: that changes nothing.
    let (poison, others) = run(&mut program, &consumer, |attempt| attempt % 4).await;
    check(&database, &poison, &others).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_handed_out_is_not_charged_by_a_kill() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(100)).await;
    publish(&program.http, "orders.created", 200).await;
    // (offset, delivery) of what was handed out, by an answer or by the journal's word.
    let mut handed: BTreeSet<(u64, u64)> = BTreeSet::new();
    for round in 0..8u64 {
        let receives: Vec<_> = (0..3)
            .map(|_| {
                let http = program.http.clone();
                tokio::spawn(async move {
                    let body = json!({"wait_seconds": 1, "max_messages": 7, "visibility_timeout_seconds": 1});
                    let path = "/v1/queues/billing/receive";
                    http.call(reqwest::Method::POST, path, Some(&body)).await
                })
            })
            .collect();
        // While they are decided, journaled or answered.
        tokio::time::sleep(Duration::from_millis(3 << round)).await;
        program.kill().await;
        let mut note = |deliveries: &[Value]| {
            for delivery in deliveries {
                let number = |member: &str| delivery[member].as_u64().unwrap();
                assert_eq!(number("delivery"), number("attempt"), "none was released");
                handed.insert((number("offset"), number("delivery")));
            }
        };
        for receive in receives {
            if let Ok((status, answer)) = receive.await.unwrap()
                && status.is_success()
            {
                note(answer["deliveries"].as_array().unwrap());
            }
        }
        program.start().await;
        note(&consumer.in_flight().await);
        support::eventually("nothing in flight", || async {
            (consumer.status().await["in_flight"] == 0).then_some(())
        })
        .await;
    }
    let taken = consumer.take(200, 600).await;
    for delivery in &taken {
        let number = |member: &str| delivery[member].as_u64().unwrap();
        let (offset, attempt) = (number("offset"), number("attempt"));
        let before = handed.range((offset, 0)..=(offset, u64::MAX)).count() as u64;
        assert_eq!(
            (attempt, number("delivery")),
            (before + 1, before + 1),
            "{offset}"
        );
    }
    let charged: BTreeSet<u64> = handed.iter().map(|(offset, _)| *offset).collect();
    assert!(!charged.is_empty() && charged.len() < 200);
}

/// Many at a time, each of which kills whoever takes it, the broker now and then; as many innocents beside them.
#[tokio::test(flavor = "multi_thread")]
async fn many_poison_messages_die_in_exactly_their_attempts() {
    let count = size("POSTROAD_TEST_POISON", 10);
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(ATTEMPTS)).await;
    publish(&program.http, "orders.created", count * 2).await;
    let number = |delivery: &Value, member: &str| delivery[member].as_u64().unwrap();
    let mut attempts: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let body = json!({"wait_seconds": 1, "max_messages": 5, "visibility_timeout_seconds": 1});
    let mut receives = 0;
    let is_done = async |consumer: &Consumer| {
        let numbers = consumer.status().await;
        numbers["depth"] == 0 && numbers["dead_letters"] == count
    };
    while !is_done(&consumer).await {
        let answer = consumer.receive(&body).await;
        let deliveries = answer["deliveries"].as_array().unwrap();
        let is_poison = |delivery: &&Value| number(delivery, "offset").is_multiple_of(2);
        for delivery in deliveries.iter().filter(is_poison) {
            let seen = attempts.entry(number(delivery, "offset")).or_default();
            seen.push(number(delivery, "attempt"));
        }
        let others = deliveries.iter().filter(|delivery| !is_poison(delivery));
        let others: Vec<Value> = others.cloned().collect();
        let acks = items(&others, &json!({}));
        consumer.settle_all("ack", &acks, "acked").await;
        receives += 1;
        if receives % 40 == 0 {
            program.kill().await;
            program.start().await;
        }
    }
    let exactly: Vec<u64> = (1..=u64::from(ATTEMPTS)).collect();
    let inexact = attempts
        .iter()
        .filter(|(_, attempts)| **attempts != exactly);
    assert_eq!(inexact.collect::<Vec<_>>(), []);
    assert_eq!(attempts.len(), count);
    let letters: Vec<(i64, i32, String)> =
        sqlx::query_as("select \"offset\", attempts, cause from postroad_broker.dead_letter")
            .fetch_all(&mut database.connect().await)
            .await
            .unwrap();
    let is_exact = |(offset, attempts, cause): &&(i64, i32, String)| {
        offset % 2 == 0 && *attempts == ATTEMPTS as i32 && cause == "out_of_attempts"
    };
    assert_eq!(letters.iter().filter(is_exact).count(), count);
    println!("{count} poison messages: dead after exactly {ATTEMPTS} attempts each");
}
