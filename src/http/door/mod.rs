//! The door before all routes. Is the request a well-formed HTTP message? Is it for this broker? Does it come from a page
//! of another site?
//!
//! A broker on a loopback address has no login, and the browser of anyone who works at the machine reaches it. A browser
//! sends a form, or a text, to any address that a page names, without asking first. It tells by `Sec-Fetch-Site` and
//! `Origin` whose page that was; programs send neither. A page can also point its own name at 127.0.0.1: then it has the
//! same origin, and only `Host` reveals it.

mod framing;
mod hosts;

use axum::extract::Request;
use axum::http::header::{
    ACCESS_CONTROL_REQUEST_METHOD, CONNECTION, CONTENT_SECURITY_POLICY, HOST, ORIGIN,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use axum::response::{IntoResponse as _, Response};

use super::connections::{PROBES, Spare};
use super::problem::{Kind, Problem};
use super::state::State;
use crate::domain::authority::Authority;

pub(in crate::http) use framing::{announced, expects};
pub(in crate::http) use hosts::Hosts;

const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");
/// Longer ones are not shown in whole.
const SHOWN_CHARS: usize = 100;

/// Lets a request pass, or answers it.
pub(in crate::http) async fn pass(state: &State, request: Request) -> Result<Request, Response> {
    if let Err(refusal) = framing::check(&request, state.options.body_max_bytes) {
        // Boxed: a request that passes has no need of its place.
        return Err(Box::pin(refusal.answer(request)).await);
    }
    match check(&state.hosts, &request) {
        Ok(()) => Ok(request),
        Err(problem) => Err(problem.into_response()),
    }
}

/// Whether a request may be looked at, by its head.
pub(in crate::http) fn check(hosts: &Hosts, request: &Request) -> Result<(), Problem> {
    if request.extensions().get::<Spare>().is_some() && !PROBES.contains(&request.uri().path()) {
        let detail = "all connections are in use, and none is idle";
        return Err(Problem::new(Kind::Overloaded, detail));
    }
    let passed = match authority(request) {
        Ok(authority) => admit(hosts, request, authority),
        Err(detail) => Err(Problem::new(Kind::MalformedRequest, detail)),
    };
    if let Err(problem) = &passed {
        // Only a browser or a lost client does that. Names are of their choosing, and stay out of the log's usual lines.
        let origin = request.headers().get(ORIGIN);
        tracing::debug!(detail = %problem.detail, ?origin, "refused at the door");
    }
    passed
}

/// The host that the request is for: from the target if it names one (RFC 9112, 3.2.2), otherwise from `Host`. None for a
/// client that names none, as in HTTP/1.0.
fn authority(request: &Request) -> Result<Option<Authority<'_>>, &'static str> {
    const MALFORMED: &str = "`Host` must be a host, with or without a port";
    let host = match request.headers().get(HOST) {
        None => None,
        Some(value) => {
            let text = value.to_str().unwrap_or_default();
            Some(Authority::parse(text).ok_or(MALFORMED)?)
        }
    };
    let Some(target) = request.uri().authority() else {
        return Ok(host);
    };
    let target = Authority::parse(target.as_str()).ok_or(MALFORMED)?;
    if request.version() == Version::HTTP_2 && host.is_some_and(|host| host.host != target.host) {
        return Err("`Host` and `:authority` differ");
    }
    Ok(Some(target))
}

/// Whether the request may go on.
fn admit(
    hosts: &Hosts,
    request: &Request,
    authority: Option<Authority<'_>>,
) -> Result<(), Problem> {
    let headers = request.headers();
    for site in headers.get_all(FETCH_SITE) {
        let is_own = site == "same-origin" || site == "none";
        if !is_own && !is_page_opened(request) {
            let site = shown(site);
            let detail =
                format!("a browser sent the request for a page of another site (`{site}`)");
            return Err(Problem::new(Kind::CrossSite, detail));
        }
    }
    for origin in headers.get_all(ORIGIN) {
        let text = origin.to_str().unwrap_or_default();
        if !authority.is_some_and(|authority| authority.is_place_of(text)) {
            let detail = format!(
                "the origin `{}` is not the host that was asked",
                shown(origin)
            );
            return Err(Problem::new(Kind::CrossSite, detail));
        }
    }
    if headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD) {
        let detail = "pages of other sites may not send requests, so preflights are refused (CORS)";
        return Err(Problem::new(Kind::CrossSite, detail));
    }
    match authority {
        Some(authority) if !hosts.has(&authority.host, || is_of_page(headers)) => {
            let name: String = authority
                .host
                .to_string()
                .chars()
                .take(SHOWN_CHARS)
                .collect();
            let detail =
                format!("`{name}` is not a name of this broker; `allowed_hosts` can add it");
            Err(Problem::new(Kind::HostNotAllowed, detail))
        }
        _ => Ok(()),
    }
}

