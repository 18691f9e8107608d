//! The attribute `priority` on every way into the log, and what the log answers about order and lanes.

use std::time::Duration;

use bytes::Bytes;
use postroad::domain::id::Offset;
use postroad::domain::message::{Data, Message, Priority};
use postroad::domain::name::Topic;
use postroad::stream::{Attributes, Member, Options, Scan, key_hash};
use serde_json::{Value, json};

use super::log::explain;
use super::{message, node, node_with, offsets};
use crate::support;

#[tokio::test]
async fn priority_is_kept_in_the_log_whichever_way_a_message_came_and_passes_on_as_it_was() {
    let mut broker = support::broker().await;
    let http = broker.http.clone();
    let publish = async |content_type: &str, headers: &[(&str, &str)], body: Value| {
        let mut request = http
            .client
            .post(format!("{}/v1/topics/a/messages", http.base))
            .header("content-type", content_type)
            .body(body.to_string());
        for &(name, value) in headers {
            request = request.header(name, value);
        }
        let answer = request.send().await.unwrap();
        assert!(
            answer.status().is_success(),
            "{}",
            answer.text().await.unwrap()
        );
    };
    let event = |id: &str, priority: Value| json!({"specversion": "1.0", "id": id, "source": "/t", "type": "t", "priority": priority});
    publish(
        "application/cloudevents+json",
        &[],
        event("structured", json!("high")),
    )
    .await;
    let binary = [
        ("ce-specversion", "1.0"),
        ("ce-id", "binary"),
        ("ce-source", "/t"),
        ("ce-type", "t"),
        ("ce-priority", "2"),
    ];
    publish("application/json", &binary, json!({})).await;
    let batch = json!([
        event("first", json!(9)),
        event("second", json!("urgent")),
        event("third", json!("low"))
    ]);
    publish("application/cloudevents-batch+json", &[], batch).await;
    publish("application/json", &[], json!({})).await;
    let mut connection = broker.database.connect().await;
    sqlx::query(
        "insert into postroad.outbox (topic, payload, id, headers) values ('a', '{}', 'outbox', '{\"priority\": \"high\"}')",
    )
    .execute(&mut connection)
    .await
    .unwrap();
    let found = support::eventually("the outbox's row is relayed", || async {
        let (_, page) = http.get("/v1/streams/main/messages?max_messages=100").await;
        let events: Vec<Value> = page["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| message["event"]["priority"].clone())
            .collect();
        (events.len() == 7).then_some(events)
    })
    .await;
    let null = Value::Null;
    assert_eq!(
        found,
        [
            json!("high"),
            json!("2"),
            json!(9),
            json!("urgent"),
            json!("low"),
            null,
            json!("high")
        ]
    );
    let stored: Vec<i16> =
        sqlx::query_scalar("select priority from postroad_broker.message order by \"offset\"")
            .fetch_all(&mut connection)
            .await
            .unwrap();
    assert_eq!(stored, [2, 0, 2, 1, 0, 1, 2]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attributes_are_answered_of_the_log_without_what_is_gone() {
    let db = support::database().await;
    let node = node(&db).await;
    let main = node.main().await;
    let numbered = |n: i64| Message {
        id: format!("m{n}"),
        source: "/test".to_owned(),
        kind: None,
        topic: Topic::parse("a").unwrap(),
        key: (n % 3 != 0).then(|| format!("k{}", n % 5)),
        subject: None,
        time: None,
        data_content_type: None,
        data_schema: None,
        data: Data::Json(Bytes::from_static(b"1")),
        extensions: serde_json::Map::from_iter([("priority".to_owned(), (n % 10).into())]),
        expected_version: None,
    };
    let messages = (1..=400).map(numbered).collect();
    let member = Member::Publish {
        messages,
        check_ids: false,
        as_one: Vec::new(),
    };
    assert_eq!(
        offsets(&node.stream.append(member).await.unwrap()),
        (1..=400).collect::<Vec<_>>()
    );
    let expected = |n: i64| Attributes {
        offset: Offset(n),
        key_hash: (n % 3 != 0).then(|| key_hash(&format!("k{}", n % 5))),
        priority: [Priority::Low, Priority::Normal, Priority::High]
            [usize::from(n % 10 > 3) + usize::from(n % 10 > 6)],
    };
    // A run, nearly a run, and places here and there, out of order, twice, and beyond the end.
    for asked in [
        (1..=400).collect::<Vec<_>>(),
        (1..=205).map(|n| n * 2).collect(),
        vec![399, 7, 7, 100, 101, 2, 500, i64::MAX],
        vec![5],
        vec![401, 402],
        vec![],
    ] {
        let found = node
            .stream
            .attributes(main, asked.iter().copied().map(Offset).collect())
            .await
            .unwrap();
        let mut there: Vec<i64> = asked.into_iter().filter(|&n| n <= 400).collect();
        there.sort_unstable();
        there.dedup();
        assert_eq!(found, there.into_iter().map(expected).collect::<Vec<_>>());
    }
    let scan = Scan {
        stream: main,
        after: Offset(10),
        topics: Vec::new(),
        max_items: 20,
    };
    let scanned = node.stream.scan(scan).await.unwrap();
    assert_eq!(scanned.items.len(), 20);
    for item in scanned.items {
        let Attributes {
            offset,
            key_hash,
            priority,
        } = expected(item.offset.0);
        assert_eq!(
            (item.offset, item.key_hash, item.priority),
            (offset, key_hash, priority)
        );
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn single_messages_are_read_by_their_places_not_by_a_walk_over_the_leaf() {
    let db = support::database().await;
    for (leaf_offsets, address) in [(250_000, "http://one"), (1_000, "http://two")] {
        let options = Options {
            leaf_offsets,
            maintenance: Duration::from_millis(20),
            ..Options::default()
        };
        let node = node_with(&db.database, address, options).await;
        for n in 0..5 {
            let batch = (0..1_000).map(|i| message("a", &format!("{n}-{i}"), "1"));
            node.publish(batch.collect(), false).await.unwrap();
        }
        node.stop().await;
    }
    let mut reader = postroad::store::stream::connect_reader(&db.database)
        .await
        .unwrap();
    for sql in [
        include_str!("../../../src/store/sql/fetch_attributes.sql"),
        include_str!("../../../src/store/sql/fetch_offsets.sql"),
    ] {
        for wanted in [vec![3, 4_000], (1..400).map(|n| n * 7).collect()] {
            let statement = sql
                .replace("$1", "1")
                .replace("$2", &format!("array{wanted:?}"))
                .replace("$3", &wanted[0].to_string())
                .replace("$4", &wanted[wanted.len() - 1].to_string());
            let plan = explain(&mut reader, &statement).await;
            let last = wanted[wanted.len() - 1];
            let condition = format!(
                "Index Cond: ((stream_id = 1) AND (\"offset\" >= {}) AND (\"offset\" <= {last}) AND (\"offset\" = w.place))",
                wanted[0]
            );
            assert!(plan.contains(&condition), "{plan}");
            assert!(
                !plan.contains("Seq Scan") && !plan.contains("Sort"),
                "{plan}"
            );
            assert_eq!(
                plan.matches("Index Scan").count(),
                1,
                "one leaf is in question:\n{plan}"
            );
        }
    }
    let statement = include_str!("../../../src/store/sql/read_attributes.sql")
        .replace("$1", "1")
        .replace("$2", "1100")
        .replace("$3", "1900");
    let plan = explain(&mut reader, &statement).await;
    let condition =
        "Index Cond: ((stream_id = 1) AND (\"offset\" >= 1100) AND (\"offset\" <= 1900))";
    assert!(plan.contains(condition), "{plan}");
    assert!(!plan.contains("Seq Scan"), "{plan}");
    assert_eq!(plan.matches("Index Scan").count(), 1, "{plan}");
}
