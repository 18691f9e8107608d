//! Consumers that reject without a pause, more than is written at a time: what is due gets its turn all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use postroad::domain::policy::Settings;
use postroad::queue::Verb;
use sqlx::Executor as _;
use tokio::sync::Semaphore;

use super::{Broker, HOUR, at_once, items, shared};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_that_is_over_is_ended_beside_rejects_without_a_pause() {
    const BATCHES: usize = 90;
    let database = support::database().await;
    let settings = Settings {
        max_in_flight: 10_000,
        ..at_once(3)
    };
    let broker = shared(Broker::with(&database, settings).await);
    for _ in 0..BATCHES / 10 {
        broker.publish("orders.created", 1_000).await;
    }
    broker.publish("orders.created", 1).await;
    let taken = broker.take(BATCHES * 100, HOUR).await;
    // So that there is always more to write: each 32 letters take 20 ms.
    let mut owner = database.connect().await;
    owner
        .execute(
            "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.02); return null; end $$;
            create trigger slow before insert on postroad_broker.dead_letter for each statement execute function slow()",
        )
        .await
        .unwrap();
    let last = broker.take(1, Duration::from_secs(1)).await;
    let done = Arc::new(AtomicUsize::new(0));
    let room = Arc::new(Semaphore::new(5));
    let rejecting = {
        let (broker, done) = (Arc::clone(&broker), Arc::clone(&done));
        tokio::spawn(async move {
            for batch in taken.chunks(100) {
                let permit = Arc::clone(&room).acquire_owned().await.unwrap();
                let (broker, done) = (Arc::clone(&broker), Arc::clone(&done));
                let items = items(batch);
                tokio::spawn(async move {
                    broker.settle(Verb::Reject, items).await;
                    done.fetch_add(1, Relaxed);
                    drop(permit);
                });
            }
        })
    };
    let again = broker.take(1, HOUR).await;
    let done_by_then = done.load(Relaxed);
    println!("over after {done_by_then} of {BATCHES} batches");
    assert_eq!(again[0].entry.offset, last[0].entry.offset);
    assert_eq!(again[0].attempt, 2);
    assert!(
        done_by_then < BATCHES - 10,
        "only once all else was written"
    );
    rejecting.await.unwrap();
    support::eventually("all letters", || async {
        (broker.status().await.dead_letters == (BATCHES * 100) as u64).then_some(())
    })
    .await;
    support::eventually("the last of those that reject to end", || async {
        (Arc::strong_count(&broker) == 1).then_some(())
    })
    .await;
    Arc::into_inner(broker).unwrap().stop().await;
}
