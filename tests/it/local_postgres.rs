//! The private Postgres: kept data, the lock, adoption after a kill of the broker, recovery after a kill of the server.

use std::time::Duration;

use postroad::local_postgres::{self, Error, Settings};
use postroad::supervisor::Supervisor;
use sqlx::{Connection as _, PgConnection};

use crate::support;

async fn value(url: &str) -> Option<i32> {
    let mut connection = PgConnection::connect(url).await.ok()?;
    sqlx::query_scalar("select n from kept")
        .fetch_one(&mut connection)
        .await
        .ok()
}

#[tokio::test]
async fn data_is_kept_over_a_restart_and_a_kill() {
    let mut cluster = support::cluster().await;
    let url = cluster.url("postroad");
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sqlx::query("create table kept as select 42 as n")
        .execute(&mut connection)
        .await
        .unwrap();
    drop(connection);

    cluster.stop().await;
    assert!(!cluster.data_dir().join("postmaster.pid").exists());
    cluster.start().await;
    assert_eq!(value(&url).await, Some(42));

    let before = cluster.pid();
    cluster.kill();
    let found = support::eventually("the killed server is started again", || value(&url)).await;
    assert_eq!(found, 42);
    assert_ne!(cluster.pid(), before);
}

#[tokio::test]
async fn a_second_owner_of_a_folder_is_refused_by_name() {
    let cluster = support::cluster().await;
    let folder = cluster.data_dir().parent().unwrap().to_owned();
    let refused = local_postgres::start(Settings::new(&folder), &Supervisor::new()).await;
    let error = refused.unwrap_err();
    assert!(matches!(&error, Error::Locked { data_dir } if *data_dir == folder));
    assert!(error.to_string().contains(&*folder.to_string_lossy()));
}

#[tokio::test]
async fn a_stale_pid_file_of_another_process_is_no_obstacle() {
    let mut cluster = support::cluster().await;
    cluster.stop().await;
    // The number of a process that lives and is no server of this folder: our own.
    let stale = format!("{}\n/x\n1\n5432\n/x\n\n1 1\nready\n", std::process::id());
    std::fs::write(cluster.data_dir().join("postmaster.pid"), stale).unwrap();
    cluster.start().await;
    assert_ne!(
        cluster.pid(),
        Some(i32::try_from(std::process::id()).unwrap())
    );
}

#[tokio::test]
async fn a_killed_brokers_server_is_adopted() {
    let folder = support::cluster::Folder::new();
    let settings = folder.settings();
    // The end of its runtime takes the keeper away as a kill does: nothing stops the server, the lock is free.
    let first = settings.clone();
    let (url, pid) = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let started = runtime.block_on(local_postgres::start(first, &Supervisor::new()));
        let handle = started.unwrap();
        (handle.url(), handle.pid())
    })
    .join()
    .unwrap();
    PgConnection::connect(&url).await.unwrap();

    let supervisor = Supervisor::new();
    let adopted = local_postgres::start(settings, &supervisor).await.unwrap();
    assert!(pid.is_some());
    assert_eq!(adopted.pid(), pid);
    assert_eq!(adopted.url(), url);
    supervisor.stop(Duration::from_secs(30)).await.unwrap();
    assert!(PgConnection::connect(&url).await.is_err());
}

#[tokio::test]
async fn every_test_has_a_database_of_its_own() {
    let (one, two) = tokio::join!(support::database(), support::database());
    assert_ne!(one.name, two.name);
    let mut connection = one.connect().await;
    let tables: i64 =
        sqlx::query_scalar("select count(*) from pg_tables where schemaname = 'postroad_broker'")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    assert!(tables > 5, "the template is migrated");
    let name = one.name.clone();
    drop(one);
    let mut connection = two.connect().await;
    let left: i64 = sqlx::query_scalar("select count(*) from pg_database where datname = $1")
        .bind(name)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(left, 0);
}
