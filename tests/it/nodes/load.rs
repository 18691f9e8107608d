//! Producers and consumers ask any node, while nodes join, leave, are killed and sleep: nothing is lost, doubled or handed out after
//! it was acknowledged, and no request fails that is repeated.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Ring, TTL, declare, node, queue, settled, size};
use crate::history::log::{self, Fate, LogHistory, Read, Sent, Transaction};
use crate::history::owners::{check, longest_gap};
use crate::support::consumer::{items, stream_ids};
use crate::support::leases::{events, watch};
use crate::support::{self, Consumer};

/// The queues that are consumed.
const CONSUMED: usize = 6;

/// What the consumers of one queue saw.
#[derive(Debug, Default)]
struct Seen {
    /// By offset: the numbers of the deliveries, in the order in which they came.
    delivered: BTreeMap<u64, Vec<u64>>,
    /// Offsets whose acknowledgement was answered, with the number of the delivery.
    acked: BTreeMap<u64, u64>,
    faults: Vec<String>,
}

async fn produce(ring: Ring, producer: usize, is_over: Arc<AtomicBool>) -> Vec<Transaction> {
    let mut transactions = Vec::new();
    for number in 0.. {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let ids: Vec<String> = (0..4).map(|n| format!("{producer}-{number}-{n}")).collect();
        let messages = ids.iter().map(|id| {
            let event =
                json!({"specversion": "1.0", "id": id, "source": "/load", "type": "t", "data": {}});
            json!({"topic": "orders.created", "event": event})
        });
        let messages: Vec<Value> = messages.collect();
        let answer = ring
            .post("/v1/messages", &json!({"messages": messages}))
            .await;
        let placed = answer["messages"].as_array().unwrap();
        let sent = ids.into_iter().zip(placed).map(|(id, placed)| Sent {
            id,
            version: None,
            offset: placed["offset"].as_u64(),
        });
        let sent = sent.collect();
        let fate = Fate::Committed;
        transactions.push(Transaction { fate, sent });
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    transactions
}

async fn consume(ring: Ring, name: String, seen: Arc<Mutex<Seen>>, is_over: Arc<AtomicBool>) {
    let mut empty = 0;
    while empty < 3 {
        // After all was published: until nothing comes for a while.
        let receive = json!({
            "wait_seconds": 2, "max_messages": 20, "visibility_timeout_seconds": 5,
            "receive_id": uuid::Uuid::new_v4().to_string(),
        });
        let received = ring
            .post(&format!("/v1/queues/{name}/receive"), &receive)
            .await;
        let deliveries = received["deliveries"].as_array().unwrap();
        if deliveries.is_empty() {
            empty += usize::from(is_over.load(Ordering::Relaxed) && received["reason"] == "empty");
            continue;
        }
        empty = 0;
        let number = |delivery: &Value, member: &str| delivery[member].as_u64().unwrap();
        for delivery in deliveries {
            let mut seen = seen.lock().unwrap();
            let (offset, number) = (number(delivery, "offset"), number(delivery, "delivery"));
            if let Some(acked) = seen.acked.get(&offset)
                && number > *acked
            {
                let fault =
                    format!("{offset} came again, as delivery {number}, after {acked} was acked");
                seen.faults.push(fault);
            }
            seen.delivered.entry(offset).or_default().push(number);
        }
        let acks = json!({"deliveries": items(deliveries, &json!({}))});
        let answer = ring.post(&format!("/v1/queues/{name}/ack"), &acks).await;
        for (delivery, outcome) in deliveries
            .iter()
            .zip(answer["deliveries"].as_array().unwrap())
        {
            let mut seen = seen.lock().unwrap();
            let (offset, number) = (number(delivery, "offset"), number(delivery, "delivery"));
            match outcome["result"].as_str().unwrap() {
                "acked" => {
                    if seen.acked.insert(offset, number).is_some() {
                        seen.faults.push(format!("{offset} was acked twice"));
                    }
                }
                // The repeat of an ack whose answer was lost.
                "already_settled" => {
                    seen.acked.entry(offset).or_insert(number);
                }
                "stale" => {}
                other => panic!("{other}"),
            }
        }
    }
}

/// Faults of what came to a queue.
fn judge(name: &str, seen: &Seen, log: &[(u64, String)]) -> Vec<String> {
    let mut faults = seen.faults.clone();
    let all: BTreeSet<u64> = log.iter().map(|(offset, _)| *offset).collect();
    let acked: BTreeSet<u64> = seen.acked.keys().copied().collect();
    for offset in all.difference(&acked) {
        faults.push(format!("{name}: {offset} was never acknowledged"));
    }
    for (offset, numbers) in &seen.delivered {
        // A repeated receive gives the same delivery; another one a later number.
        let distinct: BTreeSet<u64> = numbers.iter().copied().collect();
        if distinct.len() != numbers.len() {
            faults.push(format!(
                "{name}: {offset} came twice under one number: {numbers:?}"
            ));
        }
    }
    faults
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_doubled_or_refused_while_nodes_come_and_go() {
    let db = support::database().await;
    watch(&db.url).await;
    let (mut one, mut two) = (node(&db.url).await, node(&db.url).await);
    let mut three = node(&db.url).await;
    settled(&one.http, 3).await;
    declare(&[&one, &two, &three]).await;
    let ring = Ring::new(&[&one, &two, &three]);
    let is_over = Arc::new(AtomicBool::new(false));
    let producers: Vec<_> = (0..2)
        .map(|producer| tokio::spawn(produce(ring.clone(), producer, Arc::clone(&is_over))))
        .collect();
    let seen: Vec<Arc<Mutex<Seen>>> = (0..CONSUMED).map(|_| Arc::default()).collect();
    let all_published = Arc::new(AtomicBool::new(false));
    let consumers: Vec<_> = (0..CONSUMED * 2)
        .map(|number| {
            let (seen, over) = (
                Arc::clone(&seen[number % CONSUMED]),
                Arc::clone(&all_published),
            );
            tokio::spawn(consume(ring.clone(), queue(number % CONSUMED), seen, over))
        })
        .collect();
    let rounds = size("POSTROAD_TEST_NODE_ROUNDS", 1);
    let began = Instant::now();
    for _ in 0..rounds {
        // A kill and a start at once; an orderly end; a sleep beyond the ttl; a kill, and a start when all has moved.
        two.kill().await;
        two.start().await;
        settled(&one.http, 3).await;
        assert!(three.stop().await.success());
        settled(&one.http, 2).await;
        three.start().await;
        settled(&two.http, 3).await;
        one.signal(Signal::STOP);
        settled(&two.http, 2).await;
        one.signal(Signal::CONT);
        settled(&three.http, 3).await;
        one.kill().await;
        settled(&three.http, 2).await;
        one.start().await;
        settled(&two.http, 3).await;
    }
    is_over.store(true, Ordering::Relaxed);
    let mut transactions = Vec::new();
    for producer in producers {
        transactions.extend(producer.await.unwrap());
    }
    all_published.store(true, Ordering::Relaxed);
    for consumer in consumers {
        consumer.await.unwrap();
    }
    let log = stream_ids(&two.http, "main").await;
    let reads = log.iter().map(|(offset, id)| Read {
        offset: *offset,
        id: id.clone(),
    });
    let history = LogHistory {
        transactions,
        readers: Vec::new(),
        log: reads.collect(),
    };
    let mut faults = log::check(&history);
    for (number, seen) in seen.iter().enumerate() {
        faults.extend(judge(&queue(number), &seen.lock().unwrap(), &log));
    }
    let events = events(&db.url).await;
    faults.extend(check(&events));
    assert_eq!(faults, Vec::<String>::new());
    eprintln!(
        "{} messages, {} deliveries, {} requests repeated in {:?}; {} lease changes and writes; longest time without an owner {:?} (ttl {TTL:?})",
        log.len(),
        seen.iter()
            .map(|seen| seen.lock().unwrap().delivered.len())
            .sum::<usize>(),
        ring.repeated.load(Ordering::Relaxed),
        began.elapsed(),
        events.len(),
        longest_gap(&events),
    );
    let consumer = Consumer {
        http: one.http.clone(),
        queue: queue(0),
    };
    assert_eq!(consumer.status().await["depth"], 0);
    let (_, lists) = one
        .http
        .call(Method::GET, "/v1/queues", None)
        .await
        .unwrap();
    assert_eq!(lists["queues"].as_array().unwrap().len(), super::QUEUES);
}
