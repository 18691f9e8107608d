//! The way of a message over HTTP: published, replayed, received, settled.

use serde_json::{Value, json};

use super::{Api, assert_problem};

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

#[tokio::test]
async fn messages_of_every_mode_come_out_as_they_went_in() {
    let api = Api::start().await;
    api.queue("all", json!({"topics": ["shop.>"]})).await;
    // Bytes that a JSON printer would change.
    let raw = "{\"b\" : 1.50, \"a\":\"\\u00e9\", \"big\":123456789012345678901234567890}";
    let event = format!(
        "{{\"specversion\":\"1.0\",\"id\":\"e1\",\"source\":\"/s\",\"type\":\"t\",\"data\":{raw}}}"
    );
    for (content_type, headers, body) in [
        (
            "application/x-www-form-urlencoded",
            vec![],
            raw.as_bytes().to_vec(),
        ),
        (
            "application/json",
            vec![
                ("ce-specversion", "1.0"),
                ("ce-id", "b%201"),
                ("ce-partitionkey", "k"),
            ],
            raw.as_bytes().to_vec(),
        ),
        (STRUCTURED, vec![], event.into_bytes()),
        (
            BATCH,
            vec![],
            b"[{\"specversion\":\"1.0\",\"id\":\"e2\"},{\"specversion\":\"1.0\"}]".to_vec(),
        ),
        ("text/plain", vec![], "caf\u{e9}".as_bytes().to_vec()),
        ("application/octet-stream", vec![], vec![0, 255]),
    ] {
        let published = api.publish("shop.a", content_type, &headers, body).await;
        assert_eq!(published.status, 200, "{content_type}: {published:?}");
        assert_eq!(published.body["messages"][0]["stream"], "main");
    }
    let response = api
        .client
        .post(api.url("/v1/queues/all/receive"))
        .json(&json!({"wait_seconds": 5}))
        .send()
        .await
        .unwrap();
    let text = response.text().await.unwrap();
    assert_eq!(text.matches(raw).count(), 3, "{text}");
    let received: Value = serde_json::from_str(&text).unwrap();
    let deliveries = received["deliveries"].as_array().unwrap();
    assert_eq!(deliveries.len(), 7);
    assert_eq!(deliveries[0]["event"]["type"], "shop.a");
    assert_eq!(deliveries[0]["event"]["source"], "/postroad/http");
    assert_eq!(deliveries[1]["event"]["id"], "b 1");
    assert_eq!(deliveries[1]["event"]["partitionkey"], "k");
    assert_eq!(deliveries[5]["event"]["data"], "caf\u{e9}");
    assert_eq!(deliveries[6]["event"]["data_base64"], "AP8=");
    let receipts: Vec<Value> = deliveries
        .iter()
        .map(|d| json!({"receipt": d["receipt"]}))
        .collect();
    let acked = api
        .post("/v1/queues/all/ack", json!({"deliveries": receipts}))
        .await;
    assert_eq!(
        (&acked.body["settled"], &acked.body["refused"]),
        (&json!(7), &json!(0))
    );
    let replayed = api
        .get("/v1/streams/main/messages?after=1&max_messages=2&topic=shop.*")
        .await;
    assert_eq!(
        replayed.body["messages"][0]["event"],
        deliveries[1]["event"]
    );
    assert_eq!(replayed.body["next_after"], 3);
    let keyed = api.get("/v1/streams/main/messages?key=k").await;
    assert_eq!(keyed.body["messages"].as_array().unwrap().len(), 1);
    let later = api
        .get("/v1/streams/main/messages?at=2100-01-01T00:00:00Z")
        .await;
    assert_eq!(later.body["messages"], json!([]));
    api.stop().await;
}

#[tokio::test]
async fn ids_make_publishing_repeatable() {
    let api = Api::start().await;
    let batch = "[{\"specversion\":\"1.0\",\"data\":1},{\"specversion\":\"1.0\",\"data\":2}]";
    let key = [("idempotency-key", "order-7")];
    let first = api.publish("a", BATCH, &key, batch).await;
    let again = api.publish("a", BATCH, &key, batch).await;
    for number in 0..2 {
        let (first, again) = (
            &first.body["messages"][number],
            &again.body["messages"][number],
        );
        assert_eq!(
            (&first["id"], &first["offset"]),
            (&again["id"], &again["offset"])
        );
        assert_eq!(
            (&first["duplicate"], &again["duplicate"]),
            (&json!(false), &json!(true))
        );
    }
    let changed = batch.replace(":2}", ":3}");
    let conflict = api.publish("a", BATCH, &key, changed).await;
    assert_problem(&conflict, 409, "id-conflict");
    // The key stands for the request as a whole.
    assert_eq!(conflict.body["errors"][1]["pointer"], "/1");
    let stream = api.get("/v1/streams/main").await;
    assert_eq!(stream.body["last_offset"], 2);
    api.stop().await;
}

