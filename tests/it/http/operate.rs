//! What people do to queues over HTTP: seek, purge, pause, single messages, searches, deliveries ended, the retry policy.

use serde_json::{Value, json};

use super::{Answer, Api, assert_problem};
use crate::support::eventually;

async fn publish(api: &Api, topic: &str, ids: &[&str], key: Option<&str>) {
    let events: Vec<Value> = ids
        .iter()
        .map(|id| {
            let mut event = json!({"specversion": "1.0", "id": id, "source": "/t", "type": "t", "data": {"id": id}});
            if let Some(key) = key {
                event["partitionkey"] = json!(key);
            }
            event
        })
        .collect();
    let body = serde_json::to_vec(&events).unwrap();
    let sent = api
        .publish(topic, "application/cloudevents-batch+json", &[], body)
        .await;
    assert_eq!(sent.status, 200, "{sent:?}");
}

async fn take(api: &Api, queue: &str, count: usize, consumer: &str) -> Vec<Value> {
    let mut taken = Vec::new();
    while taken.len() < count {
        let body =
            json!({"max_messages": count - taken.len(), "wait_seconds": 10, "consumer": consumer});
        let answer = api.receive(queue, body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        taken.extend(
            answer.body["deliveries"]
                .as_array()
                .unwrap()
                .iter()
                .cloned(),
        );
    }
    taken
}

async fn settle(api: &Api, queue: &str, verb: &str, mut item: Value, delivery: &Value) -> Value {
    item["receipt"] = delivery["receipt"].clone();
    let path = format!("/v1/queues/{queue}/{verb}");
    let answer = api.post(&path, json!({"deliveries": [item]})).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body["deliveries"][0].clone()
}

fn ok(answer: Answer) -> Value {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

#[tokio::test]
async fn a_queue_is_sought_purged_paused_and_resumed() {
    let api = Api::start().await;
    api.queue("q", json!({"topics": ["a"]})).await;
    publish(&api, "a", &["1", "2", "3"], None).await;
    let taken = take(&api, "q", 3, "c").await;
    let purged = ok(api
        .post("/v1/queues/q/purge", json!({"expected_generation": 1}))
        .await);
    let expected = json!({"generation": 2, "through_offset": 3, "at_floor": false, "ahead": false});
    assert_eq!(purged, expected);
    let again = ok(api
        .post("/v1/queues/q/purge", json!({"expected_generation": 1}))
        .await);
    assert_eq!(again, expected, "a repeat");
    let moved = api
        .post(
            "/v1/queues/q/seek",
            json!({"to": "latest", "expected_generation": 1}),
        )
        .await;
    assert_problem(&moved, 409, "generation-moved");
    assert_eq!(moved.body["generation"], 2);
    let outcome = settle(&api, "q", "ack", json!({}), &taken[0]).await;
    assert_eq!(outcome["result"], "gone");
    for (to, through) in [
        (json!("earliest"), 0),
        (json!("latest"), 3),
        (json!({"offset": 2}), 1),
        (json!({"time": "2020-01-01T00:00:00Z"}), 0),
    ] {
        let sought = ok(api.post("/v1/queues/q/seek", json!({"to": to})).await);
        assert_eq!(sought["through_offset"], through, "{to}");
    }
    assert_eq!(take(&api, "q", 3, "c").await[2]["event"]["id"], "3");
    for (body, pointer) in [
        (json!({}), "/to"),
        (json!({"to": "middle"}), "/to"),
        (json!({"to": {"offset": 0}}), "/to/offset"),
        (json!({"to": {"time": "now"}}), "/to/time"),
        (
            json!({"to": "latest", "expected_generation": 0}),
            "/expected_generation",
        ),
    ] {
        let refused = api.post("/v1/queues/q/seek", body.clone()).await;
        assert_problem(&refused, 422, "invalid-request");
        assert_eq!(
            refused.body["errors"][0]["pointer"], pointer,
            "{body}: {refused:?}"
        );
    }
    for verb in ["seek", "purge", "pause", "resume"] {
        let path = format!("/v1/queues/nobody/{verb}");
        let missing = api.post(&path, json!({"to": "latest"})).await;
        let expected = if verb == "purge" { 422 } else { 404 };
        assert_eq!(missing.status, expected, "{verb}: {missing:?}");
    }
    for _ in 0..2 {
        assert_eq!(
            ok(api.call("POST", "/v1/queues/q/pause", None).await),
            json!({"paused": true})
        );
    }
    assert_eq!(ok(api.get("/v1/queues/q").await)["paused"], true);
    let empty = ok(api.receive("q", json!({"wait_seconds": 0})).await);
    assert_eq!(empty["reason"], "paused");
    for _ in 0..2 {
        assert_eq!(
            ok(api.call("POST", "/v1/queues/q/resume", None).await),
            json!({"paused": false})
        );
    }
    api.stop().await;
}

#[tokio::test]
async fn a_message_is_seen_deleted_and_rejected() {
    let api = Api::start().await;
    api.queue("q", json!({"topics": ["a"]})).await;
    publish(&api, "a", &["1", "2", "3", "4"], Some("k")).await;
    publish(&api, "b", &["5"], None).await;
    let taken = take(&api, "q", 2, "worker").await;
    let reason = "x".repeat(1_024);
    let nacked = settle(
        &api,
        "q",
        "nack",
        json!({"reason": reason, "delay_seconds": 600}),
        &taken[0],
    )
    .await;
    let told = ok(api.get("/v1/queues/q/messages/1").await);
    assert_eq!(
        (&told["state"], &told["attempts"]),
        (&json!("delayed"), &json!(1))
    );
    assert_eq!(told["failures"][0]["reason"], reason.as_str());
    assert_eq!(told["due_at"], nacked["due_at"]);
    assert_eq!(
        (&told["event"]["id"], &told["topic"]),
        (&json!("1"), &json!("a"))
    );
    let live = ok(api.get("/v1/queues/q/messages/2").await);
    assert_eq!(
        (&live["state"], &live["consumer"]),
        (&json!("live"), &json!("worker"))
    );
    assert_eq!(live["visible_until"], taken[1]["visible_until"]);
    assert_eq!(
        ok(api.get("/v1/queues/q/messages/3").await)["state"],
        "fresh"
    );
    assert_eq!(
        ok(api.get("/v1/queues/q/messages/5").await)["state"],
        "not_matching"
    );
    let long = json!({"reason": "x".repeat(1_025)});
    assert_problem(
        &api.post("/v1/queues/q/messages/1/reject", long).await,
        422,
        "invalid-request",
    );
    let path = "/v1/queues/q/messages/1/reject";
    let rejected = ok(api.post(path, json!({"reason": "no shop"})).await);
    assert_eq!(
        rejected,
        json!({"offset": 1, "result": "rejected", "dead_letter": "1-1"})
    );
    assert_eq!(
        ok(api.call("POST", path, None).await)["result"],
        "dead_lettered"
    );
    assert_eq!(
        ok(api.call("DELETE", "/v1/queues/q/messages/1", None).await)["result"],
        "dead_lettered"
    );
    assert_eq!(
        ok(api.get("/v1/queues/q/messages/1").await)["state"],
        "dead"
    );
    for result in ["deleted", "already_settled"] {
        let deleted = ok(api.call("DELETE", "/v1/queues/q/messages/2", None).await);
        assert_eq!(deleted, json!({"offset": 2, "result": result}));
    }
    assert_eq!(
        settle(&api, "q", "ack", json!({}), &taken[1]).await["result"],
        "already_settled"
    );
    for offset in [5, 6, 9_007_199_254_740_991_i64] {
        let missing = api
            .call("DELETE", &format!("/v1/queues/q/messages/{offset}"), None)
            .await;
        assert_problem(&missing, 404, "queue-message-not-found");
    }
    assert_problem(
        &api.get("/v1/queues/q/messages/6").await,
        404,
        "queue-message-not-found",
    );
    assert_problem(
        &api.get("/v1/queues/q/messages/0").await,
        422,
        "invalid-request",
    );
    assert_problem(
        &api.get("/v1/queues/nobody/messages/1").await,
        404,
        "queue-not-found",
    );
    api.stop().await;
}

#[tokio::test]
async fn messages_are_found_by_key_topic_and_id_page_by_page() {
    let api = Api::start().await;
    api.queue("q", json!({"topics": ["shop.>"]})).await;
    for n in 0..6 {
        let (x, y) = (format!("x{n}"), format!("y{n}"));
        publish(&api, "shop.orders", &[&x], Some("k1")).await;
        publish(&api, "other", &["z"], Some("k1")).await;
        publish(&api, "shop.carts", &[&y], Some("k2")).await;
    }
    let taken = take(&api, "q", 1, "c").await;
    settle(&api, "q", "ack", json!({}), &taken[0]).await;
    let ids = |page: &Value| -> Vec<String> {
        let messages = page["messages"].as_array().unwrap().iter();
        messages
            .map(|message| message["event"]["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let page = ok(api.get("/v1/queues/q/messages?key=k1&max_messages=4").await);
    assert_eq!(ids(&page), ["x0", "x1", "x2", "x3"]);
    assert_eq!(page["messages"][0]["state"], "settled");
    assert_eq!(page["messages"][1]["state"], "fresh");
    let next = page["next_after"].as_i64().unwrap();
    let page = ok(api
        .get(&format!("/v1/queues/q/messages?key=k1&after={next}"))
        .await);
    assert_eq!(
        (ids(&page), &page["next_after"]),
        (vec!["x4".to_owned(), "x5".to_owned()], &Value::Null)
    );
    let page = ok(api
        .get("/v1/queues/q/messages?topic=shop.carts&key=k2&id=y3")
        .await);
    assert_eq!(ids(&page), ["y3"]);
    for none in [
        "id=z",
        "topic=other",
        "key=k3",
        "key=k2&id=x1",
        "after=1000",
    ] {
        let page = ok(api.get(&format!("/v1/queues/q/messages?{none}")).await);
        assert_eq!(page, json!({"messages": [], "next_after": null}), "{none}");
    }
    assert_eq!(ids(&ok(api.get("/v1/queues/q/messages").await)).len(), 12);
    for wrong in ["key=", "topic=a..b", "max_messages=101", "sort=x"] {
        let refused = api.get(&format!("/v1/queues/q/messages?{wrong}")).await;
        assert_problem(&refused, 422, "invalid-request");
    }
    api.stop().await;
}

#[tokio::test]
async fn deliveries_of_a_consumer_or_of_messages_are_ended() {
    let api = Api::start().await;
    api.queue(
        "q",
        json!({"topics": ["a"], "retry": {"delays_seconds": [0]}}),
    )
    .await;
    publish(&api, "a", &["1", "2", "3", "4"], None).await;
    take(&api, "q", 2, "lost").await;
    take(&api, "q", 2, "busy").await;
    let listed = ok(api.get("/v1/queues/q/in-flight?consumer=lost").await);
    assert_eq!(listed["deliveries"].as_array().unwrap().len(), 2);
    let path = "/v1/queues/q/in-flight/expire";
    let early = json!({"consumer": "lost", "delivered_before": "2020-01-01T00:00:00Z"});
    assert_eq!(
        ok(api.post(path, early).await),
        json!({"expired": 0, "offsets": []})
    );
    let lost = json!({"consumer": "lost"});
    assert_eq!(
        ok(api.post(path, lost.clone()).await),
        json!({"expired": 2, "offsets": [1, 2]})
    );
    assert_eq!(ok(api.post(path, lost).await)["expired"], 0);
    assert_eq!(
        ok(api.post(path, json!({"offsets": [4, 9]})).await)["offsets"],
        json!([4])
    );
    let told = ok(api.get("/v1/queues/q/messages/1").await);
    assert_eq!(
        (&told["attempts"], &told["failures"][0]["reason"]),
        (&json!(1), &json!("timed_out"))
    );
    let again = take(&api, "q", 3, "other").await;
    assert!(
        again.iter().all(|delivery| delivery["attempt"] == 2),
        "{again:?}"
    );
    for wrong in [
        json!({}),
        json!({"consumer": "a", "offsets": [1]}),
        json!({"offsets": []}),
        json!({"consumer": ""}),
    ] {
        assert_problem(&api.post(path, wrong).await, 422, "invalid-request");
    }
    api.stop().await;
}

#[tokio::test]
async fn the_retry_policy_is_checked_and_previewed() {
    let api = Api::start().await;
    let declare = async |name: &str, body: Value| {
        api.call("PUT", &format!("/v1/queues/{name}"), Some(body))
            .await
    };
    let list = declare(
        "list",
        json!({"max_attempts": 5, "retry": {"delays_seconds": [1, 2.5]}}),
    )
    .await;
    assert_eq!(
        list.body["retry_schedule"],
        json!({"delays_seconds": [1, 2.5, 2.5, 2.5], "total_seconds": 8.5})
    );
    let growing = json!({"max_attempts": 6, "retry": {"initial_seconds": 1, "factor": 3, "cap_seconds": 10, "jitter": 0.5}});
    let growing = declare("growing", growing).await;
    assert_eq!(
        growing.body["retry_schedule"],
        json!({"delays_seconds": [1, 3, 9, 10, 10], "total_seconds": 33})
    );
    let many = declare(
        "many",
        json!({"max_attempts": 1000, "retry": {"delays_seconds": [1]}}),
    )
    .await;
    assert_eq!(
        many.body["retry_schedule"]["delays_seconds"]
            .as_array()
            .unwrap()
            .len(),
        100
    );
    assert_eq!(many.body["retry_schedule"]["total_seconds"], 999);
    let standard = declare("standard", json!({})).await;
    let hours = standard.body["retry_schedule"]["total_seconds"]
        .as_f64()
        .unwrap()
        / 3_600.0;
    assert!((1.4..1.6).contains(&hours), "about 1.5 h: {hours}");
    assert_eq!(
        declare("once", json!({"max_attempts": 1})).await.body["retry_schedule"]["total_seconds"],
        0
    );
    for (retry, pointer) in [
        (json!({"delays_seconds": []}), "/retry/delays_seconds"),
        (
            json!({"delays_seconds": vec![1; 101]}),
            "/retry/delays_seconds",
        ),
        (
            json!({"delays_seconds": [43_201]}),
            "/retry/delays_seconds/0",
        ),
        (
            json!({"delays_seconds": [1], "factor": 2}),
            "/retry/delays_seconds",
        ),
        (json!({"factor": 0.5}), "/retry/factor"),
        (json!({"initial_seconds": -1}), "/retry/initial_seconds"),
        (json!({"cap_seconds": 43_201}), "/retry/cap_seconds"),
        (json!({"jitter": 2}), "/retry/jitter"),
    ] {
        let refused = declare("wrong", json!({"retry": retry})).await;
        assert_problem(&refused, 422, "invalid-request");
        assert_eq!(refused.body["errors"][0]["pointer"], pointer, "{refused:?}");
    }
    eventually("the queue to answer", || async {
        (api.receive("list", json!({"wait_seconds": 0})).await.status == 200).then_some(())
    })
    .await;
    api.stop().await;
}
