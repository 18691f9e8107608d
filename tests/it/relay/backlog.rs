//! What waits costs the same for each row, however much waits: rows are counted by what Postgres says that it read.

use std::time::Duration;

use sqlx::PgConnection;

use super::{Logged, Origin, Rig, connect, execute, read_log, rig_with};
use crate::support;

/// The smaller of two backlogs. Millions are the figure that is meant; the run of every day takes fewer.
fn rows() -> i64 {
    let set = std::env::var("POSTROAD_TEST_BACKLOG_ROWS").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(10_000)
}

fn options() -> postroad::relay::Options {
    postroad::relay::Options {
        // Small parts, so that there are many.
        manifest_rows: (rows() as usize / 5).min(200_000),
        page_rows: 1_000,
        ..postroad::relay::Options::default()
    }
}

/// Rows of small transactions and of one large one, beside one that was open all the time.
async fn fill(origin: &Origin, count: i64) {
    let mut producer = origin.producer().await;
    let mut patient = origin.producer().await;
    execute(&mut patient, "begin").await;
    for part in 0..10 {
        execute(
            &mut patient,
            "insert into postroad.outbox (topic, payload) values ('patient', '1')",
        )
        .await;
        execute(
            &mut producer,
            &format!(
                "do $$ begin
                    for n in 1..{} loop
                        insert into postroad.outbox (topic, payload) select 'small', '1' from generate_series(1, 10);
                        commit;
                    end loop;
                end $$",
                count / 200
            ),
        )
        .await;
        if part == 5 {
            let text = "insert into postroad.outbox (topic, payload) select 'large', '1' from generate_series(1, $1)";
            let inserting = sqlx::query(text).bind(count / 2).execute(&mut producer);
            inserting.await.unwrap();
        }
    }
    execute(&mut patient, "commit").await;
}

/// Rows that statements have read from the outbox, by its index and otherwise.
async fn rows_read(owner: &mut PgConnection) -> i64 {
    // A session tells what it did when it has been idle for a second.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    sqlx::query_scalar(
        "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_user_tables
        where schemaname = 'postroad' and relname ~ '^outbox_[0-7]$'",
    )
    .fetch_one(owner)
    .await
    .unwrap()
}

async fn is_whole(origin: &Origin, broker: &str) {
    let mut owner = origin.owner().await;
    let inserted: Vec<String> = sqlx::query_scalar("select id from postroad.outbox order by seq")
        .fetch_all(&mut owner)
        .await
        .unwrap();
    let relayed: Vec<Logged> = read_log(broker).await;
    assert_eq!(relayed.len(), inserted.len());
    assert!(relayed.iter().map(|message| &message.id).eq(&inserted));
}

async fn start(
    broker: &support::TestDatabase,
    origin: &Origin,
    options: postroad::relay::Options,
) -> Rig {
    rig_with(
        &broker.database,
        &[("shop", Some(&origin.relay_url()))],
        options,
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_costs_the_same_however_many_wait_with_it() {
    let mut costs = Vec::new();
    for count in [rows(), 4 * rows()] {
        let server = support::cluster().await;
        let origin = Origin::install(&server.create_database("shop").await).await;
        let broker = support::database().await;
        let rig = start(&broker, &origin, options()).await;
        rig.caught_up("shop").await;
        rig.stop().await;
        fill(&origin, count).await;
        let mut owner = connect(&origin.url).await;
        let before = rows_read(&mut owner).await;
        let rig = start(&broker, &origin, options()).await;
        rig.caught_up("shop").await;
        rig.stop().await;
        let read = rows_read(&mut owner).await - before;
        costs.push(read as f64 / count as f64);
        is_whole(&origin, &broker.url).await;
    }
    println!("rows read per row relayed: {costs:?}");
    // Counted, found, and looked over where parts touch. Read anew for each part they were a tenth of the count.
    assert!(costs.iter().all(|cost| *cost < 8.0), "{costs:?}");
    assert!(costs[1] < costs[0] * 1.5, "{costs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_is_slow_is_asked_for_less_at_a_time() {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    let broker = support::database().await;
    let slow = postroad::relay::Options {
        manifest_rows: 200_000,
        // Nothing of the usual size comes within it.
        piece_time: Duration::from_millis(60),
        ..postroad::relay::Options::default()
    };
    let rig = start(&broker, &origin, slow.clone()).await;
    rig.caught_up("shop").await;
    rig.stop().await;
    fill(&origin, 60_000).await;
    let rig = start(&broker, &origin, slow).await;
    let status = rig.caught_up("shop").await;
    assert_eq!(status.relayed_count, 60_010);
    is_whole(&origin, &broker.url).await;
    rig.stop().await;
}

/// A person rewrites the table while its backlog is relayed: rows are elsewhere then.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_moved_meanwhile_are_found() {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    let broker = support::database().await;
    let rig = start(&broker, &origin, options()).await;
    rig.caught_up("shop").await;
    rig.stop().await;
    fill(&origin, 20_000).await;
    let mut owner = origin.owner().await;
    // So that what is left moves to other places.
    execute(
        &mut owner,
        "insert into postroad.outbox (topic) select 'gone' from generate_series(1, 10)",
    )
    .await;
    let rig = start(&broker, &origin, options()).await;
    rig.until("shop", "the middle", |status| status.relayed_count > 1_000)
        .await;
    for leaf in 0..8 {
        execute(
            &mut owner,
            &format!("cluster postroad.outbox_{leaf} using outbox_{leaf}_xid_idx"),
        )
        .await;
    }
    rig.caught_up("shop").await;
    is_whole(&origin, &broker.url).await;
    rig.stop().await;
}
