//! Keyed streams: versions of keys and what expects them.

use postroad::domain::id::StreamId;
use postroad::domain::message::Message;
use postroad::domain::name::StreamName;
use postroad::stream::{AppendError, Error, Retention, Settings};

use super::{Node, message, node, offsets, settings};
use crate::support;

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

fn version(result: Result<Vec<postroad::stream::Placed>, AppendError>) -> (usize, i64, i64) {
    match result {
        Err(AppendError::VersionConflict(conflict)) => {
            (conflict.index, conflict.expected, conflict.version)
        }
        other => panic!("{other:?}"),
    }
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
        version(publish(vec![of("k", "2", Some(0))]).await),
        (0, 0, 1)
    );
    // Without an expectation a message counts all the same.
    publish(vec![of("k", "3", None), of("other", "4", None)])
        .await
        .unwrap();
    assert_eq!(
        version(publish(vec![of("k", "5", Some(1))]).await),
        (0, 1, 2)
    );
    // A batch is all or nothing, and its own messages count for those behind them.
    let batch = vec![
        of("k", "6", Some(2)),
        of("k", "7", Some(3)),
        of("x", "8", Some(1)),
    ];
    assert_eq!(version(publish(batch).await), (2, 1, 0));
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
        version(publish(vec![of("k", "2", Some(0))]).await),
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
