//! One queue's work and what it costs: the same in a large log as in a small one, and in pieces that others' work goes between.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use postroad::domain::id::{Offset, Slot};
use postroad::domain::name::QueueName;
use postroad::queue::{self, Verb, VerbItem};

use super::{Broker, HOUR, at_once, declaration, delayed, items, name};
use crate::support::{self, Action, Direction, TestDatabase};

/// Rows of the log that index scans have read, as far as it is told: sessions do so a second after their last word.
async fn read_by_index(database: &TestDatabase) -> i64 {
    tokio::time::sleep(Duration::from_millis(2_500)).await;
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

/// A text that nothing compresses much.
fn reason() -> String {
    let parts = (0..31).map(|_| uuid::Uuid::new_v4().simple().to_string());
    parts.collect()
}

/// Nacks so many deliveries, each with a long reason and a long delay.
async fn fail(broker: &Broker, count: usize, delay: Duration) {
    for taken in broker.take(count, HOUR).await.chunks(1_000) {
        let nacks = delayed(taken, delay).into_iter().map(|item| VerbItem {
            reason: Some(reason()),
            ..item
        });
        broker.settle(Verb::Nack, nacks.collect()).await;
    }
}

/// The journal's rows are toasted, so that its tables are small by themselves; the checkpoint is of several chunks.
#[tokio::test(flavor = "multi_thread")]
async fn long_reasons_turn_the_journal_and_their_checkpoint_is_written_in_pieces() {
    const COUNT: usize = 2_000;
    let database = support::database().await;
    let options = queue::Options {
        journal_full_bytes: 512 * 1024,
        ..queue::Options::default()
    };
    let broker = Broker::start(&database.url, &database.url, options.clone()).await;
    let declared = broker.queue.declare(name(), declaration(at_once(16))).await;
    declared.unwrap();
    broker.publish("orders.created", 1_000).await;
    broker.publish("orders.created", 1_000).await;
    fail(&broker, COUNT, HOUR).await;
    support::eventually("a turn, with the former segments emptied", || async {
            let (turn, left): (i64, i64) = sqlx::query_as(
                "select t.turn, (select count(*) from postroad_broker.queue_journal j where j.segment <> t.turn % 4) \
                 from postroad_broker.queue_journal_turn t",
            )
            .fetch_one(&mut database.connect().await)
            .await
            .unwrap();
            (turn > 0 && left == 0).then_some(())
        })
        .await;
    let sums: Vec<i64> = sqlx::query_scalar(
        "select sum(octet_length(data))::bigint from postroad_broker.queue_checkpoint_chunk group by xmin::text",
    )
    .fetch_all(&mut database.connect().await)
    .await
    .unwrap();
    assert!(
        sums.len() > 3,
        "the chunks were written one after the other: {sums:?}"
    );
    assert!(sums.iter().all(|bytes| *bytes < 600 * 1024), "{sums:?}");
    broker.kill();
    let broker = Broker::start(&database.url, &database.url, options).await;
    let status = broker.status().await;
    assert_eq!((status.delayed, status.depth), (COUNT as u64, COUNT as u64));
    let queue = name();
    let told = broker.queue.inspect(&queue, vec![(Offset(1_500), None)]);
    assert_eq!(told.await.unwrap()[0].failures.len(), 1);
    broker.stop().await;
}

/// Of one slot the state is never read: what the server is asked for it is lost on the way.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_slow_to_recover_keeps_no_other_waiting() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let names = (0..6).map(|number| QueueName::parse(&format!("queue-{number}")).unwrap());
    let names: Vec<QueueName> = names.collect();
    let mut slots = Vec::new();
    for name in &names {
        let declared = broker.queue.declare(name.clone(), declaration(at_once(16)));
        slots.push(Slot::of(declared.await.unwrap().0.id).lease_name());
    }
    broker.kill();
    let proxy = support::proxy(&database.url).await;
    let stuck: Arc<Mutex<Option<String>>> = Arc::default();
    let first = Arc::clone(&stuck);
    proxy.filter(move |direction, chunk| {
        let place = chunk.windows(5).position(|bytes| bytes == b"slot/");
        let (Direction::ToServer, Some(place)) = (direction, place) else {
            return Action::Forward;
        };
        let mut first = first.lock().unwrap();
        if first.is_some() {
            return Action::Forward;
        }
        *first = Some(String::from_utf8_lossy(&chunk[place..place + 7]).into_owned());
        Action::Swallow
    });
    let url = proxy.url(&database.url);
    let broker = Broker::start(&database.url, &url, queue::Options::default()).await;
    support::eventually("the other slots' queues to be served", || async {
        let stuck = stuck.lock().unwrap().clone()?;
        let mut others = names.iter().zip(&slots).filter(|(_, slot)| **slot != stuck);
        assert!(
            slots.contains(&stuck) && others.clone().count() > 0,
            "{slots:?}"
        );
        others
            .all(|(name, _)| broker.queue.is_here(name))
            .then_some(())
    })
    .await;
    let served = names.iter().filter(|name| broker.queue.is_here(name));
    assert!(served.count() < names.len(), "one is not");
    broker.kill();
}
