//! The way from the command to "ready": what is answered meanwhile, how it is stopped, and what a failed try leaves behind.

use std::time::{Duration, Instant};

use postroad::store::{Database, Error, migrate};
use reqwest::StatusCode;
use rustix::process::Signal;
use sqlx::Connection as _;

use super::{output, postroad};
use crate::support::broker::{launch, variables};
use crate::support::{self, Http, send_signal};

/// The lock of whoever migrates: `postroad` in ASCII.
const LOCK: i64 = 0x706f_7374_726f_6164;

fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[tokio::test]
async fn a_health_check_asks_no_proxy() {
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let proxy = format!("http://{}", free_address());
    for (ask, told) in [
        (&["healthcheck"][..], "ready\n"),
        (&["healthcheck", "--live"], "alive\n"),
    ] {
        let mut command = postroad(ask);
        command
            .args(["--url", &program.http.base])
            .env("HTTP_PROXY", &proxy)
            .env("http_proxy", &proxy)
            .env("ALL_PROXY", &proxy);
        let (status, out, error) = output(command).await;
        assert_eq!((status, out.as_str()), (0, told), "{error}");
    }
}

#[tokio::test]
async fn while_it_waits_for_the_database_it_lives_says_so_and_can_be_stopped() {
    let (nobody, address) = (free_address(), free_address());
    let mut variables = variables(&format!("postgres://u:s3cret@{nobody}/d"));
    variables.push(("POSTROAD_BIND".to_owned(), address.clone()));
    let (mut child, mut log) = launch(&variables);
    let line = log.wait_for("waiting for the database").await;
    assert!(!line.to_string().contains("s3cret"), "{line}");
    let http = Http::new(&format!("http://{address}"));
    assert_eq!(http.get("/healthz").await.0, StatusCode::OK);
    let (status, metrics) = http.get("/metrics").await;
    assert_eq!(status, StatusCode::OK);
    assert!(metrics.to_string().contains("process_resident_memory"));
    let (status, ready) = http.get("/readyz").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(ready["reasons"][0]["part"], "start", "{ready}");
    let reason = ready["reasons"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("waiting for the database"), "{reason}");
    let url = format!("{}/v1/queues", http.base);
    let answer = http.client.get(url).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers().contains_key("retry-after"));
    assert!(answer.headers().contains_key("x-request-id"));
    let body = answer.text().await.unwrap();
    assert!(
        body.contains("/problems/unavailable") && body.contains("starting"),
        "{body}"
    );
    // What it waits for is not for pages of other sites.
    for (name, value) in [("host", "evil.example"), ("origin", "https://evil.example")] {
        for path in ["/v1/queues", "/readyz"] {
            let url = format!("{}{path}", http.base);
            let refused = http.client.get(url).header(name, value).send();
            let refused = refused.await.unwrap();
            assert_eq!(refused.status(), StatusCode::FORBIDDEN, "{name} {path}");
            let body = refused.text().await.unwrap();
            assert!(!body.contains("database"), "{body}");
        }
    }
    // Another node that takes it for a queue's owner is to look again.
    let url = format!("{}/v1/queues/q", http.base);
    let passed_on = http.client.get(url).header("x-postroad-node", "x").send();
    assert_eq!(
        passed_on.await.unwrap().status(),
        StatusCode::MISDIRECTED_REQUEST
    );
    let began = Instant::now();
    send_signal(i32::try_from(child.id().unwrap()).unwrap(), Signal::TERM);
    assert!(child.wait().await.unwrap().success());
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_request_that_comes_just_before_the_start_is_done_is_served() {
    let database = support::database().await;
    let mut holder = database.connect().await;
    lock(&mut holder).await;
    let address = free_address();
    let mut variables = variables(&database.url);
    variables.push(("POSTROAD_BIND".to_owned(), address.clone()));
    let (mut child, mut log) = launch(&variables);
    log.wait_for("waiting for another session that is migrating this database")
        .await;
    let http = Http::new(&format!("http://{address}"));
    // It waits two seconds; to begin the start again takes less.
    let asked = tokio::spawn({
        let http = http.clone();
        async move { http.get("/v1/queues").await }
    });
    holder.close().await.unwrap();
    log.wait_for("postroad is ready").await;
    let (status, answer) = asked.await.unwrap();
    let is_late = status == StatusCode::SERVICE_UNAVAILABLE;
    assert!(status == StatusCode::OK || is_late, "{status} {answer}");
    assert_eq!(http.get("/readyz").await.0, StatusCode::OK);
    child.kill().await.unwrap();
}

