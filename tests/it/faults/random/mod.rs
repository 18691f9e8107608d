//! What a queue promises, through the real program that is killed with -9 and started again at random (and its Postgres with
//! it): consumers and a person do at random whatever they may, and checkers that know only the promises judge what they were
//! told and what was committed (`crate::history`).
//!
//! Each run prints its seed and the command that repeats it. The seed repeats what the consumers and the person do, if not what
//! they meet. POSTROAD_TEST_RANDOM_SECONDS sets the length.

mod person;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use self::person::Person;
use super::size;
use crate::history::log::{self, Fate, LogHistory, Read, Sent, Transaction};
use crate::history::{self, Act, Done, History, Order, Published, Recorder, Rules};
use crate::support::consumer::{publish_events, stream_ids};
use crate::support::worker::{Dice, Worker};
use crate::support::{self, Cluster, Http, Program, audit};

const WORKERS: u64 = 5;
const QUEUE: &str = "billing";
const PATH: &str = "/v1/queues/billing";
const KEYS: usize = 8;
const MAX_ATTEMPTS: u64 = 5;

/// A queue, and what happens to it.
struct Plan {
    test: &'static str,
    /// Of the queue's declaration.
    members: Value,
    order: Order,
    /// Declarations that the queue changes between.
    changes: Vec<(Value, Order)>,
    kills_postgres: bool,
}

fn seed() -> u64 {
    let given = std::env::var("POSTROAD_TEST_SEED").ok();
    given
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0)
}

fn declaration(members: &Value) -> Value {
    let mut declaration = json!({
        "topics": ["orders.*"], "max_attempts": MAX_ATTEMPTS, "retry": {"delays_seconds": [0, 0.2]},
    });
    for (name, value) in members.as_object().unwrap() {
        declaration[name] = value.clone();
    }
    declaration
}

/// Publishes a few messages now and then, some with a key, of any priority.
async fn produce(
    http: Http,
    recorder: Arc<Recorder>,
    mut dice: Dice,
    is_over: Arc<AtomicBool>,
) -> Vec<Transaction> {
    let (mut number, mut transactions) = (0, Vec::new());
    while !is_over.load(Ordering::Relaxed) {
        let mut keys = Vec::new();
        let events: Vec<Value> = (0..=dice.below(6))
            .map(|_| {
                number += 1;
                let mut event = json!({
                    "specversion": "1.0", "id": format!("m-{number}"), "source": "/random", "type": "t", "data": number,
                });
                let key = dice.is_lucky(0.8).then(|| format!("k{}", dice.below(KEYS)));
                if let Some(key) = &key {
                    event["partitionkey"] = json!(key);
                }
                event["priority"] = json!(["low", "normal", "high"][dice.below(3)]);
                keys.push(key);
                event
            })
            .collect();
        let placed = publish_events(&http, "orders.created", &events).await;
        let mut sent = Vec::new();
        for ((key, event), placed) in keys.into_iter().zip(&events).zip(placed) {
            let offset = placed["offset"].as_u64().unwrap();
            sent.push(Sent {
                id: event["id"].as_str().unwrap().to_owned(),
                version: None,
                offset: Some(offset),
            });
            let published = Published { key };
            recorder.lock().published.insert(offset, published);
        }
        let fate = Fate::Committed;
        transactions.push(Transaction { fate, sent });
        tokio::time::sleep(Duration::from_millis(dice.below(60) as u64)).await;
    }
    transactions
}

/// Acts until told to stop, then helps to empty the queue.
async fn work(mut worker: Worker, is_over: Arc<AtomicBool>, is_empty: Arc<AtomicBool>) {
    while !is_over.load(Ordering::Relaxed) {
        worker.step().await;
    }
    while !is_empty.load(Ordering::Relaxed) {
        worker.drain().await;
    }
}

