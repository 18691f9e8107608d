//! Several messages, each with its topic: `{"messages": [{"topic": …, "event": {…}}, {"topic": …, "data": …, "key": …}]}`.
//! An item carries a CloudEvent in JSON format, or a payload that becomes one.

use serde_json::Value;
use serde_json::value::RawValue;

use super::attributes::{Attributes, shown};
use super::structured::{self, Members};
use super::{Context, Error, Faults, Limits, Place, Request};
use crate::domain::message::Message;
use crate::domain::name::Topic;

/// The members that an item without `event` may have beside its topic, each with the attribute that it becomes.
const PLAIN: [(&str, &str); 4] = [
    ("id", "id"),
    ("key", "partitionkey"),
    ("expected_version", "expectedversion"),
    ("deliver_at", "deliverat"),
];

pub(super) fn parse(
    request: &Request<'_>,
    limits: Limits,
    new_id: &dyn Fn(usize) -> String,
) -> Result<Vec<Message>, Error> {
    let text = structured::checked(&request.body)?;
    let mut faults = Faults::default();
    let items = items(text, limits, &mut faults);
    let mut messages = Vec::with_capacity(items.len());
    for (number, raw) in items.into_iter().enumerate() {
        let item = Item {
            number,
            place: format!("/messages/{number}"),
            request,
            limits,
            new_id,
        };
        messages.extend(item.parse(raw.get(), &mut faults)?);
        if faults.is_full() {
            break;
        }
    }
    structured::finish(messages, faults)
}

/// The items of the body; none when it has faults.
fn items<'t>(text: &'t str, limits: Limits, faults: &mut Faults) -> Vec<&'t RawValue> {
    let mut fault = |pointer: String, detail: String| {
        faults.add(Place::Body(pointer), detail);
        Vec::new()
    };
    let expected = "the body must be an object with an array `messages`";
    let Ok(Members(members)) = serde_json::from_str::<Members<'_>>(text) else {
        return fault(String::new(), expected.to_owned());
    };
    let mut items = None;
    for (name, raw) in members {
        match serde_json::from_str::<Vec<&RawValue>>(raw.get()) {
            Ok(found) if name == "messages" && items.is_none() => items = Some(found),
            _ if name == "messages" => {
                return fault("/messages".to_owned(), expected.to_owned());
            }
            _ => {
                let pointer = format!("/{}", structured::escape(&shown(&name)));
                return fault(pointer, format!("unknown field `{}`", shown(&name)));
            }
        }
    }
    match items {
        None => fault("/messages".to_owned(), expected.to_owned()),
        Some(items) if items.len() > limits.message_count => fault(
            "/messages".to_owned(),
            format!(
                "there are {} messages, at most {} are allowed",
                items.len(),
                limits.message_count
            ),
        ),
        Some(items) => items,
    }
}

/// An item's place, and the context to read it in.
struct Item<'a> {
    number: usize,
    place: String,
    request: &'a Request<'a>,
    limits: Limits,
    new_id: &'a dyn Fn(usize) -> String,
}

