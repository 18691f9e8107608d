//! Turns an outbox row into a message, or says why it cannot. The outbox's constraints refuse nearly all bad rows while the
//! producer still listens; a bad row that arrives anyway must not stop the rows behind it.

use base64::Engine as _;
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value};

use crate::domain::cloudevents::check_characters;
use crate::domain::json;
use crate::domain::message::{DELIVER_AHEAD_MAX, DELIVER_AT, Data, Message};
use crate::domain::name::Topic;
use crate::store::origin::OutboxRow;
use crate::stream::{Conditional, Rejected};

/// The largest payload (docs/protocol.md, Parameters: cap).
const PAYLOAD_MAX_BYTES: usize = 16 << 20;
const HEADERS_MAX_BYTES: usize = 64 << 10;
const KEY_MAX_BYTES: usize = 512;
const ATTRIBUTE_MAX_BYTES: usize = 1_024;
const CONTENT_TYPE_MAX_BYTES: usize = 255;
/// A payload larger than this is named, not copied, in the list of rejected rows. No table that a relay reads gives it one: rows
/// are rejected with all that they have, since they leave the table.
const COPY_MAX_BYTES: usize = crate::store::mapped::ROW_MAX_BYTES;

/// Attribute names that have their own column, or that CloudEvents reserves.
const RESERVED: [&str; 12] = [
    "specversion",
    "id",
    "source",
    "type",
    "subject",
    "time",
    "datacontenttype",
    "dataschema",
    "data",
    "partitionkey",
    "expectedversion",
    DELIVER_AT,
];

/// The message of a row, as of now.
pub(super) fn to_message(row: OutboxRow, now: DateTime<Utc>) -> Result<Message, Box<Rejected>> {
    match check(&row, now) {
        Ok((topic, extensions)) => Ok(make(row, topic, extensions)),
        Err(reason) => Err(Box::new(Rejected {
            seq: row.seq,
            reason,
            outbox_row: copy(&row).to_string(),
        })),
    }
}

/// The row of a message that may not go to its topic.
pub(super) fn refuse(seq: i64, message: Message, reason: String) -> Rejected {
    Rejected {
        seq,
        reason,
        outbox_row: copy(&unmake(seq, message)).to_string(),
    }
}

fn make(row: OutboxRow, topic: Topic, extensions: Map<String, Value>) -> Message {
    let data = to_data(row.payload, row.payload_bytes, row.content_type.as_deref());
    Message {
        // Both are there: checked.
        id: row.id.unwrap_or_default(),
        source: row.source.unwrap_or_default(),
        kind: row.kind,
        topic,
        key: row.key,
        subject: row.subject,
        time: row.time,
        data_content_type: row.content_type,
        data_schema: row.data_schema,
        data,
        extensions,
        expected_version: row.expected_version,
    }
}

/// The row of a message that it was made of, or one that makes the same message.
fn unmake(seq: i64, message: Message) -> OutboxRow {
    let deliver_at = message.deliver_at();
    let bytes = message.data.bytes().to_vec();
    let content_type = message.data_content_type.as_deref();
    let (payload, payload_bytes) = match String::from_utf8(bytes) {
        _ if message.data == Data::Absent => (None, None),
        // A text for people, where it means the same.
        Ok(text) if to_data(Some(text.clone()), None, content_type) == message.data => {
            (Some(text), None)
        }
        Ok(text) => (None, Some(text.into_bytes())),
        Err(error) => (None, Some(error.into_bytes())),
    };
    let mut headers = message.extensions;
    headers.remove(DELIVER_AT);
    let headers = (!headers.is_empty()).then_some(Value::Object(headers));
    OutboxRow {
        seq,
        topic: Some(message.topic.to_string()),
        payload,
        payload_bytes,
        key: message.key,
        kind: message.kind,
        id: Some(message.id),
        source: Some(message.source),
        subject: message.subject,
        content_type: message.data_content_type,
        data_schema: message.data_schema,
        headers: headers.map(|headers| headers.to_string()),
        time: message.time,
        time_is_valid: true,
        expected_version: message.expected_version,
        deliver_at,
        deliver_at_is_valid: true,
    }
}

