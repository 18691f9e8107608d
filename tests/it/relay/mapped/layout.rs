//! What rows of mapped tables become, and what becomes of the rows.

use std::time::Duration;

use postroad::domain::mapping::Draft;
use postroad::domain::name::Topic;
use postroad::relay::{self, Correction, OriginOptions};
use postroad::store::Database;
use postroad::store::mapped::install;

use super::{Kind, count_rows, options, origin_name, rig_mapped};
use crate::relay::{Origin, execute, read_log, rig_of, shop};
use crate::support;

/// The messages in the log, as JSON objects of what they carry.
async fn messages(url: &str) -> Vec<serde_json::Value> {
    let mut connection = crate::relay::connect(url).await;
    let rows: Vec<String> = sqlx::query_scalar(
        "select json_build_object('topic', t.name, 'id', m.id, 'source', source, 'type', type, 'key', key, 'subject', subject,
            'time', event_time, 'content_type', data_content_type, 'extensions', extensions::json, 'kind', data_kind,
            'data', encode(data, 'escape'))::text
        from postroad_broker.message as m join postroad_broker.topic as t on t.id = m.topic_id order by m.\"offset\"",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    rows.iter()
        .map(|row| serde_json::from_str(row).unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn debeziums_rows_become_messages_with_either_pickup() {
    for kind in [Kind::DebeziumSnapshot, Kind::DebeziumDelete] {
        let broker = support::database().await;
        let server = support::cluster().await;
        let origin = kind.install(&server.create_database("shop").await).await;
        let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
        rig.caught_up(kind.name()).await;
        let mut producer = origin.producer().await;
        execute(
            &mut producer,
            "insert into outboxevent (id, aggregatetype, aggregateid, type, payload) values
            ('406c07f3-26f0-4eea-a50c-109940064b8f', 'Order', '1', 'OrderCreated', '{\"id\": 1, \"lineItems\": []}')",
        )
        .await;
        rig.caught_up(kind.name()).await;
        execute(
            &mut producer,
            "insert into outboxevent (id, aggregatetype, aggregateid, type) values
            ('406c07f3-26f0-4eea-a50c-109940064b90', 'Order', '1', 'OrderDeleted')",
        )
        .await;
        rig.caught_up(kind.name()).await;
        let messages = messages(&broker.url).await;
        assert_eq!(messages.len(), 2);
        let first = &messages[0];
        for (member, value) in [
            ("topic", "outbox.event.Order"),
            ("id", "406c07f3-26f0-4eea-a50c-109940064b8f"),
            ("type", "OrderCreated"),
            ("key", "1"),
            ("data", "{\"id\": 1, \"lineItems\": []}"),
        ] {
            assert_eq!(first[member], value, "{first}");
        }
        assert_eq!(first["source"], format!("/postroad/{}", kind.name()));
        assert_eq!(
            (&first["kind"], &messages[1]["kind"]),
            (&1.into(), &0.into())
        );
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_column_arrives_as_it_is() {
    let kind = Kind::NumberedDelete;
    let broker = support::database().await;
    let server = support::cluster().await;
    let origin = kind.install(&server.create_database("shop").await).await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let mut producer = origin.producer().await;
    execute(
        &mut producer,
        r#"insert into shop.events (event_id, kind, sku, body, trace, meta, created_at) values
        ('406c07f3-26f0-4eea-a50c-109940064b8f', 'sold', 'o''k\', '{"a" : 1.0,  "a":"é"}',
            '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01', '{"tenant": "x", "n": 3, "ok": true}', '2026-01-02 03:04:05.678')"#,
    )
    .await;
    rig.caught_up(kind.name()).await;
    let found = messages(&broker.url).await;
    let message = &found[0];
    // JSON passes as it was written, spaces and all.
    assert_eq!(message["data"], r#"{"a" : 1.0,  "a":"\303\251"}"#);
    assert_eq!(message["key"], "o'k\\");
    assert_eq!(message["time"], "2026-01-02T03:04:05.678+00:00");
    let extensions = serde_json::json!({
        "tenant": "x", "n": 3, "ok": true, "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    });
    assert_eq!(message["extensions"], extensions, "{message}");
    rig.stop().await;
}

/// What cannot become a message is listed, leaves the table, holds up nothing, and can be sent on.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_cannot_become_messages_are_listed_and_can_be_sent_on() {
    for kind in [Kind::DebeziumSnapshot, Kind::DebeziumDelete] {
        let broker = support::database().await;
        let server = support::cluster().await;
        let origin = kind.install(&server.create_database("shop").await).await;
        let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
        let mut producer = origin.producer().await;
        execute(
            &mut producer,
            "insert into outboxevent values
            (gen_random_uuid(), 'a', 'k1', 't', '{\"version\": 1}'),
            (gen_random_uuid(), 'no topic', 'k2', 't', jsonb_build_object('version', 2, 'large', repeat('x', 2000000))),
            (gen_random_uuid(), 'c', 'k3', 't', '{\"version\": 3}')",
        )
        .await;
        let status = rig.caught_up(kind.name()).await;
        assert_eq!((status.rejected_count, status.relayed_count), (1, 2));
        let name = origin_name(kind.name());
        let page = rig.relay.rejected(&name, 0, 10).await.unwrap();
        let row = &page.rows[0];
        assert!(
            row.reason.contains("the token `no topic`"),
            "{}",
            row.reason
        );
        let left = if kind == Kind::DebeziumDelete { 0 } else { 3 };
        assert_eq!(count_rows(kind, &origin).await, left);
        let correction = Correction {
            topic: Some(Topic::parse("b").unwrap()),
            ..Correction::default()
        };
        rig.relay
            .resend_rejected(&name, row.id, correction)
            .await
            .unwrap();
        let log = read_log(&broker.url).await;
        assert_eq!(log.len(), 3);
        assert_eq!(log[2].version, Some(2), "with all of its payload");
        rig.stop().await;
    }
}

/// A backlog that was there before the relay, larger than a page, with the table's columns added beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_relayed_in_order_and_space_comes_back() {
    for kind in Kind::ALL {
        let broker = support::database().await;
        let server = support::cluster().await;
        let origin = kind.install(&server.create_database("shop").await).await;
        let mut producer = origin.producer().await;
        let insert = match kind {
            Kind::NumberedDelete => {
                "insert into shop.events (kind, sku, body) select 'sold', 'k', json_build_object('version', n, 'x', repeat('x', 300))"
            }
            _ => {
                "insert into outboxevent (id, aggregatetype, aggregateid, type, payload)
                select gen_random_uuid(), 'item', 'k', 'sold', jsonb_build_object('version', n, 'x', repeat('x', 300))"
            }
        };
        let began = std::time::Instant::now();
        execute(
            &mut producer,
            &format!("{insert} from generate_series(1, 20000) as n"),
        )
        .await;
        let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
        rig.caught_up(kind.name()).await;
        println!("{kind:?}: 20,000 rows in {:?}", began.elapsed());
        let versions: Vec<_> = read_log(&broker.url)
            .await
            .iter()
            .filter_map(|m| m.version)
            .collect();
        if kind.keeps_order() {
            assert!(versions.into_iter().eq(1..=20_000), "{kind:?}");
        } else {
            assert_eq!(versions.len(), 20_000);
        }
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_read_by_snapshot_stay_until_somebody_takes_them_out() {
    let kind = Kind::DebeziumSnapshot;
    let broker = support::database().await;
    let server = support::cluster().await;
    let url = server.create_database("shop").await;
    let origin = kind.install(&url).await;
    let mut producer = origin.producer().await;
    let insert = "insert into outboxevent (id, aggregatetype, aggregateid, type) select gen_random_uuid(), 'a', 'k', 't' from generate_series(1, 25)";
    execute(&mut producer, insert).await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    rig.caught_up(kind.name()).await;
    // The owner may: all of this is relayed.
    execute(&mut origin.owner().await, "delete from outboxevent").await;
    execute(&mut producer, insert).await;
    rig.caught_up(kind.name()).await;
    assert_eq!(
        (
            read_log(&broker.url).await.len(),
            count_rows(kind, &origin).await
        ),
        (50, 25)
    );
    rig.stop().await;

    // Or the relay, when it is told to and has the right.
    let mut draft = kind.draft();
    draft.delete_relayed = Some(true);
    let mapping = draft.finish(&origin_name(kind.name())).unwrap();
    let database = Database::new(&url, 2).unwrap();
    install::install(&database, &mapping).await.unwrap();
    let origins = vec![OriginOptions {
        mapping: Some(mapping),
        ..options(kind, &origin.relay_url())
    }];
    let options = relay::Options {
        origins,
        grace: Duration::from_secs(1),
        ..relay::Options::default()
    };
    let rig = rig_of(&broker.database, options).await;
    execute(&mut producer, insert).await;
    rig.caught_up(kind.name()).await;
    support::eventually("the rows to go", || async {
        (count_rows(kind, &origin).await == 0).then_some(())
    })
    .await;
    assert_eq!(read_log(&broker.url).await.len(), 75);
    rig.stop().await;
}

/// A partitioned table with a key of two columns, and names that want quoting.
#[tokio::test(flavor = "multi_thread")]
async fn partitioned_tables_and_odd_names_are_read() {
    for pickup in ["snapshot", "delete"] {
        let broker = support::database().await;
        let server = support::cluster().await;
        let url = server.create_database("shop").await;
        // For its roles.
        Kind::DebeziumDelete.install(&url).await;
        let mut owner = crate::relay::connect(&url).await;
        execute(
            &mut owner,
            r#"create schema "My Shop";
            create table "My Shop"."Out""box" (
                "Id" uuid not null default gen_random_uuid(), day int not null, n bigint not null, "Event Type" text not null, later timestamptz,
                body bytea, primary key ("Id", day)
            ) partition by list (day);
            create table "My Shop".one partition of "My Shop"."Out""box" for values in (1);
            create table "My Shop".two partition of "My Shop"."Out""box" for values in (2);
            insert into "My Shop"."Out""box" (day, n, "Event Type", later, body)
                select 1 + n % 2, n, 'it''s', case when n = 10 then now() + interval '1 day' end, '\x00ff' from generate_series(1, 10) as n"#,
        )
        .await;
        let text = |text: &str| Some(text.to_owned());
        let draft = Draft {
            table: text("My Shop.Out\"box"),
            pickup: text(pickup),
            columns: [
                ("topic", "a"),
                ("id", "{Id}"),
                ("seq", "{n}"),
                ("type", "{{{Event Type}}}"),
                ("payload", "{body}"),
                ("deliver_at", "{later}"),
            ]
            .map(|(field, value)| (field.to_owned(), value.to_owned()))
            .into(),
            ..Draft::default()
        };
        let mapping = draft.finish(&origin_name("odd")).unwrap();
        install::install(&Database::new(&url, 2).unwrap(), &mapping)
            .await
            .unwrap();
        let origin = Origin {
            url: url.clone(),
            layout: shop::Layout::Own,
        };
        let origins = vec![OriginOptions {
            name: origin_name("odd"),
            url: Some(origin.relay_url()),
            mapping: Some(mapping),
        }];
        let options = relay::Options {
            origins,
            page_rows: 4,
            ..relay::Options::default()
        };
        let rig = rig_of(&broker.database, options).await;
        rig.caught_up("odd").await;
        let found = messages(&broker.url).await;
        assert_eq!(found.len(), 9, "{pickup}");
        let mut later = broker.connect().await;
        let later: i64 =
            sqlx::query_scalar("select count(*) from postroad_broker.scheduled_message")
                .fetch_one(&mut later)
                .await
                .unwrap();
        assert_eq!(later, 1);
        assert_eq!(found[0]["type"], "{it's}");
        assert_eq!(found[0]["data"], "\\000\\377");
        rig.stop().await;
    }
}
