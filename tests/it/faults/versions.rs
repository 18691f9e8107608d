//! kill -9 of the program while writers race for the versions of a few keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::size;
use crate::support::{self, Http};

const WRITERS: usize = 16;
const KEYS: usize = 4;

/// Publishes an event, as often as it takes to hear what became of it.
async fn publish(http: &Http, event: &Value) -> (u16, Value) {
    let url = format!("{}/v1/topics/accounts.a/messages", http.base);
    support::eventually("an answer", async || {
        let sent = http
            .client
            .post(&url)
            .header("content-type", "application/cloudevents+json");
        let answer = sent.body(event.to_string()).send().await.ok()?;
        let status = answer.status().as_u16();
        let body = answer.json().await.ok()?;
        (status != 503).then_some((status, body))
    })
    .await
}

/// Makes versions until it has made so many. Each is written down in its event.
async fn write(http: Http, writer: usize, rounds: usize, made: Arc<AtomicUsize>) {
    let mut known = [0; KEYS];
    for round in 0..rounds {
        let key = (writer + round) % KEYS;
        loop {
            let version = known[key];
            let event = json!({
                "specversion": "1.0", "id": format!("{writer}-{round}-{version}"), "source": "/race", "type": "t",
                "partitionkey": format!("k{key}"), "expectedversion": version,
                "data": {"writer": writer, "version": version + 1},
            });
            let (status, answer) = publish(&http, &event).await;
            if status == 200 {
                known[key] = version + 1;
                made.fetch_add(1, Ordering::Relaxed);
                break;
            }
            assert_eq!(answer["type"], "/problems/version-conflict", "{answer}");
            let found = answer["version"].as_i64().unwrap();
            assert!(found > version, "{answer}");
            known[key] = found;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_program_gives_no_version_twice_and_loses_none() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    let keyed = json!({"topics": ["accounts.>"], "keyed": true});
    http.declare("/v1/streams/accounts", &keyed).await;
    let (kills, rounds) = (size("POSTROAD_TEST_KILLS", 3), 60);
    let made = Arc::new(AtomicUsize::new(0));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| tokio::spawn(write(http.clone(), writer, rounds, Arc::clone(&made))))
        .collect();
    let all = WRITERS * rounds;
    for kill in 1..=kills {
        let until = all * kill / (kills + 1);
        support::eventually("versions", async || {
            (made.load(Ordering::Relaxed) >= until).then_some(())
        })
        .await;
        program.kill().await;
        program.start().await;
    }
    for writer in writers {
        tokio::time::timeout(Duration::from_secs(120), writer)
            .await
            .expect("all versions are made in time")
            .unwrap();
    }
    let mut count = 0;
    for key in 0..KEYS {
        let path = format!("/v1/streams/accounts/keys/k{key}?max_messages=1000");
        let (_, history) = http.get(&path).await;
        let messages = history["messages"].as_array().unwrap();
        let versions = messages
            .iter()
            .map(|m| m["event"]["data"]["version"].as_u64().unwrap());
        assert!(versions.eq(1..=messages.len() as u64), "{key}");
        assert_eq!(history["version"], messages.len());
        count += messages.len();
    }
    assert_eq!(count, all, "each write once");
}
