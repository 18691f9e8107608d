//! Outbox rows that expect a version of their key: those that find another one are listed, and stop nobody.

use postroad::domain::name::{StreamName, TopicPattern};
use postroad::outbox::{self, Message};
use postroad::store;
use postroad::stream::Retention;
use serde_json::json;
use sqlx::Connection as _;

use super::{Origin, connect, execute, read_log, rig};
use crate::support::{self, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_row_goes_in_at_its_version_or_is_listed() {
    let broker = support::broker().await;
    let http = &broker.http;
    let keyed = json!({"topics": ["accounts.>"], "keyed": true});
    http.declare("/v1/streams/accounts", &keyed).await;
    let origin = Origin {
        url: broker.database.url.clone(),
        layout: super::shop::Layout::Own,
    };
    let mut producer = connect(&origin.url).await;
    execute(
        &mut producer,
        &format!("set role {}", support::role("producer", &origin.url)),
    )
    .await;
    let mut tx = producer.begin().await.unwrap();
    for (id, version) in [("one", 0), ("late", 0), ("two", 1)] {
        let message = Message::new("accounts.a")
            .key("k")
            .id(id)
            .expected_version(version);
        outbox::publish(&mut tx, &message).await.unwrap();
    }
    outbox::publish(&mut tx, &Message::new("accounts.a").key("k").id("plain"))
        .await
        .unwrap();
    tx.commit().await.unwrap();
    execute(
        &mut producer,
        "select postroad.publish('accounts.a', '{}'::jsonb, key => 'k', id => 'three', expected_version => 3);
         select postroad.publish('mail', 'x', key => 'k', id => 'stray', expected_version => 0);
         select postroad.publish('mail', 'x', key => 'k', id => 'mail')",
    )
    .await;
    let refused = sqlx::raw_sql(
        "insert into postroad.outbox (topic, expected_version) values ('accounts.a', 0)",
    )
    .execute(&mut producer)
    .await;
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("outbox_expected_version_is_of_a_key")
    );
    let ids = async |stream: &str| {
        let (_, page) = http.get(&format!("/v1/streams/{stream}/messages")).await;
        let messages = page["messages"].as_array().unwrap().clone();
        let id = |message: &serde_json::Value| message["event"]["id"].as_str().unwrap().to_owned();
        messages.iter().map(id).collect::<Vec<_>>()
    };
    eventually("all that goes in", async || {
        let whole = ids("accounts").await == ["one", "two", "plain", "three"];
        (whole && ids("main").await == ["mail"]).then_some(())
    })
    .await;
    let (_, listed) = http.get("/v1/origins/local/rejected").await;
    let mut listed = listed["rejected"].as_array().unwrap().clone();
    listed.sort_by_key(|row| row["seq"].as_i64());
    let reasons: Vec<&str> = listed
        .iter()
        .map(|row| row["reason"].as_str().unwrap())
        .collect();
    assert_eq!(
        reasons,
        [
            "it expected version 0 of its key, which is at 1",
            "it expects a version of its key, and its stream is not keyed",
        ]
    );
    let (_, origins) = http.get("/v1/origins").await;
    assert_eq!(origins["origins"][0]["rejected_count"], 2, "{origins}");
    // A person sends it on, whatever the version is by then.
    let id = &listed[0]["id"];
    let path = format!("/v1/origins/local/rejected/{id}/resend");
    let sent = http.ok(&path, &json!({})).await;
    assert_eq!(sent["offset"], 5, "{sent}");
    let (_, key) = http.get("/v1/streams/accounts/keys/k").await;
    assert_eq!(key["version"], 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_listed_is_not_listed_again_when_its_outbox_is_read_again() {
    let broker = support::database().await;
    let shop = support::database().await;
    let origin = Origin::install(&shop.url).await;
    let name = StreamName::parse("accounts").unwrap();
    let patterns = [TopicPattern::parse("accounts.>").unwrap()];
    let mut connection = broker.connect().await;
    store::stream::declare(
        &mut connection,
        &name,
        &patterns,
        &Retention::default(),
        true,
    )
    .await
    .unwrap();
    let rig = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        "insert into postroad.outbox (topic, key, id, expected_version)
         values ('accounts.a', 'k', 'one', 0), ('accounts.a', 'k', 'late', 0)",
    )
    .await;
    let status = rig.caught_up("shop").await;
    assert_eq!((status.rejected_count, status.relayed_count), (1, 1));
    // Without its mark the last position says nothing: all that the outbox holds is read again.
    execute(
        &mut owner,
        "truncate postroad.relay_mark;
         insert into postroad.outbox (topic, key, id, expected_version) values ('accounts.a', 'k', 'two', 1)",
    )
    .await;
    let status = rig.caught_up("shop").await;
    assert_eq!(status.rerelay_count, 1, "{status:?}");
    let log = read_log(&broker.url).await;
    let ids: Vec<&str> = log.iter().map(|message| message.id.as_str()).collect();
    assert_eq!(ids, ["one", "two"]);
    let (listed,): (i64,) = sqlx::query_as("select count(*) from postroad_broker.rejected_message")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!((listed, status.rejected_count), (1, 1));
    rig.stop().await;
}