/// Whether somebody follows a link to a page that is for people: it changes nothing, and the page that has the link does not get
/// to read it.
fn is_page_opened(request: &Request) -> bool {
    let path = request.uri().path();
    let headers = request.headers();
    let is = |name: HeaderName, value: &str| headers.get(name).is_some_and(|found| found == value);
    matches!(*request.method(), Method::GET | Method::HEAD)
        && (path == "/docs" || path.starts_with("/problems/"))
        && is(FETCH_MODE, "navigate")
        && (is(FETCH_DEST, "document") || !headers.contains_key(FETCH_DEST))
}

/// True if a browser's page sent the request, as far as the browser says so. `Sec-Fetch-Mode` alone is no sign of one: the `fetch` of Node.js sends it.
fn is_of_page(headers: &HeaderMap) -> bool {
    headers.contains_key(FETCH_SITE)
        || headers.contains_key(FETCH_DEST)
        || headers.contains_key(ORIGIN)
}

fn shown(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes())
        .chars()
        .take(SHOWN_CHARS)
        .collect()
}

/// Headers by which a browser says who asks. They are looked at here, and mean nothing to another node.
pub(in crate::http) fn is_of_browser(name: &HeaderName) -> bool {
    name == ORIGIN || name.as_str().starts_with("sec-fetch-")
}

