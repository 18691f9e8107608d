//! Messages that come later, over HTTP: every way to publish one, the list, the cancel; schedules.

use chrono::{SecondsFormat, TimeDelta, Utc};
use serde_json::{Value, json};

use super::{Answer, Api, assert_problem};
use crate::support::eventually;

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

fn after(milliseconds: i64) -> String {
    let at = Utc::now() + TimeDelta::milliseconds(milliseconds);
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

async fn delete(api: &Api, path: &str) -> Answer {
    api.call("DELETE", path, None).await
}

/// Waits until the stream `main` has so many messages, and gives their events.
async fn events(api: &Api, count: usize) -> Vec<Value> {
    eventually("the messages", || async {
        let page = api.get("/v1/streams/main/messages").await;
        let messages = page.body["messages"].as_array().unwrap().clone();
        (messages.len() >= count).then(|| messages.iter().map(|m| m["event"].clone()).collect())
    })
    .await
}

#[tokio::test]
async fn a_stream_with_messages_to_come_is_deleted_by_force_alone() {
    let api = Api::start().await;
    let declared = api
        .call(
            "PUT",
            "/v1/streams/orders",
            Some(json!({"topics": ["orders.*"]})),
        )
        .await;
    assert_eq!(declared.status, 201, "{declared:?}");
    let none = api.get("/v1/streams/orders").await;
    assert_eq!(none.body["scheduled"], Value::Null);
    let event = json!({"messages": [
        {"topic": "orders.a", "deliver_at": after(3_600_000), "data": 1},
        {"topic": "orders.b", "deliver_at": after(3_600_000), "data": 2}]});
    let accepted = api.call("POST", "/v1/messages", Some(event)).await;
    assert_eq!(accepted.status, 200, "{accepted:?}");
    let stream = api.get("/v1/streams/orders").await;
    assert_eq!(stream.body["scheduled"]["waiting"], 2, "{stream:?}");
    let path = "/v1/streams/orders";
    assert_problem(&delete(&api, path).await, 409, "stream-has-scheduled");
    let path = "/v1/streams/orders?force=perhaps";
    assert_problem(&delete(&api, path).await, 422, "invalid-request");
    assert_eq!(
        delete(&api, "/v1/streams/orders?force=true").await.status,
        204
    );
    let gone = api.get("/v1/streams/orders").await;
    assert_problem(&gone, 404, "stream-not-found");
}

#[tokio::test]
async fn every_way_to_publish_takes_a_time_to_come() {
    let api = Api::start().await;
    // Later than all that is asked before it comes.
    let soon = after(4_000);
    let event = |id: &str| json!({"specversion": "1.0", "id": id, "source": "/s", "deliverat": soon, "data": id});
    let binary = api
        .publish(
            "a",
            "application/json",
            &[("ce-deliverat", &soon), ("ce-id", "binary")],
            "1",
        )
        .await;
    let structured = api
        .publish("a", STRUCTURED, &[], event("structured").to_string())
        .await;
    let batch = json!([event("batch 1"), {"specversion": "1.0", "id": "now", "source": "/s"}]);
    let batch = api.publish("a", BATCH, &[], batch.to_string()).await;
    let together = json!({"messages": [
        {"topic": "a", "deliver_at": soon, "id": "plain", "data": 1}, {"topic": "b", "event": event("event")}]});
    let together = api.call("POST", "/v1/messages", Some(together)).await;
    for answer in [&binary, &structured, &batch, &together] {
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    let first = &structured.body["messages"][0];
    assert_eq!(first["offset"], Value::Null);
    assert_eq!(first["scheduled"]["due_at"], soon, "{first}");
    assert_eq!(batch.body["messages"][1]["offset"], 1);
    assert_eq!(batch.body["messages"][1]["scheduled"], Value::Null);

    let again = api
        .publish("a", STRUCTURED, &[], event("structured").to_string())
        .await;
    assert_eq!(again.body["messages"][0]["scheduled"], first["scheduled"]);
    assert_eq!(again.body["messages"][0]["duplicate"], true);
    let mut other = event("structured");
    other["data"] = json!("other");
    let conflict = api.publish("a", STRUCTURED, &[], other.to_string()).await;
    assert_problem(&conflict, 409, "id-conflict");
    let named = first["scheduled"]["id"].as_str().unwrap();
    assert!(
        conflict.body["errors"][0]["detail"]
            .as_str()
            .unwrap()
            .contains(named)
    );

    let found = api.get(&format!("/v1/scheduled-messages/{named}")).await;
    assert_eq!(found.body["status"], "scheduled", "{found:?}");
    assert_eq!(found.body["event"]["data"], "structured");
    let events = events(&api, 6).await;
    let ids: Vec<&str> = events
        .iter()
        .map(|event| event["id"].as_str().unwrap())
        .collect();
    assert_eq!(
        ids,
        ["now", "binary", "structured", "batch 1", "plain", "event"]
    );
    assert_eq!(events[2]["deliverat"], soon, "it passes on");
    let found = api.get(&format!("/v1/scheduled-messages/{named}")).await;
    assert_eq!(
        (&found.body["status"], &found.body["offset"]),
        (&json!("published"), &json!(3))
    );
    let late = delete(&api, &format!("/v1/scheduled-messages/{named}")).await;
    assert_problem(&late, 409, "already-published");
    assert_eq!(
        (&late.body["offset"], &late.body["stream"]),
        (&json!(3), &json!("main"))
    );
    api.stop().await;
}

#[tokio::test]
async fn a_time_that_is_none_or_too_far_is_refused_where_it_stands() {
    let api = Api::start().await;
    let far = after(367 * 86_400_000);
    let near = after(365 * 86_400_000);
    let event = |at: &str| json!({"specversion": "1.0", "deliverat": at});
    for (content_type, headers, body, place) in [
        ("text/plain", vec![("ce-deliverat", far.as_str())], "x".to_owned(), ("header", "ce-deliverat")),
        ("text/plain", vec![("ce-deliverat", "soon")], "x".to_owned(), ("header", "ce-deliverat")),
        (STRUCTURED, vec![], event(&far).to_string(), ("pointer", "/deliverat")),
        (STRUCTURED, vec![], event("12:00").to_string(), ("pointer", "/deliverat")),
        (BATCH, vec![], json!([event(&near), event(&far)]).to_string(), ("pointer", "/1/deliverat")),
        (
            STRUCTURED,
            vec![],
            json!({"specversion": "1.0", "deliverat": near, "expectedversion": 1, "partitionkey": "k"}).to_string(),
            ("pointer", ""),
        ),
    ] {
        let refused = api.publish("a", content_type, &headers, body.clone()).await;
        assert_problem(&refused, 422, "invalid-message");
        assert_eq!(refused.body["errors"][0][place.0], place.1, "{body}: {refused:?}");
    }
    let body = json!({"messages": [{"topic": "a"}, {"topic": "a", "deliver_at": far}]});
    let refused = api.call("POST", "/v1/messages", Some(body)).await;
    assert_eq!(refused.body["errors"][0]["pointer"], "/messages/1");
    let listed = api.get("/v1/scheduled-messages").await;
    assert_eq!(listed.body, json!({"messages": [], "next_after": null}));
    let accepted = api
        .publish("a", STRUCTURED, &[], event(&near).to_string())
        .await;
    assert_eq!(accepted.body["messages"][0]["scheduled"]["due_at"], near);
    api.stop().await;
}

#[tokio::test]
async fn what_waits_is_listed_and_cancelled() {
    let api = Api::start().await;
    let mut names = Vec::new();
    for n in 0..6 {
        let topic = if n % 2 == 0 {
            "orders.reminder"
        } else {
            "carts.abandoned"
        };
        let event = json!({
            "specversion": "1.0", "id": format!("m{n}"), "source": "/s", "type": "t", "partitionkey": format!("k{}", n % 3),
            "deliverat": after(3_600_000 * (n + 1)), "data": "abc",
        });
        let placed = api.publish(topic, STRUCTURED, &[], event.to_string()).await;
        let scheduled = &placed.body["messages"][0]["scheduled"];
        names.push(scheduled["id"].as_str().unwrap().to_owned());
    }
    let listed = async |query: &str| -> Vec<String> {
        let page = api.get(&format!("/v1/scheduled-messages{query}")).await;
        assert_eq!(page.status, 200, "{page:?}");
        let messages = page.body["messages"].as_array().unwrap();
        messages
            .iter()
            .map(|m| m["event_id"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(listed("").await, ["m0", "m1", "m2", "m3", "m4", "m5"]);
    assert_eq!(listed("?topic=orders.*").await, ["m0", "m2", "m4"]);
    assert_eq!(listed("?key=k1&stream=main").await, ["m1", "m4"]);
    let (from, until) = (after(5_400_000), after(12_600_000));
    assert_eq!(
        listed(&format!("?due_from={from}&due_until={until}")).await,
        ["m1", "m2"]
    );
    let page = api.get("/v1/scheduled-messages?max_messages=4").await;
    let next = page.body["next_after"].as_str().unwrap();
    assert_eq!(next, names[3]);
    assert_eq!(listed(&format!("?after={next}")).await, ["m4", "m5"]);
    let first = &page.body["messages"][0];
    assert_eq!(
        (&first["data_bytes"], &first["stream"], &first["event_type"]),
        (&json!(5), &json!("main"), &json!("t"))
    );
    for wrong in ["after=x", "key="] {
        let refused = api.get(&format!("/v1/scheduled-messages?{wrong}")).await;
        assert_problem(&refused, 422, "invalid-request");
    }
    assert_problem(
        &api.get("/v1/scheduled-messages?stream=none").await,
        404,
        "stream-not-found",
    );

    for _ in 0..2 {
        assert_eq!(
            delete(&api, &format!("/v1/scheduled-messages/{}", names[1]))
                .await
                .status,
            204
        );
    }
    assert_eq!(listed("?topic=carts.>").await, ["m3", "m5"]);
    let found = api
        .get(&format!("/v1/scheduled-messages/{}", names[1]))
        .await;
    assert_eq!(found.body["status"], "cancelled");
    for unknown in ["1-1-1", "x", "1-1764000000000000-99"] {
        let path = format!("/v1/scheduled-messages/{unknown}");
        assert_problem(&api.get(&path).await, 404, "scheduled-message-not-found");
        assert_problem(
            &delete(&api, &path).await,
            404,
            "scheduled-message-not-found",
        );
    }
    eventually("the metrics", || async {
        let metrics = api
            .client
            .get(api.url("/metrics"))
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        let says = |text: &str| metrics.contains(text);
        (says("postroad_scheduled_messages{stream=\"main\"} 5")
            && says("postroad_scheduled_lag_seconds{stream=\"main\"} 0"))
        .then_some(())
    })
    .await;
    api.stop().await;
}

#[tokio::test]
async fn a_schedule_is_declared_described_and_deleted() {
    let api = Api::start().await;
    let body = json!({
        "topic": "reports.daily", "cron": "30 2 * * *", "time_zone": "Europe/Berlin", "misfire": "skip",
        "event": {"type": "report", "partitionkey": "k", "traceparent": "00-1", "data": {"n": 1.0}},
    });
    let path = "/v1/schedules/daily";
    let made = api.call("PUT", path, Some(body.clone())).await;
    assert_eq!(made.status, 201, "{made:?}");
    let again = api.call("PUT", path, Some(body.clone())).await;
    assert_eq!(again.status, 200);
    assert_eq!(again.body["changed_at"], made.body["changed_at"]);
    for member in ["topic", "cron", "time_zone", "misfire", "event"] {
        assert_eq!(again.body[member], body[member]);
    }
    assert_eq!(
        (&again.body["paused"], &again.body["published_count"]),
        (&json!(false), &json!(0))
    );
    assert_eq!(again.body["next_at"].as_array().unwrap().len(), 5);
    let described = api.get("/v1/schedules/daily?next=100").await;
    let next = described.body["next_at"].as_array().unwrap();
    assert_eq!(next.len(), 100);
    assert!(
        next.iter()
            .all(|at| at.as_str().unwrap().ends_with(":30:00.000000Z")
                || at.as_str().unwrap().ends_with(":00:00.000000Z"))
    );
    let paused = {
        let mut body = body.clone();
        body["paused"] = true.into();
        api.call("PUT", path, Some(body)).await
    };
    assert_eq!((paused.status, &paused.body["next_at"]), (200, &json!([])));
    let listed = api.get("/v1/schedules").await;
    assert_eq!(listed.body["schedules"][0]["name"], "daily");
    assert_eq!(delete(&api, path).await.status, 204);
    assert_problem(&delete(&api, path).await, 404, "schedule-not-found");
    assert_problem(&api.get(path).await, 404, "schedule-not-found");
    assert_eq!(
        api.get("/v1/schedules").await.body,
        json!({"schedules": []})
    );
    api.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_a_schedule_is_said() {
    let api = Api::start().await;
    for (change, pointer) in [
        (json!({"topic": "a..b"}), "/topic"),
        (json!({"cron": "* * *"}), "/cron"),
        (json!({"cron": "0 0 31 2 *"}), "/cron"),
        (json!({"time_zone": "Mars/Base"}), "/time_zone"),
        (json!({"misfire": "never"}), "/misfire"),
        (json!({"event": []}), "/event"),
        (json!({"event": {"id": "x"}}), "/event/id"),
        (json!({"event": {"deliverat": "x"}}), "/event/deliverat"),
        (
            json!({"event": {"specversion": "0.3"}}),
            "/event/specversion",
        ),
        (json!({"event": {"Bad": 1}}), "/event/Bad"),
        (json!({"event": {"type": ""}}), "/event/type"),
        (json!({"other": 1}), "/other"),
    ] {
        let mut body = json!({"topic": "a", "cron": "* * * * *"});
        body.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        let refused = api.call("PUT", "/v1/schedules/s", Some(body)).await;
        assert_problem(&refused, 422, "invalid-request");
        assert_eq!(refused.body["errors"][0]["pointer"], pointer, "{refused:?}");
    }
    let event = json!({"specversion": "1.0", "data": null});
    let body = json!({"topic": "a", "cron": "* * * * * *", "event": event});
    let made = api.call("PUT", "/v1/schedules/s", Some(body)).await;
    assert_eq!((made.status, &made.body["time_zone"]), (201, &json!("UTC")));
    let events = events(&api, 2).await;
    assert_eq!(
        (&events[0]["data"], &events[0]["type"]),
        (&Value::Null, &json!("a"))
    );
    assert_ne!(events[0]["id"], events[1]["id"]);
    api.stop().await;
}

#[tokio::test]
async fn an_outbox_schedules_too() {
    let api = Api::start().await;
    let mut producer = api.database.connect().await;
    let soon = Utc::now() + TimeDelta::milliseconds(800);
    sqlx::query(
        "insert into postroad.outbox (topic, id, payload, deliver_at) values
            ('a', 'later', '1', $1), ('a', 'now', '2', null), ('a', 'past', '3', $1 - interval '1 hour'),
            ('a', 'far', '4', $1 + interval '367 days')",
    )
    .bind(soon)
    .execute(&mut producer)
    .await
    .unwrap();
    sqlx::query("select postroad.publish('a', 'x'::text, id => 'called', deliver_at => $1)")
        .bind(soon + TimeDelta::milliseconds(1))
        .execute(&mut producer)
        .await
        .unwrap();
    let events = events(&api, 4).await;
    let ids: Vec<&str> = events
        .iter()
        .map(|event| event["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["now", "past", "later", "called"]);
    let rejected = api.get("/v1/origins/local/rejected").await;
    let rows = rejected.body["rejected"].as_array().unwrap();
    assert_eq!(rows.len(), 1);
    assert!(
        rows[0]["reason"]
            .as_str()
            .unwrap()
            .contains("more than 366 days ahead")
    );
    api.stop().await;
}
