//! The race that such schedules lose messages in: due at the very moment at which they are accepted, by many writers at once; and
//! who cancels what is being published.

use std::collections::HashSet;
use std::sync::Arc;

use chrono::TimeDelta;
use postroad::stream::Cancelled;

use super::{due, node, node_with, quick};
use crate::support;

/// A size from the environment, or the everyday one.
fn size(variable: &str, everyday: usize) -> usize {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(everyday)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_as_it_is_accepted_comes_once() {
    const WRITERS: usize = 16;
    let db = support::database().await;
    let nodes = [
        Arc::new(node(&db).await),
        Arc::new(node_with(&db.database, "http://two", quick()).await),
    ];
    let main = nodes[0].main().await;
    let each = size("POSTROAD_TEST_DUE_RACE", 8_000) / WRITERS;
    let writers = (0..WRITERS).map(|writer| {
        let node = Arc::clone(&nodes[writer % 2]);
        tokio::spawn(async move {
            let (mut at_once, mut later) = (0, 0);
            for n in 0..each {
                // From 20 ms ago to 20 ms ahead, unevenly.
                let ahead = (n * 7_919 + writer * 104_729) % 40_001;
                let at = node.cluster.now() + TimeDelta::microseconds(ahead as i64 - 20_000);
                let placed = node
                    .publish(vec![due(&format!("{writer}-{n}"), at)], true)
                    .await
                    .unwrap();
                match placed[0].scheduled {
                    Some(_) => later += 1,
                    None => at_once += 1,
                }
            }
            (at_once, later)
        })
    });
    let (mut at_once, mut later) = (0, 0);
    for writer in writers.collect::<Vec<_>>() {
        let (own_at_once, own_later) = writer.await.unwrap();
        at_once += own_at_once;
        later += own_later;
    }
    let count = each * WRITERS;
    let ids = nodes[0].ids(main, count as i64).await;
    let unique: HashSet<&String> = ids.iter().collect();
    println!(
        "{at_once} at once, {later} scheduled: {} in the stream",
        ids.len()
    );
    assert_eq!((ids.len(), unique.len()), (count, count), "0 lost, 0 twice");
    assert!(at_once > 0 && later > 0, "both ways were gone");
    assert!(nodes[1].waiting().await.is_empty());
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_races_with_publishing_has_one_outcome() {
    let db = support::database().await;
    let node = Arc::new(node(&db).await);
    let main = node.main().await;
    let count = size("POSTROAD_TEST_DUE_CANCELS", 400);
    let mut cancels = Vec::new();
    let mut at_once = Vec::new();
    for n in 0..count {
        let at = node.cluster.now() + TimeDelta::milliseconds(30);
        let placed = node.publish(vec![due(&n.to_string(), at)], true).await;
        let placed = placed.unwrap()[0];
        // The machine was busy, and it is there already.
        let Some(id) = placed.scheduled else {
            at_once.push((placed.offset.0, n.to_string()));
            continue;
        };
        let node = Arc::clone(&node);
        cancels.push(tokio::spawn(async move {
            let wait = id.due_at - node.cluster.now()
                + TimeDelta::microseconds(n as i64 % 8 * 500 - 1_000);
            tokio::time::sleep(wait.to_std().unwrap_or_default()).await;
            (n, id, node.stream.cancel_scheduled(id).await.unwrap())
        }));
    }
    let mut published = at_once;
    let mut cancelled = HashSet::new();
    for cancel in cancels {
        let (n, id, outcome) = cancel.await.unwrap();
        match outcome {
            Cancelled::Cancelled => {
                cancelled.insert(n.to_string());
            }
            Cancelled::AlreadyPublished { offset } => published.push((offset.0, n.to_string())),
            Cancelled::Unknown => panic!("{id}"),
        }
        // The same again, however often.
        assert_eq!(node.stream.cancel_scheduled(id).await.unwrap(), outcome);
    }
    published.sort();
    let ids = node.ids(main, published.len() as i64).await;
    println!(
        "{} published, {} cancelled",
        published.len(),
        cancelled.len()
    );
    let said: Vec<&String> = published.iter().map(|(_, id)| id).collect();
    assert_eq!(
        ids.iter().collect::<Vec<_>>(),
        said,
        "each where it was said to be"
    );
    assert!(
        published
            .iter()
            .map(|(offset, _)| *offset)
            .eq(1..=published.len() as i64)
    );
    assert!(ids.iter().all(|id| !cancelled.contains(id)));
    assert_eq!(published.len() + cancelled.len(), count);
    node.stop().await;
}
