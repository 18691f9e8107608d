//! The attributes of one event, in any mode, and the rules that all modes share.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::{Map, Value};

use super::{
    ATTRIBUTE_MAX_BYTES, Context, DEFAULT_SOURCE, EXTENSION_MAX_BYTES, EXTENSIONS_MAX_COUNT, Error,
    Faults, ID_MAX_BYTES, KEY_MAX_BYTES, NAME_MAX_BYTES, Place, Request,
};
use crate::domain::message::{DELIVER_AT, Data, Message, parse_micros};

/// The largest version that every JSON parser reads exactly.
const VERSION_MAX: i64 = (1 << 53) - 1;

/// Gathers the attributes of one event.
#[derive(Debug, Default)]
pub(super) struct Attributes {
    specversion: Option<String>,
    id: Option<String>,
    source: Option<String>,
    kind: Option<String>,
    subject: Option<String>,
    time: Option<DateTime<Utc>>,
    data_content_type: Option<String>,
    data_schema: Option<String>,
    key: Option<String>,
    expected_version: Option<i64>,
    extensions: Map<String, Value>,
    bytes: usize,
}

/// Checks the name of an attribute.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_MAX_BYTES {
        return Err(format!(
            "the attribute name `{}` is {} bytes long, 1 to {NAME_MAX_BYTES} are allowed",
            shown(name),
            name.len()
        ));
    }
    if !name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    {
        return Err(format!(
            "the attribute name `{}` may only have a-z and 0-9",
            shown(name)
        ));
    }
    if name == "data" {
        return Err("`data` cannot be an attribute's name".to_owned());
    }
    Ok(())
}

