//! Readers by server-sent events: replay and then live without a gap, resumed, filtered, too slow, overtaken by retention.

use std::time::Duration;

use postroad::http::Options;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use super::{Api, assert_problem};
use crate::support::{Events, eventually};

const BATCH: &str = "application/cloudevents-batch+json";

async fn publish(api: &Api, topic: &str, numbers: std::ops::Range<u64>) {
    let batch: Vec<Value> = numbers
        .map(|n| json!({"specversion": "1.0", "partitionkey": format!("k{}", n % 3), "data": {"n": n}}))
        .collect();
    let body = serde_json::to_vec(&batch).unwrap();
    let answer = api.publish(topic, BATCH, &[], body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
}

async fn metric(api: &Api, line: &str) -> Option<String> {
    let metrics = api.get("/metrics").await;
    let text = metrics.body.as_str().unwrap();
    let found = text.lines().find_map(|one| one.strip_prefix(line));
    found.map(|value| value.trim().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_replays_and_then_follows_live_without_a_gap() {
    let api = std::sync::Arc::new(Api::start().await);
    publish(&api, "a.x", 0..700).await;
    let url = api.url("/v1/streams/main/messages");
    let mut readers = Vec::new();
    for _ in 0..5 {
        let url = url.clone();
        readers.push(tokio::spawn(async move {
            let mut events = Events::open(&url, None).await;
            let mut all = Vec::new();
            while all.len() < 1_500 {
                all.push(events.next().await.unwrap());
            }
            all
        }));
    }
    let writers = (0..8).map(|writer| {
        let api = std::sync::Arc::clone(&api);
        tokio::spawn(async move {
            for round in 0..10 {
                let first = 1_000 + writer * 100 + round * 10;
                publish(&api, "a.y", first..first + 10).await;
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let pages = api
        .get("/v1/streams/main/messages?after=650&max_messages=1000")
        .await;
    for reader in readers {
        let all = reader.await.unwrap();
        let ids: Vec<i64> = all.iter().map(|event| event.id).collect();
        assert_eq!(ids, (1..=1_500).collect::<Vec<_>>());
        assert!(all.iter().all(|event| event.name == "message"));
        let data: Vec<&Value> = all[650..].iter().map(|event| &event.data).collect();
        let page: Vec<&Value> = pages.body["messages"].as_array().unwrap().iter().collect();
        assert_eq!(data, page);
    }
    // Resumed in what is old, in what is recent, and at the end.
    for last in [3, 1_400, 1_500] {
        let mut events = Events::open(&format!("{url}?after=9"), Some(last)).await;
        if last == 1_500 {
            publish(&api, "a.x", 0..1).await;
        }
        assert_eq!(events.next().await.unwrap().id, last + 1);
    }
    eventually("the readers' tasks to end with their clients", || async {
        let count = metric(&api, "postroad_http_stream_readers ").await;
        (count.as_deref() == Some("0")).then_some(())
    })
    .await;
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_hold_in_the_past_and_live_and_heartbeats_move_the_id() {
    let api = Api::with(Options {
        reader_heartbeat: Duration::from_millis(100),
        ..Options::default()
    })
    .await;
    publish(&api, "a.x", 0..300).await;
    publish(&api, "b.x", 300..600).await;
    let url = api.url("/v1/streams/main/messages?topic=b.*&topic=c&key=k1");
    let mut events = Events::open(&url, None).await;
    for n in (301..600).step_by(3) {
        let event = events.next().await.unwrap();
        assert_eq!(event.data["event"]["data"]["n"], n);
        assert_eq!(event.id, n + 1);
    }
    publish(&api, "b.y", 0..30).await;
    publish(&api, "a.y", 0..30).await;
    publish(&api, "c", 0..2).await;
    for n in (1..30).step_by(3).chain([1]) {
        let event = events.next().await.unwrap();
        assert_eq!(event.data["event"]["data"]["n"], n);
        assert_eq!(event.data["event"]["partitionkey"], "k1");
    }
    publish(&api, "a.z", 0..10).await;
    let end = api.get("/v1/streams/main").await.body["last_offset"]
        .as_i64()
        .unwrap();
    // Nothing that matches: only heartbeats come.
    while events.last_id() < end {
        events.next_block().await;
    }
    assert!(events.comments > 0);
    publish(&api, "c", 1..2).await;
    assert_eq!(events.next().await.unwrap().id, end + 1);
    api.stop().await;
}

/// A client that asks and then reads nothing until it is told to.
async fn stalled(api: &Api, stream: &str) -> tokio::net::TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    let mut connection = socket.connect(api.address).await.unwrap();
    let request = format!(
        "GET /v1/streams/{stream}/messages HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n"
    );
    connection.write_all(request.as_bytes()).await.unwrap();
    connection
}

/// Reads all that is left and gives the last 500 bytes.
async fn read_rest(mut connection: tokio::net::TcpStream) -> String {
    let mut end = Vec::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = connection.read(&mut buffer).await.unwrap();
        end.extend_from_slice(&buffer[..count]);
        end.drain(..end.len().saturating_sub(500));
        // The end of a chunked body; the connection itself stays.
        if count == 0 || end.ends_with(b"0\r\n\r\n") {
            return String::from_utf8_lossy(&end).into_owned();
        }
    }
}

async fn publish_large(api: &Api, topic: &str, count: usize) {
    let body = "x".repeat(900_000);
    for _ in 0..count {
        let answer = api.publish(topic, "text/plain", &[], body.clone()).await;
        assert_eq!(answer.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_is_told_so_and_disconnected() {
    let api = Api::with(Options {
        reader_patience: Duration::from_secs(2),
        ..Options::default()
    })
    .await;
    let connection = stalled(&api, "main").await;
    publish_large(&api, "large", 24).await;
    eventually("the reader is given up", || async {
        let count = metric(
            &api,
            "postroad_http_stream_readers_ended_total{reason=\"too_slow\"} ",
        )
        .await;
        (count.as_deref() == Some("1")).then_some(())
    })
    .await;
    let rest = read_rest(connection).await;
    assert!(rest.contains("event: too_slow\ndata: {"), "{rest}");
    // One who reads gets all of it meanwhile.
    let mut events = Events::open(&api.url("/v1/streams/main/messages"), None).await;
    for n in 1..=24 {
        assert_eq!(events.next().await.unwrap().id, n);
    }
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_retention_dropped_is_said_before_and_during() {
    let api = Api::start().await;
    let short = json!({"topics": ["short"], "settled_retention_seconds": 1, "unsettled_retention_seconds": 1});
    let declared = api.call("PUT", "/v1/streams/short", Some(short)).await;
    assert_eq!(declared.status, 201);
    let connection = stalled(&api, "short").await;
    publish_large(&api, "short", 24).await;
    let mut first = 0;
    eventually("retention drops it all", || async {
        let stream = api.get("/v1/streams/short").await.body;
        (stream["first_offset"] == 25).then_some(())
    })
    .await;
    let rest = read_rest(connection).await;
    assert!(rest.contains("event: offset_gone\ndata: {"), "{rest}");
    assert!(rest.contains("\"first_offset\":25"), "{rest}");
    for path in [
        "/v1/streams/short/messages?after=0",
        "/v1/streams/short/messages?after=23",
    ] {
        let page = api.get(path).await;
        assert_problem(&page, 410, "offset-gone");
        first = page.body["first_offset"].as_i64().unwrap();
        let events = reqwest::Client::new()
            .get(api.url(path))
            .header("accept", "text/event-stream")
            .send()
            .await
            .unwrap();
        assert_eq!(events.status(), 410);
    }
    assert_eq!(first, 25);
    // Nothing is missing after the last one, nor for who takes what there is.
    for path in ["?after=24", "", "?at=2020-01-01T00:00:00Z"] {
        let page = api.get(&format!("/v1/streams/short/messages{path}")).await;
        assert_eq!(
            (page.status, &page.body["next_after"]),
            (200, &json!(24)),
            "{path}"
        );
    }
    let mut events = Events::open(&api.url("/v1/streams/short/messages"), Some(24)).await;
    publish(&api, "short", 0..1).await;
    assert_eq!(events.next().await.unwrap().id, 25);
    let deleted = api.call("DELETE", "/v1/streams/short", None).await;
    assert_eq!(deleted.status, 204);
    assert_eq!(events.next().await.unwrap().name, "stream_deleted");
    assert_eq!(events.next().await, None);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_are_limited_and_told_of_the_stop() {
    let api = Api::with(Options {
        readers_max: 1,
        ..Options::default()
    })
    .await;
    let path = "/v1/streams/main/messages";
    let mut events = Events::open(&api.url(path), None).await;
    let client = reqwest::Client::new();
    let ask = |path: &str| {
        let request = client.get(api.url(path));
        request.header("accept", "text/event-stream, */*").send()
    };
    let second = ask(path).await.unwrap();
    assert_eq!(second.status(), 429);
    assert!(second.headers().contains_key("retry-after"));
    assert_eq!(
        ask("/v1/streams/none/messages").await.unwrap().status(),
        404
    );
    let bounded = format!("{path}?max_messages=3");
    assert_eq!(ask(&bounded).await.unwrap().status(), 422);
    let wrong = client
        .get(api.url(path))
        .header("accept", "text/event-stream")
        .header("last-event-id", "x");
    assert_eq!(wrong.send().await.unwrap().status(), 422);
    publish(&api, "a", 0..1).await;
    assert_eq!(events.next().await.unwrap().id, 1);
    let ((), end) = tokio::join!(api.stop(), async {
        let end = events.next().await.unwrap();
        assert_eq!(events.next().await, None);
        end
    });
    assert_eq!(end.name, "stopping");
}
