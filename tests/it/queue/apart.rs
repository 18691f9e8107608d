//! One queue's work and what it costs: the same in a large log as in a small one, and in pieces that others' work goes between.

use postroad::queue::{self, Verb, VerbItem};

use super::{Broker, HOUR, at_once, declaration, items, name};
use crate::support::{self, TestDatabase};

/// Rows of the log that index scans have read, as far as it is told: sessions do so a second after their last word.
async fn read_by_index(database: &TestDatabase) -> i64 {
    tokio::time::sleep(std::time::Duration::from_millis(2_500)).await;
    sqlx::query_scalar(
        "select coalesce(sum(idx_tup_read), 0)::bigint from pg_stat_user_indexes \
         where schemaname = 'postroad_broker' and relname ~ '^message_'",
    )
    .fetch_one(&mut database.connect().await)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_costs_the_same_in_a_log_that_has_grown() {
    const LETTERS: usize = 200;
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 10).await;
    // The plans are made and kept while the log is small.
    for delivery in broker.take(10, HOUR).await {
        broker.settle(Verb::Reject, items(&[delivery])).await;
    }
    for _ in 0..15 {
        broker.publish("orders.created", 1_000).await;
    }
    let taken = broker.take(LETTERS, HOUR).await;
    let before = read_by_index(&database).await;
    broker.settle(Verb::Reject, items(&taken)).await;
    let read = read_by_index(&database).await - before;
    assert!(
        read < 20 * LETTERS as i64,
        "{read} rows were read for {LETTERS} letters"
    );
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_batch_is_written_in_pieces() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 1_000).await;
    let taken = broker.take(1_000, HOUR).await;
    let items: Vec<VerbItem> = items(&taken);
    let outcomes = broker.settle(Verb::Reject, items.clone()).await;
    let is_rejected = |one: &queue::Outcome| matches!(one, queue::Outcome::Rejected { .. });
    assert!(outcomes.iter().all(is_rejected));
    let (letters, together): (i64, i64) = sqlx::query_as(
        "select sum(n)::bigint, max(n) from \
         (select count(*) as n from postroad_broker.dead_letter group by xmin::text) x",
    )
    .fetch_one(&mut database.connect().await)
    .await
    .unwrap();
    assert_eq!(letters, 1_000, "the answer came after the last of them");
    assert!(together <= 100, "{together} letters in one transaction");
    // A repeat, whose first answer was lost.
    let again = broker.settle(Verb::Reject, items).await;
    assert!(again.iter().all(|outcome| outcome.is_done(Verb::Reject)));
    broker.kill();
    let broker = Broker::on(&database).await;
    assert_eq!(broker.status().await.dead_letters, 1_000);
    broker.stop().await;
}

/// A server that has no connection left later on is no reason to fail the first request.
#[tokio::test(flavor = "multi_thread")]
async fn the_writer_is_connected_when_the_start_is_over() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let url = proxy.url(&database.url);
    let broker = Broker::start(&database.url, &url, queue::Options::default()).await;
    assert!(*proxy.accepted().borrow() >= 2, "the pool's, and its own");
    let declared = broker.queue.declare(name(), declaration(at_once(16))).await;
    declared.unwrap();
    broker.stop().await;
}