#[tokio::test]
async fn verbs_answer_for_each_delivery() {
    let api = Api::start().await;
    api.queue(
        "q",
        json!({"visibility_timeout_seconds": 60, "retry": {"delays_seconds": [0]}}),
    )
    .await;
    let batch: Vec<Value> = (0..5)
        .map(|n| json!({"specversion": "1.0", "data": n}))
        .collect();
    api.publish("a", BATCH, &[], serde_json::to_vec(&batch).unwrap())
        .await;
    let received = api
        .receive("q", json!({"wait_seconds": 5, "consumer": "c1"}))
        .await;
    let receipts: Vec<Value> = received.body["deliveries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|delivery| delivery["receipt"].clone())
        .collect();
    assert_eq!(receipts.len(), 5);
    let live = api
        .get("/v1/queues/q/in-flight?consumer=c1&max_messages=3")
        .await;
    assert_eq!(live.body["deliveries"].as_array().unwrap().len(), 3);
    assert_eq!(live.body["next_after"], 3);
    for (verb, fields, result, field) in [
        ("ack", json!({}), "acked", None),
        (
            "nack",
            json!({"delay_seconds": 60, "reason": "no"}),
            "nacked",
            Some("due_at"),
        ),
        (
            "extend",
            json!({"visibility_timeout_seconds": 90}),
            "extended",
            Some("visible_until"),
        ),
        (
            "release",
            json!({"delay_seconds": 60}),
            "released",
            Some("due_at"),
        ),
        (
            "reject",
            json!({"reason": "no"}),
            "rejected",
            Some("dead_letter"),
        ),
    ]
    .into_iter()
    {
        let place = ["ack", "nack", "extend", "release", "reject"]
            .iter()
            .position(|v| *v == verb)
            .unwrap();
        let mut item = fields;
        item["receipt"] = receipts[place].clone();
        let body = json!({"deliveries": [item, {"receipt": "not a receipt"}]});
        let answer = api.post(&format!("/v1/queues/q/{verb}"), body).await;
        assert_eq!(answer.status, 200, "{verb}: {answer:?}");
        assert_eq!(
            (&answer.body["settled"], &answer.body["refused"]),
            (&json!(1), &json!(1))
        );
        assert_eq!(answer.body["deliveries"][0]["result"], result);
        assert_eq!(answer.body["deliveries"][1]["result"], "unknown");
        if let Some(field) = field {
            assert!(
                answer.body["deliveries"][0][field].is_string(),
                "{verb}: {answer:?}"
            );
        }
    }
    let described = api.get("/v1/queues/q").await;
    assert_eq!(described.body["status"]["in_flight"], 1, "{described:?}");
    let empty = api.receive("q", json!({"wait_seconds": 0})).await;
    assert_eq!(empty.body["deliveries"], json!([]));
    assert!(
        empty.body["reason"].is_string() && empty.body["next_due_at"].is_string(),
        "{empty:?}"
    );
    api.stop().await;
}

#[tokio::test]
async fn streams_and_queues_are_declared_described_and_deleted() {
    let api = Api::start().await;
    let orders = json!({"topics": ["orders.>"], "unsettled_retention_seconds": "unlimited"});
    assert_eq!(
        api.call("PUT", "/v1/streams/orders", Some(orders.clone()))
            .await
            .status,
        201
    );
    let again = api.call("PUT", "/v1/streams/orders", Some(orders)).await;
    assert_eq!(again.status, 200);
    assert_eq!(again.body["unsettled_retention_seconds"], "unlimited");
    let kept = json!({"topics": ["kept"], "settled_retention_seconds": "unlimited", "settled_retention_bytes": 5_000_000,
        "unsettled_retention_bytes": 9_000_000});
    let kept = api.call("PUT", "/v1/streams/kept", Some(kept)).await;
    assert_eq!(kept.status, 201, "{kept:?}");
    for (field, value) in [
        ("settled_retention_seconds", json!("unlimited")),
        ("settled_retention_bytes", json!(5_000_000)),
        ("unsettled_retention_seconds", json!("unlimited")),
        ("unsettled_retention_bytes", json!(9_000_000)),
    ] {
        assert_eq!(kept.body[field], value, "{field}");
    }
    for wrong in [
        json!({"topics": ["x"], "settled_retention_bytes": 5_000_000, "unsettled_retention_bytes": 4_000_000}),
        json!({"topics": ["x"], "settled_retention_bytes": 1_000}),
        json!({"topics": ["x"], "settled_retention_seconds": "unlimited", "unsettled_retention_seconds": 5}),
        json!({"topics": ["x"], "settled_retention_seconds": "for ever"}),
    ] {
        let refused = api.call("PUT", "/v1/streams/x", Some(wrong)).await;
        assert_problem(&refused, 422, "invalid-request");
    }
    assert_eq!(
        api.call("DELETE", "/v1/streams/kept", None).await.status,
        204
    );
    let overlap = json!({"topics": ["orders.created"]});
    let overlap = api.call("PUT", "/v1/streams/other", Some(overlap)).await;
    assert_problem(&overlap, 409, "stream-overlap");
    let queue = json!({
        "stream": "orders", "topics": ["orders.*"], "start": {"offset": 1}, "max_attempts": 3,
        "visibility_timeout_seconds": 1.5, "retry": {"initial_seconds": 0.5},
    });
    assert_eq!(
        api.call("PUT", "/v1/queues/billing", Some(queue.clone()))
            .await
            .status,
        201
    );
    let again = api.call("PUT", "/v1/queues/billing", Some(queue)).await;
    assert_eq!(
        (again.status, &again.body["generation"]),
        (200, &json!(1)),
        "{again:?}"
    );
    assert_eq!(again.body["visibility_timeout_seconds"], 1.5);
    assert_eq!(again.body["retry"]["initial_seconds"], 0.5);
    let moved = json!({"stream": "main"});
    let moved = api.call("PUT", "/v1/queues/billing", Some(moved)).await;
    assert_problem(&moved, 409, "queue-stream-fixed");
    assert_eq!(
        api.get("/v1/queues").await.body["queues"][0]["name"],
        "billing"
    );
    assert_eq!(
        api.get("/v1/streams").await.body["streams"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let kept = api.call("DELETE", "/v1/streams/orders", None).await;
    assert_problem(&kept, 409, "stream-has-queues");
    let main = api.call("DELETE", "/v1/streams/main", None).await;
    assert_problem(&main, 409, "stream-is-kept");
    assert_eq!(
        api.call("DELETE", "/v1/queues/billing", None).await.status,
        204
    );
    assert_eq!(
        api.call("DELETE", "/v1/streams/orders", None).await.status,
        204
    );
    assert_problem(
        &api.get("/v1/streams/orders").await,
        404,
        "stream-not-found",
    );
    assert_problem(&api.get("/v1/queues/billing").await, 404, "queue-not-found");
    api.stop().await;
}

#[tokio::test]
async fn the_process_describes_itself() {
    let api = Api::start().await;
    assert_eq!(api.get("/healthz").await.body["status"], "ok");
    assert_eq!(api.get("/readyz").await.status, 200);
    api.readiness.not_ready("cluster", "the heartbeat is late");
    let ready = api.get("/readyz").await;
    assert_eq!(
        (ready.status, &ready.body["reasons"][0]["part"]),
        (503, &json!("cluster"))
    );
    api.readiness.ready("cluster");
    let metrics = api.get("/metrics").await;
    let text = metrics.body.as_str().unwrap();
    assert!(
        text.contains(
            "postroad_http_requests_total{method=\"GET\",route=\"/readyz\",status=\"503\"} 1"
        ),
        "{text}"
    );
    let kind = &metrics.headers["content-type"];
    assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8");
    let yaml = api.get("/openapi.yaml").await;
    assert_eq!(yaml.body.as_str().unwrap(), postroad::http::openapi_yaml());
    let page = api.get("/problems/queue-not-found").await;
    assert!(
        page.body
            .as_str()
            .unwrap()
            .starts_with("# There is no such queue")
    );
    assert_problem(&api.get("/problems/nothing").await, 404, "not-found");
    let origins = api.get("/v1/origins").await;
    assert_eq!(origins.body["origins"][0]["name"], "local");
    assert_eq!(
        api.get("/v1/origins/local/rejected").await.body["rejected"],
        json!([])
    );
    let resent = api
        .post("/v1/origins/local/rejected/7/resend", json!({}))
        .await;
    assert_problem(&resent, 404, "rejected-message-not-found");
    assert_problem(
        &api.get("/v1/origins/nothing").await,
        404,
        "origin-not-found",
    );
    api.stop().await;
}
