//! The schema's migrations, embedded. They only go up, are never edited once released, and each runs in its own
//! transaction, by one process at a time.

mod turn;

use std::time::Duration;

use sqlx::SqlSafeStr as _;
use sqlx::migrate::{Migration, MigrationType, Migrator};

use super::{Connection, Database, Error};
use turn::Turn;

/// A migration file: version, name, text.
type File = (i64, &'static str, &'static str);

macro_rules! file {
    ($folder:literal, $version:literal, $name:literal) => {
        (
            $version,
            $name,
            include_str!(concat!(
                "../../migrations/",
                $folder,
                "/",
                $version,
                "_",
                $name,
                ".sql"
            )),
        )
    };
}

const BROKER: &[File] = &[
    file!("broker", 20261122000100, "nodes_and_leases"),
    file!("broker", 20261122000200, "streams_and_log"),
    file!("broker", 20261122000250, "origins"),
    file!("broker", 20261122000260, "append_state"),
    file!("broker", 20261122000300, "append"),
    file!("broker", 20261122000305, "append_next"),
    file!("broker", 20261122000310, "take_leases"),
    file!("broker", 20261122000320, "leaves"),
    file!("broker", 20261122000330, "keys"),
    file!("broker", 20261122000340, "scheduled"),
    file!("broker", 20261122000345, "scheduled_leaves"),
    file!("broker", 20261122000350, "schedules"),
    file!("broker", 20261122000360, "topic_settings"),
    file!("broker", 20261122000380, "user_locks"),
    file!("broker", 20261122000390, "histories"),
    file!("broker", 20261122000400, "queues"),
    file!("broker", 20261122000405, "queue_journal_turns"),
    file!("broker", 20261122000410, "redrives"),
];

/// The origin side, schema `postroad`.
const ORIGIN: &[File] = &[
    file!("origin", 20261122000100, "outbox"),
    file!("origin", 20261122000200, "publish"),
];

/// The consumer side, in the same schema as an origin's: a service can be both.
const INBOX: &[File] = &[file!("inbox", 20261122001000, "inbox")];

/// The objects beside mapped tables, also in the same schema.
const MAPPED: &[File] = &[file!("mapped", 20261122002000, "mapped")];

/// The check of locks' tokens, also in the same schema.
const FENCE: &[File] = &[file!("fence", 20261122003000, "fence")];

/// Roles of an origin and what they may do; run at the end of every install.
const ORIGIN_GRANTS: &str = concat!(
    include_str!("../../migrations/roles.sql"),
    include_str!("../../migrations/origin/grants.sql")
);
/// The same of an inbox.
const INBOX_GRANTS: &str = concat!(
    include_str!("../../migrations/roles.sql"),
    include_str!("../../migrations/inbox/grants.sql")
);
/// The same of a fence.
const FENCE_GRANTS: &str = concat!(
    include_str!("../../migrations/roles.sql"),
    include_str!("../../migrations/fence/grants.sql")
);
/// The same beside mapped tables.
const MAPPED_GRANTS: &str = concat!(
    include_str!("../../migrations/roles.sql"),
    include_str!("../../migrations/mapped/grants.sql")
);

/// A schema that somebody made before, to have us put our tables into what is his, is not taken.
const FIRST: &str = include_str!("../../migrations/first.sql");

/// The schema of everything that stands beside a service's own tables.
const ORIGIN_SCHEMA: &str = "postroad";

/// The schema of the broker's own tables.
const BROKER_SCHEMA: &str = "postroad_broker";

/// Held while rights are granted: `grants` in ASCII.
const GRANT_LOCK: i64 = 0x6772_616e_7473;

/// Refuses a schema that has code of somebody else in it: before anything is done with it.
fn look_at(schema: &str) -> String {
    FIRST.replace("/*schema*/", &format!("'{schema}'"))
}

/// The same of the schema beside a service's own tables, for whatever is done with it after an install.
pub(in crate::store) fn look() -> String {
    look_at(ORIGIN_SCHEMA)
}

/// Makes the schema, unless it is there, and looks at it. Looked at before, it could be made meanwhile.
fn first(schema: &str) -> String {
    format!("create schema if not exists {schema};\n{}", look_at(schema))
}

fn migrator(files: &[File], schema: &'static str) -> Migrator {
    let migrations = files
        .iter()
        .map(|&(version, name, text)| {
            Migration::new(
                version,
                name.into(),
                MigrationType::Simple,
                text.into_sql_str(),
                false,
            )
        })
        .collect();
    let mut migrator = Migrator::with_migrations(migrations);
    migrator.create_schema(schema);
    migrator.dangerous_set_table_name(format!("{schema}.migration"));
    // The previous version of the binary runs on a newer schema: expand, then contract.
    migrator.set_ignore_missing(true);
    // Its own lock stays with the session when a migration fails.
    migrator.set_locking(false);
    migrator
}

