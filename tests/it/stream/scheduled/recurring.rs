//! Schedules: each occurrence once, over restarts, nodes and a clock that is set; changed, paused, deleted.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use postroad::domain::id::StreamId;
use postroad::domain::name::{ScheduleName, Topic};
use postroad::domain::schedule::{Cadence, Declaration, Misfire, occurrence_id};
use postroad::stream::Declared;
use serde_json::Value;

use super::{Node, leading, node, node_with, quick, read};
use crate::support::{self, clock};

fn name() -> ScheduleName {
    ScheduleName::parse("tick").unwrap()
}

fn declaration(cron: &str, misfire: Misfire) -> Declaration {
    Declaration {
        topic: Topic::parse("ticks").unwrap(),
        cadence: Cadence::parse(cron, "UTC", Utc::now()).unwrap(),
        misfire,
        is_paused: false,
        event: r#"{"type": "tick", "partitionkey": "k", "data": {"a": 1.0}}"#.to_owned(),
    }
}

impl Node {
    async fn declare_tick(&self, declaration: Declaration) -> Declared {
        let declared = self.stream.declare_schedule(name(), declaration).await;
        declared.unwrap().1
    }

    /// The times of all occurrences in the stream, in order; each has the id that it must have.
    async fn occurrences(&self, stream: StreamId) -> Vec<DateTime<Utc>> {
        let page = self.stream.read(read(stream, 0)).await.unwrap();
        let mut times = Vec::new();
        for entry in &page.entries {
            let event: Value = serde_json::from_slice(&entry.event).unwrap();
            let time = event["time"].as_str().unwrap();
            let time = DateTime::parse_from_rfc3339(time).unwrap().to_utc();
            assert_eq!(event["id"], occurrence_id(&name(), time).to_string());
            assert_eq!(event["source"], "/postroad/schedules/tick");
            assert_eq!(
                (&event["type"], &event["partitionkey"]),
                (&"tick".into(), &"k".into())
            );
            let text = String::from_utf8_lossy(&entry.event);
            assert!(text.contains(r#""data":{"a": 1.0}"#), "{text}");
            times.push(time);
        }
        times
    }
}

fn are_seconds_in_a_row(times: &[DateTime<Utc>]) -> bool {
    times
        .windows(2)
        .all(|pair| (pair[1] - pair[0]).num_milliseconds() == 1_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_second_comes_once_over_nodes_and_restarts() {
    let db = support::database().await;
    let one = node(&db).await;
    let main = one.main().await;
    let every_second = declaration("* * * * * *", Misfire::All);
    assert_eq!(
        one.declare_tick(every_second.clone()).await,
        Declared::Created
    );
    assert_eq!(one.declare_tick(every_second).await, Declared::Unchanged);
    one.ids(main, 2).await;
    let two = node_with(&db.database, "http://two", quick()).await;
    one.stop().await;
    two.ids(main, 4).await;
    two.stop().await;
    // Nobody is there for a while: what was due meanwhile comes late.
    tokio::time::sleep(std::time::Duration::from_millis(2_200)).await;
    let three = node_with(&db.database, "http://three", quick()).await;
    three.ids(main, 8).await;
    let times = three.occurrences(main).await;
    assert!(are_seconds_in_a_row(&times), "{times:?}");
    let seen = three.stream.schedule(&name()).await.unwrap();
    assert!(seen.published_count >= 8 && seen.last == Some(seen.through));
    three.stream.delete_schedule(&name()).await.unwrap();
    let count = three.occurrences(main).await.len();
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    assert!(
        three.occurrences(main).await.len() <= count + 1,
        "none is published any more"
    );
    assert!(three.stream.schedule(&name()).await.is_err());
    three.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_missed_goes_by_the_policy() {
    for (misfire, expected) in [(Misfire::Skip, 0), (Misfire::One, 1), (Misfire::All, 9)] {
        let db = support::database().await;
        clock::settable(&db.url).await;
        let node = node_with(&db.database, "http://one", leading()).await;
        let main = node.main().await;
        node.declare_tick(declaration("*/10 * * * *", misfire))
            .await;
        node.stop().await;
        // An hour and a half on; the latest is more than a minute ago, unless it is just due.
        clock::set(&db.url, "90 minutes").await;
        let node = node_with(&db.database, "http://two", leading()).await;
        let seen = support::eventually("the schedule to move", || async {
            let seen = node.stream.schedule(&name()).await.unwrap();
            (seen.through > seen.created_at + chrono::TimeDelta::hours(1)).then_some(seen)
        })
        .await;
        node.ids(main, i64::try_from(seen.published_count).unwrap())
            .await;
        let times = node.occurrences(main).await;
        assert_eq!(times.len() as u64, seen.published_count);
        // The one that is a minute old at most is not missed.
        assert!(
            (expected..=expected + 1).contains(&times.len()),
            "{misfire:?}: {times:?}"
        );
        let unique: BTreeSet<_> = times.iter().collect();
        assert_eq!(unique.len(), times.len());
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_repeats_no_occurrence() {
    let db = support::database().await;
    clock::settable(&db.url).await;
    let node = node_with(&db.database, "http://one", leading()).await;
    let main = node.main().await;
    node.declare_tick(declaration("0 * * * *", Misfire::All))
        .await;
    clock::set(&db.url, "1 hour").await;
    node.ids(main, 1).await;
    clock::set(&db.url, "0").await;
    clock::set(&db.url, "1 hour").await;
    clock::set(&db.url, "-1 hour").await;
    clock::set(&db.url, "2 hours").await;
    node.ids(main, 2).await;
    let times = node.occurrences(main).await;
    assert_eq!(times.len(), 2, "{times:?}");
    assert_eq!(times[1] - times[0], chrono::TimeDelta::hours(1));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_and_another_cadence_begin_anew() {
    let db = support::database().await;
    clock::settable(&db.url).await;
    let node = node_with(&db.database, "http://one", leading()).await;
    let main = node.main().await;
    let hourly = declaration("0 * * * *", Misfire::All);
    let paused = Declaration {
        is_paused: true,
        ..hourly.clone()
    };
    node.declare_tick(paused.clone()).await;
    clock::set(&db.url, "5 hours").await;
    assert_eq!(node.declare_tick(hourly.clone()).await, Declared::Changed);
    let begun = node.stream.schedule(&name()).await.unwrap();
    assert_eq!(begun.last, None, "what came in the pause is not missed");
    clock::set(&db.url, "6 hours").await;
    node.ids(main, 1).await;
    // Another template alone changes nothing about when.
    let other = Declaration {
        event: r#"{"type": "tick", "partitionkey": "k", "data": {"a": 1.0}, "subject": "s"}"#
            .to_owned(),
        ..hourly
    };
    let before = node.stream.schedule(&name()).await.unwrap();
    assert_eq!(node.declare_tick(other).await, Declared::Changed);
    let after = node.stream.schedule(&name()).await.unwrap();
    assert_eq!(after.through, before.through);
    // Another cadence does.
    node.declare_tick(declaration("30 * * * *", Misfire::All))
        .await;
    let after = node.stream.schedule(&name()).await.unwrap();
    assert!(after.through > before.through);
    clock::set(&db.url, "7 hours").await;
    node.ids(main, 2).await;
    let times = node.occurrences(main).await;
    assert_eq!(times.len(), 2, "{times:?}");
    assert_eq!(times[1].format("%M").to_string(), "30");
    node.stop().await;
}
