//! Messages that come later, and recurring ones, while the program or Postgres is killed: each comes once, or is cancelled and
//! never comes. And beside transactions that are held open.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};

use super::{Victim, size};
use crate::support::consumer::{publish_events, stream_ids};
use crate::support::{self, Http};

/// What producers and who cancels were told.
#[derive(Default)]
struct Told {
    /// Ids that must come, but for those cancelled.
    accepted: BTreeSet<String>,
    /// Ids whose outcome nobody knows: a commit without an answer.
    unknown: BTreeSet<String>,
    /// Ids that were cancelled with a 204.
    cancelled: BTreeSet<String>,
    /// Ids that it was too late for, with the offset told.
    too_late: BTreeMap<String, u64>,
}

fn in_milliseconds(milliseconds: i64) -> DateTime<Utc> {
    Utc::now() + TimeDelta::milliseconds(milliseconds)
}

/// Publishes over HTTP, due from a little ago to half a second ahead, and cancels some.
async fn publish(http: Http, producer: usize, told: Arc<Mutex<Told>>, is_over: Arc<AtomicBool>) {
    for number in 0..100_000_i64 {
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        let events: Vec<Value> = (0..5)
            .map(|n| {
                let at = in_milliseconds((number * 37 + n * 101) % 550 - 50);
                let at = at.to_rfc3339_opts(SecondsFormat::Micros, true);
                json!({"specversion": "1.0", "id": format!("h{producer}-{number}-{n}"), "source": "/test", "deliverat": at})
            })
            .collect();
        let placed = publish_events(&http, "later", &events).await;
        {
            let mut told = told.lock().unwrap();
            let ids = events
                .iter()
                .map(|event| event["id"].as_str().unwrap().to_owned());
            told.accepted.extend(ids);
        }
        // Now and then one is cancelled, about when it is due.
        if number % 4 == 0
            && let Some(scheduled) = placed[3]["scheduled"]["id"].as_str()
        {
            let id = events[3]["id"].as_str().unwrap().to_owned();
            let (status, answer) = cancel(&http, scheduled).await;
            let mut told = told.lock().unwrap();
            match status {
                204 => {
                    told.cancelled.insert(id);
                }
                409 => {
                    told.too_late.insert(id, answer["offset"].as_u64().unwrap());
                }
                other => panic!("{other} {answer}"),
            }
        }
    }
}

