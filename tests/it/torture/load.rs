//! What works on the nodes while they are tortured, and writes down what it was told: publishers, readers, consumers; and a watch
//! on what is left to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use chrono::{SecondsFormat, TimeDelta, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinHandle;

use super::rare;
use super::world::{MAPPED, World};
use crate::history::liveness::Sample;
use crate::history::log::{Fate, Read, Sent, Transaction};
use crate::history::{Order, Recorder, Rules};
use crate::relay::Origin;
use crate::relay::shop::Producers;
use crate::support::Http;
use crate::support::worker::{Dice, Worker};

pub const MAX_ATTEMPTS: u64 = 16;
const PRODUCERS_PER_SHOP: u64 = 2;
const WORKERS_PER_QUEUE: usize = 2;
const READERS: usize = 2;
/// Messages of a key, over HTTP: few, so that the checker of keys has few to compare.
const MESSAGES_OF_A_KEY: usize = 24;

/// The queues of a run, with their declarations.
pub fn queues() -> Vec<(String, Value)> {
    let declare = |topics: Value, ordering: &str| {
        json!({
            "topics": topics, "ordering": ordering, "max_attempts": MAX_ATTEMPTS,
            "retry": {"delays_seconds": [0, 0.2]},
        })
    };
    let plain = (0..3).map(|number| {
        let topics = json!(["orders.>", "web.>"]);
        (format!("plain-{number}"), declare(topics, "none"))
    });
    let keyed = (0..2).map(|number| {
        let topics = json!(["web.>"]);
        (format!("keyed-{number}"), declare(topics, "key"))
    });
    plain.chain(keyed).collect()
}

/// Whether a queue of the run takes what is published to a topic.
pub fn takes(queue: &str, topic: &str) -> bool {
    topic.starts_with("web.") || queue.starts_with("plain-") && topic.starts_with("orders.")
}

pub fn rules(queue: &str) -> Rules {
    let order = match queue.starts_with("keyed-") {
        true => Order::Key {
            holds: false,
            batches: false,
        },
        false => Order::None,
    };
    Rules {
        max_attempts: MAX_ATTEMPTS..=MAX_ATTEMPTS,
        order,
    }
}

/// How long whoever sends rests between two transactions; longer while the consumers are behind, so that a busy machine has no more
/// to do than it can.
const REST_MILLIS: u64 = 150;
const BEHIND_REST_MILLIS: u64 = 2_000;
/// Messages in all queues with which the consumers are behind.
const BEHIND: u64 = 1_500;

/// All that works.
pub struct Load {
    producers: Vec<(String, Producers)>,
    publisher: JoinHandle<Vec<Transaction>>,
    /// What comes seldom.
    rare: Vec<JoinHandle<()>>,
    readers: Vec<JoinHandle<Vec<Read>>>,
    workers: Vec<JoinHandle<()>>,
    governor: JoinHandle<()>,
    pub recorders: Vec<(String, Arc<Recorder>)>,
    /// No more is sent.
    is_over: Arc<AtomicBool>,
    /// Nothing is left to do.
    is_done: Arc<AtomicBool>,
}

impl Load {
    pub fn start(world: &World, seed: u64) -> Self {
        let (is_over, is_done): (Arc<AtomicBool>, Arc<AtomicBool>) = Default::default();
        let rest = Arc::new(AtomicU64::new(REST_MILLIS));
        let producers = world.shops.iter().zip(1..).map(|(shop, number)| {
            let (seed, rest) = (seed.wrapping_add(number * 1_000), Arc::clone(&rest));
            let settings = "set synchronous_commit = on";
            let producers =
                Producers::start_slow(&shop.origin, PRODUCERS_PER_SHOP, settings, seed, rest);
            (shop.name.clone(), producers)
        });
        let dice = Dice::new(seed.wrapping_add(1));
        let (nodes, over) = (world.clients(), Arc::clone(&is_over));
        let can_wait = world.ground.is_rich;
        let publisher = publish(nodes, dice, can_wait, Arc::clone(&rest), over);
        let mut rare = Vec::new();
        if world.ground.is_rich {
            let (nodes, over) = (world.clients(), Arc::clone(&is_over));
            let dice = Dice::new(seed.wrapping_add(2));
            rare.push(tokio::spawn(rare::publish(
                nodes,
                dice,
                Arc::clone(&rest),
                over,
            )));
            for shop in world.shops.iter().filter(|shop| shop.name != MAPPED) {
                let late = rare::insert_late(shop.origin.url.clone(), Arc::clone(&is_over));
                rare.push(tokio::spawn(late));
            }
        }
        let governor = govern(world.clients(), Arc::clone(&rest), Arc::clone(&is_over));
        let readers = (0..READERS).map(|number| {
            let is_done = Arc::clone(&is_done);
            tokio::spawn(read(world.clients(), number, is_done))
        });
        let mut workers = Vec::new();
        let recorders = queues().into_iter().map(|(name, _)| {
            let recorder = Arc::new(Recorder::new(rules(&name)));
            for number in 0..WORKERS_PER_QUEUE {
                let worker = Worker::new(
                    world.clients(),
                    &name,
                    format!("{name}-{number}"),
                    Arc::clone(&recorder),
                    seed.wrapping_add(100 + workers.len() as u64),
                );
                let (over, done) = (Arc::clone(&is_over), Arc::clone(&is_done));
                workers.push(tokio::spawn(work(worker, Arc::clone(&rest), over, done)));
            }
            (name, recorder)
        });
        Self {
            producers: producers.collect(),
            publisher: tokio::spawn(publisher),
            rare,
            governor: tokio::spawn(governor),
            recorders: recorders.collect(),
            readers: readers.collect(),
            workers,
            is_over,
            is_done,
        }
    }

