//! Health, metrics, the API's description and the pages of problems.

use std::sync::LazyLock;

use axum::extract::State as Extract;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::wire;
use crate::http::exposition::Format;
use crate::http::extract::{Named, PathPart, Query};
use crate::http::openapi::{Fails, NoPage, Reads, openapi_yaml};
use crate::http::problem::{Kind, Problem};
use crate::http::state::State;

/// The page that shows the description: all of it is in the file, so it works without a network.
const DOCS: &str = include_str!("../docs.html");

/// Whether the process takes traffic.
#[derive(Debug, Serialize, ToSchema)]
struct Ready {
    ready: bool,
    /// Why not.
    reasons: Vec<Reason>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Reason {
    /// The part that is not ready.
    part: &'static str,
    reason: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct Health {
    /// `ok`.
    status: &'static str,
}

/// The last part of a problem's `type`.
#[derive(Debug)]
struct Slug(Kind);

impl PathPart for Slug {
    const PARAMETER: &'static str = "problem";

    fn parse(text: &str) -> Result<Self, String> {
        let kind = Kind::ALL.iter().find(|kind| kind.slug() == text);
        kind.map(|kind| Self(*kind))
            .ok_or_else(|| "is not a problem's name".to_owned())
    }
}

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new()
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .routes(routes!(metrics))
        .routes(routes!(openapi))
        .routes(routes!(docs))
        .routes(routes!(problem))
}

fn text(content_type: &'static str, body: String) -> Response {
    let mut response = body.into_response();
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Whether the process lives.
#[utoipa::path(
    get, path = "/healthz", tag = "operation",
    responses((status = 200, description = "It does", body = Health), Fails),
)]
async fn healthz() -> Response {
    wire::json(StatusCode::OK, &Health { status: "ok" })
}

/// Whether the process takes traffic, and if not, why.
#[utoipa::path(
    get, path = "/readyz", tag = "operation",
    responses(
        (status = 200, description = "It does", body = Ready),
        (status = 503, description = "It does not", body = Ready),
        Fails,
    ),
)]
async fn readyz(Extract(state): Extract<State>) -> Response {
    let reasons = state.parts.readiness.reasons();
    let status = match reasons.is_empty() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let reasons = reasons
        .into_iter()
        .map(|(part, reason)| Reason { part, reason });
    let ready = Ready {
        ready: status == StatusCode::OK,
        reasons: reasons.collect(),
    };
    wire::json(status, &ready)
}

/// The metrics: in the OpenMetrics text format for who asks for it (`Accept`), as Prometheus does, else in Prometheus' own.
#[utoipa::path(
    get, path = "/metrics", tag = "operation",
    responses(
        (status = 200, description = "The metrics", content(
            (String = "text/plain; version=0.0.4; charset=utf-8"),
            (String = "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        )),
        Fails,
    ),
)]
async fn metrics(Extract(state): Extract<State>, headers: HeaderMap) -> Result<Response, Problem> {
    let format = Format::asked(&headers);
    let mut body = String::new();
    prometheus_client::encoding::text::encode(&mut body, &state.parts.registry)
        .map_err(|error| Problem::internal(&error))?;
    Ok(text(format.content_type(), format.print(body)))
}

/// This description.
#[utoipa::path(
    get, path = "/openapi.yaml", tag = "operation",
    responses(
        (status = 200, description = "OpenAPI 3.1", body = String, content_type = "application/yaml"),
        Fails,
    ),
)]
async fn openapi() -> Response {
    static YAML: LazyLock<String> = LazyLock::new(openapi_yaml);
    text("application/yaml", YAML.clone())
}

/// A page to browse this description.
#[utoipa::path(
    get, path = "/docs", tag = "operation",
    responses((status = 200, description = "The page", body = String, content_type = "text/html; charset=utf-8"), Fails),
)]
async fn docs() -> Response {
    static PAGE: LazyLock<String> = LazyLock::new(|| {
        let json = crate::http::openapi::api()
            .into_openapi()
            .to_json()
            .expect("the description has string keys only");
        // In a script element, `</` would end it.
        DOCS.replace("__OPENAPI__", &json.replace("</", "<\\/"))
    });
    static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| policy(DOCS));
    let mut page = text("text/html; charset=utf-8", PAGE.clone());
    let headers = page.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, POLICY.clone());
    page
}

/// What a browser lets a page do: run its own script and style, as they are in the file, and nothing else.
fn policy(page: &str) -> HeaderValue {
    let hash = |start: &str, end: &str| {
        let (_, rest) = page.split_once(start).expect("the page has it");
        let (text, _) = rest.split_once(end).expect("it ends");
        STANDARD.encode(Sha256::digest(text))
    };
    let script = hash("<script>", "</script>");
    let style = hash("<style>", "</style>");
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    HeaderValue::try_from(policy).expect("it is visible ASCII")
}

/// What a problem means, and what to do about it.
#[utoipa::path(
    get, path = "/problems/{problem}", tag = "operation",
    params(("problem" = String, Path, description = "The last part of the problem's type", example = "queue-not-found")),
    responses(
        (status = 200, description = "The page", body = String, content_type = "text/markdown; charset=utf-8"),
        NoPage, Reads,
    ),
)]
async fn problem(slug: Result<Named<Slug>, Problem>, query: Query) -> Result<Response, Problem> {
    query.finish()?;
    let Named(Slug(kind)) =
        slug.map_err(|_| Problem::new(Kind::NotFound, "there is no problem of this name"))?;
    Ok(text("text/markdown; charset=utf-8", kind.page().to_owned()))
}
