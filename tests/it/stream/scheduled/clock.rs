//! The database's clock goes back, and on: nothing is lost and nothing comes twice. See [`support::clock`].

use chrono::TimeDelta;
use postroad::domain::id::Offset;
use postroad::stream::ScheduledStatus;

use super::{due, node, quick};
use crate::stream::node_with;
use crate::support::{self, clock};

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_back_loses_nothing() {
    let db = support::database().await;
    clock::settable(&db.url).await;
    let node = node(&db).await;
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
    let node = node_with(&db.database, "http://two", quick()).await;
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
