//! The HTTP API: routes, wire types, problem details, OpenAPI.
//!
//! Handlers do no database work of their own. A client that goes away drops its handler's future at any point, so a handler
//! only waits for the engines' handles, which may be dropped at any time. Each family of routes has one file; a route and
//! its description stand together, so that `openapi.yaml` cannot drift from the code.

mod accept;
mod body;
mod budget;
mod connection;
mod connections;
mod declaration;
mod door;
mod exposition;
mod extract;
mod follow;
mod forward;
mod front;
mod metrics;
mod observe;
mod openapi;
mod problem;
mod readiness;
mod route;
mod routes;
mod server;
mod state;
mod unread;
mod whole;

use axum::Router;
use axum::middleware::from_fn_with_state;
use utoipa_axum::router::OpenApiRouter;

use route::Routes;
use state::State;

pub use declaration::{queue_declaration, stream_declaration, topic_declaration};
pub use front::Early;
pub use metrics::Metrics;
pub use problem::{Kind, Problem};
pub use readiness::Readiness;
pub use server::{Error, Server, serve};
pub use state::{Options, Parts};

/// All routes, with their description.
fn api() -> Routes {
    let mut routes = routes::all(Routes::with(OpenApiRouter::with_openapi(openapi::begin())));
    openapi::finish(routes.router.get_openapi_mut());
    routes
}

/// The description of the API as YAML, OpenAPI 3.1. `make openapi` writes it to `openapi.yaml`.
#[must_use]
pub fn openapi_yaml() -> String {
    let description = api().router.into_openapi();
    description
        .to_yaml()
        .expect("the description has string keys only")
}

/// The API. One layer does all that is done around the routes: each further one would clone the boxes of those below it, and box a
/// future of its own, for every request.
fn router(routes: OpenApiRouter<State>, state: State) -> Router {
    let (routes, _) = routes.split_for_parts();
    routes
        .fallback(observe::not_found)
        .method_not_allowed_fallback(observe::method_not_allowed)
        .layer(from_fn_with_state(state.clone(), observe::observe))
        .with_state(state)
}
