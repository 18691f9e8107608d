//! Who owns a topic, and what retention drops.

use std::time::Duration;

use postroad::domain::id::Offset;
use postroad::domain::name::StreamName;
use postroad::stream::{Declared, Error, Retention};

use super::{message, node, node_with, offsets, quick, read, settings};
use crate::support::{self, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn streams_own_their_topics_from_the_answer_of_the_declare_on() {
    let db = support::database().await;
    let one = node(&db).await;
    let two = node_with(&db.database, "http://two", quick()).await;
    let main = one.main().await;
    let before = two
        .publish(vec![message("orders.created", "1", "1")], true)
        .await
        .unwrap();
    assert_eq!((before[0].stream, before[0].offset), (main, Offset(1)));
    let name = StreamName::parse("orders").unwrap();
    let wanted = settings(&["orders.>"], Retention::default());
    let (description, declared) = one
        .stream
        .declare(name.clone(), wanted.clone())
        .await
        .unwrap();
    assert_eq!(declared, Declared::Created);
    assert_eq!(
        one.stream.declare(name.clone(), wanted).await.unwrap().1,
        Declared::Unchanged
    );
    // The other node routed by the old catalogue so far.
    let after = two
        .publish(
            vec![
                message("orders.created", "2", "1"),
                message("carts", "2", "1"),
            ],
            true,
        )
        .await
        .unwrap();
    assert_eq!(
        (after[0].stream, after[0].offset),
        (description.id, Offset(1))
    );
    assert_eq!((after[1].stream, after[1].offset), (main, Offset(2)));
    let overlap = one
        .stream
        .declare(
            StreamName::parse("other").unwrap(),
            settings(&["*.created"], Retention::default()),
        )
        .await;
    assert!(matches!(overlap, Err(Error::Overlap { other_stream, .. }) if other_stream == name));
    let main_patterns = settings(&["x"], Retention::default());
    assert!(matches!(
        one.stream.declare(StreamName::main(), main_patterns).await,
        Err(Error::Settings(_))
    ));
    assert!(matches!(
        one.stream.delete(&StreamName::main(), false).await,
        Err(Error::MainIsKept)
    ));
    one.stream.delete(&name, false).await.unwrap();
    assert!(matches!(
        one.stream.describe(&name).await,
        Err(Error::NotFound { .. })
    ));
    let back = two
        .publish(vec![message("orders.created", "3", "1")], true)
        .await
        .unwrap();
    assert_eq!((back[0].stream, back[0].offset), (main, Offset(3)));
    let pool = db.pool(1);
    let log = format!("postroad_broker.message_{}", description.id);
    eventually("the deleted stream's log is dropped", async || {
        let (there,): (bool,) = sqlx::query_as("select to_regclass($1) is not null")
            .bind(&log)
            .fetch_one(&pool)
            .await
            .unwrap();
        (!there).then_some(())
    })
    .await;
    for node in [one, two] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_drops_all_and_offsets_go_on() {
    let db = support::database().await;
    let node = node(&db).await;
    let name = StreamName::parse("short").unwrap();
    let retention = Retention {
        settled: Some(Duration::from_secs(1)),
        unsettled: None,
        ..Retention::default()
    };
    let (description, _) = node
        .stream
        .declare(name.clone(), settings(&["short"], retention))
        .await
        .unwrap();
    // What a relay warns of.
    for (seconds, expected) in [(1, &[][..]), (2, std::slice::from_ref(&name))] {
        let short = node.stream.kept_for_less(Duration::from_secs(seconds));
        assert_eq!(short.await.unwrap(), expected);
    }
    let batch = |from: i64| (from..from + 250).map(|n| message("short", &n.to_string(), "1"));
    node.publish(batch(0).collect(), false).await.unwrap();
    let mut tail = node.stream.tail(description.id);
    // Not settled by every queue: kept.
    node.stream.set_watermark(description.id, Offset(120));
    let first = eventually("the settled leaf is emptied", async || {
        let first = node.stream.describe(&name).await.unwrap().first_offset;
        (first > Offset(1)).then_some(first)
    })
    .await;
    assert_eq!(first, Offset(101));
    node.stream.set_watermark(description.id, Offset(i64::MAX));
    eventually("all is dropped", async || {
        let description = node.stream.describe(&name).await.unwrap();
        (description.first_offset == Offset(251) && description.last_offset == Offset(250))
            .then_some(())
    })
    .await;
    let placed = node
        .publish(vec![message("short", "last", "1")], false)
        .await
        .unwrap();
    assert_eq!(offsets(&placed), [251]);
    while tail.recv().await.unwrap().last < Offset(251) {}
    node.stop().await;
    // Another process finds the same, whatever it has in memory.
    let node = node_with(&db.database, "http://two", quick()).await;
    let page = node.stream.read(read(description.id, 0)).await.unwrap();
    assert_eq!(page.through, Offset(251).max(page.through));
    let placed = node
        .publish(vec![message("short", "next", "1")], false)
        .await
        .unwrap();
    assert_eq!(offsets(&placed), [252]);
    node.stop().await;
}

/// Messages of 30 kB that do not compress.
fn large(topic: &str, ids: std::ops::Range<usize>) -> Vec<postroad::domain::message::Message> {
    ids.map(|id| {
        let noise: String = (0..850)
            .map(|_| uuid::Uuid::new_v4().simple().to_string())
            .collect();
        message(topic, &format!("{id}"), &format!("\"{noise}\""))
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_by_bytes_keeps_so_much_and_not_much_more() {
    const LIMIT: u64 = 4 << 20;
    let db = support::database().await;
    let node = node(&db).await;
    let unlimited = Retention {
        settled: None,
        unsettled: None,
        ..Retention::default()
    };
    let settled = Retention {
        settled_bytes: Some(LIMIT),
        ..unlimited
    };
    let hard = Retention {
        unsettled_bytes: Some(LIMIT),
        ..unlimited
    };
    // Nothing is settled in any of the three, until it is.
    let mut ids = Vec::new();
    for (name, retention) in [("settled", settled), ("hard", hard), ("all", unlimited)] {
        let stream = StreamName::parse(name).unwrap();
        let declared = settings(&[name], retention);
        let (description, _) = node.stream.declare(stream, declared).await.unwrap();
        assert_eq!(description.retention, retention);
        node.stream.set_watermark(description.id, Offset(0));
        ids.push(description.id);
        for first in (0..400).step_by(40) {
            let batch = large(name, first..first + 40);
            node.publish(batch, false).await.unwrap();
        }
    }
    let described = async |name: &str| {
        let name = StreamName::parse(name).unwrap();
        node.stream.describe(&name).await.unwrap()
    };
    let is_cut = async |name: &str| {
        let stream = described(name).await;
        assert_eq!(stream.last_offset, Offset(400));
        assert!(stream.message_bytes >= LIMIT, "{stream:?}");
        (stream.message_bytes < 2 * LIMIT).then_some(stream)
    };
    let hard = eventually("the hard limit drops messages", async || {
        is_cut("hard").await
    })
    .await;
    assert!(hard.first_offset > Offset(100), "{hard:?}");
    assert!(hard.unsettled_limit_used.unwrap() > 0.9, "{hard:?}");
    assert_eq!(described("settled").await.first_offset, Offset(1));
    node.stream.set_watermark(ids[0], Offset(i64::MAX));
    let settled = eventually("what is settled goes", async || is_cut("settled").await).await;
    assert_eq!(settled.unsettled_limit_used, None);
    assert_eq!(described("all").await.first_offset, Offset(1));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hard_limit_is_warned_of_from_half_on() {
    let db = support::database().await;
    let node = node(&db).await;
    let name = StreamName::parse("short").unwrap();
    let retention = Retention {
        settled: Some(Duration::from_secs(1)),
        unsettled: Some(Duration::from_secs(6)),
        ..Retention::default()
    };
    let declared = settings(&["short"], retention);
    let (stream, _) = node.stream.declare(name.clone(), declared).await.unwrap();
    node.stream.set_watermark(stream.id, Offset(0));
    let batch = vec![message("short", "1", "1")];
    node.publish(batch, false).await.unwrap();
    let seen = std::sync::Mutex::new(Vec::new());
    eventually("the message to be dropped", async || {
        let stream = node.stream.describe(&name).await.unwrap();
        seen.lock().unwrap().extend(stream.unsettled_limit_used);
        (stream.first_offset == Offset(2)).then_some(())
    })
    .await;
    let seen = seen.into_inner().unwrap();
    let most = seen.iter().copied().fold(0.0, f64::max);
    assert!(most > 0.5, "{seen:?}");
    eventually("nothing to be near the limit", async || {
        let stream = node.stream.describe(&name).await.unwrap();
        (stream.unsettled_limit_used == Some(0.0)).then_some(())
    })
    .await;
    node.stop().await;
}
