//! The end of the program: it says that it is not ready and serves on, then finishes what it has and goes; a second signal, or the
//! deadline, ends it hard.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::consumer::{publish_ids, stream_ids};
use crate::support::{self, Consumer, Http, Program};

const LAME_DUCK: Duration = Duration::from_secs(2);

/// Publishes as long as it is answered, and gives what was.
fn publish(http: Http) -> JoinHandle<Vec<String>> {
    tokio::spawn(async move {
        let mut answered = Vec::new();
        for number in 0.. {
            let id = format!("p{number}");
            let event = json!({"specversion": "1.0", "id": id, "source": "/test", "type": "t"});
            let body = json!({"messages": [{"topic": "orders.created", "event": event}]});
            match http
                .call(reqwest::Method::POST, "/v1/messages", Some(&body))
                .await
            {
                Ok((status, _)) if status.is_success() => answered.push(id),
                Ok((status, answer)) => {
                    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
                }
                Err(_) => break,
            }
        }
        answered
    })
}

/// Follows the stream to its end, and gives what came.
fn follow(http: &Http) -> JoinHandle<Result<String, reqwest::Error>> {
    let path = format!("{}/v1/streams/main/messages", http.base);
    let request = http.client.get(path).header("accept", "text/event-stream");
    tokio::spawn(async move { request.send().await?.text().await })
}

