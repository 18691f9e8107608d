//! Removes Postroad from a database: one script for each side, so that what is printed is what is run. Other people's
//! tables stay, except for the columns that an install added.

use sqlx::{AssertSqlSafe, SqlSafeStr as _};

use super::{Database, Error, migrate};
use crate::domain::id::OriginId;
use crate::domain::mapping::{Field, Mapping};
use crate::domain::name::OriginName;

/// The side to take out.
#[derive(Debug, Clone, Copy)]
pub enum Side<'a> {
    /// The outbox.
    Outbox {
        /// Also while it holds rows, which are gone then. Which of them were relayed is not known there.
        takes_rows: bool,
    },
    /// The inbox of consumers.
    Inbox,
    /// The fence that checks tokens of locks.
    Fence,
    /// The tables beside one mapped table.
    Mapped(&'a Mapping),
}

const BEFORE: &str = "begin;\nset local search_path = pg_catalog, pg_temp;\n";

const OUTBOX: &str = include_str!("../../migrations/origin/uninstall.sql");
const INBOX: &str = include_str!("../../migrations/inbox/uninstall.sql");
const FENCE: &str = include_str!("../../migrations/fence/uninstall.sql");
const MAPPED: &str = include_str!("../../migrations/mapped/uninstall.sql");
/// At the end of each: the schema goes when nothing is left in it, and roles go that have no rights left.
const LAST: &str = include_str!("../../migrations/last.sql");

/// Takes a side out, as one SQL script. It does nothing where there is nothing.
#[must_use]
pub fn script(side: Side<'_>) -> String {
    let text = match side {
        Side::Outbox { takes_rows } => {
            OUTBOX.replace("/*takes_rows*/", if takes_rows { "true" } else { "false" })
        }
        Side::Inbox => INBOX.to_owned(),
        Side::Fence => FENCE.to_owned(),
        Side::Mapped(mapping) => {
            let literal = |text: &str| format!("'{}'", text.replace('\'', "''"));
            // Only those that an install adds; names of the mapping's own are the owner's columns.
            let added = |field: Field, name: &str| match mapping.column(field) {
                Some(column) if column == name => literal(name),
                _ => "null".to_owned(),
            };
            MAPPED
                .replace(
                    "/*schema*/",
                    &literal(mapping.table.schema.as_deref().unwrap_or("public")),
                )
                .replace("/*name*/", &literal(&mapping.table.name))
                .replace("/*xid*/", &added(Field::Xid, "postroad_xid"))
                .replace("/*seq*/", &added(Field::Seq, "postroad_seq"))
        }
    };
    format!("{BEFORE}{}{text}{LAST}commit;\n", migrate::look())
}

/// Takes a side out.
///
/// # Errors
/// A statement failed, a broker still has the claim, or the outbox holds rows; nothing was changed then.
pub async fn run(database: &Database, side: Side<'_>) -> Result<(), Error> {
    let mut connection = database.connect().await?;
    sqlx::raw_sql(AssertSqlSafe(script(side)).into_sql_str())
        .execute(&mut connection)
        .await
        .map_err(Error::query("uninstalling"))?;
    Ok(())
}

/// The outcome of a change to an origin that the broker remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// It is done.
    Yes,
    /// The broker knows no origin of the name.
    Unknown,
    /// A node relays it now: it is in the configuration.
    Configured,
    /// There is an origin of the new name.
    Taken,
}

async fn find(
    connection: &mut super::Connection,
    name: &OriginName,
) -> Result<Option<(OriginId, bool)>, sqlx::Error> {
    let found: Option<(i32,)> =
        sqlx::query_as("select id from postroad_broker.origin where name = $1 for update")
            .bind(name.as_str())
            .fetch_optional(&mut *connection)
            .await?;
    let Some((id,)) = found else {
        return Ok(None);
    };
    let id = OriginId(id);
    let is_held: bool = sqlx::query_scalar(
        "select exists (
            select from postroad_broker.lease l join postroad_broker.node n on n.incarnation = l.holder
            where l.name = $1 and n.dead_at is null and n.expires_at > clock_timestamp()
        )",
    )
    .bind(id.lease_name())
    .fetch_one(connection)
    .await?;
    Ok(Some((id, is_held)))
}

/// Forgets an origin that is no longer in the configuration: its position, its history and its rejected rows. Its messages stay
/// in the streams.
///
/// # Errors
/// A statement failed.
pub async fn forget_origin(database: &Database, name: &OriginName) -> Result<Changed, Error> {
    let mut connection = database.connect().await?;
    let forgetting = async {
        let mut transaction = sqlx::Connection::begin(&mut connection).await?;
        let id = match find(&mut transaction, name).await? {
            None => return Ok(Changed::Unknown),
            Some((_, true)) => return Ok(Changed::Configured),
            Some((id, false)) => id,
        };
        for text in [
            "delete from postroad_broker.rejected_message where origin_id = $1",
            "delete from postroad_broker.relay_history where origin_id = $1",
            "delete from postroad_broker.relay_journal where origin_id = $1",
            "delete from postroad_broker.relay_checkpoint where origin_id = $1",
            "delete from postroad_broker.origin where id = $1",
        ] {
            sqlx::query(text)
                .bind(id.0)
                .execute(&mut *transaction)
                .await?;
        }
        sqlx::query("delete from postroad_broker.assignment where name = $1")
            .bind(id.lease_name())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(Changed::Yes)
    };
    forgetting
        .await
        .map_err(Error::query("forgetting an origin"))
}

/// Gives an origin another name, with all that is known of it. Before the configuration does.
///
/// # Errors
/// A statement failed.
pub async fn rename_origin(
    database: &Database,
    from: &OriginName,
    to: &OriginName,
) -> Result<Changed, Error> {
    let mut connection = database.connect().await?;
    let renaming = async {
        let mut transaction = sqlx::Connection::begin(&mut connection).await?;
        let id = match find(&mut transaction, from).await? {
            None => return Ok(Changed::Unknown),
            Some((_, true)) => return Ok(Changed::Configured),
            Some((id, false)) => id,
        };
        let renamed = sqlx::query(
            "update postroad_broker.origin set name = $2
            where id = $1 and not exists (select from postroad_broker.origin o where o.name = $2)",
        )
        .bind(id.0)
        .bind(to.as_str())
        .execute(&mut *transaction)
        .await?;
        if renamed.rows_affected() == 0 {
            return Ok(Changed::Taken);
        }
        transaction.commit().await?;
        Ok(Changed::Yes)
    };
    renaming.await.map_err(Error::query("renaming an origin"))
}
