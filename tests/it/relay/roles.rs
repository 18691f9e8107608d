//! Who may do what: the roles of one database give nothing in another, and a producer reads back what it inserts.

use postroad::store::migrate::{self, Grants};
use postroad::store::origin::claim;
use postroad::store::{Database, uninstall};
use sqlx::{AssertSqlSafe, PgConnection};

use super::{Origin, as_user, connect, execute};
use crate::support;

const OUTBOX: uninstall::Side<'static> = uninstall::Side::Outbox { takes_rows: false };

async fn refusal(connection: &mut PgConnection, text: &str) -> String {
    let refused = sqlx::query(AssertSqlSafe(text.to_owned()))
        .execute(connection)
        .await
        .unwrap_err();
    let code = refused.as_database_error().and_then(|error| error.code());
    format!("{} {refused}", code.unwrap_or_default())
}

#[tokio::test]
async fn the_roles_of_one_database_give_nothing_in_another() {
    let cluster = support::cluster().await;
    let shop = cluster.create_database("shop").await;
    let payroll = cluster.create_database("payroll").await;
    for url in [&shop, &payroll] {
        Origin::install(url).await;
        let database = Database::new(url, 1).unwrap();
        assert_eq!(migrate::inbox(&database).await.unwrap(), Grants::Given);
        assert_eq!(migrate::fence(&database).await.unwrap(), Grants::Given);
        database.close().await;
    }
    execute(
        &mut connect(&shop).await,
        "create role service login in role postroad_producer_shop, postroad_relay_shop, postroad_consumer_shop, postroad_fenced_shop",
    )
    .await;
    let own = [
        "insert into postroad.outbox (topic) values ('a')",
        "truncate postroad.outbox_1",
        "select postroad.inbox_accept('q', '/s', 'i', 1)",
        "select postroad.assert_fence('l', 1)",
        "select * from postroad.outbox",
    ];
    let mut service = connect(&as_user(&shop, "service")).await;
    for text in own {
        execute(&mut service, text).await;
    }
    drop(service);
    let mut service = connect(&as_user(&payroll, "service")).await;
    for text in own {
        assert!(
            refusal(&mut service, text).await.starts_with("42501"),
            "{text}"
        );
    }
    drop(service);

    // A copy of the database brings the rights of the original's roles, and loses them as it is installed.
    execute(
        &mut connect(&payroll).await,
        "create database staging template shop",
    )
    .await;
    let staging = shop.replace("/shop", "/staging");
    let database = Database::new(&staging, 1).unwrap();
    for installed in [
        migrate::origin(&database).await,
        migrate::inbox(&database).await,
        migrate::fence(&database).await,
    ] {
        assert_eq!(installed.unwrap(), Grants::Given);
    }
    database.close().await;
    let mut service = connect(&as_user(&staging, "service")).await;
    for text in own {
        assert!(
            refusal(&mut service, text).await.starts_with("42501"),
            "{text}"
        );
    }
    drop(service);
    // The original keeps them, also when it is installed again. And so does a person's own role, whatever its name begins with.
    execute(
        &mut connect(&shop).await,
        "create role postroad_relay_login login; grant usage on schema postroad to postroad_relay_login;
        grant select on postroad.outbox to postroad_relay_login",
    )
    .await;
    let database = Database::new(&shop, 1).unwrap();
    assert_eq!(migrate::origin(&database).await.unwrap(), Grants::Given);
    database.close().await;
    let mut service = connect(&as_user(&shop, "service")).await;
    execute(&mut service, own[0]).await;
    drop(service);
    let mut person = connect(&as_user(&shop, "postroad_relay_login")).await;
    execute(&mut person, "select * from postroad.outbox").await;
    drop(person);

    // A database that takes the name of another one does not take its services.
    execute(
        &mut connect(&payroll).await,
        "alter database shop rename to store",
    )
    .await;
    let young = cluster.create_database("shop").await;
    let database = Database::new(&young, 1).unwrap();
    let refused = migrate::origin(&database).await.unwrap_err();
    let mut said = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(&refused);
    while let Some(error) = cause {
        said = format!("{said} {error}");
        cause = error.source();
    }
    assert!(
        said.contains("postroad_producer_shop has rights in the database store"),
        "{said}"
    );
    database.close().await;
}

