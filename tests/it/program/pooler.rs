//! Poolers between Postroad and a server: one whose clients share sessions is refused, before anything of it leaks into them.

use reqwest::StatusCode;
use serde_json::json;
use sqlx::Connection as _;

use super::{output, postroad};
use crate::support::broker::{launch, variables};
use crate::support::pooler::{Mode, pooler};
use crate::support::{self, Http};

const REFUSAL: &str = "the connection goes through a pooler in transaction mode";

/// What the session that all clients share has been set to.
async fn settings(url: &str) -> Vec<String> {
    let mut connection = sqlx::PgConnection::connect(url).await.unwrap();
    let mut settings = Vec::new();
    for name in [
        "plan_cache_mode",
        "statement_timeout",
        "enable_seqscan",
        "application_name",
    ] {
        let text = sqlx::AssertSqlSafe(format!("show {name}"));
        let row = sqlx::raw_sql(text)
            .fetch_one(&mut connection)
            .await
            .unwrap();
        settings.push(sqlx::Row::get::<String, _>(&row, 0));
    }
    settings
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_sessions_are_refused_for_the_broker_and_for_an_origin() {
    let cluster = support::cluster().await;
    let broker = cluster.create_database("b").await;
    let shop = cluster.create_database("shop").await;
    let pooler = pooler(&broker, Mode::Transaction).await;
    for command in ["serve", "install"] {
        let mut command = postroad(&[command]);
        command.env("DATABASE_URL", pooler.url("shop"));
        command.env("POSTROAD_BIND", "127.0.0.1:0");
        let (code, _, said) = output(command).await;
        assert_eq!(code, 1, "{said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("error: ") && last.contains(REFUSAL),
            "{said}"
        );
    }
    let mut install = postroad(&["install"]);
    install.env("DATABASE_URL", &shop);
    assert_eq!(output(install).await.0, 0);
    let before = settings(&pooler.url("shop")).await;

    let mut all = variables(&broker);
    let origins = r#"{"shop": {"url_env": "SHOP_URL"}}"#;
    all.push(("POSTROAD_ORIGINS".to_owned(), origins.to_owned()));
    all.push(("SHOP_URL".to_owned(), pooler.url("shop")));
    let (mut child, mut log) = launch(&all);
    let entry = log.wait_for("postroad is ready").await;
    let http = Http::new(entry["fields"]["url"].as_str().unwrap());
    log.read_on(None);
    let origin = support::eventually("the origin to be refused", || async {
        let (_, origin) = http.get("/v1/origins/shop").await;
        (origin["state"] == "refused").then_some(origin)
    })
    .await;
    assert!(
        origin["detail"].as_str().unwrap().contains(REFUSAL),
        "{origin}"
    );
    assert_eq!(settings(&pooler.url("shop")).await, before);
    child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_ones_own_get_their_settings_by_way_of_a_pooler_too() {
    let cluster = support::cluster().await;
    let broker = cluster.create_database("b").await;
    let pooler = pooler(&broker, Mode::Session).await;
    let program = support::program(&pooler.url("b"), &[]).await;
    let published = program
        .http
        .post("/v1/topics/orders.created/messages", &json!({"n": 1}))
        .await;
    assert_eq!(published.0, StatusCode::OK, "{}", published.1);
    let mut admin = sqlx::PgConnection::connect(&broker).await.unwrap();
    let named = "select count(*) from pg_stat_activity where datname = 'b' and application_name like 'postroad%'";
    let named: i64 = sqlx::query_scalar(named)
        .fetch_one(&mut admin)
        .await
        .unwrap();
    assert!(named >= 3, "{named} sessions have their settings");
}
