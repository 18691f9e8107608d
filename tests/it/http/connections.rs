//! Connections: clients that are slow, that go away, that speak HTTP/2, and the end of the server.

use std::time::{Duration, Instant};

use postroad::http::Options;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::Api;
use crate::support;

/// Sends raw bytes and reads until the server closes, 10 s at most.
async fn raw(api: &Api, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(10), read)
        .await
        .expect("the server closes");
    String::from_utf8_lossy(&answer).into_owned()
}

fn impatient() -> Options {
    Options {
        idle_timeout: Duration::from_millis(300),
        body_timeout: Duration::from_millis(300),
        ..Options::default()
    }
}

#[tokio::test]
async fn slow_clients_lose_their_connection() {
    let api = Api::with(impatient()).await;
    for (bytes, start) in [
        ("", ""),
        ("GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-never: ", ""),
        (
            "POST /v1/topics/a/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n12345",
            "HTTP/1.1 408",
        ),
        (
            "GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n",
            "HTTP/1.1 200",
        ),
    ] {
        let answer = raw(&api, bytes.as_bytes()).await;
        assert!(answer.starts_with(start), "{bytes:?}: {answer}");
    }
    // A byte now and then does not keep a head going.
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    stream
        .write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-never: ")
        .await
        .unwrap();
    let began = Instant::now();
    while stream.write_all(b"a").await.is_ok() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "a head of one byte at a time goes on"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    api.stop().await;
}

#[tokio::test]
async fn chunked_bodies_are_counted_as_they_come() {
    let api = Api::start().await;
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    let head = "POST /v1/topics/a/messages HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = ["100000\r\n".as_bytes(), &vec![b'x'; 1 << 20], b"\r\n"].concat();
    for _ in 0..17 {
        stream.write_all(&chunk).await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    api.stop().await;
}

#[tokio::test]
async fn heads_without_end_are_refused() {
    let api = Api::start().await;
    let mut head = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-long: ".to_vec();
    head.extend(std::iter::repeat_n(b'a', 200_000));
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    let _ = stream.write_all(&head).await;
    let mut answer = [0; 12];
    // The server answers 431 and closes; with so much unread the answer can be lost to a reset.
    if stream.read_exact(&mut answer).await.is_ok() {
        assert_eq!(&answer, b"HTTP/1.1 431");
    }
    let many = format!(
        "GET /healthz HTTP/1.1\r\nhost: localhost\r\n{}\r\n",
        "x-a: b\r\n".repeat(200)
    );
    assert!(raw(&api, many.as_bytes()).await.starts_with("HTTP/1.1 431"));
    api.stop().await;
}

#[tokio::test]
async fn http2_without_tls_works() {
    let api = Api::start().await;
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let response = client.get(api.url("/healthz")).send().await.unwrap();
    assert_eq!(response.version(), reqwest::Version::HTTP_2);
    api.queue("q", json!({})).await;
    api.publish("a", "application/json", &[], "1").await;
    let received = client
        .post(api.url("/v1/queues/q/receive"))
        .json(&json!({"wait_seconds": 5}));
    let received = super::answer(received.send().await.unwrap()).await;
    assert_eq!(received.body["deliveries"].as_array().unwrap().len(), 1);
    let live = api.get("/v1/queues/q/in-flight").await;
    assert_eq!(
        live.body["deliveries"].as_array().unwrap().len(),
        1,
        "written, so not released"
    );
    api.stop().await;
}

#[tokio::test]
async fn what_waits_for_an_http2_window_is_not_written() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    let large = format!("\"{}\"", "x".repeat(200_000));
    api.publish("a", "application/json", &[], large).await;
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .http2_initial_stream_window_size(32_768)
        .build()
        .unwrap();
    let receive = client
        .post(api.url("/v1/queues/q/receive"))
        .json(&json!({"wait_seconds": 5, "visibility_timeout_seconds": 3_600}));
    let response = receive.send().await.unwrap();
    assert_eq!(response.status(), 200);
    // Flushes of the same connection go by meanwhile.
    for _ in 0..3 {
        client.get(api.url("/healthz")).send().await.unwrap();
    }
    // The client leaves with most of it unread.
    drop(response);
    let again = client
        .post(api.url("/v1/queues/q/receive"))
        .json(&json!({"wait_seconds": 10}));
    let again = super::answer(again.send().await.unwrap()).await;
    assert_eq!(again.body["deliveries"].as_array().unwrap().len(), 1);
    api.stop().await;
}

