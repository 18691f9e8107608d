//! Messages of a stream as server-sent events, around the same JSON as pages have.

use bytes::Bytes;
use serde_json::json;

use crate::domain::id::Offset;
use crate::domain::message::Entry;
use crate::http::routes::wire;

/// The approximate overhead around an event's bytes.
pub(super) const AROUND_BYTES: usize = 256;

/// A message as a server-sent event whose id is its offset. The end of a line inside of the event can only be white space
/// between JSON tokens; it becomes one of the protocol's, which every client puts together again as a line feed.
pub(super) fn put_event(out: &mut Vec<u8>, entry: &Entry) {
    out.extend_from_slice(b"id: ");
    wire::put(out, &entry.offset);
    out.extend_from_slice(b"\ndata: {\"offset\":");
    wire::put(out, &entry.offset);
    out.extend_from_slice(b",\"topic\":");
    wire::put(out, &entry.topic);
    out.extend_from_slice(b",\"appended_at\":");
    wire::put(out, &wire::time(entry.appended_at));
    out.extend_from_slice(b",\"event\":");
    let mut rest: &[u8] = &entry.event;
    while let Some(end) = rest.iter().position(|&byte| matches!(byte, b'\n' | b'\r')) {
        out.extend_from_slice(&rest[..end]);
        out.extend_from_slice(b"\ndata: ");
        let is_pair = rest[end..].starts_with(b"\r\n");
        rest = &rest[end + if is_pair { 2 } else { 1 }..];
    }
    out.extend_from_slice(rest);
    out.extend_from_slice(b"}\n\n");
}

/// The first bytes of every answer: how long a client waits before it connects again, in milliseconds.
pub(super) const HELLO: &[u8] = b"retry: 1000\n\n";

/// A sign of life. It moves the client's last id too, over what did not match its filter.
pub(super) fn heartbeat(position: Offset) -> Bytes {
    if position.0 == 0 {
        Bytes::from_static(b": heartbeat\n\n")
    } else {
        format!(": heartbeat\nid: {position}\n\n").into()
    }
}

/// An event of the broker's own, which has a name where messages have none.
pub(super) fn notice(name: &str, detail: &str, first_offset: Option<Offset>) -> Bytes {
    let mut data = json!({"detail": detail});
    if let Some(offset) = first_offset {
        data["first_offset"] = offset.0.into();
    }
    format!("event: {name}\ndata: {data}\n\n").into()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::domain::id::StreamId;
    use crate::domain::message::{Data, Message};
    use crate::domain::name::Topic;
    use crate::http::routes::LoggedMessage;

    /// The `data` that a client puts together, by the rules of the HTML standard.
    fn data(text: &str) -> String {
        let lines = text.lines().filter_map(|line| line.strip_prefix("data: "));
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn line_ends_inside_of_json_come_out_as_line_feeds() {
        for (raw, expected) in [
            ("{\"a\":1}", "{\"a\":1}"),
            ("{\n \"a\": 1\r\n}", "{\n \"a\": 1\n}"),
            ("[1,\r2,\n\n3]", "[1,\n2,\n\n3]"),
        ] {
            let message = Message {
                id: "1".into(),
                source: "/s".into(),
                kind: None,
                topic: Topic::parse("a.b").unwrap(),
                key: None,
                subject: None,
                time: None,
                data_content_type: None,
                data_schema: None,
                data: Data::Json(Bytes::copy_from_slice(raw.as_bytes())),
                extensions: serde_json::Map::new(),
                expected_version: None,
            };
            let entry = crate::stream::entry(
                StreamId(1),
                Offset(7),
                DateTime::from_timestamp(1_700_000_000, 0).unwrap(),
                &message,
            );
            let mut text = Vec::new();
            put_event(&mut text, &entry);
            let text = String::from_utf8(text).unwrap();
            assert!(text.starts_with("id: 7\ndata: {"), "{text}");
            assert!(text.ends_with("}\n\n"), "{text}");
            let data = data(&text);
            assert!(data.contains(expected), "{text}");
            // But for the ends of lines it is what a page has.
            let page = serde_json::to_string(&LoggedMessage::of(&entry)).unwrap();
            assert_eq!(data, page.replace("\r\n", "\n").replace('\r', "\n"));
        }
    }
}
