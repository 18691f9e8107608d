//! `postroad.assert_fence`: what it lets through, and that with it a holder whose time is up harms nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use postroad::store::migrate::{self, Grants};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::{Node, execute};
use crate::support::{self, TestDatabase};

async fn assert_fence(connection: &mut PgConnection, token: i64) -> Result<(), String> {
    let asserted = sqlx::query("select postroad.assert_fence('report', $1)")
        .bind(token)
        .execute(connection)
        .await;
    let code = |error: sqlx::Error| {
        let error = error.as_database_error();
        let code = error.and_then(|error| error.code());
        code.unwrap_or_default().into_owned()
    };
    asserted.map(|_| ()).map_err(code)
}

async fn run(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(connection)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

async fn fenced() -> TestDatabase {
    let database = support::empty_database().await;
    let given = migrate::fence(&database.database).await.unwrap();
    assert_eq!(given, Grants::Given);
    database
}

#[tokio::test]
async fn it_is_installed_beside_the_rest_and_gives_one_right() {
    let database = fenced().await;
    execute(&database.url, &migrate::fence_sql()).await;
    assert_eq!(
        migrate::inbox(&database.database).await.unwrap(),
        Grants::Given
    );
    execute(&database.url, &migrate::fence_sql()).await;
    let mut service = database.connect().await;
    run(
        &mut service,
        &format!("set role {}", database.role("fenced")),
    )
    .await;
    assert_fence(&mut service, 7).await.unwrap();
    for forbidden in [
        "select * from postroad.fence",
        "insert into postroad.fence values ('report', 9)",
        "update postroad.fence set token = 1",
        "delete from postroad.fence",
    ] {
        let refused = sqlx::raw_sql(forbidden).execute(&mut service).await;
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("permission denied"), "{forbidden}: {error}");
    }
    let nothing = "select postroad.assert_fence(null, 1)";
    assert!(sqlx::raw_sql(nothing).execute(&mut service).await.is_err());
}

#[tokio::test]
async fn a_lower_token_is_refused_and_others_wait_for_the_transaction() {
    let database = fenced().await;
    let mut old = database.connect().await;
    let mut new = database.connect().await;
    for token in [5, 5, 6, 6] {
        assert_fence(&mut old, token).await.unwrap();
    }
    assert_eq!(assert_fence(&mut old, 5).await, Err("PRF01".to_owned()));

    // Of two at a time, the second is judged when the first has ended.
    run(&mut new, "begin").await;
    assert_fence(&mut new, 7).await.unwrap();
    let late = tokio::spawn(async move {
        let late = assert_fence(&mut old, 6).await;
        (old, late)
    });
    let observer = database.pool(1);
    support::eventually("the old one waits", || async {
        let waits: bool = sqlx::query_scalar(
            "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and query like '%assert_fence%'
                and datname = current_database())",
        )
        .fetch_one(&observer)
        .await
        .unwrap();
        waits.then_some(())
    })
    .await;
    observer.close().await;
    run(&mut new, "commit").await;
    let (mut old, late) = late.await.unwrap();
    assert_eq!(late, Err("PRF01".to_owned()));

    // A holder whose transaction was rolled back has not been there.
    run(&mut new, "begin").await;
    assert_fence(&mut new, 9).await.unwrap();
    run(&mut new, "rollback").await;
    assert_fence(&mut old, 8).await.unwrap();
    run(&mut old, "begin isolation level serializable").await;
    assert_fence(&mut old, 8).await.unwrap();
    run(&mut old, "commit").await;
}

/// Writes as the holder until it was done so often; some are paused for longer than they hold the lock.
async fn worker(
    node: Arc<Node>,
    url: String,
    owner: String,
    pauses: bool,
    done: Arc<AtomicU32>,
    refused: Arc<AtomicU32>,
) {
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let ttl = Duration::from_secs(1);
    while done.load(Ordering::Relaxed) < 40 || refused.load(Ordering::Relaxed) < 2 {
        let wait = Duration::from_secs(20);
        let Ok(held) = node.acquire(&owner, ttl, wait).await else {
            continue;
        };
        if pauses {
            tokio::time::sleep(ttl + Duration::from_millis(400)).await;
        }
        run(&mut connection, "begin").await;
        let asserted = assert_fence(&mut connection, held.token).await;
        if asserted.is_ok() {
            // What two holders at a time would both read.
            sqlx::query("insert into work (token, count) select $1, count(*) from work")
                .bind(held.token)
                .execute(&mut connection)
                .await
                .unwrap();
            run(&mut connection, "commit").await;
            done.fetch_add(1, Ordering::Relaxed);
        } else {
            run(&mut connection, "rollback").await;
            refused.fetch_add(1, Ordering::Relaxed);
        }
        node.release(held.token).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn holders_who_slept_past_their_time_write_nothing_after_the_next() {
    let broker = support::database().await;
    let resource = fenced().await;
    execute(
        &resource.url,
        "create table work (id bigint generated always as identity, token bigint, count bigint)",
    )
    .await;
    let nodes = [0, 1].map(|_| Arc::new(Node::start(&broker.url)));
    let (done, refused) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let workers = (0..6).map(|number| {
        tokio::spawn(worker(
            Arc::clone(&nodes[number % 2]),
            resource.url.clone(),
            format!("worker-{number}"),
            number == 0,
            Arc::clone(&done),
            Arc::clone(&refused),
        ))
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    let mut connection = resource.connect().await;
    let rows: Vec<(i64, i64)> = sqlx::query_as("select token, count from work order by count, id")
        .fetch_all(&mut connection)
        .await
        .unwrap();
    assert!(rows.is_sorted_by(|one, next| one.0 <= next.0), "{rows:?}");
    for (index, (_, count)) in rows.iter().enumerate() {
        assert_eq!(*count, index as i64, "each saw all before: {rows:?}");
    }
}
