//! Messages of high priority that come when very many of low priority wait: they go first, and the low ones go on.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{quantile, relayed, size};
use crate::support::consumer::{items, publish_events};
use crate::support::{self, Consumer, TestDatabase};

const PATIENCE: Duration = Duration::from_secs(900);
/// Messages of each lane that are received while both have some.
const SHARED: usize = 1_000;

/// Inserts so many messages of a priority, in transactions of 100,000.
async fn insert(database: &TestDatabase, priority: &str, count: u64) {
    let mut connection = database.connect().await;
    for first in (1..=count).step_by(100_000) {
        sqlx::query(
            "insert into postroad.outbox (topic, payload, headers)
             select 'work.todo', '{\"n\": ' || n || '}', jsonb_build_object('priority', $1::text)
             from generate_series($2::bigint, $3::bigint) as n",
        )
        .bind(priority)
        .bind(i64::try_from(first).unwrap())
        .bind(i64::try_from(count.min(first + 99_999)).unwrap())
        .execute(&mut connection)
        .await
        .unwrap();
    }
}

async fn publish_high(queue: &Consumer, id: &str) {
    let event = json!({
        "specversion": "1.0", "id": id, "source": "/test", "type": "t", "priority": "high", "data": {"id": id},
    });
    publish_events(&queue.http, "work.todo", &[event]).await;
}

fn count_of(deliveries: &[Value], priority: &str) -> usize {
    let of = deliveries
        .iter()
        .filter(|delivery| delivery["event"]["priority"] == priority);
    of.count()
}

async fn ack(queue: &Consumer, deliveries: &[Value]) {
    let items = items(deliveries, &json!({}));
    queue.settle_all("ack", &items, "acked").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_urgent_overtakes_what_waits_and_does_not_starve_it() {
    let low = size("POSTROAD_SOAK_LOW", 20_000);
    let times = size("POSTROAD_SOAK_HIGH", 20);
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let declaration = json!({"topics": ["work.>"], "priorities": true, "max_in_flight": 10_000});
    let queue = Consumer::declare(&program.http, "work", &declaration).await;
    insert(&database, "low", low).await;
    relayed(&program, PATIENCE).await;
    let deadline = Instant::now() + PATIENCE;
    while queue.status().await["lanes"]["low"] != low {
        assert!(Instant::now() < deadline, "the queue has not looked at all");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // Each is published when the consumer is busy with low ones. The queue hears of it a moment after the publish is answered:
    // what goes out until then is a low one still.
    let (mut seconds, mut passed) = (Vec::new(), 0);
    for number in 0..times {
        let taken = queue.take(100, 60).await;
        ack(&queue, &taken).await;
        let began = Instant::now();
        publish_high(&queue, &format!("high-{number}")).await;
        loop {
            let taken = queue.take(1, 60).await;
            let is_high = count_of(&taken, "high") == 1;
            if is_high {
                seconds.push(began.elapsed().as_secs_f64());
            }
            ack(&queue, &taken).await;
            if is_high {
                break;
            }
            passed += 1;
            assert!(passed < low / 4, "low ones go before the high one");
        }
    }
    println!(
        "behind {low} of low priority a high one is out in {:.1} ms in the median, {:.1} ms at most, of {times}, from its publish; {passed} low ones went before",
        1_000.0 * quantile(&mut seconds, 0.5),
        1_000.0 * quantile(&mut seconds, 1.0),
    );

    // While high ones do not end, at least every tenth is a low one.
    insert(&database, "high", 2 * SHARED as u64).await;
    relayed(&program, PATIENCE).await;
    support::eventually("the high ones are found", || async {
        (queue.status().await["lanes"]["high"] == 2 * SHARED).then_some(())
    })
    .await;
    let taken = queue.take(SHARED, 60).await;
    let (of_low, of_high) = (count_of(&taken, "low"), count_of(&taken, "high"));
    println!("of {SHARED} while both wait: {of_low} low, {of_high} high");
    assert!(of_low >= SHARED / 10, "{of_low} low");
    assert!(of_high > SHARED / 2, "{of_high} high");
    ack(&queue, &taken).await;
}
