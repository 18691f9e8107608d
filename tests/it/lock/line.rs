//! Who holds a lock, who asks again, and who comes next.

use std::time::Duration;

use postroad::lock::Error;

use super::{LONG, NOT_AT_ALL, Node, execute, let_expire, name, refused};
use crate::support;

const WAIT: Duration = Duration::from_secs(45);

#[tokio::test]
async fn who_asks_again_gets_what_it_has() {
    let database = support::database().await;
    let node = Node::start(&database.url);
    assert!(matches!(
        node.locks.describe(&name()).await,
        Err(Error::NotFound { .. })
    ));
    let first = node.acquire("a", LONG, NOT_AT_ALL).await.unwrap();
    let again = node.acquire("a", LONG, NOT_AT_ALL).await.unwrap();
    assert_eq!(again.token, first.token);
    assert_eq!(again.acquired_at, first.acquired_at);
    assert!(again.expires_at > first.expires_at);
    assert_eq!(
        refused(node.acquire("b", LONG, NOT_AT_ALL).await),
        (Some("a".to_owned()), 0)
    );

    let renewed = node.renew("a", first.token, LONG).await.unwrap();
    assert_eq!(renewed.token, first.token);
    for (owner, token) in [("a", first.token - 1), ("b", first.token)] {
        let lost = node.renew(owner, token, LONG).await;
        assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
    }
    // Its time is up, and nobody has had it since.
    let_expire(&database.url).await;
    let described = node.locks.describe(&name()).await.unwrap();
    assert_eq!((described.holder, described.token), (None, first.token));
    let revived = node.renew("a", first.token, LONG).await.unwrap();
    assert_eq!(revived.token, first.token);
    let_expire(&database.url).await;
    let second = node.acquire("b", LONG, NOT_AT_ALL).await.unwrap();
    assert!(second.token > first.token);
    let lost = node.renew("a", first.token, LONG).await;
    assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");

    // A release of what is held no more is done, and takes nothing from who holds it now.
    node.release(first.token).await;
    assert_eq!(
        refused(node.acquire("a", LONG, NOT_AT_ALL).await).0,
        Some("b".to_owned())
    );
    node.release(second.token).await;
    node.release(second.token).await;
    let lost = node.renew("b", second.token, LONG).await;
    assert!(matches!(lost, Err(Error::Lost { .. })), "it gave it back");
    let third = node.acquire("b", LONG, NOT_AT_ALL).await.unwrap();
    assert!(third.token > second.token);
    node.stop().await;
}

#[tokio::test]
async fn those_who_wait_get_it_in_order_whatever_node_they_asked() {
    let database = support::database().await;
    let nodes = [Node::start(&database.url), Node::start(&database.url)];
    let mut held = nodes[0].acquire("first", LONG, NOT_AT_ALL).await.unwrap();
    let owners: Vec<String> = (0..6).map(|number| format!("w{number}")).collect();
    let mut waits = Vec::new();
    for (index, owner) in owners.iter().enumerate() {
        let node = &nodes[index % 2];
        let (locks, request) = (node.locks.clone(), super::request(owner, None, LONG, WAIT));
        waits.push(tokio::spawn(async move { locks.acquire(request).await }));
        support::eventually("the next one is in line", || async {
            (node.waiting().await.len() == index + 1).then_some(())
        })
        .await;
    }
    assert_eq!(nodes[0].waiting().await, owners);
    for (index, wait) in waits.into_iter().enumerate() {
        // Each node hears of releases on the other.
        nodes[index / 2 % 2].release(held.token).await;
        let next = wait.await.unwrap().unwrap();
        assert_eq!(next.owner, owners[index]);
        assert!(next.token > held.token);
        held = next;
        assert_eq!(nodes[0].waiting().await, owners[index + 1..]);
    }
    // The last one dies with it.
    let (locks, request) = (
        nodes[1].locks.clone(),
        super::request("heir", None, LONG, WAIT),
    );
    let heir = tokio::spawn(async move { locks.acquire(request).await });
    support::eventually("the heir is in line", || async {
        (nodes[0].waiting().await == ["heir"]).then_some(())
    })
    .await;
    let_expire(&database.url).await;
    assert!(heir.await.unwrap().unwrap().token > held.token);
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test]
async fn a_place_is_kept_over_the_end_of_a_wait_and_not_for_ever() {
    let database = support::database().await;
    let node = Node::start(&database.url);
    let held = node.acquire("a", LONG, NOT_AT_ALL).await.unwrap();
    let short = Duration::from_millis(50);
    assert_eq!(
        refused(node.acquire("b", LONG, short).await),
        (Some("a".to_owned()), 0)
    );
    let keep = "update postroad_broker.user_lock_waiter set expires_at = clock_timestamp() + interval '1 hour'";
    execute(&database.url, keep).await;
    assert_eq!(refused(node.acquire("c", LONG, short).await).1, 1);
    node.release(held.token).await;
    assert_eq!(
        refused(node.acquire("d", LONG, NOT_AT_ALL).await),
        (None, 2),
        "it is free, and two come first"
    );
    let second = node.acquire("b", LONG, NOT_AT_ALL).await.unwrap();
    node.release(second.token).await;
    // The place of one who does not come back is up.
    let leave = "update postroad_broker.user_lock_waiter set expires_at = clock_timestamp()";
    execute(&database.url, leave).await;
    node.acquire("d", LONG, NOT_AT_ALL).await.unwrap();
    assert_eq!(node.waiting().await, Vec::<String>::new());
    node.stop().await;
}

#[tokio::test]
async fn rows_of_free_locks_leave_and_tokens_go_on_rising() {
    let database = support::database().await;
    let node = Node::start(&database.url);
    let held = node.acquire("a", LONG, NOT_AT_ALL).await.unwrap();
    let forget = "select postroad_broker.forget_user_locks()";
    let age = "update postroad_broker.user_lock set changed_at = changed_at - interval '2 days',
        expires_at = case when owner is null then expires_at - interval '2 days' else expires_at end";
    execute(&database.url, age).await;
    execute(&database.url, forget).await;
    assert!(node.locks.describe(&name()).await.is_ok(), "it is held");
    node.release(held.token).await;
    execute(&database.url, age).await;
    execute(&database.url, forget).await;
    assert!(matches!(
        node.locks.describe(&name()).await,
        Err(Error::NotFound { .. })
    ));
    let again = node.acquire("a", LONG, NOT_AT_ALL).await.unwrap();
    assert!(again.token > held.token);
    node.stop().await;
}
