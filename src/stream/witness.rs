//! The node's clock, a second witness of the time.
//!
//! The database's clock decides what is due and what is over. When it is more than a minute ahead of this node's clock, one
//! of the two is wrong, and the earlier one counts (`agreed_clock` in `migrations/broker`): a late message is repaired when
//! the clocks are, one that came early is not.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::handle::State;
use crate::{cluster, failpoint};

/// The gap between the two clocks from which on nobody knows the time, as `agreed_clock` and `rotate_buckets` have it.
const GAP_MAX: TimeDelta = TimeDelta::minutes(1);

/// This node's clock.
#[derive(Debug)]
pub(super) struct Witness {
    lead: TimeDelta,
}

impl Witness {
    pub(super) fn new(lead: Duration) -> Self {
        let lead = TimeDelta::from_std(lead).unwrap_or_default();
        let set = failpoint::limit("clock-lead-seconds", 0);
        Self {
            lead: lead + TimeDelta::seconds(set),
        }
    }

    /// The time by this node's clock.
    pub(super) fn now(&self) -> DateTime<Utc> {
        Utc::now() + self.lead
    }

    /// The time to go by when the database says that it is `clock`.
    pub(super) fn agreed(&self, clock: DateTime<Utc>) -> DateTime<Utc> {
        let own = self.now();
        match clock > own + GAP_MAX {
            true => own,
            false => clock,
        }
    }

    /// How far the database's clock is ahead of this node's, by the last heartbeat.
    pub(super) fn gap(&self, cluster: &cluster::Handle) -> TimeDelta {
        let view = cluster.view();
        let since = TimeDelta::from_std(view.as_of.elapsed()).unwrap_or_default();
        view.clock + since - self.now()
    }

    /// Whether it is too far for the two to agree.
    pub(super) fn is_apart(&self, cluster: &cluster::Handle) -> bool {
        self.gap(cluster).abs() > GAP_MAX
    }
}

#[derive(Debug)]
struct Gap {
    state: Arc<State>,
    cluster: cluster::Handle,
}

impl Collector for Gap {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let descriptor = encoder.encode_descriptor(
            "postroad_clock_gap_seconds",
            "How far the clock of the broker's database is ahead of this node's",
            None,
            MetricType::Gauge,
        )?;
        let gap = self.state.witness.gap(&self.cluster);
        ConstGauge::new(gap.as_seconds_f64()).encode(descriptor)
    }
}

/// Registers the gauge.
pub(super) fn register(registry: &mut Registry, state: &Arc<State>, cluster: &cluster::Handle) {
    registry.register_collector(Box::new(Gap {
        state: Arc::clone(state),
        cluster: cluster.clone(),
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_far_ahead_is_not_believed() {
        let witness = Witness::new(Duration::ZERO);
        let now = witness.now();
        for (ahead, is_believed) in [(0, true), (50, true), (3_600, false), (-3_600, true)] {
            let clock = now + TimeDelta::seconds(ahead);
            assert_eq!(witness.agreed(clock) == clock, is_believed, "{ahead}");
        }
    }
}
