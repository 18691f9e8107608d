//! The library's way into the outbox, with a producer's rights, and what arrives.

use postroad::outbox::{self, Error, Message};
use postroad::store::migrate;
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::support;

#[tokio::test]
async fn what_the_library_publishes_arrives_if_it_commits() {
    let broker = support::broker().await;
    let mut producer = PgConnection::connect(&broker.database.url).await.unwrap();
    producer
        .execute(sqlx::AssertSqlSafe(format!(
            "set role {}",
            broker.database.role("producer")
        )))
        .await
        .unwrap();
    let mut lost = producer.begin().await.unwrap();
    outbox::publish(&mut lost, &Message::new("rolled.back"))
        .await
        .unwrap();
    lost.rollback().await.unwrap();

    let mut tx = producer.begin().await.unwrap();
    outbox::lock_key(&mut tx, "tea").await.unwrap();
    let full = Message::json("orders.created", &json!({"order": 1, "text": "a\\b"}))
        .unwrap()
        .key("tea")
        .kind("created")
        .id("order-1")
        .source("/shop")
        .subject("stock")
        .data_schema("/schemas/order")
        .header("traceparent", "00-1")
        .header("sequence", 7);
    assert_eq!(outbox::publish(&mut tx, &full).await.unwrap(), "order-1");
    let made = outbox::publish(&mut tx, &Message::new("orders.empty"))
        .await
        .unwrap();
    outbox::publish(&mut tx, &Message::text("notes", "caf\u{e9}", "text/plain"))
        .await
        .unwrap();
    let image = Message::bytes("images", [0, 255], "image/png");
    outbox::publish(&mut tx, &image).await.unwrap();
    tx.commit().await.unwrap();

    let messages = support::eventually("all four are in the stream", || async {
        let (_, page) = broker.http.get("/v1/streams/main/messages").await;
        let messages = page["messages"].as_array().unwrap().clone();
        (messages.len() == 4).then_some(messages)
    })
    .await;
    let event = |number: usize| -> &Value { &messages[number]["event"] };
    let time = &event(0)["time"];
    assert_eq!(
        event(0),
        &json!({
            "specversion": "1.0", "id": "order-1", "source": "/shop", "type": "created", "subject": "stock", "time": time,
            "datacontenttype": "application/json", "dataschema": "/schemas/order", "partitionkey": "tea",
            "traceparent": "00-1", "sequence": 7, "data": {"order": 1, "text": "a\\b"},
        })
    );
    assert_eq!(event(1)["id"], made);
    let source = format!("/postroad/{}", broker.database.name);
    assert_eq!(event(1)["source"], source);
    assert_eq!(
        (event(1).get("data"), &event(1)["type"]),
        (None, &json!("orders.empty"))
    );
    assert_eq!(event(2)["data"], "caf\u{e9}");
    assert_eq!(event(3)["data_base64"], "AP8=");
    // A delivery has the very same events, trace and extensions and all.
    let settings = json!({"stream": "main", "start": "earliest"});
    let consumer = support::Consumer::declare(&broker.http, "copies", &settings).await;
    let deliveries = consumer.take(4, 60).await;
    for (number, delivery) in deliveries.iter().enumerate() {
        assert_eq!(&delivery["event"], event(number));
    }
}

#[tokio::test]
async fn what_cannot_become_a_message_is_refused_with_the_reason() {
    let database = support::database().await;
    // Roles are made by an install under the database's own name.
    migrate::origin(&database.database).await.unwrap();
    let mut producer = database.connect().await;
    for (message, expected) in [
        (Message::new("a..b"), "outbox_topic_is_valid"),
        (Message::new("a").key(""), "outbox_key_is_1_to_512_bytes"),
        (
            Message::new("a").header("A", 1),
            "outbox_headers_are_extension_attributes",
        ),
        (
            Message::new("a").header("a", 1.5),
            "outbox_headers_are_extension_attributes",
        ),
        (Message::bytes("a", "x", ""), "outbox_content_type_is_valid"),
    ] {
        let mut tx = producer.begin().await.unwrap();
        let refused = outbox::publish(&mut tx, &message).await;
        let Err(Error::Refused { constraint, .. }) = refused else {
            panic!("{message:?}: {refused:?}");
        };
        assert_eq!(constraint, expected);
    }
    let mut tx = producer.begin().await.unwrap();
    tx.execute(sqlx::AssertSqlSafe(format!(
        "set local role {}",
        database.role("relay")
    )))
    .await
    .unwrap();
    let refused = outbox::publish(&mut tx, &Message::new("a")).await;
    assert!(matches!(refused, Err(Error::Database(_))), "{refused:?}");
}
