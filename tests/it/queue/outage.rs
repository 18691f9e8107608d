//! Postgres goes away: its outcome is found out, and nobody is charged.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use postroad::queue::{self, Outcome, Verb};

use super::{Broker, HOUR, at_once, declaration, items, name};
use crate::support::{self, Action, Direction};

#[tokio::test(flavor = "multi_thread")]
async fn a_group_of_unknown_outcome_is_written_once() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let broker = Broker::start(
        &database.url,
        &proxy.url(&database.url),
        queue::Options::default(),
    )
    .await;
    broker
        .queue
        .declare(name(), declaration(at_once(16)))
        .await
        .unwrap();
    broker.publish("orders.created", 40).await;
    broker.take(1, HOUR).await;
    // The answers to the next calls are lost after the server has carried them out.
    for round in 0..5 {
        let armed = Arc::new(AtomicUsize::new(1));
        let left = Arc::clone(&armed);
        proxy.filter(move |direction, _| {
            let is_answer = direction == Direction::ToClient;
            let cut = is_answer
                && left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                    .is_ok();
            if cut {
                Action::CutBefore
            } else {
                Action::Forward
            }
        });
        let taken = broker.take(5, HOUR).await;
        assert_eq!(
            armed.load(Ordering::SeqCst),
            0,
            "the answer was cut in round {round}"
        );
        proxy.no_filter();
        assert!(
            taken.iter().all(|delivery| delivery.delivery == 1),
            "{taken:?}"
        );
        let outcomes = broker.settle(Verb::Ack, items(&taken)).await;
        assert!(
            outcomes.iter().all(|outcome| *outcome == Outcome::Acked),
            "{outcomes:?}"
        );
    }
    let twice: i64 = sqlx::query_scalar(
        "select count(*) from (select from postroad_broker.queue_journal \
         group by slot, epoch, number, queue_id having count(*) > 1) t",
    )
    .fetch_one(&mut database.connect().await)
    .await
    .unwrap();
    assert_eq!(twice, 0);
    broker.kill();
    let broker = Broker::on(&database).await;
    support::eventually("one in flight and fourteen others", || async {
        let status = broker.status().await;
        ((status.in_flight, status.depth) == (1, 15)).then_some(())
    })
    .await;
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_charges_nobody() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let broker = Broker::start(
        &database.url,
        &proxy.url(&database.url),
        queue::Options::default(),
    )
    .await;
    // One attempt: an expiry is a dead letter.
    broker
        .queue
        .declare(name(), declaration(at_once(1)))
        .await
        .unwrap();
    broker.publish("orders.created", 1_000).await;
    let taken = broker.take(1_000, Duration::from_secs(3)).await;
    proxy.cut();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(broker.status().await.standing_still);
    proxy.open();
    let outcomes = broker.settle(Verb::Ack, items(&taken[..500])).await;
    assert!(
        outcomes.iter().all(|outcome| *outcome == Outcome::Acked),
        "{:?}",
        outcomes[0]
    );
    let status = broker.status().await;
    assert_eq!((status.in_flight, status.dead_letters), (500, 0));
    // Now their time runs, and is up.
    support::eventually("the rest to run out of attempts", || async {
        (broker.status().await.dead_letters == 500).then_some(())
    })
    .await;
    broker.stop().await;
}

/// A standby, or a wrong password, for a moment: the group that waited is refused, and the outage must end all the same.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_that_ends_in_a_refusal_ends() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let broker = Broker::start(
        &database.url,
        &proxy.url(&database.url),
        queue::Options::default(),
    )
    .await;
    broker
        .queue
        .declare(name(), declaration(at_once(16)))
        .await
        .unwrap();
    broker.publish("orders.created", 2).await;
    let taken = broker.take(1, HOUR).await;
    proxy.cut();
    let (queue, receipts) = (broker.queue.clone(), items(&taken));
    let refused = tokio::spawn(async move { queue.settle(&name(), Verb::Ack, receipts).await });
    support::eventually("the queue to stand still", || async {
        broker.status().await.standing_still.then_some(())
    })
    .await;
    let function = "alter function postroad_broker.";
    let rename = async |from: &str, to: &str| {
        let statement = format!("{function}{from} rename to {to}");
        sqlx::query(sqlx::AssertSqlSafe(statement))
            .execute(&mut database.connect().await)
            .await
            .unwrap();
    };
    rename("write_queue_group", "refused").await;
    proxy.open();
    let refused = refused.await.unwrap();
    assert!(refused.is_err(), "{refused:?}");
    rename("refused", "write_queue_group").await;
    support::eventually("the outage to end", || async {
        (!broker.status().await.standing_still).then_some(())
    })
    .await;
    broker.take(1, HOUR).await;
    let outcomes = broker.settle(Verb::Ack, items(&taken)).await;
    assert_eq!(outcomes, [Outcome::Acked]);
    broker.stop().await;
}
