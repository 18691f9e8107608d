//! The race that ruins such relays: concurrent producers on few hot keys, rollbacks, more savepoints than a backend lists, late
//! committers, a prepared transaction, writing transactions held open in the same and in another database.

use std::time::Duration;

use super::wrong::Wrong;
use super::{Origin, Verdict, connect, execute, judge, read_log, rig, shop};
use crate::support;

/// How long the producers work, in seconds.
fn seconds() -> u64 {
    let set = std::env::var("POSTROAD_TEST_RACE_SECONDS").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(5)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_committed_is_relayed_once_and_in_order_and_the_wrong_methods_fail() {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let other = server.create_database("other").await;
    let broker = support::database().await;
    let rig = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    rig.caught_up("shop").await;
    let wrong = Wrong::start(&origin);

    // Writing transactions held open all the while, each with a transaction id and a row; the first is prepared.
    let mut prepared = origin.producer().await;
    execute(&mut prepared, "begin").await;
    shop::note(&mut prepared).await.unwrap();
    execute(&mut prepared, "prepare transaction 'held'").await;
    let mut held = origin.producer().await;
    execute(&mut held, "begin").await;
    shop::note(&mut held).await.unwrap();
    let mut elsewhere = connect(&other).await;
    execute(
        &mut elsewhere,
        "create table t (n int); begin; insert into t values (1)",
    )
    .await;

    let producers = shop::Producers::start(&origin, 8, "select 1");
    wrong.stage(&origin).await;
    tokio::time::sleep(Duration::from_secs(seconds())).await;
    producers.finish().await;

    // All but what the open transactions hold back.
    rig.caught_up("shop").await;
    let committed = shop::committed(&origin).await;
    assert_eq!(
        judge(&committed, &read_log(&broker.url).await),
        Verdict::default(),
        "with transactions open"
    );
    execute(&mut held, "commit").await;
    execute(&mut elsewhere, "commit").await;
    let mut committer = origin.producer().await;
    execute(&mut committer, "commit prepared 'held'").await;
    wrong.stage_horizon(&origin).await;
    rig.caught_up("shop").await;
    let committed = shop::committed(&origin).await;
    let relayed = read_log(&broker.url).await;
    assert_eq!(judge(&committed, &relayed), Verdict::default());
    let status = rig.status("shop");
    println!(
        "{} messages relayed in {} steps: {:?}",
        relayed.len(),
        status.step_count,
        Verdict::default()
    );
    assert_eq!(status.relayed_count as usize, relayed.len());

    let verdicts = wrong.finish(&committed).await;
    println!("{verdicts:?}");
    assert!(verdicts.by_seq.lost > 0, "`seq > last` loses: {verdicts:?}");
    assert!(
        verdicts.by_seq_and_xmin.lost > 0,
        "the xmin filter does not save it: {verdicts:?}"
    );
    assert_eq!(verdicts.by_xid.lost, 0, "{verdicts:?}");
    assert!(
        verdicts.by_xid.disordered > 0,
        "the order of transaction ids is not the order of keys: {verdicts:?}"
    );
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_brokers_own_outbox_is_relayed_the_same_way() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    shop::open(&origin).await;
    let rig = rig(&broker.database, &[("local", None)]).await;
    let producers = shop::Producers::start(&origin, 4, "select 1");
    tokio::time::sleep(Duration::from_secs(2)).await;
    producers.finish().await;
    rig.caught_up("local").await;
    let committed = shop::committed(&origin).await;
    let relayed = read_log(&broker.url).await;
    assert_eq!(judge(&committed, &relayed), Verdict::default());
    assert!(relayed.len() > 50);
    // A second life goes on where the first one was.
    rig.stop().await;
    let mut producer = origin.producer().await;
    shop::sell(&mut producer, 1).await.unwrap();
    let rig = super::rig(&broker.database, &[("local", None)]).await;
    rig.caught_up("local").await;
    let committed = shop::committed(&origin).await;
    assert_eq!(
        judge(&committed, &read_log(&broker.url).await),
        Verdict::default()
    );
    assert_eq!(rig.status("local").rerelay_count, 0);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_idle_in_a_transaction_stops_neither_appends_nor_the_relay() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    shop::open(&origin).await;
    let rig = rig(&broker.database, &[("local", None)]).await;
    rig.caught_up("local").await;
    let mut reader = broker.connect().await;
    execute(
        &mut reader,
        "begin isolation level repeatable read;
        select count(*) from postroad.outbox; select count(*) from postroad_broker.message;
        select count(*) from postroad_broker.relay_journal; select count(*) from postroad_broker.lease",
    )
    .await;
    let producers = shop::Producers::start(&origin, 2, "select 1");
    tokio::time::sleep(Duration::from_secs(2)).await;
    producers.finish().await;
    rig.caught_up("local").await;
    let committed = shop::committed(&origin).await;
    assert_eq!(
        judge(&committed, &read_log(&broker.url).await),
        Verdict::default()
    );
    execute(&mut reader, "commit").await;
    rig.stop().await;
}
