//! What is refused, and how: a problem for everything, whoever found it.

use serde_json::json;

use super::{Api, answer, assert_problem};

#[tokio::test]
async fn faults_are_named_where_they_are() {
    let api = Api::start().await;
    for (method, path, body, place, detail) in [
        (
            "PUT",
            "/v1/queues/q",
            json!({"topic": []}),
            ("pointer", "/topic"),
            "unknown field `topic`",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"topics": "a"}),
            ("pointer", "/topics"),
            "invalid type",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"topics": []}),
            ("pointer", "/topics"),
            "must have 1 to 100",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"topics": ["a..b"]}),
            ("pointer", "/topics/0"),
            "`a..b` has the token",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"max_attempts": 0}),
            ("pointer", "/max_attempts"),
            "an integer from 1 to 1000",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"start": "now"}),
            ("pointer", "/start"),
            "it must be \"earliest\"",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"start": {"offset": 0}}),
            ("pointer", "/start/offset"),
            "from 1 to",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"ordering": "fifo"}),
            ("pointer", "/ordering"),
            "unknown variant `fifo`",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"retry": {"factor": 11}}),
            ("pointer", "/retry/factor"),
            "a number from 1 to 10",
        ),
        (
            "PUT",
            "/v1/queues/q",
            json!({"stream": "none"}),
            ("pointer", "/stream"),
            "there is no stream `none`",
        ),
        (
            "PUT",
            "/v1/queues/q%2F",
            json!({}),
            ("parameter", "queue"),
            "`q/` has the character `/`",
        ),
        (
            "PUT",
            "/v1/streams/s",
            json!({"topics": ["a.*", "a.b"]}),
            ("pointer", ""),
            "`a.b` overlaps `a.*`",
        ),
        (
            "POST",
            "/v1/queues/q/receive",
            json!({"wait_seconds": 51}),
            ("pointer", "/wait_seconds"),
            "from 0 to 50",
        ),
        (
            "POST",
            "/v1/queues/q/receive",
            json!({"max_messages": 1001}),
            ("pointer", "/max_messages"),
            "from 1 to 1000",
        ),
        (
            "POST",
            "/v1/queues/q/receive",
            json!({"consumer": ""}),
            ("pointer", "/consumer"),
            "visible ASCII",
        ),
        (
            "POST",
            "/v1/queues/q/receive?x=1",
            json!({}),
            ("parameter", "x"),
            "there is no parameter `x`",
        ),
        (
            "POST",
            "/v1/queues/q/ack",
            json!({}),
            ("pointer", "/deliveries"),
            "missing field",
        ),
        (
            "POST",
            "/v1/queues/q/ack",
            json!({"deliveries": []}),
            ("pointer", "/deliveries"),
            "1 to 1000",
        ),
        (
            "POST",
            "/v1/queues/q/nack",
            json!({"deliveries": [{"receipt": "a", "delay_seconds": -1}]}),
            ("pointer", "/deliveries/0/delay_seconds"),
            "a number from 0 to 43200",
        ),
        (
            "POST",
            "/v1/queues/q/ack",
            json!({"deliveries": [{"receipt": "a", "delay_seconds": 1}]}),
            ("pointer", "/deliveries/0/delay_seconds"),
            "unknown field",
        ),
        (
            "GET",
            "/v1/streams/main/messages?after=-1",
            json!({}),
            ("parameter", "after"),
            "an integer from 0",
        ),
        (
            "GET",
            "/v1/streams/main/messages?at=now",
            json!({}),
            ("parameter", "at"),
            "`now` is not an RFC 3339",
        ),
        (
            "GET",
            "/v1/queues/q/messages?id=%00",
            json!({}),
            ("parameter", "id"),
            "U+0000",
        ),
        (
            "GET",
            "/v1/queues/q/messages?key=a%00b",
            json!({}),
            ("parameter", "key"),
            "U+0000",
        ),
        (
            "GET",
            "/v1/queues/q/in-flight?consumer=%00",
            json!({}),
            ("parameter", "consumer"),
            "U+0000",
        ),
        (
            "GET",
            "/v1/streams/main/messages?key=%00",
            json!({}),
            ("parameter", "key"),
            "U+0000",
        ),
        (
            "GET",
            "/v1/queues/q/dead-letters?reason=%00",
            json!({}),
            ("parameter", "reason"),
            "U+0000",
        ),
        (
            "POST",
            "/v1/queues/q/receive",
            json!({"consumer": "a b"}),
            ("pointer", "/consumer"),
            "visible ASCII",
        ),
        (
            "POST",
            "/v1/queues/q/receive",
            json!({"receive_id": "é"}),
            ("pointer", "/receive_id"),
            "visible ASCII",
        ),
        (
            "POST",
            "/v1/queues/q/receive",
            json!({"receive_id": "a\nb"}),
            ("pointer", "/receive_id"),
            "visible ASCII",
        ),
    ] {
        let found = api.call(method, path, Some(body)).await;
        assert_problem(&found, 422, "invalid-request");
        let error = &found.body["errors"][0];
        assert_eq!(error[place.0], place.1, "{path}: {found:?}");
        assert!(
            error["detail"].as_str().unwrap().contains(detail),
            "{path}: {found:?}"
        );
    }
    let both = json!({"max_messages": 0, "wait_seconds": -1});
    let both = api.receive("q", both).await;
    assert_eq!(both.body["errors"].as_array().unwrap().len(), 2);
    assert_eq!(
        both.body["errors"][0]["allowed"],
        "an integer from 1 to 1000"
    );
    api.stop().await;
}

