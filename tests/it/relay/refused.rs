//! Rows that a page cannot take along: the streams refuse it, or the origin cannot send it. The row is found and listed, and
//! everything else goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use postroad::domain::mapping::{Draft, Mapping};
use postroad::domain::name::OriginName;
use postroad::relay::{self, Correction, OriginOptions, RejectedError, State};
use postroad::store::Database;
use postroad::store::mapped::install;
use postroad::store::relay::RejectedRow;

use super::{Origin, Rig, connect, execute, read_log, rig, rig_of};
use crate::support;

async fn listed(rig: &Rig, origin: &str) -> Vec<RejectedRow> {
    let origin = OriginName::parse(origin).unwrap();
    rig.relay.rejected(&origin, 0, 100).await.unwrap().rows
}

async fn ids(url: &str) -> Vec<String> {
    let log = read_log(url).await;
    log.into_iter().map(|message| message.id).collect()
}

/// Notes whether a state was ever seen.
fn saw(rig: &Rig, origin: &str, state: State) -> Arc<AtomicBool> {
    let seen = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&seen);
    let mut status = rig.watch(origin);
    tokio::spawn(async move {
        let found = status
            .wait_for(|status| status.state == state)
            .await
            .is_ok();
        noted.fetch_or(found, Ordering::Relaxed);
    });
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_long_attributes_are_cut_into_pages_that_an_append_takes() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    let rig = rig(&broker.database, &[("local", None)]).await;
    rig.caught_up("local").await;
    let unavailable = saw(&rig, "local", State::BrokerUnavailable);
    let mut producer = origin.producer().await;
    execute(
        &mut producer,
        "insert into postroad.outbox (topic, payload, id, source, type, subject, data_schema, key, headers)
        select 'a', to_json(repeat('p', 900)), n || repeat('i', 900), repeat('s', 1000), repeat('t', 1000), repeat('u', 1000),
            repeat('d', 1000), repeat('k', 500), jsonb_build_object('h', repeat('v', 900))
        from generate_series(1, 4000) as n",
    )
    .await;
    let status = rig.caught_up("local").await;
    assert_eq!((status.relayed_count, status.rejected_count), (4_000, 0));
    assert!(!unavailable.load(Ordering::Relaxed));
    rig.stop().await;
}

/// A table of the log that refuses two rows among thousands, of the broker's database and of another.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_log_refuses_is_found_and_listed_and_the_rest_goes_on() {
    let broker = support::database().await;
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    let local = Origin::install(&broker.url).await;
    let url = origin.relay_url();
    let rig = rig(&broker.database, &[("shop", Some(&url)), ("local", None)]).await;
    rig.caught_up("shop").await;
    rig.caught_up("local").await;
    let refused = saw(&rig, "shop", State::RowsRefused);
    execute(
        &mut connect(&broker.url).await,
        "alter table postroad_broker.message add constraint no_evil check (key is null or key <> 'evil')",
    )
    .await;
    for (origin, name) in [(&origin, "shop"), (&local, "local")] {
        let mut producer = origin.producer().await;
        sqlx::query(
            "insert into postroad.outbox (topic, payload, id, key)
            select 'a', '1', $1 || n, case when n in (700, 1400) then 'evil' else 'good' end from generate_series(1, 2000) as n",
        )
        .bind(name)
        .execute(&mut producer)
        .await
        .unwrap();
    }
    for name in ["shop", "local"] {
        let status = rig.caught_up(name).await;
        assert_eq!(
            (status.relayed_count, status.rejected_count),
            (1_998, 2),
            "{name}"
        );
        let rows = listed(&rig, name).await;
        for row in &rows {
            assert!(row.reason.contains("no_evil"), "{}", row.reason);
        }
        // With all that they have: once the log takes them they can be sent on.
        assert!(
            rows[0].outbox_row.contains(&format!("\"{name}700\"")),
            "{rows:?}"
        );
    }
    assert!(refused.load(Ordering::Relaxed));
    let expected = |name: &str| -> Vec<String> {
        let numbers = (1..=2_000).filter(|n| ![700, 1_400].contains(n));
        numbers.map(|n| format!("{name}{n}")).collect()
    };
    let log = ids(&broker.url).await;
    for name in ["shop", "local"] {
        let of: Vec<String> = log
            .iter()
            .filter(|id| id.starts_with(name))
            .cloned()
            .collect();
        assert_eq!(of, expected(name));
    }
    execute(
        &mut connect(&broker.url).await,
        "alter table postroad_broker.message drop constraint no_evil",
    )
    .await;
    let name = OriginName::parse("shop").unwrap();
    let row = listed(&rig, "shop").await.remove(0);
    let resent = rig
        .relay
        .resend_rejected(&name, row.id, Correction::default());
    resent.await.unwrap();
    // A re-relay lists nothing twice, and relays nothing twice.
    let before = ids(&broker.url).await.len();
    execute(
        &mut connect(&broker.url).await,
        "alter table postroad_broker.message add constraint no_evil check (key is null or key <> 'evil') not valid",
    )
    .await;
    execute(&mut origin.owner().await, "truncate postroad.relay_mark").await;
    rig.until("shop", "the re-relay", |status| {
        status.rerelay_count == 1 && status.state == State::Running
    })
    .await;
    rig.caught_up("shop").await;
    assert_eq!(ids(&broker.url).await.len(), before);
    assert_eq!(listed(&rig, "shop").await.len(), 2);
    rig.stop().await;
}

