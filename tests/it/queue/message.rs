//! Single messages, settled by hand, and deliveries ended before their time.

use std::time::Duration;

use postroad::domain::id::Offset;
use postroad::domain::name::Topic;
use postroad::domain::queue::Whose;
use postroad::queue::{Act, Acted, Expire, MessageState, MessageStatus, Outcome, Verb, VerbItem};

use super::{Broker, HOUR, at_once, delayed, items, name};
use crate::support;

/// Ten messages: 1 acked, 2 rejected, 3 nacked with a delay, 4 released, 5 live, 6 and 7 fresh, 8 of another topic, 9 and 10
/// fresh.
async fn begin() -> (support::TestDatabase, Broker, Vec<VerbItem>) {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 5).await;
    let taken = broker.take(5, HOUR).await;
    broker.publish("orders.created", 2).await;
    broker.publish("payments.made", 1).await;
    broker.publish("orders.created", 2).await;
    broker.settle(Verb::Ack, items(&taken[..1])).await;
    broker.settle(Verb::Reject, items(&taken[1..2])).await;
    let mut nack = delayed(&taken[2..3], HOUR);
    nack[0].reason = Some("the shop is closed".into());
    broker.settle(Verb::Nack, nack).await;
    broker.settle(Verb::Release, items(&taken[3..4])).await;
    support::eventually("the queue to see its messages", || async {
        (broker.status().await.depth == 7).then_some(())
    })
    .await;
    let receipts = items(&taken);
    (database, broker, receipts)
}

async fn inspect(broker: &Broker, offsets: std::ops::RangeInclusive<i64>) -> Vec<MessageStatus> {
    let topic = |offset| match offset {
        8 => Some(Topic::parse("payments.made").unwrap()),
        1..=10 => Some(Topic::parse("orders.created").unwrap()),
        _ => None,
    };
    let asked: Vec<_> = offsets
        .map(|offset| (Offset(offset), topic(offset)))
        .collect();
    support::eventually("the messages' states", || async {
        broker.queue.inspect(&name(), asked.clone()).await.ok()
    })
    .await
}