fn check(row: &OutboxRow, now: DateTime<Utc>) -> Result<(Topic, Map<String, Value>), String> {
    let topic = Topic::parse(row.topic.as_deref().unwrap_or_default())
        .map_err(|error| format!("the topic {error}"))?;
    check_length("key", row.key.as_deref(), KEY_MAX_BYTES)?;
    check_length(
        "id",
        Some(row.id.as_deref().unwrap_or_default()),
        ATTRIBUTE_MAX_BYTES,
    )?;
    check_length(
        "source",
        Some(row.source.as_deref().unwrap_or_default()),
        ATTRIBUTE_MAX_BYTES,
    )?;
    check_length("type", row.kind.as_deref(), ATTRIBUTE_MAX_BYTES)?;
    check_length("subject", row.subject.as_deref(), ATTRIBUTE_MAX_BYTES)?;
    check_length(
        "data_schema",
        row.data_schema.as_deref(),
        ATTRIBUTE_MAX_BYTES,
    )?;
    check_length(
        "content_type",
        row.content_type.as_deref(),
        CONTENT_TYPE_MAX_BYTES,
    )?;
    for (name, text) in [
        ("key", &row.key),
        ("id", &row.id),
        ("source", &row.source),
        ("type", &row.kind),
        ("subject", &row.subject),
        ("data_schema", &row.data_schema),
    ] {
        check_characters(name, text.as_deref().unwrap_or_default())?;
    }
    if let Some(content_type) = &row.content_type
        && !content_type
            .bytes()
            .all(|byte| (b' '..=b'~').contains(&byte))
    {
        return Err("the content_type has a character that is not printable ASCII".to_owned());
    }
    if row.payload.is_some() && row.payload_bytes.is_some() {
        return Err("payload and payload_bytes are both given".to_owned());
    }
    let size = row.payload.as_ref().map_or(0, String::len)
        + row.payload_bytes.as_ref().map_or(0, Vec::len);
    if size > PAYLOAD_MAX_BYTES {
        return Err(format!(
            "the payload is {size} bytes long, at most {PAYLOAD_MAX_BYTES} are allowed"
        ));
    }
    if !row.time_is_valid {
        return Err("the time must be in the years 1 to 9999".to_owned());
    }
    if row
        .expected_version
        .is_some_and(|version| version < 0 || row.key.is_none())
    {
        return Err("the expected_version is negative, or there is no key".to_owned());
    }
    if row.expected_version.is_some() && row.deliver_at.is_some() {
        return Err("expected_version and deliver_at are both given".to_owned());
    }
    if !row.deliver_at_is_valid
        || row
            .deliver_at
            .is_some_and(|at| at - now > DELIVER_AHEAD_MAX)
    {
        return Err(format!(
            "the deliver_at is more than {} days ahead",
            DELIVER_AHEAD_MAX.num_days()
        ));
    }
    let mut extensions = to_extensions(row.headers.as_deref())?;
    if let Some(at) = row.deliver_at {
        let at = at.to_rfc3339_opts(SecondsFormat::AutoSi, true);
        extensions.insert(DELIVER_AT.to_owned(), at.into());
    }
    Ok((topic, extensions))
}

fn check_length(name: &str, value: Option<&str>, limit: usize) -> Result<(), String> {
    match value.map(str::len) {
        Some(0) => Err(format!("the {name} is empty")),
        Some(length) if length > limit => Err(format!(
            "the {name} is {length} bytes long, at most {limit} are allowed"
        )),
        _ => Ok(()),
    }
}

