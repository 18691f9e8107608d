//! Order by key and lanes on the wire.

use serde_json::{Value, json};

use super::{Api, assert_problem};
use crate::support;

async fn publish(api: &Api, keys: &[&str]) {
    let events: Vec<Value> = keys
        .iter()
        .enumerate()
        .map(|(n, key)| {
            json!({
                "specversion": "1.0", "id": format!("{key}{n}"), "source": "/test", "type": "orders.created",
                "partitionkey": key, "data": n,
            })
        })
        .collect();
    let body = serde_json::to_vec(&events).unwrap();
    let kind = "application/cloudevents-batch+json";
    let published = api.publish("orders.created", kind, &[], body).await;
    assert_eq!(published.status, 200, "{published:?}");
}

async fn take(api: &Api, count: usize) -> Vec<Value> {
    let mut taken: Vec<Value> = Vec::new();
    while taken.len() < count {
        let most = count - taken.len();
        let answer = api.receive("billing", json!({"max_messages": most})).await;
        taken.extend(answer.body["deliveries"].as_array().unwrap().clone());
    }
    taken
}

fn receipts(deliveries: &[Value]) -> Value {
    let items = deliveries
        .iter()
        .map(|delivery| json!({"receipt": delivery["receipt"]}));
    json!({"deliveries": items.collect::<Vec<_>>()})
}

#[tokio::test]
async fn blocked_keys_are_described_and_a_later_ack_is_blocked() {
    let api = Api::start().await;
    let keyed =
        json!({"topics": ["orders.*"], "ordering": "key", "key_batches": true, "hold_key": true});
    api.queue("billing", keyed).await;
    publish(&api, &["a", "a", "b", "a"]).await;
    let taken = take(&api, 3).await;
    let offsets: Vec<&Value> = taken.iter().map(|delivery| &delivery["offset"]).collect();
    assert_eq!(offsets, [1, 2, 3]);
    let described = support::eventually("the last one waits", || async {
        let described = api.get("/v1/queues/billing").await;
        (described.body["status"]["waiting"] == 1).then_some(described.body)
    })
    .await;
    assert_eq!(
        [
            &described["ordering"],
            &described["key_batches"],
            &described["hold_key"],
            &described["priorities"]
        ],
        [&json!("key"), &json!(true), &json!(true), &json!(false)]
    );
    let status = &described["status"];
    assert_eq!(
        (&status["ready"], &status["lanes"]),
        (&json!(0), &Value::Null)
    );
    let blocked = status["blocked_keys"].as_array().unwrap();
    assert_eq!(blocked.len(), 1, "{status}");
    assert_eq!(
        (&blocked[0]["key"], &blocked[0]["waiting"]),
        (&json!("a"), &json!(1))
    );
    let by = &blocked[0]["by"];
    assert_eq!(
        (&by["offset"], &by["attempt"], &by["state"]),
        (&json!(1), &json!(1), &json!("live"))
    );
    assert!(by["due_at"].is_string() && blocked[0]["since"].is_string());

    let empty = api.receive("billing", json!({"wait_seconds": 0})).await;
    assert_eq!(empty.body["reason"], "waiting_for_keys");
    let later = api
        .post("/v1/queues/billing/ack", receipts(&taken[1..]))
        .await;
    assert_eq!(
        (&later.body["settled"], &later.body["refused"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(later.body["deliveries"][0]["result"], "blocked");
    let all = api
        .post("/v1/queues/billing/ack", receipts(&taken[..2]))
        .await;
    assert_eq!(all.body["settled"], 2);
    assert_eq!(take(&api, 1).await[0]["offset"], 4);
    api.stop().await;
}

#[tokio::test]
async fn what_does_not_go_together_is_refused() {
    let api = Api::start().await;
    for body in [
        json!({"ordering": "key", "priorities": true}),
        json!({"hold_key": true}),
        json!({"ordering": "none", "key_batches": true}),
        json!({"ordering": "topic"}),
    ] {
        let refused = api.call("PUT", "/v1/queues/billing", Some(body)).await;
        assert_problem(&refused, 422, "invalid-request");
    }
    api.queue("billing", json!({"priorities": true})).await;
    let described = api.get("/v1/queues/billing").await;
    assert_eq!(
        described.body["status"]["lanes"],
        json!({"high": 0, "normal": 0, "low": 0})
    );
    api.stop().await;
}