/// Acts until told to stop, then sees to it that the queue can be emptied.
async fn operate(mut person: Person, is_over: Arc<AtomicBool>, is_held: bool) -> Person {
    support::eventually("a message", || async {
        (!person.recorder.lock().published.is_empty()).then_some(())
    })
    .await;
    while !is_over.load(Ordering::Relaxed) {
        person.step().await;
    }
    person.finish().await;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let queue =
            support::consumer::patiently(&person.http, reqwest::Method::GET, PATH, None).await;
        let newest = person.recorder.lock().published.keys().next_back().copied();
        let is_seen = queue["status"]["scanned_through"].as_u64() >= newest;
        if is_seen && queue["status"]["depth"] == 0 {
            return person;
        }
        assert!(
            Instant::now() < deadline,
            "the queue is not emptied: {queue}"
        );
        if is_held {
            person.remove_letters().await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Kills until the time is up. Gives how often.
async fn kill(
    program: &mut Program,
    cluster: &Cluster,
    dice: &mut Dice,
    plan: &Plan,
    until: Instant,
) -> (u32, u32) {
    let (mut programs, mut servers) = (0, 0);
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(200 + dice.below(1_300) as u64)).await;
        if plan.kills_postgres && dice.is_lucky(0.4) {
            cluster.kill_and_restart().await;
            servers += 1;
        } else {
            program.kill().await;
            program.start().await;
            programs += 1;
        }
    }
    (programs, servers)
}

/// Consumers, a producer, a person and a killer.
async fn run(plan: Plan) {
    let seed = seed();
    let length = Duration::from_secs(size("POSTROAD_TEST_RANDOM_SECONDS", 6) as u64);
    let repeat = format!(
        "POSTROAD_TEST_SEED={seed} cargo test --test it random::{}",
        plan.test
    );
    println!("{repeat}");
    let cluster = support::cluster().await;
    let url = cluster.create_database("shop").await;
    let mut program = support::program(&url, &[]).await;
    audit::install(&url).await;
    program
        .http
        .declare(PATH, &declaration(&plan.members))
        .await;
    let recorder = Arc::new(Recorder::new(Rules {
        max_attempts: MAX_ATTEMPTS..=MAX_ATTEMPTS,
        order: plan.order,
    }));
    let (is_over, is_empty): (Arc<AtomicBool>, Arc<AtomicBool>) = (Arc::default(), Arc::default());
    let mut dice = Dice::new(seed);
    let producer = tokio::spawn(produce(
        program.http.clone(),
        Arc::clone(&recorder),
        Dice::new(seed.wrapping_add(1)),
        Arc::clone(&is_over),
    ));
    let mut person = Person::new(
        program.http.clone(),
        QUEUE,
        Arc::clone(&recorder),
        seed.wrapping_add(2),
    );
    person.declarations = plan
        .changes
        .iter()
        .map(|(members, order)| (declaration(members), *order))
        .collect();
    let is_held = matches!(plan.order, Order::Key { holds: true, .. });
    let person = tokio::spawn(operate(person, Arc::clone(&is_over), is_held));
    let workers: Vec<_> = (0..WORKERS)
        .map(|number| {
            let worker = Worker::new(
                vec![program.http.clone()],
                QUEUE,
                format!("worker-{number}"),
                Arc::clone(&recorder),
                seed.wrapping_add(100 + number),
            );
            tokio::spawn(work(worker, Arc::clone(&is_over), Arc::clone(&is_empty)))
        })
        .collect();
    let until = Instant::now() + length;
    let kills = kill(&mut program, &cluster, &mut dice, &plan, until).await;
    is_over.store(true, Ordering::Relaxed);
    let transactions = producer.await.unwrap();
    person.await.unwrap();
    is_empty.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.await.unwrap();
    }
    let mut history = recorder.lock().clone();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    history.journaled = audit::journaled(&mut connection, QUEUE).await;
    history.letters = audit::letters(&mut connection, QUEUE).await;
    println!("{}: {}, killed {kills:?}", plan.test, figures(&history));
    let mut faults = history::check(&history);
    faults.extend(at_the_end(&program.http, &history, transactions).await);
    if !faults.is_empty() {
        history.done.iter().for_each(|done| println!("{done:?}"));
    }
    assert!(faults.is_empty(), "{repeat}\n{}", faults.join("\n"));
}

