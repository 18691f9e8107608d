//! Problem details (RFC 9457): every error that the API returns. Each kind has a stable `type`, which is also the path of
//! a page that explains it, kept in `docs/problems/` and served.

use std::borrow::Cow;

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::domain::chain;
pub use crate::domain::problem::Kind;
use crate::domain::problem::problem_kinds;

macro_rules! pages {
    ($($(#[$doc:meta])* $name:ident = $slug:literal, $status:literal, $title:literal;)*) => {
        /// The page that explains a kind, in Markdown.
        pub(in crate::http) const fn page(kind: Kind) -> &'static str {
            match kind {
                $(Kind::$name => include_str!(concat!("../../docs/problems/", $slug, ".md")),)*
            }
        }
    };
}

problem_kinds!(pages);

/// One part of the request that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(into = "ProblemField")]
pub struct FieldError {
    /// The place: a JSON pointer into the body, a parameter or a header.
    pub place: Place,
    /// The fault.
    pub detail: String,
    /// The allowed values, when the detail does not say them.
    pub allowed: Option<String>,
}

/// A place in a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A JSON pointer into the body.
    Pointer(String),
    /// A parameter of the path or the query.
    Parameter(Cow<'static, str>),
    /// A header.
    Header(String),
}

/// An error answer. Rendered by the outermost layer, which knows the request's id.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    pub(in crate::http) kind: Kind,
    pub(in crate::http) detail: Cow<'static, str>,
    pub(in crate::http) errors: Vec<FieldError>,
    pub(in crate::http) retry_after_seconds: Option<u32>,
    pub(in crate::http) members: Map<String, Value>,
}

/// An error (RFC 9457).
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub(in crate::http) struct Document<'a> {
    /// The kind of problem. It is also the path of the page that explains it.
    #[serde(rename = "type")]
    #[schema(example = "/problems/queue-not-found")]
    kind: String,
    /// A title that is the same for all problems of this kind.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// The fault of this request.
    detail: &'a str,
    /// The request's path.
    instance: &'a str,
    /// The request's id, as in the header `x-request-id` and in the broker's log.
    request_id: &'a str,
    /// The parts of the request that break rules.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    #[schema(value_type = Option<Vec<ProblemField>>)]
    errors: &'a [FieldError],
    #[serde(flatten)]
    #[schema(ignore)]
    members: &'a Map<String, Value>,
}

/// A part of the request that breaks a rule. Exactly one of `pointer`, `parameter` and `header` says which part.
#[derive(Serialize, ToSchema)]
struct ProblemField {
    /// A JSON pointer into the body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pointer: Option<String>,
    /// A parameter of the path or the query.
    #[serde(skip_serializing_if = "Option::is_none")]
    parameter: Option<Cow<'static, str>>,
    /// A header.
    #[serde(skip_serializing_if = "Option::is_none")]
    header: Option<String>,
    /// The fault.
    detail: String,
    /// The allowed values.
    #[serde(skip_serializing_if = "Option::is_none")]
    allowed: Option<String>,
}

impl From<FieldError> for ProblemField {
    fn from(error: FieldError) -> Self {
        let (mut pointer, mut parameter, mut header) = (None, None, None);
        match error.place {
            Place::Pointer(place) => pointer = Some(place),
            Place::Parameter(place) => parameter = Some(place),
            Place::Header(place) => header = Some(place),
        }
        Self {
            pointer,
            parameter,
            header,
            detail: error.detail,
            allowed: error.allowed,
        }
    }
}

impl Problem {
    /// A problem whose `detail` describes this occurrence.
    #[must_use]
    pub fn new(kind: Kind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            detail: detail.into(),
            errors: Vec::new(),
            retry_after_seconds: (kind.status() == 503).then_some(1),
            members: Map::new(),
        }
    }

    /// One parameter of the path or query that breaks a rule.
    #[must_use]
    pub fn parameter(name: impl Into<Cow<'static, str>>, detail: impl Into<String>) -> Self {
        Self::invalid(vec![FieldError {
            place: Place::Parameter(name.into()),
            detail: detail.into(),
            allowed: None,
        }])
    }

    /// Parts of the request that break rules.
    #[must_use]
    pub fn invalid(errors: Vec<FieldError>) -> Self {
        let mut problem = Self::new(Kind::InvalidRequest, summary(&errors));
        problem.errors = errors;
        problem
    }

    /// Adds these faults.
    #[must_use]
    pub fn with_errors(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors;
        self
    }

    /// Adds a member that only this kind has.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.members.insert(name.to_owned(), value.into());
        self
    }

    /// Sets `Retry-After`, in seconds.
    #[must_use]
    pub const fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// Logs the broker's own fault with its causes, once, and makes a generic answer.
    #[must_use]
    pub fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(error = %chain(error), "a request failed");
        Self::new(
            Kind::Internal,
            "an internal error; the broker's log has the details",
        )
    }

    /// Logs trouble with the database, once, and makes a generic answer.
    #[must_use]
    pub fn unavailable(error: &dyn std::error::Error) -> Self {
        tracing::error!(error = %chain(error), "a request could not be served");
        Self::new(
            Kind::Unavailable,
            "the database cannot be used at the moment",
        )
    }

    /// The whole answer.
    pub(in crate::http) fn render(&self, instance: &str, request_id: &str) -> Response {
        let document = Document {
            kind: self.kind.uri(),
            title: self.kind.title(),
            status: self.kind.status(),
            detail: &self.detail,
            instance,
            request_id,
            errors: &self.errors,
            members: &self.members,
        };
        let body = serde_json::to_vec(&document).expect("a problem has string keys only");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        response
    }

    fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.kind.status()).expect("a status of the table")
    }
}

fn summary(errors: &[FieldError]) -> String {
    match errors {
        [] => "the request breaks a rule".to_owned(),
        [one] => one.detail.clone(),
        [first, rest @ ..] => format!("{}; and {} more", first.detail, rest.len()),
    }
}

impl IntoResponse for Problem {
    /// An empty answer that carries the problem: the outermost layer renders it.
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_kind_has_its_page_and_its_own_type() {
        let mut types = HashSet::new();
        for kind in Kind::ALL {
            assert!(types.insert(kind.uri()), "{} twice", kind.uri());
            assert!(
                page(*kind).starts_with(&format!("# {}\n", kind.title())),
                "docs/problems/{}.md must start with its title",
                kind.slug()
            );
            assert!(page(*kind).contains(&format!("`{}`", kind.uri())));
        }
    }

    #[test]
    fn there_is_no_page_without_a_kind() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/problems");
        for entry in std::fs::read_dir(folder).expect("the folder is there") {
            let name = entry.expect("readable").file_name();
            let name = name.to_string_lossy();
            let slug = name.strip_suffix(".md").expect("Markdown only");
            assert!(Kind::ALL.iter().any(|kind| kind.slug() == slug), "{name}");
        }
    }
}
