//! The database side of `postroad bench`: its own tables, the statements of its load, and the cost of a load. Not part of
//! the broker.

mod cost;
mod hold;
mod lease;
mod produce;

use sqlx::AssertSqlSafe;

use super::{Connection, Error};

pub use cost::{Cost, Server, cost, server};
pub use hold::{Hold, age, hold, let_go};
pub use lease::{Claimed, claim, delete, insert_lease};
pub use produce::{Row, insert_outbox, insert_raw};

/// The comment of a schema that a bench made.
const MARK: &str = "made by postroad bench";

/// Makes an empty database. `name` is made of a-z, 0-9 and `_`.
///
/// # Errors
/// The role may not, or the server cannot be reached.
pub async fn create_database(connection: &mut Connection, name: &str) -> Result<(), Error> {
    // From template0: nobody can be connected to it, which would refuse the copy.
    let statement = format!("create database \"{name}\" template template0");
    sqlx::raw_sql(AssertSqlSafe(statement))
        .execute(connection)
        .await
        .map_err(Error::query("making a database for the bench"))?;
    Ok(())
}

/// Drops a database that [`create_database`] made, and ends the sessions that are in it.
///
/// # Errors
/// The server cannot be reached.
pub async fn drop_database(connection: &mut Connection, name: &str) -> Result<(), Error> {
    let statement = format!("drop database if exists \"{name}\" with (force)");
    sqlx::raw_sql(AssertSqlSafe(statement))
        .execute(connection)
        .await
        .map_err(Error::query("dropping the bench's database"))?;
    Ok(())
}

/// Drops databases of benches that were killed. For a server that nobody else uses.
///
/// # Errors
/// The server cannot be reached.
pub async fn drop_left_databases(connection: &mut Connection) -> Result<(), Error> {
    let names: Vec<String> = sqlx::query_scalar(
        "select datname from pg_database where datname like 'postroad\\_bench\\_%' order by datname",
    )
    .fetch_all(&mut *connection)
    .await
    .map_err(Error::query("looking for databases of former benches"))?;
    for name in names {
        drop_database(connection, &name).await?;
    }
    Ok(())
}

/// Whether the bench's tables could be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tables {
    /// They are there, and empty.
    Made,
    /// The database has a schema `postroad_bench` that no bench made. Nothing was changed.
    Taken,
    /// Another bench is using them. Nothing was changed.
    InUse,
}

/// Recreates the bench's tables. They belong to this session until it ends.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn create_tables(connection: &mut Connection) -> Result<Tables, Error> {
    // Any number that nothing else of ours locks will do.
    let is_free: bool = sqlx::query_scalar("select pg_try_advisory_lock(7306, 1)")
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::query("locking the bench's tables"))?;
    if !is_free {
        return Ok(Tables::InUse);
    }
    let comment: Option<Option<String>> = sqlx::query_scalar(
        "select obj_description(oid, 'pg_namespace') from pg_namespace where nspname = 'postroad_bench'",
    )
    .fetch_optional(&mut *connection)
    .await
    .map_err(Error::query("looking for the bench's schema"))?;
    if comment.is_some_and(|comment| comment.as_deref() != Some(MARK)) {
        return Ok(Tables::Taken);
    }
    sqlx::raw_sql(include_str!("../sql/create_bench_tables.sql"))
        .execute(connection)
        .await
        .map_err(Error::query("making the bench's tables"))?;
    Ok(Tables::Made)
}

/// Empties the bench's tables, so that a round begins as the one before it did.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn empty_tables(connection: &mut Connection) -> Result<(), Error> {
    sqlx::raw_sql(
        "truncate postroad_bench.business, postroad_bench.raw, postroad_bench.lease restart identity",
    )
    .execute(connection)
    .await
    .map_err(Error::query("emptying the bench's tables"))?;
    Ok(())
}

/// Drops the bench's tables.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn drop_tables(connection: &mut Connection) -> Result<(), Error> {
    sqlx::raw_sql("drop schema if exists postroad_bench cascade")
        .execute(connection)
        .await
        .map_err(Error::query("dropping the bench's tables"))?;
    Ok(())
}
