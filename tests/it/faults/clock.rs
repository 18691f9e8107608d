//! The database's clock was ahead for a while. What was handed out or put off meanwhile is not held for as long as it was, once
//! a node that has read the clock anew has the queue; and nothing comes before its time.

use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::{Connection as _, PgConnection};

use crate::support::consumer::{items, publish};
use crate::support::{self, Consumer};

/// A node reads the database's clock when it registers, and goes on from there by its own.
const AHEAD: &str = "alter function postroad_broker.register_node(text, text, double precision) rename to register_node_in_time;
    create function postroad_broker.register_node(p_address text, p_url text, p_ttl_seconds double precision)
        returns table (new_incarnation bigint, clock timestamptz, former_wants text[]) language sql as $$
        select r.new_incarnation, r.clock + interval '1 hour', r.former_wants
        from postroad_broker.register_node_in_time(p_address, p_url, p_ttl_seconds) r $$";
const SET_BACK: &str = "drop function postroad_broker.register_node(text, text, double precision);
    alter function postroad_broker.register_node_in_time(text, text, double precision) rename to register_node";

/// For how long each is held or put off.
const HELD: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread")]
async fn what_was_held_by_a_clock_that_was_ahead_comes_in_its_time() {
    let database = support::database().await;
    let mut direct = PgConnection::connect(&database.url).await.unwrap();
    sqlx::raw_sql(AHEAD).execute(&mut direct).await.unwrap();
    // Its own clock says the same, or it would not believe it.
    let variables = [("POSTROAD_LIMITS", "clock-lead-seconds=315360000")];
    let variables = match cfg!(feature = "failpoints") {
        true => &variables[..],
        false => &[],
    };
    let mut program = support::program(&database.url, variables).await;
    let consumer =
        Consumer::declare(&program.http, "billing", &json!({"topics": ["orders.*"]})).await;
    publish(&program.http, "orders.created", 4).await;
    let held = u32::try_from(HELD.as_secs()).unwrap();
    let taken = consumer.take(3, 3_600).await;
    let later = json!({"delay_seconds": held});
    consumer
        .settle_all("nack", &items(&taken[..1], &later), "nacked")
        .await;
    consumer
        .settle_all("release", &items(&taken[1..2], &later), "released")
        .await;
    let extend = json!({"visibility_timeout_seconds": held});
    consumer
        .settle_all("extend", &items(&taken[2..], &extend), "extended")
        .await;
    let began = Instant::now();
    let last = consumer.take(1, held).await;
    program.kill().await;
    sqlx::raw_sql(SET_BACK).execute(&mut direct).await.unwrap();
    program.start().await;
    // Once more: what was mended is as it was mended.
    program.kill().await;
    program.start().await;

    // The last one is still whose it was, and says so by the clock as it is now.
    let extended = consumer
        .settle_all(
            "extend",
            &items(&last, &json!({"visibility_timeout_seconds": 3_600})),
            "extended",
        )
        .await;
    let until = support::consumer::time(&extended[0]["visible_until"]);
    let left = (until - chrono::Utc::now()).num_seconds();
    assert!((3_500..3_700).contains(&left), "{extended:?}");
    let again = consumer.take(3, 3_600).await;
    let took = began.elapsed();
    assert!(took >= HELD, "before its time: {took:?}");
    assert!(took < Duration::from_secs(600), "{took:?}");
    for delivery in &again {
        assert_eq!(delivery["delivery"], 2, "{delivery}");
    }
    consumer
        .settle_all("ack", &items(&again, &json!({})), "acked")
        .await;
    consumer
        .settle_all("ack", &items(&last, &json!({})), "acked")
        .await;
}
