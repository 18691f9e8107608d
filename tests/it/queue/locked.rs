//! Somebody else's lock on a leaf of the log, as VACUUM FULL and REINDEX take it, costs the queues of its stream their dead letters, and
//! nobody else more than a moment.

use std::sync::Arc;
use std::time::{Duration, Instant};

use postroad::domain::id::StreamId;
use postroad::domain::name::{QueueName, StreamName, TopicPattern};
use postroad::domain::policy::Start;
use postroad::queue::{Declaration, Delivery, Outcome, ReceiveRequest, Received, Renewal, Verb};
use postroad::stream::{Retention, Settings};
use sqlx::{AssertSqlSafe, Executor as _, PgConnection};

use super::{Broker, HOUR, at_once, declaration, items, name, shared};
use crate::support::{self, TestDatabase};

fn held() -> QueueName {
    QueueName::parse("held").unwrap()
}

/// Declares the tests' queue, and one of another stream.
async fn declare(broker: &Broker) -> StreamId {
    let stream = StreamName::parse("held").unwrap();
    let settings = Settings {
        patterns: vec![TopicPattern::parse("held.>").unwrap()],
        retention: Retention::default(),
        is_keyed: false,
    };
    let (made, _) = broker
        .stream
        .declare(stream.clone(), settings)
        .await
        .unwrap();
    let of_held = Declaration {
        stream,
        topics: vec![TopicPattern::parse("held.>").unwrap()],
        ..declaration(at_once(3))
    };
    broker.queue.declare(held(), of_held).await.unwrap();
    let of_main = declaration(at_once(3));
    broker.queue.declare(name(), of_main).await.unwrap();
    made.id
}

async fn take(broker: &Broker, queue: &QueueName) -> Vec<Delivery> {
    let Received {
        deliveries,
        handout,
        ..
    } = receive(broker, queue).await.unwrap();
    handout.written();
    deliveries
}

async fn receive(broker: &Broker, queue: &QueueName) -> Result<Received, postroad::queue::Error> {
    let request = ReceiveRequest {
        max_messages: 1,
        wait: Duration::from_secs(10),
        visibility_timeout: Some(HOUR),
        ..ReceiveRequest::default()
    };
    broker.queue.receive(queue, request).await
}

