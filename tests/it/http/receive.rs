//! A receive that acknowledges, and one that waits for its batch, on the wire.

use serde_json::{Value, json};

use super::{Api, assert_problem};
use crate::support;

async fn start(messages: usize) -> Api {
    let api = Api::start().await;
    api.queue(
        "billing",
        json!({"topics": ["orders.*"], "start": "earliest"}),
    )
    .await;
    for _ in 0..messages {
        let published = api
            .publish("orders.created", "application/json", &[], "{}")
            .await;
        assert_eq!(published.status, 200);
    }
    api
}

/// Receives until there are so many, and gives items of their receipts.
async fn take(api: &Api, count: usize) -> Vec<Value> {
    let mut taken = Vec::new();
    while taken.len() < count {
        let answer = api
            .receive("billing", json!({"max_messages": count - taken.len()}))
            .await;
        let deliveries = answer.body["deliveries"].as_array().unwrap();
        taken.extend(
            deliveries
                .iter()
                .map(|delivery| json!({"receipt": delivery["receipt"]})),
        );
    }
    taken
}

#[tokio::test]
async fn a_receive_acknowledges_and_answers_for_each() {
    let api = start(3).await;
    let mut held = take(&api, 2).await;
    held.push(json!({"receipt": "nonsense"}));
    let answer = api
        .receive("billing", json!({"ack": held, "batch_wait_seconds": 0.5}))
        .await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let ack = &answer.body["ack"];
    assert_eq!(
        (&ack["settled"], &ack["refused"]),
        (&json!(2), &json!(1)),
        "{ack}"
    );
    let results: Vec<&Value> = (0..3).map(|n| &ack["deliveries"][n]["result"]).collect();
    assert_eq!(results, ["acked", "acked", "unknown"]);
    assert_eq!(ack["deliveries"][0]["receipt"], held[0]["receipt"]);
    assert_eq!(answer.body["deliveries"].as_array().unwrap().len(), 1);
    // Nothing to acknowledge, nothing told.
    let none = api
        .receive("billing", json!({"ack": [], "wait_seconds": 0}))
        .await;
    assert_eq!((none.status, none.body.get("ack")), (200, None));
    api.stop().await;
}

#[tokio::test]
async fn a_long_poll_that_the_stop_ends_tells_what_it_acknowledged() {
    let api = start(2).await;
    let ack = take(&api, 2).await;
    let receive = api.receive("billing", json!({"ack": ack, "wait_seconds": 50}));
    let stop = async {
        support::eventually("the long poll waits, and its acks are done", || async {
            let queue = api.get("/v1/queues/billing").await.body;
            let numbers = (
                queue["status"]["waiters"].clone(),
                queue["status"]["depth"].clone(),
            );
            (numbers == (json!(1), json!(0))).then_some(())
        })
        .await;
        api.stop_server().await;
    };
    let (answer, ()) = tokio::join!(receive, stop);
    assert_eq!(
        (answer.status, &answer.body["ack"]["settled"]),
        (200, &json!(2)),
        "{answer:?}"
    );
    assert_eq!(answer.body["deliveries"], json!([]));
}

#[tokio::test]
async fn what_is_wrong_with_them_is_named() {
    let api = start(0).await;
    let many: Vec<Value> = (0..1_001).map(|_| json!({"receipt": "r"})).collect();
    for (body, pointer) in [
        (json!({"ack": many}), "/ack"),
        (
            json!({"ack": [{"receipt": "r", "reason": "x"}]}),
            "/ack/0/reason",
        ),
        (json!({"ack": [{}]}), "/ack/0/receipt"),
        (json!({"batch_wait_seconds": 5.5}), "/batch_wait_seconds"),
        (json!({"batch_wait_seconds": -1}), "/batch_wait_seconds"),
    ] {
        let answer = api.receive("billing", body).await;
        assert_problem(&answer, 422, "invalid-request");
        assert_eq!(answer.body["errors"][0]["pointer"], pointer, "{answer:?}");
    }
    api.stop().await;
}

