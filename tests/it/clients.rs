//! Programs that others wrote, or would copy, against a broker: the official CloudEvents SDKs in `tests/clients`, the producers'
//! helpers in `examples/outbox`. Those whose tools are not on the machine are skipped, and say so; `scripts/check-clients.sh`
//! fetches the tools.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokio::process::Command;

use crate::examples::{is_there, run};
use crate::support;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A Python that has what is needed, if the one on PATH has not.
fn python() -> String {
    std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// A copy of a program where Node finds the packages: beside its `node_modules`. `None` where there are none.
async fn in_node_folder(path: &str, package: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("POSTROAD_TEST_NODE").map(PathBuf::from) else {
        eprintln!("SKIPPED: POSTROAD_TEST_NODE names no folder with {package} in its node_modules");
        return None;
    };
    if !folder.join("node_modules").join(package).is_dir()
        || !is_there("node", &["--version"]).await
    {
        eprintln!("SKIPPED: {package} is not in {}", folder.display());
        return None;
    }
    let source = root(path);
    let copy = folder.join(source.file_name().unwrap());
    std::fs::copy(source, &copy).unwrap();
    Some(copy)
}

#[tokio::test]
async fn the_python_sdk_of_cloudevents_publishes_and_reads() {
    let python = python();
    if !is_there(&python, &["-c", "import cloudevents.core.v1.event"]).await {
        return;
    }
    let broker = support::broker().await;
    let mut command = Command::new(&python);
    command
        .arg(root("tests/clients/cloudevents_sdk.py"))
        .arg(&broker.http.base);
    let printed = run(command).await;
    assert!(printed.contains("9 events"), "{printed}");
}

#[tokio::test]
async fn the_javascript_sdk_of_cloudevents_publishes_and_reads() {
    let Some(program) = in_node_folder("tests/clients/cloudevents_sdk.mjs", "cloudevents").await
    else {
        return;
    };
    let broker = support::broker().await;
    let mut command = Command::new("node");
    command.arg(program).arg(&broker.http.base);
    let printed = run(command).await;
    assert!(printed.contains("9 events"), "{printed}");
}

/// Runs a helper's program as a user who is a producer and nothing else. One message of its two must arrive, as it says.
async fn check_helper(command: impl AsyncFnOnce(&str, &str) -> Command, from: &str) {
    let broker = support::broker().await;
    // By way of a proxy: not every driver speaks over a socket in the file system.
    let proxy = support::proxy(&broker.database.url).await;
    let user = format!("producer_{}", broker.database.name);
    let mut owner = broker.database.connect().await;
    let statement = format!(
        "create role {user} login in role {}",
        broker.database.role("producer")
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
        .execute(&mut owner)
        .await
        .unwrap();
    let address = proxy.address();
    let url = format!("postgres://{user}@{address}/{}", broker.database.name);
    let jdbc = format!(
        "jdbc:postgresql://{address}/{}?user={user}",
        broker.database.name
    );
    let printed = run(command(&url, &jdbc).await).await;
    let messages = support::eventually("the message arrives", || async {
        let (_, page) = broker.http.get("/v1/streams/main/messages").await;
        let messages = page["messages"].as_array().unwrap().clone();
        (!messages.is_empty()).then_some(messages)
    })
    .await;
    assert_eq!(messages.len(), 1, "{messages:?}");
    let event: &Value = &messages[0]["event"];
    assert_eq!(event["id"], printed.trim());
    assert_eq!(event["data"], json!({"from": from}));
    assert_eq!(event["partitionkey"], "tea");
    assert_eq!(event["traceparent"], "00-1");
    let statement = format!("drop role {user}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
        .execute(&mut owner)
        .await
        .unwrap();
}

#[tokio::test]
async fn the_helper_for_sqlalchemy_publishes() {
    let python = python();
    if !is_there(&python, &["-c", "import sqlalchemy, psycopg"]).await {
        return;
    }
    let helper = async |url: &str, _: &str| {
        let mut command = Command::new(&python);
        command
            .arg(root("examples/outbox/sqlalchemy_outbox.py"))
            .env("DATABASE_URL", url);
        command
    };
    check_helper(helper, "sqlalchemy").await;
}

#[tokio::test]
async fn the_helper_for_node_postgres_publishes() {
    let Some(program) = in_node_folder("examples/outbox/node_postgres_outbox.ts", "pg").await
    else {
        return;
    };
    let module = program.with_extension("mts");
    std::fs::rename(&program, &module).unwrap();
    let helper = async |url: &str, _: &str| {
        let mut command = Command::new("node");
        command
            .current_dir(module.parent().unwrap())
            .args(["--import", "tsx"])
            .arg(&module)
            .env("DATABASE_URL", url);
        command
    };
    check_helper(helper, "node-postgres").await;
}

#[tokio::test]
async fn the_helper_for_jdbc_publishes() {
    let jar =
        std::env::var("JDBC_JAR").unwrap_or_else(|_| "/usr/share/java/postgresql.jar".to_owned());
    if !Path::new(&jar).exists() {
        eprintln!("SKIPPED: there is no {jar}");
        return;
    }
    if !is_there("javac", &["-version"]).await {
        return;
    }
    let helper = async |_: &str, jdbc: &str| {
        let mut command = Command::new("java");
        command
            .args(["-cp", &jar])
            .arg(root("examples/outbox/Outbox.java"))
            .env("JDBC_URL", jdbc);
        command
    };
    check_helper(helper, "jdbc").await;
}
