//! The metrics of the cluster engine.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::view::{Standing, View};

/// Counters and gauges of the cluster engine.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    pub(super) heartbeat_failures: Counter,
    pub(super) incarnations: Counter,
    pub(super) leases_taken: Counter,
    pub(super) leases_fenced: Counter,
    pub(super) leases_yielded: Counter,
    pub(super) leases_held: Gauge,
    pub(super) nodes: Gauge,
    pub(super) leads: Gauge,
    pub(super) trusted: Gauge,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            heartbeat_failures: Counter::default(),
            incarnations: Counter::default(),
            leases_taken: Counter::default(),
            leases_fenced: Counter::default(),
            leases_yielded: Counter::default(),
            leases_held: Gauge::default(),
            nodes: Gauge::default(),
            leads: Gauge::default(),
            trusted: Gauge::default(),
        };
        registry.register(
            "postroad_node_heartbeat_failures",
            "Heartbeats that the database did not confirm",
            metrics.heartbeat_failures.clone(),
        );
        registry.register(
            "postroad_node_incarnations",
            "Node rows that this process has registered; more than one means that it was declared dead",
            metrics.incarnations.clone(),
        );
        registry.register(
            "postroad_leases_taken",
            "Leases taken",
            metrics.leases_taken.clone(),
        );
        registry.register(
            "postroad_leases_fenced",
            "Writes refused because the lease had been taken over",
            metrics.leases_fenced.clone(),
        );
        registry.register(
            "postroad_leases_yielded",
            "Leases handed over to the node they were assigned to",
            metrics.leases_yielded.clone(),
        );
        registry.register(
            "postroad_nodes",
            "Live nodes, as this one sees them",
            metrics.nodes.clone(),
        );
        registry.register(
            "postroad_node_leads",
            "1 while this node assigns the leases",
            metrics.leads.clone(),
        );
        registry.register(
            "postroad_leases_held",
            "Leases held now",
            metrics.leases_held.clone(),
        );
        registry.register(
            "postroad_node_trusted",
            "1 while the node's row is surely not expired",
            metrics.trusted.clone(),
        );
        metrics
    }

    pub(super) fn note(&self, view: &View) {
        let live = view.nodes.iter();
        let live = live.filter(|member| member.standing != Standing::Expired);
        self.nodes
            .set(i64::try_from(live.count()).unwrap_or(i64::MAX));
    }
}
