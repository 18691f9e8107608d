//! The matrix of verb and state (docs/protocol.md), cell by cell; each answer again, and again after the broker was killed.

use std::time::Duration;

use postroad::domain::id::{Generation, Offset};
use postroad::domain::letter::{LetterId, Selection};
use postroad::domain::receipt::{Key, Receipt};
use postroad::queue::{NewRedrive, Outcome, Verb, VerbItem};

use super::{Broker, HOUR, at_once, delayed, item, items, name};
use crate::support;

const VERBS: [Verb; 5] = [
    Verb::Ack,
    Verb::Nack,
    Verb::Release,
    Verb::Extend,
    Verb::Reject,
];

fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Acked => "acked",
        Outcome::Nacked { .. } => "nacked",
        Outcome::Released { .. } => "released",
        Outcome::Extended { .. } => "extended",
        Outcome::Rejected { .. } => "rejected",
        Outcome::AlreadySettled => "already_settled",
        Outcome::DeadLettered { .. } => "dead_lettered",
        Outcome::Stale { .. } => "stale",
        Outcome::Gone { .. } => "gone",
        Outcome::Blocked => "blocked",
        Outcome::Unknown => "unknown",
    }
}

/// Per state: the answers to ack, nack, release, extend and reject; then those to the same once more.
const CELLS: [(&str, [&str; 5], [&str; 5]); 12] = [
    ("malformed", ["unknown"; 5], ["unknown"; 5]),
    ("other queue", ["unknown"; 5], ["unknown"; 5]),
    ("other generation", ["gone"; 5], ["gone"; 5]),
    ("acked", ["already_settled"; 5], ["already_settled"; 5]),
    (
        "dead",
        [
            "acked",
            "dead_lettered",
            "dead_lettered",
            "dead_lettered",
            "dead_lettered",
        ],
        [
            "already_settled",
            "dead_lettered",
            "dead_lettered",
            "dead_lettered",
            "dead_lettered",
        ],
    ),
    ("stale", ["stale"; 5], ["stale"; 5]),
    (
        "live",
        ["acked", "nacked", "released", "extended", "rejected"],
        [
            "already_settled",
            "nacked",
            "released",
            "extended",
            "dead_lettered",
        ],
    ),
    (
        "expired",
        ["acked", "nacked", "released", "extended", "rejected"],
        [
            "already_settled",
            "nacked",
            "released",
            "extended",
            "dead_lettered",
        ],
    ),
    (
        "nacked",
        ["acked", "nacked", "nacked", "stale", "rejected"],
        [
            "already_settled",
            "nacked",
            "nacked",
            "stale",
            "dead_lettered",
        ],
    ),
    (
        "released",
        ["acked", "released", "released", "stale", "rejected"],
        [
            "already_settled",
            "released",
            "released",
            "stale",
            "dead_lettered",
        ],
    ),
    ("never issued", ["gone"; 5], ["gone"; 5]),
    // The last one: its messages are ready again.
    ("dead and redriven", ["stale"; 5], ["stale"; 5]),
];

