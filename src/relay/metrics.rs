//! The relays' metrics, read from their statuses when they are scraped.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::handle::Handle;
use super::status::{State, Status};
use crate::cluster;

#[derive(Debug)]
struct Metrics {
    relays: Handle,
    cluster: cluster::Handle,
}

pub(super) fn register(registry: &mut Registry, relays: &Handle, cluster: cluster::Handle) {
    registry.register_collector(Box::new(Metrics {
        relays: relays.clone(),
        cluster,
    }));
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    statuses: &[Status],
    value: impl Fn(&Status) -> Option<f64>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for status in statuses {
        if let Some(value) = value(status) {
            let labels = [("origin", status.name.as_str())];
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    statuses: &[Status],
    value: impl Fn(&Status) -> u64,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for status in statuses {
        let labels = [("origin", status.name.as_str())];
        ConstCounter::new(value(status)).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
const fn float(value: u64) -> f64 {
    value as f64
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let statuses = self.relays.origins();
        let now = self.cluster.now();
        let to = &mut encoder;
        counter(
            to,
            "postroad_relay_messages",
            "Messages relayed from the outbox",
            &statuses,
            |s| s.relayed_count,
        )?;
        counter(
            to,
            "postroad_relay_steps",
            "Windows of the outbox opened",
            &statuses,
            |s| s.step_count,
        )?;
        counter(
            to,
            "postroad_relay_rerelays",
            "Times that the whole outbox was read again",
            &statuses,
            |s| s.rerelay_count,
        )?;
        counter(
            to,
            "postroad_relay_gaps",
            "Times that emptied rows were found which the broker, restored from a backup, can lack",
            &statuses,
            |s| s.gap_count.unwrap_or_default(),
        )?;
        counter(
            to,
            "postroad_outbox_leaves_emptied",
            "Leaves of the outbox emptied",
            &statuses,
            |s| s.emptied_count,
        )?;
        gauge(
            to,
            "postroad_relay_lag_rows",
            "Outbox rows known to be committed and not yet relayed",
            &statuses,
            |s| Some(float(s.lag_rows)),
        )?;
        gauge(
            to,
            "postroad_relay_lag_seconds",
            "How long the relay has not been sure that everything is relayed",
            &statuses,
            |s| s.lag(now).map(|lag| lag.as_secs_f64()),
        )?;
        gauge(
            to,
            "postroad_relay_rejected_rows",
            "Outbox rows that could not become messages and have not been resent",
            &statuses,
            |s| Some(float(s.rejected_count)),
        )?;
        gauge(
            to,
            "postroad_relay_step_seconds",
            "How long the last window took to open",
            &statuses,
            |s| Some(s.step_time.as_secs_f64()),
        )?;
        gauge(
            to,
            "postroad_outbox_rotation_blocked_seconds",
            "How long a leaf of the outbox could not be emptied",
            &statuses,
            |s| {
                let blocked = s.blocked.as_ref().map(|blocked| now - blocked.since);
                let blocked = blocked.and_then(|time| time.to_std().ok());
                Some(blocked.map_or(0.0, |time| time.as_secs_f64()))
            },
        )?;
        let mut family = to.encode_descriptor(
            "postroad_relay_state",
            "1 for the state that the relay is in",
            None,
            MetricType::Gauge,
        )?;
        for status in &statuses {
            for state in State::ALL {
                let labels = [("origin", status.name.as_str()), ("state", state.as_str())];
                let value = i64::from(status.state == *state);
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
