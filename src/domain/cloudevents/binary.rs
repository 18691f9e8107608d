//! Binary mode, and plain bodies, which are binary mode without any attribute: the body is the payload.

use std::borrow::Cow;

use percent_encoding::percent_decode;
use serde_json::Value;

use super::attributes::{Attributes, text_or_binary};
use super::{Context, Error, Fault, Faults, Place, Request, essence, is_json};
use crate::domain::json;
use crate::domain::message::{Data, Message};

/// The type of a body without a content type; `curl -d` has another for every body.
const JSON: &str = "application/json";

pub(super) fn parse(request: &Request<'_>, context: &Context<'_>) -> Result<Vec<Message>, Error> {
    let mut faults = Faults::default();
    let mut attributes = Attributes::default();
    for (index, (name, value)) in request.attributes.iter().enumerate() {
        let place = || Place::Header(format!("ce-{name}"));
        if request.attributes[..index]
            .iter()
            .any(|(other, _)| other == name)
        {
            faults.add(place(), format!("`ce-{name}` is given more than once"));
            continue;
        }
        if *name == "datacontenttype" {
            faults.add(
                place(),
                "in this mode the header `Content-Type` gives the payload's type",
            );
            continue;
        }
        match decode(value) {
            Some(text) => attributes.set(name, Value::String(text), place(), &mut faults),
            None => faults.add(place(), format!("`ce-{name}` does not decode to UTF-8")),
        }
    }
    let content_type = match request.content_type {
        Some(found) if essence(found) == "application/x-www-form-urlencoded" => JSON,
        Some(found) if !found.trim().is_empty() => found.trim(),
        _ => JSON,
    };
    let place = || Place::Header("content-type".to_owned());
    attributes.set("datacontenttype", content_type.into(), place(), &mut faults);
    attributes.check_together(Place::Header("ce-expectedversion".to_owned()), &mut faults);
    // A payload that is too large is refused before it is read.
    let data = match request.body.len() > context.limits.message_bytes {
        true => Data::Binary(request.body.clone()),
        false => data(content_type, request, &mut faults),
    };
    if !faults.0.is_empty() {
        return Err(Error::Invalid(faults.0));
    }
    let place = Place::Body(String::new());
    attributes
        .into_message(0, place, data, request, context)
        .map(|message| vec![message])
}

fn data(content_type: &str, request: &Request<'_>, faults: &mut Faults) -> Data {
    let essence = essence(content_type);
    let body = request.body.clone();
    // An empty body is an empty payload, whatever its type: there is nothing that could be wrong JSON.
    if !is_json(&essence) || body.is_empty() {
        return text_or_binary(&essence, body);
    }
    if let Err(error) = json::check(&body) {
        let hint = match request.content_type {
            Some(found) if is_json(&self::essence(found)) => "",
            _ => {
                "; a body without a content type counts as JSON: send `Content-Type: text/plain` \
                  or `application/octet-stream` for others"
            }
        };
        faults.0.push(Fault {
            place: Place::Body(error.pointer().unwrap_or_default().to_owned()),
            detail: format!("the body {error}{hint}"),
        });
    }
    Data::Json(body)
}

/// Decodes the value of a `ce-` header: quotes off, then one round of percent-decoding (HTTP binding, 3.1.3.2).
fn decode(value: &[u8]) -> Option<String> {
    let value = value.trim_ascii();
    let unquoted = match value {
        [b'"', inner @ .., b'"'] => {
            let mut out = Vec::with_capacity(inner.len());
            let mut bytes = inner.iter();
            while let Some(byte) = bytes.next() {
                match byte {
                    b'\\' => out.extend(bytes.next()),
                    byte => out.push(*byte),
                }
            }
            Cow::Owned(out)
        }
        other => Cow::Borrowed(other),
    };
    percent_decode(&unquoted)
        .decode_utf8()
        .ok()
        .map(Cow::into_owned)
}
