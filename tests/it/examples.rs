//! The programs in `examples/`, run as their readers would run them, against a broker. Those whose tools are not on the
//! machine are skipped, and say so.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use postroad::app::Broker;
use postroad::client::{Client, NewEvent, Queue};
use postroad::config::Config;
use serde_json::json;
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::support;

async fn broker(database: &support::TestDatabase) -> Broker {
    let mut config = Config::default();
    config.bind = ([127, 0, 0, 1], 0).into();
    config.database_url = Some(database.url.clone());
    // The tests' server flushes nothing.
    config.allow_unsafe_postgres = true;
    Box::pin(Broker::start(config)).await.unwrap()
}

fn example(program: &str, folder: &str) -> Command {
    let mut command = Command::new(program);
    command
        .current_dir(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("examples")
                .join(folder),
        )
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Whether a tool is there, by a command that ends well if it is.
pub async fn is_there(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await;
    let is_there = status.is_ok_and(|status| status.success());
    if !is_there {
        eprintln!(
            "SKIPPED: `{program} {}` does not work on this machine",
            arguments.join(" ")
        );
    }
    is_there
}

/// Runs to the end, a minute at most, and gives what was printed.
pub async fn run(mut command: Command) -> String {
    let ended = tokio::time::timeout(Duration::from_mins(1), command.output()).await;
    let Output {
        status,
        stdout,
        stderr,
    } = ended
        .unwrap_or_else(|_| panic!("{command:?} did not end within a minute"))
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&stdout).into_owned(),
        String::from_utf8_lossy(&stderr).into_owned(),
    );
    assert!(
        status.success(),
        "{command:?}: {status}\n{stdout}\n{stderr}"
    );
    stdout
}

