//! Many queues: the slot's row of positions, and one queue whose journal the database refuses.

use std::time::Duration;

use postroad::domain::id::{QueueId, Slot};
use postroad::domain::name::{QueueName, TopicPattern};
use postroad::queue::{self, Declaration, ReceiveRequest, Received, Verb};
use sqlx::AssertSqlSafe;

use super::{Broker, HOUR, at_once, declaration, items, name};
use crate::support::{self, TestDatabase};

async fn execute(database: &TestDatabase, statement: &str) {
    sqlx::query(AssertSqlSafe(statement.to_owned()))
        .execute(&mut database.connect().await)
        .await
        .unwrap();
}

/// Starts a broker that writes the positions of slots all the time.
async fn start(database: &TestDatabase) -> Broker {
    let options = queue::Options {
        positions_every: Duration::from_millis(20),
        position_worth: 1,
        ..queue::Options::default()
    };
    Broker::start(&database.url, &database.url, options).await
}

async fn position(database: &TestDatabase) -> i64 {
    let row: Option<(Vec<i64>,)> =
        sqlx::query_as("select throughs from postroad_broker.queue_position")
            .fetch_optional(&mut database.connect().await)
            .await
            .unwrap();
    row.map_or(0, |(throughs,)| throughs[0])
}

async fn position_reaches(database: &TestDatabase, offset: i64) {
    support::eventually("the slot's position", || async {
        (position(database).await >= offset).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_goes_on_from_the_slots_position_after_a_restart() {
    let database = support::database().await;
    let broker = start(&database).await;
    let declared = broker.queue.declare(name(), declaration(at_once(16))).await;
    declared.unwrap();
    broker.publish("orders.created", 5).await;
    let taken = broker.take(5, HOUR).await;
    assert_eq!(position(&database).await, 0, "nothing is settled yet");
    broker.settle(Verb::Ack, items(&taken)).await;
    broker.publish("others.created", 95).await;
    position_reaches(&database, 100).await;
    broker.publish("orders.created", 20).await;
    broker.kill();

    // The row is what is believed: with another offset the queue misses what is before it.
    execute(
        &database,
        "update postroad_broker.queue_position set throughs = '{110}'",
    )
    .await;
    let broker = start(&database).await;
    let taken = broker.take(10, HOUR).await;
    assert_eq!(taken[0].entry.offset.0, 111);
    assert!(broker.poll().await.deliveries.is_empty());
    broker.settle(Verb::Ack, items(&taken)).await;
    position_reaches(&database, 120).await;
    broker.kill();

    // In another generation it says nothing.
    execute(
        &database,
        "update postroad_broker.queue_position set throughs = '{1000}', generations = '{7}'",
    )
    .await;
    let broker = start(&database).await;
    broker.publish("orders.created", 1).await;
    assert_eq!(broker.take(1, HOUR).await[0].entry.offset.0, 121);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unsettled_at_the_slots_position_comes_back() {
    let database = support::database().await;
    let broker = start(&database).await;
    let declared = broker.queue.declare(name(), declaration(at_once(16))).await;
    declared.unwrap();
    broker.publish("others.created", 50).await;
    position_reaches(&database, 50).await;
    broker.publish("orders.created", 2).await;
    broker.publish("others.created", 50).await;
    let taken = broker.take(1, HOUR).await;
    broker.settle(Verb::Ack, items(&taken)).await;
    let status = broker.status().await;
    assert_eq!((status.depth, status.watermark.0), (1, 51));
    assert!(position(&database).await <= 51);
    broker.kill();
    let broker = start(&database).await;
    let taken = broker.take(1, HOUR).await;
    assert_eq!(
        (taken[0].entry.offset.0, taken[0].attempt, taken[0].delivery),
        (52, 1, 1)
    );
    broker.settle(Verb::Ack, items(&taken)).await;
    position_reaches(&database, 102).await;
    broker.stop().await;
}

async fn receive(broker: &Broker, queue: &QueueName) -> Result<Received, queue::Error> {
    let request = ReceiveRequest {
        max_messages: 1,
        wait: Duration::from_secs(5),
        visibility_timeout: Some(HOUR),
        ..ReceiveRequest::default()
    };
    broker.queue.receive(queue, request).await
}

async fn epoch(database: &TestDatabase, slot: Slot) -> i64 {
    sqlx::query_scalar("select epoch from postroad_broker.lease where name = $1")
        .bind(slot.lease_name())
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_whose_journal_is_refused_takes_no_other_of_its_slot_with_it() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    // Two queues of one slot.
    let mut of_slots: Vec<(Slot, QueueName, QueueId)> = Vec::new();
    let ((_, refused, id), (slot, other, _)) = loop {
        let name = QueueName::parse(&format!("queue-{}", of_slots.len())).unwrap();
        let declaration = Declaration {
            topics: vec![TopicPattern::parse("orders.>").unwrap()],
            ..declaration(at_once(16))
        };
        let (made, _) = broker
            .queue
            .declare(name.clone(), declaration)
            .await
            .unwrap();
        let new = (Slot::of(made.id), name, made.id);
        if let Some(found) = of_slots.iter().find(|(slot, ..)| *slot == new.0) {
            break (found.clone(), new);
        }
        of_slots.push(new);
    };
    execute(
        &database,
        &format!(
            "create function refuse() returns trigger language plpgsql as $$ begin \
             if new.queue_id = {id} then raise check_violation using message = 'refused'; end if; return new; end $$"
        ),
    )
    .await;
    execute(
        &database,
        "create trigger refuse before insert on postroad_broker.queue_journal for each row execute function refuse()",
    )
    .await;
    broker.publish("orders.created", 200).await;
    let before = epoch(&database, slot).await;
    let refusals = async {
        for _ in 0..3 {
            assert!(receive(&broker, &refused).await.is_err());
        }
    };
    let work = async {
        for _ in 0..100 {
            let received = receive(&broker, &other).await.unwrap();
            let items = items(&received.deliveries);
            received.handout.written();
            broker.queue.settle(&other, Verb::Ack, items).await.unwrap();
        }
    };
    tokio::join!(refusals, work);
    assert_eq!(epoch(&database, slot).await, before, "the slot went on");
    execute(
        &database,
        "drop trigger refuse on postroad_broker.queue_journal",
    )
    .await;
    let received = support::eventually("the refused queue", || async {
        receive(&broker, &refused).await.ok()
    })
    .await;
    let first = &received.deliveries[0];
    assert_eq!((first.entry.offset.0, first.attempt), (1, 1));
    broker.stop().await;
}
