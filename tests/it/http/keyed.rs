//! Keyed streams over HTTP: publishing at a version, histories and lists of keys.

use serde_json::{Value, json};

use super::{Answer, Api, assert_problem};
use crate::support::Events;

const EVENT: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

fn event(id: &str, key: &str, expected: Value) -> Value {
    json!({
        "specversion": "1.0", "id": id, "source": "/bank", "type": "t", "partitionkey": key,
        "expectedversion": expected, "data": {"id": id},
    })
}

impl Api {
    async fn keyed(&self) {
        let body = json!({"topics": ["accounts.>"], "keyed": true});
        let declared = self.call("PUT", "/v1/streams/accounts", Some(body)).await;
        assert_eq!(declared.status, 201, "{declared:?}");
        assert_eq!(declared.body["keyed"], true);
    }

    async fn publish_event(&self, event: &Value) -> Answer {
        self.publish("accounts.a", EVENT, &[], event.to_string())
            .await
    }
}

fn ids(messages: &Value) -> Vec<&str> {
    let messages = messages.as_array().unwrap();
    messages
        .iter()
        .map(|message| message["event"]["id"].as_str().unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_is_expected_in_every_way_of_publishing() {
    let api = Api::start().await;
    api.keyed().await;
    let first = api.publish_event(&event("1", "k", json!(0))).await;
    assert_eq!(first.status, 200, "{first:?}");
    let late = api.publish_event(&event("2", "k", json!(0))).await;
    assert_problem(&late, 409, "version-conflict");
    assert_eq!(
        (
            &late.body["key"],
            &late.body["version"],
            &late.body["expected_version"]
        ),
        (&json!("k"), &json!(1), &json!(0))
    );
    assert_eq!(late.body["errors"][0]["pointer"], "");
    // Headers, and a plain body.
    let headers = [
        ("ce-id", "3"),
        ("ce-source", "/bank"),
        ("ce-partitionkey", "k"),
        ("ce-expectedversion", "1"),
    ];
    let third = api
        .publish("accounts.a", "application/json", &headers, "{}")
        .await;
    assert_eq!(third.status, 200, "{third:?}");
    assert_eq!(third.body["messages"][0]["offset"], 2);
    // A repeat is a duplicate, not a conflict.
    let again = api
        .publish("accounts.a", "application/json", &headers, "{}")
        .await;
    assert_eq!(again.body["messages"][0]["duplicate"], true, "{again:?}");
    let batch = json!([
        event("4", "k", json!(2)),
        event("5", "k", json!("3")),
        event("6", "l", json!(1))
    ]);
    let refused = api
        .publish("accounts.a", BATCH, &[], batch.to_string())
        .await;
    assert_problem(&refused, 409, "version-conflict");
    assert_eq!(refused.body["errors"][0]["pointer"], "/2");
    assert_eq!(
        (&refused.body["key"], &refused.body["version"]),
        (&json!("l"), &json!(0))
    );
    // Several topics and streams, one of which is not keyed.
    let items = |expected: i64| {
        json!({"messages": [
            {"topic": "mail", "data": {"to": "k"}},
            {"topic": "accounts.a", "key": "k", "expected_version": expected, "data": {}},
        ]})
    };
    let refused = api.post("/v1/messages", items(1)).await;
    assert_problem(&refused, 409, "version-conflict");
    assert_eq!(refused.body["errors"][0]["pointer"], "/messages/1");
    assert_eq!(api.post("/v1/messages", items(2)).await.status, 200);
    let main = api.get("/v1/streams/main").await;
    assert_eq!(main.body["last_offset"], 1, "nothing of what was refused");
    // It is a command: neither the log nor a delivery has it.
    let page = api.get("/v1/streams/accounts/messages").await;
    assert_eq!(page.body["messages"].as_array().unwrap().len(), 3);
    assert!(!page.body.to_string().contains("expected"), "{page:?}");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_expected_is_refused() {
    let api = Api::start().await;
    api.keyed().await;
    let stray = event("1", "k", json!(0)).to_string();
    let stray = api.publish("other", EVENT, &[], stray).await;
    assert_problem(&stray, 409, "stream-not-keyed");
    assert_eq!(stray.body["errors"][0]["pointer"], "");
    for path in ["/v1/streams/main/keys", "/v1/streams/main/keys/k"] {
        assert_problem(&api.get(path).await, 409, "stream-not-keyed");
        let nowhere = path.replace("main", "nowhere");
        assert_problem(&api.get(&nowhere).await, 404, "stream-not-found");
    }
    for wrong in [
        json!(-1),
        json!("x"),
        json!(1.5),
        json!(true),
        json!(""),
        json!(1_i64 << 53),
    ] {
        let refused = api.publish_event(&event("2", "k", wrong)).await;
        assert_problem(&refused, 422, "invalid-message");
        assert_eq!(refused.body["errors"][0]["pointer"], "/expectedversion");
    }
    let mut keyless = event("3", "k", json!(0));
    keyless.as_object_mut().unwrap().remove("partitionkey");
    assert_problem(&api.publish_event(&keyless).await, 422, "invalid-message");
    assert_eq!(
        api.publish_event(&event("4", "k", json!(0))).await.status,
        200
    );
    for body in [
        json!({"topics": ["accounts.>"]}),
        json!({"topics": ["accounts.>"], "keyed": false}),
    ] {
        let changed = api.call("PUT", "/v1/streams/accounts", Some(body)).await;
        assert_problem(&changed, 409, "stream-keyed-fixed");
    }
    for path in [
        "keys?max_keys=0",
        "keys?after=",
        "keys?x=1",
        "keys/k?last=maybe",
        "keys/k?after=-1",
        "keys/k?max_messages=1001",
        "keys/a%00b",
    ] {
        let refused = api.get(&format!("/v1/streams/accounts/{path}")).await;
        assert_problem(&refused, 422, "invalid-request");
    }
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_read_back() {
    let api = Api::start().await;
    api.keyed().await;
    // A key of every kind of character that a path cares for.
    let odd = "a/b c?d%e#f.é";
    let path = "/v1/streams/accounts/keys/a%2Fb%20c%3Fd%25e%23f.%C3%A9";
    for n in 0..5 {
        let id = n.to_string();
        assert_eq!(
            api.publish_event(&event(&id, odd, json!(n))).await.status,
            200
        );
    }
    let other = api.publish_event(&event("x", "b", json!(0))).await;
    assert_eq!(other.status, 200);
    let whole = api.get(path).await;
    assert_eq!(whole.status, 200, "{whole:?}");
    assert_eq!(ids(&whole.body["messages"]), ["0", "1", "2", "3", "4"]);
    let facts = |answer: &Answer| {
        [
            "key",
            "version",
            "last_offset",
            "first_offset",
            "next_after",
        ]
        .map(|name| answer.body[name].clone())
    };
    assert_eq!(
        facts(&whole),
        [json!(odd), json!(5), json!(5), json!(1), Value::Null]
    );
    let page = api.get(&format!("{path}?max_messages=2&after=1")).await;
    assert_eq!(ids(&page.body["messages"]), ["1", "2"]);
    assert_eq!(
        facts(&page),
        [json!(odd), json!(5), json!(5), json!(1), json!(3)]
    );
    let last = api.get(&format!("{path}?last=true")).await;
    assert_eq!(ids(&last.body["messages"]), ["4"]);
    assert_eq!(last.body["next_after"], Value::Null);
    let never = api.get("/v1/streams/accounts/keys/never").await;
    assert_eq!(
        facts(&never),
        [json!("never"), json!(0), Value::Null, json!(1), Value::Null]
    );
    let listed = api.get("/v1/streams/accounts/keys?max_keys=1").await;
    assert_eq!(listed.body["keys"][0]["key"], odd);
    assert_eq!(listed.body["keys"][0]["version"], 5);
    assert_eq!(listed.body["keys"][0]["message"]["event"]["id"], "4");
    assert_eq!(listed.body["next_after"], odd);
    let after = "a%2Fb%20c%3Fd%25e%23f.%C3%A9";
    let rest = api
        .get(&format!("/v1/streams/accounts/keys?after={after}"))
        .await;
    assert_eq!(rest.body["keys"].as_array().unwrap().len(), 1, "{rest:?}");
    assert_eq!(rest.body["keys"][0]["key"], "b");
    assert_eq!(rest.body["next_after"], Value::Null);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_of_a_keyed_stream_is_followed_and_what_is_counted_shows() {
    let api = Api::start().await;
    api.keyed().await;
    let version = async |key: &str, n: i64| {
        let event = event(&format!("{key} {n}"), key, json!(n));
        let published = api.publish_event(&event).await;
        assert_eq!(published.status, 200, "{published:?}");
    };
    for n in 0..40 {
        version("a", n).await;
        version("b", n).await;
    }
    let url = api.url("/v1/streams/accounts/messages?key=b");
    let mut all = Events::open(&url, None).await;
    let mut resumed = Events::open(&url, Some(40)).await;
    for n in 0..40 {
        let event = all.next().await.unwrap();
        assert_eq!(event.data["event"]["id"], format!("b {n}"));
        assert_eq!(event.id, 2 * (n + 1));
    }
    for n in 40..50 {
        version("a", n).await;
        version("b", n).await;
        assert_eq!(
            all.next().await.unwrap().data["event"]["id"],
            format!("b {n}")
        );
    }
    for n in 20..50 {
        let event = resumed.next().await.unwrap();
        assert_eq!(event.data["event"]["id"], format!("b {n}"));
    }
    // What a follower has seen is the history that the key's version counts.
    let history = api
        .get("/v1/streams/accounts/keys/b?max_messages=100")
        .await;
    let followed: Vec<String> = (0..50).map(|n| format!("b {n}")).collect();
    assert_eq!(ids(&history.body["messages"]), followed);
    assert_eq!(history.body["version"], 50);
    let metrics = api.get("/metrics").await;
    let text = metrics.body.as_str().unwrap();
    assert!(text.contains("\npostroad_stream_open_keys 2"), "{text}");
    assert!(
        text.contains("\npostroad_stream_open_key_messages 100"),
        "{text}"
    );
    api.stop().await;
}