/// Ends the connection after the answer, where what comes next on it is not known to be a request.
fn close(response: &mut Response, version: Version) {
    if version < Version::HTTP_2 {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
}

/// Headers of every answer: it is what it says it is, no page shows it within itself, and links from it tell nobody of it.
pub(in crate::http) fn protect(headers: &mut HeaderMap) {
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if !headers.contains_key(CONTENT_SECURITY_POLICY) {
        headers.insert(
            CONTENT_SECURITY_POLICY,
            HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"),
        );
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use axum::body::Body;

    use super::*;
    use crate::http::Options;

    fn passes(address: &str, options: &Options, head: &[(&str, &str)], target: &str) -> String {
        let mut request = axum::http::Request::builder()
            .method(Method::POST)
            .uri(target);
        for (name, value) in head {
            request = match *name {
                "method" => request.method(*value),
                name => request.header(name, *value),
            };
        }
        let request = request.body(Body::empty()).unwrap();
        let hosts = Hosts::new(address.parse().unwrap(), options);
        let admitted = match authority(&request) {
            Ok(authority) => admit(&hosts, &request, authority),
            Err(_) => return "malformed".to_owned(),
        };
        match admitted {
            Ok(()) => "passes".to_owned(),
            Err(problem) => problem.kind.slug().to_owned(),
        }
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let local = ("host", "localhost:8080");
        let evil = ("origin", "https://evil.example");
        let navigate = [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "document"),
        ];
        let opened = |method, site| {
            let mut head = vec![local, ("method", method), ("sec-fetch-site", site)];
            head.extend(&navigate[1..]);
            head
        };
        for (head, target, outcome) in [
            (vec![local], "/v1/queues/q/purge", "passes"),
            (vec![], "/v1/queues/q/purge", "passes"),
            (
                vec![local, ("origin", "http://localhost:8080")],
                "/x",
                "passes",
            ),
            (
                vec![local, ("sec-fetch-site", "same-origin")],
                "/x",
                "passes",
            ),
            (vec![local, ("sec-fetch-site", "none")], "/x", "passes"),
            (
                vec![local, ("sec-fetch-site", "cross-site")],
                "/x",
                "cross-site",
            ),
            (
                vec![local, ("sec-fetch-site", "same-site")],
                "/x",
                "cross-site",
            ),
            (vec![local, ("sec-fetch-site", "")], "/x", "cross-site"),
            (
                vec![
                    local,
                    ("sec-fetch-site", "none"),
                    ("sec-fetch-site", "cross-site"),
                ],
                "/x",
                "cross-site",
            ),
            (vec![local, evil], "/x", "cross-site"),
            (vec![local, ("origin", "null")], "/x", "cross-site"),
            (vec![local, ("origin", "")], "/x", "cross-site"),
            (
                vec![local, ("origin", "http://localhost:8080"), evil],
                "/x",
                "cross-site",
            ),
            (
                vec![local, evil, ("sec-fetch-site", "same-origin")],
                "/x",
                "cross-site",
            ),
            (vec![evil], "/x", "cross-site"),
            (vec![local, ("method", "GET"), evil], "/docs", "cross-site"),
            (
                vec![
                    local,
                    ("method", "OPTIONS"),
                    ("access-control-request-method", "POST"),
                ],
                "/x",
                "cross-site",
            ),
            (opened("GET", "cross-site"), "/docs", "passes"),
            (opened("GET", "same-site"), "/problems/not-found", "passes"),
            (opened("POST", "cross-site"), "/docs", "cross-site"),
            (opened("GET", "cross-site"), "/v1/queues", "cross-site"),
            (
                opened("GET", "cross-site"),
                "/docs/../v1/queues",
                "cross-site",
            ),
            (
                vec![
                    local,
                    ("method", "GET"),
                    navigate[0],
                    navigate[1],
                    ("sec-fetch-dest", "iframe"),
                ],
                "/docs",
                "cross-site",
            ),
            (
                vec![local, ("method", "GET"), navigate[0]],
                "/docs",
                "cross-site",
            ),
        ] {
            let found = passes("127.0.0.1:8080", &Options::default(), &head, target);
            assert_eq!(found, outcome, "{head:?} {target}");
        }
    }

    #[test]
    fn a_name_is_the_brokers_or_not() {
        let advertised = |url: &str| Options {
            advertise_url: Some(url.to_owned()),
            ..Options::default()
        };
        let internal = "https://Postroad.internal:8443/x";
        let allowed = |names: &[&str]| Options {
            allowed_hosts: names.iter().map(|name| (*name).to_owned()).collect(),
            ..Options::default()
        };
        let (local, any) = ("127.0.0.1:8080", "0.0.0.0:8080");
        for (address, options, host, outcome) in [
            (local, Options::default(), "localhost:8080", "passes"),
            (local, Options::default(), "LOCALHOST.:9", "passes"),
            (local, Options::default(), "[::1]:8080", "passes"),
            ("[::1]:8080", Options::default(), "[0:0:0::1]", "passes"),
            (
                local,
                Options::default(),
                "evil.example",
                "host-not-allowed",
            ),
            (
                local,
                Options::default(),
                "localhost.evil.example",
                "host-not-allowed",
            ),
            (
                local,
                Options::default(),
                "10.0.0.1:8080",
                "host-not-allowed",
            ),
            (
                local,
                Options::default(),
                "0.0.0.0:8080",
                "host-not-allowed",
            ),
            (
                local,
                Options::default(),
                "localhost@evil.example",
                "malformed",
            ),
            (local, Options::default(), "", "malformed"),
            (
                local,
                advertised(internal),
                "postroad.internal:8443",
                "passes",
            ),
            (
                local,
                advertised(internal),
                "evil.example:8443",
                "host-not-allowed",
            ),
            (
                local,
                allowed(&["a.example", "10.0.0.1"]),
                "A.example:1",
                "passes",
            ),
            (
                local,
                allowed(&["a.example", "10.0.0.1"]),
                "10.0.0.1:80",
                "passes",
            ),
            (
                local,
                allowed(&["a.example"]),
                "b.a.example",
                "host-not-allowed",
            ),
            (local, allowed(&["a.example"]), "localhost", "passes"),
            (local, allowed(&["*"]), "evil.example", "passes"),
            (any, Options::default(), "evil.example", "passes"),
            (
                any,
                allowed(&["a.example"]),
                "evil.example",
                "host-not-allowed",
            ),
            (any, allowed(&["a.example"]), "a.example", "passes"),
            (any, allowed(&["a.example"]), "10.0.0.1:8080", "passes"),
            (any, allowed(&["*"]), "evil.example", "passes"),
        ] {
            let found = passes(address, &options, &[("host", host)], "/x");
            assert_eq!(found, outcome, "{address} {host}");
        }
        // A page is let through by fewer names than a program, whatever it says of itself.
        let any_name = Options::default();
        for (options, host, mark, outcome) in [
            (
                &any_name,
                "evil.example",
                ("sec-fetch-site", "same-origin"),
                "host-not-allowed",
            ),
            (
                &any_name,
                "evil.example",
                ("sec-fetch-site", "none"),
                "host-not-allowed",
            ),
            (
                &any_name,
                "evil.example",
                ("sec-fetch-dest", "empty"),
                "host-not-allowed",
            ),
            (
                &any_name,
                "evil.example",
                ("origin", "http://evil.example"),
                "host-not-allowed",
            ),
            // Node.js.
            (&any_name, "postroad", ("sec-fetch-mode", "cors"), "passes"),
            (
                &any_name,
                "10.0.0.1",
                ("origin", "http://10.0.0.1"),
                "passes",
            ),
            (
                &any_name,
                "localhost",
                ("sec-fetch-site", "same-origin"),
                "passes",
            ),
            (
                &allowed(&["a.example"]),
                "a.example",
                ("origin", "https://a.example"),
                "passes",
            ),
            (
                &allowed(&["*"]),
                "evil.example",
                ("origin", "http://evil.example"),
                "passes",
            ),
            (
                &advertised("http://b.example:80"),
                "b.example",
                ("origin", "http://b.example"),
                "passes",
            ),
        ] {
            let found = passes(any, options, &[("host", host), mark], "/x");
            assert_eq!(found, outcome, "{host} {mark:?}");
        }
        // The target goes before `Host`.
        let head = [("host", "localhost:8080")];
        let found = passes(local, &Options::default(), &head, "http://evil.example/x");
        assert_eq!(found, "host-not-allowed");
        let head = [("host", "evil.example")];
        let found = passes(local, &Options::default(), &head, "http://localhost:8080/x");
        assert_eq!(found, "passes");
    }
}