fn states(told: &[MessageStatus]) -> Vec<MessageState> {
    told.iter().map(|one| one.state).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_state_is_told_and_after_a_kill_the_same() {
    use MessageState::{Dead, Delayed, Fresh, Live, NotFound, NotMatching, Ready, Settled};
    let (database, broker, _) = begin().await;
    let told = inspect(&broker, 0..=11).await;
    let expected = [
        NotFound,
        Settled,
        Dead,
        Delayed,
        Ready,
        Live,
        Fresh,
        Fresh,
        NotMatching,
        Fresh,
        Fresh,
        NotFound,
    ];
    assert_eq!(states(&told), expected);
    assert_eq!((told[3].delivery, told[3].attempts), (1, 1));
    assert_eq!(told[3].failures[0].reason, "the shop is closed");
    assert!(told[3].due_at.is_some() && told[5].visible_until.is_some());
    assert_eq!(told[5].consumer.as_deref(), Some("test"));
    broker.kill();
    let broker = Broker::on(&database).await;
    broker.status().await;
    assert_eq!(inspect(&broker, 0..=11).await, told);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_reasons_come_back_after_a_kill() {
    let (database, broker, _) = begin().await;
    for number in 0..7 {
        let mut taken = broker.take(1, HOUR).await;
        if taken[0].entry.offset != Offset(4) {
            // What failed lets another go first.
            taken = broker.take(1, HOUR).await;
        }
        assert_eq!(taken[0].entry.offset, Offset(4));
        let mut nack = items(&taken);
        nack[0].reason = Some(format!("reason {number}"));
        nack[0].delay = Some(Duration::ZERO);
        broker.settle(Verb::Nack, nack).await;
    }
    broker.kill();
    let broker = Broker::on(&database).await;
    broker.status().await;
    let told = inspect(&broker, 4..=4).await;
    let reasons: Vec<&str> = told[0]
        .failures
        .iter()
        .map(|one| one.reason.as_str())
        .collect();
    assert_eq!(
        reasons,
        ["reason 2", "reason 3", "reason 4", "reason 5", "reason 6"]
    );
    assert_eq!(
        (told[0].attempts, told[0].delivery),
        (7, 8),
        "the first was released"
    );
    broker.stop().await;
}

async fn act(broker: &Broker, offset: i64, act: &Act) -> Acted {
    support::eventually("the act to be answered", || async {
        broker
            .queue
            .act(&name(), Offset(offset), act.clone())
            .await
            .ok()
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_message_is_settled_here_and_stays_so() {
    let (database, broker, receipts) = begin().await;
    let deleted = [3, 4, 5, 6, 10];
    for offset in deleted {
        assert_eq!(
            act(&broker, offset, &Act::Delete).await,
            Acted::Deleted,
            "{offset}"
        );
        assert_eq!(
            act(&broker, offset, &Act::Delete).await,
            Acted::AlreadySettled,
            "{offset}"
        );
    }
    let check = async |broker: &Broker| {
        for (offset, expected) in [
            (1, Acted::AlreadySettled),
            (2, Acted::DeadLettered),
            (8, Acted::Not(MessageState::NotMatching)),
            (11, Acted::Not(MessageState::NotFound)),
            (6, Acted::AlreadySettled),
        ] {
            assert_eq!(
                act(broker, offset, &Act::Delete).await,
                expected,
                "{offset}"
            );
        }
        let outcomes = broker.settle(Verb::Ack, receipts[2..].to_vec()).await;
        assert!(
            outcomes.iter().all(|one| *one == Outcome::AlreadySettled),
            "{outcomes:?}"
        );
    };
    check(&broker).await;
    broker.kill();
    let broker = Broker::on(&database).await;
    check(&broker).await;
    let left = broker.take(2, HOUR).await;
    let left: Vec<i64> = left.iter().map(|one| one.entry.offset.0).collect();
    assert_eq!(left, [7, 9]);
    assert!(broker.poll().await.deliveries.is_empty());
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_rejects_a_message_wherever_it_stands() {
    let (database, broker, receipts) = begin().await;
    let reject = Act::Reject {
        reason: Some("blocks its key".into()),
    };
    for offset in [3, 4, 5, 6] {
        let acted = act(&broker, offset, &reject).await;
        let dead_letter = format!("1-{offset}");
        assert_eq!(acted, Acted::Rejected { dead_letter }, "{offset}");
        assert_eq!(act(&broker, offset, &reject).await, Acted::DeadLettered);
    }
    assert_eq!(act(&broker, 1, &reject).await, Acted::AlreadySettled);
    assert_eq!(broker.status().await.dead_letters, 5);
    broker.kill();
    let broker = Broker::on(&database).await;
    assert_eq!(broker.status().await.dead_letters, 5);
    assert_eq!(act(&broker, 6, &reject).await, Acted::DeadLettered);
    let rows: Vec<(i64, i32, i32, String)> = sqlx::query_as(
        "select \"offset\", delivery, attempts, failures -> -1 ->> 'reason' from postroad_broker.dead_letter \
         where \"offset\" > 2 order by \"offset\"",
    )
    .fetch_all(&mut database.connect().await)
    .await
    .unwrap();
    let reason = || "blocks its key".to_owned();
    let expected = [(3, 1, 1), (4, 1, 0), (5, 1, 1), (6, 0, 0)];
    assert_eq!(rows, expected.map(|(a, b, c)| (a, b, c, reason())));
    let outcomes = broker.settle(Verb::Nack, receipts[4..5].to_vec()).await;
    assert!(
        matches!(outcomes[0], Outcome::DeadLettered { .. }),
        "{outcomes:?}"
    );
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_end_before_their_time_as_if_it_were_up() {
    let (database, broker, receipts) = begin().await;
    let ours = Expire {
        whose: Whose::Consumer("test".into()),
        delivered_before: None,
    };
    let others = Expire {
        whose: Whose::Consumer("somebody".into()),
        delivered_before: None,
    };
    assert!(
        broker
            .queue
            .expire(&name(), others)
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        broker.queue.expire(&name(), ours.clone()).await.unwrap(),
        [Offset(5)]
    );
    assert!(broker.queue.expire(&name(), ours).await.unwrap().is_empty());
    broker.kill();
    let broker = Broker::on(&database).await;
    broker.status().await;
    let told = inspect(&broker, 5..=5).await;
    assert_eq!((told[0].state, told[0].attempts), (MessageState::Ready, 1));
    assert_eq!(told[0].failures[0].reason, "timed_out");
    // As after any expiry: its consumer may still settle it.
    assert_eq!(
        broker.settle(Verb::Ack, receipts[4..5].to_vec()).await,
        [Outcome::Acked]
    );
    let taken = broker.take(2, HOUR).await;
    let some = Expire {
        whose: Whose::Offsets(
            taken
                .iter()
                .map(|one| one.entry.offset)
                .chain([Offset(99)])
                .collect(),
        ),
        delivered_before: Some(chrono::Utc::now() - HOUR),
    };
    assert!(
        broker
            .queue
            .expire(&name(), some.clone())
            .await
            .unwrap()
            .is_empty()
    );
    let some = Expire {
        delivered_before: None,
        ..some
    };
    assert_eq!(
        broker.queue.expire(&name(), some).await.unwrap(),
        [Offset(4), Offset(6)]
    );
    // Between them go two that did not fail.
    let again = broker.take(4, HOUR).await;
    let failed = again
        .iter()
        .filter(|one| (one.delivery, one.attempt) != (1, 1));
    let failed: Vec<_> = failed.map(|one| one.entry.offset).collect();
    assert_eq!(failed, [Offset(4), Offset(6)], "{again:?}");
    broker.stop().await;
}
