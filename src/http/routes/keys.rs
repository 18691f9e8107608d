//! Keys of keyed streams: the last message of each, and one key's history with its version.

use axum::extract::State as Extract;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::replay::LoggedMessage;
use super::streams::OFFSET_MAX;
use super::wire;
use crate::domain::id::{Offset, StreamId};
use crate::domain::name::StreamName;
use crate::http::extract::{Key, Named, PathPart as _, Query};
use crate::http::openapi::{NoStream, NotKeyed, Reads};
use crate::http::problem::Problem;
use crate::http::route::Routes;
use crate::http::state::State;
use crate::stream::{self, KeyPage, KeyRead, KeysPage, KeysRead};

/// Bytes of events in a page unless asked for otherwise.
const PAGE_BYTES: i64 = 4 * 1024 * 1024;
const PAGE_MAX_BYTES: i64 = 16 * 1024 * 1024;

/// A key and its history.
#[derive(Serialize, ToSchema)]
#[schema(as = KeyHistory)]
struct WireHistory<'a> {
    key: &'a str,
    /// How many messages the key has had in the stream, dropped ones included: the version that the next message may expect. 0 if
    /// there was none.
    #[schema(minimum = 0)]
    version: i64,
    /// The offset of the key's last message; null if there was none.
    last_offset: Option<i64>,
    /// The first offset that the stream still has. Earlier messages of the key are missing here.
    first_offset: i64,
    /// By offset.
    messages: Vec<LoggedMessage<'a>>,
    /// Pass this as `after` to get the next page; null when this page reaches `last_offset`.
    next_after: Option<i64>,
}

/// Keys, each with its last message.
#[derive(Serialize, ToSchema)]
#[schema(as = KeysPage)]
struct WireKeys<'a> {
    /// By key, in byte order.
    keys: Vec<WireKey<'a>>,
    /// Pass this as `after` to get the next page; null at the end.
    next_after: Option<&'a str>,
}

/// A key and its last message.
#[derive(Serialize, ToSchema)]
#[schema(as = StreamKey)]
struct WireKey<'a> {
    key: &'a str,
    /// How many messages the key has had in the stream, dropped ones included.
    #[schema(minimum = 1)]
    version: i64,
    /// The offset of its last message.
    #[schema(minimum = 1)]
    last_offset: i64,
    /// Its last message; null when retention has dropped it.
    message: Option<LoggedMessage<'a>>,
}

pub(super) fn routes() -> Routes {
    Routes::new().routes(routes!(list)).routes(routes!(history))
}

/// List the keys of a keyed stream, each with its version and its last message.
///
/// Messages published meanwhile may or may not be included. Keys outlive their messages: retention drops messages, and the key stays
/// with its version.
#[utoipa::path(
    get, path = "/v1/streams/{stream}/keys", tag = "streams", operation_id = "list_keys",
    params(
        ("stream" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "orders"),
        ("after" = Option<String>, Query, description = "Only keys after this one", min_length = 1, max_length = 512),
        ("max_keys" = Option<i64>, Query, description = "At most this many; 100 by default", minimum = 1, maximum = 1000),
        ("max_bytes" = Option<i64>, Query, description = "At most this many bytes of events, but always at least one key; 4 MiB by default",
            minimum = 1, maximum = 16_777_216),
    ),
    responses((status = 200, description = "A page", body = WireKeys), NoStream, NotKeyed, Reads),
)]
async fn list(
    Extract(state): Extract<State>,
    Named(name): Named<StreamName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let after = query.parsed("after", Key::parse).map(|Key(key)| key);
    let max_keys = query.integer("max_keys", 1..=1_000).unwrap_or(100);
    let max_bytes = query.integer("max_bytes", 1..=PAGE_MAX_BYTES);
    query.finish()?;
    let stream = &state.parts.stream;
    let most = usize::try_from(max_bytes.unwrap_or(PAGE_BYTES)).unwrap_or(1);
    let mut share = state.answers.hold(most).await?;
    let read = KeysRead {
        stream: find_keyed(&state, &name).await?,
        after,
        max_keys: usize::try_from(max_keys).unwrap_or(1),
        max_bytes: most,
    };
    let page = stream.read_keys(read).await?;
    let body = wire::printed(&WireKeys::from(&page));
    share.shrink(body.len());
    Ok(wire::json_counted(body, share))
}