/// A session with the lock.
async fn lock(database: &TestDatabase, stream: StreamId) -> PgConnection {
    let mut session = database.connect().await;
    let text = format!(
        "begin; lock table postroad_broker.message_{}_1 in access exclusive mode",
        stream.0
    );
    session.execute(AssertSqlSafe(text)).await.unwrap();
    session
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_leaf_holds_up_the_dead_letters_of_its_stream_alone() {
    let database = support::database().await;
    let broker = shared(Broker::on(&database).await);
    let stream = declare(&broker).await;
    broker.publish("held.a", 2).await;
    broker.publish("orders.created", 40).await;
    let first = take(&broker, &held()).await;
    let mut session = lock(&database, stream).await;
    let rejecting = {
        let (broker, items) = (Arc::clone(&broker), items(&first));
        tokio::spawn(async move { broker.queue.settle(&held(), Verb::Reject, items).await })
    };
    let began = Instant::now();
    let mut rejected = 0;
    for n in 0..40 {
        let taken = take(&broker, &name()).await;
        // Letters of the other stream too.
        let verb = match n % 4 {
            0 => Verb::Reject,
            _ => Verb::Ack,
        };
        let outcomes = broker.settle(verb, items(&taken)).await;
        rejected += usize::from(matches!(outcomes[0], Outcome::Rejected { .. }));
    }
    let took = began.elapsed();
    println!("40 receives and 40 verbs beside a lock: {took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
    assert_eq!(rejected, 10);
    assert!(!rejecting.is_finished(), "its letter waits for the lock");
    session.execute("rollback").await.unwrap();
    let outcomes = rejecting.await.unwrap().unwrap();
    assert!(
        matches!(outcomes[0], Outcome::Rejected { .. }),
        "{outcomes:?}"
    );
    let letters: Vec<(i64, String)> = sqlx::query_as(
        "select \"offset\", id from postroad_broker.dead_letter where stream_id = $1",
    )
    .bind(stream.0)
    .fetch_all(&mut session)
    .await
    .unwrap();
    let event: serde_json::Value = serde_json::from_slice(&first[0].entry.event).unwrap();
    assert_eq!(letters, [(1, event["id"].as_str().unwrap().to_owned())]);
    let second = take(&broker, &held()).await;
    assert_eq!(second[0].entry.offset.0, 2);
    let broker = Arc::into_inner(broker).unwrap();
    broker.kill();
    // It is settled for good.
    let broker = Broker::on(&database).await;
    support::eventually("the one in flight alone", || async {
        let status = broker.queue.describe(&held()).await.unwrap().status?;
        ((status.depth, status.in_flight, status.dead_letters) == (1, 1, 1)).then_some(())
    })
    .await;
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_stays_refuses_the_letter_and_its_queue_goes_on() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let stream = declare(&broker).await;
    broker.publish("held.a", 1).await;
    let taken = take(&broker, &held()).await;
    let mut session = lock(&database, stream).await;
    let refused = broker
        .queue
        .settle(&held(), Verb::Reject, items(&taken))
        .await;
    assert!(refused.is_err(), "{refused:?}");
    session.execute("rollback").await.unwrap();
    // Nothing of it is written: the delivery is in flight as it was.
    let outcomes = support::eventually("the queue to be read again", || async {
        let settled = broker
            .queue
            .settle(&held(), Verb::Reject, items(&taken))
            .await;
        settled.ok()
    })
    .await;
    // One that was carried out while its caller was told to ask again is dead-lettered by then.
    assert!(
        matches!(
            outcomes[0],
            Outcome::Rejected { .. } | Outcome::DeadLettered { is_last: true, .. }
        ),
        "{outcomes:?}"
    );
    let letters: i64 = sqlx::query_scalar("select count(*) from postroad_broker.dead_letter")
        .fetch_one(&mut session)
        .await
        .unwrap();
    assert_eq!(letters, 1);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_are_recovered_and_sought_beside_a_lock_of_another_stream() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let stream = declare(&broker).await;
    broker.publish("held.a", 3).await;
    broker.publish("orders.created", 3).await;
    for queue in [held(), name()] {
        let taken = take(&broker, &queue).await;
        let acked = broker.queue.settle(&queue, Verb::Ack, items(&taken)).await;
        assert_eq!(acked.unwrap(), [Outcome::Acked]);
    }
    broker.kill();
    let mut session = lock(&database, stream).await;
    let broker = Broker::on(&database).await;
    let taken = broker.take(1, HOUR).await;
    assert_eq!(taken[0].entry.offset.0, 2);
    let other = held();
    let mut is_held = Box::pin(receive(&broker, &other));
    let waiting = tokio::time::timeout(Duration::from_secs(1), &mut is_held).await;
    assert!(
        waiting.is_err() || waiting.is_ok_and(|received| received.is_err()),
        "its log was not looked at"
    );
    drop(is_held);
    session.execute("rollback").await.unwrap();
    let received = support::eventually("the other queue", || async {
        receive(&broker, &held()).await.ok()
    })
    .await;
    assert_eq!(received.deliveries[0].entry.offset.0, 2);
    received.handout.written();
    // A seek that finds the log locked says so, and is no reason for the others to wait.
    session = lock(&database, stream).await;
    let latest = Renewal::Seek(Start::Latest);
    let sought = broker.queue.renew(&held(), latest, None).await;
    assert!(sought.is_err(), "{sought:?}");
    assert_eq!(broker.take(1, HOUR).await[0].entry.offset.0, 3);
    session.execute("rollback").await.unwrap();
    let sought = support::eventually("the seek", || async {
        broker.queue.renew(&held(), latest, None).await.ok()
    })
    .await;
    assert_eq!(sought.through_offset.0, 3);
    broker.stop().await;
}
