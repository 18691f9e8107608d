//! Structured mode and batches: CloudEvents' JSON format. Payloads stay the raw text that arrived.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use bytes::Bytes;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::attributes::{Attributes, shown};
use super::{Context, Error, Fault, Faults, Place, Request, essence, is_json};
use crate::domain::json;
use crate::domain::message::{Data, Message};

/// The members of a JSON object in the order they came, values as raw text.
pub(super) struct Members<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> serde::Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;

        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object with the attributes of a CloudEvent")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members: Vec<(Cow<'de, str>, &'de RawValue)> = Vec::new();
                while let Some((Name(name), value)) = map.next_entry::<Name<'de>, _>()? {
                    // An event has at most 64 extensions beside a dozen attributes: more are a mistake or an attack on
                    // the search for duplicates.
                    if members.len() >= 128 {
                        return Err(A::Error::custom("an event has at most 128 members"));
                    }
                    members.push((name, value));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(MembersVisitor)
    }
}

/// A member's name; borrowed unless it has escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

pub(super) fn parse_one(
    request: &Request<'_>,
    context: &Context<'_>,
) -> Result<Vec<Message>, Error> {
    let text = checked(&request.body)?;
    let mut faults = Faults::default();
    let message = event(text, "", 0, request, context, &mut faults)?;
    finish(message.into_iter().collect(), faults)
}

pub(super) fn parse_batch(
    request: &Request<'_>,
    context: &Context<'_>,
) -> Result<Vec<Message>, Error> {
    let text = checked(&request.body)?;
    let mut faults = Faults::default();
    let Ok(events) = serde_json::from_str::<Vec<&RawValue>>(text) else {
        faults.add(Place::Body(String::new()), "a batch must be a JSON array");
        return Err(Error::Invalid(faults.0));
    };
    let limit = context.limits.message_count;
    if events.len() > limit {
        faults.add(
            Place::Body(String::new()),
            format!(
                "the batch has {} events, at most {limit} are allowed",
                events.len()
            ),
        );
        return Err(Error::Invalid(faults.0));
    }
    let mut messages = Vec::with_capacity(events.len());
    for (number, raw) in events.into_iter().enumerate() {
        let place = format!("/{number}");
        messages.extend(event(
            raw.get(),
            &place,
            number,
            request,
            context,
            &mut faults,
        )?);
        if faults.is_full() {
            break;
        }
    }
    finish(messages, faults)
}

pub(super) fn parse_event(
    text: &str,
    place: &str,
    number: usize,
    request: &Request<'_>,
    context: &Context<'_>,
) -> Result<Message, Error> {
    let mut faults = Faults::default();
    let message = match json::check_envelope(text.as_bytes()) {
        Ok(_) | Err(json::Error::TooDeep { .. }) => {
            event(text, place, number, request, context, &mut faults)?
        }
        Err(error) => return Err(refused(error, "the event", place)),
    };
    message.ok_or(Error::Invalid(faults.0))
}

pub(super) fn finish(messages: Vec<Message>, faults: Faults) -> Result<Vec<Message>, Error> {
    if faults.0.is_empty() {
        Ok(messages)
    } else {
        Err(Error::Invalid(faults.0))
    }
}

/// The body as JSON text. The scan ends at the first fault, so what stands behind it is not known to be fit for an answer. Two kinds of fault
/// outside payloads pass, and only since each refuses its event for certain when the attributes are read: a name twice, and nesting, which no
/// attribute may have. There they are named with all other faults; the nesting of payloads is checked per payload, since its limit counts from
/// there.
pub(super) fn checked(body: &Bytes) -> Result<&str, Error> {
    match json::check_envelope(body) {
        Err(error) if !is_found_again(&error) => Err(refused(error, "the body", "")),
        _ => Ok(std::str::from_utf8(body).expect("checked first of all")),
    }
}

/// True if the fault also refuses its event when the event is read.
fn is_found_again(error: &json::Error) -> bool {
    match error {
        json::Error::TooDeep { .. } => true,
        // `data` twice is a fault of the event, a name twice within it is the payload's.
        json::Error::Duplicate { pointer, .. } => {
            let mut steps = pointer.split('/');
            steps.next_back();
            !steps.any(|step| step == "data")
        }
        json::Error::NotUtf8 { .. }
        | json::Error::Syntax { .. }
        | json::Error::Unreadable { .. } => false,
    }
}