#[tokio::test]
async fn what_the_router_refuses_is_a_problem_too() {
    let api = Api::start().await;
    assert_problem(&api.get("/nowhere").await, 404, "not-found");
    let wrong = api.call("PATCH", "/v1/queues/q", None).await;
    assert_problem(&wrong, 405, "method-not-allowed");
    let allowed = wrong.headers["allow"].to_str().unwrap();
    for method in ["GET", "PUT", "DELETE"] {
        assert!(allowed.contains(method), "{allowed}");
    }
    let xml = api
        .client
        .post(api.url("/v1/queues/q/receive"))
        .header("content-type", "text/xml");
    assert_problem(
        &answer(xml.body("<a/>").send().await.unwrap()).await,
        415,
        "unsupported-media-type",
    );
    let avro = api
        .publish("a", "application/cloudevents+avro", &[], "x")
        .await;
    assert_problem(&avro, 415, "unsupported-media-type");
    let broken = api.client.post(api.url("/v1/queues/q/receive")).body("{");
    assert_problem(
        &answer(broken.send().await.unwrap()).await,
        400,
        "malformed-request",
    );
    assert_problem(
        &api.receive("nothing", json!({})).await,
        404,
        "queue-not-found",
    );
    let own = api
        .client
        .get(api.url("/nowhere"))
        .header("x-request-id", "mine-1");
    let own = answer(own.send().await.unwrap()).await;
    assert_eq!(own.body["request_id"], "mine-1");
    assert_eq!(own.body["instance"], "/nowhere");
    api.stop().await;
}

#[tokio::test]
async fn bad_bodies_are_refused() {
    let api = Api::start().await;
    let large = api
        .publish("a", "application/octet-stream", &[], vec![b'x'; 17 << 20])
        .await;
    assert_problem(&large, 413, "payload-too-large");
    let message = api
        .publish(
            "a",
            "application/octet-stream",
            &[],
            vec![b'x'; (1 << 20) + 1],
        )
        .await;
    assert_problem(&message, 413, "message-too-large");
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    for content_type in [
        "application/json",
        "application/cloudevents+json",
        "application/cloudevents-batch+json",
    ] {
        assert_problem(
            &api.publish("a", content_type, &[], deep.clone()).await,
            422,
            "invalid-message",
        );
    }
    let deep = api.client.post(api.url("/v1/queues/q/receive")).body(deep);
    assert_problem(
        &answer(deep.send().await.unwrap()).await,
        422,
        "invalid-request",
    );
    let invalid = vec![b'"', 0xff, b'"'];
    assert_problem(
        &api.publish("a", "application/json", &[], invalid.clone())
            .await,
        422,
        "invalid-message",
    );
    let invalid = api
        .client
        .post(api.url("/v1/queues/q/receive"))
        .body(invalid);
    assert_eq!(answer(invalid.send().await.unwrap()).await.status / 100, 4);
    let later = api
        .publish(
            "a",
            "application/json",
            &[("ce-deliverat", "2030-01-01T00:00:00Z")],
            "1",
        )
        .await;
    assert_problem(&later, 422, "invalid-message");
    assert_eq!(later.body["errors"][0]["header"], "ce-deliverat");
    assert_eq!(
        api.get("/v1/streams/main").await.body["last_offset"],
        0,
        "nothing was published"
    );
    api.stop().await;
}
