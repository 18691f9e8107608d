//! The outermost layers: a request's id, its metrics and its log line, panics, and the rendering of problems.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State as Extract};
use axum::http::{HeaderName, HeaderValue, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt as _;
use uuid::Uuid;

use super::body::Outgoing;
use super::problem::{Kind, Problem};
use super::state::State;
use super::{budget, door, forward};
use crate::failpoint;

/// The header that carries a request's id, both ways.
pub(in crate::http) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Headers that each answer gets here, and those that HTTP/1.1 adds.
const ADDED_HEADERS: usize = 8;
/// How long the connection stays open.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// A request's id: the client's if it is fit for a log, or a new one.
#[derive(Debug)]
pub(in crate::http) struct RequestId(HeaderValue);

impl RequestId {
    /// Of a request.
    pub(in crate::http) fn of(request: &Request) -> Self {
        let given = request.headers().get(REQUEST_ID).filter(|value| {
            (1..=128).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
        });
        Self(given.cloned().unwrap_or_else(|| {
            let mut text = Uuid::encode_buffer();
            let id = Uuid::new_v4().hyphenated().encode_lower(&mut text);
            HeaderValue::from_str(id).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
        }))
    }

    /// As a header.
    pub(in crate::http) fn header(&self) -> HeaderValue {
        self.0.clone()
    }

    /// For a log or an answer.
    pub(in crate::http) fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

/// Counts a request for as long as it is worked on, also when its client goes away.
struct InFlight(prometheus_client::metrics::gauge::Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The layer around all routes.
pub(in crate::http) async fn observe(
    Extract(state): Extract<State>,
    mut request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    let metrics = &state.parts.metrics;
    metrics.in_flight.inc();
    let _in_flight = InFlight(metrics.in_flight.clone());
    let id = RequestId::of(&request);
    let (method, version) = (request.method().clone(), request.version());
    let uri = request.uri().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    // For the node that it may be passed on to.
    request.headers_mut().insert(REQUEST_ID, id.header());
    let span = tracing::info_span!("request", id = id.as_str());
    // A node reads an answer at once, and lets its client take its time.
    let outgoing = match forward::is_from_node(&state, request.headers()) {
        true => None,
        false => request.extensions().get::<Outgoing>().cloned(),
    };
    let answering = AssertUnwindSafe(answer(&state, request, next)).catch_unwind();
    let answered = tracing::Instrument::instrument(answering, span).await;
    let answered = answered.unwrap_or_else(|panic| panicked(&*panic));
    let answered = budget::carry(&state.answers, outgoing.as_ref(), answered).await;
    failpoint::reach("http.answer_decided");
    let mut response = finish(answered, uri.path(), id.as_str());
    let headers = response.headers_mut();
    headers.reserve(ADDED_HEADERS);
    headers.insert(REQUEST_ID, id.header());
    door::protect(headers);
    if version == Version::HTTP_11
        && let Some(hint) = &state.keep_alive
    {
        headers.insert(KEEP_ALIVE, hint.clone());
    }
    let (status, took) = (response.status().as_u16(), started.elapsed());
    metrics.record(&method, route, status, took);
    let (id, path) = (id.as_str(), uri.path());
    tracing::debug!(id, %method, path, status, ?took, "answered");
    response
}

/// Past the door, and to the node whose work it is.
async fn answer(state: &State, request: Request, next: Next) -> Response {
    match door::pass(state, request).await {
        Ok(request) => forward::forward(state, request, next).await,
        Err(refused) => refused,
    }
}

/// Renders the problem that an answer carries, keeping headers that a layer added, `Allow` above all.
pub(in crate::http) fn finish(mut response: Response, path: &str, id: &str) -> Response {
    let Some(problem) = response.extensions_mut().remove::<Problem>() else {
        return response;
    };
    let mut rendered = problem.render(path, id);
    for (name, value) in response.headers() {
        if name != axum::http::header::CONTENT_LENGTH && !rendered.headers().contains_key(name) {
            rendered.headers_mut().insert(name.clone(), value.clone());
        }
    }
    rendered
}

/// No such path.
pub(in crate::http) async fn not_found() -> Problem {
    Problem::new(Kind::NotFound, "there is nothing at this path")
}

/// No such method on a path that exists; the router adds `Allow`.
pub(in crate::http) async fn method_not_allowed() -> Problem {
    Problem::new(Kind::MethodNotAllowed, "the path does not take this method")
}

/// A handler panicked: a defect, logged here and told to the client in general terms.
fn panicked(panic: &(dyn Any + Send)) -> Response {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a message");
    tracing::error!(panic = text, "a request handler panicked");
    Problem::new(
        Kind::Internal,
        "an internal error; the broker's log has the details",
    )
    .into_response()
}
