//! Clients that go away in the middle of every verb: within the request, right after it, while the broker works on it, with
//! the answer half read or not at all; by an orderly end or by a reset.
//!
//! POSTROAD_TEST_DISCONNECTS is how often per verb; 60 everyday.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::{at_once, size};
use crate::support::consumer::{items, patiently, publish_ids, stream_ids};
use crate::support::{self, Consumer, Http, TestDatabase};

fn rounds() -> usize {
    size("POSTROAD_TEST_DISCONNECTS", 60)
}

/// How a client leaves, by the number of the round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leave {
    /// With a part of the request sent: the broker must do nothing.
    Within,
    /// At once after the request.
    AtOnce,
    /// While the broker works on it, or after it has: so long after the request.
    After(Duration),
}

impl Leave {
    fn of(round: usize) -> Self {
        match round % 4 {
            0 => Self::Within,
            1 => Self::AtOnce,
            // Up to 6 ms, in steps that no rhythm of the broker's shares.
            _ => Self::After(Duration::from_micros((round as u64 * 773) % 6_000)),
        }
    }
}

fn request(path: &str, content: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content}\r\ncontent-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

async fn connect(http: &Http) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    // An answer of any size does not fit into the kernel's buffers.
    socket.set_recv_buffer_size(4_096).unwrap();
    let address = http.base.trim_start_matches("http://").parse().unwrap();
    socket.connect(address).await.unwrap()
}

/// Sends a request and leaves.
async fn leave(http: &Http, round: usize, request: &[u8]) {
    let mut stream = connect(http).await;
    let how = Leave::of(round);
    let end = match how {
        // Its last byte at least is missing; often all of the body, or part of the head.
        Leave::Within => 1 + (round * 7_919) % (request.len() - 1),
        _ => request.len(),
    };
    stream.write_all(&request[..end]).await.unwrap();
    if let Leave::After(pause) = how {
        tokio::time::sleep(pause).await;
    }
    if round % 8 >= 4 {
        stream.set_zero_linger().unwrap();
    }
}

