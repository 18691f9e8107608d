//! Consumers that die at every step between their receive and their ack. The effect of each message happens once.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{consumer, consumer_database, execute};
use crate::support::consumer::{items, publish};
use crate::support::{self, Consumer, TestBroker, TestDatabase};

/// Where a consumer dies. Its connection to the database is gone with it, and so is what it received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Received,
    Accepted,
    Worked,
    Committed,
    Acked,
}

const STEPS: [Step; 5] = [
    Step::Received,
    Step::Accepted,
    Step::Worked,
    Step::Committed,
    Step::Acked,
];

/// A table for the effects in the consumer's database, and a queue with so many messages.
async fn open(owner: &mut PgConnection, broker: &TestBroker, messages: usize) -> Consumer {
    execute(
        owner,
        "create table effect (message bigint not null);
        do $$ begin execute format('grant insert on effect to %I', postroad.role_name('consumer')); end $$",
    )
    .await;
    let queue = Consumer::declare(
        &broker.http,
        "mailer",
        &json!({"stream": "main", "start": "earliest", "max_attempts": 100, "retry": {"delays_seconds": [0]}}),
    )
    .await;
    publish(&broker.http, "orders.created", messages).await;
    queue
}

/// How often each message's work was done, by offset.
async fn effects(owner: &mut PgConnection) -> BTreeMap<i64, i64> {
    let counting = sqlx::query_as("select message, count(*) from effect group by message");
    let effects: Vec<(i64, i64)> = counting.fetch_all(owner).await.unwrap();
    effects.into_iter().collect()
}

/// Handles one delivery as the README says, up to the step at which the consumer dies. Gives whether it did.
async fn handle(
    connection: &mut PgConnection,
    consumer: &Consumer,
    delivery: &Value,
    dies_at: Option<Step>,
    asks: bool,
) -> bool {
    let is_over = |step| dies_at == Some(step);
    if is_over(Step::Received) {
        return true;
    }
    let offset = delivery["offset"].as_i64().unwrap();
    execute(connection, "begin").await;
    let is_new: bool = sqlx::query_scalar("select postroad.inbox_accept($1, $2, $3, $4)")
        .bind(&consumer.queue)
        .bind(delivery["event"]["source"].as_str().unwrap())
        .bind(delivery["event"]["id"].as_str().unwrap())
        .bind(offset)
        .fetch_one(&mut *connection)
        .await
        .unwrap();
    if is_over(Step::Accepted) {
        return true;
    }
    if is_new || !asks {
        sqlx::query("insert into effect values ($1)")
            .bind(offset)
            .execute(&mut *connection)
            .await
            .unwrap();
    }
    if is_over(Step::Worked) {
        return true;
    }
    execute(connection, "commit").await;
    if is_over(Step::Committed) {
        return true;
    }
    // Idempotent: a repeat of it, or one of a delivery that is over, does no harm.
    consumer
        .settle("ack", &items(std::slice::from_ref(delivery), &json!({})))
        .await;
    is_over(Step::Acked)
}

/// One consumer after the other, each of which dies at its next step, until every message has met every death; then more that
/// live. Gives the effects by offset, and how often each step killed.
async fn run(
    database: &TestDatabase,
    broker: &TestBroker,
    messages: usize,
    asks: bool,
) -> (BTreeMap<i64, i64>, BTreeMap<Step, usize>) {
    let mut owner = database.connect().await;
    let queue = open(&mut owner, broker, messages).await;
    let mut deaths: BTreeMap<Step, usize> = BTreeMap::new();
    let mut died: BTreeMap<i64, usize> = BTreeMap::new();
    let mut acked: BTreeSet<i64> = BTreeSet::new();
    let mut connection = consumer(database).await;
    while acked.len() < messages {
        let body = json!({"wait_seconds": 1, "max_messages": 4, "visibility_timeout_seconds": 1});
        for delivery in queue.receive(&body).await["deliveries"].as_array().unwrap() {
            let offset = delivery["offset"].as_i64().unwrap();
            let times = died.entry(offset).or_default();
            let dies_at = STEPS.get(*times).copied();
            let is_dead = handle(&mut connection, &queue, delivery, dies_at, asks).await;
            if dies_at.is_none_or(|step| step == Step::Acked) {
                acked.insert(offset);
            }
            if is_dead {
                *times += 1;
                *deaths.entry(dies_at.unwrap()).or_default() += 1;
                // Gone without a word, with the rest of what it received.
                drop(std::mem::replace(&mut connection, consumer(database).await));
                break;
            }
        }
    }
    (effects(&mut owner).await, deaths)
}

