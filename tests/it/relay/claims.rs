//! One broker relays an outbox, as one of its origins: any other is refused with who has it, and nothing is lost or doubled when it is
//! handed over.

use std::time::Duration;

use postroad::domain::name::OriginName;
use postroad::relay::{State, Status};
use postroad::store::origin::claim;
use postroad::store::uninstall::{self, Changed};
use postroad::store::{Database, history};
use sqlx::AssertSqlSafe;

use super::{Origin, Rig, connect, execute, read_log, rig};
use crate::support;

const INSERT: &str =
    "insert into postroad.outbox (topic, payload) select 'a', n::text from generate_series(1, 5) n";

/// An origin in a database of its own.
async fn shop() -> (support::TestDatabase, Origin) {
    let database = support::empty_database().await;
    let origin = Origin::install(&database.url).await;
    (database, origin)
}

async fn refused(rig: &Rig, origin: &str) -> String {
    let is_refused = |status: &Status| status.state == State::Refused;
    let status = rig
        .until(origin, "the origin to be refused", is_refused)
        .await;
    status.detail.unwrap()
}

#[tokio::test]
async fn a_second_broker_on_an_outbox_is_refused_until_it_is_released() {
    let (_shop, origin) = shop().await;
    let (first, second) = (support::database().await, support::database().await);
    let mut owner = origin.owner().await;
    execute(&mut owner, INSERT).await;
    let one = rig(&first.database, &[("shop", Some(&origin.relay_url()))]).await;
    one.caught_up("shop").await;
    let other = rig(&second.database, &[("other", Some(&origin.relay_url()))]).await;
    let detail = refused(&other, "other").await;
    assert!(
        detail.contains("is relayed as the origin `shop` of the broker "),
        "{detail}"
    );
    assert!(detail.contains("postroad release"), "{detail}");
    execute(&mut owner, INSERT).await;
    one.caught_up("shop").await;
    assert_eq!(read_log(&first.url).await.len(), 10);
    assert_eq!(read_log(&second.url).await.len(), 0);
    one.stop().await;

    let owned = Database::new(&origin.url, 1).unwrap();
    let released = claim::release(&owned, None).await.unwrap().unwrap();
    assert_eq!(released.origin, "shop");
    other.caught_up("other").await;
    assert_eq!(
        claim::release(&owned, Some("postroad.none")).await.unwrap(),
        None
    );
    // And the first one is refused in its turn.
    let one = rig(&first.database, &[("shop", Some(&origin.relay_url()))]).await;
    let detail = refused(&one, "shop").await;
    assert!(
        detail.contains("as the origin `other` of the broker "),
        "{detail}"
    );
    one.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn a_relay_whose_claim_is_released_while_it_runs_lets_go() {
    let (_shop, origin) = shop().await;
    let (first, second) = (support::database().await, support::database().await);
    let one = rig(&first.database, &[("shop", Some(&origin.relay_url()))]).await;
    one.caught_up("shop").await;
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        "update postroad.relay_claim set released_at = now()",
    )
    .await;
    let other = rig(&second.database, &[("shop", Some(&origin.relay_url()))]).await;
    other.caught_up("shop").await;
    let detail = refused(&one, "shop").await;
    assert!(detail.contains("of the broker "), "{detail}");
    one.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn the_same_database_is_relayed_once_under_whatever_names() {
    let broker = support::database().await;
    let mut owner = connect(&broker.url).await;
    execute(&mut owner, INSERT).await;
    let origins = [("local", None), ("same", Some(broker.url.as_str()))];
    let both = rig(&broker.database, &origins).await;
    let refused_one = support::eventually("one of them to be refused", || async {
        ["local", "same"]
            .into_iter()
            .find(|name| both.status(name).state == State::Refused)
    })
    .await;
    let other = if refused_one == "local" {
        "same"
    } else {
        "local"
    };
    both.caught_up(other).await;
    let detail = both.status(refused_one).detail.unwrap();
    assert!(
        detail.contains(&format!("as the origin `{other}` of this broker")),
        "{detail}"
    );
    assert_eq!(read_log(&broker.url).await.len(), 5);
    both.stop().await;
}

#[tokio::test]
async fn an_origin_under_another_name_doubles_nothing_and_is_no_incident() {
    let (_shop, origin) = shop().await;
    let broker = support::database().await;
    let mut owner = origin.owner().await;
    execute(&mut owner, INSERT).await;
    let first = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    first.caught_up("shop").await;
    first.stop().await;
    // Rows have left by the position of the former name.
    execute(&mut owner, "insert into postroad.relay_emptied (broker, origin_id, number) select broker, origin_id, 8 from postroad.relay_claim").await;
    let renamed = rig(&broker.database, &[("store", Some(&origin.relay_url()))]).await;
    let detail = refused(&renamed, "store").await;
    assert!(
        detail.contains("as the origin `shop` of this broker since"),
        "{detail}"
    );
    execute(&mut owner, INSERT).await;
    let owned = Database::new(&origin.url, 1).unwrap();
    claim::release(&owned, None).await.unwrap().unwrap();
    let status = renamed.caught_up("store").await;
    assert_eq!(
        (status.gap_count, status.rejected_count),
        (Some(0), 0),
        "{status:?}"
    );
    assert_eq!(read_log(&broker.url).await.len(), 10);
    renamed.stop().await;
}

#[tokio::test]
async fn a_renamed_origin_goes_on_where_it_was_and_a_forgotten_one_is_gone() {
    let (_shop, origin) = shop().await;
    let broker = support::database().await;
    let name = |name: &str| OriginName::parse(name).unwrap();
    let mut owner = origin.owner().await;
    execute(&mut owner, INSERT).await;
    let first = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    first.caught_up("shop").await;
    // Not while it runs.
    let renaming = uninstall::rename_origin(&broker.database, &name("shop"), &name("store")).await;
    assert_eq!(renaming.unwrap(), Changed::Configured);
    let forgetting = uninstall::forget_origin(&broker.database, &name("shop")).await;
    assert_eq!(forgetting.unwrap(), Changed::Configured);
    first.stop().await;
    let renaming = uninstall::rename_origin(&broker.database, &name("shop"), &name("store")).await;
    assert_eq!(renaming.unwrap(), Changed::Yes);
    execute(&mut owner, INSERT).await;
    let renamed = rig(&broker.database, &[("store", Some(&origin.relay_url()))]).await;
    let status = renamed.caught_up("store").await;
    assert_eq!(
        (status.rerelay_count, status.gap_count),
        (0, Some(0)),
        "{status:?}"
    );
    assert_eq!(read_log(&broker.url).await.len(), 10);
    renamed.stop().await;

    let forgotten = uninstall::forget_origin(&broker.database, &name("store")).await;
    assert_eq!(forgotten.unwrap(), Changed::Yes);
    let again = uninstall::forget_origin(&broker.database, &name("store")).await;
    assert_eq!(again.unwrap(), Changed::Unknown);
    assert_eq!(read_log(&broker.url).await.len(), 10);
}

#[tokio::test]
async fn a_copy_of_a_brokers_database_is_told_from_the_original() {
    let (_shop, origin) = shop().await;
    let broker = support::database().await;
    history::begin(&broker.database, &[]).await.unwrap();
    let first = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    first.caught_up("shop").await;
    first.stop().await;
    broker.database.close().await;
    let copy = support::copy_of(&broker).await;
    history::begin(&copy.database, &[]).await.unwrap();
    let staging = rig(&copy.database, &[("shop", Some(&origin.relay_url()))]).await;
    let detail = refused(&staging, "shop").await;
    assert!(detail.contains("of which this one is a copy"), "{detail}");
    staging.stop().await;
    // The original goes on.
    let original = Database::new(&broker.url, 4).unwrap();
    history::begin(&original, &[]).await.unwrap();
    let first = rig(&original, &[("shop", Some(&origin.relay_url()))]).await;
    first.caught_up("shop").await;
    first.stop().await;
}

#[tokio::test]
async fn an_outbox_that_a_subscription_feeds_is_refused() {
    let (shop, origin) = shop().await;
    let broker = support::database().await;
    let mut owner = origin.owner().await;
    let name = format!("feed_{}", shop.name);
    let text = format!(
        "create subscription {name} connection 'dbname=none' publication p with (connect = false, enabled = false, slot_name = none, create_slot = false);
        set allow_system_table_mods = on;
        insert into pg_subscription_rel (srsubid, srrelid, srsubstate)
            select oid, 'postroad.outbox_3'::regclass, 'r' from pg_subscription where subname = '{name}'"
    );
    for statement in text.split(';') {
        sqlx::query(AssertSqlSafe(statement.to_owned()))
            .execute(&mut owner)
            .await
            .unwrap();
    }
    let rig = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    let detail = refused(&rig, "shop").await;
    assert!(
        detail.contains(&format!("the subscription `{name}` feeds this outbox")),
        "{detail}"
    );
    rig.stop().await;
    execute(&mut owner, &format!("drop subscription {name}")).await;
}

#[tokio::test]
async fn rows_that_a_restore_or_a_replication_brought_are_relayed_though_no_window_has_them() {
    let (_shop, origin) = shop().await;
    let broker = support::database().await;
    let mut owner = origin.owner().await;
    let rig = rig(&broker.database, &[("shop", Some(&origin.relay_url()))]).await;
    rig.caught_up("shop").await;
    execute(
        &mut owner,
        "insert into postroad.outbox (topic, xid) values ('a', '9000000000')",
    )
    .await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while read_log(&broker.url).await.is_empty() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the row is not relayed"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_publication_for_all_tables_holds_up_no_relay() {
    let (_shop, origin) = shop().await;
    let broker = support::database().await;
    let mut owner = origin.owner().await;
    execute(&mut owner, "create publication everything for all tables").await;
    execute(
        &mut connect(&broker.url).await,
        "create publication everything for all tables",
    )
    .await;
    // Rows of another life of the database, which the first relay updates.
    execute(
        &mut owner,
        "insert into postroad.outbox (topic, xid) values ('a', '9000000000'), ('b', default)",
    )
    .await;
    execute(&mut connect(&broker.url).await, INSERT).await;
    let origins = [("shop", Some(origin.relay_url())), ("local", None)];
    let origins = origins
        .each_ref()
        .map(|(name, url)| (*name, url.as_deref()));
    let rig = rig(&broker.database, &origins).await;
    rig.caught_up("shop").await;
    rig.caught_up("local").await;
    assert_eq!(read_log(&broker.url).await.len(), 7);
    rig.stop().await;
    // Each table that is updated or deleted from has what tells its rows apart.
    for url in [&origin.url, &broker.url] {
        let bare: Vec<String> = sqlx::query_scalar(
            "select c.oid::regclass::text from pg_class c
            where c.relnamespace in (select oid from pg_namespace where nspname in ('postroad', 'postroad_broker'))
                and c.relkind in ('r', 'p') and c.relreplident <> 'f'
                and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)",
        )
        .fetch_all(&mut connect(url).await)
        .await
        .unwrap();
        assert_eq!(bare, Vec::<String>::new());
    }
}