impl Item<'_> {
    /// The message of the item; `None` when it added faults.
    fn parse(&self, text: &str, faults: &mut Faults) -> Result<Option<Message>, Error> {
        let Ok(Members(members)) = serde_json::from_str::<Members<'_>>(text) else {
            faults.add(
                Place::Body(self.place.clone()),
                "an item must be an object with `topic` and `event` or `data`",
            );
            return Ok(None);
        };
        let before = faults.0.len();
        let mut attributes = Attributes::default();
        let (mut topic, mut event, mut data) = (None, None, None);
        for (index, (name, raw)) in members.iter().enumerate() {
            let place = self.at(name);
            if members[..index].iter().any(|(other, _)| other == name) {
                let detail = format!("`{}` is given more than once", shown(name));
                faults.add(place, detail);
                continue;
            }
            match &**name {
                "topic" => topic = self.topic(raw, faults),
                "event" => event = Some(raw.get()),
                "data" => data = Some(raw.get()),
                name => match PLAIN.iter().find(|(member, _)| *member == name) {
                    Some((_, attribute)) => match serde_json::from_str::<Value>(raw.get()) {
                        Ok(value) => attributes.set(attribute, value, place, faults),
                        Err(_) => faults.add(place, format!("`{name}` must be a string")),
                    },
                    None => faults.add(place, format!("unknown field `{}`", shown(name))),
                },
            }
        }
        if !members.iter().any(|(name, _)| name == "topic") {
            faults.add(self.at("topic"), "`topic` is missing");
        }
        if event.is_some() && members.len() > 2 {
            let detail = "an item with `event` can only have `topic` besides: everything else belongs in the event";
            faults.add(self.at("event"), detail);
        }
        let (Some(topic), true) = (topic, faults.0.len() == before) else {
            return Ok(None);
        };
        let context = Context {
            topic: &topic,
            limits: self.limits,
            new_id: self.new_id,
        };
        if let Some(event) = event {
            let place = format!("{}/event", self.place);
            return structured::event(event, &place, self.number, self.request, &context, faults);
        }
        if data.is_some() {
            let json = Value::from("application/json");
            attributes.set("datacontenttype", json, self.at("data"), faults);
        }
        attributes.check_together(Place::Body(self.place.clone()), faults);
        let payload =
            structured::payload(data, None, &self.place, &attributes, self.request, faults);
        if faults.0.len() > before {
            return Ok(None);
        }
        let place = Place::Body(self.place.clone());
        attributes
            .into_message(self.number, place, payload, self.request, &context)
            .map(Some)
    }

    fn topic(&self, raw: &RawValue, faults: &mut Faults) -> Option<Topic> {
        let Ok(text) = serde_json::from_str::<String>(raw.get()) else {
            faults.add(self.at("topic"), "`topic` must be a string");
            return None;
        };
        match Topic::parse(&text) {
            Ok(topic) => Some(topic),
            Err(error) => {
                faults.add(self.at("topic"), format!("the topic {error}"));
                None
            }
        }
    }

    fn at(&self, name: &str) -> Place {
        Place::Body(format!(
            "{}/{}",
            self.place,
            structured::escape(&shown(name))
        ))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::domain::message::Data;

    fn parse(body: &str, traceparent: Option<&str>) -> Result<Vec<Message>, Error> {
        let request = Request {
            traceparent,
            body: body.as_bytes().to_vec().into(),
            ..Request::default()
        };
        let limits = Limits {
            message_count: 3,
            message_bytes: 2_000,
        };
        super::parse(&request, limits, &|number| format!("new-{number}"))
    }

    #[test]
    fn items_become_messages() {
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let messages = parse(
            r#"{"messages": [
                {"topic": "a.b", "data": {"x" : 1.50}, "key": "k"},
                {"event": {"specversion": "1.0", "id": "e", "source": "/s", "subject": "y", "traceparent": "own",
                    "data_base64": "AP8="}, "topic": "c"},
                {"topic": "d", "id": "own"}
            ]}"#,
            Some(trace),
        )
        .unwrap();
        let [first, second, third] = messages.as_slice() else {
            panic!("{messages:?}");
        };
        assert_eq!((first.topic.as_str(), first.id.as_str()), ("a.b", "new-0"));
        assert_eq!(first.key.as_deref(), Some("k"));
        assert_eq!(first.data, Data::Json(r#"{"x" : 1.50}"#.into()));
        assert_eq!(first.data_content_type.as_deref(), Some("application/json"));
        assert_eq!(first.extensions["traceparent"], trace);
        assert_eq!((second.topic.as_str(), second.id.as_str()), ("c", "e"));
        assert_eq!(second.subject.as_deref(), Some("y"));
        assert_eq!(second.data, Data::Binary(vec![0, 255].into()));
        assert_eq!(second.extensions["traceparent"], "own");
        assert_eq!((third.topic.as_str(), third.id.as_str()), ("d", "own"));
        assert_eq!(third.data, Data::Absent);
        assert_eq!(third.data_content_type, None);
        assert_eq!(parse(r#"{"messages": []}"#, None), Ok(Vec::new()));
    }

    #[test]
    fn every_fault_is_named_with_its_item() {
        for (body, faults) in [
            ("[]", vec![": the body must be an object"]),
            ("{}", vec!["/messages: the body must be"]),
            (r#"{"messages": {}}"#, vec!["/messages: the body must be"]),
            (
                r#"{"messages": [], "messages": []}"#,
                vec!["/messages: the body must be"],
            ),
            (r#"{"topic": "a"}"#, vec!["/topic: unknown field"]),
            (
                r#"{"messages": [{"topic":"a"},{"topic":"a"},{"topic":"a"},{"topic":"a"}]}"#,
                vec!["/messages: there are 4"],
            ),
            (
                r#"{"messages": [1, {"data": 1}, {"topic": "a..b"}]}"#,
                vec![
                    "/messages/0: an item must be",
                    "/messages/1/topic: `topic` is missing",
                    "/messages/2/topic: the topic",
                ],
            ),
            (
                r#"{"messages": [{"topic": 1}, {"topic": "a", "key": ""}, {"topic": "a", "id": null}]}"#,
                vec![
                    "/messages/0/topic: `topic` must be a string",
                    "/messages/1/key: `partitionkey` is 0 bytes",
                    "/messages/2/id: `id` must be a string",
                ],
            ),
            (
                r#"{"messages": [{"topic": "a", "a/b": 1}, {"topic": "a", "topic": "b"}]}"#,
                vec![
                    "/messages/0/a~1b: unknown field `a/b`",
                    "/messages/1/topic: `topic` is given more than once",
                ],
            ),
            (
                r#"{"messages": [{"topic": "a", "event": {"id": "x"}},
                    {"topic": "a", "event": {"specversion": "1.0", "Bad": 1, "deliverat": "x"}},
                    {"topic": "a", "event": {"specversion": "1.0"}, "key": "k"}]}"#,
                vec![
                    "/messages/0/event/specversion: `specversion` is missing",
                    "/messages/1/event/Bad: the attribute name",
                    "/messages/1/event/deliverat: `deliverat`",
                    "/messages/2/event: an item with `event`",
                ],
            ),
        ] {
            let Err(Error::Invalid(found)) = parse(body, None) else {
                panic!("{body} is valid");
            };
            let found: Vec<String> = found
                .iter()
                .map(|fault| match &fault.place {
                    Place::Body(pointer) => format!("{pointer}: {}", fault.detail),
                    Place::Header(name) => panic!("{name}"),
                })
                .collect();
            assert_eq!(found.len(), faults.len(), "{body}: {found:?}");
            for (found, expected) in found.iter().zip(faults) {
                assert!(found.starts_with(expected), "{found} is not {expected}");
            }
        }
        assert!(matches!(parse("{", None), Err(Error::NotJson(_))));
        let large = format!(
            r#"{{"messages": [{{"topic": "a", "data": "{}"}}]}}"#,
            "x".repeat(2_000)
        );
        let Err(Error::TooLarge { place, .. }) = parse(&large, None) else {
            panic!("not too large");
        };
        assert_eq!(place, Place::Body("/messages/0".into()));
    }
}
