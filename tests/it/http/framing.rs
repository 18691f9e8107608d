//! Messages of HTTP to the letter: RFC 9110 and RFC 9112.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{Api, answer, assert_problem};

/// Sends bytes and reads until the server closes; it must, within some seconds.
async fn raw(api: &Api, bytes: &str) -> String {
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut found = Vec::new();
    let reading = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut found));
    let _ = reading.await.expect("the server closes");
    String::from_utf8_lossy(&found).into_owned()
}

#[tokio::test]
async fn a_request_has_one_host_and_a_coding_that_is_known() {
    let api = Api::start().await;
    let publish = "POST /v1/topics/a/messages HTTP/1.1\r\nhost: localhost\r\n";
    let chunked = "connection: close\r\ntransfer-encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n\r\n";
    for (head, status) in [
        (
            "GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n".to_owned(),
            400,
        ),
        (
            "GET /healthz HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n".to_owned(),
            400,
        ),
        (
            "GET /healthz HTTP/1.0\r\nhost: localhost\r\nhost: b\r\n\r\n".to_owned(),
            400,
        ),
        (
            "GET /healthz HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\n".to_owned(),
            400,
        ),
        (
            "GET /healthz HTTP/1.1\r\nhost: a b\r\nconnection: close\r\n\r\n".to_owned(),
            400,
        ),
        ("GET /healthz HTTP/1.0\r\n\r\n".to_owned(), 200),
        ("GET /nowhere HTTP/1.1\r\n\r\n".to_owned(), 400),
        (
            "GET http://localhost/healthz HTTP/1.1\r\n\r\n".to_owned(),
            400,
        ),
        (
            "GET http://localhost/healthz HTTP/1.1\r\nhost: other\r\nconnection: close\r\n\r\n"
                .to_owned(),
            200,
        ),
        (format!("{publish}{chunked}"), 200),
        (
            format!("{publish}{}", chunked.replace("chunked", "Chunked")),
            200,
        ),
        (
            format!("{publish}{}", chunked.replace("chunked", "gzip, chunked")),
            501,
        ),
        (
            format!("{publish}{}", chunked.replace("chunked", "x-else, chunked")),
            501,
        ),
    ] {
        let found = raw(&api, &head).await;
        let found: Vec<&str> = found
            .lines()
            .filter(|line| line.starts_with("HTTP/1."))
            .collect();
        assert_eq!(found.len(), 1, "{head:?}: {found:?}");
        assert!(
            found[0].contains(&format!(" {status} ")),
            "{head:?}: {found:?}"
        );
    }
    api.stop().await;
}

#[tokio::test]
async fn who_asks_first_is_told_at_once_that_it_is_too_much() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    for (path, length) in [
        ("/v1/topics/a/messages", 99_999_999_999_u64),
        ("/v1/topics/a/messages", 17 << 20),
        ("/v1/queues/q/ack", 99_999_999_999),
    ] {
        let began = Instant::now();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
        );
        let found = raw(&api, &head).await;
        assert!(
            found.starts_with("HTTP/1.1 413 "),
            "no word to begin: {found}"
        );
        assert!(began.elapsed() < Duration::from_secs(2), "{path} {length}");
    }
    // One that fits is told to begin.
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    let head = "POST /v1/topics/a/messages HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut found = [0; 12];
    stream.read_exact(&mut found).await.unwrap();
    assert_eq!(&found, b"HTTP/1.1 100");
    api.stop().await;
}

#[tokio::test]
async fn coded_bodies_are_refused_everywhere() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    for (method, path, kind) in [
        ("POST", "/v1/topics/a/messages", "application/octet-stream"),
        ("POST", "/v1/topics/a/messages", "text/plain"),
        (
            "POST",
            "/v1/topics/a/messages",
            "application/cloudevents+json",
        ),
        ("POST", "/v1/messages", "application/json"),
        ("POST", "/v1/queues/q/receive", "application/json"),
        ("PUT", "/v1/queues/q", "application/json"),
        ("PUT", "/v1/locks/l", "application/json"),
    ] {
        for coding in ["gzip", "br", "identity, zstd", "X-Else"] {
            let asked = api
                .client
                .request(method.parse().unwrap(), api.url(path))
                .header("content-type", kind)
                .header("content-encoding", coding)
                .body("{}");
            let refused = answer(asked.send().await.unwrap()).await;
            assert_problem(&refused, 415, "unsupported-media-type");
            assert_eq!(refused.headers["accept-encoding"], "identity", "{path}");
        }
    }
    let taken = api
        .publish("a", "text/plain", &[("content-encoding", "identity")], "x")
        .await;
    assert_eq!(taken.status, 200, "{taken:?}");
    api.stop().await;
}

