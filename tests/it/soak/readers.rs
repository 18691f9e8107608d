//! Many readers of one stream by server-sent events, some of which take nothing.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::{peak_resident_mib, size};
use crate::support::consumer::publish;
use crate::support::{self, Http};

/// What the issue allows the broker with 1,000 readers.
const RESIDENT_MAX_MIB: u64 = 250;

async fn ask(http: &Http, receive_buffer: u32) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(receive_buffer).unwrap();
    let address = http.base.trim_start_matches("http://").parse().unwrap();
    let mut connection = socket.connect(address).await.unwrap();
    let request = "GET /v1/streams/main/messages HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n";
    connection.write_all(request.as_bytes()).await.unwrap();
    connection
}

/// Counts the events up to a number and checks their ids. By hand and over a few buffers: a thousand clients of the usual
/// kind take longer than the broker.
async fn count(mut connection: TcpStream, count: u64) {
    let mut buffer = vec![0; 16 << 10];
    let (mut line, mut next) = (Vec::new(), 1);
    while next <= count {
        let read = connection.read(&mut buffer).await.unwrap();
        assert!(read > 0, "the broker ended the answer at {next}");
        for &byte in &buffer[..read] {
            if byte != b'\n' {
                // Only the beginning of a line matters.
                if line.len() < 40 {
                    line.push(byte);
                }
                continue;
            }
            if let Some(id) = line.strip_prefix(b"id: ") {
                let id: u64 = std::str::from_utf8(id).unwrap().trim().parse().unwrap();
                assert_eq!(id, next, "no gap, nothing twice");
                next += 1;
            }
            line.clear();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_readers_follow_one_stream_in_bounded_memory() {
    let readers = size("POSTROAD_SOAK_READERS", 40);
    let messages = size("POSTROAD_SOAK_READER_MESSAGES", 2_000);
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    let started = Instant::now();
    // A third is there to be replayed.
    publish(&http, "a", usize::try_from(messages / 3).unwrap()).await;
    let mut stalled = Vec::new();
    let mut reading = Vec::new();
    for number in 0..readers {
        if number % 10 == 9 {
            stalled.push(ask(&http, 4_096).await);
        } else {
            let connection = ask(&http, 64 << 10).await;
            reading.push(tokio::spawn(count(connection, messages)));
        }
    }
    let left = messages - messages / 3;
    for _ in 0..left / 100 {
        publish(&http, "a", 100).await;
    }
    publish(&http, "a", usize::try_from(left % 100).unwrap()).await;
    let published = started.elapsed();
    let count = reading.len();
    for reader in reading {
        tokio::time::timeout(Duration::from_secs(300), reader)
            .await
            .expect("every reader gets everything")
            .unwrap();
    }
    let peak = peak_resident_mib(program.pid());
    println!(
        "{readers} readers, {} of which take nothing: {messages} messages published in {published:.1?}, with all {count} readers in \
         {:.1?}, peak resident {peak} MiB",
        stalled.len(),
        started.elapsed(),
    );
    assert!(peak < RESIDENT_MAX_MIB, "{peak} MiB");
    let (status, stream) = http.get("/v1/streams/main").await;
    assert_eq!(
        (status.as_u16(), &stream["last_offset"]),
        (200, &json!(messages))
    );
}
