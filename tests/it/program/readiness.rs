//! A node is ready while its writes come through, and says why when they do not.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;

use crate::support::{self, Http};

async fn unready(http: &Http, reason: &str) {
    let ready = support::eventually("the node not to be ready", || async {
        let (status, ready) = http.get("/readyz").await;
        let is_it = status == StatusCode::SERVICE_UNAVAILABLE && ready.to_string().contains(reason);
        is_it.then_some(ready)
    })
    .await;
    assert_eq!(ready["reasons"][0]["part"], "database", "{ready}");
    assert_eq!(http.get("/healthz").await.0, StatusCode::OK);
    assert_eq!(http.get("/metrics").await.0, StatusCode::OK);
}

async fn ready(http: &Http) {
    support::eventually("the node to be ready again", || async {
        let (status, _): (StatusCode, Value) = http.get("/readyz").await;
        (status == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_database_is_away_is_not_ready_until_it_is_back() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let mut config = support::broker::config(&proxy.url(&database.url));
    config.node_heartbeat = Duration::from_millis(200);
    let broker = postroad::app::Broker::start(config).await.unwrap();
    let http = Http::new(broker.url());
    ready(&http).await;
    proxy.hold();
    unready(&http, "no write has come through for ").await;
    proxy.open();
    ready(&http).await;
    broker.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_commits_wait_for_a_missing_standby_says_so() {
    let cluster = support::cluster().await;
    let url = cluster.create_database("b").await;
    let mut config = support::broker::config(&url);
    config.node_heartbeat = Duration::from_millis(200);
    let broker = postroad::app::Broker::start(config).await.unwrap();
    let http = Http::new(broker.url());
    let mut admin = <sqlx::PgConnection as sqlx::Connection>::connect(&url)
        .await
        .unwrap();
    let set = "alter system set synchronous_standby_names = 'nobody'";
    for statement in [set, "select pg_reload_conf()"] {
        sqlx::query(statement).execute(&mut admin).await.unwrap();
    }
    unready(&http, "synchronous standby").await;
    let reset = "alter system reset synchronous_standby_names";
    for statement in [reset, "select pg_reload_conf()"] {
        sqlx::query(statement).execute(&mut admin).await.unwrap();
    }
    ready(&http).await;
    broker.stop().await.unwrap();
}
