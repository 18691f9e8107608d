//! Checks that a request is well-formed as an HTTP message (RFC 9110, RFC 9112), in the points that hyper leaves to its
//! users.

use axum::extract::Request;
use axum::http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Version};
use axum::response::{IntoResponse as _, Response};
use hyper::body::Body as _;

use super::close;
use crate::http::extract::{discard, too_large};
use crate::http::problem::{Kind, Problem};

/// Reasons why a request goes no further.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The start of the next request is unknown: the connection ends.
    Broken(Problem),
    /// Its body is coded. Its sender may still be at it.
    Coded,
}

/// Checks a request's head.
pub(super) fn check(request: &Request, body_max_bytes: usize) -> Result<(), Refusal> {
    let headers = request.headers();
    let broken = |kind, detail| Err(Refusal::Broken(Problem::new(kind, detail)));
    let hosts = headers.get_all(HOST).iter().count();
    if hosts > 1 || (hosts == 0 && request.version() == Version::HTTP_11) {
        let detail = "a request must have one `Host` (RFC 9112, 3.2)";
        return broken(Kind::MalformedRequest, detail);
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        let mut codings = tokens(headers, TRANSFER_ENCODING);
        let is_chunked = codings.next().is_some_and(|coding| coding == "chunked");
        if !is_chunked || codings.next().is_some() {
            let detail = "`Transfer-Encoding` can only be `chunked`";
            return broken(Kind::TransferEncoding, detail);
        }
    }
    if expects(headers) && announced(headers).is_some_and(|length| length > body_max_bytes as u64) {
        return Err(Refusal::Broken(too_large(body_max_bytes)));
    }
    if headers.contains_key(CONTENT_ENCODING)
        && tokens(headers, CONTENT_ENCODING).any(|coding| coding != "identity")
        && !request.body().is_end_stream()
    {
        return Err(Refusal::Coded);
    }
    Ok(())
}

/// Whether the sender waits for a word before it sends the body.
pub(in crate::http) fn expects(headers: &HeaderMap) -> bool {
    tokens(headers, EXPECT).any(|expected| expected == "100-continue")
}

/// The announced length of the body.
pub(in crate::http) fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The values of a list, in lower case.
fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = String> {
    let values = headers.get_all(name).into_iter();
    values
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .map(|token| String::from_utf8_lossy(token.trim_ascii()).to_ascii_lowercase())
        .filter(|token| !token.is_empty())
}

impl Refusal {
    /// The answer.
    pub(super) async fn answer(self, request: Request) -> Response {
        match self {
            Self::Broken(problem) => {
                let mut response = problem.into_response();
                close(&mut response, request.version());
                response
            }
            Self::Coded => {
                if !expects(request.headers()) {
                    discard(request.into_body()).await;
                }
                let detail =
                    "encoded bodies are not supported: `Content-Encoding` can only be `identity`";
                let problem = Problem::new(Kind::UnsupportedMediaType, detail);
                let mut response = problem.into_response();
                let identity = HeaderValue::from_static("identity");
                response.headers_mut().insert(ACCEPT_ENCODING, identity);
                response
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn heads_are_checked() {
        let host = ("host", "localhost");
        let coding = |coding| ("transfer-encoding", coding);
        let expect = ("expect", "100-Continue");
        for (version, head, outcome) in [
            (Version::HTTP_11, vec![host], "passes"),
            (Version::HTTP_11, vec![], "malformed-request"),
            (Version::HTTP_11, vec![host, host], "malformed-request"),
            (Version::HTTP_10, vec![], "passes"),
            (Version::HTTP_10, vec![host, host], "malformed-request"),
            (Version::HTTP_2, vec![], "passes"),
            (Version::HTTP_11, vec![host, coding("Chunked")], "passes"),
            (
                Version::HTTP_11,
                vec![host, coding("gzip, chunked")],
                "transfer-encoding",
            ),
            (
                Version::HTTP_11,
                vec![host, coding("gzip"), coding("chunked")],
                "transfer-encoding",
            ),
            (
                Version::HTTP_11,
                vec![host, coding("chunked"), coding("chunked")],
                "transfer-encoding",
            ),
            (
                Version::HTTP_11,
                vec![host, coding("identity")],
                "transfer-encoding",
            ),
            (
                Version::HTTP_11,
                vec![host, coding("")],
                "transfer-encoding",
            ),
            (
                Version::HTTP_11,
                vec![host, ("content-encoding", "Identity")],
                "passes",
            ),
            (
                Version::HTTP_11,
                vec![host, ("content-encoding", "")],
                "passes",
            ),
            (
                Version::HTTP_11,
                vec![host, ("content-encoding", "gzip")],
                "coded",
            ),
            (
                Version::HTTP_11,
                vec![host, ("content-encoding", "identity, br")],
                "coded",
            ),
            (
                Version::HTTP_11,
                vec![host, expect, ("content-length", "100")],
                "passes",
            ),
            (
                Version::HTTP_11,
                vec![host, expect, ("content-length", "101")],
                "payload-too-large",
            ),
            (
                Version::HTTP_11,
                vec![host, expect, ("content-length", "99999999999")],
                "payload-too-large",
            ),
            // Read and thrown away, so that its sender gets to read the answer.
            (
                Version::HTTP_11,
                vec![host, ("content-length", "101")],
                "passes",
            ),
        ] {
            let mut request = axum::http::Request::builder().version(version);
            for (name, value) in &head {
                request = request.header(*name, *value);
            }
            let request = request.body(Body::from("x")).unwrap();
            let found = match check(&request, 100) {
                Ok(()) => "passes",
                Err(Refusal::Coded) => "coded",
                Err(Refusal::Broken(problem)) => problem.kind.slug(),
            };
            assert_eq!(found, outcome, "{version:?} {head:?}");
        }
    }
}
