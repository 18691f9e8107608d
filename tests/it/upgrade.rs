//! Two versions beside each other on the newer one's schema, under load: nothing is lost, doubled, out of order or handed out again.
//!
//! `POSTROAD_TEST_OLD_PROGRAM` names the program of the previous version (`make check-upgrade` builds one); without it the schema alone is
//! newer than the program.

use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::process::Command;

use crate::failover::{Load, check, check_held, declare, node_of, shop_origin, take_held};
use crate::support::{self, broker};

/// What the next version adds, to the hottest tables too, and says that it has.
const EXPANDED: &str = "
    set lock_timeout = '5s';
    alter table postroad_broker.node add column note text not null default '';
    alter table postroad_broker.stream add column note text;
    alter table postroad_broker.queue add column note text not null default 'none';
    alter table postroad_broker.message add column note text;
    alter table postroad_broker.queue_journal add column note text;
    alter table postroad_broker.dead_letter add column note text;
    create table postroad_broker.later (id bigint primary key, note text);
    create index later_note on postroad_broker.later (note);
    insert into postroad_broker.migration (version, description, success, checksum, execution_time)
        values (20991231000100, 'a later one', true, '\\x00', 0);
";

async fn execute(url: &str, text: &'static str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(text).execute(&mut connection).await.unwrap();
}

/// Two nodes of the old program; the schema is the new one's; a node of the new program beside them; then the old ones one by one.
async fn roll(old: Option<OsString>, expanded: Option<&'static str>) {
    let database = match &old {
        Some(_) => support::empty_database().await,
        None => support::database().await,
    };
    let (_server, origin) = shop_origin().await;
    let mut nodes = [
        node_of(old.clone(), &database.url, &origin).await,
        node_of(old, &database.url, &origin).await,
    ];
    let consumers = declare(&nodes[0].http).await;
    let mut held = take_held(&nodes[0].http, "old", 100).await;
    // The clients ask a node that stays while the others go, then one that has been started anew.
    let load = Load::start(&nodes[1].http, &origin, &consumers);
    tokio::time::sleep(Duration::from_millis(500)).await;
    if let Some(text) = expanded {
        execute(&database.url, text).await;
    }
    let new = node_of(None, &database.url, &origin).await;
    held.extend(take_held(&new.http, "both", 100).await);
    tokio::time::sleep(Duration::from_millis(500)).await;
    for node in &mut nodes {
        assert!(node.stop().await.success());
        node.upgrade();
        node.start().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let outcome = load.finish(&new.http, &database.url, &origin).await;
    let lost = check(&nodes[0].http, &outcome, u64::MAX).await;
    let again: Vec<&String> = outcome.seen.iter().flat_map(|seen| &seen.again).collect();
    assert!(again.is_empty(), "{again:?}");
    check_held(&nodes[1].http, &held, &[]).await;
    println!(
        "{} answered publishes, {lost} lost, 0 doubled, {} handed out after their ack; {} deliveries outlived both restarts",
        outcome.published.len(),
        again.len(),
        held.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn this_version_runs_on_a_schema_that_a_later_one_has_added_to() {
    roll(None, Some(EXPANDED)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_previous_version_runs_beside_this_one() {
    match broker::old_program_file() {
        Some(old) => roll(Some(old), None).await,
        None => eprintln!(
            "skipped: POSTROAD_TEST_OLD_PROGRAM names no program of the previous version (make check-upgrade)"
        ),
    }
}

#[tokio::test]
async fn a_schema_that_needs_a_later_version_is_refused_in_a_clear_line() {
    let database = support::database().await;
    execute(
        &database.url,
        "update postroad_broker.schema_needs set version = 20991231000100",
    )
    .await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_postroad"));
    command.arg("serve").current_dir("/").env_clear();
    command.envs(broker::variables(&database.url));
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let line = "the database's schema is from a later version of postroad: it needs migration 20991231000100";
    assert!(said.contains(line), "{said}");
}
