//! The schema's migrations, embedded. Up-only, never edited once landed, each in its own transaction under one lock.

use sqlx::SqlSafeStr as _;
use sqlx::migrate::{Migration, MigrationType, Migrator};

use super::{Database, Error};

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
];

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
    migrator
}

/// Brings the broker's schema, `postroad_broker`, up to date. Safe to call from several processes at once.
///
/// # Errors
/// A migration that failed, or a landed one that was edited.
pub async fn broker(database: &Database) -> Result<(), Error> {
    migrator(BROKER, "postroad_broker")
        .run(database.pool())
        .await
        .map_err(Error::Migrate)
}
