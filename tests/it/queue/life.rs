//! Declaring, waiting, handing out, failing.

use std::time::Duration;

use postroad::domain::id::{Offset, QueueId, Slot};
use postroad::domain::name::{QueueName, TopicPattern};
use postroad::domain::policy::{Ordering, Settings, Start};
use postroad::queue::{self, Declaration, Declared, ReceiveRequest, Verb};

use super::{Broker, HOUR, at_once, declaration, delayed, items, name, shared};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_message_dies_in_exactly_its_attempts_and_takes_nobody_with_it() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(4)).await;
    broker.publish("orders.created", 10).await;
    let request = ReceiveRequest {
        visibility_timeout: Some(Duration::from_secs(1)),
        wait: Duration::from_secs(10),
        ..ReceiveRequest::default()
    };
    support::eventually("the queue to see its messages", || async {
        (broker.status().await.depth == 10).then_some(())
    })
    .await;
    let (mut poison_attempts, mut batches) = (Vec::new(), Vec::new());
    // The consumer dies with offset 1, and with whatever came with it.
    while broker.status().await.depth > 0 {
        let received = broker.receive(request.clone()).await;
        let has_poison = received
            .deliveries
            .iter()
            .find(|delivery| delivery.entry.offset == Offset(1));
        if let Some(poison) = has_poison {
            poison_attempts.push(poison.attempt);
            batches.push(received.deliveries.len());
        } else if !received.deliveries.is_empty() {
            broker.settle(Verb::Ack, items(&received.deliveries)).await;
        }
        received.handout.written();
    }
    assert_eq!(poison_attempts, [1, 2, 3, 4]);
    assert_eq!(batches, [10, 10, 1, 1], "alone from its third attempt on");
    let letters: Vec<(i64, i32, String, i64)> = sqlx::query_as(
        "select \"offset\", attempts, cause, jsonb_array_length(failures)::bigint from postroad_broker.dead_letter",
    )
    .fetch_all(&mut database.connect().await)
    .await
    .unwrap();
    assert_eq!(letters, [(1, 4, "out_of_attempts".to_owned(), 4)]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_dead_letters_are_removed() {
    let database = support::database().await;
    let options = queue::Options {
        trim_every: Duration::from_millis(100),
        ..queue::Options::default()
    };
    let broker = Broker::start(&database.url, &database.url, options).await;
    broker
        .queue
        .declare(name(), declaration(at_once(16)))
        .await
        .unwrap();
    broker.publish("orders.created", 3).await;
    let taken = broker.take(3, HOUR).await;
    broker.settle(Verb::Reject, items(&taken)).await;
    sqlx::query(
        "update postroad_broker.dead_letter set died_at = died_at - interval '15 days' where \"offset\" < 3",
    )
    .execute(&mut database.connect().await)
    .await
    .unwrap();
    let left = async |broker: &Broker| {
        support::eventually("the young one to be left", || async {
            (broker.status().await.dead_letters == 1).then_some(())
        })
        .await;
    };
    left(&broker).await;
    // The status is what the queue has decided; the rows follow with the commit.
    support::eventually("the old rows to be gone", || async {
        let offsets: Vec<i64> =
            sqlx::query_scalar("select \"offset\" from postroad_broker.dead_letter")
                .fetch_all(&mut database.connect().await)
                .await
                .unwrap();
        (offsets == [3]).then_some(())
    })
    .await;
    let outcomes = broker.settle(Verb::Ack, items(&taken[..1])).await;
    assert_eq!(outcomes, [queue::Outcome::AlreadySettled]);
    broker.kill();
    left(&Broker::on(&database).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_not_written_charge_nobody() {
    let database = support::database().await;
    let broker = shared(Broker::on(&database).await);
    broker
        .queue
        .declare(name(), declaration(at_once(16)))
        .await
        .unwrap();
    broker.publish("orders.created", 5).await;
    for round in 1..=150 {
        let received = broker.receive(ReceiveRequest::default()).await;
        assert_eq!(received.deliveries.len(), 5);
        assert!(
            received
                .deliveries
                .iter()
                .all(|d| d.attempt == 1 && d.delivery == round)
        );
        drop(received);
    }
    let taken = broker.take(5, HOUR).await;
    broker.settle(Verb::Ack, items(&taken)).await;
    // A waiter that went away gets nothing.
    let waiting = tokio::spawn({
        let broker = broker.clone();
        async move { broker.take(1, HOUR).await }
    });
    support::eventually("the waiter", || async {
        (broker.status().await.waiters == 1).then_some(())
    })
    .await;
    waiting.abort();
    let _ = waiting.await;
    broker.publish("orders.created", 1).await;
    let taken = broker.take(1, HOUR).await;
    assert_eq!((taken[0].attempt, taken[0].delivery), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receive_repeated_under_its_id_gets_the_same() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 4).await;
    let request = ReceiveRequest {
        max_messages: 2,
        receive_id: Some("r1".into()),
        visibility_timeout: Some(HOUR),
        ..ReceiveRequest::default()
    };
    let receipts = |received: &queue::Received| -> Vec<String> {
        received
            .deliveries
            .iter()
            .map(|delivery| delivery.receipt.clone())
            .collect()
    };
    let first = broker.receive(request.clone()).await;
    let expected = receipts(&first);
    first.handout.written();
    let again = broker.receive(request.clone()).await;
    assert_eq!(receipts(&again), expected);
    drop(again);
    broker.kill();
    let broker = Broker::on(&database).await;
    assert_eq!(
        receipts(&broker.receive(request.clone()).await),
        expected,
        "after a kill too"
    );
    assert_eq!(
        broker.status().await.in_flight,
        2,
        "a repeat that is not written takes nothing back"
    );
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_receive_keeps_what_the_first_answer_loses() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 2).await;
    let request = ReceiveRequest {
        max_messages: 2,
        receive_id: Some("r1".into()),
        visibility_timeout: Some(HOUR),
        ..ReceiveRequest::default()
    };
    let first = broker.receive(request.clone()).await;
    let again = broker.receive(request.clone()).await;
    assert_eq!(again.deliveries.len(), 2);
    drop(first);
    let other = broker.poll().await;
    assert!(other.deliveries.is_empty(), "{:?}", other.deliveries);
    // The repeat is not written either: now they go back.
    drop(again);
    let taken = broker.take(2, HOUR).await;
    assert!(taken.iter().all(|d| (d.delivery, d.attempt) == (2, 1)));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_receive_id_waits_once() {
    let database = support::database().await;
    let broker = shared(Broker::on(&database).await);
    broker
        .queue
        .declare(name(), declaration(at_once(16)))
        .await
        .unwrap();
    let wait = || {
        let broker = broker.clone();
        tokio::spawn(async move {
            let request = ReceiveRequest {
                max_messages: 2,
                receive_id: Some("r1".into()),
                ..ReceiveRequest::default()
            };
            let received = broker.receive(request).await;
            received.handout.written();
            received.deliveries.len()
        })
    };
    let first = wait();
    support::eventually("the waiter", || async {
        (broker.status().await.waiters == 1).then_some(())
    })
    .await;
    let second = wait();
    assert_eq!(first.await.unwrap(), 0, "its repeat takes its place");
    broker.publish("orders.created", 4).await;
    assert_eq!(second.await.unwrap(), 2);
    assert_eq!(broker.take(2, HOUR).await[0].entry.offset, Offset(3));
}

/// The insert committed and its answer was lost: here, another hand made the row.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_whose_making_was_not_answered_is_served() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let (made, _) = broker
        .queue
        .declare(name(), declaration(at_once(16)))
        .await
        .unwrap();
    broker.publish("orders.created", 1).await;
    broker.take(1, HOUR).await;
    let id = (1_000..)
        .find(|&id| Slot::of(QueueId(id)) == Slot::of(made.id))
        .unwrap();
    sqlx::query(
        "select c.found_offset from postroad_broker.queue q, lateral postroad_broker.create_queue( \
            $1, 'twin', q.stream_id, q.patterns, q.settings, q.start, 'earliest', 0, q.slot) c \
         where q.name = 'billing'",
    )
    .bind(id)
    .execute(&mut database.connect().await)
    .await
    .unwrap();
    let twin = QueueName::parse("twin").unwrap();
    let (found, declared) = broker
        .queue
        .declare(twin.clone(), declaration(at_once(16)))
        .await
        .unwrap();
    assert_eq!((found.id, declared), (QueueId(id), Declared::Unchanged));
    let received = broker
        .queue
        .receive(&twin, ReceiveRequest::default())
        .await
        .unwrap();
    assert_eq!(received.deliveries.len(), 1);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn declaring_fixes_the_start_and_changes_what_can_be_changed() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    broker.publish("orders.created", 5).await;
    broker.publish("parcels.sent", 5).await;
    let keyed = Settings {
        ordering: Ordering::Key,
        priorities: true,
        ..Settings::default()
    };
    let refused = broker.queue.declare(name(), declaration(keyed)).await;
    assert!(
        matches!(refused, Err(queue::Error::Invalid(_))),
        "{refused:?}"
    );
    for (start, offset) in [
        (Start::Earliest, 1),
        (Start::Latest, 11),
        (Start::Offset(Offset(7)), 7),
        (Start::Time(chrono::DateTime::UNIX_EPOCH), 1),
    ] {
        let declared = Declaration {
            start,
            ..declaration(Settings::default())
        };
        let (description, made) = broker
            .queue
            .declare(name(), declared.clone())
            .await
            .unwrap();
        assert_eq!(
            (made, description.start_offset),
            (Declared::Created, Offset(offset)),
            "{start:?}"
        );
        let (_, again) = broker.queue.declare(name(), declared).await.unwrap();
        assert_eq!(again, Declared::Unchanged);
        broker.queue.delete(&name()).await.unwrap();
    }
    let gone = broker.queue.describe(&name()).await;
    assert!(matches!(gone, Err(queue::Error::NotFound { .. })));
    let latest = Declaration {
        start: Start::Latest,
        ..declaration(Settings::default())
    };
    broker.queue.declare(name(), latest.clone()).await.unwrap();
    assert!(broker.poll().await.deliveries.is_empty());
    let topics = vec![TopicPattern::parse("parcels.*").unwrap()];
    let (_, changed) = broker
        .queue
        .declare(name(), Declaration { topics, ..latest })
        .await
        .unwrap();
    assert_eq!(changed, Declared::Changed);
    broker.publish("orders.created", 1).await;
    broker.publish("parcels.sent", 1).await;
    assert_eq!(
        broker.take(1, HOUR).await[0].entry.topic.as_str(),
        "parcels.sent"
    );
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_receive_says_why() {
    use postroad::domain::queue::EmptyReason;
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let few = Settings {
        max_in_flight: 2,
        ..at_once(16)
    };
    broker
        .queue
        .declare(name(), declaration(few))
        .await
        .unwrap();
    assert_eq!(broker.poll().await.reason, Some(EmptyReason::Empty));
    broker.publish("orders.created", 3).await;
    let taken = broker.take(2, HOUR).await;
    let full = broker
        .queue
        .receive(
            &name(),
            ReceiveRequest {
                wait: Duration::ZERO,
                ..Default::default()
            },
        )
        .await;
    assert!(
        matches!(full, Err(queue::Error::InFlightFull { limit: 2 })),
        "{full:?}"
    );
    broker.settle(Verb::Nack, delayed(&taken, HOUR)).await;
    let third = broker.take(1, HOUR).await;
    broker.settle(Verb::Ack, items(&third)).await;
    let received = broker.poll().await;
    assert_eq!(received.reason, Some(EmptyReason::Delayed));
    assert!(received.next_due_at.is_some());
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_queue_answers_soon_and_stays_cheap() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    for _ in 0..20 {
        broker.publish("parcels.sent", 5_000).await;
        broker.publish("orders.created", 5).await;
    }
    let began = std::time::Instant::now();
    broker
        .queue
        .declare(name(), declaration(Settings::default()))
        .await
        .unwrap();
    broker.take(100, HOUR).await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
    broker.stop().await;
    let broker = Broker::on(&database).await;
    let status = broker.status().await;
    assert_eq!(
        (status.in_flight, status.scanned_through),
        (100, Offset(100_100)),
        "no scan from the beginning"
    );
    broker.stop().await;
}
