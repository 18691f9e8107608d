//! Receives that carry acknowledgements, batches that fill, and fairness among those that wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use postroad::domain::policy::Settings;
use postroad::domain::queue::EmptyReason;
use postroad::queue::{Delivery, Outcome, ReceiveRequest, Verb};

use super::{Broker, HOUR, at_once, declaration, items, name, shared};
use crate::support;

async fn start(settings: Settings) -> (support::TestDatabase, Arc<Broker>) {
    let database = support::database().await;
    let broker = shared(Broker::on(&database).await);
    let declaration = declaration(settings);
    broker.queue.declare(name(), declaration).await.unwrap();
    (database, broker)
}

fn receipts(deliveries: &[Delivery]) -> Vec<String> {
    let receipts = deliveries.iter().map(|delivery| delivery.receipt.clone());
    receipts.collect()
}

fn receive(max_messages: u32, ack: Vec<String>) -> ReceiveRequest {
    ReceiveRequest {
        max_messages,
        ack,
        visibility_timeout: Some(HOUR),
        ..ReceiveRequest::default()
    }
}

/// Waits until so many long polls wait.
async fn waiting(broker: &Broker, count: u64) {
    support::eventually("the waiters", || async {
        (broker.status().await.waiters == count).then_some(())
    })
    .await;
}

