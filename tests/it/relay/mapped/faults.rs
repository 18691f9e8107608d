//! Mapped origins whose servers and relays die at every step: a backend killed so that transaction ids are handed out again, the
//! connections cut around each statement of a batch, and the program and the origin's Postgres killed under load.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postroad::relay;
use serde_json::{Value, json};

use super::{Kind, assert_exact, assert_is, rig_mapped, shop};
use crate::relay::{connect, execute, read_log, rig_of};
use crate::support::{self, Action, Trap};

fn kills() -> u32 {
    let set = std::env::var("POSTROAD_TEST_KILLS").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(3)
}

async fn kill_backends(kind: Kind, settings: &'static str) {
    let server = support::cluster_with(&[("wal_writer_delay", "10s")]).await;
    let origin = kind.install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let rig = rig_mapped(&broker.database, kind, &origin.relay_url()).await;
    let producers = shop::Producers::start(&origin, 6, settings);
    for _ in 0..kills() {
        rig.caught_up(kind.name()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut owner = connect(&origin.url).await;
        execute(
            &mut owner,
            "do $$ begin for n in 1..500 loop perform pg_current_xact_id(); rollback; end loop; end $$",
        )
        .await;
        let own = "select pg_backend_pid(), pid from pg_stat_activity where backend_type = 'checkpointer'";
        let (pid, checkpointer): (i32, i32) =
            sqlx::query_as(own).fetch_one(&mut owner).await.unwrap();
        support::send_signal(pid, rustix::process::Signal::KILL);
        drop(owner);
        // All its processes are others then; a connection alone can be one of just before.
        support::eventually("the server to recover", || async {
            let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(&origin.url)
                .await
                .ok()?;
            let found: (i32, i32) = sqlx::query_as(own).fetch_one(&mut connection).await.ok()?;
            (found.1 != checkpointer).then_some(())
        })
        .await;
    }
    producers.finish().await;
    rig.caught_up(kind.name()).await;
    let count = assert_exact(kind, &origin, &broker.url).await;
    println!("{kind:?}: {} backends killed, {count} messages", kills());
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_backends_under_a_table_read_by_snapshot() {
    kill_backends(Kind::DebeziumSnapshot, "select 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_backends_and_asynchronous_commits_under_a_table_read_by_deletion() {
    kill_backends(Kind::NumberedDelete, "set synchronous_commit = off").await;
}

/// Each step of a batch picked up by deletion, its connection cut before and after it: the mark, the append with the intent, the
/// delete, its commit. After each the relay goes on, and at the end everything is there once.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_at_any_step_of_a_batch_loses_and_doubles_nothing() {
    let kind = Kind::NumberedDelete;
    let server = support::cluster().await;
    let origin = kind.install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let broker = support::database().await;
    let (to_origin, to_broker) = (
        support::proxy(&origin.relay_url()).await,
        support::proxy(&broker.url).await,
    );
    let url = to_origin.url(&origin.relay_url());
    let database = postroad::store::Database::new(&to_broker.url(&broker.url), 4).unwrap();
    let rig = rig_mapped(&database, kind, &url).await;
    rig.caught_up(kind.name()).await;
    let (origin_trap, broker_trap) = (Trap::on(&to_origin), Trap::on(&to_broker));
    let mut producer = origin.producer().await;
    let mut cuts = 0;
    for round in 0..2 {
        for (trap, step, bytes) in [
            (&origin_trap, "the read", &b"found as materialized"[..]),
            (&origin_trap, "the mark", b"postroad.mapped_mark (id"),
            (&broker_trap, "the append", b"\"taken\":[["),
            (&origin_trap, "the delete's begin", b"BEGIN"),
            (&origin_trap, "the delete", b"delete from"),
            (
                &origin_trap,
                "the look for what is left",
                b"select count(*) from",
            ),
            (&origin_trap, "the note", b"into postroad.mapped_emptied"),
            (&origin_trap, "the delete's commit", b"COMMIT"),
        ] {
            for action in [Action::CutBefore, Action::CutAfter] {
                // A new session prepares its statements again, so that their text passes by.
                to_origin.cut_once();
                trap.arm(bytes, action);
                let key = 1 + cuts % shop::KEYS;
                shop::sell_in(origin.layout, &mut producer, key)
                    .await
                    .unwrap();
                shop::note_in(origin.layout, &mut producer).await.unwrap();
                trap.sprung(&format!("{step}, {action:?}, round {round}"))
                    .await;
                cuts += 1;
                rig.caught_up(kind.name()).await;
            }
        }
    }
    // The values of the delete itself, where the statement is prepared already: the row's own number.
    for action in [Action::CutBefore, Action::CutAfter] {
        for _ in 0..4 {
            let mut owner = origin.owner().await;
            let number: i64 = sqlx::query_scalar("select 1000000 + $1::bigint * 1000")
                .bind(cuts)
                .fetch_one(&mut owner)
                .await
                .unwrap();
            execute(
                &mut owner,
                &format!("alter table shop.events alter n restart {number}"),
            )
            .await;
            origin_trap.arm(number.to_string().as_bytes(), action);
            shop::sell_in(origin.layout, &mut producer, 1)
                .await
                .unwrap();
            origin_trap.sprung("the delete's values").await;
            cuts += 1;
            rig.caught_up(kind.name()).await;
        }
    }
    let count = assert_exact(kind, &origin, &broker.url).await;
    println!("{cuts} cuts, {count} messages");
    assert_eq!(super::count_rows(kind, &origin).await, 0);
    rig.stop().await;
}

/// A relay that is cut off everywhere at random while producers work, by snapshot too.
#[tokio::test(flavor = "multi_thread")]
async fn cuts_under_load_lose_and_double_nothing() {
    for kind in Kind::ALL {
        let server = support::cluster().await;
        let origin = kind.install(&server.create_database("shop").await).await;
        shop::open(&origin).await;
        let broker = support::database().await;
        let proxy = support::proxy(&origin.relay_url()).await;
        let options = relay::Options {
            origins: vec![super::options(kind, &proxy.url(&origin.relay_url()))],
            retry_max: Duration::from_millis(100),
            ..relay::Options::default()
        };
        let rig = rig_of(&broker.database, options).await;
        let producers = shop::Producers::start(&origin, 4, "select 1");
        let mut passed = 0_u64;
        let mut every = 60_u64;
        let cuts = Arc::new(Mutex::new(0));
        let counted = Arc::clone(&cuts);
        proxy.filter(move |_, _| {
            passed += 1;
            if !passed.is_multiple_of(every) {
                return Action::Forward;
            }
            // Another distance each time, so that each step is hit.
            passed = 0;
            every = 60 + (every * 5 + 3) % 47;
            let mut cuts = counted.lock().unwrap();
            *cuts += 1;
            if *cuts % 2 == 0 {
                Action::CutBefore
            } else {
                Action::CutAfter
            }
        });
        let wanted = 12;
        support::eventually("the cuts", || async {
            (*cuts.lock().unwrap() >= wanted).then_some(())
        })
        .await;
        proxy.no_filter();
        producers.finish().await;
        rig.caught_up(kind.name()).await;
        assert_exact(kind, &origin, &broker.url).await;
        rig.stop().await;
    }
}

/// Three mapped origins under one program; the program is killed, and the origins' Postgres.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_program_and_a_killed_origin_lose_and_double_nothing() {
    let server = support::cluster().await;
    let broker = support::cluster().await;
    let broker_url = broker.create_database("broker").await;
    let mut origins = Vec::new();
    let mut configured = serde_json::Map::new();
    let mut variables = Vec::new();
    for kind in Kind::ALL {
        let database = kind.name().replace('-', "_");
        let origin = kind.install(&server.create_database(&database).await).await;
        shop::open(&origin).await;
        let draft = kind.draft();
        let variable = format!("{}_URL", database.to_uppercase());
        let mut table = json!({
            "url_env": variable, "pickup": draft.pickup, "columns": draft.columns, "extensions": draft.extensions,
        });
        for (key, value) in [("layout", draft.layout), ("table", draft.table)] {
            if let Some(value) = value {
                table[key] = Value::from(value);
            }
        }
        configured.insert(kind.name().to_owned(), table);
        variables.push((variable, origin.relay_url()));
        origins.push((kind, origin));
    }
    let configured = Value::Object(configured).to_string();
    let mut all: Vec<(&str, &str)> = variables
        .iter()
        .map(|(n, v)| (n.as_str(), v.as_str()))
        .collect();
    all.push(("POSTROAD_ORIGINS", &configured));
    let mut program = support::program(&broker_url, &all).await;
    let producers: Vec<_> = origins
        .iter()
        .map(|(_, origin)| shop::Producers::start(origin, 2, "select 1"))
        .collect();
    let relayed = async |program: &support::Program| {
        let (_, answer) = program.http.get("/v1/origins").await;
        let mut least = u64::MAX;
        for origin in answer["origins"].as_array().unwrap() {
            if origin["name"] != "local" {
                assert_ne!(origin["state"], "refused", "{origin}");
                least = least.min(origin["relayed_count"].as_u64().unwrap());
            }
        }
        least
    };
    for round in 0..kills() {
        support::eventually("each relay to be at work", || async {
            (relayed(&program).await >= 20).then_some(())
        })
        .await;
        if round % 2 == 0 {
            program.kill().await;
            program.start().await;
        } else {
            server.kill_and_restart().await;
            program.kill().await;
            program.start().await;
        }
    }
    for producers in producers {
        producers.finish().await;
    }
    let mut expected = 0;
    for (_, origin) in &origins {
        expected += shop::committed(origin).await.len();
    }
    support::eventually("everything to be relayed", || async {
        (read_log(&broker_url).await.len() >= expected).then_some(())
    })
    .await;
    // What would come twice would come soon.
    let (_, answer) = program.http.get("/v1/origins").await;
    let of_log = read_log(&broker_url).await;
    assert_eq!(of_log.len(), expected, "{answer}");
    for (kind, origin) in &origins {
        let committed = shop::committed(origin).await;
        let own: Vec<_> = of_log
            .iter()
            .filter(|m| committed.contains(&m.id))
            .cloned()
            .collect();
        assert_is(*kind, &committed, &HashSet::new(), &own);
    }
    let described = answer["origins"].as_array().unwrap();
    let numbered = described
        .iter()
        .find(|o| o["name"] == "numbered-delete")
        .unwrap();
    assert_eq!(
        (&numbered["table"], &numbered["pickup"]),
        (&json!("shop.events"), &json!("delete"))
    );
    println!("{} kills, {expected} messages of three origins", kills());
}
