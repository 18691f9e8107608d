//! Dead letters and redrives over HTTP.

use serde_json::{Value, json};

use super::{Api, assert_problem};
use crate::support;

/// Publishes bodies, and has the queue reject them.
async fn reject(api: &Api, bodies: &[&'static str]) {
    for body in bodies {
        let headers = [("ce-partitionkey", "sku-1")];
        let published = api
            .publish("orders.created", "application/json", &headers, *body)
            .await;
        assert_eq!(published.status, 200, "{published:?}");
    }
    let mut left = bodies.len();
    while left > 0 {
        let received = api.receive("billing", json!({"wait_seconds": 10})).await;
        let deliveries = received.body["deliveries"].as_array().unwrap();
        let items: Vec<Value> = deliveries
            .iter()
            .map(|delivery| json!({"receipt": delivery["receipt"], "reason": "no stock"}))
            .collect();
        let answer = api
            .post("/v1/queues/billing/reject", json!({"deliveries": items}))
            .await;
        assert_eq!(answer.body["settled"], items.len(), "{answer:?}");
        left -= items.len();
    }
}

async fn done(api: &Api, id: &str) -> Value {
    support::eventually("the redrive to end", || async {
        let redrive = api.get(&format!("/v1/queues/billing/redrives/{id}")).await;
        assert_eq!(redrive.status, 200, "{redrive:?}");
        (redrive.body["status"] != "running").then_some(redrive.body)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_read_and_removed() {
    let api = Api::start().await;
    api.queue("billing", json!({"topics": ["orders.*"]})).await;
    reject(&api, &["{\"n\": 1.0}", "{\"n\":2}", "{\"n\":3}"]).await;
    let list = "/v1/queues/billing/dead-letters";
    let page = api
        .get(&format!(
            "{list}?limit=2&cause=rejected&reason=stock&key=sku-1&topic=orders.*"
        ))
        .await;
    assert_eq!(
        (page.status, &page.body["next_after"]),
        (200, &json!(2)),
        "{page:?}"
    );
    let letters = page.body["dead_letters"].as_array().unwrap();
    assert_eq!(
        (letters.len(), &letters[0]["id"], &letters[0]["reason"]),
        (2, &json!("1-1"), &json!("no stock"))
    );
    let rest = api.get(&format!("{list}?after=2")).await;
    assert_eq!(
        (
            &rest.body["next_after"],
            &rest.body["dead_letters"][0]["id"]
        ),
        (&json!(null), &json!("1-3"))
    );
    // The payload comes out as it went in.
    let raw = api
        .client
        .get(api.url(&format!("{list}/1-1")))
        .send()
        .await
        .unwrap();
    let text = raw.text().await.unwrap();
    assert!(text.contains("\"data\":{\"n\": 1.0}"), "{text}");
    let letter: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&letter["cause"], &letter["attempts"]),
        (&json!("rejected"), &json!(1))
    );
    assert_eq!(letter["failures"][0]["reason"], "no stock");
    assert!(letter["failures"][0]["at"].is_string() && letter["appended_at"].is_string());
    for _ in 0..2 {
        let removed = api.call("DELETE", &format!("{list}/1-1"), None).await;
        assert_eq!(removed.status, 204, "{removed:?}");
    }
    assert_problem(
        &api.get(&format!("{list}/1-1")).await,
        404,
        "dead-letter-not-found",
    );
    assert_problem(
        &api.get(&format!("{list}/2-2")).await,
        404,
        "dead-letter-not-found",
    );
    assert_problem(&api.get(&format!("{list}/x")).await, 422, "invalid-request");
    assert_problem(
        &api.get(&format!("{list}?cause=old-age&limit=0&reason="))
            .await,
        422,
        "invalid-request",
    );
    assert_problem(
        &api.get("/v1/queues/none/dead-letters").await,
        404,
        "queue-not-found",
    );
    let queue = api.get("/v1/queues/billing").await;
    assert_eq!(queue.body["status"]["dead_letters"], 2);
    assert_eq!(queue.body["dead_letter_retention_seconds"], 1_209_600);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_redriven_over_http() {
    let api = Api::start().await;
    api.queue("billing", json!({"topics": ["orders.*"]})).await;
    reject(&api, &["1", "2", "3"]).await;
    let redrives = "/v1/queues/billing/redrives";
    let dry = api
        .post(
            redrives,
            json!({"dry_run": true, "filter": {"reason": "stock"}}),
        )
        .await;
    assert_eq!(
        (dry.status, dry.body),
        (200, json!({"dry_run": true, "matching": 3, "late": 0}))
    );
    assert_eq!(api.get(redrives).await.body, json!({"redrives": []}));
    let request = json!({"redrive_id": "fixed", "ids": ["1-2"], "rate_per_second": 10});
    let begun = api.post(redrives, request.clone()).await;
    assert_eq!(
        (begun.status, &begun.body["total"]),
        (201, &json!(1)),
        "{begun:?}"
    );
    let fixed = done(&api, "fixed").await;
    assert_eq!(
        (&fixed["status"], &fixed["redriven"], &fixed["ids"]),
        (&json!("done"), &json!(1), &json!(["1-2"]))
    );
    let repeated = api.post(redrives, request).await;
    assert_eq!((repeated.status, &repeated.body), (200, &fixed));
    let letter = api.get("/v1/queues/billing/dead-letters/1-2").await;
    assert_eq!(letter.body["redrive_id"], "fixed", "{letter:?}");
    let stays = api
        .call("DELETE", "/v1/queues/billing/dead-letters/1-2", None)
        .await;
    assert_problem(&stays, 409, "dead-letter-redriven");
    // All that is left.
    let all = api.post(redrives, json!({})).await;
    assert_eq!(all.status, 201, "{all:?}");
    let id = all.body["id"].as_str().unwrap().to_owned();
    assert_eq!(done(&api, &id).await["redriven"], 2);
    let received = api
        .receive("billing", json!({"wait_seconds": 10, "max_messages": 3}))
        .await;
    let deliveries = received.body["deliveries"].as_array().unwrap();
    let seen: Vec<&Value> = deliveries
        .iter()
        .map(|delivery| &delivery["attempt"])
        .collect();
    assert_eq!(seen, [1, 1, 1], "{received:?}");
    let listed = api.get(redrives).await;
    assert_eq!(listed.body["redrives"].as_array().unwrap().len(), 2);
    for _ in 0..2 {
        assert_eq!(
            api.call("DELETE", &format!("{redrives}/{id}"), None)
                .await
                .status,
            204
        );
    }
    assert_eq!(done(&api, &id).await["status"], "done", "it was over");
    for (body, pointer) in [
        (json!({"ids": [], "filter": {}}), "/filter"),
        (json!({"ids": ["x"]}), "/ids/0"),
        (json!({"filter": {"topic": "a..b"}}), "/filter/topic"),
        (json!({"filter": {"key": ""}}), "/filter/key"),
        (json!({"rate_per_second": 10_001}), "/rate_per_second"),
        (json!({"redrive_id": "a b"}), "/redrive_id"),
    ] {
        let refused = api.post(redrives, body.clone()).await;
        assert_problem(&refused, 422, "invalid-request");
        assert_eq!(refused.body["errors"][0]["pointer"], pointer, "{body}");
    }
    assert_problem(
        &api.get(&format!("{redrives}/none")).await,
        404,
        "redrive-not-found",
    );
    let looped = json!({"topics": ["orders.*"], "dead_letter_topic": "orders.dead"});
    let looped = api.call("PUT", "/v1/queues/billing", Some(looped)).await;
    assert_problem(&looped, 422, "invalid-request");
    assert_eq!(looped.body["errors"][0]["pointer"], "/dead_letter_topic");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_of_a_dead_letter_goes_on_when_it_is_removed() {
    let api = Api::start().await;
    let held = json!({"topics": ["orders.*"], "ordering": "key", "hold_key": true});
    api.queue("billing", held).await;
    reject(&api, &["1"]).await;
    let headers = [("ce-partitionkey", "sku-1")];
    let later = api
        .publish("orders.created", "application/json", &headers, "2")
        .await;
    assert_eq!(later.status, 200, "{later:?}");
    let blocked = support::eventually("a key that waits", || async {
        let queue = api.get("/v1/queues/billing").await;
        let blocked = &queue.body["status"]["blocked_keys"][0];
        blocked.is_object().then(|| blocked.clone())
    })
    .await;
    assert_eq!(
        (&blocked["key"], &blocked["by"]["state"]),
        (&json!("sku-1"), &json!("held"))
    );
    let nothing = api.receive("billing", json!({"wait_seconds": 0})).await;
    assert_eq!(nothing.body["reason"], "waiting_for_keys", "{nothing:?}");
    let removed = api
        .call("DELETE", "/v1/queues/billing/dead-letters/1-1", None)
        .await;
    assert_eq!(removed.status, 204, "{removed:?}");
    let received = api.receive("billing", json!({"wait_seconds": 10})).await;
    assert_eq!(received.body["deliveries"][0]["offset"], 2, "{received:?}");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_shows_its_dead_letter() {
    let api = Api::start().await;
    api.queue("billing", json!({"topics": ["orders.*"]})).await;
    reject(&api, &["1"]).await;
    let path = "/v1/queues/billing/messages/1";
    let dead = api.get(path).await.body;
    assert_eq!(
        [
            &dead["state"],
            &dead["dead_letter"],
            &dead["attempts"],
            &dead["delivery"]
        ],
        [&json!("dead"), &json!("1-1"), &json!(1), &json!(1)],
        "{dead}"
    );
    assert_eq!(dead["failures"][0]["reason"], "no stock");
    let found = api.get("/v1/queues/billing/messages").await.body;
    assert_eq!(found["messages"][0], dead);
    let begun = api
        .post("/v1/queues/billing/redrives", json!({"redrive_id": "r"}))
        .await;
    assert_eq!(begun.status, 201, "{begun:?}");
    done(&api, "r").await;
    let back = api.get(path).await.body;
    assert_eq!(
        [&back["state"], &back["dead_letter"], &back["failures"]],
        [&json!("ready"), &json!("1-1"), &json!([])],
        "{back}"
    );
    let received = api.receive("billing", json!({"wait_seconds": 10})).await;
    let receipt = &received.body["deliveries"][0]["receipt"];
    let acked = json!({"deliveries": [{"receipt": receipt}]});
    api.post("/v1/queues/billing/ack", acked).await;
    let settled = api.get(path).await.body;
    assert_eq!(
        (&settled["state"], &settled["dead_letter"]),
        (&json!("settled"), &json!(null)),
        "{settled}"
    );
    api.stop().await;
}
