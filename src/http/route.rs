//! A route as it is declared: its handler, its description, and its nature, which the layers around it go by.

use std::collections::HashMap;

use axum::http::Method;
use utoipa::openapi::path::Operation;
use utoipa::openapi::{PathItem, RefOr, Required};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use super::budget::SMALL_BYTES;
use super::extract::VERB_MAX_BYTES;
use super::state::State;

/// The way in which a node sends a request to the queue's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::http) enum Forward {
    /// As often as need be: a repeat changes nothing.
    #[default]
    Again,
    /// Once: a repeat would do it once more.
    Once,
    /// A receive: in its turn, for as long as it asks to wait.
    Poll,
}

/// The traits of a route that the layers around it go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) struct Nature {
    /// How it goes to the queue's owner.
    pub(in crate::http) forward: Forward,
    /// The largest body, in bytes, of one that goes there.
    pub(in crate::http) body_max_bytes: usize,
    /// True if an empty body is refused.
    needs_body: bool,
}

impl Default for Nature {
    fn default() -> Self {
        Self {
            forward: Forward::default(),
            body_max_bytes: SMALL_BYTES,
            needs_body: false,
        }
    }
}

/// One path with its methods.
pub(in crate::http) struct Route {
    routes: UtoipaMethodRouter<State>,
    nature: Nature,
}

/// Says more of a route than its path and its handler: `route(routes!(seek)).needs_body().once()`.
pub(in crate::http) fn route(routes: UtoipaMethodRouter<State>) -> Route {
    Route {
        routes,
        nature: Nature::default(),
    }
}

impl Route {
    /// An empty body is refused. Without this it counts as `{}`, or when publishing to a topic as an empty payload.
    pub(in crate::http) const fn needs_body(mut self) -> Self {
        self.nature.needs_body = true;
        self
    }

    /// A repeat would do it once more: a node that does not hear what became of it says so, and does not send it again.
    pub(in crate::http) const fn once(mut self) -> Self {
        self.nature.forward = Forward::Once;
        self
    }

    /// It waits for messages.
    pub(in crate::http) const fn polls(mut self) -> Self {
        self.nature.forward = Forward::Poll;
        self
    }

    /// Its body names up to 1,000 deliveries.
    pub(in crate::http) const fn names_deliveries(mut self) -> Self {
        self.nature.body_max_bytes = VERB_MAX_BYTES;
        self
    }
}

impl From<UtoipaMethodRouter<State>> for Route {
    fn from(routes: UtoipaMethodRouter<State>) -> Self {
        route(routes)
    }
}

/// The natures of all routes, by path and method.
#[derive(Debug, Default)]
pub(in crate::http) struct Natures(HashMap<String, HashMap<Method, Nature>>);

impl Natures {
    /// Of a route; of one that is not there the usual one.
    pub(in crate::http) fn of(&self, path: &str, method: &Method) -> Nature {
        let methods = self.0.get(path);
        let nature = methods.and_then(|methods| methods.get(method));
        nature.copied().unwrap_or_default()
    }
}

/// Routes with their descriptions and natures.
pub(in crate::http) struct Routes {
    pub(in crate::http) router: OpenApiRouter<State>,
    pub(in crate::http) natures: Natures,
}

impl Routes {
    /// None yet.
    pub(in crate::http) fn new() -> Self {
        Self::with(OpenApiRouter::new())
    }

    /// None yet; the description has what stands above all routes.
    pub(in crate::http) fn with(router: OpenApiRouter<State>) -> Self {
        Self {
            router,
            natures: Natures::default(),
        }
    }

    /// With these too.
    pub(in crate::http) fn routes(mut self, route: impl Into<Route>) -> Self {
        let Route { mut routes, nature } = route.into();
        for (path, item) in &mut routes.1.paths {
            for (method, operation) in operations(item) {
                if let Some(RefOr::T(body)) = &mut operation.request_body {
                    body.required = Some(match nature.needs_body {
                        true => Required::True,
                        false => Required::False,
                    });
                }
                let natures = self.natures.0.entry(path.clone()).or_default();
                natures.insert(method, nature);
            }
        }
        self.router = self.router.routes(routes);
        self
    }

    /// With those of another family.
    pub(in crate::http) fn merge(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
        for (path, natures) in other.natures.0 {
            self.natures.0.entry(path).or_default().extend(natures);
        }
        self
    }
}

/// The operations of a path.
pub(in crate::http) fn operations(
    item: &mut PathItem,
) -> impl Iterator<Item = (Method, &mut Operation)> {
    [
        (Method::GET, &mut item.get),
        (Method::PUT, &mut item.put),
        (Method::POST, &mut item.post),
        (Method::DELETE, &mut item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}
