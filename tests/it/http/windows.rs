//! HTTP/2 clients that shut their windows, frame by frame: what they leave unread is counted and ends, whatever else they send.

use std::time::{Duration, Instant};

use postroad::http::Options;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Api;
use crate::support;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
/// `END_STREAM` and `END_HEADERS`.
const WHOLE: u8 = 5;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A GET, by the static table of HPACK.
fn get(stream: u32, path: &str) -> Vec<u8> {
    let mut block = vec![0x82, 0x86];
    for (name, value) in [(0x01, "localhost"), (0x04, path)] {
        block.extend([name, u8::try_from(value.len()).unwrap()]);
        block.extend(value.as_bytes());
    }
    frame(HEADERS, WHOLE, stream, &block)
}

/// A connection whose windows for answers are of this size.
async fn connect(api: &Api, window: u32) -> TcpStream {
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let setting = [&4_u16.to_be_bytes()[..], &window.to_be_bytes()].concat();
    begin.extend(frame(SETTINGS, 0, 0, &setting));
    stream.write_all(&begin).await.unwrap();
    stream
}

/// The next frame's kind, and whether it acknowledges; none at the connection's end.
async fn next(stream: &mut TcpStream) -> Option<(u8, u8)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.ok()?;
    // Whoever does not answer pings is gone.
    if head[3] == PING && head[4] == 0 {
        let _ = stream.write_all(&frame(PING, 1, 0, &payload)).await;
    }
    if head[3] == SETTINGS && head[4] == 0 {
        let _ = stream.write_all(&frame(SETTINGS, 1, 0, &[])).await;
    }
    Some((head[3], head[4]))
}

/// Reads for so long while it sends pings; whether the connection ended meanwhile, and the frames that came.
async fn ends_within(stream: &mut TcpStream, time: Duration) -> (bool, Vec<u8>) {
    let (until, mut kinds) = (Instant::now() + time, Vec::new());
    let mut ping_at = Instant::now();
    while Instant::now() < until {
        if Instant::now() >= ping_at {
            ping_at = Instant::now() + Duration::from_millis(100);
            if stream.write_all(&frame(PING, 0, 0, &[7; 8])).await.is_err() {
                return (true, kinds);
            }
        }
        match timeout(Duration::from_millis(100), next(stream)).await {
            Ok(Some((kind, _))) => kinds.push(kind),
            Ok(None) => return (true, kinds),
            Err(_) => {}
        }
    }
    (false, kinds)
}

#[tokio::test]
async fn a_client_that_shuts_its_windows_and_answers_pings_is_not_served_for_ever() {
    let api = Api::with(Options {
        answer_patience: Duration::from_secs(1),
        ..Options::default()
    })
    .await;
    // A small answer, a problem, and a page above what is always let through.
    for _ in 0..10 {
        let payload = "x".repeat(10_000);
        api.publish("a", "text/plain", &[], payload).await;
    }
    for path in [
        "/v1/streams",
        "/v1/nothing",
        "/v1/streams/main/messages?max_messages=5",
        "/v1/streams/main/messages",
    ] {
        let mut stream = connect(&api, 0).await;
        stream.write_all(&get(1, path)).await.unwrap();
        let (has_ended, kinds) = ends_within(&mut stream, Duration::from_secs(10)).await;
        assert!(has_ended, "{path}: {kinds:?}");
        assert!(kinds.contains(&HEADERS) && !kinds.contains(&DATA), "{path}");
    }
    // With windows the same answers come, and the connection stays.
    let mut stream = connect(&api, 1 << 20).await;
    stream.write_all(&get(1, "/v1/streams")).await.unwrap();
    let (has_ended, kinds) = ends_within(&mut stream, Duration::from_secs(3)).await;
    assert!(!has_ended && kinds.contains(&DATA), "{kinds:?}");
    api.stop().await;
}

#[tokio::test]
async fn a_spare_place_is_for_one_request_over_http2_too() {
    let api = Api::with(Options {
        connections_max: 1,
        ..Options::default()
    })
    .await;
    api.queue("q", json!({})).await;
    // The only place, for as long as this waits.
    let body = r#"{"wait_seconds":50}"#;
    let head = format!(
        "POST /v1/queues/q/receive HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let polls = std::sync::Mutex::new(Vec::new());
    support::eventually("no place but spare ones", || async {
        let mut poll = TcpStream::connect(api.address).await.unwrap();
        poll.write_all(head.as_bytes()).await.unwrap();
        polls.lock().unwrap().push(poll);
        let mut stream = connect(&api, 1 << 20).await;
        stream.write_all(&get(1, "/healthz")).await.unwrap();
        let (_, kinds) = ends_within(&mut stream, Duration::from_millis(500)).await;
        (kinds.contains(&DATA) && kinds.contains(&GOAWAY)).then_some(())
    })
    .await;
    // Pings alone do not keep it.
    let mut stream = connect(&api, 1 << 20).await;
    let (has_ended, kinds) = ends_within(&mut stream, Duration::from_secs(9)).await;
    assert!(has_ended, "{kinds:?}");
    api.stop().await;
}
