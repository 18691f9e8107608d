//! CloudEvents as the client sends and receives them. Payloads stay text or bytes until the caller asks for a type.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::error::Error;

/// A message to be published. Its id is made here, so that a publish that is repeated publishes once.
#[derive(Debug, Clone, Serialize)]
pub struct NewEvent {
    specversion: &'static str,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<DateTime<Utc>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    datacontenttype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    partitionkey: Option<String>,
    #[serde(flatten)]
    extensions: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
}

impl NewEvent {
    fn new() -> Self {
        Self {
            specversion: "1.0",
            id: Uuid::now_v7().to_string(),
            source: None,
            kind: None,
            subject: None,
            time: None,
            datacontenttype: None,
            partitionkey: None,
            extensions: Map::new(),
            data: None,
            data_base64: None,
        }
    }

    /// With a JSON payload.
    ///
    /// # Errors
    /// [`Error::Payload`]: the value has no JSON form.
    pub fn json(payload: &(impl Serialize + ?Sized)) -> Result<Self, Error> {
        let data = serde_json::to_value(payload).map_err(Error::Payload)?;
        Ok(Self {
            data: Some(data),
            ..Self::new()
        })
    }

    /// With a payload of bytes of this content type.
    #[must_use]
    pub fn bytes(content_type: impl Into<String>, payload: &[u8]) -> Self {
        Self {
            datacontenttype: Some(content_type.into()),
            data_base64: Some(STANDARD.encode(payload)),
            ..Self::new()
        }
    }

    /// With this id instead of a random one: of an id and a source, one message is published within 24 hours.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Sets the source; `/postroad/http` by default.
    #[must_use]
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The kind of event; the topic without.
    #[must_use]
    pub fn kind(mut self, kind: impl Into<String>) -> Self {
        self.kind = Some(kind.into());
        self
    }

    /// The subject of the event within its source.
    #[must_use]
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// The time when it happened.
    #[must_use]
    pub fn time(mut self, at: DateTime<Utc>) -> Self {
        self.time = Some(at);
        self
    }

    /// The ordering key.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.partitionkey = Some(key.into());
        self
    }

    /// For topics of a keyed stream: publishes only if its key has had this many messages there. Otherwise the publish is refused
    /// with [`ProblemKind::VersionConflict`](super::ProblemKind::VersionConflict) and the version.
    #[must_use]
    pub fn expected_version(self, version: i64) -> Self {
        self.extension("expectedversion", version)
    }

    /// To enter its stream then, a year ahead at most; a time that is past is at once.
    #[must_use]
    pub fn deliver_at(self, at: DateTime<Utc>) -> Self {
        self.extension("deliverat", at.to_rfc3339())
    }

    /// An extension attribute: a name of a-z and 0-9, at most 20 long; a string, a boolean or an integer.
    #[must_use]
    pub fn extension(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.extensions.insert(name.into(), value.into());
        self
    }
}

/// One published message.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Published {
    /// Its id.
    pub id: String,
    /// The stream that owns its topic; None when it was deleted just now.
    pub stream: Option<String>,
    /// Its offset there; of the first use, for a duplicate. None for one that comes later.
    pub offset: Option<i64>,
    /// Whether source and id were used before, for the same message: by a repeat of this call, among others.
    pub duplicate: bool,
    /// Its name until it comes, if it was published to come later; of the first use, for a duplicate.
    pub scheduled: Option<ScheduledFor>,
}

/// A message that enters its stream later.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct ScheduledFor {
    /// Its name, to look it up or cancel it by.
    pub id: String,
    /// The time when the message enters its stream.
    pub due_at: DateTime<Utc>,
}

/// A message as it was received.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Event {
    /// With `source`, what makes it unique: the name to be idempotent by.
    pub id: String,
    /// The context in which the event happened.
    pub source: String,
    /// The kind of event.
    pub kind: String,
    /// The subject of the event within its source.
    pub subject: Option<String>,
    /// The time when it happened.
    pub time: Option<DateTime<Utc>>,
    /// The type of the payload; JSON without.
    pub data_content_type: Option<String>,
    /// The ordering key.
    pub key: Option<String>,
    data: Option<Box<RawValue>>,
    data_base64: Option<String>,
    whole: Box<RawValue>,
}

