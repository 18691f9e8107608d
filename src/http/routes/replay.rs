//! Replay of a stream: JSON pages, or server-sent events that continue live.

use std::sync::Arc;

use axum::extract::State as Extract;
use axum::http::HeaderMap;
use axum::response::Response;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::streams::{OFFSET_MAX, parse_time};
use super::wire::{self, Event};
use crate::domain::id::Offset;
use crate::domain::message::Entry;
use crate::domain::name::{StreamName, Topic, TopicPattern};
use crate::http::accept::{self, wanted};
use crate::http::extract::{Named, Query};
use crate::http::follow::{self, Follow};
use crate::http::openapi::{NoStream, OffsetsLost, Reads, TooManyReaders};
use crate::http::problem::{FieldError, Kind, Place, Problem};
use crate::http::route::Routes;
use crate::http::state::State;
use crate::stream::Read;

/// Most patterns of one replay.
const REPLAY_PATTERNS_MAX: usize = 100;

/// A page of a stream.
#[derive(Serialize, ToSchema)]
#[schema(as = MessagePage)]
struct WirePage<'a> {
    /// By offset.
    messages: Vec<LoggedMessage<'a>>,
    /// Pass this as `after` to get the next page. It rises even when nothing matched.
    next_after: i64,
}

/// A message in the log.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct LoggedMessage<'a> {
    #[schema(minimum = 1)]
    offset: i64,
    #[schema(value_type = String)]
    topic: &'a Topic,
    #[schema(format = DateTime)]
    appended_at: String,
    #[schema(value_type = Event)]
    event: &'a RawValue,
}

impl<'a> LoggedMessage<'a> {
    /// A message of the log.
    pub(in crate::http) fn of(entry: &'a Entry) -> Self {
        Self {
            offset: entry.offset.0,
            topic: &entry.topic,
            appended_at: wire::time(entry.appended_at),
            event: wire::raw(entry),
        }
    }
}

pub(super) fn routes() -> Routes {
    Routes::new().routes(routes!(replay))
}

/// Where a replay starts, and what it keeps to.
struct Asked {
    from: From,
    topics: Option<Arc<[TopicPattern]>>,
    key: Option<String>,
}

enum From {
    /// The first message that there is.
    Start,
    /// After what the client has: whatever it misses, it must hear of.
    After(Offset),
    /// The first message of a time.
    Time(DateTime<Utc>),
}

/// Replay a stream: a page at a time, or with `Accept: text/event-stream` as server-sent events that continue live.
///
/// An event's `id` is the message's offset, and its `data` is the same JSON as in a page. A client that reconnects with
/// `Last-Event-ID` continues after it. A named event ends a stream of events: `too_slow` (the client read nothing for 30 seconds),
/// `offset_gone` (retention dropped messages before they were sent; `first_offset` is the first one left), `stream_deleted` or
/// `stopping`.
#[utoipa::path(
    get, path = "/v1/streams/{stream}/messages", tag = "streams", operation_id = "replay_stream",
    params(
        ("stream" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "main"),
        ("after" = Option<i64>, Query, description = "Only messages after this offset. If some of them are gone, \
            the answer is 410. By default from the first message left", minimum = 0, maximum = 9_007_199_254_740_991_i64),
        ("at" = Option<String>, Query, description = "Only messages appended at or after this time; not together with `after`",
            format = DateTime),
        ("topic" = Option<Vec<String>>, Query, description = "Only messages whose topic matches this pattern; can be repeated",
            max_items = 100),
        ("key" = Option<String>, Query, description = "Only messages with this ordering key", min_length = 1, max_length = 512),
        ("max_messages" = Option<i64>, Query, description = "For pages: at most this many messages; 100 by default", minimum = 1, maximum = 1000),
        ("max_bytes" = Option<i64>, Query, description = "For pages: at most this many bytes of events, but always at least one message; 4 MiB by default", minimum = 1, maximum = 16_777_216),
        ("Last-Event-ID" = Option<i64>, Header, description = "For server-sent events: the last id received; takes precedence over `after` and `at`",
            minimum = 0, maximum = 9_007_199_254_740_991_i64),
    ),
    responses(
        (status = 200, description = "A page, or server-sent events", content(
            (WirePage = "application/json"), (String = "text/event-stream"))),
        NoStream, OffsetsLost, TooManyReaders, Reads,
    ),
)]
async fn replay(
    Extract(state): Extract<State>,
    Named(name): Named<StreamName>,
    headers: HeaderMap,
    mut query: Query,
) -> Result<Response, Problem> {
    let is_live = wants_events(&headers);
    let mut asked = asked(&mut query);
    let max_messages = query.integer("max_messages", 1..=1_000);
    let max_bytes = query.integer("max_bytes", 1..=16 * 1024 * 1024);
    if is_live && (max_messages.is_some() || max_bytes.is_some()) {
        let detail = "server-sent events have neither `max_messages` nor `max_bytes`";
        query.fault("max_messages", detail.to_owned(), None);
    }
    query.finish()?;
    let last_event_id = last_event_id(&headers)?;
    if is_live && let Some(id) = last_event_id {
        asked.from = From::After(id);
    }
    let stream = &state.parts.stream;
    let found = stream.find(&name).await?;
    let (after, is_resumed) = match asked.from {
        From::Start => (Offset(0), false),
        From::After(after) if after.next() < found.first_offset => {
            return Err(lost(found.first_offset));
        }
        From::After(after) => {
            check_history(&state, &name, after).await?;
            (after, true)
        }
        From::Time(at) => (stream.offset_at(found.id, at).await?, false),
    };
    if is_live {
        let follow = Follow {
            stream: found.id,
            after,
            is_resumed,
            topics: asked.topics,
            key: asked.key,
        };
        return follow::open(&state, follow);
    }
    let most = usize::try_from(max_bytes.unwrap_or(4 * 1024 * 1024)).unwrap_or(1);
    let mut share = state.answers.hold(most).await?;
    let read = Read {
        stream: found.id,
        after,
        through: None,
        topics: asked.topics,
        key: asked.key,
        max_messages: usize::try_from(max_messages.unwrap_or(100)).unwrap_or(1),
        max_bytes: most,
    };
    let page = stream.read(read).await?;
    match page.lost_through {
        Some(floor) if is_resumed => Err(lost(floor.next())),
        _ => {
            let messages = page.entries.iter();
            let answer = WirePage {
                messages: messages.map(|entry| LoggedMessage::of(entry)).collect(),
                next_after: page.through.max(after).0,
            };
            let body = wire::printed(&answer);
            share.shrink(body.len());
            Ok(wire::json_counted(body, share))
        }
    }
}

