//! Retention drops all that a stream has; the next message has the next offset, and every queue gets it.

use serde_json::json;

use crate::support::consumer::{items, publish};
use crate::support::{self, Consumer, Http};

/// Nothing is dropped while it is worked on, however slow that is.
async fn keep(http: &Http, seconds: u32) {
    let stream = json!({"topics": ["short.*"], "settled_retention_seconds": seconds, "unsettled_retention_seconds": seconds});
    http.declare("/v1/streams/short", &stream).await;
}

async fn all_dropped(http: &Http, last: u64) {
    keep(http, 1).await;
    support::eventually("retention to drop everything", || async {
        let (_, stream) = http.get("/v1/streams/short").await;
        let offsets = (&stream["first_offset"], &stream["last_offset"]);
        (offsets == (&json!(last + 1), &json!(last))).then_some(())
    })
    .await;
    keep(http, 3_600).await;
}

/// The one message that is left comes, as a first delivery, and is acked.
async fn gets(consumer: &Consumer, offset: u64) {
    let taken = consumer.take(1, 3_600).await;
    assert_eq!(taken.len(), 1);
    assert_eq!(taken[0]["offset"], offset, "{}", consumer.queue);
    assert_eq!(taken[0]["delivery"], 1, "{}", consumer.queue);
    let acks = items(&taken, &json!({}));
    consumer.settle_all("ack", &acks, "acked").await;
    assert_eq!(consumer.status().await["depth"], 0, "{}", consumer.queue);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_retention_has_dropped_everything_every_queue_gets_the_next_message() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http = program.http.clone();
    keep(&http, 3_600).await;
    let queue = json!({"stream": "short", "topics": ["short.*"]});
    // One keeps up, one never receives, one holds what it received, one has it nacked until later.
    let mut consumers = Vec::new();
    for name in ["keeps_up", "never", "holds", "delays"] {
        consumers.push(Consumer::declare(&http, name, &queue).await);
    }
    publish(&http, "short.a", 50).await;
    for (consumer, verb) in [(0, "ack"), (2, "extend"), (3, "nack")] {
        let taken = consumers[consumer].take(50, 3_600).await;
        consumers[consumer]
            .settle(verb, &items(&taken, &json!({})))
            .await;
    }
    all_dropped(&http, 50).await;
    let (held, delayed) = (consumers.remove(2), consumers.remove(2));
    consumers.push(Consumer::declare(&http, "new", &queue).await);
    publish(&http, "short.a", 1).await;
    for consumer in &consumers {
        gets(consumer, 51).await;
    }
    // What is lost does not hold up what is new, neither where it is live nor where it falls due.
    for consumer in [&held, &delayed] {
        let taken = consumer.take(1, 3_600).await;
        assert_eq!(taken[0]["offset"], 51, "{}", consumer.queue);
    }
    all_dropped(&http, 51).await;
    program.kill().await;
    program.start().await;
    consumers.push(Consumer::declare(&http, "newer", &queue).await);
    publish(&http, "short.a", 1).await;
    for consumer in &consumers {
        gets(consumer, 52).await;
    }
}
