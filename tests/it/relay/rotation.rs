//! The outbox's space comes back by TRUNCATE, a grace after the position passed, and never before.

use std::time::Duration;

use postroad::{relay, store};
use sqlx::PgConnection;

use super::{Origin, execute, read_log, rig_with};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn passed_leaves_are_emptied_and_a_blocked_one_says_who_holds_it() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    let mut owner = origin.owner().await;
    let idle: i32 = sqlx::query_scalar(
        "select ((floor(extract(epoch from now()) / 300)::bigint + 4) % 8)::integer",
    )
    .fetch_one(&mut owner)
    .await
    .unwrap();
    let insert = format!(
        "insert into postroad.outbox (topic, bucket) select 'a', {idle} from generate_series(1, 100)"
    );
    execute(&mut owner, &insert).await;
    let options = relay::Options {
        grace: Duration::from_secs(2),
        ..relay::Options::default()
    };
    // Somebody has read the outbox and gone to lunch.
    let mut reader = origin.owner().await;
    execute(&mut reader, "begin; select count(*) from postroad.outbox").await;
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()")
        .fetch_one(&mut reader)
        .await
        .unwrap();
    let started = std::time::Instant::now();
    let rig = rig_with(&broker.database, &[("local", None)], options).await;
    let status = rig
        .until("local", "the leaf to be blocked", |status| {
            status.blocked.is_some()
        })
        .await;
    assert!(started.elapsed() >= Duration::from_secs(2), "the grace");
    let blocked = status.blocked.unwrap();
    assert_eq!(blocked.leaf, format!("postroad.outbox_{idle}"));
    assert_eq!(blocked.pid, Some(pid));
    execute(&mut reader, "commit").await;
    rig.until("local", "the leaf to be emptied", |status| {
        status.emptied_count == 1 && status.blocked.is_none()
    })
    .await;
    let left: i64 = sqlx::query_scalar("select count(*) from postroad.outbox")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(left, 0);
    assert_eq!(read_log(&broker.url).await.len(), 100);

    // A transaction that began long ago still writes into that leaf: what it commits is relayed, and only then may go.
    let mut late = origin.owner().await;
    execute(&mut late, "begin").await;
    execute(&mut late, &insert).await;
    rig.until("local", "the open transaction to block", |status| {
        status.blocked.is_some()
    })
    .await;
    execute(&mut late, "commit").await;
    rig.until("local", "the leaf to be emptied again", |status| {
        status.emptied_count == 2
    })
    .await;
    assert_eq!(read_log(&broker.url).await.len(), 200);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn journals_and_marks_are_folded() {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    let broker = support::database().await;
    let rig = super::rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    let mut producer = origin.producer().await;
    let mut journal = broker.connect().await;
    let mut marks = origin.owner().await;
    let insert = "insert into postroad.outbox (topic) values ('a')";
    let mut count = 0;
    let mut most = (0, 0);
    while count < 2_600 {
        execute(&mut producer, insert).await;
        let position = rig.status("shop").position;
        rig.until("shop", "the next position", |status| {
            status.position > position || status.relayed_count > count
        })
        .await;
        count += 1;
        if count % 100 == 0 {
            let lengths: (i64, i64) = (
                sqlx::query_scalar("select count(*) from postroad_broker.relay_journal")
                    .fetch_one(&mut journal)
                    .await
                    .unwrap(),
                sqlx::query_scalar("select count(*) from postroad.relay_mark")
                    .fetch_one(&mut marks)
                    .await
                    .unwrap(),
            );
            most = (most.0.max(lengths.0), most.1.max(lengths.1));
        }
    }
    rig.caught_up("shop").await;
    rig.stop().await;
    // Two turns: the second empties what the first folded.
    for _ in 0..2 {
        assert!(store::relay::fold_journal(&broker.database).await.unwrap());
    }
    let left: i64 = sqlx::query_scalar("select count(*) from postroad_broker.relay_journal")
        .fetch_one(&mut journal)
        .await
        .unwrap();
    println!("at most {most:?} rows of journal and marks, {left} at the end");
    assert_eq!(left, 0);
    // And the position is the same one.
    let rig = super::rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    execute(&mut producer, insert).await;
    let status = rig.caught_up("shop").await;
    assert_eq!(status.rerelay_count, 0);
    assert_eq!(read_log(&broker.url).await.len() as u64, count + 1);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_begins_with_a_long_journal_folds_it() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    let rig = super::rig(&broker.database, &[("local", None)]).await;
    let mut producer = origin.producer().await;
    let insert = "insert into postroad.outbox (topic) values ('a')";
    execute(&mut producer, insert).await;
    rig.caught_up("local").await;
    rig.stop().await;
    // What many short sessions leave behind.
    let mut journal = broker.connect().await;
    execute(
        &mut journal,
        "insert into postroad_broker.relay_journal (origin_id, number, epoch, position, appended_at)
        select j.origin_id, j.number + n, j.epoch, j.position, j.appended_at
        from (select * from postroad_broker.relay_journal order by number desc limit 1) as j, generate_series(1, 25000) as n",
    )
    .await;
    let rig = super::rig(&broker.database, &[("local", None)]).await;
    let length = support::eventually("the journal is folded", async || {
        let text = "select coalesce(max(number), 0) from postroad_broker.relay_checkpoint";
        let folded: i64 = sqlx::query_scalar(text)
            .fetch_one(&mut broker.connect().await)
            .await
            .unwrap();
        (folded > 25_000).then_some(folded)
    })
    .await;
    println!("folded through {length}");
    execute(&mut producer, insert).await;
    let status = rig.caught_up("local").await;
    assert_eq!(status.rerelay_count, 0);
    assert_eq!(read_log(&broker.url).await.len(), 2);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_restored_from_before_what_was_emptied_says_so_and_relays_what_is_there() {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    let relay_url = origin.relay_url();
    let origins = [("shop", Some(relay_url.as_str()))];
    let options = relay::Options {
        grace: Duration::from_secs(1),
        ..relay::Options::default()
    };
    let broker = support::database().await;
    let rig = rig_with(&broker.database, &origins, options.clone()).await;
    let mut owner = origin.owner().await;
    let insert = |id: &str, distance: i32| {
        format!(
            "insert into postroad.outbox (topic, id, bucket)
            select 'a', '{id}', ((floor(extract(epoch from now()) / 300)::bigint + {distance}) % 8)::smallint"
        )
    };
    execute(&mut owner, &insert("before", 0)).await;
    rig.caught_up("shop").await;
    let mut broker_owner = broker.connect().await;
    execute(
        &mut broker_owner,
        "create table backup_position as select * from postroad_broker.relay_journal;
        create table backup_message as select * from postroad_broker.message",
    )
    .await;
    execute(&mut owner, &insert("gone", 4)).await;
    rig.caught_up("shop").await;
    rig.until("shop", "the leaf to be emptied", |status| {
        status.emptied_count == 1
    })
    .await;
    execute(&mut owner, &insert("kept", 0)).await;
    rig.caught_up("shop").await;
    assert_eq!(rig.status("shop").gap_count, Some(0));
    rig.stop().await;

    // As a restored backup has it. The mark of the old position is still in the origin.
    execute(
        &mut broker_owner,
        "truncate postroad_broker.relay_journal, postroad_broker.relay_history, postroad_broker.relay_checkpoint;
        insert into postroad_broker.relay_journal select * from backup_position;
        delete from postroad_broker.message;
        insert into postroad_broker.message select * from backup_message",
    )
    .await;
    let rig = rig_with(&broker.database, &origins, options.clone()).await;
    let status = rig.caught_up("shop").await;
    assert_eq!((status.gap_count, status.rerelay_count), (Some(1), 1));
    let ids: Vec<String> = read_log(&broker.url)
        .await
        .into_iter()
        .map(|logged| logged.id)
        .collect();
    assert_eq!(ids, ["before", "kept"], "what is there, and nothing twice");
    rig.stop().await;
    // It was one, whoever is asked, and whenever.
    let rig = rig_with(&broker.database, &origins, options).await;
    let status = rig.caught_up("shop").await;
    assert_eq!((status.gap_count, status.rerelay_count), (Some(1), 0));
    rig.stop().await;
}

/// The position of each origin, as a dump with this snapshot has it, and how many messages its log has.
async fn of_snapshot(connection: &mut PgConnection) -> (Option<i64>, i64) {
    sqlx::query_as(
        "select (select max(p.number) from (
                select number from postroad_broker.relay_checkpoint
                union all select number from postroad_broker.relay_journal) p),
            (select count(*) from postroad_broker.message)",
    )
    .fetch_one(connection)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_older_than_folds_has_a_position_that_belongs_to_its_log() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    let rig = super::rig(&broker.database, &[("local", None)]).await;
    let mut producer = origin.producer().await;
    let insert = "insert into postroad.outbox (topic) values ('a')";
    for _ in 0..5 {
        execute(&mut producer, insert).await;
        rig.caught_up("local").await;
    }
    rig.stop().await;
    // A dump's snapshot; it reads the tables in its own time.
    let mut dump = broker.connect().await;
    execute(&mut dump, "begin isolation level repeatable read").await;
    let messages: i64 = sqlx::query_scalar("select count(*) from postroad_broker.message")
        .fetch_one(&mut dump)
        .await
        .unwrap();
    let mut fresh = broker.connect().await;
    let (position, _) = of_snapshot(&mut fresh).await;
    let fold = async || store::relay::fold_journal(&broker.database).await.unwrap();
    assert!(fold().await);
    // What the first fold left is needed by that snapshot: it stays, however often is folded.
    for _ in 0..3 {
        assert!(!fold().await);
    }
    assert_eq!(of_snapshot(&mut dump).await, (position, messages));
    execute(&mut dump, "commit").await;
    assert!(fold().await);
    assert_eq!(of_snapshot(&mut fresh).await, (position, messages));
    let rig = super::rig(&broker.database, &[("local", None)]).await;
    execute(&mut producer, insert).await;
    let status = rig.caught_up("local").await;
    assert_eq!(status.rerelay_count, 0);
    assert_eq!(read_log(&broker.url).await.len() as i64, messages + 1);
    rig.stop().await;
}
