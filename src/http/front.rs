//! The answers before the routes exist. Until the engines run, the process reports that it is alive, what it waits for and
//! how it is doing, and refuses the rest. A request that arrives shortly before the routes exist waits for them.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, Response};
use axum::response::IntoResponse as _;
use prometheus_client::registry::Registry;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::connections::PROBES;
use super::door::Hosts;
use super::observe::RequestId;
use super::problem::{Kind, Problem};
use super::routes::system;
use super::state::Options;
use super::{Metrics, Readiness, door, forward, observe};

/// How long a request waits for the routes: a usual start is over by then.
const PATIENCE: Duration = Duration::from_secs(2);

/// The server's state before the engines are there.
#[derive(Debug, Clone)]
pub struct Early {
    /// The reasons why the process is not ready.
    pub readiness: Readiness,
    /// The server's own metrics.
    pub metrics: Metrics,
    /// The text of `/metrics` until the whole registry is there.
    pub registry: Arc<Registry>,
}

/// See above.
#[derive(Debug)]
pub(in crate::http) struct Front {
    pub(in crate::http) early: Early,
    pub(in crate::http) options: Options,
    /// The names that requests may ask for.
    hosts: Hosts,
    /// Long polls answer at once, with what they have.
    pub(in crate::http) stopping: CancellationToken,
    routes: OnceLock<Router>,
    opened: CancellationToken,
}

impl Front {
    pub(in crate::http) fn new(early: Early, options: Options, address: SocketAddr) -> Self {
        Self {
            early,
            hosts: Hosts::new(address, &options),
            options,
            stopping: CancellationToken::new(),
            routes: OnceLock::new(),
            opened: CancellationToken::new(),
        }
    }

    /// The routes are there.
    pub(in crate::http) fn open(&self, routes: Router) {
        let _ = self.routes.set(routes);
        self.opened.cancel();
    }

    /// The routes, once they are there.
    pub(in crate::http) fn routes(&self) -> Option<&Router> {
        self.routes.get()
    }

    /// Answers a request that came before the routes were there.
    pub(in crate::http) async fn answer_early(
        self: Arc<Self>,
        request: Request<Body>,
    ) -> Response<Body> {
        let path = request.uri().path();
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        let is_probe = is_read && PROBES.contains(&path);
        // The door is the same as that before the routes, for whatever is said of the start as well.
        let answer = if let Err(problem) = door::check(&self.hosts, &request) {
            problem.into_response()
        } else if !is_probe {
            let opened = timeout(PATIENCE, self.opened.cancelled()).await;
            if let (Ok(()), Some(routes)) = (opened, self.routes()) {
                let answer = routes.clone().oneshot(request).await;
                return answer.unwrap_or_else(|never| match never {});
            }
            self.refuse(&request).into_response()
        } else {
            match path {
                "/healthz" => system::health(),
                "/readyz" => system::ready(&self.early.readiness),
                _ => system::scrape(&self.early.registry, request.headers())
                    .unwrap_or_else(Problem::into_response),
            }
        };
        let id = RequestId::of(&request);
        let mut answer = observe::finish(answer, request.uri().path(), id.as_str());
        let headers = answer.headers_mut();
        headers.insert(observe::REQUEST_ID, id.header());
        door::protect(headers);
        answer
    }

    fn refuse(&self, request: &Request<Body>) -> Problem {
        // Another node takes this one for the owner of a queue, as it was before it started anew. It is to look again.
        if forward::is_passed_on(request.headers()) {
            let detail = "the node has just started, and owns nothing yet";
            return Problem::new(Kind::MisdirectedRequest, detail);
        }
        let mut detail = "the broker is starting".to_owned();
        if let Some((_, reason)) = self.early.readiness.reasons().first() {
            detail = format!("{detail}: {reason}");
        }
        Problem::new(Kind::Unavailable, detail)
    }
}
