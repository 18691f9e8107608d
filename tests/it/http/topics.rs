//! Settings of topics: schemas, sizes and rates of what is published over HTTP, and schemas of what comes out of an outbox.

use serde_json::{Value, json};

use super::{Answer, Api, assert_problem};
use crate::relay::{Origin, execute};
use crate::support;

const BATCH: &str = "application/cloudevents-batch+json";
const STRUCTURED: &str = "application/cloudevents+json";

fn order() -> Value {
    json!({"type": "object", "required": ["order"], "properties": {"order": {"type": "integer", "minimum": 1}}})
}

async fn declare(api: &Api, topic: &str, body: Value) -> Answer {
    api.call("PUT", &format!("/v1/topics/{topic}"), Some(body))
        .await
}

async fn last_offset(api: &Api) -> i64 {
    let main = api.get("/v1/streams/main").await;
    main.body["last_offset"].as_i64().unwrap()
}

fn pointers(answer: &Answer) -> Vec<&str> {
    let errors = answer.body["errors"].as_array().unwrap();
    errors
        .iter()
        .map(|error| error["pointer"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn settings_are_declared_described_listed_and_deleted() {
    let api = Api::start().await;
    let settings = json!({"schema": order(), "max_bytes": 100, "rate_per_second": 0.5, "burst": 3});
    let declared = declare(&api, "orders.created", settings.clone()).await;
    assert_eq!(declared.status, 201, "{declared:?}");
    assert_eq!(
        declare(&api, "orders.created", settings.clone())
            .await
            .status,
        200
    );
    assert_eq!(
        declare(&api, "orders.%3E", json!({"max_bytes": 5}))
            .await
            .status,
        201
    );
    let found = api.get("/v1/topics/orders.created").await;
    for (member, value) in settings.as_object().unwrap() {
        assert_eq!(&found.body[member], value, "{found:?}");
    }
    let listed = api.get("/v1/topics").await;
    let topics: Vec<_> = listed.body["topics"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| (&t["topic"], &t["has_schema"]))
        .collect();
    assert_eq!(
        topics,
        [
            (&json!("orders.>"), &json!(false)),
            (&json!("orders.created"), &json!(true))
        ]
    );
    // What is left out is not limited any more.
    assert_eq!(
        declare(&api, "orders.created", json!({})).await.body["max_bytes"],
        Value::Null
    );
    assert_eq!(
        api.call("DELETE", "/v1/topics/orders.created", None)
            .await
            .status,
        204
    );
    for method in ["GET", "DELETE"] {
        let gone = api.call(method, "/v1/topics/orders.created", None).await;
        assert_problem(&gone, 404, "topic-settings-not-found");
    }
    api.stop().await;
}

#[tokio::test]
async fn what_cannot_be_declared_is_named() {
    let api = Api::start().await;
    for (topic, body, pointer) in [
        ("a", json!({"schema": {"type": "text"}}), "/schema"),
        ("a", json!({"schema": 7}), "/schema"),
        (
            "a",
            json!({"schema": {"$ref": "https://example.com/s.json"}}),
            "/schema",
        ),
        ("a", json!({"schema": {"$ref": "#"}}), "/schema"),
        (
            "a",
            json!({"schema": {"title": "x".repeat(70_000)}}),
            "/schema",
        ),
        ("a", json!({"max_bytes": 0}), "/max_bytes"),
        ("a", json!({"max_bytes": 16_777_217}), "/max_bytes"),
        ("a", json!({"rate_per_second": 0}), "/rate_per_second"),
        ("a", json!({"burst": 1}), "/burst"),
        ("a", json!({"rate": 1}), "/rate"),
    ] {
        let refused = declare(&api, topic, body.clone()).await;
        assert_problem(&refused, 422, "invalid-request");
        assert_eq!(pointers(&refused), [pointer], "{body}");
    }
    assert_problem(
        &declare(&api, "a..b", json!({})).await,
        422,
        "invalid-request",
    );
    assert_eq!(api.get("/v1/topics").await.body["topics"], json!([]));
    api.stop().await;
}

#[tokio::test]
async fn payloads_over_http_must_match_the_schema_of_their_topic() {
    let api = Api::start().await;
    declare(&api, "orders.*", json!({"schema": order()})).await;
    let plain = |body: &'static str| api.publish("orders.created", "application/json", &[], body);
    assert_eq!(plain(r#"{"order": 1}"#).await.status, 200);
    let refused = plain(r#"{"order": "one"}"#).await;
    assert_problem(&refused, 422, "schema-mismatch");
    assert_eq!(pointers(&refused), [""]);
    let detail = refused.body["errors"][0]["detail"].as_str().unwrap();
    assert!(
        detail.contains("at /order of the payload") && !detail.contains("one"),
        "{detail}"
    );
    assert_problem(
        &api.publish("orders.created", "text/plain", &[], "x").await,
        422,
        "schema-mismatch",
    );
    assert_problem(
        &api.publish(
            "orders.created",
            "application/json",
            &[
                ("ce-specversion", "1.0"),
                ("ce-id", "1"),
                ("ce-source", "/s"),
                ("ce-type", "t"),
            ],
            "{}",
        )
        .await,
        422,
        "schema-mismatch",
    );
    let event = json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t"});
    assert_problem(
        &api.publish("orders.created", STRUCTURED, &[], event.to_string())
            .await,
        422,
        "schema-mismatch",
    );
    // A batch, and several topics: all or nothing, and the items are named.
    let event = |id: &str, order: i64| json!({"specversion": "1.0", "id": id, "source": "/s", "type": "t", "data": {"order": order}});
    let batch = json!([event("a", 1), event("b", 0), event("c", 2), event("d", -1)]);
    let refused = api
        .publish("orders.created", BATCH, &[], batch.to_string())
        .await;
    assert_problem(&refused, 422, "schema-mismatch");
    assert_eq!(pointers(&refused), ["/1", "/3"]);
    let together = json!({"messages": [
        {"topic": "orders.created", "data": {"order": 1}},
        {"topic": "elsewhere", "data": {}},
        {"topic": "orders.paid", "data": {}},
    ]});
    let refused = api.post("/v1/messages", together).await;
    assert_problem(&refused, 422, "schema-mismatch");
    assert_eq!(pointers(&refused), ["/messages/2"]);
    assert_eq!(last_offset(&api).await, 1, "nothing else was published");
    // Another topic is asked nothing; and without the settings neither is this one.
    assert_eq!(
        api.publish("orders.created.late", "text/plain", &[], "x")
            .await
            .status,
        200
    );
    api.call("DELETE", "/v1/topics/orders.*", None).await;
    assert_eq!(plain("{}").await.status, 200);
    api.stop().await;
}

#[tokio::test]
async fn sizes_and_rates_are_limited_by_topic() {
    let api = Api::start().await;
    declare(&api, "small.%3E", json!({"max_bytes": 10})).await;
    assert_eq!(
        api.publish("small.a", "text/plain", &[], "0123456789")
            .await
            .status,
        200
    );
    let refused = api
        .publish("small.a", "text/plain", &[], "0123456789a")
        .await;
    assert_problem(&refused, 413, "message-too-large");
    assert_eq!(refused.body["limit_bytes"], 10);

    declare(&api, "slow", json!({"rate_per_second": 0.01, "burst": 3})).await;
    let publish = |count: usize| {
        let items: Vec<Value> = (0..count).map(|_| json!({"topic": "slow"})).collect();
        api.post("/v1/messages", json!({"messages": items}))
    };
    assert_eq!(publish(2).await.status, 200);
    let refused = publish(2).await;
    assert_problem(&refused, 429, "rate-limited");
    assert_eq!(refused.body["topics"], "slow");
    let seconds: u64 = refused.headers["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((90..=101).contains(&seconds), "{seconds}");
    // All or nothing: what is refused takes nothing.
    assert_eq!(publish(1).await.status, 200);
    assert_problem(&publish(1).await, 429, "rate-limited");
    assert_eq!(
        api.publish("fast", "text/plain", &[], "x").await.status,
        200
    );
    assert_eq!(last_offset(&api).await, 5);
    api.stop().await;
}

/// A row that does not match is listed with all that it has, holds up nothing, and can be sent on: corrected, or as it is.
#[tokio::test(flavor = "multi_thread")]
async fn outbox_rows_that_do_not_match_are_rejected_and_can_be_sent_on() {
    let api = Api::start().await;
    declare(
        &api,
        "orders.*",
        json!({"schema": order(), "max_bytes": 10, "rate_per_second": 0.001, "burst": 1}),
    )
    .await;
    let origin = Origin::install(&api.database.url).await;
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        r#"insert into postroad.outbox (topic, id, payload, headers) values
            ('orders.a', '1', '{"order": 1, "more": "than ten bytes"}', null),
            ('orders.a', '2', '{"order": "two"}', '{"traceparent": "00-1", "n": 3}'),
            ('orders.a', '3', repeat('x', 2000000), null),
            ('orders.a', '4', '{"order": 4}', null)"#,
    )
    .await;
    support::eventually("the rows to be relayed", || async {
        (last_offset(&api).await == 2).then_some(())
    })
    .await;
    let rejected = api.get("/v1/origins/local/rejected").await;
    let rows = rejected.body["rejected"].as_array().unwrap();
    assert_eq!(rows.len(), 2, "{rejected:?}");
    let reason = rows[0]["reason"].as_str().unwrap();
    assert!(
        reason.contains("does not match the schema of `orders.*` at /order"),
        "{reason}"
    );
    assert_eq!(rows[1]["row"]["payload"].as_str().unwrap().len(), 2_000_000);
    let path = |row: &Value| format!("/v1/origins/local/rejected/{}/resend", row["id"]);
    let first = path(&rows[0]);
    assert_problem(&api.post(&first, json!({})).await, 409, "not-resendable");
    let corrected = json!({"payload": "{\"order\": 2}"});
    let corrected = api.post(&first, corrected).await;
    assert_eq!(corrected.status, 200, "{corrected:?}");
    let as_it_is = api
        .post(&path(&rows[1]), json!({"skip_schema": true}))
        .await;
    assert_eq!(as_it_is.status, 200, "{as_it_is:?}");
    let read = api.get("/v1/streams/main/messages").await;
    let events: Vec<&Value> = read.body["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["event"])
        .collect();
    let ids: Vec<&str> = events
        .iter()
        .map(|event| event["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["1", "4", "2", "3"]);
    assert_eq!(
        (&events[2]["traceparent"], &events[2]["n"]),
        (&json!("00-1"), &json!(3))
    );
    api.stop().await;
}
