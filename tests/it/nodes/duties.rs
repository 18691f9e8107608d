//! The background work of a node, as it shows: what runs, what does not, and why.

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use super::{node, settled};
use crate::support::{self, Http};

/// The duty of this name, as a node shows it.
async fn duty(http: &Http, name: &str) -> Value {
    let (status, cluster) = http.get("/v1/cluster").await;
    assert_eq!(status.as_u16(), 200);
    let duties = cluster["duties"].as_array().unwrap();
    let found = duties.iter().find(|duty| duty["name"] == name);
    found
        .unwrap_or_else(|| panic!("no {name} in {duties:?}"))
        .clone()
}

async fn in_state(http: &Http, name: &str, states: &[&str]) -> Value {
    support::eventually(&format!("{name} to be {states:?}"), || async {
        let duty = duty(http, name).await;
        let state = duty["state"].as_str()?;
        states.contains(&state).then(|| duty.clone())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duty_that_fails_says_why_and_goes_on_when_it_can() {
    const NAME: &str = "stream schedule";
    let db = support::database().await;
    let one = node(&db.url).await;
    settled(&one.http, 1).await;
    let well = in_state(&one.http, NAME, &["running", "waiting"]).await;
    assert_eq!(
        (&well["lease"], &well["failures_in_a_row"]),
        (&json!("duty/scheduled"), &json!(0))
    );
    let mut connection = PgConnection::connect(&db.url).await.unwrap();
    let signature = "postroad_broker.next_scheduled(interval, timestamptz)";
    let hide = format!("alter function {signature} rename to hidden");
    sqlx::raw_sql(sqlx::AssertSqlSafe(hide))
        .execute(&mut connection)
        .await
        .unwrap();
    let failing = support::eventually("a second failure", || async {
        let duty = in_state(&one.http, NAME, &["failing"]).await;
        (duty["failures_in_a_row"].as_u64()? >= 2).then_some(duty)
    })
    .await;
    let why = failing["last_error"].as_str().unwrap();
    assert!(
        why.starts_with("looking for scheduled messages that are due failed: ")
            && why.contains("next_scheduled"),
        "{why}"
    );
    for moment in ["since", "last_pass_at", "last_error_at", "next_pass_at"] {
        let moment = failing[moment].as_str().unwrap();
        chrono::DateTime::parse_from_rfc3339(moment).unwrap();
    }
    // The others go on.
    let other = in_state(&one.http, "stream maintenance", &["running", "waiting"]).await;
    assert_eq!(other["failures_in_a_row"], 0);
    let show =
        "alter function postroad_broker.hidden(interval, timestamptz) rename to next_scheduled";
    sqlx::raw_sql(show).execute(&mut connection).await.unwrap();
    let well = in_state(&one.http, NAME, &["waiting"]).await;
    assert_eq!(well["failures_in_a_row"], 0);
    assert_eq!(well["last_error"], why, "it is remembered");
    assert!(well["passes"].as_u64() > failing["passes"].as_u64());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_duties_of_one_lease_run_on_one_node_and_stand_by_on_the_other() {
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    for (name, lease) in [
        ("stream maintenance", "duty/streams"),
        ("stream schedule", "duty/scheduled"),
        ("stream schedule upkeep", "duty/scheduled"),
        ("relay/local", "relay/1"),
    ] {
        support::eventually(&format!("{name} on one node"), || async {
            let mut states = Vec::new();
            for program in [&one, &two] {
                let duty = duty(&program.http, name).await;
                assert_eq!(duty["lease"], lease);
                states.push(duty["state"] == "standing_by");
            }
            states.sort_unstable();
            (states == [false, true]).then_some(())
        })
        .await;
    }
    // Each node does these.
    for name in [
        "cluster heartbeat",
        "stream tail",
        "stream teller",
        "topic settings",
    ] {
        for program in [&one, &two] {
            let duty = duty(&program.http, name).await;
            assert_eq!(
                (&duty["lease"], &duty["failures_in_a_row"]),
                (&json!(null), &json!(0))
            );
        }
    }
}
