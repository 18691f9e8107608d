//! What must hold when the broker is killed, fenced, or stopped in order.

use std::time::Duration;

use postroad::domain::name::TopicPattern;
use postroad::domain::policy::{Ordering, Settings};
use postroad::queue::{self, InFlight, InFlightFilter, Verb, VerbItem};

use super::{Broker, HOUR, at_once, declaration, delayed, items, name};
use crate::support;

async fn in_flight(broker: &Broker) -> Vec<InFlight> {
    let filter = InFlightFilter {
        limit: 1_000,
        ..InFlightFilter::default()
    };
    support::eventually("the in-flight list", || async {
        broker.queue.in_flight(&name(), filter.clone()).await.ok()
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_forgets_no_deadline_attempt_or_delay() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 1_000).await;
    for _ in 0..2 {
        let taken = broker.take(1_000, HOUR).await;
        broker.settle(Verb::Nack, items(&taken)).await;
    }
    let taken = broker.take(1_000, HOUR).await;
    assert!(
        taken
            .iter()
            .all(|delivery| delivery.attempt == 3 && delivery.delivery == 3)
    );
    broker.settle(Verb::Nack, delayed(&taken[..10], HOUR)).await;
    let extend_by = Some(2 * HOUR);
    let extended = items(&taken[10..11])
        .into_iter()
        .map(|item| VerbItem { extend_by, ..item });
    broker.settle(Verb::Extend, extended.collect()).await;
    broker.settle(Verb::Ack, items(&taken[11..20])).await;
    let (before, status) = (in_flight(&broker).await, broker.status().await);
    assert_eq!((before.len(), status.delayed, status.depth), (981, 10, 991));

    broker.kill();
    let broker = Broker::on(&database).await;
    let received = broker.poll().await;
    assert!(
        received.deliveries.is_empty(),
        "nothing before its deadline"
    );
    assert_eq!(
        received.reason,
        Some(postroad::domain::queue::EmptyReason::Delayed)
    );
    assert_eq!(in_flight(&broker).await, before);
    let after = broker.status().await;
    assert_eq!(
        (after.delayed, after.depth, after.watermark),
        (10, 991, status.watermark)
    );
    let outcomes = broker.settle(Verb::Ack, items(&taken[20..])).await;
    assert!(
        outcomes
            .iter()
            .all(|outcome| *outcome == queue::Outcome::Acked)
    );

    broker.stop().await;
    let broker = Broker::on(&database).await;
    assert_eq!(
        in_flight(&broker).await.len(),
        1,
        "after a stop in order too"
    );
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_between_deliveries_is_not_in_flight_after_a_kill() {
    let database = support::database().await;
    let ordered = Settings {
        ordering: Ordering::Key,
        ..at_once(16)
    };
    let broker = Broker::with(&database, ordered).await;
    let keys = [Some("a"), Some("a"), Some("b"), None];
    broker.publish_keyed("orders.created", &keys).await;
    broker.take(3, HOUR).await;
    let offsets =
        |all: Vec<InFlight>| -> Vec<i64> { all.iter().map(|delivery| delivery.offset.0).collect() };
    assert_eq!(offsets(in_flight(&broker).await), [1, 3, 4]);
    broker.kill();
    let broker = Broker::on(&database).await;
    assert_eq!(
        offsets(in_flight(&broker).await),
        [1, 3, 4],
        "after the kill"
    );
    assert_eq!(broker.status().await.waiting, 1);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_owner_drops_its_work_and_takes_the_queue_again() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 10).await;
    let taken = broker.take(5, HOUR).await;
    sqlx::query("update postroad_broker.lease set epoch = epoch + 1, holder = null where name like 'slot/%'")
        .execute(&mut database.connect().await)
        .await
        .unwrap();
    let written_by_former_owners = || async {
        sqlx::query_scalar::<_, i64>(
            "select count(*) from postroad_broker.queue_journal j \
             join postroad_broker.lease l on l.name = 'slot/' || j.slot where j.epoch < l.epoch",
        )
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap()
    };
    let before = written_by_former_owners().await;
    // The former owner is refused. A node that has taken the slot again meanwhile acknowledges under the new epoch.
    let refused = broker.queue.settle(&name(), Verb::Ack, items(&taken)).await;
    assert!(
        matches!(refused, Err(queue::Error::NotOwner { .. }) | Ok(_)),
        "{refused:?}"
    );
    assert_eq!(
        written_by_former_owners().await,
        before,
        "nothing of the former epoch is written"
    );
    let outcomes = broker.settle(Verb::Ack, items(&taken)).await;
    let expected = match refused {
        Err(_) => queue::Outcome::Acked,
        Ok(_) => queue::Outcome::AlreadySettled,
    };
    assert!(outcomes.iter().all(|outcome| *outcome == expected));
    let rest = broker.take(5, HOUR).await;
    assert!(rest.iter().all(|delivery| delivery.delivery == 1));
    broker.stop().await;
}

/// The scan position in memory is ahead of the journal's when the topics change; what was found by the former topics is not
/// forgotten by a kill, and what they passed over does not come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_topics_holds_from_the_same_place_after_a_kill() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("parcels.sent", 3).await;
    broker.publish("orders.created", 5).await;
    let five = async |broker: &Broker| {
        support::eventually("five messages to be found", || async {
            (broker.status().await.depth == 5).then_some(())
        })
        .await;
    };
    five(&broker).await;
    let parcels = queue::Declaration {
        topics: vec![TopicPattern::parse("parcels.>").unwrap()],
        ..declaration(at_once(16))
    };
    broker.queue.declare(name(), parcels).await.unwrap();
    broker.kill();
    let broker = Broker::on(&database).await;
    five(&broker).await;
    broker.publish("parcels.sent", 1).await;
    let offsets = broker.take(6, HOUR).await;
    let offsets: Vec<i64> = offsets.iter().map(|taken| taken.entry.offset.0).collect();
    assert_eq!(offsets, [4, 5, 6, 7, 8, 9]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_journal_turns_and_its_segments_are_emptied() {
    let database = support::database().await;
    let options = queue::Options {
        journal_full_bytes: 8_192,
        ..queue::Options::default()
    };
    let broker = Broker::start(&database.url, &database.url, options.clone()).await;
    broker
        .queue
        .declare(name(), declaration(at_once(16)))
        .await
        .unwrap();
    broker.publish("orders.created", 600).await;
    let kept = broker.take(100, HOUR).await;
    for _ in 0..50 {
        let taken = broker.take(5, HOUR).await;
        broker.settle(Verb::Ack, items(&taken)).await;
    }
    support::eventually("a turn, with the former segment emptied", || async {
        let (turn, full): (i64, i64) = sqlx::query_as(
            "select t.turn, (select count(distinct j.segment) from postroad_broker.queue_journal j \
               where j.segment <> t.turn % 4) from postroad_broker.queue_journal_turn t",
        )
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap();
        (turn > 0 && full == 0).then_some(())
    })
    .await;
    broker.kill();
    let broker = Broker::start(&database.url, &database.url, options).await;
    assert_eq!(in_flight(&broker).await.len(), 100);
    let outcomes = broker.settle(Verb::Ack, items(&kept)).await;
    assert!(
        outcomes
            .iter()
            .all(|outcome| *outcome == queue::Outcome::Acked)
    );
    broker.take(250, Duration::from_secs(60)).await;
    assert_eq!(broker.status().await.ready, 0);
    broker.stop().await;
}

/// A dump may read its snapshot long after it was taken. TRUNCATE takes rows from every snapshot, so a segment stays while one is held
/// that has the checkpoints of before.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_before_a_turn_has_the_journal_that_goes_with_its_checkpoints() {
    let database = support::database().await;
    let options = queue::Options {
        journal_full_bytes: 8_192,
        ..queue::Options::default()
    };
    let broker = Broker::start(&database.url, &database.url, options).await;
    let declared = broker.queue.declare(name(), declaration(at_once(16))).await;
    declared.unwrap();
    broker.publish("orders.created", 600).await;
    let taken = broker.take(50, HOUR).await;
    broker.settle(Verb::Ack, items(&taken)).await;
    const ROWS: &str = "select count(*) from postroad_broker.queue_journal";
    let mut old = database.connect().await;
    sqlx::raw_sql("begin isolation level repeatable read; select count(*) from postroad_broker.queue_checkpoint")
        .execute(&mut old)
        .await
        .unwrap();
    let rows: i64 = sqlx::query_scalar(ROWS)
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap();
    assert!(rows > 0);
    for _ in 0..50 {
        let taken = broker.take(5, HOUR).await;
        broker.settle(Verb::Ack, items(&taken)).await;
    }
    support::eventually("every checkpoint to be past the first segment", || async {
        let is_folded: bool = sqlx::query_scalar(
            "select t.turn > 0 and not exists (select from postroad_broker.queue_journal_0 j \
                left join postroad_broker.queue_checkpoint c on c.queue_id = j.queue_id \
                where c.queue_id is null or (c.epoch, c.number) < (j.epoch, j.number)) \
             from postroad_broker.queue_journal_turn t",
        )
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap();
        is_folded.then_some(())
    })
    .await;
    // The engine looks every two seconds.
    tokio::time::sleep(Duration::from_millis(4_500)).await;
    let in_snapshot: i64 = sqlx::query_scalar(ROWS).fetch_one(&mut old).await.unwrap();
    assert_eq!(in_snapshot, rows);
    sqlx::raw_sql("rollback").execute(&mut old).await.unwrap();
    support::eventually("the first segment to be emptied", || async {
        let left: i64 = sqlx::query_scalar("select count(*) from postroad_broker.queue_journal_0")
            .fetch_one(&mut database.connect().await)
            .await
            .unwrap();
        (left == 0).then_some(())
    })
    .await;
    broker.stop().await;
}
