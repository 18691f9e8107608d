//! Keyed streams: versions of keys, what expects them, and the keys' histories.

mod faults;
mod history;
mod race;

use postroad::domain::id::{Offset, StreamId};
use postroad::domain::message::Message;
use postroad::domain::name::StreamName;
use postroad::stream::{
    AppendError, Error, KeyPage, KeyRead, KeysPage, KeysRead, Options, Placed, Retention, Settings,
};

use super::{Node, message, node, node_with, offsets, quick, settings};
use crate::support::{self, eventually};

fn keyed(patterns: &[&str]) -> Settings {
    Settings {
        is_keyed: true,
        ..settings(patterns, Retention::default())
    }
}

fn name() -> StreamName {
    StreamName::parse("accounts").unwrap()
}

async fn declare(node: &Node) -> StreamId {
    let declared = node.stream.declare(name(), keyed(&["accounts.>"])).await;
    declared.unwrap().0.id
}

/// A message of a key, with the version that it expects.
fn of(key: &str, id: &str, expected: Option<i64>) -> Message {
    Message {
        key: Some(key.to_owned()),
        expected_version: expected,
        ..message("accounts.a", id, "1")
    }
}

/// Messages without expectations, each of a key of its own.
fn others(ids: std::ops::Range<usize>) -> Vec<Message> {
    ids.map(|id| of(&format!("other {id}"), &format!("other {id}"), None))
        .collect()
}

/// (place, expected, found) of a conflict.
#[track_caller]
fn conflict(result: Result<Vec<Placed>, AppendError>) -> (usize, i64, i64) {
    match result {
        Err(AppendError::VersionConflict(conflict)) => {
            (conflict.index, conflict.expected, conflict.version)
        }
        other => panic!("{other:?}"),
    }
}

impl Node {
    async fn key(&self, key: &str) -> KeyPage {
        self.key_after(key, 0, 1_000).await
    }

    async fn key_after(&self, key: &str, after: i64, max_messages: usize) -> KeyPage {
        let read = KeyRead {
            stream: self.stream.describe(&name()).await.unwrap().id,
            key: key.to_owned(),
            after: Offset(after),
            last_only: false,
            max_messages,
            max_bytes: 1 << 20,
        };
        self.stream.read_key(read).await.unwrap()
    }

    async fn keys(&self, after: Option<&str>, max_keys: usize) -> KeysPage {
        let read = KeysRead {
            stream: self.stream.describe(&name()).await.unwrap().id,
            after: after.map(str::to_owned),
            max_keys,
            max_bytes: 1 << 20,
        };
        self.stream.read_keys(read).await.unwrap()
    }
}

fn places(page: &KeyPage) -> Vec<i64> {
    page.entries.iter().map(|entry| entry.offset.0).collect()
}

