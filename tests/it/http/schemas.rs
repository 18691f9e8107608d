//! Schemas that cost more than their size, and payloads that make them: neither holds up the others, the health or the stop.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Api, assert_problem};

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