async fn ascii_database(server: &support::Cluster, name: &str) -> String {
    let mut owner = connect(&server.url("postgres")).await;
    execute(
        &mut owner,
        &format!("create database {name} encoding 'SQL_ASCII' template template0 lc_collate 'C' lc_ctype 'C'"),
    )
    .await;
    server.url(name)
}

/// One row among many that the origin cannot send, in a window that is read at once and in one that is read by places.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_origin_cannot_send_is_listed_by_its_number_and_the_rest_goes_on() {
    let broker = support::database().await;
    let server = support::cluster().await;
    let origin = Origin::install(&ascii_database(&server, "legacy").await).await;
    let url = origin.relay_url();
    // Such a database is not asked for: neither the command nor the script that it prints installs there.
    let script = postroad::store::migrate::origin_sql();
    let refused = sqlx::raw_sql(sqlx::AssertSqlSafe(script))
        .execute(&mut connect(&ascii_database(&server, "printed").await).await)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("needs UTF8"), "{refused}");
    let rig = rig(&broker.database, &[("legacy", Some(&url))]).await;
    rig.caught_up("legacy").await;
    let mut owner = origin.owner().await;
    // Its patterns are of characters.
    execute(
        &mut owner,
        "alter table postroad.outbox drop constraint outbox_row_is_valid",
    )
    .await;
    for (count, before) in [(20, 0), (6_000, 20)] {
        execute(
            &mut owner,
            &format!(
                "insert into postroad.outbox (topic, payload, id)
                select 'a', case when n = {count} / 2 then '\"caf' || chr(233) || '\"' else '1' end, 'm' || n + {before}
                from generate_series(1, {count}) as n"
            ),
        )
        .await;
        let status = rig.caught_up("legacy").await;
        assert_eq!(status.relayed_count + status.rejected_count, before + count);
    }
    let rows = listed(&rig, "legacy").await;
    assert_eq!(rows.len(), 2, "{rows:?}");
    assert_eq!(ids(&broker.url).await.len(), 6_018);
    for row in &rows {
        assert!(
            row.reason.contains("invalid byte sequence"),
            "{}",
            row.reason
        );
        let copy: serde_json::Value = serde_json::from_str(&row.outbox_row).unwrap();
        assert_eq!(copy["seq"], row.seq);
        use base64::Engine as _;
        let raw = base64::engine::general_purpose::STANDARD
            .decode(copy["row_base64"].as_str().unwrap())
            .unwrap();
        assert!(raw.windows(4).any(|part| part == b"caf\xe9"));
    }
    let name = OriginName::parse("legacy").unwrap();
    let resent = rig
        .relay
        .resend_rejected(&name, rows[0].id, Correction::default());
    assert!(matches!(resent.await, Err(RejectedError::NotKept { .. })));
    // Everything again: the rows are found again, and not listed again.
    execute(&mut owner, "truncate postroad.relay_mark").await;
    rig.until("legacy", "the re-relay", |status| {
        status.rerelay_count == 1 && status.state == State::Running
    })
    .await;
    rig.caught_up("legacy").await;
    assert_eq!(ids(&broker.url).await.len(), 6_018);
    assert_eq!(listed(&rig, "legacy").await.len(), 2);
    rig.stop().await;
}

