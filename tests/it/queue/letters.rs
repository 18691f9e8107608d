//! Dead letters: listed, redriven, removed, forwarded, kept for as long as their queue says.

use std::time::Duration;

use postroad::domain::id::Offset;
use postroad::domain::letter::{Cause, LetterId, Selection};
use postroad::domain::name::{QueueName, StreamName, Topic, TopicPattern};
use postroad::domain::policy::Settings;
use postroad::queue::{
    self, Delivery, LetterFilter, LetterSummary, NewRedrive, Outcome, Redrive, Verb, VerbItem,
};
use postroad::stream::Read;

use super::{Broker, HOUR, at_once, declaration, item, items, name};
use crate::support;

pub(super) fn new(id: &str, selection: Selection) -> NewRedrive {
    NewRedrive {
        id: id.to_owned(),
        selection,
        rate_per_second: None,
    }
}

async fn letters(broker: &Broker, selection: Selection) -> Vec<LetterSummary> {
    let filter = LetterFilter {
        selection,
        after: Offset(0),
        limit: 1_000,
    };
    let page = broker.queue.dead_letters(&name(), filter).await.unwrap();
    assert_eq!(page.next_after, None);
    page.letters
}

fn offsets(letters: &[LetterSummary]) -> Vec<i64> {
    letters.iter().map(|letter| letter.id.offset.0).collect()
}

pub(super) async fn reject(broker: &Broker, deliveries: &[Delivery], reason: &str) {
    let items = items(deliveries).into_iter().map(|item| VerbItem {
        reason: Some(reason.to_owned()),
        ..item
    });
    let outcomes = broker.settle(Verb::Reject, items.collect()).await;
    let is_rejected = |outcome: &Outcome| matches!(outcome, Outcome::Rejected { .. });
    assert!(outcomes.iter().all(is_rejected), "{outcomes:?}");
}

pub(super) async fn ended(broker: &Broker, id: &str) -> Redrive {
    support::eventually("the redrive to end", || async {
        let redrive = broker.queue.find_redrive(&name(), id).await.unwrap();
        (redrive.status.as_str() != "running").then_some(redrive)
    })
    .await
}

