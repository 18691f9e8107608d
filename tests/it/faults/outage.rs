//! Postgres is stopped for longer than any delivery is held, and comes back.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use super::{at_once, size};
use crate::support::consumer::{items, publish, time};
use crate::support::process::cpu_time;
use crate::support::{self, Consumer, Http};

/// A call that must be refused for the moment: 503, with the time after which to ask again.
async fn refused(http: &Http, path: &str, body: &Value) {
    let request = http
        .client
        .request(Method::POST, format!("{}{path}", http.base));
    let answer = request.json(body).send().await.unwrap();
    let retry_after = answer.headers().get("retry-after").cloned();
    let (status, body) = (answer.status(), answer.text().await.unwrap());
    assert_eq!(status.as_u16(), 503, "{path}: {body}");
    assert!(retry_after.is_some(), "{path}: {body}");
    assert!(body.contains("/problems/"), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_postgres_kills_no_message_and_charges_no_attempt() {
    let mut cluster = support::cluster().await;
    let url = cluster.create_database("shop").await;
    let program = support::program(&url, &[]).await;
    // One attempt: an expiry is a dead letter.
    let consumer = Consumer::declare(&program.http, "billing", &at_once(1)).await;
    let idle = json!({"topics": ["parcels.*"]});
    let idle = Consumer::declare(&program.http, "parcels", &idle).await;
    publish(&program.http, "orders.created", 1_000).await;
    let taken = consumer.take(1_000, 3).await;
    let away_at = Instant::now();
    cluster.stop().await;

    support::eventually("the queues to stand still", || async {
        let (_, queue) = consumer.http.get("/v1/queues/billing").await;
        (queue["status"]["standing_still"] == true).then_some(())
    })
    .await;
    // A poll from before the end of the outage outlives it.
    let waiting = tokio::spawn(async move { idle.take(1, 3_600).await });
    // So does an ack, unless it is told that its outcome is not known and asks again.
    let early = items(&taken[..1], &json!({}));
    let acking = tokio::spawn({
        let consumer = consumer.clone();
        async move { consumer.settle("ack", &early).await }
    });
    let receive = |wait: u32| json!({"wait_seconds": wait});
    refused(&program.http, "/v1/queues/parcels/receive", &receive(0)).await;
    refused(&program.http, "/v1/queues/parcels/receive", &receive(1)).await;
    let seconds = size("POSTROAD_TEST_OUTAGE_SECONDS", 6) as u64;
    let (since, busy) = (Instant::now(), cpu_time(program.pid()));
    tokio::time::sleep(Duration::from_secs(seconds).saturating_sub(away_at.elapsed())).await;
    let standing = consumer.http.get("/v1/queues/billing").await;
    assert_eq!(standing.0.as_u16(), 200);
    assert_eq!(standing.1["status"]["standing_still"], true);
    // What stands still does nothing: half of a second is for the requests, in the long form for little else.
    let busy = cpu_time(program.pid()).saturating_sub(busy);
    let allowed = since.elapsed() / 10 + Duration::from_millis(500);
    assert!(
        busy < allowed,
        "{busy:?} of processor time in {:?}",
        since.elapsed()
    );
    cluster.start().await;
    let away = away_at.elapsed();

    support::eventually("the queue to go on", || async {
        let (status, queue) = consumer.http.get("/v1/queues/billing").await;
        (status.is_success() && queue["status"]["standing_still"] == false).then_some(())
    })
    .await;
    let acked = acking.await.unwrap();
    assert!(
        ["acked", "already_settled"].contains(&acked[0]["result"].as_str().unwrap()),
        "{acked:?}"
    );
    let live = consumer.in_flight().await;
    assert_eq!(live.len(), 999, "nothing expired");
    for (live, taken) in live.iter().zip(&taken[1..]) {
        let moved = time(&live["visible_until"]) - time(&taken["visible_until"]);
        // The outage counts from the last sign of life, a second before at most.
        let late = away.saturating_sub(Duration::from_millis(500));
        assert!(moved.to_std().unwrap() >= late, "by {moved} in {away:?}");
        assert_eq!(live["attempt"], 1, "no attempt was counted");
    }
    consumer
        .settle_all("ack", &items(&taken[1..], &json!({})), "acked")
        .await;
    let numbers = consumer.status().await;
    assert_eq!(
        (&numbers["depth"], &numbers["dead_letters"]),
        (&json!(0), &json!(0))
    );
    publish(&program.http, "parcels.sent", 1).await;
    assert_eq!(waiting.await.unwrap()[0]["attempt"], 1);
}
