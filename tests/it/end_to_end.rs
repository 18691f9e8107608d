//! The main job: from a producer's transaction, and from an HTTP publish, to an acknowledged delivery; over a stop, a kill
//! and with what the configuration declares.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{self, Http};

async fn produce(url: &str, topic: &str, numbers: std::ops::Range<u32>) {
    use sqlx::Connection as _;
    let mut connection = sqlx::PgConnection::connect(url).await.unwrap();
    for number in numbers {
        sqlx::query("insert into postroad.outbox (topic, payload) values ($1, $2)")
            .bind(topic)
            .bind(format!("{{\"n\": {number}}}"))
            .execute(&mut connection)
            .await
            .unwrap();
    }
}

/// Receives and acknowledges until so many different numbers have come, and gives them. A broker that is away for a moment
/// is asked again.
async fn consume(http: &Http, queue: &str, count: usize) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while found.len() < count {
        assert!(
            std::time::Instant::now() < deadline,
            "{} of {count} came",
            found.len()
        );
        let (status, answer) = http
            .post(
                &format!("/v1/queues/{queue}/receive"),
                &json!({"max_messages": 100, "wait_seconds": 1}),
            )
            .await;
        if status.as_u16() == 503 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        assert!(status.is_success(), "{status} {answer}");
        let deliveries = answer["deliveries"].as_array().unwrap();
        if deliveries.is_empty() {
            continue;
        }
        found.extend(
            deliveries
                .iter()
                .map(|d| d["event"]["data"]["n"].as_u64().unwrap()),
        );
        let receipts: Vec<Value> = deliveries
            .iter()
            .map(|delivery| json!({"receipt": delivery["receipt"]}))
            .collect();
        let count = receipts.len();
        let answer = http
            .ok(
                &format!("/v1/queues/{queue}/ack"),
                &json!({"deliveries": receipts}),
            )
            .await;
        assert_eq!(answer["settled"], count, "{answer}");
    }
    found
}

#[tokio::test]
async fn a_committed_row_and_a_publish_are_received_and_acknowledged() {
    let mut broker = support::broker().await;
    let http = broker.http.clone();
    http.declare("/v1/queues/billing", &json!({"topics": ["orders.*"]}))
        .await;
    produce(&broker.database.url, "orders.created", 0..50).await;
    http.ok("/v1/topics/orders.created/messages", &json!({"n": 50}))
        .await;

    // What was rolled back does not come.
    let mut connection = broker.database.connect().await;
    let mut transaction = sqlx::Connection::begin(&mut connection).await.unwrap();
    sqlx::query(
        "insert into postroad.outbox (topic, payload) values ('orders.created', '{\"n\": 99}')",
    )
    .execute(&mut *transaction)
    .await
    .unwrap();
    transaction.rollback().await.unwrap();

    assert_eq!(consume(&http, "billing", 51).await, (0..=50).collect());
    let (_, empty) = http
        .post("/v1/queues/billing/receive", &json!({"wait_seconds": 0}))
        .await;
    assert_eq!(empty["deliveries"], json!([]));
    assert_eq!(empty["reason"], "empty");
    broker.stop().await;
}

#[tokio::test]
async fn nothing_is_lost_or_repeated_over_a_stop_in_order() {
    let mut broker = support::broker().await;
    broker
        .http
        .declare("/v1/queues/billing", &json!({"topics": ["orders.*"]}))
        .await;
    produce(&broker.database.url, "orders.created", 0..20).await;
    assert_eq!(consume(&broker.http, "billing", 20).await.len(), 20);
    produce(&broker.database.url, "orders.created", 20..30).await;
    broker.restart().await;
    produce(&broker.database.url, "orders.created", 30..40).await;
    assert_eq!(
        consume(&broker.http, "billing", 20).await,
        (20..40).collect()
    );
    broker.stop().await;
}

#[tokio::test]
async fn what_was_committed_before_a_kill_comes_after_it() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    program
        .http
        .declare("/v1/queues/billing", &json!({"topics": ["orders.*"]}))
        .await;
    for round in 0..3 {
        let numbers = round * 100..(round + 1) * 100;
        produce(&database.url, "orders.created", numbers.clone()).await;
        program.kill().await;
        program.start().await;
        let expected: BTreeSet<u64> = numbers.map(u64::from).collect();
        assert_eq!(
            consume(&program.http, "billing", 100).await,
            expected,
            "round {round}"
        );
    }
    assert!(program.stop().await.success());
}

#[tokio::test]
async fn the_configurations_streams_and_queues_are_declared_at_start() {
    let mut broker = support::broker_with(|config| {
        let body = |value: Value| value.as_object().unwrap().clone();
        config.streams.push((
            "orders".parse().unwrap(),
            body(json!({"topics": ["orders.>"]})),
        ));
        config.queues.push((
            "billing".parse().unwrap(),
            body(json!({"stream": "orders", "topics": ["orders.created"], "visibility_timeout_seconds": 60})),
        ));
    })
    .await;
    let (status, queue) = broker.http.get("/v1/queues/billing").await;
    assert_eq!(status.as_u16(), 200);
    assert_eq!(queue["stream"], "orders");
    assert_eq!(queue["visibility_timeout_seconds"].as_f64(), Some(60.0));
    produce(&broker.database.url, "orders.created", 0..1).await;
    assert_eq!(consume(&broker.http, "billing", 1).await.len(), 1);
    // Declared again, unchanged.
    broker.restart().await;
    broker.stop().await;
}

#[tokio::test]
async fn a_declaration_that_breaks_a_rule_is_named() {
    let database = support::database().await;
    let mut config = support::broker::config(&database.url);
    let body = json!({"topics": ["a..b"]}).as_object().unwrap().clone();
    config.streams.push(("orders".parse().unwrap(), body));
    let error = postroad::app::Broker::start(config)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`streams.orders`") && error.contains("topics.0"),
        "{error}"
    );
}

#[tokio::test]
async fn a_long_poll_hears_that_its_queue_was_deleted() {
    let mut broker = support::broker().await;
    let http = broker.http.clone();
    http.declare("/v1/queues/short-lived", &json!({})).await;
    let poll = tokio::spawn({
        let http = http.clone();
        async move {
            http.post(
                "/v1/queues/short-lived/receive",
                &json!({"wait_seconds": 20}),
            )
            .await
        }
    });
    support::eventually("the long poll to wait", || async {
        let (_, queue) = http.get("/v1/queues/short-lived").await;
        (queue["status"]["waiters"] == 1).then_some(())
    })
    .await;
    let (status, _) = http.delete("/v1/queues/short-lived").await;
    assert!(status.is_success(), "{status}");
    let (status, answer) = poll.await.unwrap();
    assert_eq!(status.as_u16(), 404, "{answer}");
    broker.stop().await;
}
