//! The connection between the program and Postgres is cut right before, or right after, a write was forwarded. The client
//! gets the outcome, or is told that it is not known; a repeat gives the first result; nothing is doubled.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{at_once, size};
use crate::support::consumer::{items, publish, publish_ids, stream_ids};
use crate::support::{self, Action, Consumer, Direction, Http, Trap};

/// The queues' journal is written with the names of their leases.
const JOURNAL: &str = "slot/";

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_around_a_commit_is_found_out_and_doubles_nothing() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let program = support::program(&proxy.url(&database.url), &[]).await;
    let consumer = Consumer::declare(&program.http, "billing", &at_once(16)).await;
    publish(&program.http, "orders.created", 1).await;
    let first = consumer.take(1, 3_600).await;
    consumer
        .settle_all("ack", &items(&first, &json!({})), "acked")
        .await;
    let trap = Trap::on(&proxy);
    let rounds = size("POSTROAD_TEST_CUTS", 10);
    for round in 0..rounds {
        for (action, name) in [(Action::CutBefore, "before"), (Action::CutAfter, "after")] {
            let id = format!("cut-{name}-{round}");
            trap.arm(&id, action);
            let placed =
                publish_ids(&program.http, "orders.created", std::slice::from_ref(&id)).await;
            assert!(trap.has_sprung());
            assert_eq!(placed[0]["duplicate"], false, "{id}: {placed:?}");
            let again =
                publish_ids(&program.http, "orders.created", std::slice::from_ref(&id)).await;
            assert_eq!(again[0]["duplicate"], true);
            assert_eq!(again[0]["offset"], placed[0]["offset"]);

            let receive_id = format!("receive-{name}-{round}");
            trap.arm(&receive_id, action);
            let body = json!({"receive_id": receive_id, "wait_seconds": 10, "visibility_timeout_seconds": 3600});
            let answer = consumer.receive(&body).await;
            assert!(trap.has_sprung());
            let deliveries = answer["deliveries"].as_array().unwrap().clone();
            assert_eq!(deliveries.len(), 1, "{answer}");
            assert_eq!(deliveries[0]["delivery"], 1, "{answer}");
            assert_eq!(deliveries[0]["offset"], placed[0]["offset"]);
            let again = consumer.receive(&body).await;
            let receipts = |of: &Value| of["deliveries"][0]["receipt"].clone();
            assert_eq!(receipts(&again), receipts(&answer), "{again}");

            trap.arm(JOURNAL, action);
            let acks = items(&deliveries, &json!({}));
            consumer.settle_all("ack", &acks, "acked").await;
            assert!(trap.has_sprung());
            consumer.settle_all("ack", &acks, "already_settled").await;
        }
    }
    let ids = stream_ids(&program.http, "main").await;
    assert_eq!(ids.len(), 1 + 2 * rounds);
    let offsets: Vec<u64> = ids.iter().map(|(offset, _)| *offset).collect();
    assert!(
        offsets.iter().copied().eq(1..=offsets.len() as u64),
        "{offsets:?}"
    );
    assert_eq!(consumer.status().await["depth"], 0);
}

/// A request that must be answered 503 with this type of problem, and the time after which to ask again.
async fn refused(http: &Http, path: &str, content: &str, body: &Value, problem: &str) {
    let request = http.client.post(format!("{}{path}", http.base));
    let request = request
        .header("content-type", content)
        .body(body.to_string());
    let answer = request.send().await.unwrap();
    let (status, headers) = (answer.status(), answer.headers().clone());
    let body: Value = answer.json().await.unwrap();
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{path}: {body}");
    assert_eq!(body["type"], problem, "{path}");
    assert!(headers.contains_key("retry-after"), "{path}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_is_not_known_in_time_is_answered_so_and_a_repeat_gives_the_first_result() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let program = support::program(&proxy.url(&database.url), &[]).await;
    let http = program.http.clone();
    let consumer = Consumer::declare(&http, "billing", &at_once(16)).await;
    publish(&http, "orders.created", 3).await;
    let taken = consumer.take(2, 3_600).await;
    // What is seen is carried out, and its answer lost; from then on nothing gets through.
    let is_shut = Arc::new(AtomicBool::new(false));
    let (shut, seen) = (Arc::clone(&is_shut), Mutex::new(0));
    let (event, journal) = (b"lost-answer".as_slice(), JOURNAL.as_bytes());
    proxy.filter(move |direction, chunk| {
        if shut.load(Ordering::SeqCst) {
            return Action::CutBefore;
        }
        let has = |bytes: &[u8]| chunk.windows(bytes.len()).any(|part| part == bytes);
        if direction == Direction::ToServer && (has(event) || has(journal)) {
            let mut seen = seen.lock().unwrap();
            *seen += 1;
            shut.store(*seen == 2, Ordering::SeqCst);
            return Action::CutAfter;
        }
        Action::Forward
    });
    let event = json!([{"specversion": "1.0", "id": "lost-answer", "source": "/test", "type": "t", "data": {"id": "lost-answer"}}]);
    let ack = json!({"deliveries": items(&taken[..1], &json!({}))});
    let nack = json!({"deliveries": items(&taken[1..], &json!({"delay_seconds": 3600}))});
    let receive = json!({"wait_seconds": 0, "receive_id": "r", "visibility_timeout_seconds": 3600});
    let began = Instant::now();
    let (batch, plain) = ("application/cloudevents-batch+json", "application/json");
    let (is_unknown, is_unavailable) = ("/problems/outcome-unknown", "/problems/unavailable");
    let publish_path = "/v1/topics/orders.created/messages";
    let first = async {
        // All of one group: the writer repeats it as it was.
        tokio::join!(
            refused(&http, "/v1/queues/billing/ack", plain, &ack, is_unknown),
            refused(&http, "/v1/queues/billing/nack", plain, &nack, is_unknown),
        );
    };
    // This one is never sent: nothing is unknown about it.
    let later = async {
        support::eventually("the connection to be gone", || async {
            is_shut.load(Ordering::SeqCst).then_some(())
        })
        .await;
        let never =
            json!([{"specversion": "1.0", "id": "never-sent", "source": "/test", "type": "t"}]);
        refused(&http, publish_path, batch, &never, is_unavailable).await;
    };
    tokio::join!(
        first,
        refused(&http, publish_path, batch, &event, is_unknown),
        later
    );
    assert!(
        began.elapsed() < Duration::from_secs(14),
        "{:?}",
        began.elapsed()
    );
    proxy.no_filter();
    let placed = publish_ids(&http, "orders.created", &["lost-answer".to_owned()]).await;
    assert_eq!(placed[0]["offset"], 4, "{placed:?}");
    let there = stream_ids(&http, "main").await;
    assert_eq!(there.len(), 4, "{there:?}");
    let acks = items(&taken[..1], &json!({}));
    consumer.settle_all("ack", &acks, "already_settled").await;
    let nacks = items(&taken[1..], &json!({"delay_seconds": 1}));
    let outcomes = consumer.settle_all("nack", &nacks, "nacked").await;
    let due_in = support::consumer::time(&outcomes[0]["due_at"]) - chrono::Utc::now();
    assert!(due_in.num_seconds() > 3_500, "the first delay stands");
    let answer = consumer.receive(&receive).await;
    let deliveries = answer["deliveries"].as_array().unwrap();
    assert_eq!(deliveries.len(), 2, "{answer}");
    assert!(deliveries.iter().all(|d| d["delivery"] == 1), "{answer}");
}
