//! Sessions of relays in the producers' database: one whose statement is given up does not stay there.

use std::time::Duration;

use postroad::store::origin::{Backend, Session};
use uuid::Uuid;

use super::{connect, execute};
use crate::support::{self, TestDatabase};

/// Sessions of relays that wait for a lock.
async fn waiting(database: &TestDatabase) -> i64 {
    sqlx::query_scalar(
        "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'postroad relay' and wait_event_type = 'Lock'",
    )
    .fetch_one(&mut database.connect().await)
    .await
    .unwrap()
}

async fn wait_for(database: &TestDatabase, count: i64) {
    support::eventually("the sessions that wait", || async {
        (waiting(database).await == count).then_some(())
    })
    .await;
}

/// Has a session wait for a lock, and gives it up in the middle, as a relay does when a statement is not answered.
async fn give_up(database: &TestDatabase, former: Option<Backend>) -> Option<Backend> {
    let mut session = Session::open(&database.database, former).await.unwrap();
    let backend = session.backend();
    assert!(backend.is_some());
    let marking = session.insert_mark(Uuid::new_v4());
    let marked = tokio::time::timeout(Duration::from_millis(300), marking).await;
    assert!(marked.is_err(), "it waits for the lock");
    backend
}

#[tokio::test]
async fn a_session_that_was_given_up_is_ended_before_there_is_another() {
    let database = support::database().await;
    let mut locker = connect(&database.url).await;
    execute(&mut locker, "begin; lock table postroad.relay_mark").await;
    let mut former = None;
    for _ in 0..5 {
        former = give_up(&database, former).await;
        assert!(waiting(&database).await <= 1);
    }
    wait_for(&database, 1).await;
    let next = Session::open(&database.database, former).await.unwrap();
    wait_for(&database, 0).await;
    drop(next);
}

#[tokio::test]
async fn a_session_whose_process_is_gone_ends_though_it_waits_for_a_lock() {
    let database = support::database().await;
    let mut locker = connect(&database.url).await;
    execute(&mut locker, "begin; lock table postroad.relay_mark").await;
    give_up(&database, None).await;
    // The lock is held all the while.
    wait_for(&database, 0).await;
    execute(&mut locker, "rollback").await;
}

#[tokio::test]
async fn limits_that_somebody_put_on_the_role_or_the_database_do_not_hold_for_the_broker() {
    let database = support::empty_database().await;
    let mut owner = connect(&database.url).await;
    for setting in [
        "statement_timeout = '1ms'",
        "lock_timeout = '1ms'",
        "idle_session_timeout = '50ms'",
        "default_transaction_read_only = on",
    ] {
        let text = format!("alter database {} set {setting}", database.name);
        execute(&mut owner, &text).await;
    }
    postroad::store::migrate::inbox(&database.database)
        .await
        .unwrap();
    let broker = postroad::app::Broker::start(support::broker::config(&database.url))
        .await
        .unwrap();
    let http = support::Http::new(broker.url());
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (status, answer) = http
        .post("/v1/topics/a/messages", &serde_json::json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}))
        .await;
    assert!(status.is_success(), "{answer}");
    broker.stop().await.unwrap();
}
