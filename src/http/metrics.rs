//! Counts and durations of requests, by route template: labels with the actual path would make a series per name.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::follow;

/// The labels of requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    method: &'static str,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    method: &'static str,
    route: String,
}

/// The metrics of the HTTP server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Answered, Counter>,
    durations: Family<Asked, Histogram, fn() -> Histogram>,
    pub(in crate::http) connections: Gauge,
    pub(in crate::http) in_flight: Gauge,
    /// Requests passed on to other nodes.
    pub(in crate::http) forwarded: Counter,
    /// Long polls for queues of other nodes that wait here and not there.
    pub(in crate::http) polls_in_line: Gauge,
    pub(in crate::http) readers: follow::Metrics,
}

impl Metrics {
    /// Makes and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let histogram: fn() -> Histogram = || {
            Histogram::new([
                0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0,
            ])
        };
        let metrics = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(histogram),
            connections: Gauge::default(),
            in_flight: Gauge::default(),
            forwarded: Counter::default(),
            polls_in_line: Gauge::default(),
            readers: follow::Metrics::new(registry),
        };
        registry.register(
            "postroad_http_requests",
            "HTTP requests answered, by method, route and status",
            metrics.requests.clone(),
        );
        registry.register_with_unit(
            "postroad_http_request_duration",
            "Time from a request's head to its answer's head; a long poll counts its wait",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        registry.register(
            "postroad_http_connections",
            "Open HTTP connections",
            metrics.connections.clone(),
        );
        registry.register(
            "postroad_http_requests_in_flight",
            "HTTP requests being worked on, long polls included",
            metrics.in_flight.clone(),
        );
        registry.register(
            "postroad_http_requests_forwarded",
            "Requests passed on to the nodes that own their queues, repeats included",
            metrics.forwarded.clone(),
        );
        registry.register(
            "postroad_http_polls_in_line",
            "Long polls for queues of other nodes that wait here; a few per queue wait at its owner",
            metrics.polls_in_line.clone(),
        );
        metrics
    }

    pub(in crate::http) fn record(
        &self,
        method: &axum::http::Method,
        route: &str,
        status: u16,
        took: Duration,
    ) {
        let method = match method.as_str() {
            "GET" => "GET",
            "HEAD" => "HEAD",
            "POST" => "POST",
            "PUT" => "PUT",
            "DELETE" => "DELETE",
            _ => "other",
        };
        self.requests
            .get_or_create(&Answered {
                method,
                route: route.to_owned(),
                status,
            })
            .inc();
        self.durations
            .get_or_create(&Asked {
                method,
                route: route.to_owned(),
            })
            .observe(took.as_secs_f64());
    }
}
