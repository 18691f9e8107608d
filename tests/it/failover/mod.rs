//! The broker's own database fails over or is restored, under load: nothing is skipped in silence. What is kept goes on where it
//! was; what is lost is known; what an outbox still holds comes again; a receipt of what was lost settles nothing.

mod broker;
mod mapped;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::relay::{Origin, Verdict, judge, read_log, shop};
use crate::support::consumer::{items, patiently, publish_ids, stream_ids};
use crate::support::{self, Cluster, Consumer, Http, Program};

/// The queues that are consumed all the time.
const QUEUES: usize = 3;
/// A queue whose messages are taken and held.
const HELD: &str = "held";

/// The time that makes no difference to a test.
const HOUR: u32 = 3_600;

/// A node on the broker's database, with an origin in another server.
async fn node(url: &str, origin: &Origin) -> Program {
    node_of(None, url, origin).await
}

/// The same, of another program than the one under test.
pub async fn node_of(file: Option<OsString>, url: &str, origin: &Origin) -> Program {
    let relay = origin.relay_url();
    let variables = [
        ("POSTROAD_NODE_TTL_SECONDS", "2"),
        ("POSTROAD_NODE_HEARTBEAT_SECONDS", "0.2"),
        ("POSTROAD_DATABASE_POOL_SIZE", "8"),
        ("POSTROAD_ORIGINS", r#"{"shop": {"url_env": "SHOP_URL"}}"#),
        ("SHOP_URL", relay.as_str()),
    ];
    match file {
        Some(file) => support::broker::program_of(file, url, &variables).await,
        None => support::program(url, &variables).await,
    }
}

/// An origin with the shop's tables, in a server of its own.
pub async fn shop_origin() -> (Cluster, Origin) {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    (server, origin)
}

/// The queues.
pub async fn declare(http: &Http) -> Vec<Consumer> {
    let mut consumers = Vec::new();
    let all = json!({"topics": ["web.*", "orders.*"]});
    for number in 0..QUEUES {
        consumers.push(Consumer::declare(http, &format!("q{number}"), &all).await);
    }
    Consumer::declare(http, HELD, &json!({"topics": ["web.*"]})).await;
    consumers
}

/// What one queue's consumer was given and told.
#[derive(Debug, Default)]
pub struct Seen {
    /// Offset and id of each delivery.
    delivered: BTreeSet<(u64, String)>,
    /// Offsets whose ack was answered, with the delivery's number.
    acked: BTreeMap<u64, u64>,
    /// Deliveries after their ack was answered.
    pub again: Vec<String>,
}

/// Publishers, producers and consumers at work.
pub struct Load {
    is_over: Arc<AtomicBool>,
    is_relayed: Arc<AtomicBool>,
    publishers: Vec<JoinHandle<Vec<(String, u64)>>>,
    producers: shop::Producers,
    consumers: Vec<JoinHandle<()>>,
    seen: Vec<Arc<Mutex<Seen>>>,
}

/// What a load came to.
pub struct Outcome {
    /// Ids that were answered 2xx, with the offsets of the answers.
    pub published: Vec<(String, u64)>,
    pub seen: Vec<Seen>,
}

async fn publish(http: Http, name: usize, is_over: Arc<AtomicBool>) -> Vec<(String, u64)> {
    let mut published = Vec::new();
    for number in 0.. {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let ids: Vec<String> = (0..3).map(|n| format!("w{name}-{number}-{n}")).collect();
        let placed = publish_ids(&http, "web.created", &ids).await;
        let offsets = placed
            .iter()
            .map(|placed| placed["offset"].as_u64().unwrap());
        published.extend(ids.iter().cloned().zip(offsets));
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    published
}

/// Receives and acknowledges until it is over and nothing comes any more.
async fn consume(consumer: Consumer, seen: Arc<Mutex<Seen>>, is_over: Arc<AtomicBool>) {
    loop {
        let was_over = is_over.load(Ordering::Relaxed);
        let body = json!({"wait_seconds": 1, "max_messages": 50, "visibility_timeout_seconds": 5});
        let answer = consumer.receive(&body).await;
        let deliveries = answer["deliveries"].as_array().unwrap();
        // What was handed out in an answer that was lost comes again when its time is over.
        let is_rest = answer["reason"] == "empty" && answer["next_due_at"].is_null();
        if deliveries.is_empty() && was_over && is_rest {
            return;
        }
        let number = |delivery: &Value, name: &str| delivery[name].as_u64().unwrap();
        {
            let mut seen = seen.lock().unwrap();
            for delivery in deliveries {
                let (offset, times) = (number(delivery, "offset"), number(delivery, "delivery"));
                if seen.acked.get(&offset).is_some_and(|acked| times > *acked) {
                    seen.again
                        .push(format!("{offset} came again, as delivery {times}"));
                }
                let id = delivery["event"]["id"].as_str().unwrap().to_owned();
                seen.delivered.insert((offset, id));
            }
        }
        if deliveries.is_empty() {
            continue;
        }
        let outcomes = consumer.settle("ack", &items(deliveries, &json!({}))).await;
        let mut seen = seen.lock().unwrap();
        for (delivery, outcome) in deliveries.iter().zip(outcomes) {
            if outcome["result"] == "acked" {
                let times = number(delivery, "delivery");
                seen.acked.insert(number(delivery, "offset"), times);
            }
        }
    }
}

impl Load {
    pub fn start(http: &Http, origin: &Origin, consumers: &[Consumer]) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let is_relayed = Arc::new(AtomicBool::new(false));
        let publishers =
            (0..2).map(|name| tokio::spawn(publish(http.clone(), name, Arc::clone(&is_over))));
        let seen: Vec<Arc<Mutex<Seen>>> = consumers.iter().map(|_| Arc::default()).collect();
        let consumers = consumers.iter().zip(&seen);
        let consumers = consumers.map(|(consumer, seen)| {
            let consumer = Consumer {
                http: http.clone(),
                queue: consumer.queue.clone(),
            };
            tokio::spawn(consume(consumer, Arc::clone(seen), Arc::clone(&is_relayed)))
        });
        Self {
            publishers: publishers.collect(),
            producers: shop::Producers::start(origin, 1, "select 1"),
            consumers: consumers.collect(),
            seen,
            is_over,
            is_relayed,
        }
    }

    /// Ends it, once all that is committed is relayed and consumed.
    pub async fn finish(self, http: &Http, broker_url: &str, origin: &Origin) -> Outcome {
        self.producers.finish().await;
        self.is_over.store(true, Ordering::Relaxed);
        let mut published = Vec::new();
        for publisher in self.publishers {
            published.extend(publisher.await.unwrap());
        }
        let committed = shop::committed(origin).await;
        support::eventually("everything to be relayed", || async {
            let log = stream_ids(http, "main").await;
            let there = log.iter().filter(|(_, id)| committed.contains(id)).count();
            (there >= committed.len()).then_some(())
        })
        .await;
        self.is_relayed.store(true, Ordering::Relaxed);
        for consumer in self.consumers {
            consumer.await.unwrap();
        }
        let relayed: Vec<_> = read_log(broker_url).await;
        let relayed: Vec<_> = relayed
            .into_iter()
            .filter(|message| !message.id.starts_with('w') && !message.id.starts_with("held"))
            .collect();
        assert_eq!(judge(&committed, &relayed), Verdict::default());
        let seen = self.seen.into_iter();
        let seen = seen.map(|seen| Arc::try_unwrap(seen).unwrap().into_inner().unwrap());
        Outcome {
            published,
            seen: seen.collect(),
        }
    }
}

/// The histories of the broker's database, as a node tells them.
async fn histories(http: &Http) -> Vec<Value> {
    let cluster = patiently(http, reqwest::Method::GET, "/v1/cluster", None).await;
    cluster["histories"].as_array().unwrap().clone()
}

/// Waits until so many histories are known, and gives the first offset of the last one.
async fn history(http: &Http, count: usize) -> u64 {
    support::eventually("the history to be noticed", || async {
        let histories = histories(http).await;
        let last = histories.last()?;
        (histories.len() == count).then(|| last["first_offsets"]["main"].as_u64().unwrap())
    })
    .await
}

/// Waits for a heartbeat of the node: an older copy is known by lacking it.
async fn beaten(http: &Http) {
    let mut last = Value::Null;
    let mut beats = 0;
    while beats < 3 {
        let cluster = patiently(http, reqwest::Method::GET, "/v1/cluster", None).await;
        let mut nodes = cluster["nodes"].as_array().unwrap().iter();
        let own = nodes.find(|node| node["node"] == cluster["node"]);
        let expires_at = own.map_or(Value::Null, |own| own["expires_at"].clone());
        beats += usize::from(last != expires_at);
        last = expires_at;
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Publishes messages for the held queue and takes them for an hour.
pub async fn take_held(http: &Http, prefix: &str, count: usize) -> Vec<Value> {
    let ids: Vec<String> = (0..count).map(|n| format!("held-{prefix}-{n}")).collect();
    publish_ids(http, "web.held", &ids).await;
    let held = Consumer {
        http: http.clone(),
        queue: HELD.to_owned(),
    };
    let mut taken: Vec<Value> = Vec::new();
    let is_own = |taken: &&Value| {
        let id = taken["event"]["id"].as_str().unwrap();
        id.starts_with(&format!("held-{prefix}-"))
    };
    // Whatever else is published comes along.
    while taken.iter().filter(is_own).count() < count {
        let body =
            json!({"wait_seconds": 5, "max_messages": 500, "visibility_timeout_seconds": HOUR});
        let answer = held.receive(&body).await;
        taken.extend(answer["deliveries"].as_array().unwrap().iter().cloned());
    }
    taken
}

/// What is kept is where it was, what is lost is none of what was answered before the new history's first offset, and every queue has
/// seen what the log has. Gives how many answered publishes are lost.
pub async fn check(http: &Http, outcome: &Outcome, first_offset: u64) -> usize {
    let log = stream_ids(http, "main").await;
    let by_offset: BTreeMap<u64, &str> = log.iter().map(|(o, id)| (*o, id.as_str())).collect();
    let ids: BTreeSet<&str> = log.iter().map(|(_, id)| id.as_str()).collect();
    let mut lost = 0;
    for (id, offset) in &outcome.published {
        if by_offset.get(offset) == Some(&id.as_str()) {
            continue;
        }
        assert!(
            *offset >= first_offset,
            "{id} was said to be at {offset}, before {first_offset}"
        );
        assert!(!ids.contains(id.as_str()), "{id} moved from {offset}");
        lost += 1;
    }
    if first_offset < u64::MAX {
        // A reader that has more than the stream has is told so.
        let last = log.last().unwrap().0;
        for (after, status) in [(last, 200), (last + 1, 410)] {
            let path = format!("/v1/streams/main/messages?after={after}");
            let (found, answer) = http.get(&path).await;
            assert_eq!(found.as_u16(), status, "after {after}: {answer}");
        }
    }
    for (number, seen) in outcome.seen.iter().enumerate() {
        for (offset, id) in &log {
            let place = (*offset, id.clone());
            assert!(
                seen.delivered.contains(&place),
                "q{number} never had {place:?}"
            );
        }
        let consumer = Consumer {
            http: http.clone(),
            queue: format!("q{number}"),
        };
        assert_eq!(consumer.status().await["depth"], 0);
    }
    lost
}

/// Receipts of deliveries that are kept settle them. Those that were handed out in the part that is lost settle nothing, whether their
/// messages are kept or others stand at their offsets: all that was not settled is delivered.
pub async fn check_held(http: &Http, kept: &[Value], lost: &[Value]) {
    let held = Consumer {
        http: http.clone(),
        queue: HELD.to_owned(),
    };
    let acks = |deliveries| items(deliveries, &json!({}));
    held.settle_all("ack", &acks(kept), "acked").await;
    if !lost.is_empty() {
        held.settle_all("ack", &acks(lost), "gone").await;
    }
    let offset = |delivery: &Value| delivery["offset"].as_u64().unwrap();
    let settled: BTreeSet<u64> = kept.iter().map(offset).collect();
    let log = stream_ids(http, "main").await.into_iter();
    let web = log.filter(|(_, id)| id.starts_with('w') || id.starts_with("held"));
    let left: BTreeSet<u64> = web
        .map(|(offset, _)| offset)
        .filter(|offset| !settled.contains(offset))
        .collect();
    let came = held.take(left.len(), HOUR).await;
    assert_eq!(came.iter().map(offset).collect::<BTreeSet<u64>>(), left);
}
