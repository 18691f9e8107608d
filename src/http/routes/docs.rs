//! The page where people read the API's description and try requests: Swagger UI, from the files in `src/http/viewer`.

use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use utoipa_axum::routes;

use crate::http::extract::{Named, PathPart, Query};
use crate::http::openapi::{Fails, NoPage, Reads};
use crate::http::problem::{Kind, Problem};
use crate::http::route::Routes;

const PAGE: &str = include_str!("../viewer/page.html");

/// The page may load its own files, ask its own broker, and do nothing else. Swagger UI draws its arrows as `data:` images.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page: its name, its type and its text.
#[derive(Debug)]
struct File {
    name: &'static str,
    content_type: &'static str,
    text: &'static str,
}

const FILES: [File; 4] = [
    File {
        name: "swagger-ui-bundle.js",
        content_type: "text/javascript; charset=utf-8",
        text: include_str!("../viewer/swagger-ui-bundle.js"),
    },
    File {
        name: "swagger-ui.css",
        content_type: "text/css; charset=utf-8",
        text: include_str!("../viewer/swagger-ui.css"),
    },
    File {
        name: "page.js",
        content_type: "text/javascript; charset=utf-8",
        text: include_str!("../viewer/page.js"),
    },
    File {
        name: "page.css",
        content_type: "text/css; charset=utf-8",
        text: include_str!("../viewer/page.css"),
    },
];

impl PathPart for &'static File {
    const PARAMETER: &'static str = "file";

    fn parse(text: &str) -> Result<Self, String> {
        let found = FILES.iter().find(|file| file.name == text);
        found.ok_or_else(|| "is not a file of the page".to_owned())
    }
}

pub(super) fn routes() -> Routes {
    Routes::new().routes(routes!(page)).routes(routes!(file))
}

fn text(content_type: &'static str, text: &'static str) -> Response {
    let mut response = text.into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    // Another version of the program has other files under the same names.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

/// Show a page where you can read this description and try requests.
#[utoipa::path(
    get, path = "/docs", tag = "operation", operation_id = "show_docs",
    responses((status = 200, description = "The page", body = String, content_type = "text/html; charset=utf-8"), Fails),
)]
async fn page() -> Response {
    text("text/html; charset=utf-8", PAGE)
}

/// Return a file of that page.
#[utoipa::path(
    get, path = "/docs/{file}", tag = "operation", operation_id = "show_docs_file",
    params(("file" = String, Path, description = "The file's name", example = "page.js")),
    responses(
        (status = 200, description = "The file", content(
            (String = "text/javascript; charset=utf-8"),
            (String = "text/css; charset=utf-8"),
        )),
        NoPage, Reads,
    ),
)]
async fn file(
    file: Result<Named<&'static File>, Problem>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let Named(file) =
        file.map_err(|_| Problem::new(Kind::NotFound, "the page has no file with this name"))?;
    Ok(text(file.content_type, file.text))
}
