//! Tokens rise over kills, cuts and failovers of the database.

use std::time::Duration;

use super::{LONG, NOT_AT_ALL, Node};
use crate::support;

const WAIT: Duration = Duration::from_secs(40);

/// Acquires and gives back, so often. Each token is higher than the last.
async fn rise(node: &Node, mut last: i64, times: usize) -> i64 {
    for _ in 0..times {
        let held = node.acquire("a", LONG, WAIT).await.unwrap();
        assert!(held.token > last, "{} after {last}", held.token);
        last = held.token;
        node.release(last).await;
    }
    last
}

#[tokio::test]
async fn a_killed_database_keeps_who_holds_and_what_was_given() {
    let cluster = support::cluster_with(&[("fsync", "on")]).await;
    let url = cluster.create_database("broker").await;
    let database = postroad::store::Database::new(&url, 2).unwrap();
    postroad::store::migrate::broker(&database).await.unwrap();
    let node = Node::start(&url);
    let mut last = rise(&node, 0, 20).await;
    for _ in 0..3 {
        let held = node.acquire("a", LONG, NOT_AT_ALL).await.unwrap();
        assert!(held.token > last);
        cluster.kill_and_restart().await;
        // The request that finds its connection gone is repeated by the node while there is time.
        let again = node.acquire("a", LONG, WAIT).await.unwrap();
        assert_eq!(again.token, held.token, "what was answered is kept");
        node.release(held.token).await;
        last = rise(&node, held.token, 5).await;
    }
    node.stop().await;
}

#[tokio::test]
async fn a_promoted_standby_that_lacks_the_last_gives_higher_ones() {
    let mut primary = support::cluster().await;
    let url = primary.create_database("broker").await;
    let database = postroad::store::Database::new(&url, 2).unwrap();
    postroad::store::migrate::broker(&database).await.unwrap();
    let mut standby = support::standby_of(&mut primary).await;
    let node = Node::start(&primary.url("broker"));
    let known = rise(&node, 0, 10).await;
    standby.has_followed(&primary).await;
    standby.stop().await;
    let last = rise(&node, known, 100).await;
    node.stop().await;
    primary.stop().await;

    standby.start().await;
    super::execute(&standby.url("broker"), "select pg_promote()").await;
    let node = Node::start(&standby.url("broker"));
    rise(&node, last, 10).await;
    node.stop().await;
}

#[tokio::test]
async fn a_dump_in_another_server_gives_higher_ones() {
    let first = support::cluster().await;
    let url = first.create_database("broker").await;
    let database = postroad::store::Database::new(&url, 2).unwrap();
    postroad::store::migrate::broker(&database).await.unwrap();
    let node = Node::start(&url);
    rise(&node, 0, 10).await;
    let second = support::cluster().await;
    let copy = second.create_database("broker").await;
    let from = first.socket_dir().display().to_string();
    second.load_dump(&["-h", &from, "-U", "postgres", "broker"], "broker");
    // Given after the dump was made.
    let last = rise(&node, 0, 100).await;
    node.stop().await;
    let node = Node::start(&copy);
    rise(&node, last, 10).await;
    node.stop().await;
}

#[tokio::test]
async fn cut_connections_give_nobody_two_tokens_and_no_two_the_lock() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let node = Node::start(&proxy.url(&database.url));
    let direct = Node::start(&database.url);
    let mut last = 0;
    for round in 0..30 {
        // Both before and after the database has carried it out.
        let cutting = async {
            tokio::time::sleep(Duration::from_micros(300 * round)).await;
            proxy.cut_once();
        };
        let (held, ()) = tokio::join!(node.acquire("a", LONG, WAIT), cutting);
        let held = held.unwrap();
        assert!(held.token > last);
        last = held.token;
        let described = direct.locks.describe(&super::name()).await.unwrap();
        assert_eq!(described.token, held.token, "no other was given since");
        let taken = direct.acquire("b", LONG, NOT_AT_ALL).await;
        assert_eq!(super::refused(taken).0, Some("a".to_owned()));
        // A release whose outcome is not known is repeated by the caller.
        while node.locks.release(super::name(), last).await.is_err() {}
    }
    node.stop().await;
    direct.stop().await;
}
