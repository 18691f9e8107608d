//! Messages that come later, by the real program: due at the very moment at which they arrive, from 16 writers; and very many due at
//! one instant.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use super::{peak_resident_mib, relayed, size};
use crate::support::{self, Http};

/// From 20 ms ago to 20 ms ahead, unevenly.
fn about_now(writer: u64, n: u64) -> DateTime<Utc> {
    let ahead = (n * 7_919 + writer * 104_729) % 40_001;
    Utc::now() + TimeDelta::microseconds(ahead.cast_signed() - 20_000)
}

/// All ids of the stream `main`, in order.
async fn ids(http: &Http) -> Vec<String> {
    let mut found = Vec::new();
    let mut after = 0;
    loop {
        let path = format!("/v1/streams/main/messages?after={after}&max_messages=1000");
        let (_, page) = http.get(&path).await;
        let messages = page["messages"].as_array().unwrap();
        let Some(last) = messages.last() else {
            return found;
        };
        after = last["offset"].as_u64().unwrap();
        let ids = messages.iter().map(|message| &message["event"]["id"]);
        found.extend(ids.map(|id| id.as_str().unwrap().to_owned()));
    }
}

async fn until_offset(http: &Http, count: u64, patience: Duration) {
    let deadline = Instant::now() + patience;
    loop {
        let (_, stream) = http.get("/v1/streams/main").await;
        let last = stream["last_offset"].as_u64().unwrap_or_default();
        if last >= count {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{last} of {count} came in {patience:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_as_it_arrives_comes_once() {
    const WRITERS: u64 = 16;
    const BATCH: u64 = 20;
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let each = size("POSTROAD_SOAK_DUE", 3_200) / WRITERS;
    let started = Instant::now();
    let writers = (0..WRITERS).map(|writer| {
        let (http, url) = (program.http.clone(), database.url.clone());
        tokio::spawn(async move {
            if writer % 2 == 0 {
                for first in (0..each).step_by(BATCH as usize) {
                    let events: Vec<Value> = (first..each.min(first + BATCH))
                        .map(|n| {
                            let at = about_now(writer, n).to_rfc3339_opts(SecondsFormat::Micros, true);
                            json!({"specversion": "1.0", "id": format!("{writer}-{n}"), "source": "/w", "deliverat": at})
                        })
                        .collect();
                    support::consumer::publish_events(&http, "due", &events).await;
                }
                return;
            }
            let mut producer = PgConnection::connect(&url).await.unwrap();
            for n in 0..each {
                sqlx::query("insert into postroad.outbox (topic, id, deliver_at) values ('due', $1, $2)")
                    .bind(format!("{writer}-{n}"))
                    .bind(about_now(writer, n))
                    .execute(&mut producer)
                    .await
                    .unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    relayed(&program, Duration::from_secs(120)).await;
    let count = each * WRITERS;
    until_offset(&program.http, count, Duration::from_secs(120)).await;
    let took = started.elapsed();
    let ids = ids(&program.http).await;
    let unique: HashSet<&String> = ids.iter().collect();
    let mut owner = database.connect().await;
    let scheduled: i64 =
        sqlx::query_scalar("select count(*) from postroad_broker.scheduled_message")
            .fetch_one(&mut owner)
            .await
            .unwrap();
    println!(
        "{count} due about now from {WRITERS} writers in {took:?}: {scheduled} waited, {} in the stream",
        ids.len()
    );
    assert_eq!(
        (ids.len() as u64, unique.len() as u64),
        (count, count),
        "0 lost, 0 twice"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn very_many_at_one_instant_cost_bounded_memory_and_bounded_commits() {
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let count = size("POSTROAD_SOAK_INSTANT", 20_000);
    // As long as it takes to accept them.
    let accepting = Duration::from_secs(10 + count / 10_000);
    let at = Utc::now() + accepting;
    let mut producer = PgConnection::connect(&database.url).await.unwrap();
    sqlx::query(
        "insert into postroad.outbox (topic, id, payload, deliver_at)
        select 'due', n::text, repeat('x', 200), $2 from generate_series(1, $1) as n",
    )
    .bind(count.cast_signed())
    .bind(at)
    .execute(&mut producer)
    .await
    .unwrap();
    relayed(&program, Duration::from_secs(300)).await;
    let left = (at - Utc::now()).to_std().unwrap_or_default();
    tokio::time::sleep(left).await;
    let started = Instant::now();
    let program = Arc::new(program);
    // Others publish meanwhile, and wait for none of it.
    let (others, slowest) = beside(&program.http, count).await;
    until_offset(&program.http, count + others, Duration::from_secs(600)).await;
    let took = started.elapsed();
    let (commits, largest, in_order): (i64, i32, bool) = sqlx::query_as(
        "select count(*), max(message_count), (
            select bool_and(id::bigint = place) from (
                select id, row_number() over (order by \"offset\") as place from postroad_broker.message
                where topic_id = (select id from postroad_broker.topic where name = 'due')) m)
        from postroad_broker.scheduled_publication",
    )
    .fetch_one(&mut producer)
    .await
    .unwrap();
    println!(
        "{count} at one instant: {commits} commits of {largest} at most in {took:?}; {others} publishes beside them, the slowest \
         {slowest:?}; broker's peak memory {} MiB",
        peak_resident_mib(program.pid())
    );
    assert!(in_order, "by (due, acceptance)");
    assert!(largest <= 2_000, "{largest}");
}

/// Publishes one message after the other until what is due has come. How many, and how long the slowest took.
async fn beside(http: &Http, count: u64) -> (u64, Duration) {
    let mut slowest = Duration::ZERO;
    for others in 0.. {
        let started = Instant::now();
        let placed = http
            .ok("/v1/topics/beside/messages", &json!({"n": others}))
            .await;
        slowest = slowest.max(started.elapsed());
        let offset = placed["messages"][0]["offset"].as_u64().unwrap();
        if offset > count {
            return (others + 1, slowest);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (0, slowest)
}
