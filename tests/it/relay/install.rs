//! The outbox as it is installed: by the program or by the printed script, twice, and what its grants and constraints allow.

use postroad::store::migrate::{self, Grants};

use super::{Origin, connect, execute};
use crate::support;

#[tokio::test]
async fn the_printed_script_and_the_program_install_the_same_and_can_follow_each_other() {
    let database = support::empty_database().await;
    let mut connection = database.connect().await;
    let script = migrate::origin_sql();
    execute(&mut connection, &script).await;
    execute(&mut connection, &script).await;
    assert_eq!(
        migrate::origin(&database.database).await.unwrap(),
        Grants::Given
    );
    execute(&mut connection, &script).await;
    let versions: i64 = sqlx::query_scalar("select count(*) from postroad.migration")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(versions, 2);
}

#[tokio::test]
async fn producers_insert_and_publish_and_can_do_nothing_else() {
    let database = support::empty_database().await;
    Origin::install(&database.url).await;
    let mut connection = database.connect().await;
    execute(
        &mut connection,
        &format!("set role {}", database.role("producer")),
    )
    .await;
    for accepted in [
        "insert into postroad.outbox (topic, payload) values ('a.b', '{}')",
        "insert into postroad.outbox (topic, payload) values ('a.b', '{}') returning id, seq",
        "insert into postroad.outbox (topic) values ('a')",
        "insert into postroad.outbox (topic, payload_bytes, content_type) values ('a', 'x', 'image/png')",
        "insert into postroad.outbox (topic, headers) values ('a', '{\"a\": \"x\", \"b\": true, \"c\": -1}')",
        "select postroad.publish('t', '{\"a\":1}')",
        "select postroad.publish('t', '{\"a\":1}'::jsonb, key => 'k', order_lock => true)",
        "select postroad.publish('t', json_build_object('a', 1), 'k', 'T', headers => '{\"a\": 1}')",
        "select postroad.publish('t', '\\x00'::bytea, id => 'x', source => '/s', subject => 'y')",
        "select postroad.publish('t', null)",
        "select postroad.publish('t')",
    ] {
        execute(&mut connection, accepted).await;
    }
    for (refused, by) in [
        (
            "insert into postroad.outbox (topic) values ('a..b')",
            "outbox_topic_is_valid",
        ),
        (
            "insert into postroad.outbox (topic) values ('')",
            "outbox_topic_is_valid",
        ),
        (
            "insert into postroad.outbox (topic) values (repeat('a', 256))",
            "outbox_topic_is_valid",
        ),
        (
            "insert into postroad.outbox (topic) values (E'a\\n')",
            "outbox_topic_is_valid",
        ),
        (
            "insert into postroad.outbox (topic, payload, payload_bytes) values ('a', '1', '1')",
            "outbox_payload_is_one",
        ),
        (
            "insert into postroad.outbox (topic, payload) values ('a', repeat('a', 16777217))",
            "outbox_payload_is_at_most_16_mib",
        ),
        (
            "insert into postroad.outbox (topic, key) values ('a', '')",
            "outbox_key_is_1_to_512_bytes",
        ),
        (
            "insert into postroad.outbox (topic, key) values ('a', repeat('é', 257))",
            "outbox_key_is_1_to_512_bytes",
        ),
        (
            "insert into postroad.outbox (topic, id) values ('a', '')",
            "outbox_id_is_1_to_1024_bytes",
        ),
        (
            "insert into postroad.outbox (topic, source) values ('a', repeat('a', 1025))",
            "outbox_source_is_1_to_1024_bytes",
        ),
        (
            "insert into postroad.outbox (topic, content_type) values ('a', E'a/b\\r\\nx: y')",
            "outbox_content_type_is_valid",
        ),
        (
            "insert into postroad.outbox (topic, headers) values ('a', '[]')",
            "outbox_headers_are_extension_attributes",
        ),
        (
            "insert into postroad.outbox (topic, headers) values ('a', '{\"A\": 1}')",
            "outbox_headers_are_extension_attributes",
        ),
        (
            "insert into postroad.outbox (topic, headers) values ('a', '{\"id\": \"1\"}')",
            "outbox_headers_are_extension_attributes",
        ),
        (
            "insert into postroad.outbox (topic, headers) values ('a', '{\"a\": 1.5}')",
            "outbox_headers_are_extension_attributes",
        ),
        (
            "insert into postroad.outbox (topic, headers) values ('a', '{\"a\": null}')",
            "outbox_headers_are_extension_attributes",
        ),
        (
            "insert into postroad.outbox (topic, headers) values ('a', '{\"a\": 2147483648}')",
            "outbox_headers_are_extension_attributes",
        ),
        (
            "insert into postroad.outbox (topic, time) values ('a', 'infinity')",
            "outbox_time_has_a_four_digit_year",
        ),
        (
            "select postroad.publish('t', 'x', key => '')",
            "outbox_key_is_1_to_512_bytes",
        ),
    ] {
        let error = sqlx::query(sqlx::AssertSqlSafe(refused))
            .execute(&mut connection)
            .await
            .unwrap_err();
        let constraint = error
            .as_database_error()
            .and_then(|error| error.constraint());
        assert_eq!(constraint, Some(by), "{refused}: {error}");
    }
    for forbidden in [
        "insert into postroad.outbox (topic, xid) values ('a', '5')",
        "insert into postroad.outbox (topic, seq) values ('a', 5)",
        "insert into postroad.outbox (topic, bucket) values ('a', 1)",
        "update postroad.outbox set topic = 'b'",
        "delete from postroad.outbox",
        "truncate postroad.outbox",
        "select postroad.relay_restamp()",
        "insert into postroad.relay_mark (id) values (gen_random_uuid())",
        "select * from postroad.relay_mark",
    ] {
        let error = sqlx::query(sqlx::AssertSqlSafe(forbidden))
            .execute(&mut connection)
            .await
            .unwrap_err();
        let code = error.as_database_error().and_then(|error| error.code());
        assert_eq!(code.as_deref(), Some("42501"), "{forbidden}: {error}");
    }
    execute(
        &mut connection,
        &format!("set role {}", database.role("relay")),
    )
    .await;
    for forbidden in [
        "insert into postroad.outbox (topic) values ('a')",
        "update postroad.outbox set topic = 'b'",
        "delete from postroad.outbox",
        "drop table postroad.outbox",
    ] {
        let error = sqlx::query(sqlx::AssertSqlSafe(forbidden))
            .execute(&mut connection)
            .await
            .unwrap_err();
        assert!(error.as_database_error().is_some(), "{forbidden}: {error}");
    }
}

#[tokio::test]
async fn an_installer_without_createrole_installs_all_but_the_grants() {
    // Roles belong to the cluster, so one of its own.
    let cluster = support::cluster().await;
    let url = cluster.create_database("shop").await;
    let mut owner = connect(&url).await;
    execute(
        &mut owner,
        "create role plain login; grant create on database shop to plain",
    )
    .await;
    let database = postroad::store::Database::new(&super::as_user(&url, "plain"), 1).unwrap();
    assert_eq!(migrate::origin(&database).await.unwrap(), Grants::Skipped);
    assert_eq!(migrate::origin(&database).await.unwrap(), Grants::Skipped);
    execute(
        &mut owner,
        "create role postroad_producer_shop; create role postroad_relay_shop",
    )
    .await;
    assert_eq!(migrate::origin(&database).await.unwrap(), Grants::Given);
    execute(
        &mut owner,
        "set role postroad_producer_shop; insert into postroad.outbox (topic) values ('a')",
    )
    .await;
}
