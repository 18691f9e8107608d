//! The database's clock goes back, and on: nothing is lost and nothing comes twice. The functions of the broker ask for
//! `clock_timestamp()` by its name alone, so a schema before `pg_catalog` gives them another.

use chrono::TimeDelta;
use postroad::domain::id::Offset;
use postroad::stream::ScheduledStatus;
use sqlx::{AssertSqlSafe, Executor as _};

use super::{due, node, quick};
use crate::stream::node_with;
use crate::support::{self, TestDatabase};

/// Gives the database a clock that can be set.
pub(super) async fn settable(db: &TestDatabase) {
    let mut owner = db.connect().await;
    let text = format!(
        "create schema settable;
        create table settable.clock (ahead interval not null);
        insert into settable.clock values ('0');
        create function settable.clock_timestamp() returns timestamptz language sql volatile as
            'select pg_catalog.clock_timestamp() + ahead from settable.clock';
        alter database {} set search_path = settable, pg_catalog, public",
        db.name
    );
    owner.execute(AssertSqlSafe(text)).await.unwrap();
}

pub(super) async fn set(db: &TestDatabase, ahead: &str) {
    let mut owner = db.connect().await;
    let text = format!("update settable.clock set ahead = '{ahead}'");
    owner.execute(AssertSqlSafe(text)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_back_loses_nothing() {
    let db = support::database().await;
    settable(&db).await;
    let node = node(&db).await;
    let main = node.main().await;
    let now = node.cluster.now();
    let minutes = TimeDelta::minutes;
    node.schedule(due("in 10", now + minutes(10))).await;
    let in_50 = node.schedule(due("in 50", now + minutes(50))).await;
    // An hour on: the first are due, and the horizon is ahead of what the clock will be.
    set(&db, "30 minutes").await;
    assert_eq!(node.ids(main, 1).await, ["in 10"]);
    node.schedule(due("in 45", now + minutes(45))).await;
    set(&db, "40 minutes").await;
    node.schedule(due("in 41", now + minutes(41))).await;
    set(&db, "42 minutes").await;
    assert_eq!(node.ids(main, 2).await, ["in 10", "in 41"]);
    // Back.
    set(&db, "0").await;
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
    let node = node_with(&db.database, "http://two", quick()).await;
    set(&db, "44 minutes").await;
    let expected = ["in 10", "in 41", "behind", "just behind", "before"];
    assert_eq!(node.ids(main, 5).await, expected);
    set(&db, "-1 day").await;
    set(&db, "2 hours").await;
    let ids = node.ids(main, 7).await;
    assert_eq!(ids[5..], ["in 45", "in 50"]);
    for (id, offset) in [(before, 5), (in_50, 7)] {
        let found = node.stream.find_scheduled(id).await.unwrap().unwrap();
        let offset = Offset(offset);
        assert_eq!(found.status, ScheduledStatus::Published { offset });
    }
    node.stop().await;
}
