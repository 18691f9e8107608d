//! A mapped table is somebody else's, and what its owner adds to it runs with nobody else's rights.

use postroad::domain::mapping::Draft;
use postroad::domain::name::OriginName;
use postroad::relay::{self, OriginOptions, State};
use postroad::store::mapped::install;
use sqlx::Executor as _;

use super::{LOW, ran};
use crate::relay::rig_of;
use crate::support;

/// A table of `low`, with rows.
const TABLE: &str = "
    set session authorization low;
    create table public.events (id uuid primary key default gen_random_uuid(), topic text not null, mood text);
    create function public.spring() returns trigger language plpgsql as $$ begin
        perform public.note(tg_name);
        return coalesce(new, old);
    end $$;
    create function public.bend(value text) returns text immutable language plpgsql as $$ begin
        perform public.note('bend');
        return value;
    end $$;
    insert into public.events (topic) values ('a');
    reset session authorization";

#[tokio::test(flavor = "multi_thread")]
async fn code_of_a_mapped_tables_owner_runs_as_nobody_else() {
    let broker = support::database().await;
    for (pickup, plant, named, cure) in [
        (
            "delete",
            "create trigger trap before delete on public.events for each statement execute function public.spring()",
            "the trigger trap",
            "drop trigger trap on public.events",
        ),
        (
            "delete",
            "create constraint trigger late after delete on public.events deferrable initially deferred for each row execute function public.spring()",
            "the trigger late",
            "drop trigger late on public.events",
        ),
        (
            "delete",
            "create rule trap as on delete to public.events do also select public.note('rule')",
            "the rule trap",
            "drop rule trap on public.events",
        ),
        (
            "delete",
            "create index trap on public.events (public.bend('x' || topic))",
            "the index public.trap",
            "drop index public.trap",
        ),
        (
            "snapshot",
            "create index trap on public.events (topic) where public.bend('x') = topic",
            "the index public.trap",
            "drop index public.trap",
        ),
        (
            "snapshot",
            "create statistics public.trap on (public.bend(topic)), topic from public.events",
            "the statistics trap",
            "drop statistics public.trap",
        ),
        (
            "snapshot",
            "create trigger trap before update on public.events for each statement execute function public.spring()",
            "the trigger trap",
            "drop trigger trap on public.events",
        ),
        // Functions of Postgres itself that take a text as SQL, or do something with files.
        (
            "snapshot",
            "alter table public.events add constraint trap check (query_to_xml('select public.note(''check'')', true, false, '') is not null) not valid",
            "the constraint trap, which calls query_to_xml",
            "alter table public.events drop constraint trap",
        ),
        (
            "snapshot",
            "alter table public.events add constraint trap check (lo_create(4242) is null) not valid",
            "the constraint trap, which calls lo_create",
            "alter table public.events drop constraint trap",
        ),
        (
            "delete",
            "create trigger trap before delete on public.events for each row
                when (query_to_xml('select public.note(''when'')', true, false, '') is null) execute function suppress_redundant_updates_trigger()",
            "the trigger trap, which calls query_to_xml",
            "drop trigger trap on public.events",
        ),
        // A check of a domain comes with each value that is made one.
        (
            "snapshot",
            "create domain public.checked as text check (public.bend(value) is not null);
                alter table public.events add constraint trap check (topic::public.checked is not null) not valid",
            "the constraint trap, which has the type public.checked",
            "drop domain public.checked cascade",
        ),
    ] {
        let shop = support::empty_database().await;
        let mut owner = shop.connect().await;
        owner.execute(LOW).await.unwrap();
        owner
            .execute("set search_path = pg_catalog, pg_temp")
            .await
            .unwrap();
        owner.execute(TABLE).await.unwrap();
        owner.execute("truncate public.ran").await.unwrap();
        let draft = Draft {
            table: Some("public.events".to_owned()),
            pickup: Some(pickup.to_owned()),
            columns: [("id", "{id}"), ("topic", "{topic}")]
                .map(|(field, value)| (field.to_owned(), value.to_owned()))
                .into(),
            ..Draft::default()
        };
        let name = OriginName::parse(&format!("shop-{}", shop.name)).unwrap();
        let mapping = draft.finish(&name).unwrap();
        // The superuser installs, and the relay is one too: worse it cannot be.
        install::install(&shop.database, &mapping).await.unwrap();
        if pickup == "snapshot" {
            // What a restore in another cluster brings.
            owner
                .execute("update public.events set postroad_xid = '9000000000'")
                .await
                .unwrap();
        }
        owner
            .execute("set session authorization low")
            .await
            .unwrap();
        owner.execute(plant).await.unwrap();
        owner.execute("reset session authorization").await.unwrap();
        owner.execute("truncate public.ran").await.unwrap();
        let origins = vec![OriginOptions {
            name: name.clone(),
            url: Some(shop.url.clone()),
            mapping: Some(mapping),
        }];
        let rig = rig_of(
            &broker.database,
            relay::Options {
                origins,
                ..relay::Options::default()
            },
        )
        .await;
        let refused = |status: &relay::Status| status.state == State::Refused;
        let status = rig
            .until(name.as_str(), "the table to be refused", refused)
            .await;
        let detail = status.detail.unwrap();
        assert!(detail.contains(named), "{plant}: {detail}");
        assert_eq!(ran(&mut owner).await, Vec::<String>::new(), "{plant}");
        owner.execute(cure).await.unwrap();
        rig.caught_up(name.as_str()).await;
        // Added while the relay runs: no batch is deleted by it.
        if pickup == "delete" {
            owner
                .execute("set session authorization low")
                .await
                .unwrap();
            owner.execute(plant).await.unwrap();
            owner
                .execute("insert into public.events (topic) values ('b')")
                .await
                .unwrap();
            owner.execute("reset session authorization").await.unwrap();
            rig.until(name.as_str(), "the table to be refused", refused)
                .await;
            owner.execute(cure).await.unwrap();
            rig.caught_up(name.as_str()).await;
        }
        assert_eq!(ran(&mut owner).await, Vec::<String>::new(), "{plant}");
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_table_is_mapped_by_snapshot() {
    let broker = support::database().await;
    let shop = support::empty_database().await;
    let mut owner = shop.connect().await;
    owner
        .execute(
            "create table public.\"Events\" (id uuid not null default gen_random_uuid(), topic text not null, at date not null) partition by range (at);
            create table public.old partition of public.\"Events\" for values from (minvalue) to ('2026-01-01');
            create table public.new partition of public.\"Events\" for values from ('2026-01-01') to (maxvalue);
            insert into public.\"Events\" (topic, at) values ('a', '2025-06-01'), ('b', '2026-06-01')",
        )
        .await
        .unwrap();
    let draft = Draft {
        table: Some("Events".to_owned()),
        pickup: Some("snapshot".to_owned()),
        columns: [("id", "{id}"), ("topic", "{topic}")]
            .map(|(field, value)| (field.to_owned(), value.to_owned()))
            .into(),
        ..Draft::default()
    };
    let name = OriginName::parse("parts").unwrap();
    let mapping = draft.finish(&name).unwrap();
    for _ in 0..2 {
        install::install(&shop.database, &mapping).await.unwrap();
    }
    let origins = vec![OriginOptions {
        name,
        url: Some(shop.url.clone()),
        mapping: Some(mapping),
    }];
    let rig = rig_of(
        &broker.database,
        relay::Options {
            origins,
            ..relay::Options::default()
        },
    )
    .await;
    rig.caught_up("parts").await;
    owner
        .execute("insert into public.\"Events\" (topic, at) values ('c', '2026-06-02')")
        .await
        .unwrap();
    rig.caught_up("parts").await;
    assert_eq!(crate::relay::read_log(&broker.url).await.len(), 3);
    rig.stop().await;
}

/// Table `events` of `low`, mapped by snapshot.
async fn mapped_by_snapshot() -> (support::TestDatabase, sqlx::PgConnection) {
    let shop = support::empty_database().await;
    let mut owner = shop.connect().await;
    for text in [LOW, "set search_path = pg_catalog, pg_temp", TABLE] {
        owner.execute(text).await.unwrap();
    }
    let draft = Draft {
        table: Some("public.events".to_owned()),
        pickup: Some("snapshot".to_owned()),
        columns: [("id", "{id}"), ("topic", "{topic}")]
            .map(|(field, value)| (field.to_owned(), value.to_owned()))
            .into(),
        ..Draft::default()
    };
    let mapping = draft.finish(&OriginName::parse("shop").unwrap()).unwrap();
    install::install(&shop.database, &mapping).await.unwrap();
    owner.execute("truncate public.ran").await.unwrap();
    (shop, owner)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_takes_the_place_of_a_mapped_table_runs_nothing() {
    let (shop, mut owner) = mapped_by_snapshot().await;
    let mut low = shop.connect().await;
    low.execute("set session authorization low").await.unwrap();
    low.execute(
        "begin;
        alter table public.events rename to old;
        create view public.events as select * from public.old where public.note('view') offset 0;
        grant select on public.events to public",
    )
    .await
    .unwrap();
    // It waits for the table, and then has the view by the name.
    let mut relay = shop.connect().await;
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()")
        .fetch_one(&mut relay)
        .await
        .unwrap();
    let waiting = tokio::spawn(async move {
        relay
            .execute("select postroad.mapped_restamp('public.events')")
            .await
            .map(|_| ())
    });
    let waits = "select exists (select from pg_locks where pid = $1 and not granted)";
    while !sqlx::query_scalar::<_, bool>(waits)
        .bind(pid)
        .fetch_one(&mut owner)
        .await
        .unwrap()
    {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    low.execute("commit").await.unwrap();
    let refused = waiting.await.unwrap().unwrap_err();
    assert!(
        refused.to_string().contains("is no table any more"),
        "{refused}"
    );
    // A relay's session reads no view at all, whenever it came.
    let mut session = shop.database.connect().await.unwrap();
    let refused = session.execute("select * from public.events").await;
    let refused = refused.map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("is restricted"), "{refused}");
    assert_eq!(ran(&mut owner).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restamp_has_the_rights_of_the_relay_and_no_others() {
    let (shop, mut owner) = mapped_by_snapshot().await;
    let relay = shop.role("relay");
    owner
        .execute("update public.events set postroad_xid = '9000000000', postroad_seq = 500")
        .await
        .unwrap();
    // Code of a role that has the relay's rights runs, with these.
    for text in [
        format!("grant {relay} to low"),
        "set session authorization low".to_owned(),
        "create trigger trap before update on public.events for each statement execute function public.spring()".to_owned(),
        "reset session authorization".to_owned(),
        format!("set role {relay}"),
    ] {
        owner.execute(sqlx::AssertSqlSafe(text)).await.unwrap();
    }
    let restamped: i64 = sqlx::query_scalar("select postroad.mapped_restamp('public.events')")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(restamped, 1);
    owner.execute("reset role").await.unwrap();
    let next: i64 = sqlx::query_scalar(
        "select nextval(pg_get_serial_sequence('public.events', 'postroad_seq'))",
    )
    .fetch_one(&mut owner)
    .await
    .unwrap();
    assert_eq!(next, 10_501);
    assert_eq!(ran(&mut owner).await, vec![format!("trap as {relay}")]);
}
