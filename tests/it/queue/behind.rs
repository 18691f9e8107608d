//! A log that was restored without its queue: the queue says so and does nothing, until a person accepts the loss.

use std::time::Duration;

use postroad::domain::id::{Generation, Offset};
use postroad::domain::policy::Start;
use postroad::queue::{self, Error, LogBehind, OnLoss, Renewal, Verb};

use super::{Broker, HOUR, at_once, declaration, items, name};
use crate::support::{self, TestDatabase};

/// With ten messages settled, and its place noted.
async fn stopped(database: &TestDatabase) {
    let options = queue::Options {
        positions_every: Duration::from_millis(50),
        ..queue::Options::default()
    };
    let broker = Broker::start(&database.url, &database.url, options).await;
    let declaration = declaration(at_once(16));
    broker.queue.declare(name(), declaration).await.unwrap();
    broker.publish("orders.created", 10).await;
    let taken = broker.take(10, HOUR).await;
    broker.settle(Verb::Ack, items(&taken)).await;
    support::eventually("the queue's place to be noted", || async {
        let noted = "select \"offset\" from postroad_broker.queue_mark";
        let noted: Option<i64> = sqlx::query_scalar(noted)
            .fetch_optional(&mut database.connect().await)
            .await
            .unwrap();
        (noted == Some(10)).then_some(())
    })
    .await;
    broker.stop().await;
}

async fn execute(database: &TestDatabase, text: &'static str) {
    let mut connection = database.connect().await;
    sqlx::raw_sql(text).execute(&mut connection).await.unwrap();
}

