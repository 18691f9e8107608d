#![expect(clippy::unwrap_used, reason = "tests")]

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::domain::message::Data;

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json; charset=utf-8";

fn run(
    content_type: Option<&str>,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Vec<Message>, Error> {
    let request = Request {
        content_type,
        attributes: headers.iter().map(|(n, v)| (*n, v.as_bytes())).collect(),
        body: Bytes::copy_from_slice(body),
        ..Request::default()
    };
    run_request(&request)
}

fn run_request(request: &Request<'_>) -> Result<Vec<Message>, Error> {
    let context = Context {
        topic: &Topic::parse("orders.created").unwrap(),
        limits: Limits {
            message_count: 3,
            message_bytes: 2_000,
        },
        new_id: &|number| format!("new-{number}"),
    };
    parse(request, &context).map(|parsed| parsed.messages)
}

fn one(content_type: Option<&str>, headers: &[(&str, &str)], body: &[u8]) -> Message {
    let mut messages = run(content_type, headers, body).unwrap();
    assert_eq!(messages.len(), 1);
    messages.remove(0)
}

fn faults(content_type: Option<&str>, headers: &[(&str, &str)], body: &[u8]) -> Vec<String> {
    match run(content_type, headers, body) {
        Err(Error::Invalid(faults)) => faults
            .into_iter()
            .map(|fault| match fault.place {
                Place::Body(pointer) => format!("{pointer}: {}", fault.detail),
                Place::Header(name) => format!("[{name}] {}", fault.detail),
            })
            .collect(),
        other => panic!("expected faults, got {other:?}"),
    }
}

#[test]
fn the_content_type_says_the_mode() {
    let event = br#"{"specversion":"1.0","type":"t"}"#;
    let batch = br#"[{"specversion":"1.0","type":"t"}]"#;
    for (content_type, body, mode) in [
        (Some(STRUCTURED), event.as_slice(), Mode::Structured),
        (
            Some("Application/CloudEvents+JSON"),
            event,
            Mode::Structured,
        ),
        (Some(BATCH), batch, Mode::Batch),
        (Some("text/batch"), batch, Mode::Binary),
        (None, event, Mode::Binary),
    ] {
        let request = Request {
            content_type,
            body: Bytes::copy_from_slice(body),
            ..Request::default()
        };
        let context = Context {
            topic: &Topic::parse("orders.created").unwrap(),
            limits: Limits::default(),
            new_id: &|number| format!("new-{number}"),
        };
        let parsed = parse(&request, &context).unwrap();
        assert_eq!((parsed.mode, parsed.messages.len()), (mode, 1));
    }
}

#[test]
fn plain_bodies_become_messages() {
    let json = |text: &'static str| Data::Json(Bytes::from_static(text.as_bytes()));
    for (content_type, body, data, said) in [
        (None, "{\"a\": 1}", json("{\"a\": 1}"), "application/json"),
        (
            Some("application/x-www-form-urlencoded"),
            "[1.0]",
            json("[1.0]"),
            "application/json",
        ),
        (
            Some("application/json"),
            " null ",
            json(" null "),
            "application/json",
        ),
        (
            Some("application/vnd.shop+json; v=2"),
            "1",
            json("1"),
            "application/vnd.shop+json; v=2",
        ),
        (
            Some("text/plain"),
            "é",
            Data::Text(Bytes::from_static("é".as_bytes())),
            "text/plain",
        ),
        (
            Some("text/plain"),
            "",
            Data::Text(Bytes::new()),
            "text/plain",
        ),
        (None, "", Data::Binary(Bytes::new()), "application/json"),
        (
            Some("application/octet-stream"),
            "{",
            Data::Binary(Bytes::from_static(b"{")),
            "application/octet-stream",
        ),
    ] {
        let message = one(content_type, &[], body.as_bytes());
        assert_eq!(message.data, data, "{content_type:?} {body}");
        assert_eq!(message.data_content_type.as_deref(), Some(said));
        assert_eq!(message.id, "new-0");
        assert_eq!(message.source, DEFAULT_SOURCE);
        assert_eq!(message.kind, None);
    }
    let message = one(Some("text/plain"), &[], b"a\xff");
    assert_eq!(message.data, Data::Binary(Bytes::from_static(b"a\xff")));
}

#[test]
fn binary_mode_takes_attributes_from_headers() {
    let message = one(
        Some("application/json"),
        &[
            ("specversion", "1.0"),
            ("id", "a b"),
            ("source", "/shop%20%E2%82%AC"),
            ("type", "\"quoted \\\"type\\\"\""),
            ("time", "2026-11-22T03:00:00.123456789+01:00"),
            ("partitionkey", "100%25"),
            ("priority", "7"),
            ("traceparent", "own"),
        ],
        b"{}",
    );
    assert_eq!(message.id, "a b");
    assert_eq!(message.source, "/shop €");
    assert_eq!(message.kind.as_deref(), Some("quoted \"type\""));
    assert_eq!(message.key.as_deref(), Some("100%"));
    assert_eq!(
        message.time.unwrap().to_rfc3339(),
        "2026-11-22T02:00:00.123456+00:00"
    );
    assert_eq!(message.extensions["priority"], Value::from("7"));
    assert_eq!(message.extensions["traceparent"], Value::from("own"));
}

#[test]
fn structured_payloads_keep_their_text() {
    let event = |rest: &str| format!("{{\"specversion\":\"1.0\"{rest}}}");
    for (rest, data) in [
        ("", Data::Absent),
        (",\"data\":null", Data::Json(Bytes::from_static(b"null"))),
        (
            ",\"data\": {\"a\" : 1.50} ",
            Data::Json(Bytes::from_static(b"{\"a\" : 1.50}")),
        ),
        (",\"data\":\"x\"", Data::Json(Bytes::from_static(b"\"x\""))),
        (
            ",\"datacontenttype\":\"text/xml\",\"data\":\"<a\\u00e9\"",
            Data::Text(Bytes::from_static("<aé".as_bytes())),
        ),
        (
            ",\"datacontenttype\":\"text/xml\",\"data\":{}",
            Data::Json(Bytes::from_static(b"{}")),
        ),
        (
            ",\"data_base64\":\"AP8=\"",
            Data::Binary(Bytes::from_static(&[0, 255])),
        ),
        (",\"data_base64\":\"\"", Data::Binary(Bytes::new())),
        (",\"subject\":null,\"id\":null", Data::Absent),
    ] {
        let message = one(Some(STRUCTURED), &[], event(rest).as_bytes());
        assert_eq!(message.data, data, "{rest}");
    }
}

#[test]
fn faults_of_an_event_are_named() {
    for (members, wanted) in [
        (
            "\"specversion\":\"0.3\"",
            "/specversion: `specversion` is `0.3`, only `1.0`",
        ),
        ("\"id\":\"1\"", "/specversion: `specversion` is missing"),
        (
            "\"specversion\":\"1.0\",\"id\":\"\"",
            "/id: `id` is 0 bytes long, 1 to 1024",
        ),
        (
            "\"specversion\":\"1.0\",\"id\":7",
            "/id: `id` must be a string",
        ),
        (
            "\"specversion\":\"1.0\",\"id\":\"a\\u0000\"",
            "/id: the body has the character U+0000",
        ),
        (
            "\"specversion\":\"1.0\",\"id\":\"a\",\"id\":\"b\"",
            "/id: `id` is given more than once",
        ),
        (
            "\"specversion\":\"1.0\",\"My~/Key\":\"a\"",
            "/My~0~1Key: the attribute name `My~/Key` may only",
        ),
        (
            "\"specversion\":\"1.0\",\"a23456789012345678901\":1",
            "the attribute name `a23456789012345678901` is 21",
        ),
        (
            "\"specversion\":\"1.0\",\"ext\":{}",
            "/ext: `ext` must be a string, a boolean or an integer",
        ),
        (
            "\"specversion\":\"1.0\",\"ext\":1.5",
            "/ext: `ext` must be an integer from",
        ),
        (
            "\"specversion\":\"1.0\",\"ext\":2147483648",
            "/ext: `ext` must be an integer from",
        ),
        (
            "\"specversion\":\"1.0\",\"time\":\"yesterday\"",
            "/time: `time` is `yesterday`, not an RFC 3339",
        ),
        (
            "\"specversion\":\"1.0\",\"deliverat\":\"x\"",
            "/deliverat: `deliverat` is `x`, not an RFC 3339",
        ),
        (
            "\"specversion\":\"1.0\",\"expectedversion\":1",
            ": `expectedversion` is the version of a key",
        ),
        (
            "\"specversion\":\"1.0\",\"data\":1,\"data_base64\":\"\"",
            "/data_base64: an event has",
        ),
        (
            "\"specversion\":\"1.0\",\"data_base64\":\"a\"",
            "/data_base64: `data_base64` must be",
        ),
        (
            "\"specversion\":\"1.0\",\"data_base64\":null",
            "/data_base64: `data_base64` must be",
        ),
        (
            "\"specversion\":\"1.0\",\"datacontenttype\":\"text/plain\",\"data\":\"\\ud800\"",
            "/data: the body has half a surrogate pair",
        ),
    ] {
        let found = faults(Some(STRUCTURED), &[], format!("{{{members}}}").as_bytes());
        assert_eq!(found.len(), 1, "{members}: {found:?}");
        assert!(found[0].contains(wanted), "{members}: {found:?}");
    }
    let long = format!(
        "{{\"specversion\":\"1.0\",\"partitionkey\":\"{}\"}}",
        "k".repeat(513)
    );
    assert!(faults(Some(STRUCTURED), &[], long.as_bytes())[0].contains("513 bytes long, 1 to 512"));
    assert!(faults(Some(STRUCTURED), &[], b"[]")[0].contains("expected a JSON object"));
}

#[test]
fn faults_of_headers_are_named() {
    for (headers, wanted) in [
        (
            vec![("id", "%ff")],
            "[ce-id] `ce-id` does not decode to UTF-8",
        ),
        (
            vec![("id", "a"), ("id", "b")],
            "[ce-id] `ce-id` is given more than once",
        ),
        (vec![("data", "a")], "[ce-data] `data` cannot be"),
        (
            vec![("my_key", "a")],
            "[ce-my_key] the attribute name `my_key` may only",
        ),
        (
            vec![("datacontenttype", "a")],
            "[ce-datacontenttype] in this mode the header `Content-Type`",
        ),
        (
            vec![("specversion", "2.0")],
            "[ce-specversion] `specversion` is `2.0`",
        ),
    ] {
        let found = faults(None, &headers, b"{}");
        assert_eq!(found.len(), 1, "{headers:?}: {found:?}");
        assert!(found[0].contains(wanted), "{headers:?}: {found:?}");
    }
    assert!(
        faults(Some("application/json"), &[], b"{")[0].starts_with(": the body is not valid JSON")
    );
    assert!(faults(None, &[], b"hello")[0].contains("send `Content-Type: text/plain`"));
    assert!(faults(None, &[], b"\"\xff\"")[0].contains("is not UTF-8"));
}

#[test]
fn batches_are_all_or_nothing() {
    let messages = run(
        Some(BATCH),
        &[],
        b"[{\"specversion\":\"1.0\",\"id\":\"a\"},{\"specversion\":\"1.0\"}]",
    )
    .unwrap();
    let ids: Vec<&str> = messages.iter().map(|m| m.id.as_str()).collect();
    assert_eq!(ids, ["a", "new-1"]);
    assert_eq!(run(Some(BATCH), &[], b" [] ").unwrap(), []);
    let found = faults(
        Some(BATCH),
        &[],
        b"[{\"specversion\":\"1.0\",\"id\":\"\"},{\"specversion\":\"1.0\"},7]",
    );
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found[0].starts_with("/0/id:") && found[1].starts_with("/2:"),
        "{found:?}"
    );
    assert!(faults(Some(BATCH), &[], b"[{},{},{},{}]")[0].contains("at most 3"));
    assert!(faults(Some(BATCH), &[], b"{}")[0].contains("must be a JSON array"));
    assert!(matches!(
        run(Some(BATCH), &[], b"[{]"),
        Err(Error::NotJson(_))
    ));
}

