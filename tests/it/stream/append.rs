//! Appends: dense offsets, deduplication, the relay's fence, and what the database refuses.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use postroad::domain::id::{Epoch, Fence, Offset, OriginId};
use postroad::stream::{AppendError, Member, Placed, Rejected};
use sqlx::Executor as _;

use super::{message, node, node_with, offsets, quick, read};
use crate::support;

/// The quick way behind one's own group is not for a log that others have written to, or that is an older copy.
#[tokio::test(flavor = "multi_thread")]
async fn an_appender_goes_by_the_log_and_not_by_what_it_last_did() {
    let db = support::database().await;
    let node = node(&db).await;
    let main = node.main().await;
    let mut other = db.connect().await;
    let mut next = 1;
    for round in 0..20 {
        for n in 0..2 {
            let one = vec![message("orders", &format!("{round}-{n}"), "1")];
            let placed = node.publish(one, n == 0).await.unwrap();
            assert_eq!(offsets(&placed), [next]);
            next += 1;
        }
        // Somebody whom this node knows nothing of.
        let copy = format!(
            "insert into postroad_broker.message (stream_id, \"offset\", topic_id, appended_at, id, source, data_kind)
            select stream_id, \"offset\" + 1, topic_id, appended_at, 'other', source, 0
            from postroad_broker.message where stream_id = {} and \"offset\" = {}",
            main.0,
            next - 1
        );
        other.execute(sqlx::AssertSqlSafe(copy)).await.unwrap();
        next += 1;
    }
    // The latest two groups are gone, as in a copy from before them.
    let older = format!(
        "begin;
        delete from postroad_broker.message where stream_id = {} and \"offset\" > {};
        delete from postroad_broker.append_journal where number >=
            (select max(number) - 1 from postroad_broker.append_journal);
        commit",
        main.0,
        next - 4
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(older))
        .execute(&mut other)
        .await
        .unwrap();
    let placed = node
        .publish(vec![message("orders", "again", "1")], false)
        .await
        .unwrap();
    assert_eq!(offsets(&placed), [next - 3], "behind what there is");
    let placed = node
        .publish(vec![message("orders", "next", "1")], false)
        .await
        .unwrap();
    assert_eq!(offsets(&placed), [next - 2]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_appenders_give_dense_offsets_and_every_tail_sees_all_in_order() {
    let db = support::database().await;
    let one = Arc::new(node(&db).await);
    let two = Arc::new(node_with(&db.database, "http://two", quick()).await);
    let main = one.main().await;
    let tails = [one.stream.tail(main), two.stream.tail(main)].map(|mut tail| {
        tokio::spawn(async move {
            let mut events = Vec::new();
            while events.len() < 960 {
                let batch = tail.recv().await.unwrap();
                assert_eq!(batch.first.0, events.len() as i64 + 1, "no gap");
                events.extend(batch.entries.iter().cloned());
            }
            events
        })
    });
    let writers = (0..8).map(|writer| {
        let node = Arc::clone(if writer % 2 == 0 { &one } else { &two });
        tokio::spawn(async move {
            let mut own = Vec::new();
            for round in 0..40 {
                let messages = (0..3)
                    .map(|n| message("orders", &format!("{writer}-{round}-{n}"), "1"))
                    .collect();
                let placed = node.publish(messages, false).await.unwrap();
                assert_eq!(placed[2].offset.0 - placed[0].offset.0, 2);
                own.extend(offsets(&placed));
            }
            assert!(own.is_sorted(), "a writer's offsets rise");
            own
        })
    });
    let mut all = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        all.extend(writer.await.unwrap());
    }
    all.sort_unstable();
    assert_eq!(all, (1..=960).collect::<Vec<_>>());
    let mut seen = Vec::new();
    for tail in tails {
        seen.push(tail.await.unwrap());
    }
    assert_eq!(seen[0], seen[1]);
    // From the log the same, and times never go back.
    let fresh = node_with(&db.database, "http://three", quick()).await;
    let page = fresh.stream.read(read(main, 0)).await.unwrap();
    assert_eq!(page.entries, seen[0]);
    assert!(page.entries.is_sorted_by_key(|entry| entry.appended_at));
    for node in [&*one, &*two, &fresh] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_deduplicated_within_a_member_a_group_and_over_groups() {
    let db = support::database().await;
    let node = node(&db).await;
    let first = node
        .publish(vec![message("a", "1", "1"), message("a", "2", "2")], true)
        .await
        .unwrap();
    assert_eq!(offsets(&first), [1, 2]);
    // The same content again, among new ones and repeated in the same member.
    let again = vec![
        message("a", "2", "2"),
        message("a", "3", "3"),
        message("a", "3", "3"),
        message("a", "4", "4"),
    ];
    let placed = node.publish(again, true).await.unwrap();
    assert_eq!(offsets(&placed), [2, 3, 3, 4]);
    let duplicates: Vec<bool> = placed.iter().map(|placed| placed.duplicate).collect();
    assert_eq!(duplicates, [true, false, true, false]);
    // Other content: the member is refused whole, its group's others are not.
    let clash = vec![message("a", "5", "5"), message("a", "1", "other")];
    let (refused, taken) = tokio::join!(
        node.publish(clash, true),
        node.publish(vec![message("a", "6", "6")], true)
    );
    let Err(AppendError::IdConflict { items }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((items[0].index, items[0].offset), (1, Offset(1)));
    assert_eq!(offsets(&taken.unwrap()), [5]);
    let inside = vec![message("a", "7", "7"), message("a", "7", "other")];
    let refused = node.publish(inside, true).await;
    assert!(matches!(refused, Err(AppendError::IdConflict { items }) if items[0].index == 1));
    // Many callers with one id at once: one is first, the others are its duplicates.
    let racers = (0..20).map(|_| node.publish(vec![message("a", "race", "1")], true));
    let results = futures_util::future::join_all(racers).await;
    let placed: Vec<Placed> = results
        .into_iter()
        .map(|result| result.unwrap()[0])
        .collect();
    assert!(placed.iter().all(|placed| placed.offset == Offset(6)));
    assert_eq!(placed.iter().filter(|placed| !placed.duplicate).count(), 1);
    // Unchecked ids are not looked up.
    let placed = node.publish(vec![message("a", "1", "1")], false).await;
    assert_eq!(offsets(&placed.unwrap()), [7]);
    node.stop().await;
}

fn relay(fence: &Fence, from: i64, to: i64, ids: &[&str]) -> Member {
    Member::Relay {
        messages: ids.iter().map(|id| message("orders", id, "1")).collect(),
        conditional: Vec::new(),
        origin: OriginId(1),
        fence: fence.clone(),
        from,
        to,
        position: format!("{{\"at\": {to}}}"),
        rejected: vec![Rejected {
            seq: to,
            reason: "has no topic".to_owned(),
            outbox_row: "{}".to_owned(),
        }],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_appends_once_per_position_and_not_under_an_old_epoch() {
    let db = support::database().await;
    let node = node(&db).await;
    let mut connection = db.connect().await;
    connection
        .execute("insert into postroad_broker.origin (name) values ('shop')")
        .await
        .unwrap();
    let mut lease = node.cluster.hold(OriginId(1).lease_name());
    let fence = lease
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    let placed = node.stream.append(relay(&fence, 0, 5, &["a", "b"])).await;
    assert_eq!(offsets(&placed.unwrap()), [1, 2]);
    let repeated = node.stream.append(relay(&fence, 0, 5, &["a", "b"])).await;
    assert!(matches!(
        repeated,
        Err(AppendError::PositionMoved { found: 5 })
    ));
    let next = node.stream.append(relay(&fence, 5, 6, &[])).await;
    assert_eq!(next.unwrap(), []);
    // Another node takes over; a publish of the same group as the fenced member goes through.
    connection
        .execute("update postroad_broker.lease set epoch = epoch + 1 where name = 'relay/1'")
        .await
        .unwrap();
    let (fenced, published) = tokio::join!(
        node.stream.append(relay(&fence, 6, 7, &["c"])),
        node.publish(vec![message("orders", "d", "1")], false)
    );
    assert!(matches!(fenced, Err(AppendError::Fenced)));
    assert_eq!(offsets(&published.unwrap()), [3]);
    let (journal, rejected): (Vec<i64>, i64) = sqlx::query_as(
        "select array(select number from postroad_broker.relay_journal order by number), \
         (select count(*) from postroad_broker.rejected_message)",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!((journal, rejected), (vec![5, 6], 2));
    // Told of it, the cluster takes the lease again at a later epoch, and the relay goes on from the stored position.
    node.cluster.fenced(&fence);
    let later = lease
        .wait_for(|held| {
            held.as_ref()
                .is_some_and(|held| held.epoch > Epoch(fence.epoch.0 + 1))
        })
        .await
        .unwrap()
        .clone()
        .unwrap();
    let placed = node.stream.append(relay(&later, 6, 7, &["c"])).await;
    assert_eq!(offsets(&placed.unwrap()), [4]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_append_still_happens_and_leaves_no_session_in_a_transaction() {
    let db = support::database().await;
    let node = node(&db).await;
    for n in 0..200 {
        let append = node.publish(vec![message("a", &n.to_string(), "1")], true);
        let _ = tokio::time::timeout(Duration::from_micros(n * 10), append).await;
    }
    node.publish(vec![message("a", "last", "1")], true)
        .await
        .unwrap();
    let page = node.stream.read(read(node.main().await, 0)).await.unwrap();
    let ids: HashSet<&[u8]> = page.entries.iter().map(|entry| &entry.event[..]).collect();
    assert_eq!(ids.len(), page.entries.len(), "nothing twice");
    let mut connection = db.connect().await;
    let (idle,): (i64,) = sqlx::query_as(
        "select count(*) from pg_stat_activity \
         where datname = current_database() and state like 'idle in transaction%'",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!(idle, 0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_refuses_fails_its_member_alone() {
    let db = support::database().await;
    let node = node(&db).await;
    let mut connection = db.connect().await;
    connection
        .execute("alter table postroad_broker.message add constraint poison check (id <> 'poison')")
        .await
        .unwrap();
    let poison = node.publish(vec![message("a", "poison", "1")], false);
    let others = (0..20).map(|n| node.publish(vec![message("a", &n.to_string(), "1")], false));
    let (refused, others) = tokio::join!(poison, futures_util::future::join_all(others));
    assert!(
        matches!(refused, Err(AppendError::Refused(_))),
        "{refused:?}"
    );
    let all: HashSet<i64> = others.into_iter().map(|p| p.unwrap()[0].offset.0).collect();
    assert_eq!(all, (1..=20).collect());
    let nul = node.publish(vec![message("a", "a\0b", "1")], false).await;
    assert!(matches!(nul, Err(AppendError::Invalid { index: 0, .. })));
    node.stop().await;
}
