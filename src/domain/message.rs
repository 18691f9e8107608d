//! A message: a CloudEvents 1.0 event, as a producer hands it in and as the log keeps it.

use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde_json::{Map, Value};

use super::id::{Offset, StreamId};
use super::name::Topic;

/// The extension attribute that says when a message is to enter its stream.
pub const DELIVER_AT: &str = "deliverat";

/// How far ahead a message can be scheduled: a year, leap days included.
pub const DELIVER_AHEAD_MAX: TimeDelta = TimeDelta::days(366);

/// Reads an RFC 3339 timestamp, cut to the microseconds that the log keeps.
#[must_use]
pub fn parse_micros(text: &str) -> Option<DateTime<Utc>> {
    let time = DateTime::parse_from_rfc3339(text).ok()?;
    DateTime::from_timestamp_micros(time.timestamp_micros())
}

/// A CloudEvent on its way into a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// CloudEvents `id`, 1 to 1,024 bytes.
    pub id: String,
    /// CloudEvents `source`, 1 to 1,024 bytes.
    pub source: String,
    /// CloudEvents `type`; absent means the topic.
    pub kind: Option<String>,
    /// The topic it is published to.
    pub topic: Topic,
    /// The ordering key, on the wire `partitionkey`, at most 512 bytes.
    pub key: Option<String>,
    /// CloudEvents `subject`.
    pub subject: Option<String>,
    /// CloudEvents `time`.
    pub time: Option<DateTime<Utc>>,
    /// CloudEvents `datacontenttype`.
    pub data_content_type: Option<String>,
    /// CloudEvents `dataschema`.
    pub data_schema: Option<String>,
    /// The payload.
    pub data: Data,
    /// Extension attributes other than `partitionkey`: names of `[a-z0-9]`, at most 20 long; strings, booleans, integers.
    pub extensions: Map<String, Value>,
    /// The version that its key must have when it is appended: how many messages the key has had in the stream. A command on
    /// the way in, on the wire `expectedversion`; neither the log nor the event has it.
    pub expected_version: Option<i64>,
}

impl Message {
    /// The fixed part of a message's size, in bytes.
    const OVERHEAD_BYTES: usize = 256;
    /// The same of an extension attribute.
    const EXTENSION_OVERHEAD_BYTES: usize = 16;

    /// Its share of an append, in bytes: the payload, all attributes and their overhead. Code that makes up appends and code that
    /// bounds them both use this.
    #[must_use]
    pub fn size(&self) -> usize {
        let texts: usize = self.texts().map(str::len).sum();
        let value = |value: &Value| value.as_str().map_or(0, str::len);
        let extensions = self.extensions.iter();
        let extensions: usize = extensions
            .map(|(name, of)| Self::EXTENSION_OVERHEAD_BYTES + name.len() + value(of))
            .sum();
        Self::OVERHEAD_BYTES + self.data.bytes().len() + texts + extensions
    }

    /// Its attributes that are texts, but for the topic and the extensions.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        [&self.id, &self.source]
            .into_iter()
            .chain(&self.kind)
            .chain(&self.key)
            .chain(&self.subject)
            .chain(&self.data_content_type)
            .chain(&self.data_schema)
            .map(String::as_str)
    }
}

/// A payload, in the form in which a JSON event carries it. The bytes come out as they went in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// No payload: the event has neither `data` nor `data_base64`.
    Absent,
    /// A JSON value, checked on entry and passed on as raw text.
    Json(Bytes),
    /// UTF-8 text, in the event a JSON string.
    Text(Bytes),
    /// Any bytes, in the event `data_base64`.
    Binary(Bytes),
}

impl Data {
    /// The payload's bytes; empty when absent.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        static EMPTY: Bytes = Bytes::new();
        match self {
            Self::Absent => &EMPTY,
            Self::Json(bytes) | Self::Text(bytes) | Self::Binary(bytes) => bytes,
        }
    }

    /// The number that the log's column `data_kind` keeps.
    #[must_use]
    pub const fn kind(&self) -> i16 {
        match self {
            Self::Absent => 0,
            Self::Json(_) => 1,
            Self::Text(_) => 2,
            Self::Binary(_) => 3,
        }
    }

    /// The payload of a log row.
    ///
    /// # Errors
    /// A `data_kind` that no version has written.
    pub fn from_stored(kind: i16, bytes: Bytes) -> Result<Self, UnknownDataKind> {
        match kind {
            0 => Ok(Self::Absent),
            1 => Ok(Self::Json(bytes)),
            2 => Ok(Self::Text(bytes)),
            3 => Ok(Self::Binary(bytes)),
            kind => Err(UnknownDataKind { kind }),
        }
    }
}