fn to_extensions(headers: Option<&str>) -> Result<Map<String, Value>, String> {
    // The JSON null is what some mappers of objects to tables write where they mean none.
    let Some(headers) = headers.filter(|headers| *headers != "null") else {
        return Ok(Map::new());
    };
    if headers.len() > 2 * HEADERS_MAX_BYTES {
        return Err(format!(
            "the headers are {} bytes long, at most {HEADERS_MAX_BYTES} are allowed",
            headers.len()
        ));
    }
    let Ok(Value::Object(mut extensions)) = serde_json::from_str(headers) else {
        return Err("the headers are not a JSON object".to_owned());
    };
    for (name, value) in &mut extensions {
        let is_name = (1..=20).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if !is_name {
            return Err(format!(
                "the header `{name}` has a name that is not 1 to 20 of a-z 0-9"
            ));
        }
        if RESERVED.contains(&name.as_str()) {
            return Err(format!("the header `{name}` has a column of its own"));
        }
        match to_integer(value) {
            Some(integer) => *value = Value::from(integer),
            None if value.is_string() || value.is_boolean() => {
                check_characters(name, value.as_str().unwrap_or_default())?;
            }
            None => {
                return Err(format!(
                    "the header `{name}` is not a string, a boolean or a 32-bit integer"
                ));
            }
        }
    }
    Ok(extensions)
}

/// The 32-bit integer that a JSON number stands for; jsonb keeps `1.0` as it was written.
fn to_integer(value: &Value) -> Option<i32> {
    if let Some(integer) = value.as_i64() {
        return i32::try_from(integer).ok();
    }
    let number = value.as_f64()?;
    let in_range = (f64::from(i32::MIN)..=f64::from(i32::MAX)).contains(&number);
    #[expect(clippy::cast_possible_truncation, reason = "in range and integral")]
    (in_range && number.fract() == 0.0).then_some(number as i32)
}

/// The kind of a payload, by its column and its content type. JSON is checked here once, by the same rule as over HTTP, and passes
/// as it was written. A payload that is declared as JSON (or not declared) and is not JSON that every reader takes goes out as
/// bytes.
fn to_data(text: Option<String>, bytes: Option<Vec<u8>>, content_type: Option<&str>) -> Data {
    match (text, bytes) {
        (Some(text), _) => match content_type {
            Some(content_type) if !is_json(content_type) => Data::Text(text.into()),
            _ => json_or_binary(text.into()),
        },
        (None, Some(bytes)) => match content_type {
            Some(content_type) if is_json(content_type) => json_or_binary(bytes.into()),
            _ => Data::Binary(bytes.into()),
        },
        (None, None) => Data::Absent,
    }
}

fn json_or_binary(bytes: Bytes) -> Data {
    if json::check(&bytes).is_ok() {
        Data::Json(bytes)
    } else {
        Data::Binary(bytes)
    }
}

/// `application/json`, `application/problem+json; charset=utf-8` …
fn is_json(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    media_type.split_once('/').is_some_and(|(_, subtype)| {
        let subtype = subtype.to_ascii_lowercase();
        subtype == "json" || subtype.ends_with("+json")
    })
}

/// The row as it would be listed if the stream does not take it; of those that expect something of the stream.
pub(super) fn to_conditional(row: &OutboxRow) -> Option<Conditional> {
    row.expected_version.map(|_| Conditional {
        seq: row.seq,
        outbox_row: copy(row).to_string(),
    })
}

/// The row as JSON, for the list of rejected rows.
pub(super) fn copy(row: &OutboxRow) -> Value {
    let mut copy = serde_json::json!({
        "seq": row.seq,
        "topic": row.topic,
        "key": row.key,
        "type": row.kind,
        "id": row.id,
        "source": row.source,
        "subject": row.subject,
        "content_type": row.content_type,
        "data_schema": row.data_schema,
        "headers": row.headers,
        "time": row.time,
        "deliver_at": row.deliver_at,
    });
    if let Some(version) = row.expected_version {
        copy["expected_version"] = version.into();
    }
    let size = row.payload.as_ref().map_or(0, String::len)
        + row.payload_bytes.as_ref().map_or(0, Vec::len);
    if size > COPY_MAX_BYTES {
        copy["payload_left_in_outbox_bytes"] = size.into();
        return copy;
    }
    if let Some(payload) = &row.payload {
        copy["payload"] = payload.as_str().into();
    }
    if let Some(bytes) = &row.payload_bytes {
        let encoded = base64::engine::general_purpose::STANDARD.encode(bytes);
        copy["payload_bytes"] = encoded.into();
    }
    copy
}

