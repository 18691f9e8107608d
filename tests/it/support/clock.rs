//! A clock of a broker's database that can be set. The functions and sessions of the broker ask for `clock_timestamp()` by its name alone, and
//! a schema before `pg_catalog` gives them another: sessions of a test build look for it, and the functions, which have search paths of
//! their own, are given another.

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

/// Gives a database a clock that can be set, for sessions to come.
pub async fn settable(url: &str) {
    let mut owner = PgConnection::connect(url).await.unwrap();
    let text = "create schema settable;
        create table settable.clock (ahead interval not null);
        insert into settable.clock values ('0');
        create function settable.clock_timestamp() returns timestamptz language sql volatile as
            'select pg_catalog.clock_timestamp() + ahead from settable.clock';
        create function settable.follow() returns void language plpgsql as $f$
        declare called regprocedure;
        begin
            for called in
                select p.oid from pg_catalog.pg_proc p
                where p.pronamespace = to_regnamespace('postroad_broker') and 'search_path=pg_catalog, pg_temp' = any (p.proconfig)
            loop
                execute format('alter function %s set search_path = settable, pg_catalog, pg_temp', called);
            end loop;
        end $f$;
        create function settable.follow_all() returns event_trigger language plpgsql as 'begin perform settable.follow(); end';
        create event trigger settable_clock on ddl_command_end when tag in ('CREATE FUNCTION') execute function settable.follow_all();
        select settable.follow()";
    owner.execute(text).await.unwrap();
}

/// Sets it so far ahead.
pub async fn set(url: &str, ahead: &str) {
    let mut owner = PgConnection::connect(url).await.unwrap();
    let text = format!("update settable.clock set ahead = '{ahead}'");
    owner.execute(AssertSqlSafe(text)).await.unwrap();
}