#[test]
fn limits_hold() {
    let large = format!("\"{}\"", "x".repeat(2_000));
    assert!(matches!(
        run(None, &[], large.as_bytes()),
        Err(Error::TooLarge {
            size: 2_018,
            limit: 2_000,
            ..
        })
    ));
    assert!(matches!(
        run(Some("application/cloudevents+avro"), &[], b""),
        Err(Error::UnsupportedFormat { .. })
    ));
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    // An event that is larger than a message may be is refused first.
    assert!(matches!(
        run(None, &[], deep.as_bytes()),
        Err(Error::TooLarge { size: 200_016, .. })
    ));
    let short = "[".repeat(900) + &"]".repeat(900);
    assert!(faults(None, &[], short.as_bytes())[0].contains("nests more than 60 levels deep"));
    let event = format!("{{\"specversion\":\"1.0\",\"data\":{deep}}}");
    assert!(faults(Some(STRUCTURED), &[], event.as_bytes())[0].contains("/data: `data` nests"));
    let event = format!("{{\"specversion\":\"1.0\",\"ext\":{deep}}}");
    assert!(faults(Some(STRUCTURED), &[], event.as_bytes())[0].contains("/ext: `ext` must be"));
    assert!(faults(Some(BATCH), &[], deep.as_bytes())[0].starts_with("/0: "));
}

