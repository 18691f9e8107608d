//! Many queues on one stream: declared, idle, active, catching up, and after a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use serde_json::{Value, json};

use super::size;
use crate::support::consumer::{items, publish};
use crate::support::process::{cpu_time, cpu_time_with_children, resident_bytes};
use crate::support::{self, Cluster, Consumer, Http, Program};

const PATIENCE: Duration = Duration::from_secs(300);

/// Declares so many queues, a few at a time, each of topics of its own or of these.
async fn declare(http: &Http, name: &str, count: u64, topics: Option<&str>, start: &str) {
    let declares = futures_util::stream::iter(0..count).map(|number| {
        let topics = topics.map_or_else(|| format!("{name}.q{number}.>"), str::to_owned);
        async move {
            http.declare(
                &format!("/v1/queues/{name}-{number}"),
                &json!({"topics": [topics], "start": start}),
            )
            .await;
        }
    });
    declares.buffer_unordered(8).collect::<Vec<_>>().await;
}

/// A counter of the broker's metrics.
async fn metric(http: &Http, name: &str) -> u64 {
    let (_, text) = http.get("/metrics").await;
    let text = text.as_str().unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value: f64 = line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap();
    value as u64
}

/// What one message costs: processor time of the broker and of Postgres.
struct Cost {
    broker: Duration,
    postgres: Duration,
}

impl Cost {
    /// Publishes messages that one queue takes and acknowledges, in requests of a hundred, and looks at the clocks.
    async fn of(program: &Program, cluster: &Cluster, messages: u64) -> Self {
        let consumer = Consumer {
            http: program.http.clone(),
            queue: "busy-0".to_owned(),
        };
        let (broker, postgres) = (program.pid(), cluster.pid().unwrap().unsigned_abs());
        let before = (cpu_time(broker), cpu_time_with_children(postgres));
        for _ in 0..messages / 100 {
            publish(&program.http, "busy.q0.created", 100).await;
            let taken = consumer.take(100, 60).await;
            consumer
                .settle_all("ack", &items(&taken, &json!({})), "acked")
                .await;
        }
        let count = u32::try_from(messages).unwrap();
        Self {
            broker: (cpu_time(broker) - before.0) / count,
            postgres: (cpu_time_with_children(postgres) - before.1) / count,
        }
    }
}