    /// Ends what sends; gives what it was told.
    pub async fn end_sending(&mut self) -> Vec<Transaction> {
        self.is_over.store(true, Ordering::Relaxed);
        let mut transactions = Vec::new();
        for (shop, producers) in self.producers.drain(..) {
            for mut transaction in producers.finish().await {
                for sent in &mut transaction.sent {
                    let version = sent.version.take();
                    sent.version = version.map(|(key, number)| (format!("{shop}/{key}"), number));
                }
                transactions.push(transaction);
            }
        }
        let publisher = std::mem::replace(&mut self.publisher, tokio::spawn(async { Vec::new() }));
        transactions.extend(publisher.await.unwrap());
        for rare in self.rare.drain(..) {
            rare.await.unwrap();
        }
        transactions
    }

    /// Ends all else; gives what the readers read.
    pub async fn finish(self) -> Vec<Vec<Read>> {
        self.is_done.store(true, Ordering::Relaxed);
        self.governor.await.unwrap();
        for worker in self.workers {
            worker.await.unwrap();
        }
        let mut reads = Vec::new();
        for reader in self.readers {
            reads.push(reader.await.unwrap());
        }
        reads
    }
}

/// Messages of all queues that are not settled, as far as their owners answer.
async fn backlog(nodes: &[Http]) -> u64 {
    let mut backlog = 0;
    for (number, (queue, _)) in queues().into_iter().enumerate() {
        let path = format!("/v1/queues/{queue}");
        let http = &nodes[number % nodes.len()];
        if let Ok((_, queue)) = http.call(Method::GET, &path, None).await {
            backlog += queue["status"]["depth"].as_u64().unwrap_or(0);
        }
    }
    backlog
}

