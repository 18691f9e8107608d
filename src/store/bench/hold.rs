//! Conditions that slow other queues down: old snapshots and transactions held open, and tables aged by updates.

use sqlx::AssertSqlSafe;

use super::super::{Connection, Error};

/// A transaction that stays open beside a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Repeatable read: its snapshot keeps every dead row of the cluster.
    Reader,
    /// It has written, so it has a transaction id.
    Writer,
}

/// Opens a transaction and leaves it open.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn hold(connection: &mut Connection, hold: Hold) -> Result<(), Error> {
    let statement = match hold {
        Hold::Reader => {
            "set idle_in_transaction_session_timeout = 0; begin isolation level repeatable read;
             select count(*) from postroad_bench.business"
        }
        Hold::Writer => {
            "set idle_in_transaction_session_timeout = 0; begin;
             insert into postroad_bench.business (producer, number, note) values (-1, 0, 'held open')"
        }
    };
    sqlx::raw_sql(statement)
        .execute(connection)
        .await
        .map_err(Error::query("holding a transaction open"))?;
    Ok(())
}

/// Ends what [`hold`] opened.
///
/// # Errors
/// The database cannot be reached.
pub async fn let_go(connection: &mut Connection) -> Result<(), Error> {
    sqlx::raw_sql("rollback")
        .execute(connection)
        .await
        .map_err(Error::query("ending a transaction that was held open"))?;
    Ok(())
}

/// Ages the rows that are updated in place, as so many heartbeats and checkpoints would.
///
/// # Errors
/// The role may not, or the database cannot be reached.
pub async fn age(connection: &mut Connection, updates: u32) -> Result<(), Error> {
    let statement = format!(
        "do $$ begin for i in 1..{updates} loop
             update postroad_broker.node set expires_at = expires_at where dead_at is null;
             update postroad_broker.queue_checkpoint set state = state;
             if i % 100 = 0 then commit; end if;
         end loop; end $$"
    );
    sqlx::raw_sql(AssertSqlSafe(statement))
        .execute(connection)
        .await
        .map_err(Error::query("ageing the broker's tables"))?;
    Ok(())
}