#[test]
fn the_requests_trace_fills_in() {
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    for (own, header, wanted) in [
        (None, trace, Some(trace)),
        (Some("own"), trace, Some("own")),
        (None, "garbage", None),
    ] {
        let request = Request {
            attributes: own
                .iter()
                .map(|v: &&str| ("traceparent", v.as_bytes()))
                .collect(),
            traceparent: Some(header),
            tracestate: Some("a=1"),
            body: Bytes::from_static(b"1"),
            ..Request::default()
        };
        let message = &run_request(&request).unwrap()[0];
        let found = message
            .extensions
            .get("traceparent")
            .and_then(Value::as_str);
        assert_eq!(found, wanted);
        assert_eq!(
            message.extensions.contains_key("tracestate"),
            wanted == Some(trace)
        );
    }
}

fn content_types() -> impl Strategy<Value = Option<String>> {
    proptest::option::of(prop_oneof![
        Just(STRUCTURED.to_owned()),
        Just(BATCH.to_owned()),
        Just("application/json".to_owned()),
        Just("text/plain".to_owned()),
        "[a-z/+;= -]{0,30}",
    ])
}

/// Text that is often JSON, or nearly.
fn nearly_json() -> impl Strategy<Value = String> {
    let token = prop_oneof![
        Just("{".to_owned()),
        Just("}".to_owned()),
        Just("[".to_owned()),
        Just("]".to_owned()),
        Just(":".to_owned()),
        Just(",".to_owned()),
        Just("\"specversion\":\"1.0\"".to_owned()),
        Just("\"data\"".to_owned()),
        Just("\"data_base64\"".to_owned()),
        Just("\"id\"".to_owned()),
        Just("null".to_owned()),
        Just("\"\\ud800\"".to_owned()),
        "[0-9.eE+-]{1,5}",
        "\"[a-z\\\\u0-9]{0,6}\"",
    ];
    proptest::collection::vec(token, 0..24).prop_map(|tokens| tokens.concat())
}