fn figures(history: &History) -> String {
    let seen = history.letters.values().flatten();
    let deaths = history
        .letters
        .keys()
        .map(|&offset| history.deaths(offset).count())
        .sum::<usize>();
    let back = seen
        .filter(|seen| matches!(seen, history::Seen::Redriven { .. }))
        .count();
    let count =
        |is_meant: fn(&Done) -> bool| history.done.iter().filter(|done| is_meant(done)).count();
    format!(
        "{} published, {} deliveries, {} journaled, {} verbs, {} without an answer, {deaths} deaths, {back} redriven, \
         {} generations, {} changes, {} acts",
        history.published.len(),
        history.delivered.len(),
        history.journaled.len(),
        history.settled.len(),
        history.settled.iter().filter(|s| s.told.is_none()).count(),
        1 + history.renewals().count(),
        count(|done| matches!(done.act, Act::Ordered(_))),
        history.done.len(),
    )
}

/// The queue's own numbers, and the stream that it is of.
async fn at_the_end(http: &Http, history: &History, transactions: Vec<Transaction>) -> Vec<String> {
    let mut faults = Vec::new();
    let (_, queue) = http.get(PATH).await;
    let published = history.published.keys();
    let letters = published
        .filter(|&&offset| history.has_letter(offset))
        .count();
    let status = &queue["status"];
    if status["in_flight"] != 0 || status["dead_letters"] != letters {
        faults.push(format!(
            "{letters} dead letters, and the queue says {status}"
        ));
    }
    let stream = stream_ids(http, "main").await.into_iter();
    let log = LogHistory {
        transactions,
        readers: Vec::new(),
        log: stream.map(|(offset, id)| Read { offset, id }).collect(),
    };
    faults.extend(log::check(&log));
    faults
}

fn plan(test: &'static str, members: Value, order: Order) -> Plan {
    Plan {
        test,
        members,
        order,
        changes: Vec::new(),
        kills_postgres: false,
    }
}

const KEY: Order = Order::Key {
    holds: false,
    batches: false,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_keeps_its_promises() {
    let mut plan = plan("a_queue_keeps_its_promises", json!({}), Order::None);
    plan.kills_postgres = true;
    run(plan).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_keep_their_order() {
    run(plan(
        "keys_keep_their_order",
        json!({"ordering": "key"}),
        KEY,
    ))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn held_keys_wait_for_a_person() {
    let members = json!({"ordering": "key", "hold_key": true});
    let order = Order::Key {
        holds: true,
        batches: false,
    };
    run(plan("held_keys_wait_for_a_person", members, order)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_keys_keep_their_order() {
    let members = json!({"ordering": "key", "key_batches": true});
    let order = Order::Key {
        holds: false,
        batches: true,
    };
    let mut plan = plan("batches_of_keys_keep_their_order", members, order);
    plan.kills_postgres = true;
    run(plan).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_keep_the_promises() {
    run(plan(
        "lanes_keep_the_promises",
        json!({"priorities": true}),
        Order::None,
    ))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_is_changed_keeps_its_promises() {
    let mut plan = plan(
        "a_queue_that_is_changed_keeps_its_promises",
        json!({}),
        Order::None,
    );
    plan.changes = vec![
        (json!({}), Order::None),
        (json!({"ordering": "key"}), KEY),
        (
            json!({"ordering": "key", "retry": {"delays_seconds": [0.1]}}),
            KEY,
        ),
        (json!({"priorities": true}), Order::None),
        (
            json!({"priorities": true, "max_in_flight": 20}),
            Order::None,
        ),
    ];
    run(plan).await;
}
