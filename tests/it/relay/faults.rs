//! Origins that go away: stopped and started, a backend killed under load so that unflushed transaction ids are handed out
//! again, producers that commit asynchronously.

use std::time::Duration;

use postroad::relay::State;

use super::{Origin, Verdict, connect, execute, judge, read_log, rig, shop};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_is_down_is_retried_and_the_others_go_on() {
    let mut first_server = support::cluster().await;
    let first = Origin::install(&first_server.create_database("first").await).await;
    let second_server = support::cluster().await;
    let second = Origin::install(&second_server.create_database("second").await).await;
    let broker = support::database().await;
    let local = Origin::install(&broker.url).await;
    for origin in [&first, &second, &local] {
        shop::open(origin).await;
    }
    let (first_url, second_url) = (first.relay_url(), second.relay_url());
    let rig = rig(
        &broker.database,
        &[
            ("first", Some(&first_url)),
            ("local", None),
            ("second", Some(&second_url)),
        ],
    )
    .await;
    let producers = [&first, &second, &local].map(|o| shop::Producers::start(o, 2, "select 1"));
    for name in ["first", "second", "local"] {
        rig.caught_up(name).await;
    }
    first_server.stop().await;
    let down = rig
        .until("first", "the origin to be down", |status| {
            status.state == State::Unreachable
        })
        .await;
    assert!(down.detail.is_some());
    for name in ["second", "local"] {
        rig.caught_up(name).await;
        assert_eq!(rig.status(name).state, State::Running);
    }
    first_server.start().await;
    rig.caught_up("first").await;
    for producers in producers {
        producers.finish().await;
    }
    let mut committed = std::collections::HashSet::new();
    for (name, origin) in [("first", &first), ("second", &second), ("local", &local)] {
        rig.caught_up(name).await;
        committed.extend(shop::committed(origin).await);
    }
    // The keys of the three shops have the same names: order is judged by the other tests.
    let verdict = judge(&committed, &read_log(&broker.url).await);
    assert_eq!((verdict.lost, verdict.twice, verdict.phantom), (0, 0, 0));
    rig.stop().await;
}

/// Kills of a backend. 30 is the figure that is promised; the run of every day takes fewer.
fn kills() -> u32 {
    let set = std::env::var("POSTROAD_TEST_KILLS").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(5)
}

async fn kill_backends_under_load(settings: &'static str) {
    let server = support::cluster_with(&[("wal_writer_delay", "10s")]).await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let rig = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    let producers = shop::Producers::start(&origin, 6, settings);
    let mut again = 0;
    for _ in 0..kills() {
        rig.caught_up("shop").await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        // The last ids handed out are of transactions that leave nothing in the log.
        let mut owner = connect(&origin.url).await;
        execute(
            &mut owner,
            "do $$ begin for n in 1..500 loop perform pg_current_xact_id(); rollback; end loop; end $$",
        )
        .await;
        let (pid, last): (i32, i64) = sqlx::query_as(
            "select pg_backend_pid(), pg_snapshot_xmax(pg_current_snapshot())::text::bigint",
        )
        .fetch_one(&mut owner)
        .await
        .unwrap();
        // One backend that dies so makes the server end all the others and recover. Until it has heard of it, it goes on.
        let mut other = Some(connect(&origin.url).await);
        support::send_signal(pid, rustix::process::Signal::KILL);
        drop(owner);
        while let Some(connection) = &mut other {
            let asked = sqlx::query("select 1").execute(connection).await;
            if asked.is_err() {
                other = None;
            }
        }
        let first: i64 = support::eventually("the server to recover", || async {
            let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(&origin.url)
                .await
                .ok()?;
            // Where the ids went on: the checkpoint at the end of the recovery has it.
            sqlx::query_scalar(
                "select split_part(next_xid, ':', 2)::bigint from pg_control_checkpoint()",
            )
            .fetch_one(&mut connection)
            .await
            .ok()
        })
        .await;
        again += i32::from(first < last);
    }
    producers.finish().await;
    rig.caught_up("shop").await;
    let committed = shop::committed(&origin).await;
    let relayed = read_log(&broker.url).await;
    let verdict = judge(&committed, &relayed);
    println!(
        "{} kills, ids handed out again after {again}, {} messages: {verdict:?}",
        kills(),
        relayed.len()
    );
    assert_eq!(verdict, Verdict::default());
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_killed_under_load_with_rollbacks_loses_nothing() {
    kill_backends_under_load("select 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_does_it_with_producers_that_commit_asynchronously() {
    kill_backends_under_load("set synchronous_commit = off").await;
}
