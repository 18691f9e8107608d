//! Seek and purge begin a new generation, and pause hands nothing out: over kills, lost answers and retention.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chrono::Utc;
use postroad::domain::id::{Generation, Offset};
use postroad::domain::policy::Start;
use postroad::domain::queue::EmptyReason;
use postroad::queue::{self, Outcome, ReceiveRequest, Renewal, Renewed, Verb};

use super::{Broker, HOUR, at_once, declaration, items, name, shared};
use crate::support::{self, Action, Direction};

const GONE: Outcome = Outcome::Gone { incident: false };
const TO_START: Renewal = Renewal::Seek(Start::Earliest);

async fn begin(count: usize) -> (support::TestDatabase, Broker) {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", count).await;
    (database, broker)
}

fn offsets(deliveries: &[queue::Delivery]) -> Vec<i64> {
    deliveries.iter().map(|one| one.entry.offset.0).collect()
}

fn renewed(generation: i64, through: i64) -> Renewed {
    Renewed {
        generation: Generation(generation),
        through_offset: Offset(through),
        at_floor: false,
        ahead: false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_goes_back_and_receipts_of_before_are_gone_also_after_a_kill() {
    let (database, broker) = begin(5).await;
    let taken = broker.take(5, HOUR).await;
    broker.settle(Verb::Ack, items(&taken[..3])).await;
    let done = broker.queue.renew(&name(), TO_START, None).await.unwrap();
    assert_eq!(done, renewed(2, 0));
    for verb in [
        Verb::Ack,
        Verb::Nack,
        Verb::Release,
        Verb::Extend,
        Verb::Reject,
    ] {
        let outcomes = broker.settle(verb, items(&taken)).await;
        assert!(
            outcomes.iter().all(|outcome| *outcome == GONE),
            "{outcomes:?}"
        );
    }
    let again = broker.take(5, HOUR).await;
    assert_eq!(offsets(&again), [1, 2, 3, 4, 5]);
    assert!(
        again
            .iter()
            .all(|one| (one.delivery, one.attempt) == (1, 1))
    );
    broker.settle(Verb::Ack, items(&again[..2])).await;
    broker.kill();
    let broker = Broker::on(&database).await;
    let outcomes = broker.settle(Verb::Ack, items(&taken)).await;
    assert!(outcomes.iter().all(|outcome| *outcome == GONE));
    let outcomes = broker.settle(Verb::Ack, items(&again)).await;
    let settled = [Outcome::AlreadySettled, Outcome::AlreadySettled];
    assert_eq!(outcomes[..2], settled);
    assert!(
        outcomes[2..]
            .iter()
            .all(|outcome| *outcome == Outcome::Acked)
    );
    let description = broker.queue.describe(&name()).await.unwrap();
    assert_eq!(
        (description.generation, description.start_offset),
        (Generation(2), Offset(1))
    );
    // To an offset, and to a time before everything.
    let to_three = Renewal::Seek(Start::Offset(Offset(3)));
    let done = broker.queue.renew(&name(), to_three, None).await.unwrap();
    assert_eq!(done, renewed(3, 2));
    assert_eq!(offsets(&broker.take(3, HOUR).await), [3, 4, 5]);
    let long_ago = Renewal::Seek(Start::Time(Utc::now() - Duration::from_secs(3_600)));
    let done = broker.queue.renew(&name(), long_ago, None).await.unwrap();
    assert_eq!(done, renewed(4, 0));
    assert_eq!(broker.take(5, HOUR).await.len(), 5);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_passes_over_everything_and_scans_nothing() {
    let (database, broker) = begin(1_000).await;
    let taken = broker.take(10, HOUR).await;
    let done = broker
        .queue
        .renew(&name(), Renewal::Purge, None)
        .await
        .unwrap();
    assert_eq!(done, renewed(2, 1_000));
    let status = broker.status().await;
    assert_eq!((status.depth, status.in_flight), (0, 0));
    assert_eq!(status.watermark, Offset(1_000));
    assert_eq!(broker.settle(Verb::Ack, items(&taken[..1])).await, [GONE]);
    broker.publish("orders.created", 1).await;
    assert_eq!(offsets(&broker.take(1, HOUR).await), [1_001]);
    // Repeated, it passes over what came since.
    let done = broker
        .queue
        .renew(&name(), Renewal::Purge, None)
        .await
        .unwrap();
    assert_eq!(done, renewed(3, 1_001));
    broker.kill();
    let broker = Broker::on(&database).await;
    assert!(broker.poll().await.deliveries.is_empty());
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_polls_stay_open_over_a_seek_and_get_the_new_generations_messages() {
    let (_database, broker) = begin(2).await;
    let broker = shared(broker);
    let taken = broker.take(2, HOUR).await;
    broker.settle(Verb::Ack, items(&taken)).await;
    let polls: Vec<_> = (0..2)
        .map(|_| {
            let broker = Arc::clone(&broker);
            tokio::spawn(async move {
                let request = ReceiveRequest {
                    max_messages: 1,
                    wait: Duration::from_secs(30),
                    ..ReceiveRequest::default()
                };
                broker
                    .queue
                    .receive(&name(), request)
                    .await
                    .unwrap()
                    .deliveries
            })
        })
        .collect();
    support::eventually("the polls to wait", || async {
        (broker.status().await.waiters == 2).then_some(())
    })
    .await;
    broker
        .queue
        .renew(&name(), Renewal::Purge, None)
        .await
        .unwrap();
    assert_eq!(broker.status().await.waiters, 2);
    broker.queue.renew(&name(), TO_START, None).await.unwrap();
    let mut got = Vec::new();
    for poll in polls {
        got.extend(poll.await.unwrap());
    }
    got.sort_by_key(|one| one.entry.offset);
    assert_eq!(offsets(&got), [1, 2]);
    let outcomes = broker.settle(Verb::Ack, items(&got)).await;
    // The answers of the polls were dropped with their handouts, unwritten: the deliveries may be back already.
    assert!(
        outcomes.iter().all(|outcome| *outcome == Outcome::Acked),
        "{outcomes:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_with_the_expected_generation_is_answered_and_not_done_again() {
    let (database, broker) = begin(3).await;
    let purge = |broker: Arc<Broker>, expected| async move {
        let expected = Some(Generation(expected));
        broker.queue.renew(&name(), Renewal::Purge, expected).await
    };
    let broker = shared(broker);
    assert_eq!(purge(Arc::clone(&broker), 1).await.unwrap(), renewed(2, 3));
    broker.publish("orders.created", 1).await;
    assert_eq!(purge(Arc::clone(&broker), 1).await.unwrap(), renewed(2, 3));
    let other = broker
        .queue
        .renew(&name(), TO_START, Some(Generation(1)))
        .await;
    assert!(
        matches!(
            other,
            Err(queue::Error::GenerationMoved {
                found: Generation(2),
                ..
            })
        ),
        "{other:?}"
    );
    assert!(matches!(
        purge(Arc::clone(&broker), 7).await,
        Err(queue::Error::GenerationMoved { .. })
    ));
    Arc::into_inner(broker).unwrap().kill();
    let broker = shared(Broker::on(&database).await);
    assert_eq!(
        broker.take(1, HOUR).await.len(),
        1,
        "the one that came since"
    );
    assert_eq!(
        purge(Arc::clone(&broker), 1).await.unwrap(),
        renewed(2, 3),
        "after a kill too"
    );
    assert_eq!(purge(Arc::clone(&broker), 2).await.unwrap(), renewed(3, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_survive_a_new_generation() {
    let (database, broker) = begin(3).await;
    let taken = broker.take(3, HOUR).await;
    broker.settle(Verb::Reject, items(&taken[..2])).await;
    broker
        .queue
        .renew(&name(), Renewal::Purge, None)
        .await
        .unwrap();
    assert_eq!(broker.status().await.dead_letters, 2);
    broker.kill();
    let broker = Broker::on(&database).await;
    assert_eq!(broker.status().await.dead_letters, 2, "after a kill too");
    broker.queue.renew(&name(), TO_START, None).await.unwrap();
    let again = broker.take(3, HOUR).await;
    assert_eq!(
        offsets(&again),
        [1, 2, 3],
        "found again, with or without a letter"
    );
    broker.settle(Verb::Ack, items(&again[..1])).await;
    assert_eq!(broker.status().await.dead_letters, 1, "settled after all");
    broker.stop().await;
}

/// The connection is lost when the call is sent, before or after the server has it: the queue is in one generation or in the
/// other, and the repeat comes to the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_seek_of_unknown_outcome_is_found_out_and_its_repeat_does_it_once() {
    for cut in [Action::CutBefore, Action::CutAfter] {
        let database = support::database().await;
        let proxy = support::proxy(&database.url).await;
        let queue_url = proxy.url(&database.url);
        let broker = Broker::start(&database.url, &queue_url, queue::Options::default()).await;
        broker
            .queue
            .declare(name(), declaration(at_once(16)))
            .await
            .unwrap();
        broker.publish("orders.created", 3).await;
        let taken = broker.take(3, HOUR).await;
        let seen = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&seen);
        proxy.filter(move |direction, bytes| {
            // The statement's parameters: what is asked for is among them.
            let marker = b"from_generation\":1";
            let is_call = direction == Direction::ToServer
                && bytes.windows(marker.len()).any(|window| window == marker);
            if is_call && count.fetch_add(1, Ordering::SeqCst) == 0 {
                cut
            } else {
                Action::Forward
            }
        });
        let first = broker
            .queue
            .renew(&name(), TO_START, Some(Generation(1)))
            .await;
        assert_eq!(first.unwrap(), renewed(2, 0), "found out");
        assert_eq!(seen.load(Ordering::SeqCst), 2);
        let repeat = support::eventually("the repeat to be answered", || async {
            let (queue, expected) = (name(), Some(Generation(1)));
            match broker.queue.renew(&queue, TO_START, expected).await {
                Ok(done) => Some(done),
                Err(
                    queue::Error::Unavailable { .. }
                    | queue::Error::OutcomeUnknown
                    | queue::Error::NotOwner { .. },
                ) => None,
                Err(error) => panic!("{error:?}"),
            }
        })
        .await;
        assert_eq!(repeat, renewed(2, 0));
        assert_eq!(broker.settle(Verb::Ack, items(&taken[..1])).await, [GONE]);
        assert_eq!(broker.take(3, HOUR).await.len(), 3);
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_while_seeks_run_leave_one_generation_or_the_other() {
    let (database, mut broker) = begin(20).await;
    let mut generation = 1;
    for round in 0..6u64 {
        let taken = broker.take(20, HOUR).await;
        broker.settle(Verb::Ack, items(&taken[..10])).await;
        let (queue, expected) = (broker.queue.clone(), Some(Generation(generation)));
        let seek = tokio::spawn(async move { queue.renew(&name(), TO_START, expected).await });
        tokio::time::sleep(Duration::from_millis(round)).await;
        broker.kill();
        let told = seek.await.unwrap();
        broker = Broker::on(&database).await;
        broker.status().await;
        let found = broker.queue.describe(&name()).await.unwrap().generation;
        assert!(
            found.0 == generation || found.0 == generation + 1,
            "{found:?}"
        );
        if told.is_ok() {
            assert_eq!(found.0, generation + 1, "what was answered is done");
        }
        // The repeat brings it about once, whichever it was.
        let repeat = broker
            .queue
            .renew(&name(), TO_START, expected)
            .await
            .unwrap();
        generation += 1;
        assert_eq!(repeat, renewed(generation, 0));
        let outcomes = broker.settle(Verb::Ack, items(&taken)).await;
        assert!(
            outcomes.iter().all(|outcome| *outcome == GONE),
            "{outcomes:?}"
        );
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_beyond_the_streams_end_says_so() {
    let (_database, broker) = begin(5).await;
    let to = |offset| Renewal::Seek(Start::Offset(Offset(offset)));
    let (queue, first) = (&broker.queue, Some(Generation(1)));
    assert_eq!(
        queue.renew(&name(), to(6), first).await.unwrap(),
        renewed(2, 5),
        "the next message is the first"
    );
    assert!(!broker.status().await.ahead);
    let ahead = Renewed {
        ahead: true,
        ..renewed(3, 999)
    };
    for repeat in 0..2 {
        let sought = queue.renew(&name(), to(1_000), Some(Generation(2))).await;
        assert_eq!(sought.unwrap(), ahead, "{repeat}");
    }
    assert!(broker.status().await.ahead);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_below_what_retention_dropped_begins_at_what_is_left_and_says_so() {
    let (database, broker) = begin(10).await;
    sqlx::query(
        "update postroad_broker.stream_head set floor = 4, floor_appended_at = clock_timestamp()",
    )
    .execute(&mut database.connect().await)
    .await
    .unwrap();
    let at_floor = Renewed {
        at_floor: true,
        ..renewed(2, 4)
    };
    let to_two = Renewal::Seek(Start::Offset(Offset(2)));
    assert_eq!(
        broker
            .queue
            .renew(&name(), to_two, Some(Generation(1)))
            .await
            .unwrap(),
        at_floor
    );
    assert_eq!(
        broker
            .queue
            .renew(&name(), to_two, Some(Generation(1)))
            .await
            .unwrap(),
        at_floor
    );
    assert_eq!(
        broker.queue.renew(&name(), TO_START, None).await.unwrap(),
        renewed(3, 4)
    );
    let long_ago = Renewal::Seek(Start::Time(Utc::now() - Duration::from_secs(3_600)));
    let done = broker.queue.renew(&name(), long_ago, None).await.unwrap();
    assert_eq!(
        done,
        Renewed {
            generation: Generation(4),
            ..at_floor
        }
    );
    assert_eq!(offsets(&broker.take(6, HOUR).await), [5, 6, 7, 8, 9, 10]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_queue_hands_nothing_out_and_everything_else_goes_on() {
    let (database, broker) = begin(3).await;
    let taken = broker.take(1, HOUR).await;
    let short = broker.take(1, Duration::from_secs(1)).await;
    for _ in 0..2 {
        broker.queue.set_paused(&name(), true).await.unwrap();
    }
    assert!(broker.queue.describe(&name()).await.unwrap().is_paused);
    let received = broker.poll().await;
    assert!(received.deliveries.is_empty());
    assert_eq!(received.reason, Some(EmptyReason::Paused));
    assert_eq!(
        broker.settle(Verb::Ack, items(&taken)).await,
        [Outcome::Acked]
    );
    support::eventually("a delivery to expire meanwhile", || async {
        (broker.status().await.in_flight == 0).then_some(())
    })
    .await;
    broker.kill();
    let broker = shared(Broker::on(&database).await);
    assert_eq!(
        broker.poll().await.reason,
        Some(EmptyReason::Paused),
        "after a kill too"
    );
    // A new generation is paused as the former was.
    broker.queue.renew(&name(), TO_START, None).await.unwrap();
    assert_eq!(broker.settle(Verb::Ack, items(&short)).await, [GONE]);
    assert_eq!(broker.poll().await.reason, Some(EmptyReason::Paused));
    let waiting = Arc::clone(&broker);
    let poll = tokio::spawn(async move { waiting.take(3, HOUR).await });
    support::eventually("the poll to wait", || async {
        (broker.status().await.waiters == 1).then_some(())
    })
    .await;
    for _ in 0..2 {
        broker.queue.set_paused(&name(), false).await.unwrap();
    }
    assert_eq!(offsets(&poll.await.unwrap()), [1, 2, 3]);
}

/// Whether the first leaf would be emptied, of which all is settled: the word of that is 2 s old, by a node's clock that is so far ahead.
async fn empties(session: &mut sqlx::PgConnection, ahead: &str) -> bool {
    let emptied: Option<i64> = sqlx::query_scalar(
        "select postroad_broker.empty_leaf(s.id, 1, c.at, '0', null, 3, c.at - interval '2 seconds', false, false)
        from postroad_broker.stream s, (select clock_timestamp() + $1::text::interval as at) c where s.name = 'main'",
    )
    .bind(ahead)
    .fetch_one(session)
    .await
    .unwrap();
    emptied.is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_begun_by_a_wrong_clock_neither_stops_retention_nor_loses_what_it_wants() {
    let (database, broker) = begin(3).await;
    broker.stop().await;
    let mut session = database.connect().await;
    let renewed = async |session: &mut sqlx::PgConnection, ago: &str| {
        let text =
            "update postroad_broker.queue set renewed_at = clock_timestamp() - $1::text::interval";
        sqlx::query(text).bind(ago).execute(session).await.unwrap();
    };
    // The server was set back by an hour: its clock says a second ago, and the node's word is of before.
    renewed(&mut session, "1 second").await;
    assert!(!empties(&mut session, "1 hour").await);
    // It was 1,000 days ahead: that was now at the latest.
    renewed(&mut session, "-1000 days").await;
    assert!(!empties(&mut session, "0").await);
    let noted = "select renewed_at <= clock_timestamp() from postroad_broker.queue";
    let is_past: bool = sqlx::query_scalar(noted)
        .fetch_one(&mut session)
        .await
        .unwrap();
    assert!(is_past);
    renewed(&mut session, "20 seconds").await;
    assert!(empties(&mut session, "0").await);
}
