//! Many queues over three nodes: nobody's request fails while a node joins, leaves and is killed, as long as it may wait for twice
//! the time to live, and how long receives take meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use tokio::task::JoinHandle;

use super::{TTL, declare_queues, node, queue, settled, size};
use crate::support::{self, Http};

const CLIENTS: usize = 4;

/// When a receive was asked, and how long its answer took.
type Took = (Instant, Duration);

/// Receives at random queues by way of random nodes, without waiting for messages; every one must be answered with 200.
async fn receive(
    nodes: Vec<Http>,
    queues: usize,
    first: usize,
    is_over: Arc<AtomicBool>,
) -> Vec<Took> {
    let mut took = Vec::new();
    let mut number = first;
    while !is_over.load(Ordering::Relaxed) {
        // Steps that share no factor with the number of queues, mostly.
        number = number
            .wrapping_mul(6_364_136_223)
            .wrapping_add(1_442_695_040_888);
        let http = &nodes[(number >> 8) % nodes.len()];
        let path = format!("/v1/queues/{}/receive", queue((number >> 16) % queues));
        let asked = Instant::now();
        let body = json!({"wait_seconds": 0, "max_messages": 1});
        let answer = http.call(Method::POST, &path, Some(&body)).await;
        let (status, text) = answer.unwrap();
        assert_eq!(status.as_u16(), 200, "after {:?}: {text}", asked.elapsed());
        took.push((asked, asked.elapsed()));
    }
    took
}

fn quantile(took: &[Took], from: Instant, to: Instant, part: f64) -> (usize, Duration) {
    let within = took.iter().filter(|(asked, _)| (from..to).contains(asked));
    let mut sorted: Vec<Duration> = within.map(|(_, took)| *took).collect();
    sorted.sort_unstable();
    let place = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    (sorted.len(), sorted.get(place).copied().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_nodes_with_many_queues_come_and_go() {
    let queues = size("POSTROAD_TEST_NODE_QUEUES", 150);
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    declare_queues(&[&one, &two], queues).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let clients: Vec<JoinHandle<Vec<Took>>> = (0..CLIENTS)
        .map(|client| {
            let nodes = vec![one.http.clone(), two.http.clone()];
            tokio::spawn(receive(nodes, queues, client, Arc::clone(&is_over)))
        })
        .collect();
    let mut marks = vec![("two nodes", Instant::now())];
    tokio::time::sleep(TTL).await;
    marks.push(("a third joins", Instant::now()));
    let mut three = node(&db.url).await;
    settled(&one.http, 3).await;
    marks.push(("three nodes", Instant::now()));
    tokio::time::sleep(TTL).await;
    marks.push(("it leaves", Instant::now()));
    assert!(three.stop().await.success());
    settled(&two.http, 2).await;
    three.start().await;
    settled(&one.http, 3).await;
    marks.push(("it is killed", Instant::now()));
    three.kill().await;
    settled(&one.http, 2).await;
    marks.push(("two nodes again", Instant::now()));
    tokio::time::sleep(TTL).await;
    marks.push(("the end", Instant::now()));
    is_over.store(true, Ordering::Relaxed);
    let mut took = Vec::new();
    for client in clients {
        took.extend(client.await.unwrap());
    }
    for pair in marks.windows(2) {
        let (count, p99) = quantile(&took, pair[0].1, pair[1].1, 0.99);
        let (_, longest) = quantile(&took, pair[0].1, pair[1].1, 1.0);
        println!(
            "{queues} queues, {}, {:?}: {count} receives, none failed, p99 {p99:?}, longest {longest:?}",
            pair[0].0,
            pair[1].1 - pair[0].1,
        );
    }
    assert!(!took.is_empty());
}
