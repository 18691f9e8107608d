//! The database's clock goes back, and on: nothing is lost and nothing comes twice. See [`support::clock`].

use std::time::Duration;

use chrono::{TimeDelta, Utc};
use postroad::domain::id::Offset;
use postroad::domain::name::StreamName;
use postroad::domain::schedule::{Cadence, Declaration, Misfire};
use postroad::store::stream as sql;
use postroad::stream::{Options, Retention, ScheduledStatus};

use super::{due, due_in, leading, message, node, quick};
use crate::stream::{node_with, offsets, settings};
use crate::support::{self, clock};

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_back_loses_nothing() {
    let db = support::database().await;
    clock::settable(&db.url).await;
    let node = node_with(&db.database, "http://one", leading()).await;
    let main = node.main().await;
    let now = node.cluster.now();
    let minutes = TimeDelta::minutes;
    node.schedule(due("in 10", now + minutes(10))).await;
    let in_50 = node.schedule(due("in 50", now + minutes(50))).await;
    // An hour on: the first are due, and the horizon is ahead of what the clock will be.
    clock::set(&db.url, "30 minutes").await;
    assert_eq!(node.ids(main, 1).await, ["in 10"]);
    node.schedule(due("in 45", now + minutes(45))).await;
    clock::set(&db.url, "40 minutes").await;
    node.schedule(due("in 41", now + minutes(41))).await;
    clock::set(&db.url, "42 minutes").await;
    assert_eq!(node.ids(main, 2).await, ["in 10", "in 41"]);
    // Back.
    clock::set(&db.url, "0").await;
    // Not after the clock, but behind the horizon: whoever published would not look there again.
    for (id, ahead) in [("behind", 20), ("just behind", 41)] {
        let placed = node
            .publish(vec![due(id, now + minutes(ahead))], true)
            .await
            .unwrap();
        assert_eq!(placed[0].scheduled, None, "{id}");
    }
    let before = node.schedule(due("before", now + minutes(43))).await;
    assert_eq!(node.waiting().await.len(), 3);
    // Another process has no memory of any of it.
    node.stop().await;
    let node = node_with(&db.database, "http://two", leading()).await;
    clock::set(&db.url, "44 minutes").await;
    let expected = ["in 10", "in 41", "behind", "just behind", "before"];
    assert_eq!(node.ids(main, 5).await, expected);
    clock::set(&db.url, "-1 day").await;
    clock::set(&db.url, "2 hours").await;
    let ids = node.ids(main, 7).await;
    assert_eq!(ids[5..], ["in 45", "in 50"]);
    for (id, offset) in [(before, 5), (in_50, 7)] {
        let found = node.stream.find_scheduled(id).await.unwrap().unwrap();
        let offset = Offset(offset);
        assert_eq!(found.status, ScheduledStatus::Published { offset });
    }
    node.stop().await;
}

/// The database's clock alone jumps, by so much that all buckets of ids would be out of date, and all that waits due.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_ahead_brings_nothing_early_and_forgets_no_id() {
    for jump in ["36 hours", "40 days", "1000 days"] {
        let db = support::database().await;
        clock::settable(&db.url).await;
        let node = node(&db).await;
        let main = node.main().await;
        let early = node.schedule(due_in(&node, "early", 36_000_000)).await;
        let declaration = Declaration {
            topic: postroad::domain::name::Topic::parse("ticks").unwrap(),
            cadence: Cadence::parse("0 0 1 1 *", "UTC", Utc::now()).unwrap(),
            misfire: Misfire::All,
            is_paused: false,
            event: "{}".to_owned(),
        };
        let name = postroad::domain::name::ScheduleName::parse("yearly").unwrap();
        let declared = node
            .stream
            .declare_schedule(name.clone(), declaration)
            .await;
        declared.unwrap();
        let first = vec![message("a", "once", "1")];
        assert_eq!(
            offsets(&node.publish(first.clone(), true).await.unwrap()),
            [1]
        );
        clock::set(&db.url, jump).await;
        // Accepted meanwhile: not by the clock that jumped.
        node.schedule(due_in(&node, "too", 36_000_000)).await;
        let mut duty = sql::connect_duty(&db.database).await.unwrap();
        for _ in 0..2 {
            sql::rotate_buckets(&mut duty, Utc::now()).await.unwrap();
        }
        let again = node.publish(first, true).await.unwrap();
        assert!(again[0].duplicate, "{jump}");
        // The duty has looked by then.
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert_eq!(node.waiting().await.len(), 2, "{jump}");
        assert_eq!(node.stream.last_offset(main).borrow().0, 1, "{jump}");
        assert_eq!(
            node.stream.schedule(&name).await.unwrap().published_count,
            0
        );
        // A node that starts now believes it no more.
        node.stop().await;
        let node = node_with(&db.database, "http://two", quick()).await;
        assert!(node.cluster.now() < Utc::now() + TimeDelta::minutes(5));
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        assert_eq!(node.waiting().await.len(), 2, "{jump}");
        clock::set(&db.url, "0").await;
        node.schedule(due("soon", Utc::now() + TimeDelta::seconds(1)))
            .await;
        assert_eq!(node.ids(main, 2).await, ["once", "soon"]);
        let found = node.stream.find_scheduled(early).await.unwrap().unwrap();
        assert_eq!(found.status, ScheduledStatus::Scheduled);
        let times =
            "select max(appended_at) < now() + interval '1 minute' from postroad_broker.message";
        let are_of_now: bool = sqlx::query_scalar(times)
            .fetch_one(&db.pool(1))
            .await
            .unwrap();
        assert!(are_of_now);
        node.stop().await;
    }
}

