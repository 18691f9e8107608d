//! What is done to Postgres: the broker's, and an origin's.

use std::time::Duration;

use sqlx::{Connection as _, PgConnection};

use super::HOUR;
use super::faults::{Fault, cut_later, millis};
use super::world::{MAPPED, World};
use crate::support::clock;
use crate::support::worker::Dice;

/// One of the faults that are none of a node.
pub async fn act(world: &mut World, fault: Fault, dice: &mut Dice) {
    // Some are in a database beside another's, and have no server of their own.
    let with_server: Vec<usize> = (0..world.shops.len())
        .filter(|&shop| world.shops[shop].server.is_some())
        .collect();
    let shop = with_server[dice.below(with_server.len())];
    let pause = millis(dice, 200..2_500);
    match fault {
        Fault::KillPostgres => world.server.kill_and_restart().await,
        Fault::StopPostgres => {
            world.server.stop().await;
            tokio::time::sleep(pause).await;
            world.server.start().await;
        }
        Fault::TerminateBackends => terminate(&world.url).await,
        Fault::KillOrigin => {
            if let Some(server) = &world.shops[shop].server {
                server.kill_and_restart().await;
            }
        }
        Fault::StopOrigin => {
            if let Some(server) = &mut world.shops[shop].server {
                server.stop().await;
                tokio::time::sleep(pause).await;
                server.start().await;
            }
        }
        Fault::CutOrigin => {
            let shop = 1 + dice.below(world.shops.len() - 1);
            if let Some(proxy) = &world.shops[shop].proxy {
                cut_later(proxy, dice);
                tokio::time::sleep(pause).await;
                proxy.no_filter();
            }
        }
        Fault::TerminateOrigin => terminate(&world.shops[shop].origin.url).await,
        Fault::OpenTransaction | Fault::PreparedTransaction | Fault::PinnedXmin => {
            let with_outbox = world.shops.iter().filter(|shop| shop.name != MAPPED);
            let with_outbox: Vec<_> = with_outbox.collect();
            let shop = with_outbox[dice.below(with_outbox.len())];
            hold(&shop.origin.url, fault, pause, dice).await;
        }
        Fault::DatabaseClock => {
            let most = world.ground.clock_jump.unwrap_or(1);
            let jump = match most {
                HOUR => HOUR,
                few => 1 + dice.below(few as usize) as i64,
            };
            set_clock(world, jump).await;
            tokio::time::sleep(pause).await;
        }
        Fault::DatabaseClockBack => {
            set_clock(world, -(1 + dice.below(4) as i64)).await;
            tokio::time::sleep(pause).await;
        }
        other => unreachable!("{other:?} is a node's"),
    }
}

async fn set_clock(world: &mut World, by_seconds: i64) {
    world.clock_ahead += by_seconds;
    if by_seconds < HOUR {
        world.clock_jumped += by_seconds.abs();
    }
    clock::set(&world.url, &format!("{} seconds", world.clock_ahead)).await;
}

/// Half of a database's sessions end.
async fn terminate(url: &str) {
    let Ok(mut connection) = PgConnection::connect(url).await else {
        return;
    };
    let text = "select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid() and random() < 0.5";
    let _ = sqlx::raw_sql(text).execute(&mut connection).await;
}

/// What the open transactions insert: a message that no producer's history has, and a line of the ledger.
const NOTE: &str = "with message (id) as (
        insert into postroad.outbox (topic, payload) values ('orders.held', '{}') returning id)
    insert into ledger (id) select id from message";

/// A transaction that somebody leaves open for a while. Its server may be gone meanwhile, and it with it.
async fn hold(url: &str, fault: Fault, pause: Duration, dice: &mut Dice) {
    let Ok(mut connection) = PgConnection::connect(url).await else {
        return;
    };
    let commits = dice.is_lucky(0.7);
    let (begin, end) = match fault {
        Fault::OpenTransaction => (
            format!("begin; {NOTE}"),
            match commits {
                true => "commit",
                false => "rollback",
            },
        ),
        Fault::PreparedTransaction => (
            format!("begin; {NOTE}; prepare transaction 'held'"),
            match commits {
                true => "commit prepared 'held'",
                false => "rollback prepared 'held'",
            },
        ),
        _ => (
            "begin isolation level repeatable read; select count(*) from postroad.outbox"
                .to_owned(),
            "rollback",
        ),
    };
    let begun = sqlx::raw_sql(sqlx::AssertSqlSafe(begin))
        .execute(&mut connection)
        .await;
    tokio::time::sleep(pause).await;
    if begun.is_err() {
        return;
    }
    if sqlx::raw_sql(end).execute(&mut connection).await.is_err()
        && fault == Fault::PreparedTransaction
    {
        // It outlives its session and its server.
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if let Ok(mut again) = PgConnection::connect(url).await {
                let _ = sqlx::raw_sql(end).execute(&mut again).await;
                return;
            }
        }
    }
}
