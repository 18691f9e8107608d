//! What one consumer's parser refuses costs it a whole answer: nothing of that kind gets into one, whichever way it tries.

use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::{Answer, Api, answer, assert_problem};
use crate::examples::is_there;

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

/// JSON by the grammar that parsers refuse, and where in the value that is.
fn unreadable() -> Vec<(String, &'static str)> {
    let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    vec![
        (r#""\ud83d""#.to_owned(), ""),
        (r#"{"a": ["\ude00\ud83d"]}"#.to_owned(), "/a/0"),
        (r#"{"a": {"\ud800": 1}}"#.to_owned(), "/a"),
        (r#"{"a": "\u0000"}"#.to_owned(), "/a"),
        ("9".repeat(5_000), ""),
        ("[1e400]".to_owned(), "/0"),
        (r#"{"a": {"b": 1, "b": 2}}"#.to_owned(), "/a/b"),
        (format!(r#"[{{"{}": 1}}]"#, "x".repeat(50_001)), "/0"),
        (deep(61), ""),
        (deep(3_000), ""),
    ]
}

/// Sends a body as it is.
async fn send(api: &Api, method: &str, path: &str, content_type: &str, body: String) -> Answer {
    let request = api.client.request(method.parse().unwrap(), api.url(path));
    let request = request.header("content-type", content_type).body(body);
    answer(request.send().await.unwrap()).await
}

#[tokio::test]
async fn what_parsers_refuse_is_refused_with_its_place_by_every_way_in() {
    let api = Api::start().await;
    for (text, place) in unreadable() {
        let shown = &text[..text.len().min(40)];
        let event = format!(r#"{{"specversion": "1.0", "data": {text}}}"#);
        for (content_type, body, prefix) in [
            ("application/json", text.clone(), ""),
            (STRUCTURED, event.clone(), "/data"),
            (
                BATCH,
                format!(r#"[{{"specversion": "1.0"}}, {event}]"#),
                "/1/data",
            ),
        ] {
            let path = "/v1/topics/a/messages";
            let refused = send(&api, "POST", path, content_type, body).await;
            assert_problem(&refused, 422, "invalid-message");
            let found = &refused.body["errors"][0]["pointer"];
            let found = found.as_str().unwrap();
            // What is too deep is at some level of it.
            assert!(
                found.starts_with(&format!("{prefix}{place}")),
                "{shown}: {refused:?}"
            );
        }
        for (item, prefix) in [
            (
                format!(r#"{{"topic": "a", "data": {text}}}"#),
                "/messages/1/data",
            ),
            (
                format!(r#"{{"topic": "a", "event": {event}}}"#),
                "/messages/1/event/data",
            ),
        ] {
            let body = format!(r#"{{"messages": [{{"topic": "a"}}, {item}]}}"#);
            let refused = send(&api, "POST", "/v1/messages", "application/json", body).await;
            assert_problem(&refused, 422, "invalid-message");
            assert_eq!(
                refused.body["errors"][0]["pointer"],
                format!("{prefix}{place}"),
                "{shown}"
            );
        }
        let body = format!(r#"{{"topic": "a", "cron": "0 0 * * *", "event": {{"data": {text}}}}}"#);
        let refused = send(&api, "PUT", "/v1/schedules/s", "application/json", body).await;
        assert!((400..500).contains(&refused.status), "{shown}: {refused:?}");
    }
    // The same in an attribute, which is a text of the answer as well.
    for (member, place) in [
        (r#""subject": "\ud83d""#, "/subject"),
        (r#""id": "a\u0000""#, "/id"),
        (r#""ext": "\udead""#, "/ext"),
        (r#""\ud83d": 1"#, ""),
        (r#""subject": "a", "subject": "b""#, "/subject"),
        (r#""subject": "\u0007""#, "/subject"),
    ] {
        let body = format!(r#"{{"specversion": "1.0", {member}, "data": 1}}"#);
        let refused = send(&api, "POST", "/v1/topics/a/messages", STRUCTURED, body).await;
        assert_problem(&refused, 422, "invalid-message");
        assert_eq!(refused.body["errors"][0]["pointer"], place, "{member}");
    }
    // What a client calls itself is in the list of what is in flight.
    api.queue("q", json!({"topics": ["a"]})).await;
    for name in ["a b", "\u{1b}[2J", "é", "a\nb", "", &"x".repeat(256)] {
        for field in ["consumer", "receive_id"] {
            let refused = api
                .receive("q", json!({field: name, "wait_seconds": 0}))
                .await;
            assert_problem(&refused, 422, "invalid-request");
            assert_eq!(refused.body["errors"][0]["pointer"], format!("/{field}"));
        }
    }
    assert_eq!(api.get("/v1/streams/main").await.body["last_offset"], 0);
    api.stop().await;
}

#[tokio::test]
async fn no_fault_before_a_payload_hides_what_is_in_it() {
    let api = Api::start().await;
    let deep = format!("{}1{}", "[".repeat(70), "]".repeat(70));
    for before in [
        r#""\u0000": null"#.to_owned(),
        r#""a\u0000": 1"#.to_owned(),
        r#""\ud83d": null"#.to_owned(),
        r#""subject": null, "subject": null"#.to_owned(),
        r#""ext": {"a": 1, "a": 2}"#.to_owned(),
        format!(r#""ext": {deep}"#),
        format!(r#""data_base64": {deep}"#),
    ] {
        // Also before what would be fine.
        for (text, _) in unreadable().into_iter().chain([("1".to_owned(), "")]) {
            let event = format!(r#"{{"specversion": "1.0", {before}, "data": {text}}}"#);
            for (path, content_type, body) in [
                ("/v1/topics/a/messages", STRUCTURED, event.clone()),
                (
                    "/v1/topics/a/messages",
                    BATCH,
                    format!(r#"[{{"specversion": "1.0"}}, {event}]"#),
                ),
                (
                    "/v1/messages",
                    "application/json",
                    format!(r#"{{"messages": [{{"topic": "a", "event": {event}}}]}}"#),
                ),
            ] {
                let refused = send(&api, "POST", path, content_type, body).await;
                assert_eq!(refused.status, 422, "{before:.30} {text:.30}: {refused:?}");
            }
        }
    }
    assert_eq!(api.get("/v1/streams/main").await.body["last_offset"], 0);
    api.stop().await;
}

/// Reads JSON as strict parsers do: a name twice, a constant that JSON has not, half a pair are faults.
const STRICT: &str = "
import json, sys
def members(pairs):
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names)), names
    return dict(pairs)
def constant(text):
    raise ValueError(text)
for line in sys.stdin.buffer:
    value = json.loads(line, object_pairs_hook=members, parse_constant=constant)
    json.dumps(value, ensure_ascii=False).encode()
    print('read')
";

/// Lines of JSON, by the Python that is there. One that is not counts as content.
async fn python_reads(lines: &[String]) {
    if !is_there("python3", &["--version"]).await {
        return;
    }
    let mut command = Command::new("python3");
    command
        .args(["-c", STRICT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin
        .write_all((lines.join("\n") + "\n").as_bytes())
        .await
        .unwrap();
    drop(stdin);
    let output = child.wait_with_output().await.unwrap();
    assert!(output.status.success());
    let read = String::from_utf8(output.stdout).unwrap();
    assert_eq!(read.lines().count(), lines.len());
}

#[tokio::test]
async fn every_answer_is_read_by_strict_parsers() {
    let api = Api::start().await;
    api.queue("q", json!({"topics": ["a"], "start": "earliest"}))
        .await;
    let deep = "[".repeat(60) + &"]".repeat(60);
    let payloads = [
        ("application/json", deep),
        ("application/json", "9".repeat(300)),
        (
            "application/json",
            "[1.7976931348623157e308, 5e-324, -0, 1E+2]".to_owned(),
        ),
        (
            "application/json",
            r#""\ud83d\ude00 \uffff \u0001 \u2028""#.to_owned(),
        ),
        (
            "application/json",
            "{\"\\u0061\": \"\u{2028}\u{7f}\u{ffff}\"}".to_owned(),
        ),
        (
            "text/plain",
            "\u{1}\u{1b}[2J\"\\\u{feff}\u{2029}".to_owned(),
        ),
        // No text of JSON holds it everywhere: it arrives as bytes.
        ("text/plain", "a\u{0}b".to_owned()),
        ("application/octet-stream", "\u{0}".to_owned()),
    ];
    for (content_type, payload) in &payloads {
        let published = api.publish("a", content_type, &[], payload.clone()).await;
        assert_eq!(published.status, 200, "{payload:.50}: {published:?}");
    }
    let received = api.client.post(api.url("/v1/queues/q/receive"));
    let received = received.json(&json!({"max_messages": 100, "consumer": "!~"}));
    let mut lines = vec![received.send().await.unwrap().text().await.unwrap()];
    for path in [
        "/v1/streams/main/messages",
        "/v1/queues/q/in-flight",
        "/v1/queues/q/messages",
        "/v1/queues",
    ] {
        let page = api.client.get(api.url(path)).send().await.unwrap();
        assert_eq!(page.status(), 200, "{path}");
        lines.push(page.text().await.unwrap());
    }
    for line in &mut lines {
        let value: Value = serde_json::from_str(line).unwrap();
        assert!(value.is_object());
        // One answer to a line.
        *line = line.replace('\n', " ");
    }
    python_reads(&lines).await;
    let received: Value = serde_json::from_str(&lines[0]).unwrap();
    let deliveries = received["deliveries"].as_array().unwrap();
    assert_eq!(deliveries.len(), payloads.len());
    let is_bytes: Vec<bool> = deliveries
        .iter()
        .map(|delivery| delivery["event"]["data_base64"].is_string())
        .collect();
    assert_eq!(
        is_bytes,
        [false, false, false, false, false, false, true, true]
    );
    api.stop().await;
}
