//! Very many that are due at one instant; and the space of those that are past.

use chrono::TimeDelta;
use postroad::store::stream as sql;
use postroad::stream::Cancelled;
use sqlx::Executor as _;
use std::time::Duration;

use super::node;
use crate::support;

/// How many. 1,000,000 is the figure that is promised; the run of every day takes fewer.
fn count() -> i64 {
    let set = std::env::var("POSTROAD_TEST_ONE_INSTANT").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(20_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_one_instant_come_in_bounded_commits_and_in_order() {
    let db = support::database().await;
    let node = super::node(&db).await;
    let main = node.main().await;
    let count = count();
    node.schedule(super::due_in(&node, "model", 3_600_000))
        .await;
    node.stop().await;
    // As `append` would have accepted them, of one instant that is past by now.
    let mut owner = db.connect().await;
    let text = format!(
        "insert into postroad_broker.scheduled_message (
            stream_id, due_at, number, topic_id, id, source, data_kind, data, accepted_at)
        with i as materialized (select clock_timestamp() as instant)
        select m.stream_id, i.instant, nextval('postroad_broker.scheduled_number'), m.topic_id, n::text, m.source,
            m.data_kind, m.data, m.accepted_at
        from postroad_broker.scheduled_message m, i, generate_series(1, {count}) as g (n)
        order by g.n"
    );
    owner.execute(sqlx::AssertSqlSafe(text)).await.unwrap();
    let node = super::node(&db).await;
    let started = std::time::Instant::now();
    let mut last = node.stream.last_offset(main);
    let waiting = last.wait_for(|last| last.0 >= count);
    tokio::time::timeout(Duration::from_secs(600), waiting)
        .await
        .expect("published in time")
        .unwrap();
    let took = started.elapsed();
    let (commits, largest, stored, ordered): (i64, i32, i64, bool) = sqlx::query_as(
        "select count(*), max(message_count), (select count(*) from postroad_broker.message), (
            select bool_and(id = \"offset\"::text) from postroad_broker.message)
        from postroad_broker.scheduled_publication",
    )
    .fetch_one(&mut owner)
    .await
    .unwrap();
    println!("{count} at one instant: {commits} commits of {largest} at most, in {took:?}");
    assert_eq!((stored, ordered), (count, true));
    assert!(largest <= 2_000 && commits >= count / 2_000);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaves_that_are_past_are_emptied_and_dropped_and_the_horizon_stays() {
    let db = support::database().await;
    let node = node(&db).await;
    let main = node.main().await;
    // Leaves are made once a stream has something scheduled.
    let none = node.schedule(super::due_in(&node, "none", 3_600_000)).await;
    node.stream.cancel_scheduled(none).await.unwrap();
    let mut owner = db.connect().await;
    support::eventually("leaves to be made", async || {
        let text = "select count(*) >= 26 from postroad_broker.scheduled_leaf";
        let are_made: bool = sqlx::query_scalar(text)
            .fetch_one(&db.pool(1))
            .await
            .unwrap();
        are_made.then_some(())
    })
    .await;
    let first = node.schedule(super::due_in(&node, "1", 2_000)).await;
    node.ids(main, 1).await;
    node.stop().await;
    let mut connection = db.database.connect().await.unwrap();
    // The leaves of now are of two days ago, as far as they can tell.
    owner
        .execute(
            "do $$ declare l record; p text; c text; begin
                for l in select * from postroad_broker.scheduled_leaf
                    where kind <> 'month' and first_at <= clock_timestamp() order by first_at
                loop
                    p := case l.kind when 'near' then 'scheduled_near' else 'scheduled_publication' end;
                    c := case l.kind when 'near' then 'due_at' else 'filed_at' end;
                    execute format('alter table postroad_broker.%I detach partition postroad_broker.%I', p, l.table_name);
                    execute format('update postroad_broker.%I set due_at = due_at - interval ''2 days''', l.table_name);
                    if c = 'filed_at' then
                        execute format('update postroad_broker.%I set filed_at = filed_at - interval ''2 days''', l.table_name);
                    end if;
                    execute format('alter table postroad_broker.%I attach partition postroad_broker.%I for values from (%L) to (%L)',
                        p, l.table_name, l.first_at - interval '2 days', l.last_at - interval '2 days');
                end loop;
                update postroad_broker.scheduled_leaf set first_at = first_at - interval '2 days', last_at = last_at - interval '2 days'
                where kind <> 'month' and first_at <= clock_timestamp();
            end $$",
        )
        .await
        .unwrap();
    let past = async |connection: &mut postroad::store::Connection| {
        let leaves = sql::list_scheduled_leaves(connection).await.unwrap();
        let is_past = |leaf: &sql::ScheduledLeaf| leaf.last_at < chrono::Utc::now();
        leaves.into_iter().filter(is_past).collect::<Vec<_>>()
    };
    let leaves = past(&mut connection).await;
    assert_eq!(leaves.len(), 2, "{leaves:?}");
    let day = Duration::from_secs(86_400);
    let now = node.cluster.now();
    // Once to empty those with rows and drop those without, once more to drop.
    for _ in 0..2 {
        for leaf in &leaves {
            sql::empty_scheduled_leaf(&mut connection, leaf, now, day)
                .await
                .unwrap();
        }
    }
    assert!(past(&mut connection).await.is_empty());
    let horizon: (bool,) = sqlx::query_as(
        "select h.due_at > now() - interval '3 days' from postroad_broker.scheduled_horizon(1) h",
    )
    .fetch_one(&mut owner)
    .await
    .unwrap();
    assert!(horizon.0, "the horizon outlives its rows");
    let node = super::node(&db).await;
    let forgotten = node.stream.cancel_scheduled(first).await.unwrap();
    assert_eq!(forgotten, Cancelled::Unknown);
    // The leaf of now is gone; what is accepted needs none.
    node.schedule(super::due_in(&node, "2", 2_000)).await;
    assert_eq!(node.ids(main, 2).await, ["1", "2"]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaf_with_something_that_waits_is_kept() {
    let db = support::database().await;
    let node = node(&db).await;
    node.schedule(super::due_in(&node, "1", 3_600_000)).await;
    node.stop().await;
    let mut connection = db.database.connect().await.unwrap();
    let later = node.cluster.now() + TimeDelta::days(300);
    for leaf in sql::list_scheduled_leaves(&mut connection).await.unwrap() {
        // The server's clock counts too: nothing goes before its time by a node's clock alone.
        let done = sql::empty_scheduled_leaf(&mut connection, &leaf, later, Duration::ZERO)
            .await
            .unwrap();
        assert!(!done);
    }
    let query = "select count(*) from postroad_broker.scheduled_message";
    let mut owner = db.connect().await;
    let count: i64 = sqlx::query_scalar(query)
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(count, 1);
}
