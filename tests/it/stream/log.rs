//! The log's reads and leaves: sessions that hold what they read, scans, the plans of hot statements.

use std::collections::HashSet;
use std::time::Duration;

use postroad::domain::id::Offset;
use postroad::domain::name::{StreamName, TopicPattern};
use postroad::stream::{Options, Read, Retention, Scan};
use sqlx::{Connection as _, Executor as _, PgConnection};

use super::{message, node, node_with, offsets, quick, read, settings};
use crate::support::{self, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_idle_in_a_transaction_stalls_nothing() {
    let db = support::database().await;
    let node = node(&db).await;
    let retention = Retention {
        settled: Some(Duration::from_secs(1)),
        unsettled: None,
        ..Retention::default()
    };
    node.stream
        .declare(StreamName::main(), settings(&[], retention))
        .await
        .unwrap();
    let main = node.main().await;
    node.stream.set_watermark(main, Offset(i64::MAX));
    node.publish(vec![message("a", "0", "1")], false)
        .await
        .unwrap();
    let mut reader = db.connect().await;
    reader
        .execute(
            "begin isolation level repeatable read; select count(*) from postroad_broker.message",
        )
        .await
        .unwrap();
    let started = std::time::Instant::now();
    let mut slowest = Duration::ZERO;
    // Over several leaves, for longer than the retention.
    for round in 0..30 {
        let batch = (0..20)
            .map(|n| message("a", &format!("{round}-{n}"), "1"))
            .collect();
        let asked = std::time::Instant::now();
        node.publish(batch, true).await.unwrap();
        slowest = slowest.max(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    assert!(started.elapsed() > Duration::from_secs(1));
    assert!(
        slowest < Duration::from_secs(1),
        "an append took {slowest:?}"
    );
    let description = node.stream.describe(&StreamName::main()).await.unwrap();
    assert_eq!(description.last_offset, Offset(601));
    assert_eq!(description.first_offset, Offset(1), "what is read is kept");
    reader.execute("commit").await.unwrap();
    eventually("the space comes back", async || {
        let first = node
            .stream
            .describe(&StreamName::main())
            .await
            .unwrap()
            .first_offset;
        (first == Offset(602)).then_some(())
    })
    .await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_defaults_to_another_isolation_level_changes_nothing() {
    for level in ["repeatable read", "serializable"] {
        let db = support::database().await;
        let mut admin = db.connect().await;
        let statement = format!(
            "alter database {} set default_transaction_isolation = '{level}'",
            db.name
        );
        admin.execute(sqlx::AssertSqlSafe(statement)).await.unwrap();
        let one = node(&db).await;
        let two = node_with(&db.database, "http://two", quick()).await;
        let publishes = (0..60).map(|n| {
            let node = if n % 2 == 0 { &one } else { &two };
            node.publish(vec![message("a", &n.to_string(), "1")], true)
        });
        let placed = futures_util::future::join_all(publishes).await;
        let all: HashSet<i64> = placed.into_iter().map(|p| p.unwrap()[0].offset.0).collect();
        assert_eq!(all, (1..=60).collect());
        // Called at another level it refuses, rather than give an offset twice.
        let mut other = db.connect().await;
        let refused = other
            .execute("select postroad_broker.empty_leaf(1, 1, now(), '1s', null, 0, now(), false, false)")
            .await;
        assert!(refused.unwrap_err().to_string().contains("read committed"));
        for node in [one, two] {
            node.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scans_pass_over_leaves_that_cannot_match_and_find_all_that_do() {
    let db = support::database().await;
    let node = node(&db).await;
    let main = node.main().await;
    for hundred in 0..12 {
        let batch = (0..100).map(|n| {
            let rare = n == 50 && hundred % 4 == 0;
            message(
                if rare { "rare.one" } else { "usual" },
                &format!("{hundred}-{n}"),
                "1",
            )
        });
        node.publish(batch.collect(), false).await.unwrap();
    }
    let pool = db.pool(1);
    eventually("full leaves are summarised", async || {
        let (open,): (i64,) = sqlx::query_as(
            "select count(*) from postroad_broker.message_leaf \
             where summarised_at is null and last_offset <= 1200",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        (open == 0).then_some(())
    })
    .await;
    let scan = |after: i64, max_items| Scan {
        stream: main,
        after: Offset(after),
        topics: vec![TopicPattern::parse("rare.*").unwrap()],
        max_items,
    };
    let found = node.stream.scan(scan(0, 100)).await.unwrap();
    let at: Vec<i64> = found.items.iter().map(|item| item.offset.0).collect();
    assert_eq!((at, found.through), (vec![51, 451, 851], Offset(1200)));
    let found = node.stream.scan(scan(0, 2)).await.unwrap();
    // How far it looked depends on the sizes of the leaves.
    assert_eq!(found.items.len(), 2);
    assert!((451..851).contains(&found.through.0), "{}", found.through);
    assert_eq!(found.items[0].topic.as_str(), "rare.one");
    let rest = node.stream.scan(scan(found.through.0, 2)).await.unwrap();
    assert_eq!(
        (rest.items[0].offset, rest.through),
        (Offset(851), Offset(1200))
    );
    // By key, by page, by time, by id, by offset.
    let fresh = node_with(&db.database, "http://two", quick()).await;
    let keyed = Read {
        key: Some("key 3".to_owned()),
        max_messages: 7,
        ..read(main, 0)
    };
    let page = fresh.stream.read(keyed).await.unwrap();
    assert_eq!(page.entries.len(), 7);
    assert!(
        page.entries
            .iter()
            .all(|entry| entry.key.as_deref() == Some("key 3"))
    );
    assert_eq!(page.through, page.entries[6].offset);
    let small = Read {
        max_bytes: 1,
        ..read(main, 10)
    };
    assert_eq!(fresh.stream.read(small).await.unwrap().through, Offset(11));
    let entries = fresh
        .stream
        .fetch(main, vec![Offset(700), Offset(3), Offset(5_000)])
        .await;
    let entries = entries.unwrap();
    let found: Vec<i64> = entries.iter().map(|entry| entry.offset.0).collect();
    assert_eq!(found, [3, 700]);
    let before = fresh
        .stream
        .offset_at(main, entries[1].appended_at)
        .await
        .unwrap();
    assert_eq!(before, Offset(600), "the group of 601 to 700 has one time");
    let far = entries[1].appended_at + chrono::TimeDelta::hours(1);
    assert_eq!(
        fresh.stream.offset_at(main, far).await.unwrap(),
        Offset(1200)
    );
    for node in [node, fresh] {
        node.stop().await;
    }
}

/// A statement of the append function: it must be there as it is explained.
pub(crate) async fn explain(connection: &mut PgConnection, statement: &str) -> String {
    let lines: Vec<(String,)> = sqlx::query_as(sqlx::AssertSqlSafe(format!("explain {statement}")))
        .fetch_all(connection)
        .await
        .unwrap();
    lines.into_iter().map(|(line,)| line + "\n").collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn hot_statements_go_by_the_index_whatever_the_size_of_the_log() {
    let db = support::database().await;
    let node = node(&db).await;
    for n in 0..5 {
        let batch = (0..100)
            .map(|i| message("a", &format!("{n}-{i}"), "1"))
            .collect();
        node.publish(batch, true).await.unwrap();
    }
    let mut reader = postroad::store::stream::connect_reader(&db.database)
        .await
        .unwrap();
    for (statement, condition) in [
        (
            "select m.\"offset\", m.appended_at from postroad_broker.message m \
             where m.stream_id = 1 and m.\"offset\" >= 450 order by m.\"offset\" desc limit 1",
            "Index Cond: ((stream_id = 1) AND (\"offset\" >= 450))",
        ),
        (
            "select m.\"offset\", m.topic_id, m.key_hash, octet_length(m.data), m.priority from postroad_broker.message m \
             where m.stream_id = 1 and m.\"offset\" > 120 and m.\"offset\" <= 180 and m.topic_id = any ('{1}') \
             order by m.\"offset\" limit 100",
            "Index Cond: ((stream_id = 1) AND (\"offset\" > 120) AND (\"offset\" <= 180))",
        ),
        (
            "select appended_at from postroad_broker.message where stream_id = 1 and \"offset\" = 77",
            "Index Cond: ((stream_id = 1) AND (\"offset\" = 77))",
        ),
    ] {
        let plan = explain(&mut reader, statement).await;
        assert!(plan.contains(condition), "{plan}");
        assert!(
            !plan.contains("Seq Scan") && !plan.contains("Sort"),
            "{plan}"
        );
    }
    // The look-up of ids, under the settings of the append function.
    let mut session = db.connect().await;
    session
        .execute("set enable_seqscan = off; set enable_hashjoin = off; set enable_mergejoin = off")
        .await
        .unwrap();
    let lookup = "select u.place, i.\"offset\" from unnest(array[gen_random_uuid()], array[gen_random_uuid()]) \
         with ordinality as u (identity, content, place) \
         join postroad_broker.recent_id i on i.identity = u.identity";
    let plan = explain(&mut session, lookup).await;
    assert!(
        plan.contains("Index Cond: (identity = ") && !plan.contains("Seq Scan"),
        "{plan}"
    );
    session.close().await.unwrap();
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_another_node_filled_is_extended() {
    let db = support::database().await;
    // Nobody makes leaves ahead.
    let options = Options {
        wait: Duration::from_secs(5),
        maintenance: Duration::from_secs(3_600),
        ..quick()
    };
    let node = node_with(&db.database, "http://one", options).await;
    node.publish(vec![message("a", "1", "1")], true)
        .await
        .unwrap();
    let filled = db
        .connect()
        .await
        .execute(
            "insert into postroad_broker.message (stream_id, \"offset\", topic_id, appended_at, id, source, data_kind, data)
            select m.stream_id, n, m.topic_id, m.appended_at, m.id, m.source, m.data_kind, m.data
            from postroad_broker.message m, generate_series(2, 100) n",
        )
        .await
        .unwrap();
    assert_eq!(filled.rows_affected(), 99);
    let placed = node.publish(vec![message("a", "2", "2")], true).await;
    assert_eq!(offsets(&placed.unwrap()), [101]);
    node.stop().await;
}