#[tokio::test]
async fn consumers_that_die_at_every_step_do_each_work_once() {
    let broker = support::broker().await;
    let database = consumer_database(3).await;
    let (effects, deaths) = run(&database, &broker, 6, true).await;
    assert_eq!(effects, (1..=6).map(|offset| (offset, 1)).collect());
    assert_eq!(deaths, STEPS.map(|step| (step, 6)).into_iter().collect());
}

#[tokio::test]
async fn the_same_deaths_show_consumers_that_do_not_ask() {
    let broker = support::broker().await;
    let database = consumer_database(3).await;
    let (effects, _) = run(&database, &broker, 2, false).await;
    // Once before the death between commit and ack, and once after.
    assert_eq!(effects, [(1, 2), (2, 2)].into_iter().collect());
}

#[tokio::test]
async fn a_message_that_was_done_is_not_done_again_when_it_is_refused_and_comes_back() {
    let broker = support::broker().await;
    let database = consumer_database(1_000).await;
    let mut owner = database.connect().await;
    let queue = open(&mut owner, &broker, 3).await;
    let mut connection = consumer(&database).await;
    for (verb, result) in [("nack", "nacked"), ("release", "released")] {
        let deliveries = queue.take(3, 60).await;
        for delivery in &deliveries {
            handle(
                &mut connection,
                &queue,
                delivery,
                Some(Step::Committed),
                true,
            )
            .await;
        }
        queue
            .settle_all(verb, &items(&deliveries, &json!({})), result)
            .await;
    }
    let deliveries = queue.take(3, 60).await;
    for delivery in &deliveries {
        handle(&mut connection, &queue, delivery, None, true).await;
    }
    assert_eq!(
        effects(&mut owner).await,
        (1..=3).map(|offset| (offset, 1)).collect()
    );
    assert_eq!(queue.status().await["depth"], 0);
}

/// Two of three were done before they became dead letters, one died before. All three come back by a redrive, killed once more on
/// their way, and nothing is done twice.
#[tokio::test]
async fn redriven_messages_are_done_once() {
    let broker = support::broker().await;
    let database = consumer_database(1_000).await;
    let mut owner = database.connect().await;
    let queue = open(&mut owner, &broker, 3).await;
    let mut connection = consumer(&database).await;
    let first = queue.take(3, 60).await;
    for (delivery, step) in first
        .iter()
        .zip([Step::Committed, Step::Worked, Step::Committed])
    {
        handle(&mut connection, &queue, delivery, Some(step), true).await;
        if step == Step::Worked {
            execute(&mut connection, "rollback").await;
        }
    }
    let reason = json!({"reason": "the mail server is away"});
    queue
        .settle_all("reject", &items(&first, &reason), "rejected")
        .await;
    assert_eq!(queue.status().await["dead_letters"], 3);
    broker
        .http
        .ok("/v1/queues/mailer/redrives", &json!({}))
        .await;
    let again = queue.take(3, 60).await;
    let offsets = |deliveries: &[Value]| -> BTreeSet<u64> {
        deliveries
            .iter()
            .map(|d| d["offset"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(offsets(&again), offsets(&first), "the same messages");
    assert!(again.iter().all(|d| d["attempt"] == 1), "{again:?}");
    // Once more without an ack; and then to the end.
    for delivery in &again {
        handle(
            &mut connection,
            &queue,
            delivery,
            Some(Step::Committed),
            true,
        )
        .await;
    }
    queue
        .settle_all("nack", &items(&again, &json!({})), "nacked")
        .await;
    for delivery in &queue.take(3, 60).await {
        handle(&mut connection, &queue, delivery, None, true).await;
    }
    assert_eq!(
        effects(&mut owner).await,
        (1..=3).map(|offset| (offset, 1)).collect()
    );
    let status = queue.status().await;
    assert_eq!(
        (&status["depth"], &status["dead_letters"]),
        (&json!(0), &json!(0))
    );
}