async fn assert_refuses(broker: &Broker, behind: LogBehind) {
    let is_refused = |error: Error| match error {
        Error::LogBehind { behind: found, .. } => assert_eq!(found, behind),
        error => panic!("{error:?}"),
    };
    let at_once = queue::ReceiveRequest {
        wait: Duration::ZERO,
        ..queue::ReceiveRequest::default()
    };
    is_refused(broker.queue.receive(&name(), at_once).await.unwrap_err());
    for renewal in [Renewal::Seek(Start::Earliest), Renewal::Purge] {
        let refused = broker.queue.renew(&name(), renewal, None).await;
        is_refused(refused.unwrap_err());
    }
    let described = broker.queue.describe(&name()).await.unwrap();
    assert_eq!(described.log_behind, Some(behind));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_ends_before_what_its_queue_knows_is_refused_until_the_loss_is_accepted() {
    let database = support::database().await;
    stopped(&database).await;
    execute(
        &database,
        "delete from postroad_broker.message where \"offset\" > 6",
    )
    .await;
    let behind = LogBehind {
        through: Offset(10),
        end: Offset(6),
    };
    let broker = Broker::on(&database).await;
    assert_refuses(&broker, behind).await;
    broker.publish("orders.created", 1).await;
    broker.kill();
    // It is looked at again, and the log has grown by one.
    let broker = Broker::on(&database).await;
    let end = Offset(7);
    assert_refuses(&broker, LogBehind { end, ..behind }).await;
    let to_five = Renewal::Seek(Start::Offset(Offset(5)));
    let sought = broker
        .queue
        .renew_with(&name(), to_five, None, OnLoss::Accept)
        .await
        .unwrap();
    assert_eq!((sought.generation.0, sought.through_offset), (2, Offset(4)));
    let repeated = broker
        .queue
        .renew_with(&name(), to_five, Some(generation(1)), OnLoss::Accept)
        .await
        .unwrap();
    assert_eq!(repeated, sought);
    let taken = broker.take(3, HOUR).await;
    let offsets: Vec<i64> = taken.iter().map(|one| one.entry.offset.0).collect();
    assert_eq!(offsets, [5, 6, 7]);
    broker.settle(Verb::Ack, items(&taken)).await;
    assert_eq!(
        broker.queue.describe(&name()).await.unwrap().log_behind,
        None
    );
    broker.kill();
    let broker = Broker::on(&database).await;
    broker.publish("orders.created", 1).await;
    assert_eq!(broker.take(1, HOUR).await[0].entry.offset, Offset(8));
}

fn generation(number: i64) -> Generation {
    Generation(number)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_has_grown_again_is_known_by_the_message_at_the_queues_place() {
    let database = support::database().await;
    stopped(&database).await;
    let broker = Broker::on(&database).await;
    broker.publish("orders.created", 5).await;
    broker.kill();
    execute(
        &database,
        "update postroad_broker.message set id = 'another-' || id where \"offset\" > 6",
    )
    .await;
    let broker = Broker::on(&database).await;
    let behind = LogBehind {
        through: Offset(10),
        end: Offset(15),
    };
    assert_refuses(&broker, behind).await;
    let to_seven = Renewal::Seek(Start::Offset(Offset(7)));
    broker
        .queue
        .renew_with(&name(), to_seven, None, OnLoss::Accept)
        .await
        .unwrap();
    assert_eq!(broker.take(9, HOUR).await.len(), 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_and_a_start_behind_the_end_are_no_log_that_is_behind() {
    let database = support::database().await;
    stopped(&database).await;
    let broker = Broker::on(&database).await;
    let later = queue::Declaration {
        start: Start::Offset(Offset(1_000)),
        ..declaration(at_once(16))
    };
    let other = postroad::domain::name::QueueName::parse("later").unwrap();
    broker.queue.declare(other.clone(), later).await.unwrap();
    broker.kill();
    // As retention leaves it: the leaf is empty, and the floor says so.
    execute(
        &database,
        "update postroad_broker.stream_head set floor = 10; truncate postroad_broker.message",
    )
    .await;
    let broker = Broker::on(&database).await;
    broker.publish("orders.created", 1).await;
    assert_eq!(broker.take(1, HOUR).await[0].entry.offset, Offset(11));
    let described = broker.queue.describe(&other).await.unwrap();
    assert_eq!(described.log_behind, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http_a_log_that_is_behind_is_a_problem_with_a_way_out() {
    let mut broker = support::broker().await;
    let consumer = support::Consumer::declare(
        &broker.http,
        "billing",
        &serde_json::json!({"topics": ["orders.*"]}),
    )
    .await;
    support::consumer::publish(&broker.http, "orders.created", 5).await;
    let taken = consumer.take(5, 3_600).await;
    let acks = support::consumer::items(&taken, &serde_json::json!({}));
    consumer.settle_all("ack", &acks, "acked").await;
    broker.stop().await;
    execute(
        &broker.database,
        "delete from postroad_broker.message where \"offset\" > 2",
    )
    .await;
    broker.restart().await;
    let ack = serde_json::json!({ "deliveries": acks });
    let (status, answer) = broker.http.post("/v1/queues/billing/ack", &ack).await;
    assert_eq!(
        (status.as_u16(), &answer["type"]),
        (409, &serde_json::json!("/problems/log-behind-queue"))
    );
    assert_eq!(
        (&answer["through_offset"], &answer["end_offset"]),
        (&serde_json::json!(5), &serde_json::json!(2))
    );
    let (_, queue) = broker.http.get("/v1/queues/billing").await;
    assert_eq!(
        queue["log_behind"],
        serde_json::json!({"through_offset": 5, "end_offset": 2})
    );
    let metrics = broker
        .http
        .client
        .get(format!("{}/metrics", broker.http.base));
    let metrics = metrics.send().await.unwrap().text().await.unwrap();
    assert!(
        metrics.contains("postroad_queues_log_behind 1"),
        "{metrics}"
    );
    let mut seek = serde_json::json!({"to": "latest"});
    let (status, answer) = broker.http.post("/v1/queues/billing/seek", &seek).await;
    assert_eq!(status.as_u16(), 409, "{answer}");
    seek["accept_loss"] = serde_json::json!(true);
    let sought = broker.http.ok("/v1/queues/billing/seek", &seek).await;
    assert_eq!(sought["through_offset"], 2);
    support::consumer::publish(&broker.http, "orders.created", 1).await;
    let consumer = support::Consumer {
        http: broker.http.clone(),
        ..consumer
    };
    assert_eq!(consumer.take(1, 60).await[0]["offset"], 3);
    let (_, queue) = broker.http.get("/v1/queues/billing").await;
    assert_eq!(queue["log_behind"], serde_json::Value::Null);
}
