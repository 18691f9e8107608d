//! The outermost layers: a request's id, its metrics and its log line, panics, and the rendering of problems.

use std::any::Any;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State as Extract};
use axum::http::{HeaderName, HeaderValue, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use super::body::Outgoing;
use super::problem::{Kind, Problem};
use super::state::State;
use super::{budget, door, forward};
use crate::failpoint;

/// The header that carries a request's id, both ways.
pub(in crate::http) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// How long the connection stays open.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// Takes the client's id if it is fit for a log, or makes one.
pub(in crate::http) fn request_id(request: &Request) -> String {
    request
        .headers()
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|text| {
            (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
        })
        .map_or_else(|| Uuid::new_v4().to_string(), str::to_owned)
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
    let id = request_id(&request);
    let (method, version) = (request.method().clone(), request.version());
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    if let Ok(value) = HeaderValue::from_str(&id) {
        // For the node that it may be passed on to.
        request.headers_mut().insert(REQUEST_ID, value);
    }
    let span = tracing::info_span!("request", id);
    // A node reads an answer at once, and lets its client take its time.
    let outgoing = match forward::is_from_node(&state, request.headers()) {
        true => None,
        false => request.extensions().get::<Outgoing>().cloned(),
    };
    let answered = tracing::Instrument::instrument(next.run(request), span).await;
    let answered = budget::carry(&state.answers, outgoing.as_ref(), answered).await;
    failpoint::reach("http.answer_decided");
    let mut response = finish(answered, &path, &id);
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, value);
    }
    door::protect(headers);
    if version == Version::HTTP_11
        && let Some(hint) = &state.keep_alive
    {
        headers.insert(KEEP_ALIVE, hint.clone());
    }
    let (status, took) = (response.status().as_u16(), started.elapsed());
    metrics.record(&method, route, status, took);
    tracing::debug!(id, %method, path, status, ?took, "answered");
    response
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
pub(in crate::http) fn panicked(panic: Box<dyn Any + Send>) -> Response {
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
