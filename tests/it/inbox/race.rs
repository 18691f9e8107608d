//! Several consumers at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use sqlx::{Connection as _, PgConnection};

use super::{accept, code, consumer, consumer_database, execute};
use crate::support::{self, TestDatabase};

async fn wait_for_lock_waiter(observer: &mut PgConnection) {
    let observer = Arc::new(tokio::sync::Mutex::new(observer));
    support::eventually("the second consumer waits", || {
        let observer = Arc::clone(&observer);
        async move {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity \
                 where datname = current_database() and wait_event_type = 'Lock' and query like '%inbox_accept%'",
            )
            .fetch_one(&mut **observer.lock().await)
            .await
            .unwrap();
            (waiting == 1).then_some(())
        }
    })
    .await;
}

/// Two consumers with the same message; the first one's transaction ends by `end`. What the second is told.
async fn second_is_told(
    database: &TestDatabase,
    offset: i64,
    end: &str,
    isolation: &str,
) -> Result<bool, sqlx::Error> {
    let (mut first, mut second) = (consumer(database).await, consumer(database).await);
    let mut observer = database.connect().await;
    execute(&mut first, "begin").await;
    assert!(accept(&mut first, "mailer", offset).await.unwrap());
    let begin = format!("begin isolation level {isolation}");
    let waiting = tokio::spawn(async move {
        execute(&mut second, &begin).await;
        let told = accept(&mut second, "mailer", offset).await;
        execute(
            &mut second,
            if told.is_ok() { "commit" } else { "rollback" },
        )
        .await;
        told
    });
    wait_for_lock_waiter(&mut observer).await;
    match end {
        "killed" => {
            let pid: i32 = sqlx::query_scalar("select pg_backend_pid()")
                .fetch_one(&mut first)
                .await
                .unwrap();
            sqlx::query("select pg_terminate_backend($1)")
                .bind(pid)
                .execute(&mut observer)
                .await
                .unwrap();
        }
        end => execute(&mut first, end).await,
    }
    waiting.await.unwrap()
}

#[tokio::test]
async fn the_second_of_two_waits_for_the_first_and_is_told_truly() {
    let database = consumer_database(10).await;
    // The first of all makes the leaf, too: the second waits for that.
    for (offset, end, isolation, told) in [
        (1, "rollback", "read committed", Ok(true)),
        (2, "commit", "read committed", Ok(false)),
        (3, "rollback", "read committed", Ok(true)),
        (4, "killed", "read committed", Ok(true)),
        (5, "commit", "repeatable read", Err("40001")),
        (6, "rollback", "repeatable read", Ok(true)),
        (7, "commit", "serializable", Err("40001")),
        // In the second half, where the next leaf is made ahead.
        (8, "commit", "read committed", Ok(false)),
        (9, "rollback", "read committed", Ok(true)),
        // Over the boundary.
        (11, "commit", "read committed", Ok(false)),
        // A leaf that nobody made ahead.
        (101, "commit", "read committed", Ok(false)),
        (201, "rollback", "read committed", Ok(true)),
        (301, "killed", "read committed", Ok(true)),
        (401, "rollback", "repeatable read", Ok(true)),
        (501, "commit", "repeatable read", Err("40001")),
    ] {
        let found = second_is_told(&database, offset, end, isolation).await;
        let found = found.map_err(|error| code(&error));
        assert_eq!(
            found,
            told.map_err(str::to_owned),
            "{offset} {end} {isolation}"
        );
    }
}

/// Works on each message twice over, by 6 consumers at a time, every third transaction rolled back and tried again. Leaves are
/// so small that somebody crosses a boundary all the time. `accepts` is what the consumers go by. Gives the effects per message.
async fn race(database: &TestDatabase, messages: i64, accepts: bool) -> BTreeMap<i64, i64> {
    let mut owner = database.connect().await;
    execute(
        &mut owner,
        &format!(
            "create table effect (message bigint not null); grant insert on effect to {}",
            database.role("consumer")
        ),
    )
    .await;
    let next = Arc::new(AtomicI64::new(0));
    let mut consumers = Vec::new();
    for number in 0..6_i64 {
        let (next, mut connection) = (Arc::clone(&next), consumer(database).await);
        consumers.push(tokio::spawn(async move {
            loop {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                // Each message has two turns, a few apart.
                let message = turn / 8 * 4 + turn % 4 + 1;
                if message > messages {
                    return connection.close().await.unwrap();
                }
                for attempt in 0.. {
                    execute(&mut connection, "begin").await;
                    let is_new = accept(&mut connection, "mailer", message).await;
                    if *is_new.as_ref().unwrap() || !accepts {
                        sqlx::query("insert into effect values ($1)")
                            .bind(message)
                            .execute(&mut connection)
                            .await
                            .unwrap();
                    }
                    if attempt == 0 && (turn + number) % 3 == 0 {
                        execute(&mut connection, "rollback").await;
                    } else {
                        execute(&mut connection, "commit").await;
                        break;
                    }
                }
            }
        }));
    }
    for consumer in consumers {
        consumer.await.unwrap();
    }
    let effects: Vec<(i64, i64)> =
        sqlx::query_as("select message, count(*) from effect group by message")
            .fetch_all(&mut owner)
            .await
            .unwrap();
    effects.into_iter().collect()
}

#[tokio::test]
async fn consumers_that_race_over_the_boundaries_of_leaves_do_each_work_once() {
    let database = consumer_database(5).await;
    let effects = race(&database, 400, true).await;
    assert_eq!(effects, (1..=400).map(|message| (message, 1)).collect());
    let mut owner = database.connect().await;
    let leaves: i64 = sqlx::query_scalar("select count(*) from postroad.inbox_leaf")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert!((80..=82).contains(&leaves), "{leaves}");
    let entries: i64 = sqlx::query_scalar("select count(*) from postroad.inbox")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(entries, 400);
}

#[tokio::test]
async fn the_race_shows_consumers_that_do_not_ask() {
    let database = consumer_database(5).await;
    let effects = race(&database, 40, false).await;
    assert!(effects.values().all(|&count| count == 2), "{effects:?}");
}
