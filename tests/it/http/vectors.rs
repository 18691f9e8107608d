//! CloudEvents as others may send them: `tests/vectors/cloudevents.json`, published, and read back from the stream. An event
//! must come out as the vector says, `*` standing for what was made; a refused one must be refused whole, at its place.

use base64::Engine as _;
use serde_json::Value;

use super::{Api, assert_problem};

const VECTORS: &str = include_str!("../../vectors/cloudevents.json");

/// The members of the vector's event that are not the same in the one that came out.
fn differences(expected: &Value, found: &Value) -> Vec<String> {
    let (expected, found) = (expected.as_object().unwrap(), found.as_object().unwrap());
    let mut differences: Vec<String> = found
        .keys()
        .filter(|name| !expected.contains_key(*name))
        .map(|name| format!("{name} is {}", found[name]))
        .collect();
    for (name, value) in expected {
        let same = match found.get(name) {
            Some(found) => value == "*" || found == value,
            None => false,
        };
        if !same {
            differences.push(format!("{name} is {:?}, not {value}", found.get(name)));
        }
    }
    differences
}

#[tokio::test]
async fn every_vector_comes_out_as_it_says_or_is_refused_at_its_place() {
    let api = Api::start().await;
    let vectors: Vec<Value> = serde_json::from_str(VECTORS).unwrap();
    assert!(vectors.len() > 70);
    let mut last = 0;
    for (number, vector) in vectors.iter().enumerate() {
        let name = vector["name"].as_str().unwrap();
        let body = match vector["body_base64"].as_str() {
            Some(encoded) => base64::engine::general_purpose::STANDARD
                .decode(encoded)
                .unwrap(),
            None => vector["body"].as_str().unwrap().as_bytes().to_vec(),
        };
        let headers: Vec<(&str, &str)> =
            vector["headers"].as_object().map_or_else(Vec::new, |all| {
                all.iter()
                    .map(|(name, value)| (name.as_str(), value.as_str().unwrap()))
                    .collect()
            });
        // Ids are of one stream: each vector has its own, by a topic of its own.
        let topic = format!("v{number}.a");
        let stream = format!("v{number}");
        let declared = api
            .call(
                "PUT",
                &format!("/v1/streams/{stream}"),
                Some(serde_json::json!({"topics": [format!("v{number}.>")]})),
            )
            .await;
        assert_eq!(declared.status, 201, "{declared:?}");
        let content_type = vector["content_type"].as_str().unwrap();
        let answer = api.publish(&topic, content_type, &headers, body).await;
        let page = api.get(&format!("/v1/streams/{stream}/messages")).await;
        let messages = page.body["messages"].as_array().unwrap();
        let refused = &vector["refused"];
        if refused.is_object() {
            assert_problem(
                &answer,
                u16::try_from(refused["status"].as_u64().unwrap()).unwrap(),
                refused["problem"].as_str().unwrap(),
            );
            let error = &answer.body["errors"][0];
            let place = [&error["pointer"], &error["header"]]
                .into_iter()
                .find(|place| place.is_string())
                .unwrap_or(&Value::Null);
            assert_eq!(place, &refused["place"], "{name}: {answer:?}");
            assert!(messages.is_empty(), "{name}: {messages:?}");
            continue;
        }
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
        let events = vector["events"].as_array().unwrap();
        assert_eq!(messages.len(), events.len(), "{name}");
        for (expected, message) in events.iter().zip(messages) {
            let differences = differences(expected, &message["event"]);
            assert!(differences.is_empty(), "{name}: {differences:?}");
            last += 1;
        }
    }
    assert!(last > 30);
    api.stop().await;
}
