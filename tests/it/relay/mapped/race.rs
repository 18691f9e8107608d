//! The race of the relay's own outbox, over mapped tables: hot keys, rollbacks, savepoints, late committers, a prepared
//! transaction, transactions held open, a reader that pins the horizon.

use std::time::Duration;

use super::{Kind, assert_exact, count_rows, rig_mapped, shop};
use crate::relay::{connect, execute};
use crate::support;

fn seconds() -> u64 {
    let set = std::env::var("POSTROAD_TEST_RACE_SECONDS").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(4)
}

async fn race(kind: Kind) {
    let server = support::cluster().await;
    let origin = kind.install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let other = server.create_database("other").await;
    let broker = support::database().await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    rig.caught_up(kind.name()).await;

    let mut prepared = origin.producer().await;
    execute(&mut prepared, "begin").await;
    shop::note_in(origin.layout, &mut prepared).await.unwrap();
    execute(&mut prepared, "prepare transaction 'held'").await;
    let mut held = origin.producer().await;
    execute(&mut held, "begin").await;
    shop::note_in(origin.layout, &mut held).await.unwrap();
    let mut elsewhere = connect(&other).await;
    execute(
        &mut elsewhere,
        "create table t (n int); begin; insert into t values (1)",
    )
    .await;
    let mut reader = origin.owner().await;
    execute(
        &mut reader,
        "begin isolation level repeatable read; select count(*) from ledger",
    )
    .await;

    let producers = shop::Producers::start(&origin, 8, "select 1");
    tokio::time::sleep(Duration::from_secs(seconds())).await;
    producers.finish().await;
    rig.caught_up(kind.name()).await;
    // All but what the open transactions hold back.
    let before = assert_exact(kind, &origin, &broker.url).await;
    assert!(before > 100, "{before}");
    for connection in [&mut held, &mut elsewhere, &mut reader] {
        execute(connection, "commit").await;
    }
    execute(&mut prepared, "commit prepared 'held'").await;
    let status = rig.caught_up(kind.name()).await;
    let after = assert_exact(kind, &origin, &broker.url).await;
    assert_eq!(after, before + 2);
    assert_eq!(status.relayed_count as usize, after);
    assert_eq!((status.rerelay_count, status.lag_rows), (0, 0));
    println!("{} steps", status.step_count);
    let left = count_rows(kind, &origin).await as usize;
    let kept = if kind == Kind::DebeziumSnapshot {
        after
    } else {
        0
    };
    assert_eq!(left, kept);
    rig.stop().await;

    // A second life goes on where the first one was.
    let mut producer = origin.producer().await;
    shop::sell_in(origin.layout, &mut producer, 1)
        .await
        .unwrap();
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let status = rig.caught_up(kind.name()).await;
    assert_eq!(status.rerelay_count, 0);
    assert_eq!(assert_exact(kind, &origin, &broker.url).await, after + 1);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn debeziums_table_by_snapshot() {
    race(Kind::DebeziumSnapshot).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn debeziums_table_by_deletion() {
    race(Kind::DebeziumDelete).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_numbers_by_deletion() {
    race(Kind::NumberedDelete).await;
}