fn mapping(pickup: &str) -> Mapping {
    let mut columns = vec![
        ("topic", "events"),
        ("id", "{event_id}"),
        ("payload", "{body}"),
        ("headers", "{meta}"),
        ("source", "/shop"),
    ];
    if pickup == "delete" {
        columns.push(("seq", "{n}"));
    }
    let draft = Draft {
        table: Some("events".to_owned()),
        pickup: Some(pickup.to_owned()),
        columns: columns
            .into_iter()
            .map(|(field, value)| (field.to_owned(), value.to_owned()))
            .collect(),
        ..Draft::default()
    };
    draft.finish(&OriginName::parse("events").unwrap()).unwrap()
}

/// By snapshot they stay where they are, and by deletion they leave.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_mapped_table_that_cannot_be_read_are_listed_whole_and_the_rest_goes_on() {
    for pickup in ["snapshot", "delete"] {
        let broker = support::database().await;
        let server = support::cluster().await;
        let url = ascii_database(&server, "shop").await;
        let mut owner = connect(&url).await;
        super::mapped::create_roles(&mut owner).await;
        execute(
            &mut owner,
            "create table events (n bigint generated always as identity primary key, event_id text not null, body text, meta jsonb)",
        )
        .await;
        let database = Database::new(&url, 2).unwrap();
        install::install(&database, &mapping(pickup)).await.unwrap();
        database.close().await;
        let options = relay::Options {
            origins: vec![OriginOptions {
                name: OriginName::parse("events").unwrap(),
                url: Some(super::as_user(&url, "shop_relay")),
                mapping: Some(mapping(pickup)),
            }],
            ..relay::Options::default()
        };
        let rig = rig_of(&broker.database, options).await;
        rig.caught_up("events").await;
        for (count, before) in [(20, 0), (6_000, 20)] {
            execute(
                &mut owner,
                &format!(
                    "insert into events (event_id, body, meta)
                    select 'm' || n + {before}, case when n = {count} / 2 then 'caf' || chr(233) else '1' end, '{{\"a\": \"x\"}}'
                    from generate_series(1, {count}) as n"
                ),
            )
            .await;
            let status = rig
                .until("events", "the rows", |status| {
                    status.relayed_count + status.rejected_count == before + count
                })
                .await;
            assert_eq!(
                status.rejected_count,
                if before == 0 { 1 } else { 2 },
                "{pickup}"
            );
        }
        let log = ids(&broker.url).await;
        let expected = (1..=6_020).filter(|n| ![10, 3_020].contains(n));
        assert!(
            log.iter().cloned().eq(expected.map(|n| format!("m{n}"))),
            "{pickup}"
        );
        for row in listed(&rig, "events").await {
            assert!(
                row.reason.contains("invalid byte sequence"),
                "{pickup}: {}",
                row.reason
            );
            assert!(
                row.outbox_row.contains("row_base64"),
                "{pickup}: {}",
                row.outbox_row
            );
        }
        if pickup == "delete" {
            support::eventually("the table to be empty", || async {
                let mut owner = connect(&url).await;
                let left: i64 = sqlx::query_scalar("select count(*) from events")
                    .fetch_one(&mut owner)
                    .await
                    .unwrap();
                (left == 0).then_some(())
            })
            .await;
        }
        rig.stop().await;
    }
}