/// Runs what is missing, once it is this session's turn.
async fn migrate(
    database: &Database,
    (files, schema): (&[File], &'static str),
    longest_wait: Duration,
) -> Result<(), Error> {
    let mut turn = Turn::take(database, longest_wait).await?;
    sqlx::raw_sql(sqlx::AssertSqlSafe(first(schema)))
        .execute(&mut turn.0)
        .await
        .map_err(Error::query("looking whose schema it is"))?;
    if schema == BROKER_SCHEMA {
        refuse_newer(&mut turn.0).await?;
    }
    let migrated = migrator(files, schema)
        .run_direct(None, &mut turn.0, false)
        .await;
    migrated.map_err(Error::Migrate)?;
    turn.end().await
}

/// Brings the broker's schema, `postroad_broker`, up to date. Safe to call from several processes at once.
///
/// # Errors
/// A migration that failed, or one applied before that was edited; [`Error::SchemaTooNew`]; [`Error::MigrationHeld`].
pub async fn broker(database: &Database) -> Result<(), Error> {
    broker_within(database, turn::LONGEST).await
}

/// The same; another process that migrates is waited for no longer than `longest_wait`.
///
/// # Errors
/// As [`broker`].
pub async fn broker_within(database: &Database, longest_wait: Duration) -> Result<(), Error> {
    migrate(database, (BROKER, BROKER_SCHEMA), longest_wait).await
}

async fn refuse_newer(connection: &mut Connection) -> Result<(), Error> {
    let known = BROKER.last().map_or(0, |file| file.0);
    match needed(connection).await? {
        Some(needed) if needed > known => Err(Error::SchemaTooNew { needed, known }),
        _ => Ok(()),
    }
}

/// The migration that a program must know, if the schema is there and says so. Migrations beyond those that this program knows only
/// add, unless they say otherwise here.
async fn needed(connection: &mut Connection) -> Result<Option<i64>, Error> {
    const DOING: &str = "looking at the schema's version";
    let is_there: bool =
        sqlx::query_scalar("select to_regclass('postroad_broker.schema_needs') is not null")
            .fetch_one(&mut *connection)
            .await
            .map_err(Error::query(DOING))?;
    if !is_there {
        return Ok(None);
    }
    sqlx::query_scalar("select version from postroad_broker.schema_needs")
        .fetch_optional(connection)
        .await
        .map_err(Error::query(DOING))
}

/// Whether the roles that an install is for have their rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grants {
    /// The roles are there and have what they need.
    Given,
    /// A role is missing and the installing user may not create roles: who installs must be told so.
    Skipped,
}

/// Installs an origin's schema, `postroad`, or brings it up to date, and gives the database's roles of producers and relays their
/// rights. Safe to call from several processes at once, and idempotent. Relays do not call it for an origin of another
/// database: `postroad install` does.
///
/// # Errors
/// A migration that failed, or one applied before that was edited; grants refused.
pub async fn origin(database: &Database) -> Result<Grants, Error> {
    install(database, ORIGIN, ORIGIN_GRANTS, &["producer", "relay"]).await
}

/// Installs `postroad.assert_fence` in the database of what locks protect, or brings it up to date, and gives the database's role of
/// those who work under locks its right. Safe to call from several processes at once, and idempotent. An outbox and an inbox may stand beside it.
///
/// # Errors
/// A migration that failed, or one applied before that was edited; grants refused.
pub async fn fence(database: &Database) -> Result<Grants, Error> {
    install(database, FENCE, FENCE_GRANTS, &["fenced"]).await
}

/// Installs the inbox in a consumer's database, in schema `postroad`, or brings it up to date, and gives the database's role of
/// consumers its rights. Safe to call from several processes at once, and idempotent. An outbox may stand beside it.
///
/// # Errors
/// A migration that failed, or one applied before that was edited; grants refused.
pub async fn inbox(database: &Database) -> Result<Grants, Error> {
    install(database, INBOX, INBOX_GRANTS, &["consumer"]).await
}

/// Installs what stands beside mapped tables, then runs these statements, in one transaction of their own: what one table needs.
pub(in crate::store) async fn mapped(
    database: &Database,
    statements: &str,
) -> Result<Grants, Error> {
    const DOING: &str = "changing the mapped table";
    let grants = install(database, MAPPED, MAPPED_GRANTS, &["relay"]).await?;
    let mut connection = database.connect().await?;
    // Sent as one message, it is one transaction.
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned()))
        .execute(&mut connection)
        .await
        .map_err(Error::query(DOING))?;
    Ok(grants)
}

/// The same as one SQL script.
pub(in crate::store) fn mapped_sql(statements: &str) -> String {
    let grants = format!("{MAPPED_GRANTS}{statements}");
    script("tables beside mapped outboxes", MAPPED, &grants)
}