/// Waits until all queues of a name answer with their numbers. Gives how long the last list of them took.
async fn all_answer(http: &Http, name: &str, count: u64) -> Duration {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let asked = Instant::now();
        let (_, list) = http.get("/v1/queues").await;
        let queues = list["queues"].as_array().unwrap();
        let of_name = queues.iter().filter(|queue| {
            let is_named = queue["name"].as_str().unwrap().starts_with(name);
            is_named && !queue["status"].is_null()
        });
        let found = of_name.count() as u64;
        if found == count {
            return asked.elapsed();
        }
        assert!(Instant::now() < deadline, "{found} of {count} answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_queues_cost_next_to_nothing_per_message_and_come_back_together() {
    let count = size("POSTROAD_SOAK_QUEUES", 200);
    let messages = size("POSTROAD_SOAK_QUEUES_MESSAGES", 2_000);
    let cluster = support::cluster().await;
    let url = cluster.create_database("many").await;
    let mut program = support::program(&url, &[]).await;
    let http = program.http.clone();
    declare(&http, "busy", 1, None, "latest").await;
    Cost::of(&program, &cluster, messages).await;
    let alone = Cost::of(&program, &cluster, messages).await;
    let resident = resident_bytes(program.pid());

    let began = Instant::now();
    declare(&http, "idle", count - 1, None, "latest").await;
    let declared = began.elapsed();
    let each = resident_bytes(program.pid()).saturating_sub(resident) / count;
    Cost::of(&program, &cluster, messages).await;
    let among = Cost::of(&program, &cluster, messages).await;
    println!(
        "a message with 1 queue: {:?} of the broker, {:?} of Postgres; among {count} idle queues: {:?} and {:?}",
        alone.broker, alone.postgres, among.broker, among.postgres
    );
    println!("{count} queues declared in {declared:?}, {each} bytes resident each");
    let (broker, postgres) = (program.pid(), cluster.pid().unwrap().unsigned_abs());
    let before = (cpu_time(broker), cpu_time_with_children(postgres));
    tokio::time::sleep(Duration::from_secs(5)).await;
    println!(
        "with nothing to do, in 5 s: {:?} of the broker, {:?} of Postgres",
        cpu_time(broker) - before.0,
        cpu_time_with_children(postgres) - before.1
    );

    program.kill().await;
    let began = Instant::now();
    program.start().await;
    let ready = began.elapsed();
    let busy = Consumer {
        http: http.clone(),
        queue: "busy-0".to_owned(),
    };
    busy.status().await;
    publish(&http, "busy.q0.created", 1).await;
    busy.take(1, 60).await;
    let delivered = began.elapsed();
    let listed = all_answer(&http, "idle", count - 1).await;
    println!(
        "after a kill: ready in {ready:?}, the busy queue delivers in {delivered:?}, all {count} answer in {:?} (the list took {listed:?}); {} scans answered {} queues",
        began.elapsed(),
        metric(&http, "postroad_queue_scans_total").await,
        metric(&http, "postroad_queue_scans_answered_total").await,
    );
    assert!(began.elapsed() < PATIENCE);
}

/// Receives and acknowledges until told to stop.
async fn consume(consumer: Consumer, stop: Arc<AtomicBool>, received: Arc<AtomicU64>) {
    while !stop.load(Ordering::Relaxed) {
        let answer = consumer
            .receive(&json!({"wait_seconds": 2, "max_messages": 100}))
            .await;
        let deliveries = answer["deliveries"].as_array().unwrap();
        if !deliveries.is_empty() {
            consumer
                .settle_all("ack", &items(deliveries, &json!({})), "acked")
                .await;
            received.fetch_add(deliveries.len() as u64, Ordering::Relaxed);
        }
    }
}

/// Publishes `messages` one by one while `count` queues consume all of them. Gives the group commits and the time.
async fn active(http: &Http, name: &str, count: u64, messages: u64) -> (u64, Duration) {
    let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let consumers: Vec<_> = (0..count)
        .map(|number| {
            let consumer = Consumer {
                http: http.clone(),
                queue: format!("{name}-{number}"),
            };
            tokio::spawn(consume(consumer, Arc::clone(&stop), Arc::clone(&received)))
        })
        .collect();
    let before = metric(http, "postroad_queue_journal_groups_total").await;
    let began = Instant::now();
    for _ in 0..messages {
        publish(http, &format!("{name}.all.created"), 1).await;
    }
    while received.load(Ordering::Relaxed) < count * messages {
        assert!(began.elapsed() < PATIENCE, "{received:?} received");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = began.elapsed();
    let groups = metric(http, "postroad_queue_journal_groups_total").await - before;
    stop.store(true, Ordering::Relaxed);
    for consumer in consumers {
        consumer.await.unwrap();
    }
    (groups, took)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn active_queues_share_their_group_commits() {
    let count = size("POSTROAD_SOAK_ACTIVE", 50);
    let messages = size("POSTROAD_SOAK_ACTIVE_MESSAGES", 20);
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    declare(&http, "one", 1, Some("one.>"), "latest").await;
    declare(&http, "many", count, Some("many.>"), "latest").await;
    let (one, one_took) = active(&http, "one", 1, messages).await;
    let (many, many_took) = active(&http, "many", count, messages).await;
    let rate = |groups: u64, took: Duration| groups as f64 / took.as_secs_f64();
    println!(
        "{messages} messages to 1 queue: {one} group commits, {:.0}/s; to {count} queues: {many} group commits in {many_took:?}, {:.0}/s, {:.1} decisions each",
        rate(one, one_took),
        rate(many, many_took),
        (2 * count * messages) as f64 / many as f64,
    );
    // Apart, they would be two for each queue and message.
    assert!(
        many < count * messages,
        "{many} group commits for {count} queues"
    );
    let (_, queues) = http.get("/v1/queues").await;
    let depths = queues["queues"].as_array().unwrap().iter();
    let depths: Vec<&Value> = depths.map(|queue| &queue["status"]["depth"]).collect();
    assert!(depths.iter().all(|depth| **depth == 0), "{depths:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_that_catch_up_share_their_scans() {
    let count = size("POSTROAD_SOAK_ACTIVE", 50);
    let messages = size("POSTROAD_SOAK_HISTORY", 20_000);
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    publish(&http, "history.created", usize::try_from(messages).unwrap()).await;
    let before = (
        metric(&http, "postroad_queue_scans_total").await,
        metric(&http, "postroad_queue_scans_answered_total").await,
    );
    let resident = resident_bytes(program.pid());
    let began = Instant::now();
    declare(&http, "late", count, Some("history.>"), "earliest").await;
    let declared = began.elapsed();
    for number in 0..count {
        let path = format!("/v1/queues/late-{number}");
        loop {
            let (_, queue) = http.get(&path).await;
            if queue["status"]["depth"] == messages {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "{queue}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let scans = metric(&http, "postroad_queue_scans_total").await - before.0;
    let asked = metric(&http, "postroad_queue_scans_answered_total").await - before.1;
    println!(
        "{count} queues from the start of {messages} messages: declared in {declared:?}, all found in {:?}, {scans} scans for {asked} requests, {} bytes resident each",
        began.elapsed(),
        resident_bytes(program.pid()).saturating_sub(resident) / count,
    );
    // Alone, each queue would look through all of it.
    let alone = count * messages.div_ceil(10_000);
    assert!(
        2 * scans < alone,
        "{scans} scans, {alone} if none were shared"
    );
}