/// As over HTTP: no way in has control characters or noncharacters.
#[tokio::test(flavor = "multi_thread")]
async fn attributes_with_control_characters_come_in_nowhere() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    let mut producer = origin.producer().await;
    let mut columns = Vec::new();
    for column in ["key", "id", "source", "type", "subject", "data_schema"] {
        for text in ["E'a\\u0007'", "E'a\\nb'", "E'\\u009b'", "E'\\uffff'"] {
            columns.push((column, text.to_owned()));
        }
    }
    columns.push(("headers", "'{\"a\": \"\\u001b[2J\"}'".to_owned()));
    for (column, text) in &columns {
        let insert = format!("insert into postroad.outbox (topic, {column}) values ('a', {text})");
        let refused = sqlx::raw_sql(sqlx::AssertSqlSafe(insert))
            .execute(&mut producer)
            .await
            .unwrap_err();
        let refused = refused.into_database_error().unwrap();
        assert_eq!(
            refused.code().as_deref(),
            Some("23514"),
            "{column} {text}: {refused}"
        );
    }
    let fine = "insert into postroad.outbox (topic, key, id, source, type, headers)
        values ('a', E'\\u00e9 \\u00ad', 'fine', '/s', E'\\U0001F600', '{\"a\": \"\\u00e9\"}')";
    execute(&mut producer, fine).await;
    // With the constraint gone they are listed.
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        "alter table postroad.outbox drop constraint outbox_row_is_valid",
    )
    .await;
    for (column, text) in &columns {
        execute(
            &mut owner,
            &format!("insert into postroad.outbox (topic, {column}) values ('a', {text})"),
        )
        .await;
    }
    let rig = rig(&broker.database, &[("local", None)]).await;
    let status = rig.caught_up("local").await;
    assert_eq!(status.rejected_count, columns.len() as u64);
    assert_eq!(ids(&broker.url).await, ["fine"]);
    for row in listed(&rig, "local").await {
        assert!(
            row.reason.contains("has the character U+"),
            "{}",
            row.reason
        );
    }
    rig.stop().await;
}

/// Inside an answer they would cost a consumer the messages beside them.
#[tokio::test(flavor = "multi_thread")]
async fn json_that_parsers_refuse_goes_out_as_bytes() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    let mut producer = origin.producer().await;
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    let payloads = [
        ("fine", nested(60), 1),
        ("deep", nested(61), 3),
        ("deeper", nested(3_000), 3),
        ("digits", "9".repeat(5_000), 3),
        ("infinite", "1e400".to_owned(), 3),
        ("half", "\"\\ud83d\"".to_owned(), 3),
        ("pair", "\"\\ud83d\\ude00\"".to_owned(), 1),
    ];
    for (id, payload, _) in &payloads {
        let text = "insert into postroad.outbox (topic, id, payload) values ('a', $1, $2)";
        let inserting = sqlx::query(text).bind(id).bind(payload);
        inserting.execute(&mut producer).await.unwrap();
    }
    let rig = rig(&broker.database, &[("local", None)]).await;
    let status = rig.caught_up("local").await;
    assert_eq!(status.rejected_count, 0);
    let text = "select id, convert_from(data, 'UTF8'), data_kind::int from postroad_broker.message order by \"offset\"";
    let found: Vec<(String, String, i32)> = sqlx::query_as(text)
        .fetch_all(&mut connect(&broker.url).await)
        .await
        .unwrap();
    let expected = payloads.map(|(id, payload, kind)| (id.to_owned(), payload, kind));
    assert_eq!(found, expected);
    rig.stop().await;
}
