//! The reconciliation: compares the tables after the run with what Postroad promises.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Instant;

use hdrhistogram::Histogram;
use uuid::Uuid;

use super::consumer::Service;
use super::progress::thousands;
use crate::store::shop::{QueueFigures, StreamFigures};

/// Everything the demo found out about its run.
#[derive(Debug, Default)]
pub struct Report {
    /// Transactions that the producers rolled back on purpose.
    pub rolled_back: u64,
    /// The committed orders beside the stream.
    pub stream: StreamFigures,
    /// The committed orders beside the records of billing's and shipping's consumers.
    pub queues: [QueueFigures; 2],
    /// Median and 99th percentile from commit to first receipt, in microseconds, of billing and shipping.
    pub latencies: [(u64, u64); 2],
    /// How often the broker was killed.
    pub kills: u64,
}

impl Report {
    /// Whether every promise held.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let stream = &self.stream;
        stream.lost == 0
            && stream.phantoms == 0
            && stream.duplicated == 0
            && stream.out_of_order == 0
            && self
                .queues
                .iter()
                .all(|queue| queue.lost == 0 && queue.redelivered_after_ack == 0)
    }

    /// The report as text for people.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        let mut line = |label: &str, figures: &[String]| {
            let mut row = format!("  {label:<46}");
            for figure in figures {
                let _ = write!(row, "{figure:>12}");
            }
            out.push_str(row.trim_end());
            out.push('\n');
        };
        let stream = &self.stream;
        line("", &["orders".into()]);
        line("committed", &[signed(stream.committed)]);
        line("rolled back on purpose", &[thousands(self.rolled_back)]);
        line("messages in the stream", &[signed(stream.in_stream)]);
        line(
            "  lost: committed, not in the stream",
            &[signed(stream.lost)],
        );
        line(
            "  in the stream, but never committed",
            &[signed(stream.phantoms)],
        );
        line("  twice in the stream", &[signed(stream.duplicated)]);
        line(
            "  out of order within a product",
            &[signed(stream.out_of_order)],
        );
        line("", &[]);
        let both = |figure: fn(&QueueFigures) -> i64| {
            self.queues
                .iter()
                .map(|queue| signed(figure(queue)))
                .collect::<Vec<_>>()
        };
        line("", &Service::ALL.map(|service| service.queue().to_owned()));
        line("delivered", &both(|queue| queue.delivered));
        line(
            "  lost: committed, never delivered",
            &both(|queue| queue.lost),
        );
        line("acknowledged", &both(|queue| queue.acknowledged));
        line(
            "  delivered again after the ack was answered",
            &both(|queue| queue.redelivered_after_ack),
        );
        line(
            "refused by the consumer, to come again",
            &both(|queue| queue.nacked),
        );
        line(
            "deliveries beyond an order's first",
            &both(|queue| queue.redelivered),
        );
        line(
            "commit to receipt, median",
            &self.latencies.map(|(p50, _)| milliseconds(p50)),
        );
        line(
            "commit to receipt, 99th percentile",
            &self.latencies.map(|(_, p99)| milliseconds(p99)),
        );
        out
    }

    /// One sentence that says how it went.
    #[must_use]
    pub fn verdict(&self) -> String {
        if !self.is_clean() {
            return "FAILED: the figures above that should be 0 and are not show what went wrong."
                .into();
        }
        let mut text =
            "Nothing lost, nothing twice in the stream, every product's orders in the order of their commits".to_owned();
        match self.kills {
            0 => {}
            1 => text.push_str(", with the broker killed once on the way"),
            kills => {
                let _ = write!(text, ", with the broker killed {kills} times on the way");
            }
        }
        text.push('.');
        text
    }
}

fn signed(number: i64) -> String {
    thousands(number.unsigned_abs())
}

fn milliseconds(micros: u64) -> String {
    format!("{:.1} ms", micros as f64 / 1_000.0)
}

/// Commit to first receipt, by one monotonic clock: producers and consumers are tasks of one process.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    committed: HashMap<Uuid, Instant>,
    received: [HashMap<Uuid, Instant>; 2],
}

impl Latencies {
    pub(super) fn committed(&mut self, order: Uuid, at: Instant) {
        self.committed.insert(order, at);
    }

    pub(super) fn received(&mut self, service: Service, order: Uuid, at: Instant) {
        self.received[service as usize].entry(order).or_insert(at);
    }

    /// Median and 99th percentile of one service, in microseconds; zeros without a delivery.
    pub(super) fn percentiles(&self, service: Service) -> (u64, u64) {
        // Up to an hour; longer ones count as one.
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 3_600_000_000, 3)
            .expect("the bounds and three significant digits are allowed");
        for (order, received) in &self.received[service as usize] {
            if let Some(committed) = self.committed.get(order) {
                let micros = received.saturating_duration_since(*committed).as_micros();
                // Not saturating_record: that one cuts at the present range and never lets the histogram grow.
                histogram
                    .record(u64::try_from(micros).unwrap_or(u64::MAX))
                    .expect("a histogram that resizes takes every value");
            }
        }
        (
            histogram.value_at_quantile(0.5),
            histogram.value_at_quantile(0.99),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_broken_promise_makes_the_report_fail() {
        type Break = fn(&mut Report);
        let breaks: [(&str, Break); 7] = [
            ("lost", |report| report.stream.lost = 1),
            ("phantom", |report| report.stream.phantoms = 1),
            ("duplicated", |report| report.stream.duplicated = 1),
            ("out of order", |report| report.stream.out_of_order = 1),
            ("never delivered", |report| report.queues[1].lost = 1),
            ("after ack", |report| {
                report.queues[0].redelivered_after_ack = 1
            }),
            ("several", |report| report.stream.lost = 12_345),
        ];
        assert!(Report::default().is_clean());
        for (name, fault) in breaks {
            let mut report = Report::default();
            fault(&mut report);
            assert!(!report.is_clean(), "{name}");
            assert!(report.verdict().starts_with("FAILED"), "{name}");
        }
        let mut report = Report::default();
        report.queues[1].redelivered = 9;
        assert!(report.is_clean(), "delivery is at least once");
    }

    #[test]
    fn latency_counts_the_first_receipt() {
        let mut latencies = Latencies::default();
        let order = Uuid::from_u128(1);
        let start = Instant::now();
        latencies.received(Service::Billing, order, start + Duration::from_millis(5));
        latencies.received(Service::Billing, order, start + Duration::from_millis(50));
        latencies.committed(order, start);
        let (p50, p99) = latencies.percentiles(Service::Billing);
        assert!((4_990..=5_010).contains(&p50) && p50 == p99, "{p50} {p99}");
        assert_eq!(latencies.percentiles(Service::Shipping), (0, 0));
    }
}
