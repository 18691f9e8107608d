//! Schemas that cost more than their size, and payloads that make them: neither holds up the others, the health or the stop.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use super::{Api, assert_problem};
use crate::relay::{Origin, execute};
use crate::support;

/// Its branches lead back to themselves: each level of a payload can double the work, and the faults.
fn branching() -> Value {
    json!({"$ref": "#/$defs/n", "$defs": {"n": {"oneOf": [
        {"type": "string"},
        {"type": "object", "required": ["c"], "properties": {"c": {"$ref": "#/$defs/n"}}},
        {"type": "object", "additionalProperties": false, "properties": {"c": {"$ref": "#/$defs/n"}}}]}}})
}

/// Definitions each of which is made of the one before it, named twice.
fn doubling(levels: usize, next: impl Fn(Value) -> Value) -> Value {
    let mut definitions = serde_json::Map::new();
    definitions.insert("a0".to_owned(), json!({"type": "string"}));
    for level in 1..=levels {
        let before = json!({"$ref": format!("#/$defs/a{}", level - 1)});
        definitions.insert(format!("a{level}"), next(before));
    }
    json!({"$ref": format!("#/$defs/a{levels}"), "$defs": definitions})
}

/// It doubles at each level of the payload, and nothing of it is remembered.
fn slow() -> Value {
    doubling(
        50,
        |before| json!({"properties": {"c": {"allOf": [{"not": before}, {"not": before}]}}}),
    )
}