#[derive(Deserialize)]
struct Wire {
    id: String,
    source: String,
    #[serde(rename = "type")]
    kind: String,
    subject: Option<String>,
    time: Option<DateTime<Utc>>,
    datacontenttype: Option<String>,
    partitionkey: Option<String>,
    data: Option<Box<RawValue>>,
    data_base64: Option<String>,
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let whole = Box::<RawValue>::deserialize(deserializer)?;
        let wire: Wire = serde_json::from_str(whole.get()).map_err(serde::de::Error::custom)?;
        Ok(Self {
            id: wire.id,
            source: wire.source,
            kind: wire.kind,
            subject: wire.subject,
            time: wire.time,
            data_content_type: wire.datacontenttype,
            key: wire.partitionkey,
            data: wire.data,
            data_base64: wire.data_base64,
            whole,
        })
    }
}

impl Event {
    /// The payload as a type.
    ///
    /// # Errors
    /// It is no JSON, or other JSON than the type's.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        match (&self.data, self.bytes()) {
            (Some(data), _) => serde_json::from_str(data.get()),
            (None, bytes) => serde_json::from_slice(&bytes),
        }
    }

    /// The payload as it was sent: JSON as its text, text and other bytes as they are; empty without a payload.
    #[must_use]
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        if let Some(encoded) = &self.data_base64 {
            // The broker encoded it itself.
            return Cow::Owned(STANDARD.decode(encoded).unwrap_or_default());
        }
        let Some(data) = &self.data else {
            return Cow::Borrowed(&[]);
        };
        let is_text = self.data_content_type.as_deref().is_some_and(is_text);
        match serde_json::from_str::<String>(data.get()) {
            Ok(text) if is_text => Cow::Owned(text.into_bytes()),
            _ => Cow::Borrowed(data.get().as_bytes()),
        }
    }

    /// An attribute by its name on the wire, extensions among them.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<Value> {
        let mut all: Map<String, Value> = serde_json::from_str(self.whole.get()).ok()?;
        all.remove(name)
    }

    /// The whole event as the JSON that it came as.
    #[must_use]
    pub fn as_json(&self) -> &str {
        self.whole.get()
    }
}

/// Whether `data` is a string that stands for the payload, and not a JSON payload.
fn is_text(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    !(kind.ends_with("/json") || kind.ends_with("+json"))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn payloads_come_as_they_went() {
        for (event, bytes) in [
            (json!({"data": {"a": 1}}), &b"{\"a\":1}"[..]),
            (json!({"data": "text"}), b"\"text\""),
            (
                json!({"datacontenttype": "text/plain; charset=utf-8", "data": "text"}),
                b"text",
            ),
            (
                json!({"datacontenttype": "application/x+json", "data": "text"}),
                b"\"text\"",
            ),
            (
                json!({"datacontenttype": "image/png", "data_base64": "AAE="}),
                b"\0\x01",
            ),
            (json!({}), b""),
        ] {
            let mut whole = json!({"specversion": "1.0", "id": "i", "source": "/s", "type": "t", "tenant": "x"});
            let members = event.as_object().unwrap().clone();
            whole.as_object_mut().unwrap().extend(members);
            let event: Event = serde_json::from_str(&whole.to_string()).unwrap();
            assert_eq!(&*event.bytes(), bytes);
            assert_eq!(event.attribute("tenant"), Some(json!("x")));
        }
    }

    #[test]
    fn a_new_event_is_a_cloud_event() {
        let event = NewEvent::json(&json!({"a": 1}))
            .unwrap()
            .id("i")
            .key("k")
            .extension("tenant", "x");
        let wire = serde_json::to_value(&event).unwrap();
        let expected = json!({"specversion": "1.0", "id": "i", "partitionkey": "k", "tenant": "x", "data": {"a": 1}});
        assert_eq!(wire, expected);
        let wire = serde_json::to_value(NewEvent::bytes("image/png", &[0, 1])).unwrap();
        assert_eq!(
            (&wire["datacontenttype"], &wire["data_base64"]),
            (&json!("image/png"), &json!("AAE="))
        );
    }
}