#[tokio::test]
async fn every_body_is_an_object() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    let purge = json!([null, null, null, null, null, null, null, null, null, null]);
    for (method, path, body, pointer) in [
        ("PUT", "/v1/locks/l", json!(["me", 30, 0, null]), ""),
        ("PUT", "/v1/queues/r", json!(["main"]), ""),
        (
            "PUT",
            "/v1/queues/r",
            json!({"retry": [1, 2, 3, 0.1, null]}),
            "/retry",
        ),
        ("PUT", "/v1/queues/r", json!({"start": [5]}), "/start"),
        (
            "PUT",
            "/v1/queues/r",
            json!({"start": ["2026-01-01T00:00:00Z"]}),
            "/start",
        ),
        ("PUT", "/v1/streams/s", json!([["s.>"]]), ""),
        ("PUT", "/v1/topics/t", json!([{}, 1, 1]), ""),
        ("PUT", "/v1/schedules/s", json!(["a", "* * * * *"]), ""),
        ("POST", "/v1/queues/q/receive", purge.clone(), ""),
        (
            "POST",
            "/v1/queues/q/receive",
            json!({"ack": [["x"]]}),
            "/ack/0",
        ),
        ("POST", "/v1/queues/q/ack", json!([[{"receipt": "x"}]]), ""),
        (
            "POST",
            "/v1/queues/q/ack",
            json!({"deliveries": [["x"]]}),
            "/deliveries/0",
        ),
        (
            "POST",
            "/v1/queues/q/nack",
            json!({"deliveries": [["x", 1, "y"]]}),
            "/deliveries/0",
        ),
        (
            "POST",
            "/v1/queues/q/extend",
            json!({"deliveries": [["x", 1]]}),
            "/deliveries/0",
        ),
        (
            "POST",
            "/v1/queues/q/release",
            json!({"deliveries": [["x"]]}),
            "/deliveries/0",
        ),
        (
            "POST",
            "/v1/queues/q/reject",
            json!({"deliveries": [["x", "y"]]}),
            "/deliveries/0",
        ),
        ("POST", "/v1/queues/q/seek", json!(["latest", null]), ""),
        ("POST", "/v1/queues/q/seek", json!({"to": [1]}), "/to"),
        ("POST", "/v1/queues/q/purge", purge.clone(), ""),
        (
            "POST",
            "/v1/queues/q/redrives",
            json!(["a", ["1-1"], null, null, true]),
            "",
        ),
        (
            "POST",
            "/v1/queues/q/redrives",
            json!({"filter": [null, null, null, null]}),
            "/filter",
        ),
        (
            "POST",
            "/v1/queues/q/in-flight/expire",
            json!(["me", null, null]),
            "",
        ),
        ("POST", "/v1/queues/q/messages/1/reject", json!(["why"]), ""),
        (
            "POST",
            "/v1/origins/local/rejected/1/resend",
            json!([null, null, null]),
            "",
        ),
    ] {
        let refused = api.call(method, path, Some(body.clone())).await;
        assert_problem(&refused, 422, "invalid-request");
        let places: Vec<&Value> = refused.body["errors"].as_array().unwrap().iter().collect();
        assert_eq!(places[0]["pointer"], pointer, "{path} {body}: {places:?}");
    }
    // Publishing says it in its own words.
    for body in [json!([]), json!([[]]), json!({"messages": [["a", 1]]})] {
        let refused = api.post("/v1/messages", body).await;
        assert_problem(&refused, 422, "invalid-message");
    }
    for kind in [
        "application/cloudevents+json",
        "application/cloudevents-batch+json",
    ] {
        let refused = api
            .publish("a", kind, &[], "[[\"1.0\", \"1\", \"/s\"]]")
            .await;
        assert_problem(&refused, 422, "invalid-message");
    }
    api.stop().await;
}

#[tokio::test]
async fn what_is_not_wanted_is_not_sent() {
    let api = Api::start().await;
    let ask = async |accept: &str, last: Option<&str>| {
        let mut asked = api.client.get(api.url("/v1/streams/main/messages"));
        asked = asked.header("accept", accept);
        if let Some(last) = last {
            asked = asked.header("last-event-id", last);
        }
        let found = asked.send().await.unwrap();
        let kind = found.headers()["content-type"].to_str().unwrap().to_owned();
        (found.status().as_u16(), kind)
    };
    let (events, json) = (
        "text/event-stream".to_owned(),
        "application/json".to_owned(),
    );
    for (accept, last, kind) in [
        ("text/event-stream;q=0, application/json", None, &json),
        ("text/event-stream;q=0", None, &json),
        (
            "text/event-stream;q=0.1, application/json;q=0.9",
            None,
            &json,
        ),
        (
            "text/event-stream;q=0.9, application/json;q=0.1",
            None,
            &events,
        ),
        ("text/event-stream", Some(""), &events),
        ("text/event-stream", Some("0"), &events),
    ] {
        assert_eq!(
            ask(accept, last).await,
            (200, kind.clone()),
            "{accept} {last:?}"
        );
    }
    assert_eq!(ask("text/event-stream", Some("x")).await.0, 422);
    api.stop().await;
}

