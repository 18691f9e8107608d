//! Pages of other sites, names that are not the broker's, and what browsers are told.

use postroad::http::Options;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{Answer, Api, answer, assert_problem};
use crate::support;

/// A request with these headers, as a browser of a page elsewhere sends it.
async fn ask(api: &Api, method: &str, path: &str, head: &[(&str, &str)], body: &str) -> Answer {
    let mut request = api
        .client
        .request(method.parse().unwrap(), api.url(path))
        .body(body.to_owned());
    for (name, value) in head {
        request = request.header(*name, *value);
    }
    answer(request.send().await.unwrap()).await
}

const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");

#[tokio::test]
async fn a_page_of_another_site_commands_nothing() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    api.publish("a", "application/json", &[], "1").await;
    let evil = ("origin", "https://evil.example");
    let site = ("sec-fetch-site", "cross-site");
    // What a form, a beacon and a `fetch` without CORS send; old browsers say `Origin` alone.
    for (method, path, head, body) in [
        ("POST", "/v1/queues/q/purge", vec![evil, site, FORM], "{}"),
        ("POST", "/v1/queues/q/purge", vec![evil, FORM], "{}"),
        ("POST", "/v1/queues/q/purge", vec![site], ""),
        ("POST", "/v1/queues/q/pause", vec![("origin", "null")], ""),
        (
            "POST",
            "/v1/queues/q/seek",
            vec![evil, FORM],
            "{\"to\":\"latest\"}",
        ),
        ("POST", "/v1/queues/q/receive", vec![evil, FORM], ""),
        (
            "POST",
            "/v1/topics/a/messages",
            vec![evil, ("content-type", "text/plain")],
            "x",
        ),
        (
            "POST",
            "/v1/messages",
            vec![evil, FORM],
            "{\"messages\":[]}",
        ),
        ("DELETE", "/v1/queues/q", vec![evil], ""),
        ("GET", "/v1/queues", vec![site], ""),
        (
            "GET",
            "/v1/streams/main/messages",
            vec![site, ("accept", "text/event-stream")],
            "",
        ),
        ("GET", "/metrics", vec![evil], ""),
        (
            "GET",
            "/docs",
            vec![site, ("sec-fetch-mode", "no-cors")],
            "",
        ),
        // The answers of the layers below are behind the door, too.
        ("GET", "/nowhere", vec![evil], ""),
        ("PATCH", "/v1/queues/q", vec![evil], ""),
        (
            "OPTIONS",
            "/v1/queues/q/purge",
            vec![evil, ("access-control-request-method", "POST")],
            "",
        ),
    ] {
        let refused = ask(&api, method, path, &head, body).await;
        assert_problem(&refused, 403, "cross-site");
        for header in [
            "access-control-allow-origin",
            "access-control-allow-methods",
        ] {
            assert!(!refused.headers.contains_key(header), "{path}");
        }
    }
    let (_, page) = support::Http::new(&api.url(""))
        .get("/problems/cross-site")
        .await;
    assert!(
        page.as_str()
            .unwrap()
            .contains("Type `/problems/cross-site`")
    );
    // Nothing happened, and programs go on: `curl -d` sends a form's type.
    let received = ask(
        &api,
        "POST",
        "/v1/queues/q/receive",
        &[FORM],
        "{\"wait_seconds\":5}",
    )
    .await;
    assert_eq!(received.status, 200, "{received:?}");
    let deliveries = received.body["deliveries"].as_array().unwrap();
    assert_eq!(
        (deliveries.len(), &deliveries[0]["event"]["data"]),
        (1, &json!(1))
    );
    let own = format!("http://{}", api.address);
    let own = [("origin", own.as_str()), ("sec-fetch-site", "same-origin")];
    assert_eq!(ask(&api, "GET", "/v1/queues", &own, "").await.status, 200);
    let opened = [
        site,
        ("sec-fetch-mode", "navigate"),
        ("sec-fetch-dest", "document"),
    ];
    for path in ["/docs", "/problems/cross-site"] {
        assert_eq!(
            ask(&api, "GET", path, &opened, "").await.status,
            200,
            "a link to {path}"
        );
    }
    api.stop().await;
}

