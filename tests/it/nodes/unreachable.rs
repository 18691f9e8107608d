//! A node that swallows what other nodes send it, and still renews its row: it looks alive, and answers nothing.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{TTL, node, settled};
use crate::support::{self, Http, Program, Proxy};

/// How much longer than it must a busy machine may take.
const SLACK: Duration = Duration::from_secs(5);

/// A node that others reach by way of a proxy.
async fn behind_proxy(url: &str) -> (Program, Proxy) {
    // The proxy has to be known before the node's port is.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bind: SocketAddr = listener.local_addr().unwrap();
    drop(listener);
    let proxy = support::proxy(&format!("postgres://x@{bind}/x")).await;
    let (bind, advertised) = (bind.to_string(), format!("http://{}", proxy.address()));
    let variables = [
        ("POSTROAD_NODE_TTL_SECONDS", "2"),
        ("POSTROAD_NODE_HEARTBEAT_SECONDS", "0.2"),
        ("POSTROAD_BIND", bind.as_str()),
        ("POSTROAD_ADVERTISE_URL", advertised.as_str()),
    ];
    (support::program(url, &variables).await, proxy)
}

async fn timed(
    http: &Http,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> (u16, Value, Duration) {
    let began = Instant::now();
    let answer = http.call(method, path, body.as_ref()).await.unwrap();
    (answer.0.as_u16(), answer.1, began.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_swallows_packets_holds_nobody_up_for_long() {
    let db = support::database().await;
    let one = node(&db.url).await;
    let (two, proxy) = behind_proxy(&db.url).await;
    settled(&one.http, 2).await;
    let queue = super::owned_by(&db.url, &one, &two).await;
    let path = format!("/v1/queues/{queue}");
    let receive = format!("{path}/receive");
    // A path of steps is not another route's at the owner, while that can be reached.
    let address = one.http.base.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "GET {path}/redrives/%2e%2e HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut found = String::new();
    stream.read_to_string(&mut found).await.unwrap();
    assert!(found.starts_with("HTTP/1.1 404 "), "{found}");
    proxy.hold();
    let ask = async |method: Method, path: String, body: Option<Value>, wait: u64, known: bool| {
        let (status, answer, took) = timed(&one.http, method.clone(), &path, body).await;
        let most = Duration::from_secs(wait) + TTL * 2 + SLACK;
        assert!(took < most, "{method} {path}: after {took:?}");
        let kind = if known {
            "/problems/no-owner"
        } else {
            "/problems/outcome-unknown"
        };
        assert_eq!(
            (status, answer["type"].as_str().unwrap()),
            (503, kind),
            "{method} {path}"
        );
    };
    let ack = json!({"deliveries": [{"receipt": "x"}]});
    tokio::join!(
        ask(
            Method::POST,
            receive.clone(),
            Some(json!({"wait_seconds": 0})),
            0,
            true
        ),
        ask(
            Method::POST,
            receive.clone(),
            Some(json!({"wait_seconds": 3})),
            3,
            true
        ),
        ask(
            Method::POST,
            receive.clone(),
            Some(json!({"wait_seconds": 3, "batch_wait_seconds": 1})),
            3,
            true
        ),
        ask(Method::POST, format!("{path}/ack"), Some(ack), 0, true),
        ask(Method::GET, path.clone(), None, 0, true),
        ask(Method::GET, format!("{path}/in-flight"), None, 0, true),
        ask(
            Method::POST,
            format!("{path}/purge"),
            Some(json!({})),
            0,
            false
        ),
    );
    proxy.open();
    // And goes on as if nothing had been.
    support::eventually("the owner", || async {
        let (status, _) = one.http.get(&path).await;
        (status == 200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receive_that_waits_elsewhere_is_kept_as_it_was_understood() {
    let db = support::database().await;
    let variables = [
        ("POSTROAD_NODE_TTL_SECONDS", "2"),
        ("POSTROAD_NODE_HEARTBEAT_SECONDS", "0.2"),
        ("POSTROAD_HTTP_MEMORY_BYTES", "67108864"),
    ];
    let one = support::program(&db.url, &variables).await;
    let two = support::program(&db.url, &variables).await;
    settled(&one.http, 2).await;
    let queue = super::owned_by(&db.url, &one, &two).await;
    let url = format!("{}/v1/queues/{queue}/receive", one.http.base);
    let before = support::process::resident_bytes(one.pid());
    // More than all bodies may hold together, if their white space were kept.
    let polls: Vec<_> = (0..20)
        .map(|_| {
            let body = format!("{}{{\"wait_seconds\":10}}", " ".repeat(7 << 20));
            let asked = one.http.client.post(&url).body(body);
            let asked = asked.header("content-type", "application/json");
            tokio::spawn(async move {
                loop {
                    let asked = asked.try_clone().unwrap().send().await.unwrap();
                    // No room just then.
                    if asked.status() != 503 {
                        return asked.status().as_u16();
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            })
        })
        .collect();
    support::eventually("all polls to wait", || async {
        let (_, metrics) = one.http.get("/metrics").await;
        let line = metrics.as_str()?.lines().find_map(|line| {
            line.strip_prefix("postroad_http_polls_in_line ")?
                .parse::<u64>()
                .ok()
        });
        (line? >= 19).then_some(())
    })
    .await;
    let held = support::process::resident_bytes(one.pid()).saturating_sub(before);
    assert!(held < 100 << 20, "{held} bytes for 20 polls");
    for poll in polls {
        assert_eq!(poll.await.unwrap(), 200);
    }
}