/// Has those who send rest for longer while the consumers are behind.
async fn govern(nodes: Vec<Http>, rest: Arc<AtomicU64>, is_over: Arc<AtomicBool>) {
    while !is_over.load(Ordering::Relaxed) {
        let millis = match backlog(&nodes).await > BEHIND {
            true => BEHIND_REST_MILLIS,
            false => REST_MILLIS,
        };
        rest.store(millis, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Acts until nothing more is sent, with more acks when it is behind; then empties the queue.
async fn work(
    mut worker: Worker,
    rest: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    is_done: Arc<AtomicBool>,
) {
    while !is_over.load(Ordering::Relaxed) {
        worker.step().await;
        if rest.load(Ordering::Relaxed) > REST_MILLIS {
            worker.drain().await;
        }
    }
    while !is_done.load(Ordering::Relaxed) {
        worker.drain().await;
    }
}

/// Publishes a few messages together, all or none of them, again and again; some that are to come a little later, if they can.
async fn publish(
    nodes: Vec<Http>,
    mut dice: Dice,
    can_wait: bool,
    rest: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
) -> Vec<Transaction> {
    let (mut transactions, mut number) = (Vec::new(), 0);
    while !is_over.load(Ordering::Relaxed) {
        let mut ids = Vec::new();
        let later = (can_wait && dice.is_lucky(0.2)).then(|| {
            let due = Utc::now() + TimeDelta::milliseconds(200 + dice.below(1_300) as i64);
            due.to_rfc3339_opts(SecondsFormat::Micros, true)
        });
        let messages = (0..=dice.below(3)).map(|_| {
            number += 1;
            let (id, key) = (format!("web-{number}"), number / MESSAGES_OF_A_KEY);
            ids.push(id.clone());
            let mut event = json!({
                "specversion": "1.0", "id": id, "source": "/web", "type": "t", "data": number, "partitionkey": format!("web-{key}"),
            });
            if let Some(later) = &later {
                event["deliverat"] = json!(later);
            }
            json!({"topic": "web.clicked", "event": event})
        });
        let body = json!({"messages": messages.collect::<Vec<_>>()});
        let placed = publish_once(&nodes, &mut dice, &body).await;
        let offsets = placed
            .iter()
            .flatten()
            .map(|placed| placed["offset"].as_u64());
        let offsets = offsets.chain(std::iter::repeat(None));
        let sent = ids.into_iter().zip(offsets).map(|(id, offset)| Sent {
            id,
            version: None,
            offset,
        });
        let sent = sent.collect();
        let fate = match placed {
            Some(_) => Fate::Committed,
            None => Fate::Unknown,
        };
        transactions.push(Transaction { fate, sent });
        let millis = rest.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(millis)).await;
    }
    transactions
}

/// Publishes under the same ids until it is answered, at any node; sometimes it gives up.
async fn publish_once(nodes: &[Http], dice: &mut Dice, body: &Value) -> Option<Vec<Value>> {
    loop {
        let http = &nodes[dice.below(nodes.len())];
        match http.call(Method::POST, "/v1/messages", Some(body)).await {
            Ok((status, answer)) if status.is_success() => {
                return Some(answer["messages"].as_array().unwrap().clone());
            }
            Ok((status, answer)) => assert_eq!(status.as_u16(), 503, "publishing: {answer}"),
            Err(_) => {}
        }
        if dice.is_lucky(0.03) {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// Reads the stream on and on, each page from another node.
async fn read(nodes: Vec<Http>, first: usize, is_done: Arc<AtomicBool>) -> Vec<Read> {
    let (mut reads, mut after) = (Vec::new(), 0);
    for turn in first.. {
        let was_done = is_done.load(Ordering::Relaxed);
        let path = format!("/v1/streams/main/messages?after={after}&max_messages=200");
        let http = &nodes[turn % nodes.len()];
        let page = match http.call(Method::GET, &path, None).await {
            Ok((status, page)) if status.is_success() => page,
            Ok((status, page)) => {
                assert_eq!(status.as_u16(), 503, "reading: {page}");
                json!({"messages": []})
            }
            Err(_) => json!({"messages": []}),
        };
        let messages = page["messages"].as_array().unwrap();
        for message in messages {
            after = message["offset"].as_u64().unwrap();
            let id = message["event"]["id"].as_str().unwrap().to_owned();
            reads.push(Read { offset: after, id });
        }
        if messages.is_empty() {
            if was_done {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    reads
}

/// What committed of the producers' transactions, by their own ledger.
pub async fn ledger(origin: &Origin) -> Option<Vec<String>> {
    let mut connection = PgConnection::connect(&origin.url).await.ok()?;
    let ids = sqlx::query_scalar("select id from ledger");
    ids.fetch_all(&mut connection).await.ok()
}

async fn count(url: &str, text: &'static str) -> Option<i64> {
    let mut connection = PgConnection::connect(url).await.ok()?;
    sqlx::query_scalar(text)
        .fetch_one(&mut connection)
        .await
        .ok()
}

/// What is left to do, by the producers' ledgers and the broker's database for the relays, and by the queues' owners.
pub async fn sample(world: &World, nodes: &[Http], queues: &[String]) -> Sample {
    let at = Utc::now();
    let mut committed = Some(0);
    for shop in &world.shops {
        let here = count(&shop.origin.url, "select count(*) from ledger").await;
        committed = committed.zip(here).map(|(sum, here)| sum + here);
    }
    let relayed = "select count(*) from postroad_broker.message where origin_id is not null";
    let relayed = count(&world.url, relayed).await;
    let waiting = "select count(*) from postroad_broker.scheduled_message m
        where not exists (select from postroad_broker.scheduled_publication p
            where p.stream_id = m.stream_id and (p.due_at, p.number) >= (m.due_at, m.number))";
    let waiting = count(&world.url, waiting).await;
    let last =
        "select coalesce(max(\"offset\"), 0) from postroad_broker.message where id like 'web-%'";
    let last = count(&world.url, last).await;
    let mut depth = last.map(|_| 0);
    for (number, queue) in queues.iter().enumerate() {
        let http = &nodes[number % nodes.len()];
        let path = format!("/v1/queues/{queue}");
        let described = http.call(Method::GET, &path, None).await;
        let status = described.ok().map(|(_, queue)| queue["status"].clone());
        let here = status.and_then(|status| {
            // What it has not seen yet counts too.
            let unseen = last? - status["scanned_through"].as_i64()?;
            Some(status["depth"].as_u64()? + unseen.max(0).unsigned_abs())
        });
        depth = depth.zip(here).map(|(sum, here)| sum + here);
    }
    Sample {
        at,
        lag_rows: committed
            .zip(relayed.zip(waiting))
            .map(|(committed, (relayed, waiting))| {
                (committed - relayed).unsigned_abs() + waiting.unsigned_abs()
            }),
        depth,
    }
}
