//! The process's use of the machine, under the names that every Prometheus client uses. Read from /proc at scrape time;
//! nothing where there is no /proc. And the state of its log.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// Ticks per second of the times in /proc: a constant of Linux' interface.
const TICKS: f64 = 100.0;

/// Adds the process's metrics to those that are scraped.
pub fn register(registry: &mut Registry) {
    registry.register_collector(Box::new(Process));
}

#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        if let Some(seconds) = cpu_seconds() {
            let help = "Processor time of this process, user and system";
            let counter = ConstCounter::new(seconds);
            let described = encoder.encode_descriptor(
                "process_cpu_seconds",
                help,
                None,
                MetricType::Counter,
            )?;
            counter.encode(described)?;
        }
        if let Some(bytes) = resident_bytes() {
            let help = "Memory of this process that is in use";
            let gauge = ConstGauge::new(bytes);
            let described = encoder.encode_descriptor(
                "process_resident_memory_bytes",
                help,
                None,
                MetricType::Gauge,
            )?;
            gauge.encode(described)?;
        }
        let help = "Lines of the log that standard error did not take, or not in time";
        let counter = ConstCounter::new(super::dropped());
        let described = encoder.encode_descriptor(
            "postroad_log_lines_dropped",
            help,
            None,
            MetricType::Counter,
        )?;
        counter.encode(described)
    }
}

fn cpu_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name is in brackets and may hold anything. Behind it, user and system time are the 12th and 13th.
    let (_, rest) = text.rsplit_once(')')?;
    let mut times = rest.split_ascii_whitespace().skip(11);
    let user: f64 = times.next()?.parse().ok()?;
    let system: f64 = times.next()?.parse().ok()?;
    Some((user + system) / TICKS)
}

fn resident_bytes() -> Option<i64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: i64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_process_says_what_it_uses() {
        let mut registry = Registry::default();
        register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(
            text.contains("\npostroad_log_lines_dropped_total "),
            "{text}"
        );
        if cfg!(target_os = "linux") {
            assert!(text.contains("\nprocess_cpu_seconds_total "), "{text}");
            assert!(resident_bytes().unwrap() > 100_000);
        }
    }
}