#[tokio::test]
async fn a_scraper_gets_the_format_that_it_knows() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    let ask = async |accept: &str| {
        let asked = api.client.get(api.url("/metrics")).header("accept", accept);
        answer(asked.send().await.unwrap()).await
    };
    let open =
        ask("application/openmetrics-text;version=1.0.0, text/plain;version=0.0.4;q=0.5").await;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(open.headers["content-type"], kind);
    assert!(open.body.as_str().unwrap().ends_with("# EOF\n"));
    let families = |text: &str| {
        text.lines()
            .filter(|line| line.starts_with("# TYPE "))
            .count()
    };
    let old = ask("text/plain;version=0.0.4").await;
    assert_eq!(
        old.headers["content-type"],
        "text/plain; version=0.0.4; charset=utf-8"
    );
    let text = old.body.as_str().unwrap();
    assert_eq!(families(text), families(open.body.as_str().unwrap()));
    assert!(!text.contains("# EOF") && !text.contains("# UNIT"));
    // Every sample is of a family by its own name, and no family is without a type.
    let mut kinds = std::collections::BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(kinds.insert(name, kind).is_none(), "{name} twice");
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let suffixes = ["_bucket", "_sum", "_count"];
            let family = suffixes.iter().find_map(|suffix| {
                let family = name.strip_suffix(suffix)?;
                (kinds.get(family) == Some(&"histogram")).then_some(family)
            });
            assert!(kinds.contains_key(family.unwrap_or(name)), "{line}");
        }
    }
    assert_eq!(kinds["postroad_http_requests_total"], "counter");
    assert_eq!(kinds["postroad_http_request_duration_seconds"], "histogram");
    api.stop().await;
}

#[tokio::test]
async fn names_are_no_steps_of_a_path() {
    let api = Api::start().await;
    let body = json!({"topics": ["a"]});
    for name in ["%2e", "%2E%2e", "..."] {
        for (method, path, body) in [
            ("PUT", format!("/v1/queues/{name}"), Some(body.clone())),
            ("PUT", format!("/v1/streams/{name}"), Some(body.clone())),
            (
                "PUT",
                format!("/v1/locks/{name}"),
                Some(json!({"owner": "a", "ttl_seconds": 5})),
            ),
            ("GET", format!("/v1/schedules/{name}"), None),
            ("GET", format!("/v1/queues/{name}"), None),
        ] {
            // As it stands: a client's URL would take the steps.
            let body = body.map(|body| body.to_string()).unwrap_or_default();
            let head = format!(
                "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            let found = raw(&api, &head).await;
            assert!(
                found.starts_with("HTTP/1.1 422 "),
                "{method} {path}: {found}"
            );
        }
    }
    let redrive = json!({"redrive_id": "..", "filter": {}});
    api.queue("q", json!({})).await;
    let refused = api.post("/v1/queues/q/redrives", redrive).await;
    assert_problem(&refused, 422, "invalid-request");
    api.stop().await;
}

#[tokio::test]
async fn methods_that_a_path_does_not_take_are_named() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    for (method, path, allowed) in [
        (
            "PATCH",
            "/v1/queues/q",
            vec!["GET", "HEAD", "PUT", "DELETE"],
        ),
        ("OPTIONS", "/v1/queues/q/receive", vec!["POST"]),
        ("TRACE", "/healthz", vec!["GET", "HEAD"]),
        ("HEAD", "/v1/queues/q/receive", vec!["POST"]),
        ("DELETE", "/metrics", vec!["GET", "HEAD"]),
    ] {
        let found = api.call(method, path, None).await;
        assert_eq!(found.status, 405, "{method} {path}");
        let allow = found.headers["allow"].to_str().unwrap();
        let allow: std::collections::BTreeSet<&str> = allow.split(',').map(str::trim).collect();
        assert_eq!(allow, allowed.into_iter().collect(), "{method} {path}");
    }
    let connect = raw(
        &api,
        "CONNECT localhost:80 HTTP/1.1\r\nhost: localhost:80\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(connect.starts_with("HTTP/1.1 404 "), "{connect}");
    // A part of a page, and what has not changed since, are not spoken of: the whole is the answer.
    let asked = api
        .client
        .get(api.url("/openapi.yaml"))
        .header("range", "bytes=0-9")
        .header("if-none-match", "*");
    assert_eq!(asked.send().await.unwrap().status(), 200);
    let slash = api.get("/v1/queues/a%2Fb").await;
    assert_problem(&slash, 422, "invalid-request");
    api.stop().await;
}
