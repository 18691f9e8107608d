//! A clock of a broker's database that can be set. The functions of the broker ask for `clock_timestamp()` by its name alone, so a
//! schema before `pg_catalog` gives them another.

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

/// Gives a database a clock that can be set, for sessions to come.
pub async fn settable(url: &str) {
    let mut owner = PgConnection::connect(url).await.unwrap();
    let text = "create schema settable;
        create table settable.clock (ahead interval not null);
        insert into settable.clock values ('0');
        create function settable.clock_timestamp() returns timestamptz language sql volatile as
            'select pg_catalog.clock_timestamp() + ahead from settable.clock';
        do $$ begin
            execute format('alter database %I set search_path = settable, pg_catalog, public', current_database());
        end $$";
    owner.execute(text).await.unwrap();
}

/// Sets it so far ahead.
pub async fn set(url: &str, ahead: &str) {
    let mut owner = PgConnection::connect(url).await.unwrap();
    let text = format!("update settable.clock set ahead = '{ahead}'");
    owner.execute(AssertSqlSafe(text)).await.unwrap();
}
