//! Mapped tables whose database goes back in time, and one whose broker does.

use std::collections::HashSet;
use std::time::Duration;

use super::{Kind, assert_is, rig_mapped, shop};
use crate::relay::{Origin, execute, read_log};
use crate::support;

async fn work(origin: &Origin, milliseconds: u64) {
    let producers = shop::Producers::start(origin, 4, "select 1");
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    producers.finish().await;
}

async fn put_back(kind: Kind) {
    let mut server = support::cluster().await;
    let origin = kind.install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    work(&origin, 400).await;
    rig.caught_up(kind.name()).await;

    let copy = server.copy_data().await;
    work(&origin, 400).await;
    rig.caught_up(kind.name()).await;
    let forgotten = shop::committed(&origin).await;
    assert_is(
        kind,
        &forgotten,
        &HashSet::new(),
        &read_log(&broker.url).await,
    );

    server.put_back(&copy).await;
    // The same transaction ids, and the same numbers of rows, are handed out again.
    work(&origin, 300).await;
    let status = rig.caught_up(kind.name()).await;
    assert_eq!(status.rerelay_count, 1, "{status:?}");
    let committed = shop::committed(&origin).await;
    assert_is(kind, &committed, &forgotten, &read_log(&broker.url).await);
    work(&origin, 300).await;
    let status = rig.caught_up(kind.name()).await;
    assert_eq!(status.rerelay_count, 1, "{status:?}");
    let committed = shop::committed(&origin).await;
    assert_is(kind, &committed, &forgotten, &read_log(&broker.url).await);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_put_back_under_a_table_read_by_snapshot() {
    put_back(Kind::DebeziumSnapshot).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_put_back_under_a_table_read_by_deletion() {
    put_back(Kind::DebeziumDelete).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_put_back_under_a_table_whose_numbers_come_again() {
    put_back(Kind::NumberedDelete).await;
}

/// Rows that were relayed and taken out are in the table again, as a restored table has them.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_come_back_with_an_old_table_are_not_relayed_again() {
    let kind = Kind::DebeziumDelete;
    let broker = support::database().await;
    let server = support::cluster().await;
    let origin = kind.install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let mut owner = origin.owner().await;
    // Before the relay looks.
    for _ in 0..5 {
        shop::sell_in(origin.layout, &mut owner, 1).await.unwrap();
    }
    execute(
        &mut owner,
        "create table backup as select * from outboxevent",
    )
    .await;
    let bad = "insert into backup values (gen_random_uuid(), 'no topic', 'k', 't', null)";
    execute(&mut owner, bad).await;
    execute(
        &mut owner,
        "insert into outboxevent select * from backup where aggregatetype = 'no topic'",
    )
    .await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let status = rig.caught_up(kind.name()).await;
    assert_eq!((status.relayed_count, status.rejected_count), (5, 1));
    rig.stop().await;
    // The marks of the backup's time are others.
    execute(
        &mut owner,
        "delete from postroad.mapped_mark; insert into outboxevent select * from backup",
    )
    .await;
    shop::sell_in(origin.layout, &mut owner, 2).await.unwrap();
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let status = rig.caught_up(kind.name()).await;
    assert_eq!(status.rerelay_count, 1);
    assert_eq!(status.rejected_count, 1, "it is listed once");
    let committed = shop::committed(&origin).await;
    assert_eq!(committed.len(), 6);
    assert_is(
        kind,
        &committed,
        &HashSet::new(),
        &read_log(&broker.url).await,
    );
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_restored_from_before_what_was_taken_out_says_so() {
    let kind = Kind::NumberedDelete;
    let server = support::cluster().await;
    let origin = kind.install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let mut producer = origin.producer().await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    shop::sell_in(origin.layout, &mut producer, 1)
        .await
        .unwrap();
    rig.caught_up(kind.name()).await;
    let mut broker_owner = broker.connect().await;
    execute(
        &mut broker_owner,
        "create table backup_position as select * from postroad_broker.relay_journal;
        create table backup_message as select * from postroad_broker.message",
    )
    .await;
    shop::sell_in(origin.layout, &mut producer, 2)
        .await
        .unwrap();
    rig.caught_up(kind.name()).await;
    rig.stop().await;
    execute(
        &mut broker_owner,
        "truncate postroad_broker.relay_journal, postroad_broker.relay_history, postroad_broker.relay_checkpoint;
        insert into postroad_broker.relay_journal select * from backup_position;
        delete from postroad_broker.message;
        insert into postroad_broker.message select * from backup_message",
    )
    .await;
    shop::sell_in(origin.layout, &mut producer, 3)
        .await
        .unwrap();
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let status = rig.caught_up(kind.name()).await;
    assert_eq!(status.gap_count, Some(1));
    let keys: Vec<_> = read_log(&broker.url)
        .await
        .into_iter()
        .map(|m| m.key.unwrap())
        .collect();
    assert_eq!(keys, ["k1", "k3"], "what is there, and nothing twice");
    rig.stop().await;
    // It was one, whoever is asked, and whenever.
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let status = rig.caught_up(kind.name()).await;
    assert_eq!((status.gap_count, status.rerelay_count), (Some(1), 0));
    assert!(status.gap_at.is_some());
    rig.stop().await;
}
