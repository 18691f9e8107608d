//! The programs in `examples/`, run as their readers would run them, against a broker. Those whose tools are not on the
//! machine are skipped, and say so.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use postroad::app::Broker;
use postroad::config::Config;
use tokio::process::Command;

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

#[tokio::test]
async fn what_the_python_producer_commits_reaches_the_node_consumer() {
    // A Python that has psycopg, if the one on PATH has not.
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    if !is_there(&python, &["-c", "import psycopg"]).await
        || !is_there("node", &["-e", "fetch"]).await
    {
        return;
    }
    let database = support::database().await;
    let broker = broker(&database).await;
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

    let mut consumer = example("node", "consumer-node");
    consumer
        .arg("consumer.mjs")
        .env("POSTROAD_URL", broker.url())
        .env("MESSAGES", placed.len().to_string());
    let consumed = run(consumer).await;
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

#[tokio::test]
async fn the_node_consumer_stops_in_order_while_it_waits() {
    if !is_there("node", &["-e", "fetch"]).await {
        return;
    }
    let database = support::database().await;
    let broker = broker(&database).await;
    let mut command = example("node", "consumer-node");
    command
        .arg("consumer.mjs")
        .env("POSTROAD_URL", broker.url())
        .stdout(Stdio::piped());
    let child = command.spawn().unwrap();
    let pid = rustix::process::Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
    let queue = format!("{}/v1/queues/mailer", broker.url());
    support::eventually("the consumer waits in a long poll", || {
        let queue = queue.clone();
        async move {
            let body = reqwest::get(queue).await.ok()?.text().await.ok()?;
            body.contains(r#""waiters":1"#).then_some(())
        }
    })
    .await;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), child.wait_with_output()).await;
    let output = ended.expect("it stops at once").unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("stopped"));
    broker.stop().await.unwrap();
}

#[tokio::test]
async fn the_python_consumer_with_an_inbox_books_each_order_once_wherever_it_dies() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    if !is_there(&python, &["-c", "import psycopg"]).await {
        return;
    }
    let database = support::database().await;
    let own = support::empty_database().await;
    postroad::store::migrate::inbox(&own.database)
        .await
        .unwrap();
    let broker = broker(&database).await;
    let mut producer = database.connect().await;
    for order in 1..=3 {
        sqlx::query("insert into postroad.outbox (topic, id) values ('orders.created', $1)")
            .bind(format!("order-{order}"))
            .execute(&mut producer)
            .await
            .unwrap();
    }
    let consumer = |dies_at: &str, messages: &str| {
        let mut command = example(&python, "consumer-inbox-python");
        command
            .arg("consumer.py")
            .env("DATABASE_URL", &own.url)
            .env("POSTROAD_URL", broker.url())
            .env("DIE_AT", dies_at)
            .env("MESSAGES", messages);
        command
    };
    for dies_at in ["before-commit", "before-ack", "before-ack"] {
        let status = consumer(dies_at, "0").status().await.unwrap();
        assert!(!status.success(), "it was killed: {status}");
    }
    let printed = run(consumer("", "3")).await;
    assert!(printed.contains("known "), "{printed}");
    let booked: Vec<String> =
        sqlx::query_scalar("select message from example_booking order by message")
            .fetch_all(&mut own.connect().await)
            .await
            .unwrap();
    assert_eq!(booked, ["order-1", "order-2", "order-3"]);
    broker.stop().await.unwrap();
}