/// Refuses a reader that has read what the stream does not have any more, since the broker's database went back in time: it would wait
/// for the offset that it knows, and pass over what comes before.
async fn check_history(state: &State, name: &StreamName, after: Offset) -> Result<(), Problem> {
    let last = state.parts.cluster.histories().last();
    let begun = last.and_then(|history| history.first_offsets.get(name.as_str()));
    let Some(&first_offset) = begun.filter(|first| after >= **first) else {
        return Ok(());
    };
    if after <= state.parts.stream.describe(name).await?.last_offset {
        return Ok(());
    }
    let detail = format!(
        "the broker's database went back in time: messages that were read from offset {first_offset} on are lost, and other messages come there"
    );
    Err(Problem::new(Kind::OffsetGone, detail).with("first_offset", first_offset.0))
}

fn lost(first_offset: Offset) -> Problem {
    let detail = format!(
        "retention dropped some of the requested messages; the first offset left is {first_offset}"
    );
    Problem::new(Kind::OffsetGone, detail).with("first_offset", first_offset.0)
}

/// Whether the client asks for server-sent events, and would not rather have JSON.
fn wants_events(headers: &HeaderMap) -> bool {
    let events = wanted(headers, "text/event-stream", &[]);
    accept::is_rather(events, wanted(headers, "application/json", &[]))
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<Offset>, Problem> {
    // An empty one is what a browser sends once an event had an empty id: as if it were absent (HTML, 9.2).
    let Some(value) = headers.get("last-event-id").filter(|id| !id.is_empty()) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(|text| text.parse().ok());
    match parsed {
        Some(id) if (0..=OFFSET_MAX).contains(&id) => Ok(Some(Offset(id))),
        _ => Err(Problem::invalid(vec![FieldError {
            place: Place::Header("last-event-id".to_owned()),
            detail: "`Last-Event-ID` must be the id of an event: an offset".to_owned(),
            allowed: None,
        }])),
    }
}

fn asked(query: &mut Query) -> Asked {
    let after = query.integer("after", 0..=OFFSET_MAX);
    let at = query.parsed("at", parse_time);
    if after.is_some() && at.is_some() {
        let detail = "`after` and `at` cannot be given together";
        query.fault("at", detail.to_owned(), None);
    }
    let topics = topics(query);
    let key = query.key();
    let from = match (after, at) {
        (Some(after), _) => From::After(Offset(after)),
        (None, Some(at)) => From::Time(at),
        (None, None) => From::Start,
    };
    Asked { from, topics, key }
}

fn topics(query: &mut Query) -> Option<Arc<[TopicPattern]>> {
    let texts = query.texts("topic");
    if texts.len() > REPLAY_PATTERNS_MAX {
        let detail = format!("`topic` can be given at most {REPLAY_PATTERNS_MAX} times");
        query.fault("topic", detail, None);
        return None;
    }
    let mut patterns = Vec::with_capacity(texts.len());
    for text in texts {
        match TopicPattern::parse(&text) {
            Ok(pattern) => patterns.push(pattern),
            Err(error) => {
                let shown: String = text.chars().take(100).collect();
                query.fault("topic", format!("`{shown}` {error}"), None);
            }
        }
    }
    (!patterns.is_empty()).then(|| patterns.into())
}