/// The entry in the list for a row that cannot be read: its number and, if it can be had, the row as its server prints it, in the server's
/// encoding and then in base64.
pub(super) fn unread_copy(seq: i64, raw: Option<String>) -> String {
    let mut copy = serde_json::json!({ "seq": seq, "left_in_outbox": true });
    if let Some(raw) = raw {
        copy["row_base64"] = raw.into();
    }
    copy.to_string()
}

/// The row that [`copy`] wrote.
pub(super) fn from_copy(copy: &str) -> Option<OutboxRow> {
    let copy: Value = serde_json::from_str(copy).ok()?;
    let text = |name: &str| copy.get(name).and_then(Value::as_str).map(str::to_owned);
    let is_left = |name: &str| copy.get(name).is_some();
    if is_left("payload_left_in_outbox_bytes") || is_left("left_in_outbox") {
        return None;
    }
    let bytes = match text("payload_bytes") {
        Some(encoded) => Some(
            base64::engine::general_purpose::STANDARD
                .decode(encoded)
                .ok()?,
        ),
        None => None,
    };
    Some(OutboxRow {
        seq: copy.get("seq")?.as_i64()?,
        topic: text("topic"),
        payload: text("payload"),
        payload_bytes: bytes,
        key: text("key"),
        kind: text("type"),
        id: text("id"),
        source: text("source"),
        subject: text("subject"),
        content_type: text("content_type"),
        data_schema: text("data_schema"),
        headers: text("headers"),
        time: text("time").and_then(|time| time.parse().ok()),
        time_is_valid: true,
        expected_version: copy.get("expected_version").and_then(Value::as_i64),
        deliver_at: text("deliver_at").and_then(|time| time.parse().ok()),
        deliver_at_is_valid: true,
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_764_000_000, 0).unwrap()
    }

    fn row() -> OutboxRow {
        OutboxRow {
            seq: 7,
            topic: Some("orders.created".into()),
            id: Some("a".into()),
            source: Some("/shop".into()),
            time_is_valid: true,
            deliver_at_is_valid: true,
            ..OutboxRow::default()
        }
    }

    #[test]
    fn payloads_become_data() {
        let text = |text: &str| Some(text.to_owned());
        let bytes = |bytes: &[u8]| Some(bytes.to_vec());
        for (payload, payload_bytes, content_type, data) in [
            (None, None, None, Data::Absent),
            (
                text("{\"a\": 1}"),
                None,
                None,
                Data::Json("{\"a\": 1}".into()),
            ),
            (text("null"), None, None, Data::Json("null".into())),
            (text("{"), None, None, Data::Binary("{".into())),
            (text(""), None, None, Data::Binary("".into())),
            (
                text("{"),
                None,
                Some("application/json"),
                Data::Binary("{".into()),
            ),
            (
                text("1"),
                None,
                Some("application/A+JSON; charset=utf-8"),
                Data::Json("1".into()),
            ),
            (
                text("<a/>"),
                None,
                Some("application/xml"),
                Data::Text("<a/>".into()),
            ),
            (text(""), None, Some("text/plain"), Data::Text("".into())),
            (None, bytes(b"1"), None, Data::Binary("1".into())),
            (
                None,
                bytes(b"1"),
                Some("application/json"),
                Data::Json("1".into()),
            ),
            (
                None,
                bytes(b"\xff"),
                Some("application/json"),
                Data::Binary(Bytes::from_static(b"\xff")),
            ),
            (
                None,
                bytes(b""),
                Some("text/plain"),
                Data::Binary("".into()),
            ),
        ] {
            let found = to_data(payload.clone(), payload_bytes, content_type);
            assert_eq!(found, data, "{payload:?} {content_type:?}");
        }
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        let data = |depth| to_data(Some(nested(depth)), None, None);
        assert!(matches!(data(json::DEPTH_MAX), Data::Json(_)));
        for depth in [json::DEPTH_MAX + 1, 200, 100_000] {
            assert!(matches!(data(depth), Data::Binary(_)));
        }
    }

    #[test]
    fn rows_that_cannot_become_messages_say_why_and_can_be_read_back() {
        let check = |change: &dyn Fn(&mut OutboxRow), reason: &str| {
            let mut row = row();
            change(&mut row);
            row.payload_bytes = row.payload_bytes.or(Some(vec![0, 255]));
            let rejected = to_message(row.clone(), now()).unwrap_err();
            assert!(rejected.reason.contains(reason), "{}", rejected.reason);
            assert_eq!(from_copy(&rejected.outbox_row).unwrap(), row);
        };
        check(&|row| row.topic = None, "the topic must not be empty");
        check(&|row| row.topic = Some("a..b".into()), "has the token ``");
        check(
            &|row| row.key = Some("k".repeat(513)),
            "the key is 513 bytes",
        );
        check(&|row| row.id = Some(String::new()), "the id is empty");
        check(
            &|row| row.key = Some("a\u{1b}[2J".into()),
            "`key` has the character U+001B",
        );
        check(&|row| row.kind = Some("t\u{ffff}".into()), "U+FFFF");
        check(
            &|row| row.headers = Some("{\"a\":\"\\u0007\"}".into()),
            "`a` has the character U+0007",
        );
        check(&|row| row.headers = Some("[]".into()), "not a JSON object");
        check(&|row| row.headers = Some("{\"A\":1}".into()), "`A`");
        check(&|row| row.headers = Some("{\"id\":\"1\"}".into()), "`id`");
        check(&|row| row.headers = Some("{\"a\":1.5}".into()), "`a`");
        check(&|row| row.payload = Some("1".into()), "both given");
        check(&|row| row.expected_version = Some(3), "there is no key");
        check(
            &|row| {
                row.key = Some("k".into());
                row.expected_version = Some(-1);
            },
            "is negative",
        );
        check(
            &|row| row.deliver_at = Some(now() + DELIVER_AHEAD_MAX + chrono::TimeDelta::seconds(1)),
            "more than 366 days ahead",
        );
        let large = OutboxRow {
            payload: Some("x".repeat(COPY_MAX_BYTES + 1)),
            ..row()
        };
        let rejected = to_message(large, now()).unwrap_err();
        assert!(rejected.outbox_row.len() < 1_000);
        assert_eq!(from_copy(&rejected.outbox_row), None);
    }

    #[test]
    fn a_row_that_its_topic_does_not_take_is_listed_as_it_was() {
        for (payload, payload_bytes, content_type) in [
            (Some("{\"a\" : 1}"), None, None),
            (Some("not json"), None, None),
            (Some("text"), None, Some("text/plain")),
            (None, Some(&b"{}"[..]), None),
            (None, Some(&[0, 255][..]), Some("application/json")),
            (None, None, None),
        ] {
            let row = OutboxRow {
                payload: payload.map(str::to_owned),
                payload_bytes: payload_bytes.map(<[u8]>::to_vec),
                content_type: content_type.map(str::to_owned),
                headers: Some("{\"a\":1}".into()),
                deliver_at: Some(now()),
                ..row()
            };
            let rejected = refuse(
                row.seq,
                to_message(row.clone(), now()).unwrap(),
                "no".into(),
            );
            assert_eq!(from_copy(&rejected.outbox_row).unwrap(), row);
        }
    }

    #[test]
    fn deliver_at_becomes_an_attribute() {
        for (seconds, text) in [
            (0, "2025-11-24T16:00:00Z"),
            (-60, "2025-11-24T15:59:00Z"),
            (DELIVER_AHEAD_MAX.num_seconds(), "2026-11-25T16:00:00Z"),
        ] {
            let mut row = row();
            row.deliver_at = Some(now() + chrono::TimeDelta::seconds(seconds));
            let message = to_message(row.clone(), now()).unwrap();
            assert_eq!(message.extensions[DELIVER_AT], text);
            assert_eq!(message.deliver_at(), row.deliver_at);
        }
    }

    #[test]
    fn headers_become_extensions() {
        let mut row = row();
        row.headers = Some("{\"a\": 1.0, \"b\": true, \"c\": \"x\", \"d\": -2147483648}".into());
        let message = to_message(row, now()).unwrap();
        let printed = Value::Object(message.extensions).to_string();
        assert_eq!(printed, r#"{"a":1,"b":true,"c":"x","d":-2147483648}"#);
    }
}
