//! What comes seldom in ordinary work, and is to come within seconds: leaves of outboxes that can be emptied, and a stream that keeps
//! little.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use crate::support::Http;
use crate::support::worker::Dice;

/// The stream whose messages go after a second.
pub const BRIEF: &str = "brief";
/// Messages of a publish to it.
const BATCH: usize = 40;
/// Longer than the outbox's grace: a leaf with a row that was not passed for so long is not emptied.
const LATE_PAUSE: Duration = Duration::from_millis(3_500);

/// Limits of the nodes that are lowered.
pub const LIMITS: &str = "leaf-offsets=200,journal-bytes=8192,relay-fold-appends=20";

pub fn brief() -> Value {
    json!({"topics": ["brief.>"], "settled_retention_seconds": 1})
}

/// Publishes to the stream that keeps little, again and again. Where messages are said to be only ever rises, whatever was dropped.
pub async fn publish(
    nodes: Vec<Http>,
    mut dice: Dice,
    rest: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
) {
    let (mut number, mut last) = (0, 0);
    while !is_over.load(Ordering::Relaxed) {
        let messages = (0..BATCH).map(|_| {
            number += 1;
            json!({"topic": "brief.noted", "id": format!("brief-{number}"), "data": number})
        });
        let body = json!({"messages": messages.collect::<Vec<_>>()});
        while !is_over.load(Ordering::Relaxed) {
            let http = &nodes[dice.below(nodes.len())];
            let answer = http.call(Method::POST, "/v1/messages", Some(&body)).await;
            if let Ok((status, answer)) = answer
                && status.is_success()
            {
                for placed in answer["messages"].as_array().unwrap() {
                    let offset = placed["offset"].as_u64().unwrap();
                    assert!(offset > last, "{offset} after {last}: {answer}");
                    last = offset;
                }
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let millis = rest.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(millis)).await;
    }
}

/// A row in a leaf that is not filled now, and is emptied once it is relayed: as a transaction that was open for long commits one.
const LATE: &str = "with message (id) as (
        insert into postroad.outbox (topic, payload, bucket)
        select 'orders.late', '{}', ((floor(extract(epoch from now()) / 300)::bigint + 4) % 8)::integer returning id)
    insert into ledger (id) select id from message";

/// Inserts such rows again and again.
pub async fn insert_late(url: String, is_over: Arc<AtomicBool>) {
    while !is_over.load(Ordering::Relaxed) {
        if let Ok(mut connection) = PgConnection::connect(&url).await {
            // What became of it the ledger says.
            let _ = sqlx::raw_sql(LATE).execute(&mut connection).await;
        }
        tokio::time::sleep(LATE_PAUSE).await;
    }
}