/// The lane of a message in a queue with priorities: the extension attribute `priority`, which is passed on unchanged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// `low`, or 0 to 3.
    Low,
    /// `normal`, 4 to 6, anything else, or none.
    #[default]
    Normal,
    /// `high`, or 7 to 9.
    High,
}

impl Priority {
    /// The lane that an attribute's value means.
    #[must_use]
    pub fn of(value: &Value) -> Self {
        let number = match value {
            Value::String(text) => match text.as_str() {
                "low" => return Self::Low,
                "high" => return Self::High,
                // `07` or `+7` is no number from 0 to 9.
                text if text.len() == 1 => text.parse().ok(),
                _ => None,
            },
            Value::Number(number) => number.as_i64(),
            _ => None,
        };
        match number {
            Some(0..=3) => Self::Low,
            Some(7..=9) => Self::High,
            _ => Self::Normal,
        }
    }

    /// The number that the log's column `priority` keeps.
    #[must_use]
    pub const fn stored(self) -> i16 {
        match self {
            Self::Low => 0,
            Self::Normal => 1,
            Self::High => 2,
        }
    }

    /// The lane of a log row.
    #[must_use]
    pub const fn from_stored(stored: i16) -> Self {
        match stored {
            i16::MIN..=0 => Self::Low,
            1 => Self::Normal,
            _ => Self::High,
        }
    }
}

/// A `data_kind` that no version of Postroad has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the log holds a payload of the unknown kind {kind}")]
pub struct UnknownDataKind {
    /// The number found.
    pub kind: i16,
}

impl Message {
    /// Its lane.
    #[must_use]
    pub fn priority(&self) -> Priority {
        self.extensions
            .get("priority")
            .map_or(Priority::Normal, Priority::of)
    }

    /// The time when it enters its stream, in whole microseconds: the extension attribute `deliverat`, which is passed on unchanged.
    /// `None` without one, and for a value that is not a time: the ways in refuse those.
    #[must_use]
    pub fn deliver_at(&self) -> Option<DateTime<Utc>> {
        let text = self.extensions.get(DELIVER_AT)?.as_str()?;
        parse_micros(text)
    }

    /// The event in CloudEvents' JSON format, one object. Written once per message, shared by all its readers.
    #[must_use]
    pub fn to_event_json(&self) -> Bytes {
        let mut out = Vec::with_capacity(256 + self.data.bytes().len() * 4 / 3);
        out.extend_from_slice(b"{\"specversion\":\"1.0\",\"id\":");
        write_string(&mut out, &self.id);
        write_attribute(&mut out, "source", &self.source);
        write_attribute(
            &mut out,
            "type",
            self.kind.as_deref().unwrap_or(self.topic.as_str()),
        );
        if let Some(subject) = &self.subject {
            write_attribute(&mut out, "subject", subject);
        }
        if let Some(time) = &self.time {
            write_attribute(
                &mut out,
                "time",
                &time.to_rfc3339_opts(SecondsFormat::AutoSi, true),
            );
        }
        if let Some(content_type) = &self.data_content_type {
            write_attribute(&mut out, "datacontenttype", content_type);
        }
        if let Some(schema) = &self.data_schema {
            write_attribute(&mut out, "dataschema", schema);
        }
        if let Some(key) = &self.key {
            write_attribute(&mut out, "partitionkey", key);
        }
        for (name, value) in &self.extensions {
            out.push(b',');
            write_string(&mut out, name);
            out.push(b':');
            write_value(&mut out, value);
        }
        match &self.data {
            Data::Absent => {}
            Data::Json(raw) => {
                out.extend_from_slice(b",\"data\":");
                out.extend_from_slice(raw);
            }
            Data::Text(text) => {
                out.extend_from_slice(b",\"data\":");
                write_string(&mut out, &String::from_utf8_lossy(text));
            }
            Data::Binary(bytes) => {
                out.extend_from_slice(b",\"data_base64\":\"");
                out.extend_from_slice(
                    base64::engine::general_purpose::STANDARD
                        .encode(bytes)
                        .as_bytes(),
                );
                out.push(b'"');
            }
        }
        out.push(b'}');
        out.into()
    }
}