async fn lock(connection: &mut sqlx::PgConnection) {
    sqlx::query("select pg_advisory_lock($1)")
        .bind(LOCK)
        .execute(connection)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_wait_for_another_migration_is_told_and_has_an_end() {
    let database = support::database().await;
    let mut holder = database.connect().await;
    lock(&mut holder).await;
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()")
        .fetch_one(&mut holder)
        .await
        .unwrap();
    let waited = migrate::broker_within(&database.database, Duration::from_millis(300)).await;
    let Err(Error::MigrationHeld { holder: who, .. }) = waited else {
        panic!("{waited:?}");
    };
    assert!(who.contains(&format!("session {pid} of user")), "{who}");
    let (mut child, mut log) = launch(&variables(&database.url));
    let line = log
        .wait_for("waiting for another session that is migrating this database")
        .await;
    let told = line["fields"]["holder"].as_str().unwrap();
    assert!(told.contains(&pid.to_string()), "{line}");
    drop(holder);
    log.wait_for("postroad is ready").await;
    child.kill().await.unwrap();
}

#[tokio::test]
async fn a_migration_that_failed_is_in_nobodys_way() {
    let database = support::empty_database().await;
    let mut owner = database.connect().await;
    let refuse = "create function public.refuse() returns event_trigger language plpgsql as $$ \
                  begin raise exception 'not now'; end $$; \
                  create event trigger refuse on ddl_command_start when tag in ('CREATE FUNCTION') \
                  execute function public.refuse()";
    sqlx::raw_sql(refuse).execute(&mut owner).await.unwrap();
    let failed = migrate::broker(&database.database).await.unwrap_err();
    assert!(failed.explained().contains("not now"), "{failed:?}");
    sqlx::raw_sql("drop event trigger refuse")
        .execute(&mut owner)
        .await
        .unwrap();
    // The same process and another one, six times.
    let other = Database::new(&database.url, 2).unwrap();
    for number in 0..6 {
        let database = if number % 2 == 0 {
            &database.database
        } else {
            &other
        };
        let migrated = tokio::time::timeout(Duration::from_secs(60), migrate::broker(database));
        migrated.await.expect("nobody holds it up").unwrap();
    }
    let both = async { tokio::join!(migrate::broker(&database.database), migrate::broker(&other)) };
    let both = tokio::time::timeout(Duration::from_secs(60), both).await;
    assert!(matches!(both.unwrap(), (Ok(()), Ok(()))));
    support::eventually("no lock to be left", || async {
        let held = "select count(*) from pg_locks l join pg_database d on d.oid = l.database \
                    where l.locktype = 'advisory' and d.datname = current_database()";
        let mut looker = database.connect().await;
        let held: i64 = sqlx::query_scalar(held)
            .fetch_one(&mut looker)
            .await
            .unwrap();
        (held == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn who_may_not_is_told_what_to_do_in_one_line() {
    let cluster = support::cluster().await;
    let url = cluster.create_database("b").await;
    let mut admin = sqlx::PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("create role plain login; revoke create on schema public from public")
        .execute(&mut admin)
        .await
        .unwrap();
    let plain = crate::relay::as_user(&url, "plain");
    for (url, expected) in [
        (
            plain.clone(),
            "permission denied for database b; grant this user the missing right",
        ),
        (
            crate::relay::as_user(&url, "nobody_such"),
            "role \"nobody_such\" does not exist; ",
        ),
        (
            plain.replace("/b?", "/nowhere?"),
            "database \"nowhere\" does not exist; create the database, or correct its name",
        ),
    ] {
        let mut serve = postroad(&["serve", "--bind", "127.0.0.1:0"]);
        serve.env("POSTROAD_DATABASE_URL", &url);
        serve.env("POSTROAD_ALLOW_UNSAFE_POSTGRES", "true");
        let (code, _, said) = output(serve).await;
        assert_eq!(code, 1, "{said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("error: the database ") && last.contains(expected),
            "{said}"
        );
        let mut install = postroad(&["install"]);
        install.env("DATABASE_URL", &url);
        let (code, _, said) = output(install).await;
        assert_eq!((code, said.lines().count()), (1, 1), "{said}");
        assert!(said.contains(expected), "{said}");
    }
}

#[tokio::test]
async fn a_session_that_the_server_ends_is_a_lost_connection_whatever_the_code() {
    let database = support::database().await;
    let mut connection = database.database.connect().await.unwrap();
    let shown: String = sqlx::query_scalar("show idle_session_timeout")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(
        shown, "0",
        "sessions may be idle whatever a role's default is"
    );
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    sqlx::query("set idle_session_timeout = '50ms'")
        .execute(&mut connection)
        .await
        .unwrap();
    support::eventually("the server to end it", || async {
        let mut other = database.connect().await;
        let looking = sqlx::query_scalar("select count(*) from pg_stat_activity where pid = $1");
        let left: i64 = looking.bind(pid).fetch_one(&mut other).await.unwrap();
        (left == 0).then_some(())
    })
    .await;
    let lost = postroad::store::cluster::read_server_safety(&mut connection).await;
    let lost = lost.unwrap_err();
    assert!(lost.is_connection_lost(), "{lost:?}");
    assert_eq!(lost.retry(), postroad::store::Retry::Backoff);
}