/// A queue with so many dead letters, of offsets from 1 on, and what was delivered.
pub(super) async fn with_letters(
    broker: &Broker,
    count: usize,
    settings: Settings,
) -> Vec<Delivery> {
    broker
        .queue
        .declare(name(), declaration(settings))
        .await
        .unwrap();
    broker.publish("orders.created", count).await;
    let taken = broker.take(count, HOUR).await;
    reject(broker, &taken, "no stock").await;
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_message_lives_again_and_its_letter_knows_its_history() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let former = with_letters(&broker, 5, at_once(2)).await;
    let ids = Selection {
        ids: Some(vec![
            LetterId::parse("1-2").unwrap(),
            LetterId::parse("1-4").unwrap(),
        ]),
        ..Selection::default()
    };
    let dry = broker
        .queue
        .dry_run(&name(), new("dry", ids.clone()))
        .await
        .unwrap();
    assert_eq!((dry.matching, dry.late), (2, 0));
    let (begun, is_new) = broker
        .queue
        .redrive(&name(), new("two", ids.clone()))
        .await
        .unwrap();
    assert!(is_new && begun.total == Some(2), "{begun:?}");
    let done = ended(&broker, "two").await;
    assert_eq!((done.redriven, done.skipped, done.late), (2, 0, 0));
    let again = broker
        .queue
        .redrive(&name(), new("two", Selection::default()))
        .await
        .unwrap();
    assert_eq!(again, (done, false), "a repeat begins nothing");
    // The letters stay while their messages are on their way, and count as dead no more.
    let shown = letters(&broker, Selection::default()).await;
    assert_eq!(offsets(&shown), [1, 2, 3, 4, 5]);
    let redriven = shown[1].redriven.as_ref().unwrap();
    assert_eq!(redriven.0, "two");
    let status = broker.status().await;
    assert_eq!((status.depth, status.dead_letters), (2, 3));
    assert_eq!(status.watermark, Offset(5), "nothing is held back");
    // Nobody else is touched, and former receipts say so.
    let stale = broker.settle(Verb::Ack, items(&former[1..2])).await;
    assert_eq!(stale, [Outcome::Stale { attempt: 1 }]);
    broker.kill();
    let broker = Broker::on(&database).await;
    let taken = broker.take(2, HOUR).await;
    let seen: Vec<_> = taken
        .iter()
        .map(|d| (d.entry.offset.0, d.delivery, d.attempt))
        .collect();
    assert_eq!(seen, [(2, 3, 1), (4, 3, 1)]);
    assert_eq!(taken[0].entry.event, former[1].entry.event);
    let refused = broker.queue.delete_dead_letter(&name(), shown[1].id).await;
    assert!(
        matches!(refused, Err(queue::Error::LetterRedriven { .. })),
        "{refused:?}"
    );
    broker.settle(Verb::Ack, items(&taken[..1])).await;
    broker.settle(Verb::Nack, items(&taken[1..])).await;
    let last = broker.take(1, HOUR).await;
    assert_eq!((last[0].delivery, last[0].attempt), (4, 2));
    reject(&broker, &last, "still no stock").await;
    assert_eq!(
        offsets(&letters(&broker, Selection::default()).await),
        [1, 3, 4, 5]
    );
    let letter = broker
        .queue
        .dead_letter(&name(), LetterId::parse("1-4").unwrap())
        .await
        .unwrap();
    let reasons: Vec<&str> = letter.failures.iter().map(|f| f.reason.as_str()).collect();
    assert_eq!(reasons, ["no stock", "nacked", "still no stock"]);
    assert_eq!((letter.summary.delivery, letter.summary.attempts), (4, 2));
    assert_eq!(letter.summary.redriven, None);
    assert_eq!(letter.copy.message.to_event_json(), former[3].entry.event);
    let gone = broker
        .queue
        .dead_letter(&name(), LetterId::parse("1-2").unwrap())
        .await;
    assert!(
        matches!(gone, Err(queue::Error::LetterNotFound { .. })),
        "{gone:?}"
    );
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_found_by_what_they_are() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(1)).await;
    broker.publish("orders.created", 2).await;
    broker.publish("orders.eu.created", 2).await;
    let taken = broker.take(4, HOUR).await;
    reject(&broker, &taken[..1], "100% broken").await;
    let between = broker.cluster.now();
    tokio::time::sleep(Duration::from_millis(5)).await;
    broker.settle(Verb::Nack, items(&taken[1..])).await;
    let only = |change: fn(&mut Selection)| {
        let mut selection = Selection::default();
        change(&mut selection);
        selection
    };
    let topic = |pattern: &str| Selection {
        topic: Some(TopicPattern::parse(pattern).unwrap()),
        ..Selection::default()
    };
    for (selection, found) in [
        (Selection::default(), vec![1, 2, 3, 4]),
        (only(|s| s.cause = Some(Cause::Rejected)), vec![1]),
        (
            only(|s| s.cause = Some(Cause::OutOfAttempts)),
            vec![2, 3, 4],
        ),
        (only(|s| s.reason = Some("0% b".into())), vec![1]),
        (only(|s| s.reason = Some("%".into())), vec![1]),
        (only(|s| s.key = Some("k".into())), vec![]),
        (topic("orders.*"), vec![1, 2]),
        (topic("orders.>"), vec![1, 2, 3, 4]),
        (topic("orders.*.created"), vec![3, 4]),
        (topic("*"), vec![]),
        (topic("orders"), vec![]),
        (
            Selection {
                died_before: Some(between),
                ..Selection::default()
            },
            vec![1],
        ),
        (
            Selection {
                died_after: Some(between),
                ..Selection::default()
            },
            vec![2, 3, 4],
        ),
    ] {
        let shown = letters(&broker, selection.clone()).await;
        assert_eq!(offsets(&shown), found, "{selection:?}");
        let dry = broker
            .queue
            .dry_run(&name(), new("dry", selection))
            .await
            .unwrap();
        assert_eq!(dry.matching, found.len() as u64);
    }
    let mut filter = LetterFilter {
        limit: 3,
        ..LetterFilter::default()
    };
    let first = broker
        .queue
        .dead_letters(&name(), filter.clone())
        .await
        .unwrap();
    assert_eq!(
        (offsets(&first.letters), first.next_after),
        (vec![1, 2, 3], Some(Offset(3)))
    );
    filter.after = Offset(3);
    let second = broker.queue.dead_letters(&name(), filter).await.unwrap();
    assert_eq!(
        (offsets(&second.letters), second.next_after),
        (vec![4], None)
    );
    // Removed for good, again and again.
    for _ in 0..2 {
        broker
            .queue
            .delete_dead_letter(&name(), LetterId::parse("1-1").unwrap())
            .await
            .unwrap();
    }
    assert_eq!(broker.status().await.dead_letters, 3);
    let settled = broker.settle(Verb::Ack, items(&taken[..1])).await;
    assert_eq!(settled, [Outcome::AlreadySettled]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_brings_back_what_the_log_has_dropped() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let former = with_letters(&broker, 3, at_once(16)).await;
    broker.kill();
    sqlx::query("delete from postroad_broker.message where \"offset\" < 3")
        .execute(&mut database.connect().await)
        .await
        .unwrap();
    let broker = Broker::on(&database).await;
    let begun = broker
        .queue
        .redrive(&name(), new("all", Selection::default()))
        .await
        .unwrap();
    assert_eq!(begun.0.total, Some(3));
    let taken = broker.take(3, HOUR).await;
    for (before, now) in former.iter().zip(&taken) {
        assert_eq!(before.entry, now.entry);
    }
    // What dies again has its letter still, though there is nothing to copy.
    reject(&broker, &taken[..1], "no").await;
    broker.settle(Verb::Ack, items(&taken[1..])).await;
    let left = letters(&broker, Selection::default()).await;
    assert_eq!((offsets(&left), left[0].delivery), (vec![1], 3));
    assert_eq!(ended(&broker, "all").await.redriven, 3);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_redrive_brings_nothing_more_back() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    with_letters(&broker, 5, at_once(16)).await;
    let slow = NewRedrive {
        rate_per_second: Some(1),
        ..new("slow", Selection::default())
    };
    broker.queue.redrive(&name(), slow).await.unwrap();
    support::eventually("the first to come back", || async {
        (broker.status().await.depth > 0).then_some(())
    })
    .await;
    broker.kill();
    // It goes on after a restart, at its rate, and is cancelled there.
    let broker = Broker::on(&database).await;
    support::eventually("another to come back", || async {
        (broker.status().await.depth > 1).then_some(())
    })
    .await;
    for _ in 0..2 {
        broker.queue.cancel_redrive(&name(), "slow").await.unwrap();
    }
    let cancelled = ended(&broker, "slow").await;
    assert_eq!(cancelled.status.as_str(), "cancelled");
    let status = broker.status().await;
    assert_eq!(
        (cancelled.redriven, cancelled.total),
        (status.depth, Some(5))
    );
    assert_eq!(status.dead_letters, 5 - status.depth);
    let unknown = broker.queue.cancel_redrive(&name(), "other").await;
    assert!(
        matches!(unknown, Err(queue::Error::RedriveNotFound { .. })),
        "{unknown:?}"
    );
    let listed = broker.queue.redrives(&name(), 10).await.unwrap();
    assert_eq!(listed, [cancelled]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_kept_for_as_long_as_their_queue_says() {
    let database = support::database().await;
    let options = queue::Options {
        trim_every: Duration::from_millis(100),
        ..queue::Options::default()
    };
    let broker = Broker::start(&database.url, &database.url, options).await;
    let short = Settings {
        dead_letter_retention: Duration::from_secs(60),
        ..at_once(16)
    };
    with_letters(&broker, 3, short).await;
    let two = Selection {
        ids: Some(vec![LetterId::parse("1-2").unwrap()]),
        ..Selection::default()
    };
    broker
        .queue
        .redrive(&name(), new("two", two))
        .await
        .unwrap();
    ended(&broker, "two").await;
    sqlx::query("update postroad_broker.dead_letter set died_at = died_at - interval '61 seconds' where \"offset\" < 3")
        .execute(&mut database.connect().await)
        .await
        .unwrap();
    support::eventually("the old one to be gone", || async {
        let left = letters(&broker, Selection::default()).await;
        // The copy of the second is in use.
        (offsets(&left) == [2, 3]).then_some(())
    })
    .await;
    broker.stop().await;
}

/// The events of a topic, in their order.
async fn published(broker: &Broker, topic: &str) -> Vec<serde_json::Value> {
    let main = broker.stream.describe(&StreamName::main()).await.unwrap();
    let read = Read {
        stream: main.id,
        after: Offset(0),
        through: None,
        topics: Some(vec![TopicPattern::parse(topic).unwrap()].into()),
        key: None,
        max_messages: 1_000,
        max_bytes: 1 << 24,
    };
    let page = broker.stream.read(read).await.unwrap();
    let events = page.entries.iter();
    events
        .map(|entry| serde_json::from_slice(&entry.event).unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_forwarded_once() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let forwarding = Settings {
        dead_letter_topic: Some(Topic::parse("dead.orders").unwrap()),
        ..at_once(16)
    };
    with_letters(&broker, 3, forwarding).await;
    let forwarded = async |broker: &Broker| {
        support::eventually("the letters to be forwarded", || async {
            let shown = letters(broker, Selection::default()).await;
            let is_done = |letter: &LetterSummary| {
                letter.forward.as_ref().is_some_and(|(_, at)| at.is_some())
            };
            shown.iter().all(is_done).then_some(())
        })
        .await;
    };
    forwarded(&broker).await;
    let copies = published(&broker, "dead.orders").await;
    assert_eq!(copies.len(), 3);
    assert_eq!(copies[0]["postroadqueue"], "billing");
    assert_eq!(copies[0]["postroadletter"], "1-1");
    assert_eq!(copies[0]["postroadreason"], "no stock");
    assert_eq!(copies[0]["type"], "orders.created");
    assert_eq!(copies[0]["data"], serde_json::json!({"a": 1}));
    // As if the broker had died between the append and the mark.
    broker.kill();
    sqlx::query("update postroad_broker.dead_letter set forwarded_at = null")
        .execute(&mut database.connect().await)
        .await
        .unwrap();
    let broker = Broker::on(&database).await;
    forwarded(&broker).await;
    assert_eq!(published(&broker, "dead.orders").await, copies, "not twice");
    // Another death is another copy.
    broker
        .queue
        .redrive(&name(), new("all", Selection::default()))
        .await
        .unwrap();
    let taken = broker.take(3, HOUR).await;
    reject(&broker, &taken, "again").await;
    forwarded(&broker).await;
    assert_eq!(published(&broker, "dead.orders").await.len(), 6);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_of_dead_letters_is_refused() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let to = |topic: &str| Settings {
        dead_letter_topic: Some(Topic::parse(topic).unwrap()),
        ..at_once(16)
    };
    let declare = async |queue: &str, takes: &str, settings: Settings| {
        let mut declaration = declaration(settings);
        declaration.topics = vec![TopicPattern::parse(takes).unwrap()];
        broker
            .queue
            .declare(QueueName::parse(queue).unwrap(), declaration)
            .await
    };
    let refused = |answer: Result<_, queue::Error>| match answer {
        Err(queue::Error::Invalid(fault)) => assert_eq!(fault.field, "dead_letter_topic"),
        other => panic!("{other:?}"),
    };
    refused(declare("a", "orders.>", to("orders.dead")).await);
    declare("a", "orders.>", to("dead.orders")).await.unwrap();
    declare("b", "dead.*", at_once(3)).await.unwrap();
    refused(declare("b", "dead.*", to("orders.again")).await);
    declare("b", "dead.*", to("graves")).await.unwrap();
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_of_a_letter_that_is_removed_is_settled() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let taken = with_letters(&broker, 1, at_once(16)).await;
    let acked = broker
        .settle(Verb::Ack, vec![item(&taken[0].receipt)])
        .await;
    assert_eq!(acked, [Outcome::Acked]);
    assert!(letters(&broker, Selection::default()).await.is_empty());
    broker.stop().await;
}

/// A clock that is a year ahead for a while, and back.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_deletes_no_letter_and_ends_nothing_early() {
    let database = support::database().await;
    support::clock::settable(&database.url).await;
    let options = queue::Options {
        trim_every: Duration::from_millis(50),
        ..queue::Options::default()
    };
    let broker = Broker::start(&database.url, &database.url, options).await;
    with_letters(&broker, 3, at_once(16)).await;
    broker.publish("orders.created", 2).await;
    let taken = broker.take(2, HOUR).await;
    broker
        .settle(Verb::Nack, super::delayed(&taken[..1], HOUR))
        .await;
    for ahead in ["1 day", "40 days", "10 years", "-1 day", "0"] {
        support::clock::set(&database.url, ahead).await;
        // The engine looks for old letters by then.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(
            letters(&broker, Selection::default()).await.len(),
            3,
            "{ahead}"
        );
        let status = broker.status().await;
        assert_eq!((status.in_flight, status.delayed), (1, 1), "{ahead}");
    }
    let outcomes = broker.settle(Verb::Ack, items(&taken[1..])).await;
    assert_eq!(outcomes, [Outcome::Acked]);
    broker.stop().await;
}
