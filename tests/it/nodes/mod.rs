//! Several nodes over one database: the real program, joined, stopped, killed and put to sleep. What moves is the least that must,
//! every node answers every request, and what one node has handed out another one settles.

mod api;
mod duties;
mod hand_over;
mod load;
mod many;
mod unreachable;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{self, Http, Program};

use api::owned_by;

/// The shortest that can be configured.
const TTL: Duration = Duration::from_secs(2);
const QUEUES: usize = 24;

/// Starts a node.
pub(crate) async fn node(url: &str) -> Program {
    let variables = [
        ("POSTROAD_NODE_TTL_SECONDS", "2"),
        ("POSTROAD_NODE_HEARTBEAT_SECONDS", "0.2"),
        ("POSTROAD_DATABASE_POOL_SIZE", "8"),
    ];
    support::program(url, &variables).await
}

/// Three of them, each with its share.
async fn three_nodes(url: &str) -> [Program; 3] {
    let nodes = [node(url).await, node(url).await, node(url).await];
    settled(&nodes[0].http, 3).await;
    nodes
}

/// A size from the environment, or the everyday one.
fn size(variable: &str, everyday: usize) -> usize {
    let given = std::env::var(variable).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(everyday)
}

fn queue(number: usize) -> String {
    format!("q{number}")
}

/// Declares queues on nodes in turn, all of one stream.
async fn declare(nodes: &[&Program]) {
    declare_queues(nodes, QUEUES).await;
}

async fn declare_queues(nodes: &[&Program], count: usize) {
    for number in 0..count {
        let http = &nodes[number % nodes.len()].http;
        let path = format!("/v1/queues/{}", queue(number));
        http.declare(&path, &json!({"topics": ["orders.*"]})).await;
    }
}

/// The number of a node.
async fn number(http: &Http) -> i64 {
    let (_, cluster) = http.get("/v1/cluster").await;
    cluster["node"].as_i64().unwrap()
}

/// Who is to hold each slot, as a node sees it.
fn assigned(cluster: &Value) -> BTreeMap<i64, i64> {
    let slots = cluster["slots"].as_array().unwrap().iter();
    slots
        .filter_map(|slot| Some((slot["slot"].as_i64()?, slot["node"].as_i64()?)))
        .collect()
}

/// How many slots each of the nodes is to hold.
fn shares(assigned: &BTreeMap<i64, i64>) -> BTreeMap<i64, usize> {
    let mut shares = BTreeMap::new();
    for node in assigned.values() {
        *shares.entry(*node).or_default() += 1;
    }
    shares
}

/// Whether every lease that is wanted is with the node that is to hold it.
fn is_settled(cluster: &Value) -> bool {
    let slots = cluster["slots"].as_array().unwrap().iter();
    let leases = cluster["leases"].as_array().unwrap().iter();
    let is_at_home = |held: &Value| held["holder"] == held["node"];
    let is_wanted = |held: &Value| held["epoch"] != 0;
    slots.filter(|slot| is_wanted(slot)).all(is_at_home) && leases.clone().all(is_at_home)
}

/// Waits until a node sees so many nodes, all that is wanted in the right hands; gives who is to hold each slot.
pub async fn settled(http: &Http, nodes: usize) -> BTreeMap<i64, i64> {
    support::eventually(&format!("{nodes} nodes, everything in place"), || async {
        let (_, cluster) = http.get("/v1/cluster").await;
        let live = cluster["nodes"].as_array()?.iter();
        let live = live.filter(|node| node["state"] == "live").count();
        let assigned = assigned(&cluster);
        let is_shared = assigned.len() == 64 && shares(&assigned).len() == nodes;
        (live == nodes && is_shared && is_settled(&cluster)).then_some(assigned)
    })
    .await
}

fn moves(before: &BTreeMap<i64, i64>, after: &BTreeMap<i64, i64>) -> usize {
    let moved = after
        .iter()
        .filter(|(slot, node)| before.get(*slot) != Some(*node));
    moved.count()
}

/// A client that asks another node when one does not answer, as one behind a balancer does.
#[derive(Debug, Clone)]
struct Ring {
    nodes: Arc<[Http]>,
    next: Arc<AtomicUsize>,
    /// Requests that had to be repeated.
    repeated: Arc<AtomicUsize>,
}

impl Ring {
    fn new(nodes: &[&Program]) -> Self {
        Self {
            nodes: nodes.iter().map(|node| node.http.clone()).collect(),
            next: Arc::default(),
            repeated: Arc::default(),
        }
    }

    /// Asks until the answer is 2xx.
    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Value {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let http = &self.nodes[number % self.nodes.len()];
            let told = match http.call(method.clone(), path, body).await {
                Ok((status, answer)) if status.is_success() => return answer,
                Ok((status, answer)) => {
                    assert_eq!(status.as_u16(), 503, "{method} {path}: {answer}");
                    answer.to_string()
                }
                Err(error) => error.to_string(),
            };
            assert!(Instant::now() < deadline, "{method} {path}: {told}");
            self.repeated.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn post(&self, path: &str, body: &Value) -> Value {
        self.ask(Method::POST, path, Some(body)).await
    }
}