/// Starts a receive beside the test, and gives the number of what it got.
fn begin(broker: &Arc<Broker>, request: ReceiveRequest) -> tokio::task::JoinHandle<usize> {
    let broker = Arc::clone(broker);
    tokio::spawn(async move {
        let received = broker.receive(request).await;
        received.handout.written();
        received.deliveries.len()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_along_is_acknowledged_while_the_receive_waits_and_stays_so() {
    let (database, broker) = start(at_once(16)).await;
    broker.publish("orders.created", 3).await;
    let taken = broker.take(3, HOUR).await;
    let waiter = begin(&broker, receive(1, receipts(&taken[..2])));
    waiting(&broker, 1).await;
    support::eventually("the acknowledged to be out of flight", || async {
        let status = broker.status().await;
        ((status.in_flight, status.depth, status.waiters) == (1, 1, 1)).then_some(())
    })
    .await;
    // The caller is gone: what it acknowledged is not undone.
    waiter.abort();
    let _ = waiter.await;
    waiting(&broker, 0).await;

    let broker = Arc::into_inner(broker).unwrap();
    let queue = name();
    let begun = broker
        .queue
        .begin_receive(&queue, receive(1, receipts(&taken[2..])));
    let begun = begun.await.unwrap();
    assert_eq!(
        begun.acked,
        [Outcome::Acked],
        "told before the wait is over"
    );
    broker.kill();
    let broker = Broker::on(&database).await;
    let again = broker.settle(Verb::Ack, items(&taken)).await;
    assert!(
        again
            .iter()
            .all(|outcome| *outcome == Outcome::AlreadySettled),
        "{again:?}"
    );
    assert_eq!(broker.status().await.depth, 0);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_after_a_kill_gets_the_same_deliveries_and_acknowledges_once() {
    let (database, broker) = start(at_once(16)).await;
    broker.publish("orders.created", 5).await;
    let taken = broker.take(2, HOUR).await;
    let mut request = receive(3, receipts(&taken));
    request.receive_id = Some("r1".into());
    let first = broker.receive(request.clone()).await;
    assert_eq!(first.acked, [Outcome::Acked, Outcome::Acked]);
    let deliveries = receipts(&first.deliveries);
    assert_eq!(deliveries.len(), 3);
    first.handout.written();
    Arc::into_inner(broker).unwrap().kill();

    let broker = Broker::on(&database).await;
    let repeated = broker.receive(request.clone()).await;
    assert_eq!(
        repeated.acked,
        [Outcome::AlreadySettled, Outcome::AlreadySettled]
    );
    assert_eq!(receipts(&repeated.deliveries), deliveries);
    repeated.handout.written();
    // Under the same id, what it acknowledges itself is not handed out again.
    request.ack = deliveries;
    request.wait = Duration::ZERO;
    let last = broker.receive(request).await;
    assert_eq!(last.acked, vec![Outcome::Acked; 3]);
    assert!(last.deliveries.is_empty());
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgements_and_deliveries_are_one_row_of_the_journal() {
    let (database, broker) = start(at_once(16)).await;
    broker.publish("orders.created", 20).await;
    let mut held = receipts(&broker.take(2, HOUR).await);
    let rows = || async {
        let count = "select count(*) from postroad_broker.queue_journal";
        let (count,): (i64,) = sqlx::query_as(count)
            .fetch_one(&mut database.connect().await)
            .await
            .unwrap();
        count
    };
    let before = rows().await;
    assert!(before > 0);
    for round in 1..=9 {
        let received = broker.receive(receive(2, held)).await;
        assert_eq!(received.acked, [Outcome::Acked, Outcome::Acked]);
        held = receipts(&received.deliveries);
        received.handout.written();
        assert_eq!((held.len(), rows().await - before), (2, round));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_acknowledged_makes_room_in_a_full_queue() {
    let (_database, broker) = start(Settings {
        max_in_flight: 2,
        ..at_once(16)
    })
    .await;
    broker.publish("orders.created", 4).await;
    let taken = broker.take(2, HOUR).await;
    let mut request = receive(2, vec!["no receipt".into()]);
    request.wait = Duration::ZERO;
    let full = broker.receive(request.clone()).await;
    // Not the error that a receive without acknowledgements gets: what became of them must be told.
    assert_eq!(full.acked, [Outcome::Unknown]);
    assert_eq!(full.reason, Some(EmptyReason::InFlightFull));
    request.ack = receipts(&taken);
    request.ack.insert(1, "no receipt".into());
    let received = broker.receive(request).await;
    assert_eq!(
        received.acked,
        [Outcome::Acked, Outcome::Unknown, Outcome::Acked]
    );
    assert_eq!(
        received.deliveries.len(),
        2,
        "refused or not, the receive goes on"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_fills_as_long_as_was_asked_for_and_holds_nobody_up() {
    let (_database, broker) = start(at_once(16)).await;
    let patient = |seconds: f64| ReceiveRequest {
        batch_wait: Duration::from_secs_f64(seconds),
        ..receive(4, Vec::new())
    };
    // It goes out when it is full: four messages come one by one, and nothing short of a minute's patience is waited for.
    let filling = begin(
        &broker,
        ReceiveRequest {
            wait: Duration::from_secs(50),
            ..patient(5.0)
        },
    );
    waiting(&broker, 1).await;
    for _ in 0..4 {
        broker.publish("orders.created", 1).await;
    }
    assert_eq!(filling.await.unwrap(), 4);

    // One that wants what there is does not wait for the batch of another.
    let filling = begin(&broker, patient(5.0));
    waiting(&broker, 1).await;
    broker.publish("orders.created", 1).await;
    assert_eq!(begin(&broker, receive(4, Vec::new())).await.unwrap(), 1);
    // Nor is the batch held beyond its time.
    broker.publish("orders.created", 3).await;
    assert_eq!(filling.await.unwrap(), 3);

    // Nor beyond the wait of the receive itself.
    let short = ReceiveRequest {
        wait: Duration::from_secs(1),
        ..patient(5.0)
    };
    let filling = begin(&broker, short);
    waiting(&broker, 1).await;
    broker.publish("orders.created", 1).await;
    assert_eq!(filling.await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_waiters_are_served_evenly() {
    let (_database, broker) = start(at_once(16)).await;
    for _ in 0..5 {
        let waiters: Vec<_> = (0..100)
            .map(|_| begin(&broker, receive(1, Vec::new())))
            .collect();
        waiting(&broker, 100).await;
        broker.publish("orders.created", 100).await;
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_waiter_waits_its_turn() {
    let (_database, broker) = start(at_once(16)).await;
    let count = |max_messages: u32| {
        let (broker, got) = (Arc::clone(&broker), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&got);
        let task = tokio::spawn(async move {
            loop {
                let received = broker.receive(receive(max_messages, Vec::new())).await;
                counted.fetch_add(received.deliveries.len(), Relaxed);
                received.handout.written();
            }
        });
        (task, got)
    };
    let mut consumers = vec![count(1_000)];
    waiting(&broker, 1).await;
    consumers.extend((0..9).map(|_| count(1)));
    for round in 1..=6 {
        waiting(&broker, 10).await;
        broker.publish("orders.created", 20).await;
        support::eventually("all to be handed out", || async {
            let got: usize = consumers.iter().map(|(_, got)| got.load(Relaxed)).sum();
            (got == 20 * round).then_some(())
        })
        .await;
    }
    let got: Vec<usize> = consumers.iter().map(|(_, got)| got.load(Relaxed)).collect();
    // Whoever is passed over in one round, since the greedy one came before, is served in the next.
    assert!(got[1..].iter().all(|&count| count >= 3), "{got:?}");
    for (task, _) in consumers {
        task.abort();
    }
}
