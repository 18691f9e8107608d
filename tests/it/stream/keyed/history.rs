//! Histories and lists of keys, over folds and retention.

use std::time::Duration;

use postroad::domain::id::Offset;
use postroad::stream::{KeyRead, Read, Retention, Settings, key_hash};
use sqlx::Executor as _;

use super::super::read;
use super::{conflict, declare, folded, keyed, name, node, of, others, places, quick};
use crate::stream::node_with;
use crate::support::{self, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_history_is_read_in_order_and_in_pages_from_folded_and_open_leaves() {
    let db = support::database().await;
    let node = node(&db).await;
    let stream = declare(&node).await;
    // 350 messages, every seventh of one key.
    for n in 0..350_usize {
        let id = n.to_string();
        let key = if n % 7 == 0 { "k" } else { id.as_str() };
        node.publish(vec![of(key, &id, None)], false).await.unwrap();
    }
    folded(&db, 300).await;
    let all: Vec<i64> = (0..350).step_by(7).map(|n| n + 1).collect();
    let whole = node.key("k").await;
    assert_eq!((whole.version, places(&whole)), (50, all.clone()));
    assert_eq!(whole.next_after, None);
    let (mut seen, mut after) = (Vec::new(), 0);
    loop {
        let page = node.key_after("k", after, 8).await;
        assert_eq!(page.version, 50);
        seen.extend(places(&page));
        let Some(next) = page.next_after else { break };
        assert_eq!(page.entries.len(), 8);
        after = next.0;
    }
    assert_eq!(seen, all);
    // By bytes a page has one message at least.
    let read_key = KeyRead {
        stream,
        key: "k".to_owned(),
        after: Offset(0),
        last_only: false,
        max_messages: 10,
        max_bytes: 1,
    };
    let one = node.stream.read_key(read_key.clone()).await.unwrap();
    assert_eq!((places(&one), one.next_after), (vec![1], Some(Offset(1))));
    let last = KeyRead {
        last_only: true,
        ..read_key
    };
    let last = node.stream.read_key(last).await.unwrap();
    assert_eq!((places(&last), last.next_after), (vec![344], None));
    let nobody = node.key("nobody").await;
    assert_eq!((nobody.version, nobody.last_offset), (0, None));
    // The replay by key finds the same.
    let replay = |after, max_messages| Read {
        key: Some("k".to_owned()),
        max_messages,
        ..read(stream, after)
    };
    let fresh = node_with(&db.database, "http://fresh", quick()).await;
    let page = fresh.stream.read(replay(0, 1_000)).await.unwrap();
    let found: Vec<i64> = page.entries.iter().map(|entry| entry.offset.0).collect();
    assert_eq!((found, page.through), (all.clone(), Offset(350)));
    let page = fresh.stream.read(replay(8, 3)).await.unwrap();
    let found: Vec<i64> = page.entries.iter().map(|entry| entry.offset.0).collect();
    assert_eq!((found, page.through), (all[2..5].to_vec(), Offset(all[4])));
    for node in [node, fresh] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_listed_once_each_with_their_last_message() {
    let db = support::database().await;
    let node = node(&db).await;
    declare(&node).await;
    for round in 0..3_usize {
        let batch = (0..90)
            .map(|n| of(&format!("key-{n:03}"), &format!("{round}-{n}"), None))
            .collect();
        node.publish(batch, false).await.unwrap();
    }
    let only_open = of("open", "open", None);
    node.publish(vec![of("key-005", "again", None), only_open], false)
        .await
        .unwrap();
    folded(&db, 200).await;
    let mut seen = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = node.keys(after.as_deref(), 20).await;
        assert!(page.keys.len() <= 20);
        seen.extend(page.keys);
        after = page.next_after;
        if after.is_none() {
            break;
        }
    }
    let names: Vec<&str> = seen.iter().map(|key| key.key.as_str()).collect();
    let mut expected: Vec<String> = (0..90).map(|n| format!("key-{n:03}")).collect();
    expected.push("open".to_owned());
    assert_eq!(names, expected);
    for (n, key) in seen.iter().enumerate() {
        let (version, last) = match n {
            5 => (4, 271),
            90 => (1, 272),
            n => (3, 181 + n as i64),
        };
        assert_eq!((key.version, key.last_offset.0), (version, last), "{key:?}");
        let entry = key.entry.as_ref().unwrap();
        assert_eq!(entry.offset.0, last);
        assert_eq!(entry.key.as_deref(), Some(key.key.as_str()));
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_keys_of_one_hash_have_two_histories_and_two_versions() {
    const TWINS: [&str; 2] = ["k27406", "3ZLhmnVd"];
    assert_eq!(key_hash(TWINS[0]), key_hash(TWINS[1]));
    let db = support::database().await;
    let node = node(&db).await;
    let stream = declare(&node).await;
    let [one, other] = TWINS;
    let publish = |messages| node.publish(messages, true);
    publish(vec![of(one, "1", Some(0)), of(other, "2", Some(0))])
        .await
        .unwrap();
    publish(vec![of(one, "3", Some(1))]).await.unwrap();
    assert_eq!(conflict(publish(vec![of(other, "4", Some(2))]).await).2, 1);
    let check = async |ones: &[i64], others: &[i64]| {
        for (key, places_of) in [(one, ones), (other, others)] {
            let page = node.key(key).await;
            assert_eq!(
                (page.version, places(&page).as_slice()),
                (places_of.len() as i64, places_of)
            );
            let replay = Read {
                key: Some(key.to_owned()),
                ..read(stream, 0)
            };
            let found = node.stream.read(replay).await.unwrap().entries;
            let found: Vec<i64> = found.iter().map(|entry| entry.offset.0).collect();
            assert_eq!(found, places_of);
        }
    };
    check(&[1, 3], &[2]).await;
    publish(others(0..200)).await.unwrap();
    folded(&db, 200).await;
    check(&[1, 3], &[2]).await;
    publish(vec![of(other, "5", Some(1)), of(one, "6", Some(2))])
        .await
        .unwrap();
    check(&[1, 3, 205], &[2, 204]).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_takes_messages_and_leaves_versions() {
    let db = support::database().await;
    let node = node(&db).await;
    let settings = Settings {
        retention: Retention {
            settled: Some(Duration::from_secs(1)),
            unsettled: None,
            ..Retention::default()
        },
        ..keyed(&["accounts.>"])
    };
    let (stream, _) = node.stream.declare(name(), settings).await.unwrap();
    node.publish(vec![of("k", "1", Some(0)), of("gone", "2", Some(0))], true)
        .await
        .unwrap();
    node.publish(others(0..150), true).await.unwrap();
    node.publish(vec![of("k", "3", Some(1))], true)
        .await
        .unwrap();
    // One leaf is full and the other is being filled: both go.
    node.stream.set_watermark(stream.id, Offset(i64::MAX));
    eventually("all is dropped", async || {
        let stream = node.stream.describe(&name()).await.unwrap();
        (stream.first_offset == Offset(154)).then_some(())
    })
    .await;
    let page = node.key("k").await;
    assert_eq!((page.version, page.last_offset), (2, Some(Offset(153))));
    assert_eq!((page.first_offset, places(&page)), (Offset(154), vec![]));
    assert_eq!(page.next_after, None);
    let listed = node.keys(Some("gom"), 1).await;
    let [key] = &listed.keys[..] else {
        panic!("{listed:?}")
    };
    assert_eq!(
        (key.key.as_str(), key.version, key.last_offset.0),
        ("gone", 1, 2)
    );
    assert_eq!(key.entry, None);
    assert_eq!(
        conflict(node.publish(vec![of("k", "4", Some(0))], true).await).2,
        2
    );
    node.publish(vec![of("k", "4", Some(2))], true)
        .await
        .unwrap();
    node.stop().await;
    // Nothing of it was only in memory.
    let node = node_with(&db.database, "http://two", quick()).await;
    node.publish(vec![of("k", "5", Some(3)), of("gone", "6", Some(1))], true)
        .await
        .unwrap();
    let page = node.key("k").await;
    assert_eq!((page.version, page.last_offset), (4, Some(Offset(155))));
    node.stream.delete(&name(), false).await.unwrap();
    let pool = db.pool(1);
    eventually(
        "the heads of a deleted stream go with its log",
        async || {
            let (there,): (bool,) = sqlx::query_as("select to_regclass($1) is not null")
                .bind(format!("postroad_broker.key_head_{}", stream.id))
                .fetch_one(&pool)
                .await
                .unwrap();
            (!there).then_some(())
        },
    )
    .await;
    node.stop().await;
}

/// The plan of one of the store's statements under a reader's settings, its parameters written in.
async fn plan(reader: &mut sqlx::PgConnection, statement: &str, parameters: &[&str]) -> String {
    let mut text = statement.to_owned();
    for (number, parameter) in parameters.iter().enumerate().rev() {
        text = text.replace(&format!("${}", number + 1), parameter);
    }
    let text = format!("explain {}", text.trim_start_matches(|c| c != '\n'));
    let rows: Vec<(String,)> = sqlx::query_as(sqlx::AssertSqlSafe(text))
        .fetch_all(reader)
        .await
        .unwrap();
    let lines: Vec<String> = rows.into_iter().map(|(line,)| line).collect();
    lines.join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn no_statement_of_keys_scans_whatever_the_size() {
    let db = support::database().await;
    let node = node(&db).await;
    let stream = declare(&node).await;
    for part in 0..4 {
        let first = part * 250;
        node.publish(others(first..first + 250), false)
            .await
            .unwrap();
    }
    folded(&db, 900).await;
    let mut reader = postroad::store::stream::connect_reader(&db.database)
        .await
        .unwrap();
    let id = stream.0.to_string();
    let hash = key_hash("other 7").to_string();
    let (id, hash) = (id.as_str(), hash.as_str());
    let key = "'other 7'";
    let checks: [(&str, &[&str], &str); 4] = [
        (
            include_str!("../../../../src/store/sql/read_key_slice.sql"),
            &[id, hash, key, "0", "900", "100"],
            "_by_key",
        ),
        (
            include_str!("../../../../src/store/sql/find_key_head.sql"),
            &[id, key],
            "Index Cond: ((stream_id = ",
        ),
        (
            include_str!("../../../../src/store/sql/list_key_heads.sql"),
            &[id, key, "100"],
            "Index Cond: ((stream_id = ",
        ),
        (
            include_str!("../../../../src/store/sql/read_keys.sql"),
            &[id, "910", "930"],
            "Index Cond: ((stream_id = ",
        ),
    ];
    for (statement, parameters, condition) in checks {
        let plan = plan(&mut reader, statement, parameters).await;
        assert!(plan.contains(condition), "{plan}");
        // The head of the one stream is a table of a row per stream.
        let scans = plan.replace("Seq Scan on stream_head", "");
        assert!(
            !scans.contains("Seq Scan") && !scans.contains("Sort"),
            "{plan}"
        );
        assert!(!scans.contains("_pkey") || condition != "_by_key", "{plan}");
    }
    // Under the settings of the append function.
    let mut session = db.connect().await;
    session
        .execute("set enable_seqscan = off; set enable_hashjoin = off; set enable_mergejoin = off")
        .await
        .unwrap();
    let heads = "\nselect h.version from unnest(array[1, 1], array['a', 'b']) with ordinality as k (stream, key, place) \
         left join postroad_broker.key_head h on h.stream_id = (array[$1])[k.stream] and h.key = k.key order by k.place";
    let heads = plan(&mut session, heads, &[id]).await;
    assert!(heads.contains("Index Cond: ((stream_id = "), "{heads}");
    assert!(!heads.contains("Seq Scan"), "{heads}");
    let between = "\nselect m.key, count(*) from postroad_broker.message m where m.stream_id = $1 and m.\"offset\" > 900 \
         and m.\"offset\" < 950 and m.key = any ('{a,b}') group by m.key";
    let between = plan(&mut session, between, &[id]).await;
    assert!(
        between.contains("(\"offset\" > 900) AND (\"offset\" < 950)")
            && !between.contains("Seq Scan"),
        "{between}"
    );
    node.stop().await;
}