#[tokio::test]
async fn the_tour_by_psql_and_curl_delivers_what_committed_and_nothing_else() {
    if !is_there("psql", &["--version"]).await || !is_there("curl", &["--version"]).await {
        return;
    }
    let database = support::database().await;
    let broker = broker(&database).await;
    let mut tour = example("bash", "shell");
    tour.arg("tour.sh")
        .env("DATABASE_URL", &database.url)
        .env("POSTROAD_URL", broker.url());
    let printed = run(tour).await;
    assert!(printed.contains(r#""order": 1"#), "{printed}");
    assert!(!printed.contains(r#""order": 2"#), "{printed}");
    assert!(printed.contains(r#""result":"acked""#), "{printed}");
    assert!(
        printed.contains(r#""deliveries":[],"reason":"#),
        "{printed}"
    );
    broker.stop().await.unwrap();
}

/// The consumer in TypeScript, compiled with its types checked, in a folder of its own: once a run. `None` without npm, or
/// without its registry.
async fn compiled() -> Option<&'static Path> {
    static FOLDER: OnceCell<Option<PathBuf>> = OnceCell::const_new();
    let folder = FOLDER.get_or_init(|| async {
        if !is_there("node", &["-e", "fetch"]).await || !is_there("npm", &["--version"]).await {
            return None;
        }
        let folder = tempfile::tempdir().unwrap().keep();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/consumer-typescript");
        for file in [
            "consumer.ts",
            "package.json",
            "package-lock.json",
            "tsconfig.json",
        ] {
            std::fs::copy(source.join(file), folder.join(file)).unwrap();
        }
        let mut install = Command::new("npm");
        install
            .args([
                "ci",
                "--ignore-scripts",
                "--prefer-offline",
                "--no-audit",
                "--no-fund",
            ])
            .current_dir(&folder);
        let installed = tokio::time::timeout(Duration::from_mins(2), install.output()).await;
        if !matches!(&installed, Ok(Ok(output)) if output.status.success()) {
            eprintln!("SKIPPED: `npm ci` does not work on this machine: {installed:?}");
            return None;
        }
        let mut build = Command::new("npm");
        build.args(["run", "build"]).current_dir(&folder);
        run(build).await;
        Some(folder)
    });
    folder.await.as_deref()
}

/// A consumer in another language, ready to run. What it keeps goes into the folder.
async fn consumer(language: &str, broker: &Broker, own: &tempfile::TempDir) -> Option<Command> {
    let mut command = match language {
        "python" => {
            let is_new = "import sys; sys.exit(sys.version_info < (3, 11))";
            if !is_there("python3", &["-c", is_new]).await {
                return None;
            }
            let mut command = example("python3", "consumer-python");
            command.arg("consumer.py");
            command
        }
        _ => {
            let mut command = Command::new("node");
            command
                .arg("build/consumer.js")
                .current_dir(compiled().await?);
            command
        }
    };
    command
        .env("POSTROAD_URL", broker.url())
        .env("DATABASE", own.path().join("mailer.db"))
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    Some(command)
}

fn mailer(broker: &Broker) -> Queue {
    Client::new(broker.url()).unwrap().queue("mailer").unwrap()
}

#[tokio::test]
async fn the_python_consumer_handles_all_once_retries_and_holds_what_is_slow() {
    handles_all_once("python").await;
}

#[tokio::test]
async fn the_typescript_consumer_handles_all_once_retries_and_holds_what_is_slow() {
    handles_all_once("typescript").await;
}

async fn handles_all_once(language: &str) {
    const HOLD_SECONDS: i64 = 3;
    let (database, own) = (support::database().await, tempfile::tempdir().unwrap());
    let broker = broker(&database).await;
    let Some(mut command) = consumer(language, &broker, &own).await else {
        return;
    };
    let mut orders: Vec<_> = (0..25)
        .map(|n| json!({"order": n, "product": "tea", "quantity": 1}))
        .collect();
    orders[3]["fails_once"] = json!(true);
    orders[7]["takes_seconds"] = json!(2 * HOLD_SECONDS);
    let events: Vec<NewEvent> = orders
        .iter()
        .map(|order| NewEvent::json(order).unwrap())
        .collect();
    let client = Client::new(broker.url()).unwrap();
    client.publish_all("orders.created", &events).await.unwrap();
    command
        .env("HOLD_SECONDS", HOLD_SECONDS.to_string())
        .env("MESSAGES", orders.len().to_string());
    let watch = async {
        let url = format!("{}/v1/queues/mailer/in-flight", broker.url());
        support::eventually("the slow one to be extended", || async {
            let page: serde_json::Value = reqwest::get(&url).await.ok()?.json().await.ok()?;
            let is_extended = |delivery: &serde_json::Value| {
                let [from, until] = ["delivered_at", "visible_until"]
                    .map(|name| support::consumer::time(&delivery[name]));
                (until - from).num_milliseconds() > 1_000 * HOLD_SECONDS + 500
            };
            page["deliveries"]
                .as_array()?
                .iter()
                .any(is_extended)
                .then_some(())
        })
        .await;
    };
    let (printed, ()) = tokio::join!(run(command), watch);
    for order in 0..orders.len() {
        let line = format!("mail about order {order}: 1 tea\n");
        assert_eq!(
            printed.matches(&line).count(),
            1,
            "order {order}: {printed}"
        );
    }
    let status = mailer(&broker)
        .describe()
        .await
        .unwrap()
        .unwrap()
        .status
        .unwrap();
    assert_eq!(
        (status.depth, status.in_flight, status.dead_letters),
        (0, 0, 0)
    );
    broker.stop().await.unwrap();
}

#[tokio::test]
async fn the_python_consumer_stops_in_order_while_it_waits() {
    stops_in_order("python").await;
}

#[tokio::test]
async fn the_typescript_consumer_stops_in_order_while_it_waits() {
    stops_in_order("typescript").await;
}

async fn stops_in_order(language: &str) {
    let (database, own) = (support::database().await, tempfile::tempdir().unwrap());
    let broker = broker(&database).await;
    let Some(mut command) = consumer(language, &broker, &own).await else {
        return;
    };
    let child = command.spawn().unwrap();
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    let queue = mailer(&broker);
    support::eventually("the consumer waits in a long poll", || async {
        let status = queue.describe().await.unwrap()?.status?;
        (status.waiters == 1).then_some(())
    })
    .await;
    support::send_signal(pid, rustix::process::Signal::TERM);
    let ended = tokio::time::timeout(Duration::from_secs(15), child.wait_with_output()).await;
    let output = ended.expect("it does not wait for its long poll").unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("stopped after 0"));
    broker.stop().await.unwrap();
}

#[tokio::test]
async fn what_the_python_producer_commits_reaches_the_consumer() {
    // A Python that has psycopg, if the one on PATH has not.
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    if !is_there(&python, &["-c", "import psycopg"]).await {
        return;
    }
    let (database, own) = (support::database().await, tempfile::tempdir().unwrap());
    let broker = broker(&database).await;
    let Some(mut command) = consumer("python", &broker, &own).await else {
        return;
    };
    let mut producer = example(&python, "producer-python");
    producer
        .arg("producer.py")
        .env("DATABASE_URL", &database.url)
        .env("ORDERS", "30")
        .env("ORDERS_PER_SECOND", "1000");
    let produced = run(producer).await;
    let placed: Vec<&str> = produced
        .lines()
        .filter_map(|line| line.strip_prefix("placed order "))
        .filter_map(|line| line.split(':').next())
        .collect();
    assert!(!placed.is_empty(), "{produced}");
    command.env("MESSAGES", placed.len().to_string());
    let consumed = run(command).await;
    for order in &placed {
        assert!(consumed.contains(order), "{order} is missing in {consumed}");
    }
    assert_eq!(
        consumed.matches("mail about order").count(),
        placed.len(),
        "{consumed}"
    );
    broker.stop().await.unwrap();
}