/// The start of what a client sent, for a message: as much as a person reads, without control characters.
pub(super) fn shown(text: &str) -> String {
    text.chars()
        .take(40)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

impl Attributes {
    /// Takes one attribute in.
    pub(super) fn set(&mut self, name: &str, value: Value, place: Place, faults: &mut Faults) {
        if let Err(detail) = self.try_set(name, value) {
            faults.add(place, detail);
        }
    }

    fn try_set(&mut self, name: &str, value: Value) -> Result<(), String> {
        check_name(name)?;
        let slot = match name {
            "specversion" => &mut self.specversion,
            "id" => &mut self.id,
            "source" => &mut self.source,
            "type" => &mut self.kind,
            "subject" => &mut self.subject,
            "datacontenttype" => &mut self.data_content_type,
            "dataschema" => &mut self.data_schema,
            "partitionkey" => &mut self.key,
            "time" => return self.set_time(&value),
            "expectedversion" => return self.set_expected_version(&value),
            DELIVER_AT => {
                let text = value.as_str().unwrap_or_default();
                if parse_micros(text).is_none() {
                    return Err(format!(
                        "`{name}` is `{}`, not an RFC 3339 timestamp",
                        shown(text)
                    ));
                }
                return self.set_extension(name, value);
            }
            _ => return self.set_extension(name, value),
        };
        let limit = match name {
            "id" | "source" => ID_MAX_BYTES,
            "partitionkey" => KEY_MAX_BYTES,
            _ => ATTRIBUTE_MAX_BYTES,
        };
        let text = text_of(name, value)?;
        check_text(name, &text, limit)?;
        if name == "specversion" && text != "1.0" {
            return Err(format!(
                "`specversion` is `{}`, only `1.0` is supported",
                shown(&text)
            ));
        }
        self.bytes += text.len();
        *slot = Some(text);
        Ok(())
    }

    fn set_time(&mut self, value: &Value) -> Result<(), String> {
        let text = value
            .as_str()
            .ok_or_else(|| "`time` must be a string".to_owned())?;
        let time = DateTime::parse_from_rfc3339(text)
            .map_err(|_| format!("`time` is `{}`, not an RFC 3339 timestamp", shown(text)))?;
        // The log keeps microseconds: finer digits would be lost later, so they are lost here.
        self.time = Some(
            DateTime::from_timestamp_micros(time.timestamp_micros())
                .ok_or_else(|| "`time` is out of range".to_owned())?,
        );
        Ok(())
    }

    /// A number, or in a header its digits.
    fn set_expected_version(&mut self, value: &Value) -> Result<(), String> {
        let number = match value {
            Value::Number(number) => number.as_i64(),
            Value::String(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => {
                text.parse().ok()
            }
            _ => None,
        };
        let allowed = |number: &i64| (0..=VERSION_MAX).contains(number);
        self.expected_version = Some(number.filter(allowed).ok_or_else(|| {
            format!("`expectedversion` must be an integer from 0 to {VERSION_MAX}")
        })?);
        Ok(())
    }

    fn set_extension(&mut self, name: &str, value: Value) -> Result<(), String> {
        let size = match &value {
            Value::String(text) => {
                check_characters(name, text)?;
                text.len()
            }
            Value::Bool(_) => 1,
            Value::Number(number) if number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => 4,
            Value::Number(_) => {
                return Err(format!(
                    "`{name}` must be an integer from -2147483648 to 2147483647"
                ));
            }
            _ => {
                return Err(format!(
                    "`{name}` must be a string, a boolean or an integer"
                ));
            }
        };
        if size > EXTENSION_MAX_BYTES {
            return Err(format!(
                "`{name}` is {size} bytes long, at most {EXTENSION_MAX_BYTES} are allowed"
            ));
        }
        if self.extensions.len() >= EXTENSIONS_MAX_COUNT {
            return Err(format!(
                "there are more than {EXTENSIONS_MAX_COUNT} extension attributes"
            ));
        }
        self.bytes += name.len() + size;
        self.extensions.insert(name.to_owned(), value);
        Ok(())
    }

    /// Whether `specversion` was given.
    pub(super) fn has_specversion(&self) -> bool {
        self.specversion.is_some()
    }

    /// The content type of the payload, if the event has said one.
    pub(super) fn data_content_type(&self) -> Option<&str> {
        self.data_content_type.as_deref()
    }

    /// Checks rules that concern several attributes.
    pub(super) fn check_together(&self, place: Place, faults: &mut Faults) {
        if self.expected_version.is_some() && self.key.is_none() {
            faults.add(
                place,
                "`expectedversion` is the version of a key, so it needs `partitionkey`",
            );
        } else if self.expected_version.is_some() && self.extensions.contains_key(DELIVER_AT) {
            faults.add(
                place,
                "an event has `expectedversion` or `deliverat`, not both",
            );
        }
    }

    /// Fills in missing attributes and makes the message.
    pub(super) fn into_message(
        mut self,
        number: usize,
        place: Place,
        data: Data,
        request: &Request<'_>,
        context: &Context<'_>,
    ) -> Result<Message, Error> {
        self.fill_in_trace(request);
        let size = self.bytes + data.bytes().len();
        if size > context.limits.message_bytes {
            return Err(Error::TooLarge {
                place,
                size,
                limit: context.limits.message_bytes,
            });
        }
        Ok(Message {
            id: self.id.unwrap_or_else(|| (context.new_id)(number)),
            source: self.source.unwrap_or_else(|| DEFAULT_SOURCE.to_owned()),
            kind: self.kind,
            topic: context.topic.clone(),
            key: self.key,
            subject: self.subject,
            time: self.time,
            data_content_type: self.data_content_type,
            data_schema: self.data_schema,
            data,
            extensions: self.extensions,
            expected_version: self.expected_version,
        })
    }

    /// The event's trace context wins over the request's, which fills it in when absent.
    fn fill_in_trace(&mut self, request: &Request<'_>) {
        if self.extensions.contains_key("traceparent") {
            return;
        }
        let Some(traceparent) = request.traceparent.filter(|text| is_traceparent(text)) else {
            return;
        };
        self.extensions
            .insert("traceparent".to_owned(), traceparent.into());
        if let Some(state) = request.tracestate.filter(|text| {
            (1..=512).contains(&text.len()) && text.bytes().all(|b| (0x20..0x7f).contains(&b))
        }) {
            self.extensions
                .insert("tracestate".to_owned(), state.into());
        }
    }
}

/// Whether a header is a W3C `traceparent`; one that is not counts as absent, as that standard says.
fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &str, length: usize| {
        part.len() == length
            && part
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    match parts.as_slice() {
        [version, trace, span, flags, rest @ ..] => {
            hex(version, 2)
                && *version != "ff"
                && (*version != "00" || rest.is_empty())
                && hex(trace, 32)
                && hex(span, 16)
                && hex(flags, 2)
                && text.len() <= 512
                && rest
                    .iter()
                    .all(|part| part.bytes().all(|b| b.is_ascii_graphic()))
        }
        _ => false,
    }
}

fn text_of(name: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        _ => Err(format!("`{name}` must be a string")),
    }
}

fn check_text(name: &str, text: &str, limit: usize) -> Result<(), String> {
    if text.is_empty() || text.len() > limit {
        return Err(format!(
            "`{name}` is {} bytes long, 1 to {limit} are allowed",
            text.len()
        ));
    }
    check_characters(name, text)
}

/// CloudEvents' strings have no control characters (and Postgres' text could not hold U+0000) and no noncharacters. The rule of every
/// way in.
///
/// # Errors
/// The first such character, as one clause.
pub fn check_characters(name: &str, text: &str) -> Result<(), String> {
    // Most are plain, and need not be taken apart into characters.
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Ok(());
    }
    let refused = |c: &char| {
        let code = u32::from(*c);
        c.is_control() || (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe
    };
    match text.chars().find(refused) {
        Some(character) => Err(format!(
            "`{name}` has the character U+{:04X}, which CloudEvents does not allow",
            u32::from(character)
        )),
        None => Ok(()),
    }
}

/// A payload that is not JSON: text if its type says so, and it is UTF-8 without U+0000, which not every JSON parser reads; bytes
/// otherwise.
pub(super) fn text_or_binary(essence: &str, bytes: Bytes) -> Data {
    let is_text = || !bytes.contains(&0) && std::str::from_utf8(&bytes).is_ok();
    if essence.starts_with("text/") && is_text() {
        Data::Text(bytes)
    } else {
        Data::Binary(bytes)
    }
}