/// Waits until the keys are folded up to an offset, or beyond.
async fn folded(db: &support::TestDatabase, through: i64) {
    let pool = db.pool(1);
    eventually("the keys are folded", async || {
        let (at,): (Option<i64>,) =
            sqlx::query_as("select max(keys_through) from postroad_broker.stream_head")
                .fetch_one(&pool)
                .await
                .unwrap();
        at.is_some_and(|at| at >= through).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_expects_a_version_goes_in_at_that_version_only() {
    let db = support::database().await;
    let node = node(&db).await;
    declare(&node).await;
    let publish = |messages| node.publish(messages, true);
    let first = publish(vec![of("k", "1", Some(0))]).await.unwrap();
    assert_eq!(offsets(&first), [1]);
    assert_eq!(
        conflict(publish(vec![of("k", "2", Some(0))]).await),
        (0, 0, 1)
    );
    // Without an expectation a message counts all the same.
    publish(vec![of("k", "3", None), of("other", "4", None)])
        .await
        .unwrap();
    assert_eq!(
        conflict(publish(vec![of("k", "5", Some(1))]).await),
        (0, 1, 2)
    );
    // A batch is all or nothing, and its own messages count for those behind them.
    let batch = vec![
        of("k", "6", Some(2)),
        of("k", "7", Some(3)),
        of("x", "8", Some(1)),
    ];
    assert_eq!(conflict(publish(batch).await), (2, 1, 0));
    let batch = vec![
        of("k", "6", Some(2)),
        of("k", "7", Some(3)),
        of("x", "8", Some(0)),
    ];
    assert_eq!(offsets(&publish(batch).await.unwrap()), [4, 5, 6]);
    // A repeat is a duplicate, whatever the version is by now; one that did not get in may be sent again.
    let again = publish(vec![of("k", "1", Some(0))]).await.unwrap();
    assert!(again[0].duplicate);
    assert_eq!(offsets(&again), [1]);
    assert_eq!(
        conflict(publish(vec![of("k", "2", Some(0))]).await),
        (0, 0, 4)
    );
    let second = publish(vec![of("k", "2", Some(4))]).await.unwrap();
    assert_eq!(offsets(&second), [7]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_keyed_has_no_versions_and_one_with_messages_stays_as_it_is() {
    let db = support::database().await;
    let node = node(&db).await;
    let stray = Message {
        key: Some("k".to_owned()),
        expected_version: Some(0),
        ..message("stray", "1", "1")
    };
    let refused = node.publish(vec![stray], true).await;
    let Err(AppendError::NotKeyed { items }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(items, [(0, node.main().await)]);
    let plain = settings(&["accounts.>"], Retention::default());
    // As long as it is empty, either way.
    declare(&node).await;
    node.stream.declare(name(), plain.clone()).await.unwrap();
    declare(&node).await;
    node.publish(vec![of("k", "1", Some(0))], true)
        .await
        .unwrap();
    let changed = node.stream.declare(name(), plain).await;
    assert!(
        matches!(changed, Err(Error::KeyedIsFixed { .. })),
        "{changed:?}"
    );
    node.publish(vec![message("stray", "2", "1")], true)
        .await
        .unwrap();
    let main = node.stream.declare(StreamName::main(), keyed(&[])).await;
    assert!(matches!(main, Err(Error::KeyedIsFixed { .. })), "{main:?}");
    assert!(node.stream.describe(&name()).await.unwrap().is_keyed);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_hold_over_folds_restarts_and_with_an_open_leaf() {
    let db = support::database().await;
    let one = node(&db).await;
    declare(&one).await;
    one.publish(vec![of("k", "1", Some(0))], true)
        .await
        .unwrap();
    // Leaves have 100 offsets: two and a half of them, and the key in each.
    one.publish(others(0..120), true).await.unwrap();
    one.publish(vec![of("k", "2", Some(1))], true)
        .await
        .unwrap();
    one.publish(others(200..330), true).await.unwrap();
    folded(&db, 200).await;
    one.publish(vec![of("k", "3", Some(2))], true)
        .await
        .unwrap();
    assert_eq!(
        conflict(one.publish(vec![of("k", "x", Some(2))], true).await).2,
        3
    );
    one.stop().await;
    // Another process has nothing in memory: a part is folded, the rest in the open leaf.
    let two = node_with(&db.database, "http://two", quick()).await;
    assert_eq!(
        conflict(two.publish(vec![of("k", "y", Some(9))], true).await).2,
        3
    );
    two.publish(vec![of("k", "4", Some(3))], true)
        .await
        .unwrap();
    let page = two.key("k").await;
    assert_eq!((page.version, places(&page)), (4, vec![1, 122, 253, 254]));
    assert_eq!(
        (page.last_offset, page.next_after),
        (Some(Offset(254)), None)
    );
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_behind_another_finds_the_version_all_the_same() {
    let db = support::database().await;
    let busy = node_with(&db.database, "http://busy", quick()).await;
    declare(&busy).await;
    // It hears of nothing by itself, and never folds.
    let options = Options {
        poll: std::time::Duration::from_secs(3_600),
        maintenance: std::time::Duration::from_secs(3_600),
        leaf_offsets: 100_000,
        ..Options::default()
    };
    let idle = node_with(&db.database, "http://idle", options).await;
    idle.cluster.release("duty/streams");
    idle.publish(vec![of("k", "1", Some(0))], true)
        .await
        .unwrap();
    // A little: the append itself looks at what it does not know. The node's leaves are large, so nothing of this is folded.
    busy.publish(vec![of("k", "2", Some(1)), of("l", "3", None)], true)
        .await
        .unwrap();
    assert_eq!(
        conflict(idle.publish(vec![of("k", "x", Some(1))], true).await).2,
        2
    );
    idle.publish(vec![of("k", "4", Some(2)), of("l", "5", Some(1))], true)
        .await
        .unwrap();
    // Much: the node reads it first.
    for part in 0..6 {
        let first = part * 2_000;
        busy.publish(others(first..first + 2_000), false)
            .await
            .unwrap();
    }
    busy.publish(vec![of("k", "6", Some(3))], true)
        .await
        .unwrap();
    idle.publish(vec![of("k", "7", Some(4))], true)
        .await
        .unwrap();
    assert_eq!(
        conflict(idle.publish(vec![of("k", "y", Some(4))], true).await).2,
        5
    );
    // Folds that it did not see: the base that it counted from is another.
    let last = idle.key("k").await.last_offset.unwrap().0;
    let end: (i64,) = sqlx::query_as(
        "select last_offset from postroad_broker.message_leaf l where first_offset <= $1 and last_offset >= $1 \
         and stream_id = (select id from postroad_broker.stream where name = 'accounts')",
    )
    .bind(last)
    .fetch_one(&db.pool(1))
    .await
    .unwrap();
    let mut at = last;
    while at <= end.0 {
        let count = usize::try_from((end.0 + 1 - at).min(5_000)).unwrap();
        busy.publish(others(0..count), false).await.unwrap();
        at += count as i64;
    }
    folded(&db, end.0).await;
    idle.publish(vec![of("k", "8", Some(5))], true)
        .await
        .unwrap();
    assert_eq!(idle.key("k").await.version, 6);
    assert_eq!(busy.key("k").await.version, 6);
    for node in [busy, idle] {
        node.stop().await;
    }
}
