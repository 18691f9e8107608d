//! A queue's own gauges, read at scrape time from what its task last noted.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::EncodeMetric as _;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::queue::shared::{Progress, Shared};

/// The gauges of each queue, read at scrape time.
#[derive(Debug)]
pub(super) struct PerQueue(pub(super) Arc<Shared>);

type Read = fn(&Progress) -> u64;

const PER_QUEUE: [(&str, &str, Read); 6] = [
    (
        "postroad_queue_depth_messages",
        "Unsettled messages among those looked at",
        |progress| progress.depth.load(Ordering::Relaxed),
    ),
    (
        "postroad_queue_in_flight_messages",
        "Live deliveries",
        |progress| progress.live.load(Ordering::Relaxed),
    ),
    (
        "postroad_queue_delayed_messages",
        "Messages held back by a delay",
        |progress| progress.delayed.load(Ordering::Relaxed),
    ),
    (
        "postroad_queue_dead_letter_messages",
        "Dead letters that were not redriven",
        |progress| progress.dead.load(Ordering::Relaxed),
    ),
    (
        "postroad_queue_paused",
        "1 while a person has paused the queue",
        |progress| u64::from(progress.is_paused.load(Ordering::Relaxed)),
    ),
    (
        "postroad_queue_waiting_receives",
        "Long polls that wait",
        |progress| progress.waiters.load(Ordering::Relaxed),
    ),
];

impl Collector for PerQueue {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let queues = self.0.queues.read();
        let queues = queues.unwrap_or_else(PoisonError::into_inner);
        for (name, help, read) in PER_QUEUE {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            let owned = queues.iter().filter(|(_, known)| known.mailbox.is_some());
            for (queue, known) in owned {
                let gauge =
                    ConstGauge::new(i64::try_from(read(&known.progress)).unwrap_or(i64::MAX));
                gauge.encode(family.encode_family(&[("queue", queue.as_str())])?)?;
            }
        }
        Ok(())
    }
}