proptest! {
    #[test]
    fn parsing_never_panics(
        content_type in content_types(),
        name in "[a-z]{0,8}",
        value in proptest::collection::vec(any::<u8>(), 0..20),
        body in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            nearly_json().prop_map(String::into_bytes),
        ],
    ) {
        let request = Request {
            content_type: content_type.as_deref(),
            attributes: vec![(&name, &value)],
            body: body.into(),
            ..Request::default()
        };
        if let Ok(messages) = run_request(&request) {
            for message in messages {
                let printed = message.to_event_json();
                // Every parser reads the output, whatever the input was.
                prop_assert!(crate::domain::json::check_envelope(&printed).is_ok());
                prop_assert!(serde_json::from_slice::<Value>(&printed).is_ok());
            }
        }
    }

    #[test]
    fn printing_and_parsing_is_identity(
        kind in 0..4,
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        text in "\\PC{0,50}",
        id in "[ -~]{1,20}",
    ) {
        let (content_type, data) = match kind {
            0 => (None, Data::Absent),
            1 => (None, Data::Json(serde_json::to_vec(&serde_json::json!({"a": [text, 1]})).unwrap().into())),
            2 => (Some("text/plain"), Data::Text(text.into())),
            _ => (Some("image/png"), Data::Binary(bytes.into())),
        };
        let mut message = one(Some(STRUCTURED), &[], b"{\"specversion\":\"1.0\",\"type\":\"t\",\"source\":\"s\"}");
        message.id = id;
        message.data = data;
        message.data_content_type = content_type.map(str::to_owned);
        let read_back = one(Some(STRUCTURED), &[], &message.to_event_json());
        prop_assert_eq!(read_back, message);
    }
}