/// The refusal of a text. `place` is its own JSON pointer in its request.
pub(super) fn refused(error: json::Error, what: &str, place: &str) -> Error {
    match error.pointer() {
        Some(pointer) => Error::Invalid(vec![Fault {
            place: Place::Body(format!("{place}{pointer}")),
            detail: format!("{what} {error}"),
        }]),
        None => Error::NotJson(error),
    }
}

/// One event; `None` when it added faults.
pub(super) fn event(
    text: &str,
    place: &str,
    number: usize,
    request: &Request<'_>,
    context: &Context<'_>,
    faults: &mut Faults,
) -> Result<Option<Message>, Error> {
    let before = faults.0.len();
    let whole = || Place::Body(place.to_owned());
    let members = match serde_json::from_str::<Members<'_>>(text) {
        Ok(Members(members)) => members,
        Err(error) => {
            // The position in the text is that of the event, not of the body: it would mislead.
            let detail = error.to_string();
            let detail = detail.split(" at line ").next().unwrap_or_default();
            faults.add(whole(), detail);
            return Ok(None);
        }
    };
    let mut attributes = Attributes::default();
    let (mut data, mut data_base64) = (None, None);
    for (index, (name, raw)) in members.iter().enumerate() {
        let at = || Place::Body(format!("{place}/{}", escape(&shown(name))));
        if members[..index].iter().any(|(other, _)| other == name) {
            faults.add(at(), format!("`{}` is given more than once", shown(name)));
            continue;
        }
        match &**name {
            "data" => data = Some(raw.get()),
            "data_base64" => data_base64 = Some(raw.get()),
            name => match serde_json::from_str::<Value>(raw.get()) {
                // JSON format, 2.2: a null attribute is one that is not set.
                Ok(Value::Null) => {}
                Ok(value) => attributes.set(name, value, at(), faults),
                Err(_) => faults.add(
                    at(),
                    format!(
                        "`{}` must be a string, a boolean or an integer",
                        shown(name)
                    ),
                ),
            },
        }
    }
    if !attributes.has_specversion() && faults.0.len() == before {
        faults.add(
            Place::Body(format!("{place}/specversion")),
            "`specversion` is missing: it must be \"1.0\"",
        );
    }
    attributes.check_together(whole(), faults);
    let payload = payload(data, data_base64, place, &attributes, request, faults);
    if faults.0.len() > before {
        return Ok(None);
    }
    attributes
        .into_message(number, whole(), payload, request, context)
        .map(Some)
}

pub(super) fn payload(
    data: Option<&str>,
    data_base64: Option<&str>,
    place: &str,
    attributes: &Attributes,
    request: &Request<'_>,
    faults: &mut Faults,
) -> Data {
    let base64_place = || Place::Body(format!("{place}/data_base64"));
    match (data, data_base64) {
        (None, None) => Data::Absent,
        (Some(_), Some(_)) => {
            faults.add(
                base64_place(),
                "an event has `data` or `data_base64`, not both",
            );
            Data::Absent
        }
        (None, Some(raw)) => {
            let decoded = serde_json::from_str::<Cow<'_, str>>(raw)
                .ok()
                .and_then(|text| {
                    base64::engine::general_purpose::STANDARD
                        .decode(text.as_bytes())
                        .ok()
                });
            let Some(bytes) = decoded else {
                faults.add(
                    base64_place(),
                    "`data_base64` must be a string of base64 (RFC 4648, section 4, with padding)",
                );
                return Data::Absent;
            };
            Data::Binary(bytes.into())
        }
        (Some(raw), None) => {
            let essence = essence(attributes.data_content_type().unwrap_or("application/json"));
            if !is_json(&essence) && raw.starts_with('"') {
                // Not JSON by its type, so the JSON string only carries it.
                match serde_json::from_str::<String>(raw) {
                    Ok(text) => return Data::Text(text.into()),
                    Err(_) => faults.add(
                        Place::Body(format!("{place}/data")),
                        "`data` is not a string of Unicode characters",
                    ),
                }
            }
            if let Err(error) = json::check_depth(raw) {
                faults.add(
                    Place::Body(format!("{place}/data")),
                    format!("`data` {error}"),
                );
            }
            Data::Json(share(&request.body, raw))
        }
    }
}

/// The text as a part of the body it stands in, without a copy; a copy when it stands elsewhere.
fn share(body: &Bytes, text: &str) -> Bytes {
    let (start, part) = (body.as_ptr() as usize, text.as_ptr() as usize);
    if part >= start && part + text.len() <= start + body.len() {
        body.slice(part - start..part - start + text.len())
    } else {
        Bytes::copy_from_slice(text.as_bytes())
    }
}

/// A member's name as a step of a JSON pointer.
pub(super) fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}
