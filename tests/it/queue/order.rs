//! Order by key and lanes, under consumers that fail and a broker that is killed.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use postroad::domain::id::Offset;
use postroad::domain::message::{Data, Message};
use postroad::domain::name::Topic;
use postroad::domain::policy::{Ordering, Settings};
use postroad::domain::queue::EmptyReason;
use postroad::queue::{BlockedBy, Delivery, Outcome, ReceiveRequest, Verb};
use postroad::stream::Member;

use super::{Broker, HOUR, at_once, declaration, delayed, items, name};
use crate::support;

fn ordered() -> Settings {
    Settings {
        ordering: Ordering::Key,
        ..at_once(16)
    }
}

/// Publishes a message of each key, in this order; one with a `!` has high priority, one with a `?` low.
async fn publish(broker: &Broker, keys: &[&str]) {
    let message = |key: &&str| {
        let mut extensions = serde_json::Map::new();
        for (mark, priority) in [('!', "high"), ('?', "low")] {
            if key.ends_with(mark) {
                extensions.insert("priority".into(), priority.into());
            }
        }
        Message {
            id: uuid::Uuid::new_v4().to_string(),
            source: "/test".into(),
            kind: None,
            topic: Topic::parse("orders.created").unwrap(),
            key: (!key.is_empty()).then(|| (*key).to_owned()),
            subject: None,
            time: None,
            data_content_type: None,
            data_schema: None,
            data: Data::Json(Bytes::from_static(b"{}")),
            extensions,
            expected_version: None,
        }
    };
    let messages = keys.iter().map(message).collect();
    let member = Member::Publish {
        messages,
        check_ids: false,
        as_one: Vec::new(),
    };
    broker.stream.append(member).await.unwrap();
}

fn offsets(deliveries: &[Delivery]) -> Vec<i64> {
    deliveries
        .iter()
        .map(|delivery| delivery.entry.offset.0)
        .collect()
}

