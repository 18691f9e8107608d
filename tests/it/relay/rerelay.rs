//! A re-relay: whose messages it looks for, where, and what that costs.

use std::collections::HashSet;

use sqlx::Connection as _;

use super::{Origin, connect, execute, read_log, rig};
use crate::support;

async fn fail_over(origin: &Origin) {
    execute(&mut origin.owner().await, "truncate postroad.relay_mark").await;
}

/// Two origins number their messages themselves, and leave the source as it is.
#[tokio::test(flavor = "multi_thread")]
async fn one_origins_messages_do_not_hide_anothers() {
    let broker = support::database().await;
    let server = support::cluster().await;
    let shop = Origin::install(&server.create_database("shop").await).await;
    let ware = Origin::install(&server.create_database("ware").await).await;
    let urls = [shop.relay_url(), ware.relay_url()];
    let origins = [
        ("shop", Some(urls[0].as_str())),
        ("ware", Some(urls[1].as_str())),
    ];
    let first = rig(&broker.database, &origins).await;
    let insert = |from: i64, through: i64, topic: &str| {
        format!(
            "insert into postroad.outbox (topic, payload, id) select '{topic}', '1', 'o-' || n from generate_series({from}, {through}) as n"
        )
    };
    execute(&mut shop.producer().await, &insert(1, 50, "orders.created")).await;
    execute(&mut ware.producer().await, &insert(1, 20, "orders.created")).await;
    for name in ["shop", "ware"] {
        first.caught_up(name).await;
    }
    first.stop().await;
    // 30 wait that the other origin has names for, 20 under a topic of their own; then it fails over.
    execute(
        &mut ware.producer().await,
        &insert(21, 50, "orders.created"),
    )
    .await;
    execute(&mut ware.producer().await, &insert(1, 20, "orders.paid")).await;
    fail_over(&ware).await;
    let second = rig(&broker.database, &origins).await;
    let status = second.caught_up("ware").await;
    assert_eq!((status.rerelay_count, status.relayed_count), (1, 50));
    let mut owner = connect(&broker.url).await;
    let counts: Vec<(String, i64, i64)> = sqlx::query_as(
        "select o.name, count(*), count(distinct (m.topic_id, m.id)) from postroad_broker.message as m
        join postroad_broker.origin as o on o.id = m.origin_id group by 1 order by 1",
    )
    .fetch_all(&mut owner)
    .await
    .unwrap();
    assert_eq!(
        counts,
        [("shop".to_owned(), 50, 50), ("ware".to_owned(), 70, 70)]
    );
    second.stop().await;
}

/// However large the outbox, the log is read once, and only as far back as its rows can reach.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_read_once_and_no_further_back_than_the_outbox_reaches() {
    let broker = support::database().await;
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    let url = origin.relay_url();
    let origins = [("shop", Some(url.as_str()))];
    let first = rig(&broker.database, &origins).await;
    let mut owner = connect(&broker.url).await;
    let insert =
        "insert into postroad.outbox (topic, payload) select 'a', '1' from generate_series(1, $1)";
    let publish = async |count: i64| {
        let mut producer = origin.producer().await;
        sqlx::query(insert)
            .bind(count)
            .execute(&mut producer)
            .await
            .unwrap();
    };
    publish(60_000).await;
    first.caught_up("shop").await;
    first.stop().await;
    let mut origin_owner = origin.owner().await;
    let mut reads = Vec::new();
    // Read all of it, then only the last hours: the rest is older than any row of the outbox.
    for bound in [false, true] {
        if bound {
            // A session that ends tells at once what it has read.
            let mut once = connect(&broker.url).await;
            execute(
                &mut once,
                "update postroad_broker.message set appended_at = appended_at - interval '3 hours' where \"offset\" <= 50000",
            )
            .await;
            once.close().await.unwrap();
            execute(
                &mut origin_owner,
                "create temp table kept as select * from postroad.outbox order by seq desc limit 10000;
                truncate postroad.outbox;
                insert into postroad.outbox select * from kept;
                insert into postroad.outbox_leaf select n, now() - interval '1 minute' from generate_series(0, 7) as n",
            )
            .await;
        }
        fail_over(&origin).await;
        let before = rows_read(&mut owner).await;
        let rig = rig(&broker.database, &origins).await;
        let status = rig.caught_up("shop").await;
        assert_eq!(
            (status.rerelay_count, status.relayed_count),
            (1, 0),
            "{bound}"
        );
        rig.stop().await;
        reads.push(rows_read(&mut owner).await - before);
    }
    println!("rows of the log read: {reads:?}");
    assert!(reads[0] < 90_000, "{reads:?}");
    assert!(reads[1] < 25_000, "{reads:?}");
    let log = read_log(&broker.url).await;
    let ids: HashSet<&String> = log.iter().map(|message| &message.id).collect();
    assert_eq!((log.len(), ids.len()), (60_000, 60_000));
}

async fn rows_read(owner: &mut sqlx::PgConnection) -> i64 {
    // A session tells what it did when it has been idle for a second.
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    sqlx::query_scalar(
        "select coalesce(sum(seq_tup_read + coalesce(idx_tup_fetch, 0)), 0)::bigint from pg_stat_user_tables
        where schemaname = 'postroad_broker' and relname ~ '^message_'",
    )
    .fetch_one(owner)
    .await
    .unwrap()
}