fn write_attribute(out: &mut Vec<u8>, name: &str, value: &str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
    write_string(out, value);
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("a string always serializes into memory");
}

fn write_value(out: &mut Vec<u8>, value: &Value) {
    serde_json::to_writer(out, value).expect("a JSON value always serializes into memory");
}

/// A message in the log, as its readers share it: the event is printed once and never copied per queue.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The stream that holds it.
    pub stream: StreamId,
    /// Its place in the stream.
    pub offset: Offset,
    /// Its topic.
    pub topic: Topic,
    /// Its ordering key.
    pub key: Option<Arc<str>>,
    /// xxh3-64 of its key.
    pub key_hash: Option<i64>,
    /// Its lane.
    pub priority: Priority,
    /// The event in CloudEvents' JSON format.
    pub event: Bytes,
    /// The time when it was appended; it never decreases from one offset to the next.
    pub appended_at: DateTime<Utc>,
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn message(data: Data) -> Message {
        Message {
            id: "a\"b".into(),
            source: "/shop".into(),
            kind: None,
            topic: Topic::parse("orders.created").unwrap(),
            key: Some("k1".into()),
            subject: None,
            time: None,
            data_content_type: Some("application/json".into()),
            data_schema: None,
            data,
            extensions: Map::from_iter([("traceparent".to_owned(), Value::from("00-1"))]),
            expected_version: None,
        }
    }

    #[test]
    fn priority_comes_from_the_attribute() {
        for (value, priority) in [
            (Value::from("low"), Priority::Low),
            (Value::from("normal"), Priority::Normal),
            (Value::from("high"), Priority::High),
            (Value::from("0"), Priority::Low),
            (Value::from(3), Priority::Low),
            (Value::from("4"), Priority::Normal),
            (Value::from(6), Priority::Normal),
            (Value::from("7"), Priority::High),
            (Value::from(9), Priority::High),
            (Value::from(10), Priority::Normal),
            (Value::from(-1), Priority::Normal),
            (Value::from("07"), Priority::Normal),
            (Value::from("High"), Priority::Normal),
            (Value::from(""), Priority::Normal),
            (Value::from("é"), Priority::Normal),
            (Value::from(true), Priority::Normal),
        ] {
            let mut message = message(Data::Absent);
            message
                .extensions
                .insert("priority".to_owned(), value.clone());
            assert_eq!(message.priority(), priority, "{value}");
            assert_eq!(Priority::from_stored(priority.stored()), priority);
            let event = String::from_utf8(message.to_event_json().to_vec()).unwrap();
            assert!(event.contains(&format!(r#""priority":{value}"#)), "{event}");
        }
        assert_eq!(message(Data::Absent).priority(), Priority::Normal);
    }

    #[test]
    fn events_print_as_cloudevents_json() {
        let head = r#"{"specversion":"1.0","id":"a\"b","source":"/shop","type":"orders.created","datacontenttype":"application/json","partitionkey":"k1","traceparent":"00-1""#;
        for (data, tail) in [
            (Data::Absent, "}"),
            (
                Data::Json(Bytes::from_static(b"{\"a\": 1.0}")),
                r#","data":{"a": 1.0}}"#,
            ),
            (Data::Json(Bytes::from_static(b"null")), r#","data":null}"#),
            (
                Data::Text(Bytes::from_static(b"he said \"x\"")),
                r#","data":"he said \"x\""}"#,
            ),
            (
                Data::Binary(Bytes::from_static(&[0, 255])),
                r#","data_base64":"AP8="}"#,
            ),
            (Data::Binary(Bytes::new()), r#","data_base64":""}"#),
        ] {
            let printed = message(data).to_event_json();
            assert_eq!(
                std::str::from_utf8(&printed).unwrap(),
                format!("{head}{tail}")
            );
        }
    }
}