async fn receive(broker: &Broker, max_messages: u32, visible: Duration) -> Vec<Delivery> {
    let received = broker
        .receive(ReceiveRequest {
            max_messages,
            wait: Duration::from_secs(5),
            visibility_timeout: Some(visible),
            ..ReceiveRequest::default()
        })
        .await;
    received.handout.written();
    received.deliveries
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_stay_in_order_through_nacks_expiries_and_kills() {
    let database = support::database().await;
    let mut broker = Broker::on(&database).await;
    broker
        .queue
        .declare(name(), declaration(ordered()))
        .await
        .unwrap();
    let keys = ["a", "b", "c", "d", ""];
    let published: Vec<&str> = (0..100).map(|n| keys[n % keys.len()]).collect();
    for chunk in published.chunks(25) {
        publish(&broker, chunk).await;
    }
    // Per key, what is to come, in order.
    let mut left: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
    for (index, key) in published.iter().enumerate() {
        left.entry(key).or_default().push(index as i64 + 1);
    }
    let mut turn = 0;
    while left.values().any(|left| !left.is_empty()) {
        turn += 1;
        let deliveries = receive(&broker, 7, Duration::from_secs(1)).await;
        for delivery in deliveries {
            let (offset, key) = (delivery.entry.offset.0, delivery.entry.key.clone());
            let left = left.get_mut(key.as_deref().unwrap_or_default()).unwrap();
            if key.is_some() {
                assert_eq!(
                    left.first(),
                    Some(&offset),
                    "the first unsettled of {key:?}"
                );
            }
            match (offset + turn) % 5 {
                // Left to expire.
                0 if delivery.attempt < 2 => {}
                1 if delivery.attempt < 4 => {
                    broker.settle(Verb::Nack, items(&[delivery])).await;
                }
                _ => {
                    let outcomes = broker.settle(Verb::Ack, items(&[delivery])).await;
                    assert_eq!(outcomes, [Outcome::Acked]);
                    left.retain(|&other| other != offset);
                }
            }
        }
        if turn % 6 == 0 {
            broker.kill();
            broker = Broker::on(&database).await;
        }
        assert!(turn < 300, "{left:?}");
    }
    let status = broker.status().await;
    assert_eq!((status.depth, status.waiting), (0, 0));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_blocks_a_key_is_told_over_a_restart() {
    let database = support::database().await;
    let broker = Broker::with(&database, ordered()).await;
    publish(&broker, &["a", "a", "a", "b", "b", "c"]).await;
    let taken = receive(&broker, 10, HOUR).await;
    assert_eq!(offsets(&taken), [1, 4, 6]);
    broker.settle(Verb::Nack, delayed(&taken[..1], HOUR)).await;
    let mut brokers = vec![broker];
    for restarted in [false, true] {
        let broker = match restarted {
            false => brokers.pop().unwrap(),
            true => {
                brokers.pop().unwrap().kill();
                Broker::on(&database).await
            }
        };
        let nothing = broker.poll().await;
        assert_eq!(nothing.reason, Some(EmptyReason::WaitingForKeys));
        let status = broker.status().await;
        assert_eq!((status.depth, status.ready, status.waiting), (6, 0, 3));
        let blocked: HashMap<String, _> = status
            .blocked_keys
            .into_iter()
            .map(|blocked| (blocked.key.as_deref().unwrap().to_owned(), blocked))
            .collect();
        assert_eq!(blocked.len(), 2, "nothing of `c` waits");
        let (a, b) = (&blocked["a"], &blocked["b"]);
        assert_eq!(
            (a.offset, a.state, a.waiting),
            (Offset(1), BlockedBy::Delayed, 2)
        );
        assert_eq!(
            (b.offset, b.state, b.waiting),
            (Offset(4), BlockedBy::Live, 1)
        );
        assert_eq!((a.attempt, b.attempt), (Some(1), Some(1)));
        brokers.push(broker);
    }
    let broker = brokers.pop().unwrap();
    broker.settle(Verb::Ack, items(&taken[1..2])).await;
    assert_eq!(offsets(&receive(&broker, 10, HOUR).await), [5]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_holds_its_key_if_the_queue_says_so() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let hold = |hold_key| Settings {
        hold_key,
        ..ordered()
    };
    broker
        .queue
        .declare(name(), declaration(hold(true)))
        .await
        .unwrap();
    publish(&broker, &["a", "a", "b", "b"]).await;
    let taken = receive(&broker, 10, HOUR).await;
    broker.settle(Verb::Reject, items(&taken[..1])).await;
    broker.settle(Verb::Ack, items(&taken[1..])).await;
    assert_eq!(
        offsets(&receive(&broker, 10, HOUR).await),
        [4],
        "`b` goes on"
    );
    broker.kill();
    let broker = Broker::on(&database).await;
    assert_eq!(
        broker.poll().await.reason,
        Some(EmptyReason::WaitingForKeys)
    );
    let blocked = broker.status().await.blocked_keys;
    assert_eq!(
        (blocked[0].offset, blocked[0].state),
        (Offset(1), BlockedBy::Held)
    );
    // Without it, the key goes on at once.
    broker
        .queue
        .declare(name(), declaration(hold(false)))
        .await
        .unwrap();
    assert_eq!(offsets(&receive(&broker, 10, HOUR).await), [2]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_a_key_is_settled_in_order() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let batches = Settings {
        key_batches: true,
        ..ordered()
    };
    broker
        .queue
        .declare(name(), declaration(batches))
        .await
        .unwrap();
    publish(&broker, &["a", "a", "b", "a", "a"]).await;
    let taken = receive(&broker, 4, HOUR).await;
    assert_eq!(offsets(&taken), [1, 2, 3, 4]);
    assert_eq!(
        broker.poll().await.reason,
        Some(EmptyReason::WaitingForKeys)
    );
    let blocked = broker.settle(Verb::Ack, items(&taken[1..4])).await;
    assert_eq!(
        blocked,
        [Outcome::Blocked, Outcome::Acked, Outcome::Blocked]
    );
    broker.kill();
    let broker = Broker::on(&database).await;
    let again = broker.settle(Verb::Ack, items(&taken[3..])).await;
    assert_eq!(again, [Outcome::Blocked], "a restart knows the batch");
    let together = vec![taken[3].clone(), taken[1].clone(), taken[0].clone()];
    let acked = broker.settle(Verb::Ack, items(&together)).await;
    assert_eq!(acked, [Outcome::Acked, Outcome::Acked, Outcome::Acked]);
    assert_eq!(offsets(&receive(&broker, 4, HOUR).await), [5]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn order_begins_and_ends_with_what_is_in_flight() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    publish(&broker, &["a", "a", "a", "b", "a", "a"]).await;
    let loose = receive(&broker, 2, HOUR).await;
    broker
        .queue
        .declare(name(), declaration(ordered()))
        .await
        .unwrap();
    assert_eq!(
        offsets(&receive(&broker, 9, HOUR).await),
        [4],
        "two of `a` are in flight"
    );
    broker.settle(Verb::Ack, items(&loose[1..])).await;
    assert_eq!(
        broker.poll().await.reason,
        Some(EmptyReason::WaitingForKeys)
    );
    broker.settle(Verb::Ack, items(&loose[..1])).await;
    let third = receive(&broker, 9, HOUR).await;
    assert_eq!(offsets(&third), [3]);
    broker
        .queue
        .declare(name(), declaration(at_once(16)))
        .await
        .unwrap();
    assert!(
        broker.poll().await.deliveries.is_empty(),
        "`a` is in order until then"
    );
    broker.kill();
    let broker = Broker::on(&database).await;
    assert_eq!(
        broker.poll().await.reason,
        Some(EmptyReason::WaitingForKeys),
        "also after a kill"
    );
    broker.settle(Verb::Ack, items(&third)).await;
    assert_eq!(offsets(&receive(&broker, 9, HOUR).await), [5, 6]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_high_message_passes_a_backlog_of_low_ones_and_low_ones_go_on() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let lanes = Settings {
        priorities: true,
        ..at_once(16)
    };
    broker
        .queue
        .declare(name(), declaration(lanes))
        .await
        .unwrap();
    for _ in 0..20 {
        publish(&broker, &["?"; 1_000]).await;
    }
    let behind = receive(&broker, 1, HOUR).await;
    assert_eq!(offsets(&behind), [1]);
    publish(&broker, &["!", ""]).await;
    support::eventually("the queue looked at all", || async {
        (broker.status().await.scanned_through == Offset(20_002)).then_some(())
    })
    .await;
    assert_eq!(broker.status().await.lanes, Some([20_000, 1, 1]));
    let next = receive(&broker, 1, HOUR).await;
    assert_eq!(offsets(&next), [20_001], "the high one");
    broker.kill();
    let broker = Broker::on(&database).await;
    support::eventually("the queue looked at all again", || async {
        (broker.status().await.scanned_through == Offset(20_002)).then_some(())
    })
    .await;
    assert_eq!(offsets(&receive(&broker, 2, HOUR).await), [20_002, 2]);
    let high = vec!["!"; 100];
    publish(&broker, &high).await;
    support::eventually("the queue looked at all", || async {
        (broker.status().await.scanned_through == Offset(20_102)).then_some(())
    })
    .await;
    let mut taken = Vec::new();
    while taken.len() < 80 {
        let most = 80 - taken.len() as u32;
        taken.extend(offsets(&receive(&broker, most, HOUR).await));
    }
    let low = taken.iter().filter(|&&offset| offset <= 20_000).count();
    assert_eq!(low, 10, "one of eight, as 1 to 7: {taken:?}");
    broker.stop().await;
}
