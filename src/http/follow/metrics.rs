//! The metrics of the readers.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    reason: &'static str,
}

/// The readers' metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::http) struct Metrics {
    pub(super) reading: Gauge,
    ended: Family<Ended, Counter>,
}

impl Metrics {
    pub(in crate::http) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            reading: Gauge::default(),
            ended: Family::default(),
        };
        registry.register(
            "postroad_http_stream_readers",
            "Clients that follow streams by server-sent events",
            metrics.reading.clone(),
        );
        registry.register(
            "postroad_http_stream_readers_ended",
            "Readers by server-sent events that ended, by reason",
            metrics.ended.clone(),
        );
        metrics
    }

    pub(super) fn ended(&self, reason: &'static str) {
        self.ended.get_or_create(&Ended { reason }).inc();
    }
}
