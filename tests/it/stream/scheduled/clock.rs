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

/// A node that started with its clock behind neither makes messages old, which retention would drop, nor publishes them late.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_clock_is_behind_makes_no_message_old() {
    const DAYS: u64 = 30 * 86_400;
    let db = support::database().await;
    clock::settable(&db.url).await;
    clock::set(&db.url, "30 days").await;
    let right = Options {
        clock_lead: Duration::from_secs(DAYS),
        ..quick()
    };
    let right = node_with(&db.database, "http://right", right).await;
    let pool = db.pool(1);
    support::eventually("the clocks to agree", async || {
        let text =
            "select agreed_at > now() + interval '29 days' from postroad_broker.clock_agreement";
        let is_noted: bool = sqlx::query_scalar(text).fetch_one(&pool).await.unwrap();
        is_noted.then_some(())
    })
    .await;
    let behind = node_with(&db.database, "http://behind", quick()).await;
    let name = StreamName::parse("new").unwrap();
    let retention = Retention {
        unsettled: Some(Duration::from_secs(14 * 86_400)),
        ..Retention::default()
    };
    let declared = settings(&["new"], retention);
    let (stream, _) = behind.stream.declare(name, declared).await.unwrap();
    behind
        .publish(vec![message("new", "one", "1")], true)
        .await
        .unwrap();
    let text = "select max(appended_at) - now() > interval '29 days' from postroad_broker.message";
    let is_of_now: bool = sqlx::query_scalar(text).fetch_one(&pool).await.unwrap();
    assert!(is_of_now);
    right.stream.set_watermark(stream.id, Offset(0));
    for node in [right, behind] {
        assert_eq!(node.ids(stream.id, 1).await, ["one"]);
        node.stop().await;
    }
}

/// By so much behind, an id would be in the bucket that is emptied next.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_was_behind_has_no_id_forgotten() {
    let ahead = Options {
        clock_lead: Duration::from_secs(36 * 3_600),
        ..quick()
    };
    // The database's clock is behind, then the node's.
    for (database, then, other) in [("-36 hours", "0", quick()), ("36 hours", "36 hours", ahead)] {
        let db = support::database().await;
        clock::settable(&db.url).await;
        clock::set(&db.url, database).await;
        let node = node_with(&db.database, "http://one", quick()).await;
        let once = vec![message("a", "once", "1")];
        // The second by the quick way, if it were taken.
        let placed = node.publish(once.clone(), true).await.unwrap();
        assert_eq!(offsets(&placed), [1]);
        let twice = vec![message("a", "twice", "1")];
        assert_eq!(
            offsets(&node.publish(twice.clone(), true).await.unwrap()),
            [2]
        );
        // Known already while they are apart, in each of its places.
        assert!(node.publish(once.clone(), true).await.unwrap()[0].duplicate);
        node.stop().await;
        clock::set(&db.url, then).await;
        let lead = TimeDelta::from_std(other.clock_lead).unwrap();
        let mut duty = sql::connect_duty(&db.database).await.unwrap();
        sql::rotate_buckets(&mut duty, Utc::now() + lead)
            .await
            .unwrap();
        let node = node_with(&db.database, "http://two", other).await;
        for again in [once, twice] {
            let placed = node.publish(again, true).await.unwrap();
            assert!(placed[0].duplicate, "{database}");
        }
        node.stop().await;
    }
}

/// Both clocks were a year ahead, and a schedule with them.
#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_goes_on_after_clocks_that_were_far_ahead() {
    const YEAR: u64 = 400 * 86_400;
    let db = support::database().await;
    clock::settable(&db.url).await;
    clock::set(&db.url, "400 days").await;
    let options = Options {
        clock_lead: Duration::from_secs(YEAR),
        ..quick()
    };
    let node = node_with(&db.database, "http://one", options).await;
    let declaration = Declaration {
        topic: postroad::domain::name::Topic::parse("ticks").unwrap(),
        cadence: Cadence::parse("* * * * *", "UTC", Utc::now()).unwrap(),
        misfire: Misfire::All,
        is_paused: false,
        event: "{}".to_owned(),
    };
    let name = postroad::domain::name::ScheduleName::parse("often").unwrap();
    let declared = node
        .stream
        .declare_schedule(name.clone(), declaration)
        .await;
    declared.unwrap();
    node.stop().await;
    let days = TimeDelta::days;
    let schedule = async |node: &crate::stream::Node| node.stream.schedule(&name).await.unwrap();
    // Behind by hours it waits: what it published is not to come twice.
    clock::set(&db.url, "399 days 12 hours").await;
    let options = Options {
        clock_lead: Duration::from_secs(YEAR - 12 * 3_600),
        ..quick()
    };
    let node = node_with(&db.database, "http://one", options).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(schedule(&node).await.through > Utc::now() + days(399) + TimeDelta::hours(20));
    node.stop().await;
    clock::set(&db.url, "0").await;
    let node = node_with(&db.database, "http://two", quick()).await;
    support::eventually("the schedule to begin anew", async || {
        (schedule(&node).await.through < Utc::now() + days(1)).then_some(())
    })
    .await;
    node.stop().await;
}

/// A queue went back by a clock that was ahead: its stream would drop nothing that is settled until then.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_of_a_clock_that_was_ahead_does_not_stop_retention() {
    let db = support::database().await;
    clock::settable(&db.url).await;
    let node = node(&db).await;
    let name = StreamName::parse("short").unwrap();
    let retention = Retention {
        settled: Some(Duration::from_secs(1)),
        unsettled: None,
        ..Retention::default()
    };
    let declared = settings(&["short"], retention);
    let (stream, _) = node.stream.declare(name.clone(), declared).await.unwrap();
    let mut owner = db.connect().await;
    let text = "insert into postroad_broker.queue (name, stream_id, patterns, slot, settings, start, start_offset, version, renewed_at)
        values ('late', $1, array['>'], 0, '{}', '{}', 1, 1, now() + interval '1000 days')";
    sqlx::query(text)
        .bind(stream.id.0)
        .execute(&mut owner)
        .await
        .unwrap();
    node.publish(vec![message("short", "one", "1")], false)
        .await
        .unwrap();
    node.stop().await;
    // Whose first pass corrects it.
    let node = node_with(&db.database, "http://two", quick()).await;
    support::eventually("what is settled to be dropped", async || {
        // As the queues' engine tells it again and again.
        node.stream.set_watermark(stream.id, Offset(i64::MAX));
        let stream = node.stream.describe(&name).await.unwrap();
        (stream.first_offset == Offset(2)).then_some(())
    })
    .await;
    node.stop().await;
}
