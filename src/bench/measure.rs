//! The measurements of a round, and medians over rounds.

use std::sync::atomic::Ordering;
use std::time::Instant;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::load::Shared;
use super::metrics::{Scrape, Times};
use super::series::{self, Second};
use super::tracker::Checked;
use super::{Bench, Error, proc};
use crate::store::{self, bench::Cost};

/// Readings at one moment.
pub(super) struct Moment {
    at: Instant,
    published: u64,
    settled: u64,
    cost: Cost,
    scrape: Scrape,
    broker_cpu: Option<f64>,
    postgres_cpu: Option<f64>,
    own_cpu: Option<f64>,
}

impl Moment {
    pub(super) async fn take(bench: &mut Bench, shared: &Shared) -> Result<Self, Error> {
        let scrape = bench.broker.api.metrics().await?;
        let cost = store::bench::cost(&mut bench.connection).await?;
        let own = i32::try_from(std::process::id()).ok();
        // A broker that ran before says itself what it used.
        let said = scrape.value("process_cpu_seconds_total");
        Ok(Self {
            broker_cpu: bench.broker.cpu_seconds().or(said),
            postgres_cpu: bench.postgres.and_then(proc::Postgres::cpu_seconds),
            own_cpu: own.and_then(proc::cpu_seconds_of),
            cost,
            scrape,
            published: shared.published.load(Ordering::Relaxed),
            settled: shared.settled.load(Ordering::Relaxed),
            at: Instant::now(),
        })
    }
}

/// Quantiles of a latency, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) count: u64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

impl Percentiles {
    pub(super) fn of(latency: &Histogram<u64>) -> Option<Self> {
        let at = |quantile| series::milliseconds(latency, quantile);
        Some(Self {
            count: latency.len(),
            p50: at(0.5)?,
            p90: at(0.9)?,
            p99: at(0.99)?,
            p999: at(0.999)?,
            max: at(1.0)?,
        })
    }
}

/// A stretch of the measured time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Window {
    /// From the beginning of the measured time.
    pub(super) second: usize,
    pub(super) seconds: usize,
    pub(super) per_second: f64,
    pub(super) p50_ms: Option<f64>,
    pub(super) p99_ms: Option<f64>,
}

/// The measurements of a round. Costs are per message, not per delivery.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Measured {
    pub(super) seconds: f64,
    /// Messages whose deliveries were settled in that time.
    pub(super) messages: f64,
    pub(super) messages_per_second: f64,
    pub(super) deliveries_per_second: f64,
    pub(super) published_per_second: f64,
    /// Of `backlog`: from the first insert to the last message in the stream.
    pub(super) fill_per_second: Option<f64>,
    pub(super) latency: Option<Percentiles>,
    pub(super) first_after_silence: Option<Percentiles>,
    pub(super) broker_cpu_us: Option<f64>,
    pub(super) postgres_cpu_us: Option<f64>,
    pub(super) own_cpu_us: Option<f64>,
    /// In percent of one core.
    pub(super) broker_cpu_percent: Option<f64>,
    pub(super) postgres_cpu_percent: Option<f64>,
    pub(super) wal_bytes: Option<f64>,
    pub(super) database_growth_mib: f64,
    pub(super) broker_memory_mib: Option<f64>,
    /// From a queue's decision to its commit: what receives and acks wait for.
    pub(super) journal_wait: Option<Times>,
    /// The group commits themselves.
    pub(super) journal_commit: Option<Times>,
    pub(super) windows: Vec<Window>,
    pub(super) checked: Checked,
    /// The whole distribution of latency: quantile and milliseconds.
    pub(super) latency_curve: Vec<(f64, f64)>,
}

const CURVE: [f64; 12] = [
    0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0,
];

impl Measured {
    pub(super) fn between(before: &Moment, after: &Moment, shared: &Shared) -> Self {
        let seconds = (after.at - before.at).as_secs_f64();
        let deliveries = (after.settled - before.settled) as f64;
        let messages = deliveries / shared.tracker.deliveries_per_message() as f64;
        let per_message = |value: Option<f64>| {
            value
                .filter(|_| messages > 0.0)
                .map(|value| value / messages)
        };
        let cpu = |before: Option<f64>, after: Option<f64>| Some(after? - before?);
        let broker = cpu(before.broker_cpu, after.broker_cpu);
        let postgres = cpu(before.postgres_cpu, after.postgres_cpu);
        let own = cpu(before.own_cpu, after.own_cpu);
        let latency = shared.series.latency(before.at, after.at);
        let wal = (after.cost.wal_bytes - before.cost.wal_bytes) as f64;
        let growth = (after.cost.database_bytes - before.cost.database_bytes) as f64;
        let times = |name: &str| after.scrape.times_since(&before.scrape, name);
        Self {
            seconds,
            messages,
            messages_per_second: messages / seconds,
            deliveries_per_second: deliveries / seconds,
            published_per_second: (after.published - before.published) as f64 / seconds,
            latency: Percentiles::of(&latency),
            broker_cpu_us: per_message(broker.map(|cpu| cpu * 1e6)),
            postgres_cpu_us: per_message(postgres.map(|cpu| cpu * 1e6)),
            own_cpu_us: per_message(own.map(|cpu| cpu * 1e6)),
            broker_cpu_percent: broker.map(|cpu| cpu / seconds * 100.0),
            postgres_cpu_percent: postgres.map(|cpu| cpu / seconds * 100.0),
            wal_bytes: per_message(Some(wal)),
            database_growth_mib: growth / 1024.0 / 1024.0,
            journal_wait: times("postroad_queue_journal_wait_duration_seconds"),
            journal_commit: times("postroad_queue_journal_group_duration_seconds"),
            windows: windows(&shared.series.between(before.at, after.at), shared),
            latency_curve: CURVE
                .iter()
                .filter_map(|at| Some((*at, series::milliseconds(&latency, *at)?)))
                .collect(),
            ..Self::default()
        }
    }
}

/// Windows of 10 s, or of 1 s for a short run.
fn windows(seconds: &[Second], shared: &Shared) -> Vec<Window> {
    let width = if seconds.len() > 30 { 10 } else { 1 };
    let per_message = shared.tracker.deliveries_per_message() as f64;
    let mut windows = Vec::new();
    for (number, part) in seconds.chunks(width).enumerate() {
        // Cut short by the end.
        if part.len() < width {
            break;
        }
        let mut latency = series::histogram();
        for second in part {
            let _ = latency.add(&second.latency);
        }
        let settled: u64 = part.iter().map(|second| second.settled).sum();
        windows.push(Window {
            second: number * width,
            seconds: width,
            per_second: settled as f64 / per_message / width as f64,
            p50_ms: series::milliseconds(&latency, 0.5),
            p99_ms: series::milliseconds(&latency, 0.99),
        });
    }
    windows
}

/// The median; of an even number of values the mean of the middle two. None without values.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => values.get(middle).copied(),
        _ => Some(f64::midpoint(
            *values.get(middle - 1)?,
            *values.get(middle)?,
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0]), Some(2.5));
    }
}
