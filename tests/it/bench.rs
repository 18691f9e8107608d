//! Every scenario of `postroad bench` at a tiny size, with the real program; and its check must find what is planted.

use std::path::Path;
use std::process::Output;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{self, Http};

/// Runs `postroad bench` and gives what it printed.
async fn bench(arguments: &[&str]) -> Output {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_postroad"))
        .arg("bench")
        .args(["--seconds", "1", "--warmup-seconds", "0"])
        .args(arguments)
        // The tests' server flushes nothing.
        .env("POSTROAD_ALLOW_UNSAFE_POSTGRES", "true")
        .env_remove("DATABASE_URL")
        .kill_on_drop(true)
        .output()
        .await
        .unwrap()
}

fn printed(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Runs scenarios against one broker, each of which must end well, and gives what each wrote as JSON.
async fn run_all(runs: &[&[&str]]) -> Vec<Value> {
    let broker = support::broker().await;
    let folder = tempfile::tempdir().unwrap();
    let mut results = Vec::new();
    for (number, arguments) in runs.iter().enumerate() {
        let path = folder.path().join(number.to_string());
        let mut all = arguments.to_vec();
        all.extend([
            "--url",
            &broker.http.base,
            "--database-url",
            &broker.database.url,
        ]);
        all.extend(["--json", path.to_str().unwrap()]);
        let output = bench(&all).await;
        assert!(
            output.status.success(),
            "{arguments:?} {}",
            printed(&output)
        );
        let result = read_json(&path);
        assert_eq!(result["is_clean"], true, "{result:#}");
        assert_eq!(result["scenario"], arguments[0]);
        results.push(result);
    }
    // Nothing is left behind.
    let (_, queues) = broker.http.get("/v1/queues").await;
    assert_eq!(queues["queues"], json!([]), "{queues}");
    let mut connection = broker.database.connect().await;
    let left: Option<String> = sqlx::query_scalar("select to_regnamespace('postroad_bench')::text")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(left, None);
    results
}

fn median(result: &Value, variant: usize, figure: &str) -> f64 {
    let value = &result["variants"][variant]["medians"][figure];
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{figure}: {result:#}"))
}

fn checked(result: &Value, variant: usize) -> &Value {
    &result["variants"][variant]["rounds"][0]["checked"]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bench_starts_a_broker_of_its_own_and_compares_it_with_baselines() {
    let database = support::database().await;
    let folder = tempfile::tempdir().unwrap();
    let (json, html) = (folder.path().join("json"), folder.path().join("html"));
    let payloads = folder.path().join("payloads");
    std::fs::write(&payloads, "{\"a\": 1}\n[\"<b>\"]\n").unwrap();
    let output = bench(&[
        "outbox",
        "--baseline",
        "--rounds",
        "1",
        "--batch",
        "5",
        "--payload-file",
        payloads.to_str().unwrap(),
        "--database-url",
        &database.url,
        "--json",
        json.to_str().unwrap(),
        "--html",
        html.to_str().unwrap(),
    ])
    .await;
    let printed = printed(&output);
    assert!(output.status.success(), "{printed}");
    assert!(printed.contains("nothing lost, nothing twice"), "{printed}");
    assert!(printed.contains("table queue"), "{printed}");
    let result = read_json(&json);
    for variant in 0..3 {
        assert!(median(&result, variant, "messages_per_second") > 0.0);
        assert!(median(&result, variant, "wal_bytes") > 0.0);
    }
    for figure in ["latency_p50_ms", "journal_wait_mean_ms", "broker_cpu_us"] {
        assert!(median(&result, 0, figure) > 0.0);
    }
    let ratio = &result["variants"][1]["ratios"]["messages_per_second"];
    assert!(ratio.as_f64().unwrap() > 0.0, "{ratio}");
    if cfg!(target_os = "linux") {
        assert!(median(&result, 0, "broker_memory_mib") > 1.0);
    }
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("<svg") && page.contains("nothing lost"));
    // Nothing from outside: neither script nor address.
    assert!(
        !page.contains("<script") && !page.contains("http"),
        "{page}"
    );

    // Its database is dropped again.
    let mut connection = database.connect().await;
    let left: i64 = sqlx::query_scalar(
        "select count(*) from pg_database where datname = 'postroad_bench_' || $1",
    )
    .bind(
        result["broker"]
            .as_str()
            .unwrap()
            .rsplit('_')
            .next()
            .unwrap(),
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenarios_with_one_queue_deliver_all_once_and_in_order() {
    let results = run_all(&[
        &["publish", "--producers", "3", "--consumers", "2"],
        &["latency", "--rate", "50"],
        &["held", "--rate", "100"],
        &["backlog", "--messages", "2500"],
    ])
    .await;
    assert!(median(&results[1], 0, "first_p50_ms") > 0.0);
    let names: Vec<_> = (0..2)
        .map(|variant| &results[2]["variants"][variant]["name"])
        .collect();
    assert_eq!(names, ["reader held", "writer held"]);
    assert_eq!(checked(&results[3], 0)["expected"], 2_500);
    assert!(median(&results[3], 0, "fill_per_second") > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenarios_with_several_queues_deliver_all_once_and_in_order() {
    let results = run_all(&[
        &["fanout", "--queues", "3", "--keys", "5", "--skew", "zipf"],
        &["queues", "--queues", "7", "--producers", "2"],
        &["idle", "--queues", "5"],
    ])
    .await;
    let fanout = checked(&results[0], 0);
    let sent = fanout["sent"].as_u64().unwrap();
    assert!(sent > 0);
    assert_eq!(fanout["expected"], sent * 3);
    let queues = checked(&results[1], 0);
    assert_eq!(queues["expected"], queues["sent"]);
    assert_eq!(checked(&results[2], 0)["sent"], 0);
    if cfg!(target_os = "linux") {
        assert!(median(&results[2], 0, "postgres_cpu_percent") >= 0.0);
    }
}

/// A broker without ordering by key says so, and the bench passes it on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scenario_of_keys_needs_a_broker_that_orders_by_key() {
    let broker = support::broker().await;
    let wanted = json!({"topics": ["probe.>"], "ordering": "key"});
    let (status, _) = broker.http.put("/v1/queues/probe", &wanted).await;
    let output = bench(&[
        "keys",
        "--keys",
        "20",
        "--url",
        &broker.http.base,
        "--database-url",
        &broker.database.url,
    ])
    .await;
    assert_eq!(
        output.status.success(),
        status.is_success(),
        "{}",
        printed(&output)
    );
    if !status.is_success() {
        assert!(
            printed(&output).contains("ordering"),
            "{}",
            printed(&output)
        );
    }
}

/// The name of the queue of a bench, once there is one.
async fn queue_of_bench(http: &Http) -> String {
    support::eventually("the bench's queue", async || {
        let (_, answer) = http.get("/v1/queues").await;
        let name = answer["queues"].as_array()?.first()?["name"].as_str()?;
        Some(name.to_owned())
    })
    .await
}

/// Runs a bench beside somebody who disturbs it: the exit status must tell. Gives the first round's check.
async fn disturbed(disturb: impl AsyncFnOnce(&Http, &support::TestDatabase, &str)) -> Value {
    let broker = Box::pin(support::broker()).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("json");
    let arguments = [
        "outbox",
        "--rate",
        "200",
        "--batch",
        "1",
        "--producers",
        "2",
        "--consumers",
        "1",
        "--patience-seconds",
        "1",
        "--url",
        &broker.http.base,
        "--database-url",
        &broker.database.url,
        "--json",
        path.to_str().unwrap(),
    ];
    let disturbing = async {
        let queue = queue_of_bench(&broker.http).await;
        disturb(&broker.http, &broker.database, &queue).await;
    };
    let (output, ()) = tokio::join!(bench(&arguments), disturbing);
    assert_eq!(output.status.code(), Some(1), "{}", printed(&output));
    assert!(printed(&output).contains("FAILED"), "{}", printed(&output));
    let result = read_json(&path);
    assert_eq!(result["is_clean"], false);
    checked(&result, 0).clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_somebody_else_takes_is_found_to_be_lost() {
    let mut taken = 0;
    let checked = disturbed(async |http, _, queue| {
        while taken < 3 {
            let path = format!("/v1/queues/{queue}/receive");
            let wanted = json!({"max_messages": 1, "wait_seconds": 5});
            let (status, answer) = http.post(&path, &wanted).await;
            assert!(status.is_success(), "{answer}");
            for delivery in answer["deliveries"].as_array().unwrap() {
                let receipts = json!({"deliveries": [{"receipt": delivery["receipt"]}]});
                http.ok(&format!("/v1/queues/{queue}/ack"), &receipts).await;
                taken += 1;
            }
        }
    })
    .await;
    assert_eq!(checked["lost"], 3, "{checked}");
    assert_eq!(checked["duplicated"], 0, "{checked}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_comes_again_is_found() {
    let checked = disturbed(async |_, database, _| {
        support::eventually("a row to copy", async || {
            let copied = sqlx::query(
                "insert into postroad.outbox (topic, id, payload)
                 select topic, id, payload from postroad.outbox where topic like 'bench-%'
                     and (select count(*) from postroad.outbox where topic like 'bench-%') >= 2
                 limit 2",
            )
            .execute(&mut database.connect().await)
            .await
            .unwrap();
            (copied.rows_affected() == 2).then_some(())
        })
        .await;
    })
    .await;
    assert_eq!(checked["duplicated"], 2, "{checked}");
    assert_eq!(checked["lost"], 0, "{checked}");
}

#[tokio::test]
async fn what_cannot_be_measured_is_refused_in_words() {
    let database = support::database().await;
    for (arguments, word) in [
        (
            &["outbox", "--url", "http://127.0.0.1:1"][..],
            "--database-url",
        ),
        (
            &[
                "outbox",
                "--url",
                "https://x",
                "--database-url",
                &database.url,
            ],
            "without TLS",
        ),
        (
            &[
                "outbox",
                "--url",
                "http://127.0.0.1:1",
                "--database-url",
                &database.url,
            ],
            "no broker is ready",
        ),
        (&["outbox", "--payload-file", "/nowhere"], "/nowhere"),
    ] {
        let output = bench(arguments).await;
        assert_eq!(output.status.code(), Some(1), "{}", printed(&output));
        assert!(printed(&output).contains(word), "{}", printed(&output));
    }
    let output = bench(&["elsewhere"]).await;
    assert_eq!(output.status.code(), Some(2));

    // Somebody else's schema of that name is left alone.
    let broker = support::broker().await;
    let mut connection = broker.database.connect().await;
    sqlx::raw_sql("create schema postroad_bench; create table postroad_bench.mine (id int)")
        .execute(&mut connection)
        .await
        .unwrap();
    let url = &broker.database.url;
    let output = bench(&["outbox", "--url", &broker.http.base, "--database-url", url]).await;
    assert!(
        printed(&output).contains("was not made by a bench"),
        "{}",
        printed(&output)
    );
    let (status, _) = broker
        .http
        .call(Method::GET, "/readyz", None)
        .await
        .unwrap();
    assert!(status.is_success());
}
