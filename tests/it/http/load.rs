//! Many clients at a time: what their bodies and answers hold together, and who is served when all places are taken.

use std::time::{Duration, Instant};

use postroad::http::Options;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::{Answer, Api, answer, assert_problem};
use crate::support::process::{peak_resident_bytes, resident_bytes};
use crate::support::{self, Http};

const MIB: usize = 1 << 20;

/// Sends a head and some of its body, and leaves the connection open.
async fn begin(address: &str, path: &str, length: usize, sent: usize) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The broker may answer, and close, before it has all.
    let _ = stream.write_all(&vec![b' '; sent]).await;
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_many_clients_are_bounded_together() {
    let db = support::database().await;
    let variables = [("POSTROAD_HTTP_MEMORY_BYTES", "67108864")];
    let program = support::program(&db.url, &variables).await;
    let address = program.http.base.trim_start_matches("http://").to_owned();
    program
        .http
        .declare("/v1/queues/q", &json!({"topics": ["a"]}))
        .await;
    let before = resident_bytes(program.pid());
    let clients: Vec<_> = (0..150)
        .map(|_| {
            let address = address.clone();
            tokio::spawn(async move {
                let path = "/v1/topics/a/messages";
                let mut stream = begin(&address, path, 16 * MIB, 16 * MIB - 1).await;
                let mut head = [0; 12];
                let reading = stream.read_exact(&mut head);
                let read = tokio::time::timeout(Duration::from_secs(20), reading).await;
                let is_refused = matches!(read, Ok(Ok(_))) && &head == b"HTTP/1.1 503";
                (stream, is_refused)
            })
        })
        .collect();
    // Meanwhile what is small goes on.
    for number in 0..20 {
        program
            .http
            .ok("/v1/topics/a/messages", &json!(number))
            .await;
        let receive = json!({"max_messages": 1, "wait_seconds": 5});
        let received = program.http.ok("/v1/queues/q/receive", &receive).await;
        let receipt = &received["deliveries"][0]["receipt"];
        let acks = json!({"deliveries": [{"receipt": receipt}]});
        let acked = program.http.ok("/v1/queues/q/ack", &acks).await;
        assert_eq!(acked["deliveries"][0]["result"], "acked");
    }
    let mut refused = 0;
    let mut open = Vec::new();
    for client in clients {
        let (stream, is_refused) = client.await.unwrap();
        refused += usize::from(is_refused);
        open.push(stream);
    }
    assert!(refused > 100, "{refused} were told that there is no room");
    let peak = peak_resident_bytes(program.pid());
    let most = before + 200 * MIB as u64;
    assert!(peak < most, "{peak} bytes of memory, {before} before");
    drop(open);
    // All of it is given back.
    support::eventually("room for a large body", || async {
        let body = json!("x".repeat(900_000));
        let answer = program.http.post("/v1/topics/a/messages", &body).await;
        (answer.0 == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_body_may_be_as_large_as_its_route_needs() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    let blank = |bytes: usize| " ".repeat(bytes) + "{}";
    for (method, path, most) in [
        ("PUT", "/v1/queues/q", 64 << 10),
        ("PUT", "/v1/streams/s", 64 << 10),
        ("PUT", "/v1/locks/l", 64 << 10),
        ("POST", "/v1/queues/q/purge", 64 << 10),
        ("POST", "/v1/queues/q/receive", 8 * MIB),
        ("POST", "/v1/queues/q/ack", 8 * MIB),
        ("POST", "/v1/topics/a/messages", 16 * MIB + (64 << 10)),
    ] {
        let ask = async |bytes: usize| {
            let asked = api
                .client
                .request(method.parse().unwrap(), api.url(path))
                .header("content-type", "application/json")
                .body(blank(bytes));
            answer(asked.send().await.unwrap()).await
        };
        let refused = ask(most).await;
        assert_problem(&refused, 413, "payload-too-large");
        assert_eq!(refused.body["limit_bytes"], most, "{path}");
        let taken = ask(most - 1_000).await;
        assert_ne!(taken.body["type"], "/problems/payload-too-large", "{path}");
    }
    api.stop().await;
}

/// Asks for a page by a connection that takes almost nothing of the answer.
async fn unread(api: &Api, path: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    let mut stream = socket.connect(api.address).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn unread_answers_are_bounded_together() {
    let api = Api::with(Options {
        memory_bytes: 32 * MIB,
        ..Options::default()
    })
    .await;
    for _ in 0..12 {
        let large = "x".repeat(MIB - 10_000);
        assert_eq!(api.publish("a", "text/plain", &[], large).await.status, 200);
    }
    let path = "/v1/streams/main/messages?max_messages=1000&max_bytes=12582912";
    let mut open = Vec::new();
    // The first takes the room; the kernel's buffers take little of it.
    let mut first = unread(&api, path).await;
    let mut head = [0; 12];
    first.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
    for _ in 0..10 {
        open.push(unread(&api, path).await);
    }
    let refused = api.get(path).await;
    assert_problem(&refused, 503, "overloaded");
    assert!(refused.headers.contains_key("retry-after"));
    // What is small does not wait for it.
    let began = Instant::now();
    assert_eq!(api.get("/v1/streams").await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(2));
    drop((first, open));
    support::eventually("room for a page", || async {
        (api.get(path).await.status == 200).then_some(())
    })
    .await;
    api.stop().await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_makes_room_for_those_that_wait() {
    let api = Api::with(Options {
        memory_bytes: 32 * MIB,
        answer_patience: Duration::from_secs(6),
        ..Options::default()
    })
    .await;
    for _ in 0..12 {
        let large = "x".repeat(MIB - 10_000);
        assert_eq!(api.publish("a", "text/plain", &[], large).await.status, 200);
    }
    let path = "/v1/streams/main/messages?max_messages=1000&max_bytes=12582912";
    let mut first = unread(&api, path).await;
    let mut head = [0; 12];
    first.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
    assert_eq!(
        api.get(path).await.status,
        200,
        "although the first is there"
    );
    api.stop().await;
}

#[tokio::test]
async fn a_short_keep_alive_is_no_short_time_for_an_answer() {
    let api = Api::with(Options {
        idle_timeout: Duration::from_millis(300),
        ..Options::default()
    })
    .await;
    for _ in 0..12 {
        let large = "x".repeat(MIB - 10_000);
        assert_eq!(api.publish("a", "text/plain", &[], large).await.status, 200);
    }
    let path = "/v1/streams/main/messages?max_messages=1000&max_bytes=12582912";
    let mut slow = unread(&api, path).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut found = Vec::new();
    let reading = slow.read_to_end(&mut found);
    let read = tokio::time::timeout(Duration::from_secs(30), reading).await;
    read.expect("idle once it is taken").unwrap();
    assert!(found.len() > 12 * (MIB - 10_000), "{}", found.len());
    assert!(found.ends_with(b"}"));
    api.stop().await;
}

/// On one thread: a body that is read on it stops everything else.
#[tokio::test]
async fn a_body_that_takes_long_to_read_stops_nobody_else() {
    let api = Api::start().await;
    let members: Vec<String> = (0..150_000)
        .map(|number| format!("\"{number:x}\":1"))
        .collect();
    let object = format!("{{{}}}", members.join(","));
    let batch = format!("[{{\"specversion\":\"1.0\",\"data\":{object}}}]");
    let messages = format!("{{\"messages\":[{{\"topic\":\"a\",\"data\":{object}}}]}}");
    let acks = format!(
        "{{\"deliveries\":[{}]}}",
        "{\"receipt\":\"x\"},".repeat(200_000)
    );
    for (path, content_type, body) in [
        (
            "/v1/topics/a/messages",
            "application/cloudevents-batch+json",
            batch,
        ),
        ("/v1/messages", "application/json", messages),
        ("/v1/queues/q/ack", "application/json", acks),
    ] {
        let began = Instant::now();
        let request = api
            .client
            .post(api.url(path))
            .header("content-type", content_type);
        let mut asked = Box::pin(request.body(body).send());
        let (mut longest, mut last) = (Duration::ZERO, Instant::now());
        let status = loop {
            tokio::select! {
                biased;
                () = tokio::time::sleep(Duration::from_millis(1)) => {
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                }
                answer = &mut asked => break answer.unwrap().status(),
            }
        };
        longest = longest.max(last.elapsed());
        assert!(status.is_client_error(), "{path}: {status}");
        let took = began.elapsed();
        assert!(longest * 2 < took, "{path}: {longest:?} of {took:?}");
    }
    api.stop().await;
}

async fn probe(api: &Api, path: &str) -> Answer {
    // A connection of its own, as probes have.
    let client = reqwest::Client::builder().timeout(Duration::from_secs(10));
    let asked = client.build().unwrap().get(api.url(path)).send();
    answer(asked.await.unwrap()).await
}

#[tokio::test]
async fn probes_are_answered_when_all_places_are_taken() {
    let api = Api::with(Options {
        connections_max: 8,
        ..Options::default()
    })
    .await;
    api.queue("q", json!({})).await;
    // All wait for messages: none of them is idle. One can be refused while a connection of this test's is.
    let polls = std::sync::Mutex::new(Vec::new());
    let body = r#"{"wait_seconds":50}"#;
    let head = format!(
        "POST /v1/queues/q/receive HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    support::eventually("no place", || async {
        let metrics = probe(&api, "/metrics").await.body;
        let count = metrics.as_str()?.lines().find_map(|line| {
            let count = line.strip_prefix("postroad_http_requests_in_flight ")?;
            count.parse::<u64>().ok()
        });
        // The probe is one of them.
        if count? > 8 {
            return Some(());
        }
        let mut stream = TcpStream::connect(api.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        polls.lock().unwrap().push(stream);
        None
    })
    .await;
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(probe(&api, path).await.status, 200, "{path}");
    }
    assert_problem(&probe(&api, "/v1/queues").await, 503, "overloaded");
    // They end, and their places are had.
    polls.lock().unwrap().clear();
    support::eventually("a place", || async {
        (probe(&api, "/v1/queues").await.status == 200).then_some(())
    })
    .await;
    api.stop().await;
}

#[tokio::test]
async fn idle_connections_end_first() {
    let api = Api::with(Options {
        connections_max: 8,
        ..Options::default()
    })
    .await;
    api.queue("q", json!({})).await;
    // One follows a stream and hears nothing for long: it is not idle.
    let asked = api.client.get(api.url("/v1/streams/main/messages"));
    let asked = asked.header("accept", "text/event-stream").send();
    let mut follows = asked.await.unwrap();
    follows.chunk().await.unwrap();
    let mut idle = Vec::new();
    for _ in 0..20 {
        idle.push(TcpStream::connect(api.address).await.unwrap());
    }
    let began = Instant::now();
    for _ in 0..20 {
        support::eventually("an answer", || async {
            (probe(&api, "/v1/queues").await.status == 200).then_some(())
        })
        .await;
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    support::eventually("idle ones to end", || async {
        let ended = idle
            .iter()
            .filter(|stream| match stream.try_read(&mut [0]) {
                Ok(count) => count == 0,
                Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
            });
        (ended.count() >= 10).then_some(())
    })
    .await;
    api.publish("a", "application/json", &[], "1").await;
    let event = tokio::time::timeout(Duration::from_secs(10), follows.chunk()).await;
    assert!(
        event.unwrap().unwrap().is_some(),
        "the reader is still there"
    );
    api.stop().await;
}

#[tokio::test]
async fn who_sends_nothing_more_gets_the_answer() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    for (body, count) in [("1".to_owned(), 20), ("1".repeat(900_000), 2)] {
        for number in 0..count {
            let mut stream = TcpStream::connect(api.address).await.unwrap();
            let head = format!(
                "POST /v1/topics/a/messages HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut found = String::new();
            let reading = stream.read_to_string(&mut found);
            let read = tokio::time::timeout(Duration::from_secs(20), reading).await;
            read.expect("the connection ends after it").unwrap();
            assert!(found.starts_with("HTTP/1.1 200"), "{number}: {found}");
        }
    }
    // A large answer, too.
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    let head = "GET /v1/streams/main/messages HTTP/1.1\r\nhost: localhost\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut found = Vec::new();
    let reading = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut found));
    reading.await.unwrap().unwrap();
    assert!(
        found.len() > 1_800_000 && found.ends_with(b"}"),
        "{}",
        found.len()
    );
    // A body that is not whole is none.
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    let head =
        "POST /v1/topics/a/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n1";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut found = String::new();
    let reading = tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut found));
    let _ = reading.await.expect("it ends at once");
    assert!(!found.starts_with("HTTP/1.1 200"), "{found}");
    // One that waits for messages is over with its sender.
    let taken = api
        .receive("q", json!({"max_messages": 100, "wait_seconds": 5}))
        .await;
    let acks: Vec<_> = taken.body["deliveries"]
        .as_array()
        .unwrap()
        .iter()
        .collect();
    assert_eq!(acks.len(), 22);
    let body = r#"{"wait_seconds":50}"#;
    let head = format!(
        "POST /v1/queues/q/receive HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    for _ in 0..20 {
        let mut stream = TcpStream::connect(api.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut found = Vec::new();
        let reading = stream.read_to_end(&mut found);
        let ended = tokio::time::timeout(Duration::from_secs(10), reading).await;
        let _ = ended.expect("it ends at once");
    }
    support::eventually("no waiters", || async {
        let queue = api.get("/v1/queues/q").await;
        (queue.body["status"]["waiters"] == 0).then_some(())
    })
    .await;
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preface_that_does_not_come_costs_nothing() {
    let db = support::database().await;
    let program = support::program(&db.url, &[]).await;
    let address = program.http.base.trim_start_matches("http://").to_owned();
    let mut open = Vec::new();
    for _ in 0..500 {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(b"P").await.unwrap();
        open.push(stream);
    }
    let Http { base, .. } = &program.http;
    assert_eq!(
        reqwest::get(format!("{base}/healthz"))
            .await
            .unwrap()
            .status(),
        200
    );
    let began = Instant::now();
    // They end by themselves, long before an idle connection would.
    for mut stream in open {
        let mut found = Vec::new();
        let reading = stream.read_to_end(&mut found);
        let left = Duration::from_secs(20).saturating_sub(began.elapsed());
        let _ = tokio::time::timeout(left, reading).await.expect("it ends");
        assert!(found.is_empty());
    }
    // In pieces it is taken all the same.
    let mut stream = TcpStream::connect(&address).await.unwrap();
    for piece in ["P", "RI ", "* HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        stream.write_all(piece.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stream
        .write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0])
        .await
        .unwrap();
    let mut frame = [0; 4];
    stream.read_exact(&mut frame).await.unwrap();
    assert_eq!(frame[3], 4, "its settings");
}
