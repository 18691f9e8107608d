//! Long polls that wait for nothing: what they cost in memory and in work of the database, and who gets the first message.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::size;
use crate::support::consumer::publish;
use crate::support::process::{raise_open_files, resident_bytes};
use crate::support::{self, Http, Program, TestDatabase};

/// What each may take, also with a connection of its own, for which hyper keeps two buffers of 8 KiB.
const BYTES_MAX: u64 = 16_000;
/// Fewer polls than this are drowned by what else a process does with its memory.
const MEASURED_FROM: u64 = 5_000;

struct Idle {
    database: TestDatabase,
    program: Program,
    http: Http,
    count: u64,
}

impl Idle {
    async fn start() -> Self {
        let count = size("POSTROAD_SOAK_POLLS", 200);
        raise_open_files();
        let database = support::database().await;
        let program = support::program(&database.url, &[]).await;
        let http = program.http.clone();
        http.declare("/v1/queues/idle", &json!({"topics": ["orders.>"]}))
            .await;
        // What a first request makes is not what each costs.
        for _ in 0..20 {
            http.ok("/v1/queues/idle/receive", &json!({"wait_seconds": 0}))
                .await;
        }
        Self {
            database,
            program,
            http,
            count,
        }
    }

    async fn waiters(&self) -> u64 {
        let (_, queue) = self.http.get("/v1/queues/idle").await;
        queue["status"]["waiters"].as_u64().unwrap_or_default()
    }

    async fn all_wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(40);
        while self.waiters().await < self.count {
            assert!(Instant::now() < deadline, "{} wait", self.waiters().await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Commits of the broker's database in a while, by the server's own count, which it publishes with a delay.
    async fn commits_per_second(&self, during: Duration) -> f64 {
        async fn read(idle: &Idle) -> i64 {
            // Statistics are flushed by backends at most once a second.
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            sqlx::query_scalar(
                "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()",
            )
            .fetch_one(&mut idle.database.connect().await)
            .await
            .unwrap()
        }
        let before = read(self).await;
        let since = Instant::now();
        tokio::time::sleep(during).await;
        (read(self).await - before) as f64 / since.elapsed().as_secs_f64()
    }

    /// Says what was used, and holds it against what is allowed.
    fn judge(&self, what: &str, before: u64, after: u64, commits: (f64, f64)) {
        let each = after.saturating_sub(before) / self.count;
        println!(
            "{} idle polls over {what}: {each} bytes each ({} MiB resident before, {} MiB with them); commits per second: {:.1} without, {:.1} with",
            self.count,
            before >> 20,
            after >> 20,
            commits.0,
            commits.1,
        );
        // Statistics come a little late, more so on a busy machine: a few commits fall into the wrong second.
        assert!(commits.1 <= commits.0 * 1.25 + 2.0, "{commits:?}");
        if self.count >= MEASURED_FROM {
            assert!(each < BYTES_MAX, "{each} bytes each");
        }
    }
}

fn address(http: &Http) -> SocketAddr {
    http.base.trim_start_matches("http://").parse().unwrap()
}

fn receive_head() -> String {
    let body = r#"{"wait_seconds":50,"max_messages":1,"visibility_timeout_seconds":600}"#;
    format!(
        "POST /v1/queues/idle/receive HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Reads an answer whose length its head says, and gives its body.
async fn read_answer(stream: &mut TcpStream) -> Value {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.unwrap().parse().unwrap();
            if bytes.len() >= end + 4 + length {
                return serde_json::from_slice(&bytes[end + 4..]).unwrap();
            }
        }
        let read = stream.read_buf(&mut bytes).await.unwrap();
        assert!(
            read > 0,
            "closed after {:?}",
            String::from_utf8_lossy(&bytes)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_polls_over_sockets_of_their_own_cost_memory_only_and_little_of_it() {
    let idle = Idle::start().await;
    let (pid, address) = (idle.program.pid(), address(&idle.http));
    let during = Duration::from_secs(5);
    let without = idle.commits_per_second(during).await;
    let before = resident_bytes(pid);
    let mut sockets = Vec::new();
    let head = receive_head();
    for _ in 0..idle.count {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        sockets.push(socket);
    }
    idle.all_wait().await;
    let after = resident_bytes(pid);
    let with = idle.commits_per_second(during).await;
    if idle.count >= 10_000 {
        let request = json!({"wait_seconds": 10});
        let (status, problem) = idle.http.post("/v1/queues/idle/receive", &request).await;
        assert_eq!(status, 429, "one more than a queue lets wait: {problem}");
    }
    // Each waits for one message, and as many come: none gets two, none goes away empty.
    let began = Instant::now();
    publish(
        &idle.http,
        "orders.created",
        usize::try_from(idle.count).unwrap(),
    )
    .await;
    let mut offsets = BTreeSet::new();
    for socket in &mut sockets {
        let answer = read_answer(socket).await;
        let deliveries = answer["deliveries"].as_array().unwrap();
        assert_eq!(deliveries.len(), 1, "{answer}");
        offsets.insert(deliveries[0]["offset"].as_u64().unwrap());
    }
    assert_eq!(offsets.len() as u64, idle.count);
    println!(
        "{} messages to as many waiters in {:?}",
        idle.count,
        began.elapsed()
    );
    idle.judge("HTTP/1.1, a socket each", before, after, (without, with));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_polls_over_shared_connections_cost_memory_only_and_little_of_it() {
    let idle = Idle::start().await;
    let pid = idle.program.pid();
    let during = Duration::from_secs(5);
    let without = idle.commits_per_second(during).await;
    let before = resident_bytes(pid);
    let mut polls = Vec::new();
    // A connection carries 256 requests at most.
    for first in (0..idle.count).step_by(250) {
        let client = reqwest::Client::builder()
            .http2_prior_knowledge()
            .build()
            .unwrap();
        for _ in first..idle.count.min(first + 250) {
            let url = format!("{}/v1/queues/idle/receive", idle.http.base);
            let request = client
                .post(url)
                .json(&json!({"wait_seconds": 50, "max_messages": 1}));
            polls.push(tokio::spawn(async move { request.send().await }));
        }
    }
    idle.all_wait().await;
    let after = resident_bytes(pid);
    let with = idle.commits_per_second(during).await;
    idle.judge(
        "HTTP/2, 250 to a connection",
        before,
        after,
        (without, with),
    );
    for poll in polls {
        poll.abort();
    }
}