/// An empty receive's reason and next time, without waiting.
async fn why(api: &Api) -> (Value, bool) {
    let empty = api.receive("billing", json!({"wait_seconds": 0})).await;
    assert_eq!(empty.status, 200, "{empty:?}");
    assert_eq!(empty.body["deliveries"], json!([]));
    let has_next = empty.body["next_due_at"].is_string();
    (empty.body["reason"].clone(), has_next)
}

async fn verb(api: &Api, verb: &str, deliveries: &[Value]) {
    let path = format!("/v1/queues/billing/{verb}");
    let answer = api.post(&path, json!({"deliveries": deliveries})).await;
    assert_eq!(answer.body["settled"], deliveries.len(), "{answer:?}");
}

#[tokio::test]
async fn an_empty_receive_says_why() {
    let api = Api::start().await;
    let billing =
        json!({"topics": ["orders.*"], "ordering": "key", "retry": {"delays_seconds": [600]}});
    api.queue("billing", billing).await;
    assert_eq!(why(&api).await, (json!("empty"), false));
    let event = |id: &str| json!({"specversion": "1.0", "id": id, "source": "/test", "type": "t", "partitionkey": "k", "data": 1});
    let body = serde_json::to_vec(&[event("first"), event("second")]).unwrap();
    let kind = "application/cloudevents-batch+json";
    let published = api.publish("orders.created", kind, &[], body).await;
    assert_eq!(published.status, 200, "{published:?}");
    let held = take(&api, 1).await;
    support::eventually("the second waits for the first", || async {
        (why(&api).await == (json!("waiting_for_keys"), true)).then_some(())
    })
    .await;
    verb(&api, "ack", &held).await;
    let held = take(&api, 1).await;
    verb(&api, "nack", &held).await;
    assert_eq!(why(&api).await, (json!("delayed"), true));
    let paused = api.post("/v1/queues/billing/pause", json!({})).await;
    assert_eq!(paused.status, 200, "{paused:?}");
    assert_eq!(why(&api).await.0, "paused");
    api.stop().await;
}

#[tokio::test]
async fn with_all_in_flight_that_may_be_a_long_poll_waits_and_a_short_one_is_refused() {
    let api = Api::start().await;
    let billing = json!({"topics": ["orders.*"], "max_in_flight": 1});
    api.queue("billing", billing).await;
    for _ in 0..3 {
        let published = api
            .publish("orders.created", "application/json", &[], "{}")
            .await;
        assert_eq!(published.status, 200);
    }
    let held = take(&api, 1).await;
    let short = api.receive("billing", json!({"wait_seconds": 0})).await;
    assert_problem(&short, 429, "too-many-requests");
    assert_eq!(short.headers["retry-after"], "1");
    let poll = api.receive("billing", json!({"wait_seconds": 0.05})).await;
    assert_eq!(
        (poll.status, &poll.body["reason"]),
        (200, &json!("in_flight_full"))
    );
    assert!(poll.body["next_due_at"].is_string(), "{poll:?}");

    // Its turn comes when what is in flight is settled.
    let waits = api.receive("billing", json!({"wait_seconds": 50}));
    let settled = async {
        support::eventually("the long poll waits", || async {
            let queue = api.get("/v1/queues/billing").await.body;
            (queue["status"]["waiters"] == 1).then_some(())
        })
        .await;
        verb(&api, "ack", &held).await;
    };
    let (answer, ()) = tokio::join!(waits, settled);
    assert_eq!(answer.body["deliveries"][0]["offset"], 2, "{answer:?}");

    // What came along to be acknowledged makes room at once, and is told even where it makes none.
    let second = json!([{"receipt": answer.body["deliveries"][0]["receipt"]}]);
    let next = api
        .receive("billing", json!({"wait_seconds": 0, "ack": second}))
        .await;
    assert_eq!(
        (
            &next.body["ack"]["settled"],
            &next.body["deliveries"][0]["offset"]
        ),
        (&json!(1), &json!(3)),
        "{next:?}"
    );
    let again = api
        .receive("billing", json!({"wait_seconds": 0, "ack": second}))
        .await;
    assert_eq!(
        (again.status, &again.body["reason"]),
        (200, &json!("in_flight_full"))
    );
    assert_eq!(
        again.body["ack"]["deliveries"][0]["result"],
        "already_settled"
    );
    api.stop().await;
}
