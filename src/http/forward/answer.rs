//! The request to another node and its answer, as HTTP messages: the path as it is, the headers that are passed on, the
//! whole body.

use std::time::Duration;

use axum::body::Body;
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use tokio::time::timeout;

use super::kept::Kept;
use super::{DELIVERIES, EPOCH, NODE, Passed, SLOT, WAITED};
use crate::http::budget::{Counted, SMALL_BYTES};
use crate::http::door;
use crate::http::problem::Problem;
use crate::http::state::State;

/// How long the rest of an answer may take whose beginning is there.
const REST: Duration = Duration::from_secs(30);

/// A node's answer, all of it.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// How many deliveries it has; None where the node does not say: of another route, or of the previous build.
    pub(super) deliveries: Option<usize>,
    /// Its share of the memory for answers; none for a small one.
    pub(super) share: Option<Counted>,
}

impl Received {
    pub(super) fn into_response(self) -> Response {
        self.with_body(Body::from)
    }

    pub(super) fn with_body(self, body: impl FnOnce(Bytes) -> Body) -> Response {
        let mut response = Response::new(body(self.body));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        if let Some(share) = self.share {
            response.extensions_mut().insert(share);
        }
        response
    }
}

/// Reads all of a node's answer, which it wrote from its memory.
pub(super) async fn read(
    state: &State,
    kept: &Kept,
    answer: reqwest::Response,
) -> Result<Received, Passed> {
    let (status, headers) = (answer.status(), end_to_end(answer.headers()));
    let deliveries = answer.headers().get(DELIVERIES);
    let deliveries = deliveries.and_then(|count| count.to_str().ok()?.parse().ok());
    let length = answer.content_length().unwrap_or_default();
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let share = match length > SMALL_BYTES {
        true => match state.answers.hold(length).await {
            Ok(share) => Some(Counted::new(share)),
            Err(full) => return Err(Passed::Answered(Problem::from(full).into_response())),
        },
        false => None,
    };
    match timeout(REST, answer.bytes()).await {
        Ok(Ok(body)) => Ok(Received {
            status,
            headers,
            body,
            deliveries,
            share,
        }),
        Ok(Err(_)) | Err(_) => Err(kept.unanswered()),
    }
}

/// The path as it was sent, at another node. None where a URL would resolve dot segments (`%2e%2e`): the path would mean
/// something else there.
pub(super) fn target(node: &str, path: Option<&PathAndQuery>) -> Option<reqwest::Url> {
    let path = path.map_or("/", PathAndQuery::as_str);
    let target = reqwest::Url::parse(&format!("{node}{path}")).ok()?;
    let (path, _) = path.split_once('?').unwrap_or((path, ""));
    let decode = |text: &str| -> Vec<u8> { percent_decode_str(text).collect() };
    let is_same = decode(target.path()).ends_with(&decode(path))
        && target.path().matches('/').count() >= path.matches('/').count();
    is_same.then_some(target)
}

/// Headers that are not of one connection alone.
pub(super) fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let is_of_connection = |name: &HeaderName| {
        [
            header::HOST,
            header::CONNECTION,
            header::CONTENT_LENGTH,
            header::TRANSFER_ENCODING,
            header::TE,
            header::TRAILER,
            header::UPGRADE,
            header::EXPECT,
            header::PROXY_AUTHENTICATE,
            header::PROXY_AUTHORIZATION,
            HeaderName::from_static("keep-alive"),
            HeaderName::from_static("proxy-connection"),
            SLOT,
            EPOCH,
            NODE,
            WAITED,
            DELIVERIES,
        ]
        .contains(name)
    };
    // Headers that `Connection` names are of the connection, too.
    let named = |name: &HeaderName| {
        let values = headers.get_all(header::CONNECTION).iter();
        let mut tokens = values.flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
        tokens.any(|token| {
            token
                .trim_ascii()
                .eq_ignore_ascii_case(name.as_str().as_bytes())
        })
    };
    let mut kept = HeaderMap::with_capacity(headers.len() + 4);
    for (name, value) in headers {
        if !is_of_connection(name) && !door::is_of_browser(name) && !named(name) {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_path_is_passed_on_as_it_is_or_not_at_all() {
        for (path, is_passed) in [
            ("/v1/queues/q/messages/1", true),
            ("/v1/queues/q/redrives/a%2Fb", true),
            ("/v1/queues/q/redrives/a\"b^c%7B?x=..", true),
            ("/v1/queues/q/redrives/..", false),
            ("/v1/queues/q/redrives/%2e%2E", false),
            ("/v1/queues/q/redrives/.", false),
            ("/v1/queues/q/redrives/%2e?x=1", false),
            ("/v1/queues/q/redrives/..\\..\\purge", false),
        ] {
            for node in ["http://node:8080", "http://node/prefix"] {
                let parsed: PathAndQuery = path.parse().expect("a path");
                let target = target(node, Some(&parsed));
                assert_eq!(target.is_some(), is_passed, "{node}{path}");
            }
        }
    }

    #[test]
    fn headers_of_a_connection_stay_on_it() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("origin", "http://localhost"),
            ("sec-fetch-site", "same-origin"),
            ("x-request-id", "r"),
            ("x-postroad-node", "forged"),
            ("x-postroad-deliveries", "1"),
        ] {
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
        }
        let kept = end_to_end(&headers);
        let kept: Vec<&str> = kept.keys().map(HeaderName::as_str).collect();
        assert_eq!(kept, ["x-request-id"]);
    }
}