/// Five receipts of messages in this state, one per verb.
async fn receipts(broker: &Broker, key: &Key, state: &str) -> Vec<String> {
    broker.publish("orders.created", 5).await;
    let visible = if state == "expired" {
        Duration::from_secs(1)
    } else {
        HOUR
    };
    let mut taken = broker.take(5, visible).await;
    let change = |text: &str, change: &dyn Fn(&mut Receipt)| {
        let mut receipt = key.open(text).unwrap();
        change(&mut receipt);
        key.seal(&receipt)
    };
    let texts = |taken: &[postroad::queue::Delivery], f: &dyn Fn(&mut Receipt)| {
        taken
            .iter()
            .map(|delivery| change(&delivery.receipt, f))
            .collect::<Vec<_>>()
    };
    match state {
        "malformed" => return vec!["no receipt".to_owned(); 5],
        "other queue" => return texts(&taken, &|receipt| receipt.queue.0 += 1),
        "other generation" => return texts(&taken, &|receipt| receipt.generation = Generation(0)),
        "never issued" => {
            return texts(&taken, &|receipt| {
                if receipt.offset.0 % 2 == 0 {
                    receipt.delivery += 7;
                } else {
                    receipt.offset = Offset(1_000_000);
                }
            });
        }
        "acked" => {
            broker.settle(Verb::Ack, items(&taken)).await;
        }
        "dead" => {
            broker.settle(Verb::Reject, items(&taken)).await;
        }
        "dead and redriven" => {
            broker.settle(Verb::Reject, items(&taken)).await;
            let ids = taken.iter().map(|delivery| LetterId {
                generation: Generation(1),
                offset: delivery.entry.offset,
            });
            let new = NewRedrive {
                id: "all".to_owned(),
                selection: Selection {
                    ids: Some(ids.collect()),
                    ..Selection::default()
                },
                rate_per_second: None,
            };
            broker.queue.redrive(&name(), new).await.unwrap();
            support::eventually("the redrive to end", || async {
                let redrive = broker.queue.find_redrive(&name(), "all").await.unwrap();
                (redrive.redriven == 5).then_some(())
            })
            .await;
        }
        "stale" => {
            broker.settle(Verb::Nack, items(&taken)).await;
            broker.take(5, HOUR).await;
        }
        "nacked" => {
            broker.settle(Verb::Nack, delayed(&taken, HOUR)).await;
        }
        "released" => {
            broker.settle(Verb::Release, delayed(&taken, HOUR)).await;
        }
        "expired" => {
            let expired: Vec<_> = taken.iter().map(|delivery| delivery.entry.offset).collect();
            support::eventually("the deliveries to expire", || async {
                let filter = postroad::queue::InFlightFilter {
                    limit: 1_000,
                    ..Default::default()
                };
                let live = broker.queue.in_flight(&name(), filter).await.unwrap();
                live.iter()
                    .all(|live| !expired.contains(&live.offset))
                    .then_some(())
            })
            .await;
        }
        _ => {}
    }
    taken.drain(..).map(|delivery| delivery.receipt).collect()
}

fn verb_item(receipt: &str, verb: Verb) -> VerbItem {
    let delay = matches!(verb, Verb::Nack | Verb::Release).then_some(HOUR);
    let extend_by = (verb == Verb::Extend).then_some(HOUR);
    VerbItem {
        delay,
        extend_by,
        ..item(receipt)
    }
}

async fn answers(broker: &Broker, receipts: &[String]) -> Vec<&'static str> {
    let mut words = Vec::new();
    for (verb, receipt) in VERBS.into_iter().zip(receipts) {
        let outcomes = broker.settle(verb, vec![verb_item(receipt, verb)]).await;
        words.push(word(&outcomes[0]));
    }
    words
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cell_answers_as_the_protocol_says() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    let key = Key::new(&broker.cluster.identity().receipt_key.0);
    let mut asked = Vec::new();
    for (state, first, again) in CELLS {
        let receipts = receipts(&broker, &key, state).await;
        assert_eq!(answers(&broker, &receipts).await, first, "{state}");
        assert_eq!(answers(&broker, &receipts).await, again, "{state}, again");
        asked.push((state, receipts, again));
    }
    broker.kill();
    let broker = Broker::on(&database).await;
    for (state, receipts, again) in asked {
        assert_eq!(
            answers(&broker, &receipts).await,
            again,
            "{state}, after the kill"
        );
    }
    let letters: i64 = sqlx::query_scalar("select count(*) from postroad_broker.dead_letter")
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap();
    assert_eq!(
        letters,
        4 + 4 + 5,
        "one of the dead was acked after all, four states had a reject, and redriven ones keep theirs"
    );
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_is_evaluated_in_offset_order_and_answered_in_its_own() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 3).await;
    let taken = broker.take(3, HOUR).await;
    let mixed = vec![
        item(&taken[2].receipt),
        item("nonsense"),
        item(&taken[0].receipt),
        item(&taken[2].receipt),
    ];
    let outcomes = broker.settle(Verb::Ack, mixed).await;
    let words: Vec<_> = outcomes.iter().map(word).collect();
    assert_eq!(words, ["acked", "unknown", "acked", "already_settled"]);
    broker.stop().await;
}
