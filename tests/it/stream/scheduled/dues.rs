//! Times that are far apart: no leaf is made by an append, and nobody waits for one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use postroad::domain::id::Offset;
use postroad::store::stream as sql;
use postroad::stream::{Cancelled, ScheduledStatus};

use super::{due, leading, node};
use crate::stream::{Node, message, node_with};
use crate::support::{self, TestDatabase, clock, eventually};

/// Leaves that a year of due times may take, those of moves of horizons included.
const LEAVES_MAX: i64 = 45;

async fn count(db: &TestDatabase, text: &str) -> i64 {
    let mut owner = db.connect().await;
    let counted = sqlx::query_scalar(sqlx::AssertSqlSafe(text.to_owned()));
    counted.fetch_one(&mut owner).await.unwrap()
}

/// Publishes to the same stream all the while, and gives how long the slowest took.
fn watch(node: &Arc<Node>, is_over: &Arc<AtomicBool>) -> tokio::task::JoinHandle<Duration> {
    let (node, is_over) = (Arc::clone(node), Arc::clone(is_over));
    tokio::spawn(async move {
        let mut slowest = Duration::ZERO;
        let mut number = 0;
        while !is_over.load(Ordering::Relaxed) {
            let began = Instant::now();
            let one = message("beside", &format!("beside-{number}"), "1");
            node.publish(vec![one], true).await.unwrap();
            slowest = slowest.max(began.elapsed());
            number += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        slowest
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn due_times_of_all_years_hold_up_nobody() {
    let db = support::database().await;
    let node = Arc::new(node(&db).await);
    let main = node.main().await;
    let is_over = Arc::new(AtomicBool::new(false));
    let beside = watch(&node, &is_over);
    let now = node.cluster.now();
    // A backfill: 4,000 times that are past, 6 hours apart; and from the year 1000 on.
    let hours = |n: i64| now - TimeDelta::hours(6 * n);
    let years = |n: i64| now - TimeDelta::days(365 * n);
    for batch in 0..4_i64 {
        let past = (batch * 1_000..(batch + 1) * 1_000).map(|n| due(&format!("p{n}"), hours(n)));
        let placed = node.publish(past.collect(), false).await.unwrap();
        assert!(placed.iter().all(|placed| placed.scheduled.is_none()));
    }
    let old = (1..=1_000).map(|n| due(&format!("o{n}"), years(n)));
    let placed = node.publish(old.collect(), false).await.unwrap();
    assert!(placed.iter().all(|placed| placed.scheduled.is_none()));
    let leaves = "select count(*) from postroad_broker.scheduled_leaf";
    assert_eq!(count(&db, leaves).await, 0, "a past time needs no leaf");
    // Reminders of a year.
    for batch in 0..2 {
        let ahead = (1..=730).map(|n| {
            let at = now + TimeDelta::hours(6 * (batch * 730 + n) - 6) + TimeDelta::minutes(30);
            due(&format!("r{batch}-{n}"), at)
        });
        let placed = node.publish(ahead.collect(), false).await.unwrap();
        assert!(placed.iter().all(|placed| placed.scheduled.is_some()));
    }
    assert_eq!(node.waiting().await.len(), 1_460);
    let made = eventually("the leaves to be made", async || {
        let made = count(&db, leaves).await;
        (made >= 26).then_some(made)
    })
    .await;
    // The same again, into leaves.
    let ahead = (1..=1_460).map(|n| {
        due(
            &format!("a{n}"),
            now + TimeDelta::hours(6 * n) - TimeDelta::hours(5),
        )
    });
    node.publish(ahead.collect(), false).await.unwrap();
    assert_eq!(node.waiting().await.len(), 2_920);
    assert!(made <= LEAVES_MAX && count(&db, leaves).await <= LEAVES_MAX);
    is_over.store(true, Ordering::Relaxed);
    let slowest = beside.await.unwrap();
    println!("{made} leaves; the slowest publish beside it took {slowest:?}");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    assert!(node.stream.last_offset(main).borrow().0 >= 5_000);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_accepted_with_and_without_leaves_comes_in_one_order_and_leaves() {
    let db = support::database().await;
    clock::settable(&db.url).await;
    let node = node_with(&db.database, "http://one", leading()).await;
    let main = node.main().await;
    let now = node.cluster.now();
    let at = |minutes: i64| now + TimeDelta::minutes(minutes);
    const MONTHS: i64 = 40 * 24 * 60;
    // The very first: no leaf is there.
    let first = node.schedule(due("1", at(60))).await;
    node.schedule(due("4", at(MONTHS))).await;
    eventually("leaves to be made", async || {
        let leaves = "select count(*) from postroad_broker.scheduled_leaf where kind = 'month'";
        (count(&db, leaves).await >= 13).then_some(())
    })
    .await;
    node.schedule(due("2", at(60))).await;
    node.schedule(due("3", at(61))).await;
    node.schedule(due("5", at(MONTHS))).await;
    let last = node.schedule(due("6", at(MONTHS + 1))).await;
    let dropped = node.schedule(due("no", at(MONTHS))).await;
    let tiers = "select count(distinct tier) from postroad_broker.scheduled_message";
    assert_eq!(count(&db, tiers).await, 3);
    assert_eq!(node.waiting().await.len(), 7);
    assert_eq!(
        node.stream.cancel_scheduled(dropped).await.unwrap(),
        Cancelled::Cancelled
    );
    clock::set(&db.url, "62 minutes").await;
    assert_eq!(node.ids(main, 3).await, ["1", "2", "3"]);
    clock::set(&db.url, "41 days").await;
    assert_eq!(node.ids(main, 6).await, ["1", "2", "3", "4", "5", "6"]);
    let found = node.stream.find_scheduled(last).await.unwrap().unwrap();
    let offset = Offset(6);
    assert_eq!(found.status, ScheduledStatus::Published { offset });
    // What is past is remembered no more, whatever it was in.
    node.stop().await;
    let mut connection = db.database.connect().await.unwrap();
    let later = now + TimeDelta::days(41);
    for leaf in sql::missing_scheduled_leaves(&mut connection, later)
        .await
        .unwrap()
    {
        sql::extend_scheduled(&mut connection, &leaf).await.unwrap();
    }
    let day = Duration::from_secs(86_400);
    for leaf in sql::list_scheduled_leaves(&mut connection).await.unwrap() {
        sql::empty_scheduled_leaf(&mut connection, &leaf, later, day)
            .await
            .unwrap();
    }
    assert_eq!(
        sql::forget_scheduled(&mut connection, 1).await.unwrap(),
        1,
        "one at a time"
    );
    while sql::forget_scheduled(&mut connection, 1).await.unwrap() > 0 {}
    let rest = "select count(*) from postroad_broker.scheduled_rest";
    assert_eq!(count(&db, rest).await, 0);
    let node = node_with(&db.database, "http://two", leading()).await;
    assert!(node.stream.find_scheduled(first).await.unwrap().is_none());
    assert_eq!(
        node.stream.cancel_scheduled(first).await.unwrap(),
        Cancelled::Unknown
    );
    node.stop().await;
}
