//! Mapped tables in another server than before: a standby that lacked the end and was promoted, a dump loaded into a younger
//! cluster, with and without what stands beside the table.

use std::collections::HashSet;
use std::time::Duration;

use postroad::relay::State;
use postroad::store::Database;
use postroad::store::mapped::install;

use super::{Kind, assert_is, create_roles, rig_mapped, shop};
use crate::relay::{Origin, Rig, execute, read_log};
use crate::support::{self, TestDatabase};

async fn work(origin: &Origin, milliseconds: u64) {
    let producers = shop::Producers::start(origin, 4, "select 1");
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    producers.finish().await;
}

/// Relays all that is committed, and stops.
async fn relay(broker: &TestDatabase, kind: Kind, origin: &Origin) {
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    rig.caught_up(kind.name()).await;
    rig.stop().await;
}

/// The table was read again once, and all of it is in the stream, once.
async fn assert_read_again(
    (rig, broker): (&Rig, &TestDatabase),
    (kind, origin): (Kind, &Origin),
    forgotten: &HashSet<String>,
) {
    let status = rig.caught_up(kind.name()).await;
    assert_eq!(status.rerelay_count, 1, "{status:?}");
    let committed = shop::committed(origin).await;
    assert_is(kind, &committed, forgotten, &read_log(&broker.url).await);
}

async fn promote(kind: Kind) {
    let mut primary = support::cluster().await;
    let origin = kind.install(&primary.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let mut standby = support::standby_of(&mut primary).await;
    work(&origin, 300).await;
    relay(&broker, kind, &origin).await;
    // The standby has these rows, and lacks that they are relayed, and what comes after them.
    work(&origin, 300).await;
    standby.has_followed(&primary).await;
    standby.stop().await;
    relay(&broker, kind, &origin).await;
    work(&origin, 300).await;
    relay(&broker, kind, &origin).await;
    let forgotten = shop::committed(&origin).await;
    primary.stop().await;

    standby.start().await;
    let promoted = Origin {
        url: standby.url("shop"),
        ..origin
    };
    let rig = rig_mapped(&broker.database, kind, &promoted.relay_url()).await;
    rig.until(kind.name(), "the standby to be refused", |status| {
        status.state == State::Standby
    })
    .await;
    execute(&mut promoted.owner().await, "select pg_promote()").await;
    for _ in 0..2 {
        work(&promoted, 300).await;
        assert_read_again((&rig, &broker), (kind, &promoted), &forgotten).await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_under_a_table_read_by_snapshot() {
    promote(Kind::DebeziumSnapshot).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_under_a_table_read_by_deletion() {
    promote(Kind::DebeziumDelete).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_under_a_table_with_numbers_read_by_deletion() {
    promote(Kind::NumberedDelete).await;
}

async fn dump(kind: Kind) {
    let old = support::cluster().await;
    let origin = kind.install(&old.create_database("shop").await).await;
    shop::open(&origin).await;
    // The old cluster has handed out many more transaction ids than the young one will for a while.
    let burn =
        "do $$ begin for n in 1..20000 loop perform pg_current_xact_id(); commit; end loop; end $$";
    execute(&mut origin.owner().await, burn).await;
    let broker = support::database().await;
    work(&origin, 300).await;
    relay(&broker, kind, &origin).await;
    // Committed, dumped, and relayed after that.
    work(&origin, 200).await;
    let young = support::cluster().await;
    let restored = Origin {
        url: young.create_database("shop").await,
        ..origin.clone()
    };
    let bare = Origin {
        url: young.create_database("bare").await,
        ..origin.clone()
    };
    for origin in [&restored, &bare] {
        create_roles(&mut origin.owner().await).await;
    }
    young.load_dump(&[&origin.url], "shop");
    young.load_dump(&["-N", "postroad", &origin.url], "bare");
    relay(&broker, kind, &origin).await;
    let none = HashSet::new();

    let rig = rig_mapped(&broker.database, kind, &restored.relay_url()).await;
    assert_read_again((&rig, &broker), (kind, &restored), &none).await;
    work(&restored, 300).await;
    assert_read_again((&rig, &broker), (kind, &restored), &none).await;
    let forgotten = shop::committed(&restored).await;
    rig.stop().await;

    // The table alone, without the marks: first it says what is missing.
    let rig = rig_mapped(&broker.database, kind, &bare.relay_url()).await;
    let status = rig
        .until(kind.name(), "the table to be refused", |status| {
            status.state == State::NotInstalled
        })
        .await;
    let detail = status.detail.unwrap();
    assert!(detail.contains("the tables beside it"), "{detail}");
    let database = Database::new(&bare.url, 2).unwrap();
    install::install(&database, &kind.mapping()).await.unwrap();
    database.close().await;
    for _ in 0..2 {
        work(&bare, 300).await;
        assert_read_again((&rig, &broker), (kind, &bare), &forgotten).await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_a_table_read_by_snapshot() {
    dump(Kind::DebeziumSnapshot).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_a_table_read_by_deletion() {
    dump(Kind::DebeziumDelete).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_a_table_with_numbers_read_by_deletion() {
    dump(Kind::NumberedDelete).await;
}