/// When both clocks say so, ids do go: the look above would notice.
#[tokio::test(flavor = "multi_thread")]
async fn ids_are_forgotten_when_both_clocks_agree() {
    let db = support::database().await;
    clock::settable(&db.url).await;
    let node = node(&db).await;
    let one = vec![message("a", "once", "1")];
    node.publish(one, true).await.unwrap();
    clock::set(&db.url, "36 hours").await;
    let mut duty = sql::connect_duty(&db.database).await.unwrap();
    let witness = Utc::now() + TimeDelta::hours(36);
    sql::rotate_buckets(&mut duty, witness).await.unwrap();
    let text = "select count(*) from postroad_broker.recent_id";
    let left: i64 = sqlx::query_scalar(text)
        .fetch_one(&db.pool(1))
        .await
        .unwrap();
    assert_eq!(left, 0);
    node.stop().await;
}

/// Messages were appended while all clocks were years ahead. They are as old as the leaf is known to end there.
#[tokio::test(flavor = "multi_thread")]
async fn retention_goes_on_after_clocks_that_were_years_ahead() {
    const YEARS: u64 = 1_000 * 86_400;
    let db = support::database().await;
    clock::settable(&db.url).await;
    clock::set(&db.url, "1000 days").await;
    let options = Options {
        clock_lead: Duration::from_secs(YEARS),
        ..quick()
    };
    let node = node_with(&db.database, "http://one", options).await;
    let name = StreamName::parse("short").unwrap();
    let retention = Retention {
        settled: Some(Duration::from_secs(1)),
        unsettled: None,
        ..Retention::default()
    };
    let declared = settings(&["short"], retention);
    let (stream, _) = node.stream.declare(name.clone(), declared).await.unwrap();
    let batch = |from: i64, to: i64| {
        (from..to)
            .map(|n| message("short", &n.to_string(), "1"))
            .collect::<Vec<_>>()
    };
    node.stream.set_watermark(stream.id, Offset(0));
    node.publish(batch(0, 230), false).await.unwrap();
    node.stop().await;
    clock::set(&db.url, "0").await;
    let node = node_with(&db.database, "http://two", quick()).await;
    // What follows bears no earlier time than what is there.
    node.publish(batch(230, 250), false).await.unwrap();
    node.stream.set_watermark(stream.id, Offset(i64::MAX));
    support::eventually("all to be dropped", async || {
        let stream = node.stream.describe(&name).await.unwrap();
        (stream.first_offset == Offset(251)).then_some(())
    })
    .await;
    node.publish(batch(250, 251), false).await.unwrap();
    let text = "select appended_at < now() + interval '1 hour' from postroad_broker.message where id = '250'";
    let is_of_now: Option<bool> = sqlx::query_scalar(text)
        .fetch_optional(&db.pool(1))
        .await
        .unwrap();
    assert_ne!(is_of_now, Some(false));
    node.stop().await;
}