fn receive_head(queue: &str, wait_seconds: u32) -> String {
    let body = format!("{{\"wait_seconds\":{wait_seconds}}}");
    format!(
        "POST /v1/queues/{queue}/receive HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn a_client_that_left_its_long_poll_gets_nothing() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    // The call for the metrics is one of them.
    let in_flight = |count: u64| {
        let (api, wanted) = (&api, format!("postroad_http_requests_in_flight {count}\n"));
        async move {
            support::eventually("requests in flight", || async {
                let metrics = api.get("/metrics").await;
                metrics.body.as_str()?.contains(&wanted).then_some(())
            })
            .await;
        }
    };
    for _ in 0..50 {
        let mut stream = TcpStream::connect(api.address).await.unwrap();
        stream
            .write_all(receive_head("q", 30).as_bytes())
            .await
            .unwrap();
        in_flight(2).await;
        drop(stream);
        in_flight(1).await;
    }
    api.publish("a", "application/json", &[], "1").await;
    let received = api.receive("q", json!({"wait_seconds": 5})).await;
    let delivery = &received.body["deliveries"][0];
    assert_eq!(
        (&delivery["delivery"], &delivery["attempt"]),
        (&json!(1), &json!(1))
    );
    api.stop().await;
}

#[tokio::test]
async fn an_answer_that_was_not_written_costs_no_attempt() {
    let api = Api::start().await;
    api.queue("q", json!({"visibility_timeout_seconds": 3600}))
        .await;
    // Together with the small buffer below, more than the kernel takes for a client that does not read.
    let large = "x".repeat(1 << 20 >> 1);
    for _ in 0..20 {
        let published = api.publish("a", "text/plain", &[], large.clone()).await;
        assert_eq!(published.status, 200);
    }
    for _ in 0..5 {
        let body = "{\"wait_seconds\":5,\"max_messages\":20,\"max_bytes\":16777216}";
        let head = format!(
            "POST /v1/queues/q/receive HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4_096).unwrap();
        let mut stream = socket.connect(api.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
        drop(stream);
        support::eventually("all released", || async {
            let queue = api.get("/v1/queues/q").await;
            (queue.body["status"]["in_flight"] == 0).then_some(())
        })
        .await;
    }
    let received = api
        .receive("q", json!({"wait_seconds": 5, "max_messages": 1}))
        .await;
    assert_eq!(
        received.body["deliveries"][0]["attempt"], 1,
        "no attempt was charged"
    );
    api.stop().await;
}

#[tokio::test]
async fn the_end_answers_long_polls_and_finishes_requests() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    let waiting = {
        let (client, url) = (api.client.clone(), api.url("/v1/queues/q/receive"));
        tokio::spawn(async move {
            let request = client.post(url).json(&json!({"wait_seconds": 50}));
            super::answer(request.send().await.unwrap()).await
        })
    };
    support::eventually("the waiter", || async {
        let queue = api.get("/v1/queues/q").await;
        (queue.body["status"]["waiters"] == 1).then_some(())
    })
    .await;
    let began = Instant::now();
    api.stop_server().await;
    assert!(began.elapsed() < Duration::from_secs(5));
    let answer = waiting.await.unwrap();
    assert_eq!(
        (answer.status, &answer.body["deliveries"]),
        (200, &json!([]))
    );
    assert!(
        TcpStream::connect(api.address).await.is_err(),
        "nothing listens any more"
    );
    assert!(!api.readiness.reasons().is_empty());
    api.stop().await;
}
