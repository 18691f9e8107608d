//! The inbox of a consumer's own database: what it says, to one and to several at a time, and that by it an effect happens once.

mod killed;
mod life;
mod race;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};

use crate::support::{self, TestDatabase};

/// A consumer's database with the inbox, and leaves of so many offsets.
async fn consumer_database(leaf_offsets: i64) -> TestDatabase {
    let database = support::empty_database().await;
    postroad::store::migrate::inbox(&database.database)
        .await
        .unwrap();
    let mut owner = database.connect().await;
    execute(
        &mut owner,
        &format!("update postroad.inbox_setting set leaf_offsets = {leaf_offsets}"),
    )
    .await;
    database
}

/// A session with no rights but a consumer's.
async fn consumer(database: &TestDatabase) -> PgConnection {
    let mut connection = PgConnection::connect(&database.url).await.unwrap();
    execute(
        &mut connection,
        &format!("set role {}", database.role("consumer")),
    )
    .await;
    connection
}

async fn execute(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(connection)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Accepts the message `m<offset>` of `/shop`.
async fn accept(
    connection: &mut PgConnection,
    queue: &str,
    offset: i64,
) -> Result<bool, sqlx::Error> {
    sqlx::query("select postroad.inbox_accept($1, '/shop', $2, $3)")
        .bind(queue)
        .bind(format!("m{offset}"))
        .bind(offset)
        .fetch_one(connection)
        .await?
        .try_get(0)
}

fn code(error: &sqlx::Error) -> String {
    let error = error.as_database_error();
    error
        .and_then(|error| error.code())
        .unwrap_or_default()
        .into_owned()
}
