//! Connections cut around the commit of what expects a version.

use postroad::store::Database;

use super::{conflict, declare, node_with, of, offsets, quick};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_of_unknown_outcome_gets_the_first_result() {
    let db = support::database().await;
    let proxy = support::proxy(&db.url).await;
    let database = Database::new(&proxy.url(&db.url), 2).unwrap();
    let node = node_with(&database, "http://one", quick()).await;
    declare(&node).await;
    support::cut_marked(&proxy);
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