/// `{"c": {"c": … 1}}`
fn nested(levels: usize) -> String {
    format!("{}1{}", r#"{"c":"#.repeat(levels), "}".repeat(levels))
}

#[tokio::test]
async fn a_schema_that_costs_too_much_is_refused_when_it_is_declared() {
    let api = Api::start().await;
    let patterns: serde_json::Map<String, Value> = (0..1_500)
        .map(|n| {
            (
                format!("p{n}"),
                json!({"pattern": format!("[^a]{{200}}{n}")}),
            )
        })
        .collect();
    for (schema, why) in [
        (
            doubling(40, |before| json!({"allOf": [before, before]})),
            "more than 10000 ways",
        ),
        (doubling(1_400, |before| before), "more than 64 schemas"),
        (
            json!({"pattern": "(a{1000}){1000}"}),
            "more than 1024 characters",
        ),
        (json!({"properties": patterns}), "MiB of memory"),
    ] {
        let began = Instant::now();
        let refused = api
            .call("PUT", "/v1/topics/a", Some(json!({"schema": schema})))
            .await;
        assert_problem(&refused, 422, "invalid-request");
        assert_eq!(refused.body["errors"][0]["pointer"], "/schema");
        let detail = refused.body["detail"].as_str().unwrap();
        assert!(detail.contains(why), "{detail}");
        assert!(began.elapsed() < Duration::from_secs(20), "{why}");
    }
    assert_eq!(api.get("/v1/topics").await.body["topics"], json!([]));
    api.stop().await;
}

#[tokio::test]
async fn a_schema_that_parsers_refuse_is_refused_as_a_payload_is() {
    let api = Api::start().await;
    let deep = r#"{"not":"#.repeat(61) + "{}" + &"}".repeat(61);
    for (schema, place) in [
        (r#"{"type": "string", "type": "integer"}"#, "/schema/type"),
        (
            r#"{"properties": {"a": {"const": "\ud83d"}}}"#,
            "/schema/properties/a/const",
        ),
        (r#"{"maximum": 1e400}"#, "/schema/maximum"),
        (&deep, "/schema/not/not/"),
    ] {
        let asked = api
            .client
            .put(api.url("/v1/topics/a"))
            .header("content-type", "application/json")
            .body(format!(r#"{{"max_bytes": 10, "schema": {schema}}}"#));
        let refused = super::answer(asked.send().await.unwrap()).await;
        assert_problem(&refused, 422, "invalid-request");
        let found = refused.body["errors"][0]["pointer"].as_str().unwrap();
        assert!(found.starts_with(place), "{schema:.50}: {found}");
    }
    assert_eq!(api.get("/v1/topics/a").await.status, 404);
    // White space and the order of names are not of the schema.
    for (schema, status) in [
        (r#"{"type": "string", "minLength": 1}"#, 201),
        (r#"{ "type":"string","minLength":1 }"#, 200),
        ("null", 200),
    ] {
        let asked = api
            .client
            .put(api.url("/v1/topics/a"))
            .header("content-type", "application/json")
            .body(format!(r#"{{"schema": {schema}}}"#));
        assert_eq!(asked.send().await.unwrap().status(), status, "{schema}");
    }
    assert_eq!(api.get("/v1/topics/a").await.body["schema"], json!(null));
    api.stop().await;
}

/// Schemas and payloads at their worst, by HTTP and from an outbox, on a program of its own: another topic is watched, the health, the
/// memory, the stop, and the start after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_schema_holds_up_neither_other_topics_nor_the_stop() {
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let http = &program.http;
    http.declare("/v1/topics/branching", &json!({"schema": branching()}))
        .await;
    http.declare("/v1/topics/slow", &json!({"schema": slow()}))
        .await;
    // Small, plain and declared by another version of the program.
    http.declare("/v1/topics/plain", &json!({"schema": {"type": "integer"}}))
        .await;
    let origin = Origin::install(&database.url).await;
    let mut owner = origin.owner().await;
    let unfit = doubling(40, |before| json!({"allOf": [before, before]}));
    execute(
        &mut owner,
        &format!(
            "insert into postroad_broker.topic_settings (pattern, schema) values ('unfit', '{unfit}');
             update postroad_broker.topic_settings_version set version = version + 1"
        ),
    )
    .await;
    let unfit = support::eventually("the schema to be known", || async {
        let (status, unfit) = http.get("/v1/topics/unfit").await;
        (status.is_success() && unfit["schema_fault"].is_string()).then_some(unfit)
    })
    .await;
    assert!(
        unfit["schema_fault"]
            .as_str()
            .unwrap()
            .contains("10000 ways"),
        "{unfit}"
    );
    assert_eq!(
        http.get("/v1/topics/slow").await.1["schema_fault"],
        Value::Null
    );

    // One row at its worst among others.
    let rows = format!(
        "insert into postroad.outbox (topic, id, payload) values
            ('plain', '1', '1'), ('branching', 'deep', '{}'), ('slow', 'slow', '{}'), ('plain', '2', '2'),
            ('branching', '3', '\"a\"'), ('unfit', '4', '{}')",
        nested(22),
        nested(50),
        nested(22),
    );
    execute(&mut owner, &rows).await;
    support::eventually("the other rows", || async {
        let (_, main) = http.get("/v1/streams/main").await;
        (main["last_offset"] == 4).then_some(())
    })
    .await;
    let (_, rejected) = http.get("/v1/origins/local/rejected").await;
    let rejected = rejected["rejected"].as_array().unwrap();
    let reasons: Vec<&str> = rejected
        .iter()
        .map(|row| row["reason"].as_str().unwrap())
        .collect();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].contains("schema of `branching`"), "{reasons:?}");
    assert!(reasons[1].contains("steps"), "{reasons:?}");

    // Requests with as much work as one may have, more of them than there are threads. Others go on beside them.
    let deep: Value = serde_json::from_str(&nested(50)).unwrap();
    let many: Vec<Value> = (0..1_000)
        .map(|_| json!({"topic": "slow", "data": deep}))
        .collect();
    let many = json!({"messages": many});
    let works: Vec<_> = (0..4)
        .map(|_| {
            let (http, many) = (http.clone(), many.clone());
            tokio::spawn(async move {
                let called = http.call(Method::POST, "/v1/messages", Some(&many));
                called.await.unwrap()
            })
        })
        .collect();
    let mut slowest = Duration::ZERO;
    for number in 0..20 {
        for (path, body) in [
            ("/v1/topics/plain/messages", json!(number)),
            // Not small enough to be asked at once: it waits in the same line.
            ("/v1/topics/branching/messages", json!("a".repeat(20_000))),
        ] {
            let began = Instant::now();
            let (status, answer) = http.post(path, &body).await;
            assert_eq!(status, 200, "{answer}");
            slowest = slowest.max(began.elapsed());
        }
        let (status, _) = http.get("/healthz").await;
        assert_eq!(status, 200);
    }
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    for work in works {
        let (status, answer) = work.await.unwrap();
        // Refused by what was found of it, or for the time that it took.
        assert!(status == 422 || status == 503, "{answer}");
    }
    let peak = support::process::peak_resident_bytes(program.pid());
    assert!(peak < 600 << 20, "{} MiB", peak >> 20);

    // In the middle of such work it stops, and starts again.
    let (working, body) = (program.http.clone(), many.clone());
    let work = tokio::spawn(async move {
        // Answered, or cut off.
        let _ = working
            .call(Method::POST, "/v1/messages", Some(&body))
            .await;
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let began = Instant::now();
    let status = program.stop().await;
    assert!(status.success(), "{status}");
    assert!(began.elapsed() < Duration::from_secs(25));
    work.await.unwrap();
    program.start().await;
    let (_, main) = program.http.get("/v1/streams/main").await;
    assert_eq!(main["last_offset"], 44);
    program.stop().await;
}
