//! The metrics of the stream engine.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::handle::State;
use crate::domain::name::StreamName;

/// Counters, gauges and histograms of the stream engine.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    pub(super) messages_appended: Counter,
    pub(super) duplicates: Counter,
    pub(super) members_refused: Counter,
    pub(super) groups_unknown: Counter,
    pub(super) group_messages: Histogram,
    pub(super) append_seconds: Histogram,
    pub(super) lanes: Gauge,
    pub(super) cache_bytes: Gauge,
    pub(super) gaps_read: Counter,
    pub(super) leaves_made: Counter,
    pub(super) leaves_emptied: Counter,
    pub(super) leaves_dropped: Counter,
    pub(super) leaves_blocked: Gauge,
    pub(super) maintenance_failures: Counter,
    pub(super) scheduled_accepted: Counter,
    pub(super) scheduled_published: Counter,
    pub(super) scheduled_cancelled: Counter,
    pub(super) scheduled_failures: Counter,
    pub(super) scheduled_occurrences: Counter,
    pub(super) occurrences_failed: Counter,
    unsettled_limit_used: Family<OfStream, Gauge<f64, AtomicU64>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStream {
    stream: String,
}

/// How much of the keys of keyed streams is in memory, as of when it is scraped.
#[derive(Debug)]
pub(super) struct OpenKeys(pub(super) Arc<State>);

impl Collector for OpenKeys {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (keys, messages) = self.0.keys.size();
        for (name, help, value) in [
            (
                "postroad_stream_open_keys",
                "Keys of keyed streams that have had messages since the last fold, in this node's memory",
                keys,
            ),
            (
                "postroad_stream_open_key_messages",
                "Messages of these keys since the last fold",
                messages,
            ),
        ] {
            let descriptor = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(descriptor)?;
        }
        Ok(())
    }
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            messages_appended: Counter::default(),
            duplicates: Counter::default(),
            members_refused: Counter::default(),
            groups_unknown: Counter::default(),
            group_messages: Histogram::new(exponential_buckets(1.0, 4.0, 8)),
            append_seconds: Histogram::new(exponential_buckets(0.000_5, 2.0, 14)),
            lanes: Gauge::default(),
            cache_bytes: Gauge::default(),
            gaps_read: Counter::default(),
            leaves_made: Counter::default(),
            leaves_emptied: Counter::default(),
            leaves_dropped: Counter::default(),
            leaves_blocked: Gauge::default(),
            maintenance_failures: Counter::default(),
            scheduled_accepted: Counter::default(),
            scheduled_published: Counter::default(),
            scheduled_cancelled: Counter::default(),
            scheduled_failures: Counter::default(),
            scheduled_occurrences: Counter::default(),
            occurrences_failed: Counter::default(),
            unsettled_limit_used: Family::default(),
        };
        metrics.register_appends(registry);
        metrics.register_log(registry);
        metrics.register_scheduled(registry);
        metrics
    }

    pub(super) fn limit_used(&self, stream: &StreamName, used: f64) {
        let stream = stream.to_string();
        let label = OfStream { stream };
        self.unsettled_limit_used.get_or_create(&label).set(used);
    }

    pub(super) fn forget_limit(&self, stream: &StreamName) {
        let stream = stream.to_string();
        self.unsettled_limit_used.remove(&OfStream { stream });
    }

    fn register_scheduled(&self, registry: &mut Registry) {
        registry.register(
            "postroad_schedule_occurrences",
            "Occurrences of schedules that this node published",
            self.scheduled_occurrences.clone(),
        );
        registry.register(
            "postroad_schedule_occurrences_failed",
            "Occurrences of schedules that this node left out, since they could not be published",
            self.occurrences_failed.clone(),
        );
        registry.register(
            "postroad_scheduled_accepted",
            "Messages that this node accepted for later",
            self.scheduled_accepted.clone(),
        );
        registry.register(
            "postroad_scheduled_published",
            "Scheduled messages that this node published",
            self.scheduled_published.clone(),
        );
        registry.register(
            "postroad_scheduled_cancelled",
            "Scheduled messages cancelled by way of this node",
            self.scheduled_cancelled.clone(),
        );
        registry.register(
            "postroad_scheduled_failures",
            "Passes of publishing scheduled messages that failed",
            self.scheduled_failures.clone(),
        );
    }

    fn register_appends(&self, registry: &mut Registry) {
        registry.register(
            "postroad_stream_messages_appended",
            "Messages appended by this node",
            self.messages_appended.clone(),
        );
        registry.register(
            "postroad_stream_lanes",
            "Lanes beside the appender that have work: streams whose log another session holds a lock on",
            self.lanes.clone(),
        );
        registry.register(
            "postroad_stream_duplicates",
            "Published messages that were in their stream already",
            self.duplicates.clone(),
        );
        registry.register(
            "postroad_stream_appends_refused",
            "Members refused: fenced, a moved position, an id conflict",
            self.members_refused.clone(),
        );
        registry.register(
            "postroad_stream_outcomes_unknown",
            "Group commits whose connection was lost before the answer",
            self.groups_unknown.clone(),
        );
        registry.register(
            "postroad_stream_group_messages",
            "Messages per group commit",
            self.group_messages.clone(),
        );
        registry.register(
            "postroad_stream_append_seconds",
            "Duration of a group commit",
            self.append_seconds.clone(),
        );
    }

    fn register_log(&self, registry: &mut Registry) {
        registry.register(
            "postroad_stream_unsettled_limit_used",
            "Share of a stream's hard limit (age or bytes) that its unsettled messages have used up, 0 to 1",
            self.unsettled_limit_used.clone(),
        );
        registry.register(
            "postroad_stream_cache_bytes",
            "Recent entries held in memory",
            self.cache_bytes.clone(),
        );
        registry.register(
            "postroad_stream_tail_gaps_read",
            "Times that the tail read the log for another node's appends",
            self.gaps_read.clone(),
        );
        registry.register(
            "postroad_stream_leaves_made",
            "Partitions of the log made ahead",
            self.leaves_made.clone(),
        );
        registry.register(
            "postroad_stream_leaves_emptied",
            "Partitions of the log emptied by retention",
            self.leaves_emptied.clone(),
        );
        registry.register(
            "postroad_stream_leaves_dropped",
            "Emptied partitions of the log dropped",
            self.leaves_dropped.clone(),
        );
        registry.register(
            "postroad_stream_leaves_blocked",
            "Partitions of the log that retention found in use in its last pass",
            self.leaves_blocked.clone(),
        );
        registry.register(
            "postroad_stream_maintenance_failures",
            "Maintenance passes that failed",
            self.maintenance_failures.clone(),
        );
    }
}