#[tokio::test]
async fn a_name_that_leads_here_is_not_enough() {
    let api = Api::with(Options {
        allowed_hosts: vec!["broker.example".to_owned()],
        ..Options::default()
    })
    .await;
    let port = api.address.port();
    let rebound = format!("evil.example:{port}");
    // All that a page of that name says is of one origin.
    let origin = format!("http://{rebound}");
    let head = [
        ("host", rebound.as_str()),
        ("origin", origin.as_str()),
        ("sec-fetch-site", "same-origin"),
    ];
    for (method, path) in [
        ("GET", "/v1/queues"),
        ("DELETE", "/v1/queues/q"),
        ("POST", "/v1/topics/a/messages"),
        ("GET", "/nowhere"),
        ("GET", "/healthz"),
    ] {
        let refused = ask(&api, method, path, &head, "").await;
        assert_problem(&refused, 403, "host-not-allowed");
    }
    // Who puts a name before it may say what it likes.
    let forwarded = [("host", "evil.example"), ("x-forwarded-host", "localhost")];
    let refused = ask(&api, "GET", "/v1/queues", &forwarded, "").await;
    assert_problem(&refused, 403, "host-not-allowed");
    for host in [
        "localhost",
        &format!("LocalHost.:{port}"),
        "[::1]:9",
        "broker.example",
        "Broker.Example.:443",
    ] {
        let served = ask(&api, "GET", "/healthz", &[("host", host)], "").await;
        assert_eq!(served.status, 200, "{host}");
    }
    // In HTTP/2 it is `:authority`.
    let client = reqwest::Client::builder().http2_prior_knowledge();
    let client = client.resolve("evil.example", api.address).build().unwrap();
    let asked = client.get(format!("http://{rebound}/v1/queues")).send();
    assert_problem(&answer(asked.await.unwrap()).await, 403, "host-not-allowed");
    let asked = client.get(api.url("/healthz")).send();
    assert_eq!(asked.await.unwrap().status(), 200);
    api.stop().await;
}

#[tokio::test]
async fn every_answer_says_that_it_is_no_page_of_others() {
    let api = Api::start().await;
    api.queue("q", json!({})).await;
    let evil = [("origin", "https://evil.example")];
    let gzip = [("content-encoding", "gzip")];
    for (status, method, path, head) in [
        (200, "GET", "/docs", &[][..]),
        (200, "GET", "/openapi.yaml", &[]),
        (200, "GET", "/problems/not-found", &[]),
        (200, "GET", "/metrics", &[]),
        (200, "HEAD", "/healthz", &[]),
        (200, "GET", "/v1/queues/q", &[]),
        (204, "DELETE", "/v1/queues/q", &[]),
        (403, "GET", "/v1/queues", &evil),
        (404, "GET", "/nowhere", &[]),
        (405, "PATCH", "/healthz", &[]),
        (415, "POST", "/v1/topics/a/messages", &gzip),
        (422, "GET", "/v1/queues?x=1", &[]),
    ] {
        let body = if method == "POST" { "1" } else { "" };
        let found = ask(&api, method, path, head, body).await;
        assert_eq!(found.status, status, "{path}");
        assert_eq!(found.headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(found.headers["referrer-policy"], "no-referrer", "{path}");
        let policy = found.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; "), "{path}");
        assert!(policy.contains("frame-ancestors 'none'"), "{path}");
        assert!(!policy.contains("unsafe"), "{path}");
        assert_eq!(
            path == "/docs",
            policy.contains("script-src 'self'"),
            "{path}"
        );
    }
    api.stop().await;
}

/// The page loads nothing but files of the broker, each of which is there, and its policy lets it do no more.
#[tokio::test]
async fn the_page_of_the_api_needs_nobody_else() {
    let api = Api::start().await;
    let found = api.get("/docs").await;
    let page = found.body.as_str().unwrap();
    let policy = found.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.contains("script-src 'self'; style-src 'self'"));
    assert!(!page.contains("<style") && !page.contains("<script>"));
    let mut files = 0;
    for part in page.split([' ', '>']) {
        let link = part.strip_prefix("src=").or(part.strip_prefix("href="));
        let Some(link) = link.map(|link| link.trim_matches('"')) else {
            continue;
        };
        assert!(link.starts_with("docs/"), "{link}");
        let file = api.get(&format!("/{link}")).await;
        assert_eq!(file.status, 200, "{link}");
        let kind = match link.ends_with(".js") {
            true => "text/javascript; charset=utf-8",
            false => "text/css; charset=utf-8",
        };
        assert_eq!(file.headers["content-type"], kind, "{link}");
        assert!(!file.body.as_str().unwrap().contains("sourceMappingURL="));
        files += 1;
    }
    assert_eq!(files, 4);
    let start = api.get("/docs/page.js").await;
    assert!(start.body.as_str().unwrap().contains("\"openapi.yaml\""));
    let missing = api.get("/docs/page.html").await;
    assert_problem(&missing, 404, "not-found");
    api.stop().await;
}

#[tokio::test]
async fn an_answer_says_how_long_its_connection_stays() {
    let api = Api::start().await;
    let found = api.get("/healthz").await;
    assert_eq!(found.headers["keep-alive"], "timeout=75");
    let client = reqwest::Client::builder().http2_prior_knowledge();
    let found = client.build().unwrap().get(api.url("/healthz")).send();
    assert!(!found.await.unwrap().headers().contains_key("keep-alive"));
    api.stop().await;
    let options = Options::default().with_keep_alive(std::time::Duration::from_secs(1));
    let api = Api::with(options).await;
    let mut stream = TcpStream::connect(api.address).await.unwrap();
    let head = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let began = std::time::Instant::now();
    let mut answered = String::new();
    stream.read_to_string(&mut answered).await.unwrap();
    assert!(answered.contains("keep-alive: timeout=1\r\n"), "{answered}");
    assert!(began.elapsed().as_secs() >= 1, "a client may count on it");
    api.stop().await;
}