async fn install(
    database: &Database,
    files: &[File],
    grants: &'static str,
    roles: &[&str],
) -> Result<Grants, Error> {
    migrate(database, (files, ORIGIN_SCHEMA), turn::LONGEST).await?;
    let mut connection = database.connect().await?;
    // Sent as one message, it is one transaction. One at a time: two that grant at once update the same rows of the catalogue, which
    // Postgres refuses.
    let alone = format!("select pg_advisory_xact_lock({GRANT_LOCK});{grants}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(alone))
        .execute(&mut connection)
        .await
        .map_err(Error::query("granting the installed roles their rights"))?;
    let found: i64 = sqlx::query_scalar(
        "select count(*) from unnest($1::text[]) as k (kind)
        join pg_roles as r on r.rolname = postroad.role_name(k.kind)",
    )
    .bind(roles)
    .fetch_one(&mut connection)
    .await
    .map_err(Error::query("looking up the installed roles"))?;
    Ok(if usize::try_from(found) == Ok(roles.len()) {
        Grants::Given
    } else {
        Grants::Skipped
    })
}

/// The names of this database's roles of these kinds: `producer`, `relay`, `consumer`, `fenced`. After an install.
///
/// # Errors
/// The statement failed.
pub async fn role_names(database: &Database, kinds: &[&str]) -> Result<Vec<String>, Error> {
    sqlx::query_scalar("select postroad.role_name(k.kind) from unnest($1::text[]) with ordinality as k (kind, n) order by k.n")
        .bind(kinds)
        .fetch_all(database.pool())
        .await
        .map_err(Error::query("looking up the names of roles"))
}

/// The work of [`origin`] as one SQL script, for teams that run their own migrations. It is idempotent, and leaves the same
/// record behind, so that the script and `postroad install` can follow each other.
#[must_use]
pub fn origin_sql() -> String {
    script("outbox", ORIGIN, ORIGIN_GRANTS)
}

/// The work of [`fence`] as one SQL script, on the same terms.
#[must_use]
pub fn fence_sql() -> String {
    script("fence", FENCE, FENCE_GRANTS)
}

/// The work of [`inbox`] as one SQL script, on the same terms.
#[must_use]
pub fn inbox_sql() -> String {
    script("inbox", INBOX, INBOX_GRANTS)
}

fn script(what: &str, files: &[File], grants: &str) -> String {
    use std::fmt::Write as _;
    let first = first(ORIGIN_SCHEMA);
    let mut script = format!(
        "-- Postroad's {what}: schema, functions and grants. Run it as the owner of the database, in psql or by any migration tool.\n\
         begin isolation level read committed;\n\
         -- Whatever the path of whoever runs it: what others made in other schemas is not called.\n\
         set local search_path = pg_catalog, pg_temp;\n\
         do $postroad_look$ begin\n    \
             if getdatabaseencoding() <> 'UTF8' then\n        \
                 raise exception 'the encoding of this database is %, and Postroad needs UTF8', getdatabaseencoding();\n    \
             end if;\n\
         end $postroad_look$;\n\
         {first}\
         create table if not exists postroad.migration (\n    \
             version bigint primary key,\n    \
             description text not null,\n    \
             installed_on timestamptz not null default now(),\n    \
             success boolean not null,\n    \
             checksum bytea not null,\n    \
             execution_time bigint not null\n\
         );\n",
    );
    for migration in migrator(files, ORIGIN_SCHEMA).iter() {
        let mut checksum = String::with_capacity(2 * migration.checksum.len());
        for byte in migration.checksum.iter() {
            write!(checksum, "{byte:02x}").expect("writing to a String cannot fail");
        }
        write!(
            script,
            "\n-- {version} {description}\n\
             do $postroad_install$\n\
             begin\n\
             if exists (select from postroad.migration where version = {version}) then return; end if;\n\
             execute $postroad_migration$\n{text}$postroad_migration$;\n\
             insert into postroad.migration (version, description, success, checksum, execution_time)\n    \
             values ({version}, '{description}', true, '\\x{checksum}', 0);\n\
             end\n\
             $postroad_install$;\n",
            version = migration.version,
            description = migration.description,
            text = migration.sql.as_str(),
        )
        .expect("writing to a String cannot fail");
    }
    script.push('\n');
    script.push_str(grants);
    script.push_str("commit;\n");
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_scripts_have_every_migration_and_the_grants() {
        for (script, files) in [
            (origin_sql(), ORIGIN),
            (inbox_sql(), INBOX),
            (fence_sql(), FENCE),
        ] {
            for &(version, _, text) in files {
                assert!(script.contains(&format!("version = {version}")));
                assert!(script.contains(text));
                assert!(!text.contains("$postroad_"));
            }
            assert!(script.contains("create role"));
        }
    }

    #[test]
    fn all_sides_can_stand_in_one_database() {
        let mut versions: Vec<i64> = [ORIGIN, INBOX, MAPPED, FENCE]
            .iter()
            .flat_map(|files| files.iter().map(|file| file.0))
            .collect();
        versions.sort_unstable();
        assert!(versions.is_sorted_by(|left, right| left < right));
    }
}
