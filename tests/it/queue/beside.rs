//! Changes of a queue run beside the engine's loop: one whose task does not answer holds up its own queue only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use postroad::domain::id::{Generation, Slot};
use postroad::domain::name::{QueueName, TopicPattern};
use postroad::domain::policy::Start;
use postroad::queue::{self, Declared, Renewal, Verb};
use tokio::task::JoinHandle;

use super::fence::{held_up, hold_journal, run};
use super::{Broker, HOUR, at_once, declaration, items, name, shared};
use crate::support::{self, TestDatabase};

const TO_START: Renewal = Renewal::Seek(Start::Earliest);
/// Far less than a task is waited for.
const SOON: Duration = Duration::from_secs(5);

fn numbered(number: usize) -> QueueName {
    QueueName::parse(&format!("queue-{number}")).unwrap()
}

/// Declares queues until one is in such a slot.
async fn queue_in(broker: &Broker, is_wanted: impl Fn(Slot) -> bool) -> (QueueName, Slot) {
    for number in 0.. {
        let declared = broker
            .queue
            .declare(numbered(number), declaration(at_once(16)));
        let slot = Slot::of(declared.await.unwrap().0.id);
        if is_wanted(slot) {
            return (numbered(number), slot);
        }
    }
    unreachable!("there are endless numbers")
}

async fn slot_of(broker: &Broker, queue: &QueueName) -> Slot {
    Slot::of(broker.queue.describe(queue).await.unwrap().id)
}

/// Has an ack of the tests' queue wait for the journal, which somebody else has locked: from now on the queue's task cannot
/// say that all it has decided is committed.
async fn stall(broker: &Broker, database: &TestDatabase) -> sqlx::PgConnection {
    broker.publish("orders.created", 3).await;
    let taken = broker.take(1, HOUR).await;
    let holder = hold_journal(database).await;
    let (queue, ack) = (broker.queue.clone(), items(&taken));
    tokio::spawn(async move { queue.settle(&name(), Verb::Ack, ack).await });
    held_up(database).await;
    holder
}

