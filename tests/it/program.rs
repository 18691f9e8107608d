//! The program as a whole: start, ready, stop, restart, kill; what it says when something is wrong.

mod logs;
mod pooler;
mod private;
mod readiness;
mod secrets;
mod start;

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::support;

fn postroad(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_postroad"));
    command
        .args(arguments)
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

async fn output(mut command: Command) -> (i32, String, String) {
    let output = command.output().await.unwrap();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[tokio::test]
async fn a_term_signal_stops_it_in_order_and_a_kill_is_survived() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    program.kill().await;
    // At once, not after the ttl: the node that has the socket knows that no former one lives.
    let since = std::time::Instant::now();
    program.start().await;
    assert!(since.elapsed() < Duration::from_secs(5));
    assert!(program.stop().await.success());
}

#[tokio::test]
async fn a_wrong_value_ends_it_with_2_and_names_the_key() {
    let (code, _, stderr) = output(postroad(&["serve", "--bind", "nowhere"])).await;
    assert_eq!(code, 2);
    assert!(
        stderr.contains("--bind: `bind` is `nowhere`, and must be an address and port"),
        "{stderr}"
    );
}

#[tokio::test]
async fn a_taken_port_ends_it_before_anything_else_happens() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, _, stderr) = output(postroad(&["serve", "--bind", &address])).await;
    assert_eq!(code, 1);
    assert!(
        stderr.contains(&format!("listening on {address} failed")),
        "{stderr}"
    );
}

#[tokio::test]
async fn a_database_that_cannot_be_used_is_refused_with_the_reason() {
    let database = support::empty_database().await;
    let mut command = postroad(&["serve", "--bind", "127.0.0.1:0"]);
    // fsync is off on the tests' own server.
    command.env("POSTROAD_DATABASE_URL", &database.url);
    if std::env::var_os("DATABASE_URL").is_none() {
        let (code, _, stderr) = output(command).await;
        assert_eq!(code, 1);
        assert!(
            stderr.contains("fsync") && stderr.contains("allow"),
            "{stderr}"
        );
    }
    let mut unknown = postroad(&["serve", "--bind", "127.0.0.1:0"]);
    let no_such = database
        .url
        .replace(&database.name, "postroad_test_no_such");
    unknown.env("POSTROAD_DATABASE_URL", no_such);
    let (code, _, stderr) = output(unknown).await;
    assert_eq!(code, 1);
    assert!(stderr.contains("does not exist"), "{stderr}");
}

#[tokio::test]
async fn it_waits_for_a_database_that_is_not_up_yet() {
    let mut cluster = support::cluster().await;
    let url = cluster.url("postroad");
    cluster.stop().await;
    let (mut child, mut log) = support::broker::launch(&support::broker::variables(&url));
    log.wait_for("waiting for the database").await;
    cluster.start().await;
    log.wait_for("the database is up").await;
    log.wait_for("postroad is ready").await;
    child.kill().await.unwrap();
}

#[tokio::test]
async fn install_prints_what_it_would_do_and_does_it_twice() {
    let (code, script, _) = output(postroad(&["install", "--print"])).await;
    assert_eq!(code, 0);
    assert!(script.contains("create table") && script.contains("outbox"));

    let database = support::empty_database().await;
    for _ in 0..2 {
        let mut install = postroad(&["install"]);
        install.env("DATABASE_URL", &database.url);
        let (code, stdout, stderr) = output(install).await;
        assert_eq!(code, 0, "{stderr}");
        assert!(stdout.contains("the outbox is installed in"));
    }
    let mut connection = database.connect().await;
    sqlx::query("insert into postroad.outbox (topic, payload) values ('a', '1')")
        .execute(&mut connection)
        .await
        .unwrap();
}

#[tokio::test]
async fn the_configuration_is_printed_without_passwords() {
    let mut print = postroad(&["config", "print", "--log-level", "debug"]);
    print.env("DATABASE_URL", "postgres://user:hunter2@host/database");
    let (code, stdout, _) = output(print).await;
    assert_eq!(code, 0);
    assert!(
        stdout.contains("log_level = \"debug\"  # --log-level"),
        "{stdout}"
    );
    assert!(stdout.contains("# DATABASE_URL") && !stdout.contains("hunter2"));
}
