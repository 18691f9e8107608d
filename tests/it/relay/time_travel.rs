//! What makes a stored snapshot lie: a data folder copied and put back, a standby that lacked the end and was promoted, a URL that
//! points at a standby, an outbox dumped and restored into a younger cluster. Each with nothing lost and nothing twice.

use std::collections::HashSet;
use std::time::Duration;

use postroad::relay::State;

use super::{Origin, Verdict, execute, judge, read_log, rig, shop};
use crate::support;

async fn work(origin: &Origin, milliseconds: u64) {
    let producers = shop::Producers::start(origin, 4, "select 1");
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    producers.finish().await;
}

/// Nothing lost and nothing twice. What the origin has forgotten, and the streams have, is no phantom.
fn assert_exact(
    committed: &HashSet<String>,
    forgotten: &HashSet<String>,
    url_log: &[super::Logged],
) {
    let verdict = judge(committed, url_log);
    let all: HashSet<String> = committed.union(forgotten).cloned().collect();
    let phantom = judge(&all, url_log).phantom;
    println!("{} messages, {verdict:?}", url_log.len());
    assert_eq!(
        (verdict.lost, verdict.twice, verdict.disordered, phantom),
        (0, 0, 0, 0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_copied_and_put_back() {
    let mut server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let rig = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    work(&origin, 500).await;
    rig.caught_up("shop").await;

    let copy = server.copy_data().await;
    // A life that will not have been: relayed, then forgotten by the origin.
    work(&origin, 500).await;
    rig.caught_up("shop").await;
    let forgotten = shop::committed(&origin).await;
    assert_eq!(
        judge(&forgotten, &read_log(&broker.url).await),
        Verdict::default()
    );

    server.put_back(&copy).await;
    // In the new life the same transaction ids and numbers are handed out again, below the stored snapshot's.
    work(&origin, 300).await;
    let status = rig.caught_up("shop").await;
    assert_eq!(status.rerelay_count, 1, "{status:?}");
    let committed = shop::committed(&origin).await;
    assert_exact(&committed, &forgotten, &read_log(&broker.url).await);
    work(&origin, 300).await;
    rig.caught_up("shop").await;
    let committed = shop::committed(&origin).await;
    assert_exact(&committed, &forgotten, &read_log(&broker.url).await);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_refused_until_it_is_promoted_and_then_the_end_that_it_lacked_is_no_loss() {
    let mut primary = support::cluster().await;
    let origin = Origin::install(&primary.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let mut standby = support::standby_of(&mut primary).await;
    let promoted = Origin {
        url: standby.url("shop"),
        ..origin.clone()
    };

    // The URL points at the standby from the start: refused, with a state that says so.
    let (at_primary, at_standby) = (origin.relay_url(), promoted.relay_url());
    let misled = rig(&broker.database, &[("shop", Some(&at_standby))]).await;
    misled
        .until("shop", "the standby to be refused", |status| {
            status.state == State::Standby
        })
        .await;
    misled.stop().await;

    let first = rig(&broker.database, &[("shop", Some(&at_primary))]).await;
    work(&origin, 500).await;
    first.caught_up("shop").await;
    // The standby has this much and no more.
    standby.has_followed(&primary).await;
    standby.stop().await;
    work(&origin, 300).await;
    first.caught_up("shop").await;
    let forgotten = shop::committed(&origin).await;
    first.stop().await;
    primary.stop().await;

    standby.start().await;
    let second = rig(&broker.database, &[("shop", Some(&as_started(&standby)))]).await;
    second
        .until("shop", "the standby to be refused", |status| {
            status.state == State::Standby
        })
        .await;
    let promoted = Origin {
        url: standby.url("shop"),
        ..origin.clone()
    };
    execute(&mut promoted.owner().await, "select pg_promote()").await;
    work(&promoted, 300).await;
    let status = second.caught_up("shop").await;
    assert_eq!(status.rerelay_count, 1, "{status:?}");
    let committed = shop::committed(&promoted).await;
    assert_exact(&committed, &forgotten, &read_log(&broker.url).await);
    second.stop().await;
}

fn as_started(cluster: &support::Cluster) -> String {
    super::as_user(&cluster.url("shop"), "shop_relay")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_dumped_and_restored_into_a_younger_cluster() {
    let old = support::cluster().await;
    let origin = Origin::install(&old.create_database("shop").await).await;
    shop::open(&origin).await;
    // The old cluster has handed out many more transaction ids than the young one will for a while.
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        "do $$ begin for n in 1..20000 loop perform pg_current_xact_id(); commit; end loop; end $$",
    )
    .await;
    let broker = support::database().await;
    let first = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    work(&origin, 400).await;
    first.caught_up("shop").await;
    first.stop().await;
    // Committed, dumped, and never relayed from there.
    work(&origin, 200).await;
    let forgotten = HashSet::new();

    let young = support::cluster().await;
    let url = young.create_database("shop").await;
    let restored = Origin {
        url: url.clone(),
        ..origin.clone()
    };
    let mut admin = restored.owner().await;
    execute(
        &mut admin,
        // As the dump has them.
        &format!(
            "create role {0}; create role {1};
            create role shop_relay login in role {1}; create role shop_producer login in role {0}",
            support::role("producer", &origin.url),
            support::role("relay", &origin.url),
        ),
    )
    .await;
    young.load_dump(&[&origin.url], "shop");

    let second = rig(&broker.database, &[("shop", Some(&restored.relay_url()))]).await;
    let status = second.caught_up("shop").await;
    assert_eq!(status.rerelay_count, 1, "{status:?}");
    let committed = shop::committed(&restored).await;
    assert_exact(&committed, &forgotten, &read_log(&broker.url).await);
    work(&restored, 300).await;
    second.caught_up("shop").await;
    let committed = shop::committed(&restored).await;
    assert_exact(&committed, &forgotten, &read_log(&broker.url).await);
    assert_eq!(second.status("shop").rerelay_count, 1);
    second.stop().await;
}
