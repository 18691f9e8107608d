//! Publishing to several topics at once, repeats under an `Idempotency-Key`, and what travels with a message.

use serde_json::{Value, json};

use super::{Answer, Api, answer, assert_problem};

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";
const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

async fn publish_together(api: &Api, headers: &[(&str, &str)], body: &Value) -> Answer {
    let mut request = api.client.post(api.url("/v1/messages")).json(body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    answer(request.send().await.unwrap()).await
}

async fn last_offsets(api: &Api, streams: &[&str]) -> Vec<i64> {
    let mut offsets = Vec::new();
    for stream in streams {
        let described = api.get(&format!("/v1/streams/{stream}")).await;
        offsets.push(described.body["last_offset"].as_i64().unwrap());
    }
    offsets
}

#[tokio::test]
async fn several_topics_and_streams_get_all_or_nothing() {
    let api = Api::start().await;
    for stream in ["orders", "audit"] {
        let topics = json!({"topics": [format!("{stream}.>")]});
        let path = format!("/v1/streams/{stream}");
        assert_eq!(api.call("PUT", &path, Some(topics)).await.status, 201);
    }
    let streams = ["orders", "audit", "main"];
    let body = json!({"messages": [
        {"topic": "orders.created", "key": "c7", "data": {"order": 1}},
        {"topic": "audit.orders", "event": {"specversion": "1.0", "id": "a1", "source": "/shop", "data": "x"}},
        {"topic": "orders.paid", "key": "c7", "data": {"order": 1}},
        {"topic": "elsewhere"},
    ]});
    let published = publish_together(&api, &[], &body).await;
    assert_eq!(published.status, 200, "{published:?}");
    let messages = published.body["messages"].as_array().unwrap();
    let places: Vec<(&str, i64)> = messages
        .iter()
        .map(|m| (m["stream"].as_str().unwrap(), m["offset"].as_i64().unwrap()))
        .collect();
    assert_eq!(
        places,
        [("orders", 1), ("audit", 1), ("orders", 2), ("main", 1)]
    );
    assert_eq!(messages[1]["id"], "a1");
    let replayed = api.get("/v1/streams/orders/messages").await;
    assert_eq!(
        replayed.body["messages"][0]["event"]["data"],
        json!({"order": 1})
    );
    assert_eq!(replayed.body["messages"][0]["event"]["partitionkey"], "c7");

    // Each fault refuses all of it, and names its item.
    for (item, status, slug, pointer) in [
        (
            json!({"topic": "orders.*"}),
            422,
            "invalid-message",
            "/messages/1/topic",
        ),
        (
            json!({"topic": "a", "event": {"specversion": "0.3"}}),
            422,
            "invalid-message",
            "/messages/1/event/specversion",
        ),
        (
            json!({"topic": "audit.orders", "event": {"specversion": "1.0", "id": "a1", "source": "/shop", "data": "y"}}),
            409,
            "id-conflict",
            "/messages/1",
        ),
        (
            json!({"topic": "a", "data": "x".repeat(1 << 20)}),
            413,
            "message-too-large",
            "/messages/1",
        ),
    ] {
        let body =
            json!({"messages": [{"topic": "orders.created"}, item, {"topic": "main.other"}]});
        let refused = publish_together(&api, &[], &body).await;
        assert_problem(&refused, status, slug);
        assert_eq!(refused.body["errors"][0]["pointer"], pointer);
    }
    let text = api
        .client
        .post(api.url("/v1/messages"))
        .header("content-type", "text/plain")
        .body("x");
    assert_problem(
        &answer(text.send().await.unwrap()).await,
        415,
        "unsupported-media-type",
    );
    let empty = api.client.post(api.url("/v1/messages"));
    assert_problem(
        &answer(empty.send().await.unwrap()).await,
        400,
        "malformed-request",
    );
    assert_eq!(last_offsets(&api, &streams).await, [2, 1, 1]);
    let none = publish_together(&api, &[], &json!({"messages": []})).await;
    assert_eq!((none.status, &none.body["messages"]), (200, &json!([])));
    api.stop().await;
}

#[tokio::test]
async fn a_key_stands_for_one_request() {
    let api = Api::start().await;
    let topics = json!({"topics": ["orders.>"]});
    assert_eq!(
        api.call("PUT", "/v1/streams/orders", Some(topics))
            .await
            .status,
        201
    );
    let key = [("idempotency-key", "checkout-7")];
    let item = |topic: &str, data: u32| json!({"topic": topic, "data": data});
    let first = json!({"messages": [
        item("orders.created", 1), item("mails", 2),
        {"topic": "mails", "event": {"specversion": "1.0", "id": "own", "source": "/s", "data": 3}},
    ]});
    let published = publish_together(&api, &key, &first).await;
    assert_eq!(published.status, 200, "{published:?}");
    // The trace of a repeat is its own.
    let repeated = publish_together(
        &api,
        &[("idempotency-key", "checkout-7"), ("traceparent", TRACE)],
        &first,
    )
    .await;
    for number in 0..3 {
        let (first, again) = (
            &published.body["messages"][number],
            &repeated.body["messages"][number],
        );
        assert_eq!(again["duplicate"], true, "{repeated:?}");
        for member in ["id", "stream", "offset"] {
            assert_eq!(first[member], again[member]);
        }
    }
    // The same key for anything else is refused: changed, more, less, in another order.
    for (other, conflicts) in [
        (vec![item("orders.created", 1), item("mails", 9)], 2),
        (vec![item("orders.created", 1)], 1),
        (
            vec![
                item("orders.created", 1),
                item("mails", 2),
                first["messages"][2].clone(),
                item("mails", 4),
            ],
            2,
        ),
        (vec![item("orders.other", 1), item("mails", 2)], 2),
    ] {
        let conflict = publish_together(&api, &key, &json!({"messages": other})).await;
        assert_problem(&conflict, 409, "id-conflict");
        let errors = conflict.body["errors"].as_array().unwrap();
        assert_eq!(errors.len(), conflicts, "{conflict:?}");
        assert_eq!(errors[0]["pointer"], "/messages/0");
    }
    // On its own, a message with an id of its own is the same whatever it came with.
    let alone = json!({"messages": [first["messages"][2]]});
    let alone = publish_together(&api, &[], &alone).await;
    assert_eq!(alone.body["messages"][0]["duplicate"], true);
    // A topic's own path is another request.
    let single = api.publish("mails", "application/json", &key, "2").await;
    assert_eq!(single.body["messages"][0]["duplicate"], false);
    let single = api.publish("mails", "application/json", &key, "2").await;
    assert_eq!(single.body["messages"][0]["duplicate"], true);
    let conflict = api.publish("mails", "application/json", &key, "3").await;
    assert_problem(&conflict, 409, "id-conflict");
    assert_eq!(conflict.body["errors"][0]["pointer"], "");
    let grown = "[{\"specversion\":\"1.0\",\"data\":2,\"datacontenttype\":\"application/json\"},{\"specversion\":\"1.0\"}]";
    let conflict = api.publish("mails", BATCH, &key, grown).await;
    assert_problem(&conflict, 409, "id-conflict");
    assert_eq!(last_offsets(&api, &["orders", "main"]).await, [1, 3]);
    api.stop().await;
}

#[tokio::test]
async fn a_changed_message_is_no_repeat() {
    let api = Api::start().await;
    let soon = (chrono::Utc::now() + chrono::TimeDelta::days(1)).to_rfc3339();
    let later = (chrono::Utc::now() + chrono::TimeDelta::days(30)).to_rfc3339();
    let original = [
        ("ce-partitionkey", "k"),
        ("ce-type", "t"),
        ("ce-subject", "s"),
        ("ce-dataschema", "/d"),
        ("ce-ext", "1"),
        ("ce-deliverat", &*soon),
        ("ce-time", "2026-01-01T00:00:00Z"),
        ("traceparent", TRACE),
    ];
    // Known by the key of the request, and by an id of its own.
    for (name, value) in [("idempotency-key", "checkout-7"), ("ce-id", "own")] {
        let publish = async |changed: (&'static str, &str), content_type: &str| {
            let mut headers: Vec<(&str, &str)> = vec![(name, value)];
            headers.extend(original.iter().filter(|(name, _)| *name != changed.0));
            if !changed.1.is_empty() {
                headers.push(changed);
            }
            api.publish("orders", content_type, &headers, "1").await
        };
        let json = "application/json";
        let first = publish(("x-none", ""), json).await;
        assert_eq!(first.body["messages"][0]["duplicate"], false, "{first:?}");
        for (changed, to) in [
            ("ce-partitionkey", "other"),
            ("ce-partitionkey", ""),
            ("ce-type", "other"),
            ("ce-subject", "other"),
            ("ce-dataschema", ""),
            ("ce-ext", "2"),
            ("ce-more", "1"),
            ("ce-deliverat", &*later),
            ("ce-deliverat", ""),
        ] {
            let refused = publish((changed, to), json).await;
            assert_problem(&refused, 409, "id-conflict");
        }
        let refused = publish(("x-none", ""), "application/vnd.a+json").await;
        assert_problem(&refused, 409, "id-conflict");
        // What is of the sending may be another one.
        for (changed, to) in [
            ("x-none", ""),
            ("ce-time", "2026-01-01T00:00:01Z"),
            ("ce-time", ""),
            ("traceparent", ""),
            ("ce-recordedtime", "2026-01-01T00:00:01Z"),
        ] {
            let again = publish((changed, to), json).await;
            assert_eq!(
                again.body["messages"][0]["duplicate"], true,
                "{changed}: {again:?}"
            );
            assert_eq!(
                again.body["messages"][0]["scheduled"],
                first.body["messages"][0]["scheduled"]
            );
        }
    }
    api.stop().await;
}

#[tokio::test]
async fn what_travels_with_a_message_arrives_untouched() {
    let api = Api::start().await;
    api.queue("all", json!({"topics": [">"]})).await;
    let own = "00-11111111111111111111111111111111-2222222222222222-00";
    let trace = [("traceparent", TRACE), ("tracestate", "vendor=1")];
    let event = |rest: Value| {
        let mut event = json!({"specversion": "1.0", "source": "/s", "type": "t", "data": 1});
        event
            .as_object_mut()
            .unwrap()
            .extend(rest.as_object().unwrap().clone());
        event
    };
    let carried = json!({
        "traceparent": own, "tracestate": "other=2", "comexampleflag": true, "sequence": -7,
        "baggage": "a=b;c, d=\"é\"", "priority": "high",
    });
    for (topic, content_type, headers, body) in [
        ("a", STRUCTURED, &trace[..], event(carried.clone())),
        ("b", STRUCTURED, &trace[..], event(json!({"id": "b"}))),
        ("c", STRUCTURED, &trace[1..], event(json!({"id": "c"}))),
    ] {
        let published = api
            .publish(topic, content_type, headers, body.to_string())
            .await;
        assert_eq!(published.status, 200, "{published:?}");
    }
    let binary = [
        ("ce-specversion", "1.0"),
        ("ce-id", "d"),
        ("ce-source", "/s"),
        ("ce-type", "t"),
        ("ce-traceparent", own),
        ("ce-sequence", "7"),
        ("traceparent", TRACE),
    ];
    let published = api.publish("d", "application/json", &binary, "1").await;
    assert_eq!(published.status, 200, "{published:?}");
    let together = json!({"messages": [
        {"topic": "e", "event": event(carried.clone())}, {"topic": "f", "data": 1},
    ]});
    let published = publish_together(&api, &trace, &together).await;
    assert_eq!(published.status, 200, "{published:?}");
    let mut producer = api.database.connect().await;
    sqlx::query(
        "insert into postroad.outbox (topic, id, headers) values ('g', 'own', $1::text::jsonb), ('h', 'plain', null)",
    )
    .bind(
        json!({"traceparent": own, "tracestate": "other=2", "comexampleflag": true, "sequence": -7,
            "baggage": "a=b;c, d=\"é\"", "priority": "high"})
        .to_string(),
    )
    .execute(&mut producer)
    .await
    .unwrap();

    let mut events: Vec<(String, Value)> = Vec::new();
    while events.len() < 8 {
        let received = api
            .receive("all", json!({"wait_seconds": 5, "max_messages": 100}))
            .await;
        for delivery in received.body["deliveries"].as_array().unwrap() {
            let topic = delivery["topic"].as_str().unwrap().to_owned();
            events.push((topic, delivery["event"].clone()));
        }
    }
    for (topic, event) in &events {
        let member = |name: &str| event.get(name).and_then(Value::as_str);
        match topic.as_str() {
            "a" | "e" | "g" => {
                for (name, value) in carried.as_object().unwrap() {
                    assert_eq!(&event[name], value, "{topic}: {name}");
                }
            }
            "b" | "f" => {
                assert_eq!(member("traceparent"), Some(TRACE), "{topic}");
                assert_eq!(member("tracestate"), Some("vendor=1"), "{topic}");
            }
            "d" => {
                assert_eq!(member("traceparent"), Some(own));
                assert_eq!(event.get("tracestate"), None);
                assert_eq!(member("sequence"), Some("7"));
            }
            _ => assert_eq!(event.get("traceparent"), None, "{topic}"),
        }
    }
    api.stop().await;
}