/// A session of the database, other than the asking one, that is inside a transaction and does nothing, or for too long.
async fn in_transaction(database: &TestDatabase) -> Option<String> {
    sqlx::query_scalar(
        "select concat_ws(', ', pid, state, left(query, 100)) from pg_stat_activity \
         where datname = current_database() and pid <> pg_backend_pid() \
           and (state like 'idle in transaction%' or xact_start < clock_timestamp() - interval '1 s')",
    )
    .fetch_optional(&mut database.connect().await)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_left_in_a_transaction_would_be_seen() {
    let database = support::database().await;
    assert_eq!(in_transaction(&database).await, None);
    let mut left = database.connect().await;
    sqlx::query("begin").execute(&mut left).await.unwrap();
    sqlx::query("select 1").execute(&mut left).await.unwrap();
    let seen = in_transaction(&database).await.unwrap();
    assert!(seen.contains("idle in transaction"), "{seen}");
}

/// What must hold afterwards whatever happened: no request is under way, no session of the broker's is inside a transaction.
async fn nothing_is_left_behind(http: &Http, database: &TestDatabase) {
    support::eventually("the requests to end", || async {
        let (_, metrics) = http.get("/metrics").await;
        let wanted = "postroad_http_requests_in_flight 1\n";
        metrics.as_str()?.contains(wanted).then_some(())
    })
    .await;
    let began = Instant::now();
    // One that works has begun just now; one that was left behind stays.
    while let Some(stuck) = in_transaction(database).await {
        assert!(began.elapsed() < Duration::from_secs(2), "{stuck}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The pool has its connections: more calls at a time than it has connections.
    let calls = (0..20).map(|_| patiently(http, reqwest::Method::GET, "/v1/streams", None));
    futures_util::future::join_all(calls).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publishers_that_leave_publish_all_or_nothing() {
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let http = &program.http;
    let ids: Vec<String> = (0..rounds()).map(|round| format!("left-{round}")).collect();
    for (round, id) in ids.iter().enumerate() {
        let event = json!([
            {"specversion": "1.0", "id": id, "source": "/test", "type": "t", "data": {"id": id}},
            {"specversion": "1.0", "id": format!("{id}-too"), "source": "/test", "type": "t", "data": {"id": format!("{id}-too")}},
        ]);
        let content = "application/cloudevents-batch+json";
        let path = "/v1/topics/orders.created/messages";
        leave(http, round, &request(path, content, &event.to_string())).await;
    }
    nothing_is_left_behind(http, &database).await;
    // An append goes on although its caller is gone. Appends are in order: after this one they are done.
    publish_ids(http, "orders.created", &["after".to_owned()]).await;
    let before = stream_ids(http, "main").await;
    let mut came = 0;
    for (round, id) in ids.iter().enumerate() {
        let pair = [id.clone(), format!("{id}-too")];
        let placed = publish_ids(http, "orders.created", &pair).await;
        let there: Vec<bool> = pair
            .iter()
            .map(|id| before.iter().any(|(_, there)| there == id))
            .collect();
        assert_eq!(there[0], there[1], "{id}: all or nothing");
        assert_eq!(placed[0]["duplicate"], there[0], "{id}");
        if Leave::of(round) == Leave::Within {
            assert!(!there[0], "{id}: the request was not complete");
        }
        came += usize::from(there[0]);
    }
    assert!(came > 0, "some requests were carried out");
    assert_eq!(stream_ids(http, "main").await.len(), 2 * ids.len() + 1);
    println!("publish: {came} of {} were carried out", ids.len());
}

/// Clients that leave while they carry out a verb, one delivery each. Gives the results of a repeat.
async fn settlers_leave(
    verb: &'static str,
    members: Value,
    undone: &'static str,
    done: &'static str,
) {
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let http = &program.http;
    let consumer = Consumer::declare(http, "billing", &at_once(16)).await;
    support::consumer::publish(http, "orders.created", rounds()).await;
    let taken = consumer.take(rounds(), 3_600).await;
    let first = consumer.in_flight().await;
    for (round, item) in items(&taken, &members).into_iter().enumerate() {
        let body = json!({"deliveries": [item]}).to_string();
        let path = format!("/v1/queues/billing/{verb}");
        leave(http, round, &request(&path, "application/json", &body)).await;
    }
    nothing_is_left_behind(http, &database).await;
    let live = consumer.in_flight().await;
    let is_untouched = |delivery: &Value| first.contains(delivery);
    let untouched: Vec<u64> = live
        .iter()
        .filter(|delivery| is_untouched(delivery))
        .map(|delivery| delivery["offset"].as_u64().unwrap())
        .collect();
    let outcomes = consumer.settle(verb, &items(&taken, &members)).await;
    let mut came = 0;
    for (round, (outcome, delivery)) in outcomes.iter().zip(&taken).enumerate() {
        let was_done = !untouched.contains(&delivery["offset"].as_u64().unwrap());
        let expected = if was_done { done } else { undone };
        assert_eq!(outcome["result"], expected, "{verb} {round}: {outcome}");
        if Leave::of(round) == Leave::Within {
            assert!(!was_done, "{verb} {round}: the request was not complete");
        }
        came += usize::from(was_done);
    }
    assert!(came > 0, "some requests were carried out");
    let numbers = consumer.status().await;
    let unsettled = match verb {
        "ack" | "reject" => 0,
        _ => rounds(),
    };
    assert_eq!(numbers["depth"], unsettled, "{verb}");
    println!("{verb}: {came} of {} were carried out", rounds());
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_leave_an_ack_settle_it_or_not() {
    settlers_leave("ack", json!({}), "acked", "already_settled").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_leave_a_nack_end_it_or_not() {
    settlers_leave("nack", json!({"delay_seconds": 3600}), "nacked", "nacked").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_leave_a_release_end_it_or_not() {
    let later = json!({"delay_seconds": 3600});
    settlers_leave("release", later, "released", "released").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_leave_an_extend_extend_it_or_not() {
    let longer = json!({"visibility_timeout_seconds": 7200});
    settlers_leave("extend", longer, "extended", "extended").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_leave_a_reject_settle_it_or_not() {
    settlers_leave("reject", json!({}), "rejected", "dead_lettered").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pollers_that_leave_get_nothing() {
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let http = &program.http;
    let consumer = Consumer::declare(http, "billing", &at_once(16)).await;
    let body = r#"{"wait_seconds": 50, "visibility_timeout_seconds": 43200}"#;
    let poll = request("/v1/queues/billing/receive", "application/json", body);
    for round in 0..rounds() {
        leave(http, round, &poll).await;
    }
    nothing_is_left_behind(http, &database).await;
    assert_eq!(consumer.status().await["waiters"], 0);
    publish_ids(http, "orders.created", &["one".to_owned()]).await;
    let taken = consumer.take(1, 3_600).await;
    assert_eq!(
        (&taken[0]["delivery"], &taken[0]["attempt"]),
        (&json!(1), &json!(1))
    );
}

/// Messages are there, and the client leaves within the request, or with an answer on its way that it never reads.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_never_written_hide_no_message_and_charge_no_attempt() {
    const MESSAGES: usize = 4;
    let database = support::database().await;
    // Each message alone is more than a socket's buffers take.
    let limit = ("POSTROAD_MESSAGE_MAX_BYTES", "16777216");
    let program = support::program(&database.url, &[limit]).await;
    let http = &program.http;
    let consumer = Consumer::declare(http, "billing", &at_once(1_000)).await;
    let large = json!({"text": "x".repeat(6 << 20)});
    for _ in 0..MESSAGES {
        http.ok("/v1/topics/orders.created/messages", &large).await;
    }
    let body = r#"{"wait_seconds": 10, "max_messages": 1, "max_bytes": 16777216, "visibility_timeout_seconds": 43200}"#;
    let receive = request("/v1/queues/billing/receive", "application/json", body);
    let (mut read_some, all) = (0, rounds());
    for round in 0..all {
        if round % 2 == 0 {
            leave(http, round / 2, &receive).await;
            continue;
        }
        let mut stream = connect(http).await;
        stream.write_all(&receive).await.unwrap();
        let mut start = vec![0; 12 + (round * 7_919) % 100_000];
        stream.read_exact(&mut start).await.unwrap();
        assert!(start.starts_with(b"HTTP/1.1 200"));
        read_some += 1;
        if round % 4 == 1 {
            stream.set_zero_linger().unwrap();
        }
    }
    nothing_is_left_behind(http, &database).await;
    support::eventually("all to be taken back", || async {
        (consumer.status().await["in_flight"] == 0).then_some(())
    })
    .await;
    let taken = consumer.take(MESSAGES, 3_600).await;
    let deliveries: u64 = taken.iter().map(|d| d["delivery"].as_u64().unwrap()).sum();
    assert!(taken.iter().all(|delivery| delivery["attempt"] == 1));
    println!(
        "{all} receives left, {read_some} in the middle of the answer, {deliveries} deliveries of {MESSAGES} messages"
    );
}

/// As above with small messages: the kernel takes an answer that nobody reads, and the broker cannot know. Such a message is
/// there again when its time is up, no later.
#[tokio::test(flavor = "multi_thread")]
async fn receivers_that_leave_hide_no_message_beyond_its_deadline() {
    const MESSAGES: usize = 20;
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let http = &program.http;
    let consumer = Consumer::declare(http, "billing", &at_once(1_000)).await;
    support::consumer::publish(http, "orders.created", MESSAGES).await;
    let body = r#"{"wait_seconds": 0, "max_messages": 1, "visibility_timeout_seconds": 1}"#;
    let receive = request("/v1/queues/billing/receive", "application/json", body);
    for round in 0..rounds() {
        leave(http, round, &receive).await;
    }
    nothing_is_left_behind(http, &database).await;
    let began = Instant::now();
    // Those that expired twice go out alone.
    let taken = consumer.take(MESSAGES, 3_600).await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    let charged: u64 = taken
        .iter()
        .map(|d| d["attempt"].as_u64().unwrap() - 1)
        .sum();
    let complete = (0..rounds()).filter(|&round| Leave::of(round) != Leave::Within);
    assert!(charged <= complete.count() as u64);
    println!(
        "receive: {charged} of {} were charged, all there after {took:?}",
        rounds()
    );
}