#[tokio::test]
async fn a_producer_reads_back_what_it_inserts() {
    let database = support::empty_database().await;
    Origin::install(&database.url).await;
    let mut producer = database.connect().await;
    execute(
        &mut producer,
        &format!("set role {}", database.role("producer")),
    )
    .await;
    execute(
        &mut producer,
        "insert into postroad.outbox (topic, payload) values ('a', 'x') returning *",
    )
    .await;
    // The JSON null is what SQLAlchemy writes for None.
    execute(
        &mut producer,
        "insert into postroad.outbox (topic, headers) values ('a', 'null')",
    )
    .await;
    let text = "insert into postroad.outbox (topic, key, expected_version, deliver_at) values ('a', 'k', 1, now() + interval '1 hour')";
    let refused = refusal(&mut producer, text).await;
    assert!(
        refused.contains("outbox_expected_version_is_of_now"),
        "{refused}"
    );
    for text in [
        "insert into postroad.outbox (topic, xid) values ('a', '1')",
        "update postroad.outbox set topic = 'b'",
        "delete from postroad.outbox",
    ] {
        assert!(
            refusal(&mut producer, text).await.starts_with("42501"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_schema_that_somebody_made_before_is_not_taken_and_another_encoding_neither() {
    let cluster = support::cluster().await;
    let url = cluster.create_database("shop").await;
    let mut owner = connect(&url).await;
    execute(
        &mut owner,
        "create role low login; grant create on database shop to low",
    )
    .await;
    execute(
        &mut connect(&as_user(&url, "low")).await,
        "create schema postroad",
    )
    .await;
    for script in [
        migrate::origin_sql(),
        migrate::inbox_sql(),
        migrate::fence_sql(),
    ] {
        let refused = sqlx::raw_sql(AssertSqlSafe(script))
            .execute(&mut owner)
            .await
            .unwrap_err();
        assert!(
            refused.to_string().contains("belongs to the role low"),
            "{refused}"
        );
        execute(&mut owner, "rollback").await;
    }
    let database = Database::new(&url, 1).unwrap();
    assert!(migrate::origin(&database).await.is_err());
    database.close().await;
    // Nor does the broker take a schema of its own name.
    execute(
        &mut owner,
        "drop schema postroad; grant create on database shop to low; set role low; create schema postroad_broker; reset role",
    )
    .await;
    let database = Database::new(&url, 1).unwrap();
    assert!(migrate::broker(&database).await.is_err());
    database.close().await;
    execute(
        &mut owner,
        "create database ascii encoding 'SQL_ASCII' locale 'C' template template0",
    )
    .await;
    let mut ascii = connect(&url.replace("/shop", "/ascii")).await;
    let refused = sqlx::raw_sql(AssertSqlSafe(migrate::origin_sql()))
        .execute(&mut ascii)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("SQL_ASCII"), "{refused}");
}

/// The owner of a database is no superuser, and has made what a superuser's install would use.
#[tokio::test]
async fn an_install_by_a_superuser_runs_no_code_of_the_databases_owner() {
    const TRAP: &str = "
        create table postroad.migration (
            version bigint primary key, description text not null, installed_on timestamptz not null default now(),
            success boolean not null, checksum bytea not null, execution_time bigint not null
        );
        create function public.spring() returns trigger language plpgsql as $$ begin
            alter role tenant superuser;
            return new;
        end $$;
        create trigger trap before insert or delete on postroad.migration for each row execute function public.spring()";
    let cluster = support::cluster().await;
    let url = cluster.create_database("shop").await;
    let mut owner = connect(&url).await;
    execute(
        &mut owner,
        "create role tenant login; alter database shop owner to tenant; alter schema public owner to tenant",
    )
    .await;
    let mut tenant = connect(&as_user(&url, "tenant")).await;
    execute(&mut tenant, "create schema postroad").await;
    execute(&mut tenant, TRAP).await;
    let is_refused = async |url: &str, what: &str| {
        let database = Database::new(url, 1).unwrap();
        for install in [
            migrate::origin(&database).await.map(|_| ()),
            migrate::inbox(&database).await.map(|_| ()),
            migrate::fence(&database).await.map(|_| ()),
            uninstall::run(&database, uninstall::Side::Inbox).await,
            claim::release(&database, None).await.map(|_| ()),
        ] {
            let refused = format!("{:?}", install.unwrap_err());
            assert!(refused.contains(what), "{refused}");
        }
        database.close().await;
        let mut owner = connect(url).await;
        for script in [migrate::origin_sql(), uninstall::script(OUTBOX)] {
            let refused = sqlx::raw_sql(AssertSqlSafe(script)).execute(&mut owner);
            let refused = refused.await.unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
            execute(&mut owner, "rollback").await;
        }
    };
    is_refused(
        &url,
        "the schema postroad is there and belongs to the role tenant",
    )
    .await;
    // Given away, it still has the table.
    execute(&mut owner, "alter schema postroad owner to current_user").await;
    is_refused(&url, "belongs to the role tenant").await;
    execute(
        &mut owner,
        "drop table postroad.migration; create function postroad.role_name(kind text) returns text language sql as 'select kind';
        alter function postroad.role_name(text) owner to tenant",
    )
    .await;
    is_refused(
        &url,
        "postroad.role_name(text) in the schema postroad belongs",
    )
    .await;
    execute(
        &mut owner,
        "drop schema postroad cascade; create schema postroad_broker; alter schema postroad_broker owner to tenant",
    )
    .await;
    let database = Database::new(&url, 1).unwrap();
    assert!(migrate::broker(&database).await.is_err());
    database.close().await;
    let is_superuser: bool =
        sqlx::query_scalar("select rolsuper from pg_roles where rolname = 'tenant'")
            .fetch_one(&mut owner)
            .await
            .unwrap();
    assert!(!is_superuser);
    // He installs himself what is his.
    let database = Database::new(&as_user(&url, "tenant"), 1).unwrap();
    migrate::origin(&database).await.unwrap();
    migrate::broker(&database).await.unwrap();
    uninstall::run(&database, OUTBOX).await.unwrap();
    database.close().await;
}

#[tokio::test]
async fn what_is_installed_is_taken_out_again_with_its_roles() {
    let database = support::empty_database().await;
    let mut owner = database.connect().await;
    let sides = [OUTBOX, uninstall::Side::Inbox, uninstall::Side::Fence];
    for takes_by_script in [false, true] {
        migrate::origin(&database.database).await.unwrap();
        migrate::inbox(&database.database).await.unwrap();
        migrate::fence(&database.database).await.unwrap();
        execute(
            &mut owner,
            "select postroad.inbox_accept('q', '/s', 'i', 1)",
        )
        .await;
        execute(&mut owner, "insert into postroad.relay_claim (table_name, broker, origin_id, origin, salt) values ('postroad.outbox', gen_random_uuid(), 1, 'shop', gen_random_uuid())").await;
        let refused = uninstall::run(&database.database, sides[0])
            .await
            .unwrap_err();
        assert!(
            format!("{refused:?}").contains("relayed as the origin shop"),
            "{refused:?}"
        );
        execute(
            &mut owner,
            "update postroad.relay_claim set released_at = now(); insert into postroad.outbox (topic) values ('a'), ('b')",
        )
        .await;
        // Nobody has relayed them, as far as this database knows.
        let refused = uninstall::run(&database.database, OUTBOX)
            .await
            .unwrap_err();
        assert!(
            refused.explained().to_string().contains("holds 2 rows"),
            "{refused:?}"
        );
        match takes_by_script {
            true => execute(&mut owner, "truncate postroad.outbox").await,
            false => {
                let with_rows = uninstall::Side::Outbox { takes_rows: true };
                uninstall::run(&database.database, with_rows).await.unwrap();
            }
        }
        for side in sides {
            for _ in 0..2 {
                match takes_by_script {
                    true => execute(&mut owner, &uninstall::script(side)).await,
                    false => uninstall::run(&database.database, side).await.unwrap(),
                }
            }
        }
        let left: (i64, i64) = sqlx::query_as(
            "select (select count(*) from pg_namespace where nspname = 'postroad'),
                (select count(*) from pg_roles where rolname like 'postroad\\_%\\_' || current_database())",
        )
        .fetch_one(&mut owner)
        .await
        .unwrap();
        assert_eq!(left, (0, 0));
    }
}