/// Whatever may be asked of another queue is answered, and its slot's lease comes and goes, while this change waits.
async fn nothing_else_waits<T>(
    broker: &Broker,
    database: &TestDatabase,
    (other, slot): (&QueueName, Slot),
    change: &JoinHandle<T>,
) {
    let rest = async {
        let renewed = broker.queue.renew(other, TO_START, None).await.unwrap();
        broker.queue.set_paused(other, true).await.unwrap();
        broker.queue.set_paused(other, false).await.unwrap();
        let changed = broker
            .queue
            .declare(other.clone(), declaration(at_once(15)));
        assert_eq!(changed.await.unwrap().1, Declared::Changed);
        broker.queue.look_up(other).await.unwrap();
        let new = QueueName::parse(&format!("new-{}", renewed.generation)).unwrap();
        let declared = broker.queue.declare(new.clone(), declaration(at_once(16)));
        assert_eq!(declared.await.unwrap().1, Declared::Created);
        broker.queue.delete(&new).await.unwrap();
        // The slot's lease is lost, taken again at another epoch, and its queues are recovered.
        sqlx::query(
            "update postroad_broker.lease set epoch = epoch + 1, holder = null where name = $1",
        )
        .bind(slot.lease_name())
        .execute(&mut database.connect().await)
        .await
        .unwrap();
        support::eventually("a seek under the next epoch", || async {
            broker.queue.renew(other, TO_START, None).await.ok()
        })
        .await;
        renewed
    };
    let renewed = tokio::time::timeout(SOON, rest).await;
    assert!(!change.is_finished(), "it was to wait meanwhile");
    assert!(renewed.is_ok(), "it held up another queue");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_of_a_queue_that_does_not_answer_holds_up_no_other() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    let stuck = slot_of(&broker, &name()).await;
    let (other, slot) = queue_in(&broker, |slot| slot != stuck).await;
    let mut holder = stall(&broker, &database).await;
    let queue = broker.queue.clone();
    let seek = tokio::spawn(async move { queue.renew(&name(), TO_START, None).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    nothing_else_waits(&broker, &database, (&other, slot), &seek).await;
    run(&mut holder, "rollback").await;
    assert_eq!(seek.await.unwrap().unwrap().generation, Generation(2));
    assert_eq!(broker.take(3, HOUR).await[0].entry.offset.0, 1);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_topics_of_a_queue_that_does_not_answer_holds_up_no_other() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    let stuck = slot_of(&broker, &name()).await;
    let (other, slot) = queue_in(&broker, |slot| slot != stuck).await;
    let mut holder = stall(&broker, &database).await;
    let queue = broker.queue.clone();
    let change = tokio::spawn(async move {
        let mut topics = declaration(at_once(16));
        topics.topics = vec![TopicPattern::parse("orders.created").unwrap()];
        queue.declare(name(), topics).await
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    nothing_else_waits(&broker, &database, (&other, slot), &change).await;
    run(&mut holder, "rollback").await;
    assert_eq!(change.await.unwrap().unwrap().1, Declared::Changed);
    assert_eq!(broker.take(2, HOUR).await.len(), 2);
    broker.stop().await;
}

/// A seek that waits in vain leaves everything as it was: the queue goes on where it is, and the others of its slot are not
/// read again.
#[tokio::test(flavor = "multi_thread")]
async fn a_seek_that_waits_in_vain_takes_nobody_away() {
    let database = support::database().await;
    let options = queue::Options {
        outcome_wait: Duration::from_millis(500),
        ..queue::Options::default()
    };
    let broker = Broker::start(&database.url, &database.url, options).await;
    let declared = broker.queue.declare(name(), declaration(at_once(16)));
    let stuck = Slot::of(declared.await.unwrap().0.id);
    let (sibling, _) = queue_in(&broker, |slot| slot == stuck).await;
    let mut holder = stall(&broker, &database).await;
    let broker = shared(broker);
    let (was_away, is_over) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let watch = {
        let (broker, was_away, is_over) = (broker.clone(), was_away.clone(), is_over.clone());
        tokio::spawn(async move {
            while !is_over.load(Ordering::Acquire) {
                let are_here = broker.queue.is_here(&sibling) && broker.queue.is_here(&name());
                was_away.fetch_or(!are_here, Ordering::AcqRel);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    };
    let refused = broker.queue.renew(&name(), TO_START, None).await;
    assert!(
        matches!(
            refused,
            Err(queue::Error::Unavailable { .. } | queue::Error::OutcomeUnknown)
        ),
        "{refused:?}"
    );
    // In line behind the first, so that this is over when it is answered.
    let queue = broker.queue.clone();
    let next = tokio::spawn(async move { queue.set_paused(&name(), false).await });
    next.await.unwrap().unwrap();
    run(&mut holder, "rollback").await;
    assert_eq!(broker.take(2, HOUR).await[0].entry.offset.0, 2);
    is_over.store(true, Ordering::Release);
    watch.await.unwrap();
    assert!(!was_away.load(Ordering::Acquire), "its slot was read again");
    let description = broker.queue.describe(&name()).await.unwrap();
    assert_eq!(description.generation, Generation(1));
    broker
        .supervisor
        .stop(Duration::from_secs(20))
        .await
        .unwrap();
}

/// Changes of one queue follow each other, whoever asks.
#[tokio::test(flavor = "multi_thread")]
async fn changes_of_one_queue_follow_each_other() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 2).await;
    let seeks: Vec<_> = (0..20)
        .map(|number| {
            let queue = broker.queue.clone();
            tokio::spawn(async move {
                queue.set_paused(&name(), number % 2 == 0).await.unwrap();
                queue.renew(&name(), TO_START, None).await.unwrap()
            })
        })
        .collect();
    let mut generations = Vec::new();
    for seek in seeks {
        generations.push(seek.await.unwrap().generation.0);
    }
    generations.sort_unstable();
    assert_eq!(generations, (2..22).collect::<Vec<i64>>());
    broker.queue.set_paused(&name(), false).await.unwrap();
    assert_eq!(broker.take(2, HOUR).await[0].entry.offset.0, 1);
    broker.stop().await;
}
