//! The metrics of scheduled messages on the node that publishes them, as of the scrape: a lag grows while the duty cannot
//! go on, whatever holds it up.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::cluster;
use crate::stream::handle::State;

#[derive(Debug)]
struct Metrics {
    state: Arc<State>,
    cluster: cluster::Handle,
}

/// Registers the gauges.
pub(in crate::stream) fn register(
    registry: &mut Registry,
    state: &Arc<State>,
    cluster: &cluster::Handle,
) {
    registry.register_collector(Box::new(Metrics {
        state: Arc::clone(state),
        cluster: cluster.clone(),
    }));
}

fn late(due_at: Option<DateTime<Utc>>, now: DateTime<Utc>) -> f64 {
    due_at.map_or(0.0, |due_at| (now - due_at).as_seconds_f64().max(0.0))
}

fn by_stream<N: EncodeGaugeValue + Copy>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    values: &[(String, N)],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (stream, value) in values {
        let labels = [("stream", stream.as_str())];
        ConstGauge::new(*value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    value: impl EncodeGaugeValue,
) -> fmt::Result {
    let descriptor = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value).encode(descriptor)
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = self.cluster.now();
        let (counts, lags, schedules) = {
            let known = self.state.schedule.known();
            let streams = known.streams.values();
            let counts: Vec<_> = streams
                .clone()
                .map(|stream| (stream.name.to_string(), stream.count))
                .collect();
            let lags: Vec<_> = streams
                .map(|stream| (stream.name.to_string(), late(stream.next_due_at, now)))
                .collect();
            (counts, lags, known.schedules)
        };
        let to = &mut encoder;
        by_stream(
            to,
            (
                "postroad_scheduled_messages",
                "Messages that wait to enter their stream, by stream, on the node that publishes them",
            ),
            &counts,
        )?;
        by_stream(
            to,
            (
                "postroad_scheduled_lag_seconds",
                "How long the oldest due message of a stream has not been published; 0 when none is due",
            ),
            &lags,
        )?;
        gauge(
            to,
            (
                "postroad_schedules_failing",
                "Schedules whose latest occurrence could not be published, on the node that publishes them",
            ),
            schedules.failing_count,
        )?;
        gauge(
            to,
            (
                "postroad_schedule_lag_seconds",
                "How long the most overdue occurrence has not been published; 0 when none is due",
            ),
            late(schedules.next_due_at, now),
        )
    }
}