/// Sends the signal and waits for the end, at most so long.
async fn end(program: &mut Program, most: Duration) -> ExitStatus {
    let ended = tokio::time::timeout(most, program.stop()).await;
    ended.expect("the program ends in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_program_says_so_serves_on_and_finishes_what_it_has() {
    let database = support::database().await;
    // Only behind a balancer is there a lame duck's time: not at a loopback address.
    let variables = [
        ("POSTROAD_BIND", "0.0.0.0:0"),
        ("POSTROAD_LAME_DUCK_SECONDS", "2"),
    ];
    let mut program = support::program(&database.url, &variables).await;
    let http = Http::new(&program.http.base.replace("0.0.0.0", "127.0.0.1"));
    let consumer = Consumer::declare(&http, "idle", &json!({"topics": ["nothing.*"]})).await;
    let other = Consumer::declare(&http, "busy", &json!({"topics": ["orders.*"]})).await;
    publish_ids(&http, "orders.created", &["first".to_owned()]).await;
    let taken = other.take(1, 3_600).await;
    let poll = {
        let poller = consumer.clone();
        tokio::spawn(async move {
            let body = json!({"wait_seconds": 50, "receive_id": "r"});
            let path = "/v1/queues/idle/receive";
            poller.http.post(path, &body).await
        })
    };
    let (publisher, follower) = (publish(http.clone()), follow(&http));
    support::eventually("the poll to wait", || async {
        (consumer.status().await["waiters"] == 1).then_some(())
    })
    .await;
    assert_eq!(http.get("/readyz").await.0, StatusCode::OK);
    program.signal(Signal::TERM);
    let began = Instant::now();
    let told = support::eventually("it to be not ready", || async {
        let (status, answer) = http.get("/readyz").await;
        (status == StatusCode::SERVICE_UNAVAILABLE).then_some(answer)
    })
    .await;
    assert!(began.elapsed() < LAME_DUCK, "{told}");
    // It serves on, also on new connections.
    let fresh = Http::new(&http.base);
    let placed = publish_ids(&fresh, "orders.created", &["late".to_owned()]).await;
    assert_eq!(placed[0]["duplicate"], false);
    let acks = support::consumer::items(&taken, &json!({}));
    let acked = Consumer {
        http: fresh,
        ..other.clone()
    };
    acked.settle_all("ack", &acks, "acked").await;
    assert!(began.elapsed() < LAME_DUCK, "within the time");
    let (status, answer): (StatusCode, Value) = poll.await.unwrap();
    assert_eq!(
        (status, &answer["deliveries"]),
        (StatusCode::OK, &json!([]))
    );
    assert!(began.elapsed() >= LAME_DUCK, "long polls wait through it");
    let followed = follower.await.unwrap().unwrap();
    let answered = publisher.await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), program.ended()).await;
    let status = ended.expect("the program ends in time");
    assert!(status.success(), "{status:?}");
    // What was answered is there, and what was there came to the follower, to the last whole event.
    program.start().await;
    let ids = stream_ids(&http, "main").await;
    for id in answered.iter().map(String::as_str).chain(["first", "late"]) {
        assert!(ids.iter().any(|(_, there)| there == id), "{id}");
    }
    let last = followed.lines().rfind(|line| line.starts_with("id:"));
    assert!(last.is_some(), "{followed}");
    let left = other.status().await;
    assert_eq!(left["in_flight"], 0, "{left}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once_and_the_deadline_ends_it_too() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let url = proxy.url(&database.url);
    let mut program = support::program(&url, &[("POSTROAD_SHUTDOWN_SECONDS", "600")]).await;
    publish_ids(&program.http, "orders.created", &["one".to_owned()]).await;
    // The database answers nothing any more, so that nothing can be finished.
    proxy.hold();
    program.signal(Signal::TERM);
    support::eventually("it to be stopping", || async {
        let answer = program
            .http
            .call(reqwest::Method::GET, "/readyz", None)
            .await;
        let says_so = |(_, answer): (StatusCode, Value)| answer.to_string().contains("leaving");
        answer.map_or(true, says_so).then_some(())
    })
    .await;
    let status = end(&mut program, Duration::from_secs(10)).await;
    assert_eq!(status.code(), Some(1));
    proxy.open();

    let mut program = support::program(&url, &[("POSTROAD_SHUTDOWN_SECONDS", "3")]).await;
    proxy.hold();
    let began = Instant::now();
    let status = end(&mut program, Duration::from_secs(30)).await;
    assert_eq!(status.code(), Some(1));
    assert!(began.elapsed() >= Duration::from_secs(2));
    proxy.open();
    // Killed in the middle of its end, it has lost nothing.
    program.start().await;
    let ids = stream_ids(&program.http, "main").await;
    assert_eq!(ids, [(1, "one".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_that_closes_stops_it_in_order_unless_it_is_to_live_on() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    program.signal(Signal::HUP);
    let ended = tokio::time::timeout(Duration::from_secs(20), program.ended()).await;
    assert!(ended.expect("it ends in time").success());
    // As `nohup` does it: the signal is ignored from the start.
    let mut command = tokio::process::Command::new("sh");
    command
        .args([
            "-c",
            "trap '' HUP; exec \"$0\" serve",
            env!("CARGO_BIN_EXE_postroad"),
        ])
        .envs(support::broker::variables(&database.url))
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    let mut log = support::broker::Log::of(&mut child);
    let entry = log.wait_for("postroad is ready").await;
    let http = Http::new(entry["fields"]["url"].as_str().unwrap());
    log.read_on(None);
    support::send_signal(pid, Signal::HUP);
    // The signal is handled by the time that the next ones are.
    publish_ids(&http, "orders.created", &["one".to_owned()]).await;
    assert!(child.try_wait().unwrap().is_none());
    support::send_signal(pid, Signal::TERM);
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_and_a_bench_live_on_as_well_when_they_are_to() {
    let database = support::database().await;
    for command in ["demo", "bench publish"] {
        let mut child = tokio::process::Command::new("sh");
        child
            .args([
                "-c",
                "trap '' HUP; exec \"$0\" $1",
                env!("CARGO_BIN_EXE_postroad"),
                command,
            ])
            .envs(support::broker::variables(&database.url))
            .env_remove("DATABASE_URL")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true);
        let mut child = child.spawn().unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let caught = |status: &str, signal: Signal| {
            let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
            let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
            mask >> (signal.as_raw() - 1) & 1 == 1
        };
        // It listens to SIGTERM last of all.
        let status = support::eventually("its signals", || async {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            caught(&status, Signal::TERM).then_some(status)
        })
        .await;
        assert!(!caught(&status, Signal::HUP), "{command}: {status}");
        support::send_signal(pid, Signal::TERM);
        let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await;
        ended.expect("it ends in time").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_in_time_even_when_no_thread_of_the_runtime_is_free() {
    let database = support::database().await;
    // One thread, which the first answer keeps for good.
    let variables = [
        ("TOKIO_WORKER_THREADS", "1"),
        ("POSTROAD_FAILPOINTS", "http.answer_decided=hang@1"),
        ("POSTROAD_SHUTDOWN_SECONDS", "1"),
    ];
    let mut program = support::program(&database.url, &variables).await;
    let http = program.http.clone();
    let asked = tokio::spawn(async move {
        let call = http.call(reqwest::Method::GET, "/healthz", None);
        tokio::time::timeout(Duration::from_secs(2), call).await
    });
    assert!(
        asked.await.unwrap().is_err(),
        "nothing is answered any more"
    );
    let began = Instant::now();
    let status = end(&mut program, Duration::from_secs(30)).await;
    assert_eq!(status.code(), Some(1));
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    // A second signal is not waited for either.
    let mut program = support::program(&database.url, &variables[..2]).await;
    let http = program.http.clone();
    let asked = tokio::spawn(async move {
        let call = http.call(reqwest::Method::GET, "/healthz", None);
        tokio::time::timeout(Duration::from_secs(2), call).await
    });
    assert!(asked.await.unwrap().is_err());
    program.signal(Signal::INT);
    let status = end(&mut program, Duration::from_secs(10)).await;
    assert_eq!(status.code(), Some(1));
}
