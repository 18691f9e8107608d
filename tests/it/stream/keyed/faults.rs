//! Connections cut around the commit of what expects a version.

use std::collections::HashSet;

use postroad::store::Database;

use super::{conflict, declare, node_with, of, offsets, quick};
use crate::support::{self, Action, Direction};

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_of_unknown_outcome_gets_the_first_result() {
    let db = support::database().await;
    let proxy = support::proxy(&db.url).await;
    let database = Database::new(&proxy.url(&db.url), 2).unwrap();
    let node = node_with(&database, "http://one", quick()).await;
    declare(&node).await;
    let mut cut = HashSet::new();
    proxy.filter(move |direction, bytes| {
        let find = |marker: &str| {
            let marker = marker.as_bytes();
            let at = bytes
                .windows(marker.len())
                .position(|window| window == marker)?;
            Some(bytes[at..at + marker.len() + 3].to_vec())
        };
        if direction == Direction::ToClient {
            return Action::Forward;
        }
        // Once each: the repeat goes through.
        match (find("before-"), find("after-")) {
            (Some(marker), _) if cut.insert(marker.clone()) => Action::CutBefore,
            (_, Some(marker)) if cut.insert(marker.clone()) => Action::CutAfter,
            _ => Action::Forward,
        }
    });
    // The ids are not checked: a second evaluation would find the key a version further, and refuse.
    for n in 0..30 {
        let kind = ["plain", "before", "after"][n % 3];
        let message = of("k", &format!("{kind}-{n:03}"), Some(n as i64));
        let placed = node.publish(vec![message], false).await.unwrap();
        assert_eq!(offsets(&placed), [n as i64 + 1]);
        let wrong = of("k", &format!("{kind}-{:03}", n + 500), Some(7_000));
        assert_eq!(
            conflict(node.publish(vec![wrong], false).await),
            (0, 7_000, n as i64 + 1)
        );
    }
    assert_eq!(node.key("k").await.version, 30);
    node.stop().await;
}
