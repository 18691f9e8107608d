//! Health, metrics, the API's description and the pages of problems.

use std::sync::LazyLock;

use axum::extract::State as Extract;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use prometheus_client::registry::Registry;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::wire;
use crate::http::Readiness;
use crate::http::exposition::Format;
use crate::http::extract::{Named, PathPart, Query};
use crate::http::openapi::{Fails, NoPage, Reads};
use crate::http::openapi_yaml;
use crate::http::problem::{Kind, Problem, page};
use crate::http::route::Routes;
use crate::http::state::State;

/// The readiness of the process.
#[derive(Debug, Serialize, ToSchema)]
struct Ready {
    ready: bool,
    /// The reasons why the process is not ready.
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
    status: HealthStatus,
}

/// The process's health.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum HealthStatus {
    Ok,
}

/// The last part of a problem's `type`.
#[derive(Debug)]
struct Slug(Kind);

impl PathPart for Slug {
    const PARAMETER: &'static str = "problem";

    fn parse(text: &str) -> Result<Self, String> {
        let kind = Kind::ALL.iter().find(|kind| kind.slug() == text);
        kind.map(|kind| Self(*kind))
            .ok_or_else(|| "is not the name of a problem".to_owned())
    }
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .routes(routes!(metrics))
        .routes(routes!(openapi))
        .routes(routes!(problem))
}

fn text(content_type: &'static str, body: String) -> Response {
    let mut response = body.into_response();
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Tell whether the process is alive.
#[utoipa::path(
    get, path = "/healthz", tag = "operation",
    responses((status = 200, description = "The process is alive", body = Health), Fails),
)]
async fn healthz() -> Response {
    health()
}

/// The process lives.
pub(in crate::http) fn health() -> Response {
    wire::json(
        StatusCode::OK,
        &Health {
            status: HealthStatus::Ok,
        },
    )
}

/// Tell whether the process takes traffic and, if not, why.
#[utoipa::path(
    get, path = "/readyz", tag = "operation",
    responses(
        (status = 200, description = "The process takes traffic", body = Ready),
        (status = 503, description = "The process takes no traffic", body = Ready),
        Fails,
    ),
)]
async fn readyz(Extract(state): Extract<State>) -> Response {
    ready(&state.parts.readiness)
}

/// Whether the process is ready, and if not, why.
pub(in crate::http) fn ready(readiness: &Readiness) -> Response {
    let reasons = readiness.reasons();
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

/// Return the metrics, in the OpenMetrics text format if the request asks for it (`Accept`), as Prometheus does, otherwise in Prometheus' own.
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
    scrape(&state.parts.registry, &headers)
}

/// All metrics of a registry, in the format that is asked for.
pub(in crate::http) fn scrape(
    registry: &Registry,
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let format = Format::asked(headers);
    let mut body = String::new();
    prometheus_client::encoding::text::encode(&mut body, registry)
        .map_err(|error| Problem::internal(&error))?;
    Ok(text(format.content_type(), format.print(body)))
}

/// Return this description.
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

/// Explain a problem and what to do about it.
#[utoipa::path(
    get, path = "/problems/{problem}", tag = "operation", operation_id = "read_problem",
    params(("problem" = String, Path, description = "The last part of the problem's type", example = "queue-not-found")),
    responses(
        (status = 200, description = "The page", body = String, content_type = "text/markdown; charset=utf-8"),
        NoPage, Reads,
    ),
)]
async fn problem(slug: Result<Named<Slug>, Problem>, query: Query) -> Result<Response, Problem> {
    query.finish()?;
    let Named(Slug(kind)) =
        slug.map_err(|_| Problem::new(Kind::NotFound, "there is no problem with this name"))?;
    Ok(text("text/markdown; charset=utf-8", page(kind).to_owned()))
}