/// Read the history of a key of a keyed stream, in order, and its version.
///
/// The version and the messages are from one moment: a page whose `next_after` is null has all messages up to `version`. A key that
/// was never used has version 0 and no messages. Percent-encode slashes and other special characters of the key in the path.
#[utoipa::path(
    get, path = "/v1/streams/{stream}/keys/{key}", tag = "streams", operation_id = "read_key",
    params(
        ("stream" = String, Path, min_length = 1, max_length = 100, pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "orders"),
        ("key" = String, Path, min_length = 1, max_length = 512, example = "customer-7"),
        ("after" = Option<i64>, Query, description = "Only messages after this offset", minimum = 0, maximum = 9_007_199_254_740_991_i64),
        ("last" = Option<bool>, Query, description = "Only the last message"),
        ("max_messages" = Option<i64>, Query, description = "At most this many; 100 by default", minimum = 1, maximum = 1000),
        ("max_bytes" = Option<i64>, Query, description = "At most this many bytes of events, but always at least one message; 4 MiB by default",
            minimum = 1, maximum = 16_777_216),
    ),
    responses((status = 200, description = "A page", body = WireHistory), NoStream, NotKeyed, Reads),
)]
async fn history(
    Extract(state): Extract<State>,
    Named(name): Named<StreamName>,
    Named(Key(key)): Named<Key>,
    mut query: Query,
) -> Result<Response, Problem> {
    let after = query.integer("after", 0..=OFFSET_MAX);
    let last_only = query.parsed("last", |text| match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err("is neither `true` nor `false`"),
    });
    let max_messages = query.integer("max_messages", 1..=1_000).unwrap_or(100);
    let max_bytes = query.integer("max_bytes", 1..=PAGE_MAX_BYTES);
    query.finish()?;
    let stream = &state.parts.stream;
    let most = usize::try_from(max_bytes.unwrap_or(PAGE_BYTES)).unwrap_or(1);
    let mut share = state.answers.hold(most).await?;
    let read = KeyRead {
        stream: find_keyed(&state, &name).await?,
        key,
        after: Offset(after.unwrap_or(0)),
        last_only: last_only.unwrap_or(false),
        max_messages: usize::try_from(max_messages).unwrap_or(1),
        max_bytes: most,
    };
    let page = stream.read_key(read.clone()).await?;
    let body = wire::printed(&WireHistory::new(&read.key, &page));
    share.shrink(body.len());
    Ok(wire::json_counted(body, share))
}

async fn find_keyed(state: &State, name: &StreamName) -> Result<StreamId, Problem> {
    let found = state.parts.stream.find(name).await?;
    match found.is_keyed {
        true => Ok(found.id),
        false => Err(stream::Error::NotKeyed {
            stream: name.to_string(),
        }
        .into()),
    }
}

impl<'a> From<&'a KeysPage> for WireKeys<'a> {
    fn from(page: &'a KeysPage) -> Self {
        let keys = page.keys.iter().map(|key| WireKey {
            key: &key.key,
            version: key.version,
            last_offset: key.last_offset.0,
            message: key.entry.as_deref().map(LoggedMessage::of),
        });
        Self {
            keys: keys.collect(),
            next_after: page.next_after.as_deref(),
        }
    }
}

impl<'a> WireHistory<'a> {
    fn new(key: &'a str, page: &'a KeyPage) -> Self {
        let messages = page.entries.iter();
        Self {
            key,
            version: page.version,
            last_offset: page.last_offset.map(|offset| offset.0),
            first_offset: page.first_offset.0,
            messages: messages.map(|entry| LoggedMessage::of(entry)).collect(),
            next_after: page.next_after.map(|offset| offset.0),
        }
    }
}