/// Cancels, as often as it takes to be told what came of it.
async fn cancel(http: &Http, scheduled: &str) -> (u16, Value) {
    let path = format!("/v1/scheduled-messages/{scheduled}");
    loop {
        match http.call(Method::DELETE, &path, None).await {
            Ok((status, answer)) if status.as_u16() < 500 => return (status.as_u16(), answer),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

fn note(told: &Mutex<Told>, id: String, is_accepted: bool) {
    let mut told = told.lock().unwrap();
    match is_accepted {
        true => told.accepted.insert(id),
        false => told.unknown.insert(id),
    };
}

/// Inserts into the outbox.
async fn insert(url: String, producer: usize, told: Arc<Mutex<Told>>, is_over: Arc<AtomicBool>) {
    let mut connection: Option<PgConnection> = None;
    for number in 0..100_000_i64 {
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        let Some(producing) = &mut connection else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            connection = PgConnection::connect(&url).await.ok();
            continue;
        };
        let id = format!("o{producer}-{number}");
        let inserted = sqlx::query(
            "insert into postroad.outbox (topic, id, deliver_at) values ('later', $1, $2)",
        )
        .bind(&id)
        .bind(in_milliseconds(number * 41 % 550 - 50))
        .execute(producing)
        .await;
        let is_inserted = inserted.is_ok();
        if !is_inserted {
            connection = None;
        }
        note(&told, id, is_inserted);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_program_loses_and_repeats_nothing_that_comes_later() {
    kill_under_load(Victim::Program).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_postgres_loses_and_repeats_nothing_that_comes_later() {
    kill_under_load(Victim::Postgres).await;
}

async fn kill_under_load(victim: Victim) {
    let cluster = support::cluster().await;
    let url = cluster.create_database("shop").await;
    let mut program = support::program(&url, &[]).await;
    program
        .http
        .declare("/v1/streams/ticks", &json!({"topics": ["ticks"]}))
        .await;
    let tick = json!({"topic": "ticks", "cron": "* * * * * *", "misfire": "all"});
    program.http.declare("/v1/schedules/tick", &tick).await;
    let (told, is_over) = (
        Arc::new(Mutex::new(Told::default())),
        Arc::new(AtomicBool::new(false)),
    );
    let mut producers = Vec::new();
    for producer in 0..3 {
        let (http, told, is_over) = (
            program.http.clone(),
            Arc::clone(&told),
            Arc::clone(&is_over),
        );
        producers.push(tokio::spawn(publish(http, producer, told, is_over)));
    }
    for producer in 0..2 {
        let (url, told, is_over) = (url.clone(), Arc::clone(&told), Arc::clone(&is_over));
        producers.push(tokio::spawn(insert(url, producer, told, is_over)));
    }
    for kill in 0..size("POSTROAD_TEST_KILLS", 3) {
        let before = told.lock().unwrap().accepted.len();
        support::eventually("messages", || async {
            (told.lock().unwrap().accepted.len() > before + 100).then_some(())
        })
        .await;
        // At another moment each time.
        tokio::time::sleep(Duration::from_millis(kill as u64 * 137 % 500)).await;
        victim.kill(&mut program, &cluster).await;
    }
    is_over.store(true, Ordering::Relaxed);
    for producer in producers {
        producer.await.unwrap();
    }
    check(&program.http, &told).await;
}

async fn check(http: &Http, told: &Mutex<Told>) {
    let (accepted, unknown, cancelled, too_late) = {
        let told = told.lock().unwrap();
        (
            told.accepted.clone(),
            told.unknown.clone(),
            told.cancelled.clone(),
            told.too_late.clone(),
        )
    };
    let wanted: BTreeSet<&String> = accepted.difference(&cancelled).collect();
    let stream = support::eventually("all messages", || async {
        let stream = stream_ids(http, "main").await;
        let found: BTreeSet<&String> = stream.iter().map(|(_, id)| id).collect();
        wanted
            .iter()
            .all(|id| found.contains(id))
            .then_some(stream.clone())
    })
    .await;
    let found: BTreeMap<&String, u64> = stream.iter().map(|(offset, id)| (id, *offset)).collect();
    assert_eq!(found.len(), stream.len(), "0 twice");
    for id in found.keys() {
        assert!(
            accepted.contains(*id) || unknown.contains(*id),
            "{id} comes from nowhere"
        );
        assert!(!cancelled.contains(*id), "{id} was cancelled");
    }
    for (id, offset) in &too_late {
        assert_eq!(found[id], *offset, "{id}");
    }
    let ticks = support::eventually("some ticks", || async {
        let ticks = stream_times(http, "ticks").await;
        (ticks.len() > 4).then_some(ticks)
    })
    .await;
    let in_a_row = ticks
        .windows(2)
        .all(|pair| (pair[1] - pair[0]).num_milliseconds() == 1_000);
    assert!(in_a_row, "{ticks:?}");
    println!(
        "{} accepted, {} came, {} cancelled, {} too late to cancel, {} of unknown outcome, {} ticks in a row",
        accepted.len(),
        stream.len(),
        cancelled.len(),
        too_late.len(),
        unknown.len(),
        ticks.len(),
    );
}

/// The times of a stream's events, in order.
async fn stream_times(http: &Http, stream: &str) -> Vec<DateTime<Utc>> {
    let (_, page) = http
        .get(&format!("/v1/streams/{stream}/messages?max_messages=1000"))
        .await;
    let messages = page["messages"].as_array().unwrap();
    let times = messages
        .iter()
        .map(|message| support::consumer::time(&message["event"]["time"]));
    times.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_held_open_hold_up_only_their_own() {
    let broker = support::broker().await;
    let http = &broker.http;
    let mut reader = broker.database.connect().await;
    reader
        .execute(
            "begin isolation level repeatable read; select count(*) from postroad.outbox; \
             select count(*) from postroad_broker.scheduled_message; select count(*) from postroad_broker.scheduled_publication",
        )
        .await
        .unwrap();
    let mut held = broker.database.connect().await;
    let later = "insert into postroad.outbox (topic, id, deliver_at) values ('later', $1, now() + interval '300 milliseconds')";
    held.execute("begin").await.unwrap();
    sqlx::query(later)
        .bind("held")
        .execute(&mut held)
        .await
        .unwrap();
    let mut producer = broker.database.connect().await;
    let count = size("POSTROAD_TEST_HELD", 300);
    for n in 0..count {
        sqlx::query(later)
            .bind(n.to_string())
            .execute(&mut producer)
            .await
            .unwrap();
    }
    let come = |count: usize| async move {
        let stream = stream_ids(http, "main").await;
        (stream.len() >= count).then_some(stream)
    };
    let stream = support::eventually("all but the one held", || come(count)).await;
    assert!(stream.iter().all(|(_, id)| id != "held"));
    // Committed long after it was due: it comes at once.
    held.execute("commit").await.unwrap();
    let stream = support::eventually("the one held", || come(count + 1)).await;
    assert_eq!(stream.last().unwrap().1, "held");
    let unique: BTreeSet<&String> = stream.iter().map(|(_, id)| id).collect();
    assert_eq!(unique.len(), count + 1);
    // The space of the outbox comes back: nothing that waits pins it. What waits is not in it.
    reader.execute("commit").await.unwrap();
}
