//! Mappings that do not fit are refused in words, by the install and by the relay's status, and nothing is relayed wrongly.

use postroad::domain::mapping::Draft;
use postroad::relay::{self, OriginOptions, State};
use postroad::store::Database;
use postroad::store::mapped::install;

use super::{Kind, origin_name, rig_mapped};
use crate::relay::{Origin, connect, execute, read_log, rig_of};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_said() {
    let broker = support::database().await;
    let server = support::cluster().await;
    let url = server.create_database("shop").await;
    let origin = Kind::DebeziumDelete.install(&url).await;
    let mut owner = connect(&url).await;
    execute(
        &mut owner,
        "create table bare (id uuid, topic text, body text);
        create table odd (id uuid primary key, topic text, body point, tags text[], at date, n text, x text, nullable xid8 default pg_current_xact_id(),
            plain xid8 not null default '5'::xid8, seq int);
        create view looks as select * from bare",
    )
    .await;
    let database = Database::new(&url, 2).unwrap();
    let text = |text: &str| Some(text.to_owned());
    let mut origins = Vec::new();
    let mut expected = Vec::new();
    for (table, pickup, columns, faults) in [
        (
            "nothing",
            "delete",
            &[][..],
            &["there is no table `nothing`"][..],
        ),
        ("looks", "delete", &[], &["`looks` is not a table"]),
        (
            "bare",
            "delete",
            &[],
            &["the table `bare` has no primary key"],
        ),
        (
            "bare",
            "delete",
            &[("key", "{ky}")],
            &["the table `bare` has no column `ky`; it has body, id, topic"],
        ),
        (
            "odd",
            "delete",
            &[
                ("payload", "{body}"),
                ("key", "{tags}"),
                ("time", "{at}"),
                ("headers", "{n}"),
            ],
            &[
                "the column `body` is of type point, and a payload must be text",
                "the column `tags` is of type text[], and a key must be of a type with a plain text form",
                "the column `at` is of type date, and a time must be timestamptz",
                "the column `n` is of type text, and a headers must be jsonb",
            ],
        ),
        (
            "odd",
            "snapshot",
            &[("xid", "{x}"), ("seq", "{n}")],
            &[
                "the column `x` is of type text, and a xid must be xid8",
                "the column `n` is of type text, and a seq must be smallint, integer or bigint",
            ],
        ),
        (
            "odd",
            "snapshot",
            &[("xid", "{nullable}"), ("seq", "{seq}")],
            &[
                "the column `nullable` is nullable",
                "the column `seq` is nullable",
            ],
        ),
        (
            "odd",
            "snapshot",
            &[("xid", "{plain}")],
            &["the column `plain` has no default pg_current_xact_id()"],
        ),
    ] {
        let base = [("topic", "{topic}"), ("id", "{id}")];
        let draft = Draft {
            table: text(table),
            pickup: text(pickup),
            columns: base
                .iter()
                .chain(columns)
                .map(|(field, value)| ((*field).to_owned(), (*value).to_owned()))
                .collect(),
            ..Draft::default()
        };
        let name = format!("origin-{}", origins.len());
        let mapping = draft.finish(&origin_name(&name)).unwrap();
        let refused = install::install(&database, &mapping)
            .await
            .unwrap_err()
            .to_string();
        for fault in faults {
            assert!(refused.contains(fault), "{refused}");
        }
        expected.push((name.clone(), faults));
        origins.push(OriginOptions {
            name: origin_name(&name),
            url: Some(origin.relay_url()),
            mapping: Some(mapping),
        });
    }
    let options = relay::Options::default();
    let rig = rig_of(&broker.database, relay::Options { origins, ..options }).await;
    for (name, faults) in expected {
        let refused = |status: &relay::Status| status.state == State::Refused;
        let status = rig.until(&name, "the mapping to be refused", refused).await;
        let detail = status.detail.unwrap();
        for fault in faults {
            assert!(detail.contains(fault), "{detail}");
        }
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_installed_or_not_granted_is_said_and_waited_for() {
    let kind = Kind::DebeziumSnapshot;
    let broker = support::database().await;
    let server = support::cluster().await;
    let url = server.create_database("shop").await;
    // For its roles, in another database.
    kind.install(&server.create_database("other").await).await;
    let mut owner = connect(&url).await;
    execute(
        &mut owner,
        "create table outboxevent (id uuid, aggregatetype varchar(255), aggregateid varchar(255), type varchar(255), payload jsonb);
        insert into outboxevent values (gen_random_uuid(), 'a', 'k', 't', null)",
    )
    .await;
    let origin = Origin {
        url: url.clone(),
        layout: crate::relay::shop::Layout::Debezium,
    };
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let missing = |status: &relay::Status| status.state == State::NotInstalled;
    let status = rig
        .until(kind.name(), "the table to be refused", missing)
        .await;
    let detail = status.detail.unwrap();
    for part in [
        "the tables beside it",
        "`postroad_xid`",
        "`postroad_seq`",
        "postroad install --map",
    ] {
        assert!(detail.contains(part), "{detail}");
    }
    // What is printed is what is run.
    let database = Database::new(&url, 2).unwrap();
    let script = install::script(&database, &kind.mapping()).await.unwrap();
    execute(&mut owner, &script).await;
    execute(&mut owner, crate::relay::SHOP_ROLES).await;
    rig.caught_up(kind.name()).await;
    assert_eq!(read_log(&broker.url).await.len(), 1);
    let again = install::script(&database, &kind.mapping()).await.unwrap();
    assert!(!again.contains("alter table"), "{again}");
    execute(&mut owner, &again).await;
    rig.stop().await;

    execute(
        &mut owner,
        "revoke select on outboxevent from postroad_relay_shop",
    )
    .await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let refused = |status: &relay::Status| status.state == State::Refused;
    let status = rig
        .until(kind.name(), "the right to be missed", refused)
        .await;
    assert!(
        status
            .detail
            .unwrap()
            .contains("no right to select on `outboxevent`")
    );
    execute(
        &mut owner,
        "grant select on outboxevent to postroad_relay_shop; alter table outboxevent enable row level security",
    )
    .await;
    let hidden = |status: &relay::Status| {
        let detail = status.detail.as_deref().unwrap_or_default();
        detail.contains("row security of `outboxevent` hides rows")
    };
    rig.until(kind.name(), "the hidden rows to be missed", hidden)
        .await;
    let off = "alter table outboxevent disable row level security";
    execute(&mut owner, off).await;
    rig.caught_up(kind.name()).await;
    rig.stop().await;
}

/// A trigger that keeps rows would have them relayed again and again.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_cannot_be_taken_out_stop_the_relay_and_are_relayed_once() {
    let kind = Kind::DebeziumDelete;
    let broker = support::database().await;
    let server = support::cluster().await;
    let origin = kind.install(&server.create_database("shop").await).await;
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        "create function keep() returns trigger language plpgsql as $$ begin return null; end $$;
        create trigger keep before delete on outboxevent for each row execute function keep();
        insert into outboxevent values (gen_random_uuid(), 'a', 'k', 't', null)",
    )
    .await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let refused = |status: &relay::Status| status.state == State::Refused;
    let status = rig.until(kind.name(), "the relay to stop", refused).await;
    assert!(
        status
            .detail
            .unwrap()
            .contains("1 relayed rows cannot be deleted")
    );
    execute(
        &mut owner,
        "insert into outboxevent values (gen_random_uuid(), 'b', 'k', 't', null)",
    )
    .await;
    execute(&mut owner, "drop trigger keep on outboxevent").await;
    rig.caught_up(kind.name()).await;
    assert_eq!(read_log(&broker.url).await.len(), 2);
    assert_eq!(super::count_rows(kind, &origin).await, 0);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_broker_or_origin_on_a_table_is_refused_until_it_is_given_up() {
    let server = support::cluster().await;
    for (number, kind) in Kind::ALL.into_iter().enumerate() {
        let url = server.create_database(&format!("shop_{number}")).await;
        let origin = kind.install(&url).await;
        crate::relay::shop::open(&origin).await;
        let mut producer = origin.producer().await;
        let first = support::database().await;
        let rig = rig_mapped(&first.database, kind, &origin.relay_url()).await;
        rig.caught_up(kind.name()).await;

        let second = support::database().await;
        let refused = |status: &relay::Status| status.state == State::Refused;
        let other = rig_mapped(&second.database, kind, &origin.relay_url()).await;
        let status = other.until(kind.name(), "the second broker to be refused", refused);
        let detail = status.await.detail.unwrap();
        let said = format!("is relayed as the origin `{}` of the broker ", kind.name());
        assert!(detail.contains(&said), "{detail}");
        crate::relay::shop::sell_in(origin.layout, &mut producer, 1)
            .await
            .unwrap();
        rig.caught_up(kind.name()).await;
        assert_eq!(read_log(&first.url).await.len(), 1);
        rig.stop().await;

        // Under another name it is another origin.
        let renamed = OriginOptions {
            name: origin_name("renamed"),
            ..super::options(kind, &origin.relay_url())
        };
        let options = relay::Options {
            origins: vec![renamed],
            ..relay::Options::default()
        };
        let rig = rig_of(&first.database, options).await;
        let status = rig.until("renamed", "another origin to be refused", refused);
        let detail = status.await.detail.unwrap();
        assert!(detail.contains("of this broker since"), "{detail}");
        rig.stop().await;

        // The first one has gone for good.
        execute(
            &mut origin.owner().await,
            "update postroad.mapped_claim set released_at = now()",
        )
        .await;
        crate::relay::shop::sell_in(origin.layout, &mut producer, 2)
            .await
            .unwrap();
        other.caught_up(kind.name()).await;
        let left = if kind == Kind::DebeziumSnapshot { 2 } else { 1 };
        assert_eq!(read_log(&second.url).await.len(), left);
        other.stop().await;
    }
}
