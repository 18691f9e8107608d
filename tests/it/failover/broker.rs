//! A standby, synchronous and asynchronous, promoted under load; an older copy of the data folder put back under running nodes; a dump
//! loaded into another server.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use super::{
    Load, beaten, check, check_held, declare, histories, history, node, shop_origin, take_held,
};
use crate::support::consumer::items;
use crate::support::{self, Cluster, Consumer, Proxy};

async fn execute(url: &str, text: &str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(text.to_owned()))
        .execute(&mut connection)
        .await
        .unwrap();
}

async fn work(milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}

/// Promotes the standby and has the broker's address lead to it.
async fn fail_over(proxy: &Proxy, standby: &Cluster) {
    let url = standby.url("broker");
    execute(&url, "select pg_promote()").await;
    proxy.lead_to(&url);
    proxy.open();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_standby_that_is_promoted_under_load_loses_nothing_answered() {
    let mut primary = support::cluster().await;
    let url = primary.create_database("broker").await;
    let (_server, origin) = shop_origin().await;
    let proxy = support::proxy(&url).await;
    let through = proxy.url(&url);
    let nodes = [node(&through, &origin).await, node(&through, &origin).await];
    let consumers = declare(&nodes[0].http).await;
    let load = Load::start(&nodes[1].http, &origin, &consumers);
    let standby = support::backup_of(&primary).await;
    execute(
        &primary.url("postgres"),
        "alter system set synchronous_standby_names = '*'; ",
    )
    .await;
    execute(&primary.url("postgres"), "select pg_reload_conf()").await;
    support::eventually("the standby to be synchronous", || async {
        let mut there = PgConnection::connect(&primary.url("postgres")).await.ok()?;
        let states = "select count(*) from pg_stat_replication where sync_state = 'sync'";
        let count: i64 = sqlx::query_scalar(states)
            .fetch_one(&mut there)
            .await
            .ok()?;
        (count == 1).then_some(())
    })
    .await;
    let taken = take_held(&nodes[0].http, "kept", 40).await;
    work(1_000).await;
    // Whatever was answered is there; what was under way may be or not.
    proxy.cut();
    primary.stop().await;
    fail_over(&proxy, &standby).await;
    let first_offset = history(&nodes[0].http, 2).await;
    assert_eq!(history(&nodes[1].http, 2).await, first_offset);
    work(1_000).await;
    let outcome = load
        .finish(&nodes[1].http, &standby.url("broker"), &origin)
        .await;
    let lost = check(&nodes[0].http, &outcome, first_offset).await;
    assert_eq!(lost, 0);
    let again: Vec<&String> = outcome.seen.iter().flat_map(|seen| &seen.again).collect();
    assert!(again.is_empty(), "{again:?}");
    check_held(&nodes[0].http, &taken, &[]).await;
    let acked: usize = outcome.seen.iter().map(|seen| seen.acked.len()).sum();
    eprintln!(
        "synchronous: {} answered publishes, {lost} lost; {acked} answered acks, {} delivered again",
        outcome.published.len(),
        again.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asynchronous_standby_that_is_promoted_under_load_loses_what_is_known_to_be_lost() {
    let mut primary = support::cluster().await;
    let url = primary.create_database("broker").await;
    let (_server, origin) = shop_origin().await;
    let proxy = support::proxy(&url).await;
    let through = proxy.url(&url);
    let nodes = [node(&through, &origin).await, node(&through, &origin).await];
    let consumers = declare(&nodes[0].http).await;
    let load = Load::start(&nodes[1].http, &origin, &consumers);
    let mut standby = support::backup_of(&primary).await;
    let kept = take_held(&nodes[0].http, "kept", 40).await;
    work(500).await;
    standby.has_followed(&primary).await;
    standby.stop().await;
    // Answered, handed out, settled, relayed; and then it never was.
    let gone = take_held(&nodes[0].http, "lost", 40).await;
    work(700).await;
    proxy.cut();
    primary.stop().await;
    standby.start().await;
    fail_over(&proxy, &standby).await;
    let first_offset = history(&nodes[0].http, 2).await;
    assert_eq!(history(&nodes[1].http, 2).await, first_offset);
    work(1_000).await;
    let outcome = load
        .finish(&nodes[1].http, &standby.url("broker"), &origin)
        .await;
    let lost = check(&nodes[0].http, &outcome, first_offset).await;
    assert!(lost > 0, "the standby lacked something");
    check_held(&nodes[0].http, &kept, &gone).await;
    eprintln!(
        "asynchronous: of {} answered publishes {lost} are lost, all from offset {first_offset} on; {} receipts of lost deliveries settle nothing",
        outcome.published.len(),
        gone.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_the_data_folder_is_noticed_by_nodes_that_run() {
    let mut server = support::cluster().await;
    let url = server.create_database("broker").await;
    let (_server, origin) = shop_origin().await;
    let nodes = [node(&url, &origin).await, node(&url, &origin).await];
    let consumers = declare(&nodes[0].http).await;
    let load = Load::start(&nodes[1].http, &origin, &consumers);
    let kept = take_held(&nodes[0].http, "kept", 20).await;
    work(300).await;
    // A restart of the server is no other history.
    let copy = server.copy_data().await;
    let gone = take_held(&nodes[0].http, "lost", 20).await;
    work(500).await;
    assert_eq!(histories(&nodes[0].http).await.len(), 1);
    server.put_back(&copy).await;
    let first_offset = history(&nodes[0].http, 2).await;
    assert_eq!(history(&nodes[1].http, 2).await, first_offset);
    let known = histories(&nodes[0].http).await;
    assert_eq!(known[0]["timeline"], known[1]["timeline"]);
    work(500).await;
    let outcome = load.finish(&nodes[1].http, &url, &origin).await;
    let lost = check(&nodes[0].http, &outcome, first_offset).await;
    assert!(lost > 0);
    check_held(&nodes[0].http, &kept, &gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_in_another_server_is_another_history() {
    let old = support::cluster().await;
    let url = old.create_database("broker").await;
    let (_server, origin) = shop_origin().await;
    let proxy = support::proxy(&url).await;
    let node = node(&proxy.url(&url), &origin).await;
    let consumers = declare(&node.http).await;
    let load = Load::start(&node.http, &origin, &consumers);
    let kept = take_held(&node.http, "kept", 20).await;
    let young = support::cluster().await;
    let restored = young.create_database("broker").await;
    young.load_dump(&["--no-owner", "--no-privileges", &url], "broker");
    let gone = take_held(&node.http, "lost", 20).await;
    work(500).await;
    proxy.lead_to(&restored);
    proxy.cut_once();
    let first_offset = history(&node.http, 2).await;
    // A copy in another server is told from the original, which may still run: a person says that it does not.
    let owned = postroad::store::Database::new(&origin.url, 1).unwrap();
    let released = postroad::store::origin::claim::release(&owned, None).await;
    assert!(released.unwrap().is_some());
    owned.close().await;
    work(500).await;
    let outcome = load.finish(&node.http, &restored, &origin).await;
    let lost = check(&node.http, &outcome, first_offset).await;
    assert!(lost > 0);
    check_held(&node.http, &kept, &gone).await;
}

/// As when a restore was begun once more: the copy is in the first history, which is not the one that the nodes are in by then.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_copy_put_back_twice_is_another_history_each_time() {
    let mut server = support::cluster().await;
    let url = server.create_database("broker").await;
    let (_server, origin) = shop_origin().await;
    let nodes = [node(&url, &origin).await, node(&url, &origin).await];
    declare(&nodes[0].http).await;
    let http = &nodes[0].http;
    let kept = take_held(http, "kept", 10).await;
    let copy = server.copy_data().await;
    let gone = take_held(http, "lost", 20).await;
    let mut others = Vec::new();
    let mut began_at = json!(null);
    for time in 0..2 {
        for node in &nodes {
            beaten(&node.http).await;
        }
        server.put_back(&copy).await;
        for node in &nodes {
            support::eventually("another history", || async {
                let known = histories(&node.http).await;
                (known.len() == 2 && known[1]["began_at"] != began_at).then_some(())
            })
            .await;
        }
        let known = histories(http).await;
        assert_eq!(known[1]["first_offsets"]["main"], 11);
        began_at = known[1]["began_at"].clone();
        // Others, where the lost ones were.
        others.push(take_held(http, &format!("other-{time}"), 25).await);
    }
    let held = Consumer {
        http: http.clone(),
        queue: "held".to_owned(),
    };
    let acks = |deliveries: &[Value]| items(deliveries, &json!({}));
    held.settle_all("ack", &acks(&gone), "gone").await;
    // What they were made with is lost as well.
    held.settle_all("ack", &acks(&others[0]), "unknown").await;
    held.settle_all("ack", &acks(&kept), "acked").await;
    assert_eq!(held.status().await["in_flight"], 25);
}
