//! The matrix of verb and state (docs/protocol.md) over HTTP, cell by cell: the answer, the answer to a repeat, and the answer to
//! another repeat after the program was killed with -9.

use postroad::domain::id::{Generation, Offset};
use postroad::domain::receipt::{Key, Receipt};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::consumer::{items, patiently, publish, time};
use crate::support::{self, Consumer, Http};

const VERBS: [&str; 5] = ["ack", "nack", "release", "extend", "reject"];

/// What a state answers to `VERBS`, and to the same again.
struct Row {
    state: &'static str,
    first: [&'static str; 5],
    again: [&'static str; 5],
}

const fn row(state: &'static str, first: [&'static str; 5], again: [&'static str; 5]) -> Row {
    Row {
        state,
        first,
        again,
    }
}

const fn same(state: &'static str, answer: &'static str) -> Row {
    row(state, [answer; 5], [answer; 5])
}

const DEAD: [&str; 5] = [
    "acked",
    "dead_lettered",
    "dead_lettered",
    "dead_lettered",
    "dead_lettered",
];
const DEAD_AGAIN: [&str; 5] = [
    "already_settled",
    "dead_lettered",
    "dead_lettered",
    "dead_lettered",
    "dead_lettered",
];
const LIVE: [&str; 5] = ["acked", "nacked", "released", "extended", "rejected"];
const LIVE_AGAIN: [&str; 5] = [
    "already_settled",
    "nacked",
    "released",
    "extended",
    "dead_lettered",
];

const MATRIX: [Row; 20] = [
    same("malformed", "unknown"),
    same("mac_wrong", "unknown"),
    same("other_queue", "unknown"),
    same("former_generation", "gone"),
    same("later_generation", "gone"),
    same("recreated", "gone"),
    same("sought", "gone"),
    same("purged", "gone"),
    same("lost_to_the_hard_limit", "gone"),
    same("acked", "already_settled"),
    row("rejected", DEAD, DEAD_AGAIN),
    row("out_of_attempts", DEAD, DEAD_AGAIN),
    same("dead_by_a_later_delivery", "dead_lettered"),
    same("stale", "stale"),
    row("live", LIVE, LIVE_AGAIN),
    row("expired", LIVE, LIVE_AGAIN),
    row(
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
    row(
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
    same("delivery_never_issued", "gone"),
    same("offset_never_issued", "gone"),
];

/// A queue of the state's own and five receipts, one per verb, of messages in that state.
struct Case {
    consumer: Consumer,
    receipts: Vec<String>,
    is_by_a_later_delivery: bool,
}

fn declaration(state: &str) -> Value {
    let stream = if state == "lost_to_the_hard_limit" {
        "short"
    } else {
        "main"
    };
    json!({
        "stream": stream, "topics": [format!("{state}.*")],
        "max_attempts": match state { "out_of_attempts" => 1, "dead_by_a_later_delivery" => 2, _ => 16 },
        "visibility_timeout_seconds": if state == "expired" { 1 } else { 3600 },
        "retry": {"delays_seconds": [0]},
    })
}

async fn case(http: &Http, key: &Key, state: &'static str) -> Case {
    let consumer = Consumer::declare(http, state, &declaration(state)).await;
    publish(http, &format!("{state}.a"), 5).await;
    let visible = if state == "expired" { 1 } else { 3_600 };
    let taken = consumer.take(5, visible).await;
    bring_about(&consumer, state, &taken).await;
    let sealed = |change: &dyn Fn(&mut Receipt)| -> Vec<String> {
        let texts = taken
            .iter()
            .map(|delivery| delivery["receipt"].as_str().unwrap());
        texts
            .map(|text| {
                let mut receipt = key.open(text).unwrap();
                change(&mut receipt);
                key.seal(&receipt)
            })
            .collect()
    };
    let receipts = match state {
        "malformed" => vec!["no receipt".to_owned(); 5],
        "mac_wrong" => sealed(&|_| {})
            .into_iter()
            .map(|text| {
                let (start, end) = text.split_at(text.len() - 5);
                let other = if end.starts_with('A') { 'B' } else { 'A' };
                format!("{start}{other}{}", &end[1..])
            })
            .collect(),
        "former_generation" => sealed(&|receipt| receipt.generation = Generation(0)),
        "later_generation" => sealed(&|receipt| receipt.generation = Generation(2)),
        "delivery_never_issued" => sealed(&|receipt| receipt.delivery += 7),
        "offset_never_issued" => sealed(&|receipt| receipt.offset = Offset(1_000_000)),
        _ => sealed(&|_| {}),
    };
    let consumer = match state {
        "other_queue" => Consumer::declare(http, "another", &declaration("another")).await,
        _ => consumer,
    };
    Case {
        consumer,
        receipts,
        is_by_a_later_delivery: state == "dead_by_a_later_delivery",
    }
}

/// Does to the deliveries what makes the state.
async fn bring_about(consumer: &Consumer, state: &str, taken: &[Value]) {
    let plain = items(taken, &json!({}));
    match state {
        "acked" => {
            consumer.settle_all("ack", &plain, "acked").await;
        }
        "rejected" => {
            consumer.settle_all("reject", &plain, "rejected").await;
        }
        "out_of_attempts" => {
            for outcome in consumer.settle_all("nack", &plain, "nacked").await {
                assert!(outcome["dead_letter"].is_string(), "{outcome}");
            }
        }
        "dead_by_a_later_delivery" => {
            consumer.settle_all("nack", &plain, "nacked").await;
            let later = consumer.take(5, 3_600).await;
            let later = items(&later, &json!({}));
            consumer.settle_all("nack", &later, "nacked").await;
        }
        "stale" => {
            consumer.settle_all("nack", &plain, "nacked").await;
            consumer.take(5, 3_600).await;
        }
        "nacked" => {
            let delayed = items(taken, &json!({"delay_seconds": 3600}));
            consumer.settle_all("nack", &delayed, "nacked").await;
        }
        "released" => {
            let delayed = items(taken, &json!({"delay_seconds": 3600}));
            consumer.settle_all("release", &delayed, "released").await;
        }
        "expired" => {
            support::eventually("the deliveries to expire", || async {
                consumer.in_flight().await.is_empty().then_some(())
            })
            .await;
        }
        "sought" | "purged" => {
            let verb = if state == "sought" { "seek" } else { "purge" };
            let body = match verb {
                "seek" => json!({"to": "latest"}),
                _ => json!({}),
            };
            let path = format!("/v1/queues/{state}/{verb}");
            let answer = consumer.http.ok(&path, &body).await;
            assert_eq!(answer["generation"], 2, "{answer}");
        }
        "recreated" => {
            let path = format!("/v1/queues/{state}");
            let (status, answer) = consumer.http.delete(&path).await;
            assert!(status.is_success(), "{answer}");
            consumer.http.declare(&path, &declaration(state)).await;
        }
        "lost_to_the_hard_limit" => {
            support::eventually("the messages to be dropped", || async {
                let (_, stream) = consumer.http.get("/v1/streams/short").await;
                (stream["first_offset"].as_u64() == Some(6)).then_some(())
            })
            .await;
            // The queue hears of it after the stream: the rows go first, then what was to be delivered of them.
            support::eventually("the queue to forget them", || async {
                consumer.in_flight().await.is_empty().then_some(())
            })
            .await;
        }
        _ => {}
    }
}

/// Whether the verb did what it says before: a repeat counts as the first.
fn is_repeat(case: &Case, verb: &str, result: &str) -> bool {
    match (verb, result) {
        ("ack", "already_settled") => true,
        ("nack" | "release" | "reject", "dead_lettered") => !case.is_by_a_later_delivery,
        _ => false,
    }
}

async fn ask(case: &Case) -> Vec<Value> {
    let mut answers = Vec::new();
    for (verb, receipt) in VERBS.into_iter().zip(&case.receipts) {
        let mut item = json!({"receipt": receipt});
        match verb {
            "nack" | "release" => item["delay_seconds"] = json!(1_800),
            "extend" => item["visibility_timeout_seconds"] = json!(1_800),
            _ => {}
        }
        let path = format!("/v1/queues/{}/{verb}", case.consumer.queue);
        let body = json!({"deliveries": [item]});
        let answer = patiently(&case.consumer.http, Method::POST, &path, Some(&body)).await;
        let outcome = &answer["deliveries"][0];
        let result = outcome["result"].as_str().unwrap();
        let is_done = LIVE.contains(&result) || is_repeat(case, verb, result);
        assert_eq!(
            (answer["settled"].as_u64(), answer["refused"].as_u64()),
            (Some(u64::from(is_done)), Some(u64::from(!is_done))),
            "{answer}"
        );
        check_members(verb, outcome);
        answers.push(outcome.clone());
    }
    answers
}

/// What an answer says beside its result.
fn check_members(verb: &str, outcome: &Value) {
    match outcome["result"].as_str().unwrap() {
        "extended" => {
            let ahead = time(&outcome["visible_until"]) - chrono::Utc::now();
            assert!(
                (1_700..=1_830).contains(&ahead.num_seconds()),
                "{verb}: {outcome}"
            );
        }
        "nacked" | "released" => {
            time(&outcome["due_at"]);
        }
        "rejected" | "dead_lettered" => {
            assert!(outcome["dead_letter"].is_string(), "{verb}: {outcome}");
        }
        "stale" => assert!(outcome["attempt"].as_u64().unwrap() >= 1, "{outcome}"),
        _ => {}
    }
}

fn results(answers: &[Value]) -> Vec<&str> {
    answers
        .iter()
        .map(|answer| answer["result"].as_str().unwrap())
        .collect()
}

/// An extend moves the deadline each time it is repeated; everything else is told as it was.
fn settled_form(answers: &[Value]) -> Vec<Value> {
    let mut answers = answers.to_vec();
    for answer in &mut answers {
        if answer["result"] == "extended" {
            answer["visible_until"] = Value::Null;
        }
    }
    answers
}

async fn receipt_key(database: &support::TestDatabase) -> Key {
    let bytes: Vec<u8> = sqlx::query_scalar("select receipt_key from postroad_broker.broker")
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap();
    Key::new(&bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cell_answers_as_the_protocol_says_and_again_after_a_kill() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let key = receipt_key(&database).await;
    let short = json!({"topics": ["lost_to_the_hard_limit.*"], "settled_retention_seconds": 1, "unsettled_retention_seconds": 1});
    program.http.declare("/v1/streams/short", &short).await;
    let making = MATRIX
        .iter()
        .map(|row| case(&program.http, &key, row.state));
    let cases = futures_util::future::join_all(making).await;
    let mut told = Vec::new();
    for (row, case) in MATRIX.iter().zip(&cases) {
        let first = ask(case).await;
        assert_eq!(results(&first), row.first, "{}", row.state);
        let again = ask(case).await;
        assert_eq!(results(&again), row.again, "{}, again", row.state);
        for (first, again) in first.iter().zip(&again) {
            assert_eq!(
                first["due_at"], again["due_at"],
                "{}: the first delay stands",
                row.state
            );
        }
        told.push(settled_form(&again));
    }
    let mut numbers = Vec::new();
    for case in &cases {
        numbers.push(case.consumer.status().await);
    }
    program.kill().await;
    program.start().await;
    for ((row, case), told) in MATRIX.iter().zip(&cases).zip(&told) {
        let after = ask(case).await;
        assert_eq!(&settled_form(&after), told, "{}, after the kill", row.state);
    }
    for ((row, case), before) in MATRIX.iter().zip(&cases).zip(numbers) {
        let after = case.consumer.status().await;
        for count in ["depth", "in_flight", "delayed", "ready", "dead_letters"] {
            assert_eq!(after[count], before[count], "{count} of {}", row.state);
        }
    }
    let letters: i64 = sqlx::query_scalar("select count(*) from postroad_broker.dead_letter")
        .fetch_one(&mut database.connect().await)
        .await
        .unwrap();
    // Five by a later delivery; of those dead already, one of five was acked after all; four states had a reject.
    assert_eq!(letters, 5 + 4 + 4 + 4);
}
