//! Messages of an outbox that come later, under what the main job promises: held and prepared transactions, an origin and a broker
//! that go back in time. All are due at one instant, so they enter the stream in the order of their acceptance, which is that of
//! the outbox, and the judge may ask for the order of each key.

use std::collections::HashSet;
use std::time::Duration;

use postroad::relay::Status;
use postroad::store::{self, Database};
use sqlx::PgConnection;

use super::{Logged, Origin, Rig, Verdict, connect, execute, judge, read_log, rig, shop};
use crate::support::{self, clock};

/// How long the producers of the race work, in seconds.
fn seconds() -> u64 {
    let set = std::env::var("POSTROAD_TEST_RACE_SECONDS").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(4)
}

async fn work(origin: &Origin, milliseconds: u64) {
    let producers = shop::Producers::start(origin, 4, "select 1");
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    producers.finish().await;
}

/// Waits until all that committed is in the stream.
async fn come(broker_url: &str, committed: &HashSet<String>) -> Vec<Logged> {
    support::eventually("all that committed to come", || async {
        let log = read_log(broker_url).await;
        (judge(committed, &log).lost == 0).then_some(log)
    })
    .await
}

async fn count_waiting(broker: &mut PgConnection) -> i64 {
    let text = "select count(*) from postroad_broker.scheduled_message where cancelled_at is null";
    let counting = sqlx::query_scalar(text).fetch_one(broker);
    counting.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_comes_once_and_in_order_beside_held_and_prepared_transactions() {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let rig = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    rig.caught_up("shop").await;
    // Half of them wait, half are due when they are accepted.
    let origin = shop::later(&origin, &format!("{} milliseconds", seconds() * 500)).await;
    let mut prepared = origin.producer().await;
    execute(&mut prepared, "begin").await;
    let layout = origin.layout;
    shop::note_in(layout, &mut prepared).await.unwrap();
    execute(&mut prepared, "prepare transaction 'held'").await;
    let mut held = origin.producer().await;
    execute(&mut held, "begin").await;
    shop::note_in(layout, &mut held).await.unwrap();
    let mut writing = broker.connect().await;
    execute(
        &mut writing,
        "create table t (n int); begin; insert into t values (1)",
    )
    .await;
    let mut readers = Vec::new();
    for (url, tables) in [
        (&origin.url, &["postroad.outbox", "ledger"][..]),
        (
            &broker.url,
            &[
                "postroad_broker.scheduled_message",
                "postroad_broker.scheduled_publication",
                "postroad_broker.message",
            ],
        ),
    ] {
        let mut reader = connect(url).await;
        execute(&mut reader, "begin isolation level repeatable read").await;
        for table in tables {
            execute(&mut reader, &format!("select count(*) from {table}")).await;
        }
        readers.push(reader);
    }

    let producers = shop::Producers::start(&origin, 8, "select 1");
    tokio::time::sleep(Duration::from_secs(seconds())).await;
    producers.finish().await;
    rig.caught_up("shop").await;
    let committed = shop::committed(&origin).await;
    let log = come(&broker.url, &committed).await;
    assert_eq!(judge(&committed, &log), Verdict::default());
    let mut owner = broker.connect().await;
    let waited = count_waiting(&mut owner).await as usize;
    println!("{} messages, {waited} of them waited", log.len());
    assert!(waited > 50 && waited + 50 < log.len());
    let due_at: String = sqlx::query_scalar("select at::text from due")
        .fetch_one(&mut origin.owner().await)
        .await
        .unwrap();
    let early: i64 = sqlx::query_scalar(
        "select count(*) from postroad_broker.message where appended_at < $1::timestamptz",
    )
    .bind(&due_at)
    .fetch_one(&mut owner)
    .await
    .unwrap();
    assert_eq!(early, 0, "none comes before it is due");

    // Committed long after their time: they come at once, behind the others.
    execute(&mut held, "commit").await;
    execute(&mut origin.producer().await, "commit prepared 'held'").await;
    rig.caught_up("shop").await;
    let after = read_log(&broker.url).await;
    let committed = shop::committed(&origin).await;
    assert_eq!(judge(&committed, &after), Verdict::default());
    assert_eq!(
        (after.len(), &after[..log.len()]),
        (log.len() + 2, &log[..])
    );
    assert_eq!(count_waiting(&mut owner).await as usize, waited);
    for reader in readers.iter_mut().chain([&mut writing]) {
        execute(reader, "commit").await;
    }
    rig.stop().await;
}

/// Waits for a re-relay, and for what was committed in this life of the origin. What is due was before, or is now.
async fn assert_exact(
    (rig, broker_url): (&Rig, &str),
    (origin, forgotten): (&Origin, &HashSet<String>),
    rerelay_count: u64,
) -> Status {
    let status = rig.caught_up("shop").await;
    assert_eq!(status.rerelay_count, rerelay_count, "{status:?}");
    let committed = shop::committed(origin).await;
    let log = come(broker_url, &committed).await;
    let all: HashSet<String> = committed.union(forgotten).cloned().collect();
    let verdict = judge(&committed, &log);
    let phantom = judge(&all, &log).phantom;
    println!("{} messages, {verdict:?}", log.len());
    assert_eq!((verdict.twice, verdict.disordered, phantom), (0, 0, 0));
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_put_back_accepts_nothing_twice_that_waits_was_published_or_cancelled() {
    let mut server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let origin = shop::later(&origin, "1 hour").await;
    let broker = support::database().await;
    clock::settable(&broker.url).await;
    let rig = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    shop::note_in(origin.layout, &mut origin.producer().await)
        .await
        .unwrap();
    work(&origin, 400).await;
    rig.caught_up("shop").await;
    // One is cancelled: it must not come, and not be accepted again.
    let mut owner = broker.connect().await;
    let cancelled: (String, String) = sqlx::query_as(
        "select m.id, c.status from postroad_broker.scheduled_message m,
            lateral postroad_broker.cancel_scheduled(m.stream_id, m.due_at, m.number) c
        where m.key is null limit 1",
    )
    .fetch_one(&mut owner)
    .await
    .unwrap();
    assert_eq!(cancelled.1, "cancelled");
    let ledger = "delete from ledger where id = $1";
    let struck = sqlx::query(ledger).bind(&cancelled.0);
    struck.execute(&mut origin.owner().await).await.unwrap();

    let copy = server.copy_data().await;
    work(&origin, 400).await;
    rig.caught_up("shop").await;
    let mut forgotten = shop::committed(&origin).await;
    server.put_back(&copy).await;
    work(&origin, 300).await;
    let status = rig.caught_up("shop").await;
    assert_eq!(status.rerelay_count, 1, "{status:?}");
    assert!(read_log(&broker.url).await.is_empty(), "none is due");
    let now = shop::committed(&origin).await;
    let accepted = forgotten.union(&now).count();
    assert_eq!(count_waiting(&mut owner).await as usize, accepted);
    clock::set(&broker.url, "61 minutes").await;
    assert_exact((&rig, &broker.url), (&origin, &forgotten), 1).await;

    // The same with what has been published meanwhile.
    let copy = server.copy_data().await;
    work(&origin, 300).await;
    rig.caught_up("shop").await;
    forgotten.extend(shop::committed(&origin).await);
    server.put_back(&copy).await;
    work(&origin, 300).await;
    assert_exact((&rig, &broker.url), (&origin, &forgotten), 2).await;
    let log = read_log(&broker.url).await;
    assert!(log.iter().all(|message| message.id != cancelled.0));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_put_back_accepts_again_what_it_lacks_and_the_outbox_has() {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let origin = shop::later(&origin, "1 hour").await;
    let origins = [("shop", Some(origin.relay_url()))];
    let origins = origins
        .each_ref()
        .map(|(name, url)| (*name, url.as_deref()));
    let mut brokers = support::cluster().await;
    let url = brokers.create_database("broker").await;
    let database = Database::new(&url, 10).unwrap();
    store::migrate::broker(&database).await.unwrap();
    store::migrate::origin(&database).await.unwrap();
    clock::settable(&url).await;

    let first = rig(&database, &origins).await;
    work(&origin, 400).await;
    first.caught_up("shop").await;
    first.stop().await;
    let copy = brokers.copy_data().await;
    // Accepted and published after the backup: what waited in it too.
    let second = rig(&database, &origins).await;
    work(&origin, 400).await;
    second.caught_up("shop").await;
    clock::set(&url, "61 minutes").await;
    let none = HashSet::new();
    assert_exact((&second, &url), (&origin, &none), 0).await;
    let published = read_log(&url).await;
    second.stop().await;

    brokers.put_back(&copy).await;
    let third = rig(&database, &origins).await;
    work(&origin, 300).await;
    let status = third.caught_up("shop").await;
    assert_eq!(status.gap_count, Some(0), "{status:?}");
    assert!(read_log(&url).await.is_empty(), "none is due by this clock");
    clock::set(&url, "61 minutes").await;
    let rerelays = status.rerelay_count;
    assert_exact((&third, &url), (&origin, &none), rerelays).await;
    let log = read_log(&url).await;
    assert!(log.len() > published.len());
    third.stop().await;
    database.close().await;
}
