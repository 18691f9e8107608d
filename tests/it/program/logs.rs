//! A log that cannot be written, and output that nobody reads, end nothing.

use std::process::Stdio;
use std::time::Duration;

use reqwest::StatusCode;
use rustix::process::Signal;
use serde_json::json;
use tokio::process::Child;

use super::postroad;
use crate::support::broker::{Log, launch, variables};
use crate::support::{self, Http};

/// A program on a fresh database that logs much, once it is ready.
async fn talkative(level: &str, url: &str) -> (Child, Log, Http) {
    let mut variables = variables(url);
    variables.push(("POSTROAD_LOG_LEVEL".to_owned(), level.to_owned()));
    let (child, mut log) = launch(&variables);
    let entry = log.wait_for("postroad is ready").await;
    let http = Http::new(entry["fields"]["url"].as_str().unwrap());
    (child, log, http)
}

async fn dropped_lines(http: &Http) -> u64 {
    let (_, metrics) = http.get("/metrics").await;
    let metrics = metrics.as_str().unwrap().to_owned();
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix("postroad_log_lines_dropped_total "));
    line.unwrap().parse().unwrap()
}

/// It serves, counts what its log lacks, and stops in order.
async fn goes_on(mut child: Child, http: &Http) {
    support::eventually("lines to be dropped", || async {
        for _ in 0..50 {
            let (status, _) = http.get("/healthz").await;
            assert_eq!(status, StatusCode::OK);
        }
        (dropped_lines(http).await > 0).then_some(())
    })
    .await;
    http.ok("/v1/topics/orders.created/messages", &json!({"n": 1}))
        .await;
    support::send_signal(i32::try_from(child.id().unwrap()).unwrap(), Signal::TERM);
    let ended = tokio::time::timeout(Duration::from_secs(30), child.wait()).await;
    let status = ended.expect("it ends in time").unwrap();
    assert!(status.success(), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_whose_reader_has_gone_ends_nothing() {
    let database = support::database().await;
    let (child, log, http) = talkative("debug", &database.url).await;
    drop(log);
    goes_on(child, &http).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_not_read_holds_up_nothing() {
    let database = support::database().await;
    let (child, log, http) = talkative("trace", &database.url).await;
    goes_on(child, &http).await;
    drop(log);
}

#[tokio::test]
async fn output_that_nobody_reads_is_no_error_and_a_full_disk_is() {
    for arguments in [
        &["config", "print"][..],
        &["config", "check"],
        &["openapi"],
        &["version"],
        &["install", "--print"],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = postroad(arguments);
        let child = command.stdout(writer).stderr(Stdio::piped()).spawn();
        let output = child.unwrap().wait_with_output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        assert_eq!(said, "", "{arguments:?}");
    }
    if std::path::Path::new("/dev/full").exists() {
        let full = std::fs::File::options().write(true).open("/dev/full");
        let mut command = postroad(&["openapi"]);
        let child = command.stdout(full.unwrap()).stderr(Stdio::piped()).spawn();
        let output = child.unwrap().wait_with_output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("writing to standard output failed"), "{said}");
    }
}

#[tokio::test]
async fn an_error_that_nobody_reads_keeps_its_status() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = postroad(&["serve", "--bind", "nowhere"]);
    let status = command.stderr(writer).status().await.unwrap();
    assert_eq!(status.code(), Some(2));
}
