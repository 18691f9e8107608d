//! Whoever looks at locks keeps nobody from renewing theirs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{LONG, NOT_AT_ALL, Node, execute};
use crate::support;

const READERS: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_lists_do_not_hold_up_renewals() {
    let database = support::database().await;
    // Lists that take their time: many locks, and many who wait for each.
    execute(
        &database.url,
        "insert into postroad_broker.user_lock (name, owner, token, acquired_at, expires_at) \
            select 'lock-' || n, 'somebody', n, now(), now() + interval '1 hour' from generate_series(1, 1000) n; \
         insert into postroad_broker.user_lock_waiter (name, owner, expires_at) \
            select 'lock-' || n, 'waiter-' || w, now() + interval '1 hour' \
            from generate_series(1, 1000) n, generate_series(1, 100) w",
    )
    .await;
    let node = Arc::new(Node::start(&database.url));
    let held = node.acquire("me", LONG, NOT_AT_ALL).await.unwrap();
    let began = Instant::now();
    assert_eq!(node.locks.list(None, 1_000).await.unwrap().len(), 1_000);
    let list = began.elapsed();
    let is_over = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..READERS)
        .map(|_| {
            let (node, is_over) = (Arc::clone(&node), Arc::clone(&is_over));
            tokio::spawn(async move {
                while !is_over.load(Ordering::Relaxed) {
                    node.locks.list(None, 1_000).await.unwrap();
                }
            })
        })
        .collect();
    let mut renewals = Vec::new();
    for _ in 0..15 {
        let began = Instant::now();
        node.renew("me", held.token, LONG).await.unwrap();
        renewals.push(began.elapsed());
    }
    is_over.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.await.unwrap();
    }
    renewals.sort_unstable();
    // Behind the readers each would wait for several lists.
    assert!(renewals[7] < list, "{renewals:?} beside lists of {list:?}");
    Arc::into_inner(node).unwrap().stop().await;
}
