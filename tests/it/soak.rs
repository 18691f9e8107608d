//! What time and size do to a broker: old snapshots held open, backlogs, a stream of which a queue wants almost nothing, a
//! client of Postgres' own as the producer. Small by default; `make soak` runs them at full size and prints the figures.
//! Nothing here asserts a speed: what is asserted is what came, in which order, and what grew.

mod backlog;
mod held;
mod idle;
mod keyed;
mod keys;
mod lanes;
mod many;
mod pgbench;
mod readers;
mod reasons;
mod scheduled;
mod stuck;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::{Http, Program};

/// A size from the environment, or the everyday one.
fn size(variable: &str, everyday: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(everyday)
}

/// The most memory that a process has had resident, in MiB; 0 where there is no /proc.
fn peak_resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1))
        .and_then(|kib| kib.parse::<u64>().ok())
        .unwrap_or_default()
        / 1024
}

/// What consumers wrote down.
#[derive(Debug, Default)]
struct Received {
    /// Of each message's `n` (a number that its producer gave once), how often it came.
    times: HashMap<u64, u32>,
    /// When how many came, for windows of time.
    batches: Vec<(Instant, usize)>,
    /// When, and seconds from a message's insert to its receipt, where the message says when it was inserted.
    latencies: Vec<(Instant, f64)>,
}

/// Several consumers of a queue. Each receives and acknowledges until told to stop.
struct Consumers {
    tasks: Vec<JoinHandle<Received>>,
    stop: Arc<AtomicBool>,
    received_count: Arc<std::sync::atomic::AtomicU64>,
}

impl Consumers {
    fn start(http: &Http, queue: &str, count: usize, batch: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let received_count = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let tasks = (0..count)
            .map(|_| {
                let http = http.clone();
                let queue = queue.to_owned();
                let stop = Arc::clone(&stop);
                let received_count = Arc::clone(&received_count);
                tokio::spawn(async move {
                    let mut received = Received::default();
                    while !stop.load(Ordering::Relaxed) {
                        consume_once(&http, &queue, batch, &mut received, &received_count).await;
                    }
                    received
                })
            })
            .collect();
        Self {
            tasks,
            stop,
            received_count,
        }
    }

    /// Waits until so many deliveries came.
    async fn wait_for(&self, count: u64, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.received_count.load(Ordering::Relaxed) < count {
            assert!(
                Instant::now() < deadline,
                "{} of {count} came in {patience:?}",
                self.received_count.load(Ordering::Relaxed)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends them and puts their records together.
    async fn finish(self) -> Received {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Received::default();
        for task in self.tasks {
            let one = task.await.unwrap();
            for (n, times) in one.times {
                *all.times.entry(n).or_default() += times;
            }
            all.batches.extend(one.batches);
            all.latencies.extend(one.latencies);
        }
        all.batches.sort();
        all
    }
}

async fn consume_once(
    http: &Http,
    queue: &str,
    batch: usize,
    received: &mut Received,
    received_count: &std::sync::atomic::AtomicU64,
) {
    let answer = http
        .ok(
            &format!("/v1/queues/{queue}/receive"),
            &json!({"max_messages": batch, "wait_seconds": 1}),
        )
        .await;
    let deliveries = answer["deliveries"].as_array().unwrap();
    if deliveries.is_empty() {
        return;
    }
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();
    for delivery in deliveries {
        let data = &delivery["event"]["data"];
        *received
            .times
            .entry(data["n"].as_u64().unwrap())
            .or_default() += 1;
        if let Some(at) = data["at"].as_f64() {
            received.latencies.push((Instant::now(), now - at));
        }
    }
    received.batches.push((Instant::now(), deliveries.len()));
    let receipts: Vec<Value> = deliveries
        .iter()
        .map(|delivery| json!({"receipt": delivery["receipt"]}))
        .collect();
    let acked = http
        .ok(
            &format!("/v1/queues/{queue}/ack"),
            &json!({"deliveries": receipts}),
        )
        .await;
    assert_eq!(acked["settled"], deliveries.len(), "{acked}");
    received_count.fetch_add(deliveries.len() as u64, Ordering::Relaxed);
}

/// The given quantile of a list, 0 when it is empty.
fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values
        .get((last as f64 * q).round() as usize)
        .copied()
        .unwrap_or_default()
}

/// Waits until the outbox of `local` is relayed whole.
async fn relayed(program: &Program, patience: Duration) {
    let deadline = Instant::now() + patience;
    loop {
        let (_, origins) = program.http.get("/v1/origins").await;
        let local = origins["origins"]
            .as_array()
            .and_then(|all| all.iter().find(|origin| origin["name"] == "local"))
            .cloned()
            .unwrap_or_default();
        if local["lag_rows"] == 0 && local["state"] == "running" {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "not relayed in {patience:?}: {local}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
