//! One message's life, and who asks for it.

use chrono::TimeDelta;
use postroad::domain::id::Offset;
use postroad::domain::name::{StreamName, TopicPattern};
use postroad::stream::{AppendError, Cancelled, ScheduledQuery, ScheduledStatus};

use super::super::log::explain;
use super::super::settings;
use super::{due, due_in, message, node, node_with, quick};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_later_waits_and_enters_in_the_order_of_due_and_acceptance() {
    let db = support::database().await;
    let node = node(&db).await;
    let main = node.main().await;
    let at = node.cluster.now() + TimeDelta::milliseconds(700);
    let batch = vec![
        due("second", at),
        message("a", "at once", "1"),
        due("third", at),
        due("first", at - TimeDelta::milliseconds(1)),
        due_in(&node, "long past", -100_000),
    ];
    let placed = node.publish(batch.clone(), true).await.unwrap();
    let offsets: Vec<i64> = placed.iter().map(|placed| placed.offset.0).collect();
    assert_eq!(offsets, [0, 1, 0, 0, 2], "{placed:?}");
    assert!(placed.iter().all(|placed| !placed.duplicate));
    let fourth = node.schedule(due("fourth", at)).await;

    // Again: the same answers, and nothing new.
    let again = node.publish(batch, true).await.unwrap();
    for (first, again) in placed.iter().zip(&again) {
        assert_eq!(
            (first.offset, first.scheduled),
            (again.offset, again.scheduled)
        );
        assert!(again.duplicate);
    }
    let mut other = due("second", at);
    other.topic = message("b", "", "").topic;
    let conflict = node.publish(vec![other], true).await.unwrap_err();
    let AppendError::IdConflict { items } = conflict else {
        panic!("{conflict}");
    };
    assert_eq!(items[0].scheduled, placed[0].scheduled);

    let waiting = node.waiting().await;
    assert_eq!(waiting.len(), 4);
    assert!(waiting.is_sorted());
    let ids = node.ids(main, 6).await;
    assert_eq!(
        ids,
        ["at once", "long past", "first", "second", "third", "fourth"]
    );
    assert!(node.waiting().await.is_empty());
    for (id, offset) in [(placed[3].scheduled.unwrap(), 3), (fourth, 6)] {
        let found = node.stream.find_scheduled(id).await.unwrap().unwrap();
        let offset = Offset(offset);
        assert_eq!(found.status, ScheduledStatus::Published { offset });
        let cancelled = node.stream.cancel_scheduled(id).await.unwrap();
        assert_eq!(cancelled, Cancelled::AlreadyPublished { offset });
    }
    // It stays a duplicate of the name that it had.
    let again = node.publish(vec![due("fourth", at)], true).await.unwrap();
    assert_eq!(
        (again[0].scheduled, again[0].duplicate),
        (Some(fourth), true)
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_never_comes() {
    let db = support::database().await;
    let node = node(&db).await;
    let main = node.main().await;
    let at = node.cluster.now() + TimeDelta::milliseconds(600);
    let mut names = Vec::new();
    for n in 0..5 {
        names.push(node.schedule(due(&n.to_string(), at)).await);
    }
    for name in [names[0], names[2], names[2], names[4]] {
        let cancelled = node.stream.cancel_scheduled(name).await.unwrap();
        assert_eq!(cancelled, Cancelled::Cancelled);
    }
    let found = node.stream.find_scheduled(names[2]).await.unwrap().unwrap();
    assert!(matches!(found.status, ScheduledStatus::Cancelled { .. }));
    assert_eq!(node.waiting().await, [names[1], names[3]]);
    assert_eq!(node.ids(main, 2).await, ["1", "3"]);
    for (name, offset) in [(names[1], 1), (names[3], 2)] {
        let cancelled = node.stream.cancel_scheduled(name).await.unwrap();
        let offset = Offset(offset);
        assert_eq!(cancelled, Cancelled::AlreadyPublished { offset });
    }
    let cancelled = node.stream.cancel_scheduled(names[4]).await.unwrap();
    assert_eq!(cancelled, Cancelled::Cancelled, "also when it would be due");
    let mut unknown = names[0];
    unknown.number += 1_000;
    assert_eq!(
        node.stream.cancel_scheduled(unknown).await.unwrap(),
        Cancelled::Unknown
    );
    assert_eq!(node.stream.find_scheduled(unknown).await.unwrap(), None);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_goes_by_due_time_over_streams_and_leaves() {
    let db = support::database().await;
    let node = node(&db).await;
    let orders = StreamName::parse("orders").unwrap();
    node.stream
        .declare(
            orders.clone(),
            settings(&["orders.>"], postroad::stream::Retention::default()),
        )
        .await
        .unwrap();
    let now = node.cluster.now();
    let mut expected = Vec::new();
    for n in 0..30_i64 {
        // Over a year, two streams, in no order.
        let mut message = due(
            &n.to_string(),
            now + TimeDelta::hours(1 + (n * 37 % 31) * 280),
        );
        if n % 2 == 0 {
            message.topic = super::message("orders.late", "", "").topic;
        }
        expected.push(node.schedule(message).await);
    }
    expected.sort();
    assert_eq!(node.waiting().await, expected);
    let mut paged = Vec::new();
    let mut query = ScheduledQuery {
        max_messages: 7,
        ..ScheduledQuery::default()
    };
    loop {
        let page = node.stream.list_scheduled(query.clone()).await.unwrap();
        paged.extend(page.messages.iter().map(|waiting| waiting.row.id));
        query.after = page.next;
        if query.after.is_none() {
            break;
        }
    }
    assert_eq!(paged, expected);
    let from = now + TimeDelta::hours(1_000);
    let until = now + TimeDelta::hours(5_000);
    let query = ScheduledQuery {
        topic: Some(TopicPattern::parse("orders.*").unwrap()),
        due_from: Some(from),
        due_until: Some(until),
        max_messages: 100,
        ..ScheduledQuery::default()
    };
    let page = node.stream.list_scheduled(query).await.unwrap();
    let orders = node.stream.find(&orders).await.unwrap().id;
    let wanted = expected
        .iter()
        .filter(|id| id.stream == orders && id.due_at >= from && id.due_at < until);
    assert!(
        page.messages
            .iter()
            .map(|waiting| &waiting.row.id)
            .eq(wanted)
    );
    assert_eq!(page.next, None);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_node_accepted_is_published_and_survives_a_restart() {
    let db = support::database().await;
    let one = node(&db).await;
    let two = node_with(&db.database, "http://two", quick()).await;
    let main = one.main().await;
    two.schedule(due_in(&two, "by two", 2_000)).await;
    let late = one.schedule(due_in(&one, "late", 4_000)).await;
    assert_eq!(two.ids(main, 1).await, ["by two"]);
    one.stop().await;
    two.stop().await;
    // Nobody is there when it is due.
    tokio::time::sleep(
        (late.due_at - two.cluster.now())
            .to_std()
            .unwrap_or_default(),
    )
    .await;
    let node = node_with(&db.database, "http://three", quick()).await;
    assert_eq!(node.ids(main, 2).await, ["by two", "late"]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_look_for_what_is_due_is_a_range_of_few_indexes() {
    let db = support::database().await;
    let node = node(&db).await;
    for n in 0..200 {
        node.schedule(due_in(&node, &n.to_string(), 3_600_000 * (1 + n % 100)))
            .await;
    }
    let mut session = db.connect().await;
    let settings = "set enable_seqscan = off; set enable_bitmapscan = off; set enable_hashjoin = off; set enable_mergejoin = off";
    sqlx::Executor::execute(&mut session, settings)
        .await
        .unwrap();
    let at = node.cluster.now();
    let statement = format!(
        "select m.due_at, m.number, 512 + coalesce(octet_length(m.data), 0) as bytes from postroad_broker.scheduled_message m \
         where m.stream_id = 1 and m.due_at >= '{at}' and m.due_at <= '{at}'::timestamptz + interval '1 second' \
         and (m.due_at, m.number) > ('{at}', 17) order by m.due_at, m.number limit 2000"
    );
    let plan = explain(&mut session, &statement).await;
    assert!(
        plan.contains("Index Cond: ((stream_id = 1) AND (due_at >= "),
        "{plan}"
    );
    assert!(plan.contains("ROW(due_at, number) > ROW("), "{plan}");
    assert!(
        !plan.contains("Seq Scan") && !plan.contains("->  Sort"),
        "{plan}"
    );
    // The leaf of 6 hours, the month, the rest; two of a kind, when the second begins within the second that is asked for.
    assert!(plan.matches("Index Scan").count() <= 5, "{plan}");
    node.stop().await;
}
