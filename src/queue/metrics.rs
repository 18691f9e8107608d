//! What the queue engine counts. A queue's own gauges are read at scrape time from what its task last noted.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::handle::Shared;
use super::task::Progress;

/// Counters and gauges of all queues of this process.
#[derive(Debug, Clone)]
pub(in crate::queue) struct Metrics {
    pub(in crate::queue) receives: Counter,
    pub(in crate::queue) deliveries: Counter,
    pub(in crate::queue) settled: Counter,
    pub(in crate::queue) expired: Counter,
    pub(in crate::queue) unwritten: Counter,
    pub(in crate::queue) dead_letters: Counter,
    pub(in crate::queue) redriven: Counter,
    pub(in crate::queue) forwarded: Counter,
    pub(in crate::queue) forwards_refused: Counter,
    pub(in crate::queue) lost: Counter,
    pub(in crate::queue) incidents: Counter,
    pub(in crate::queue) groups: Counter,
    pub(in crate::queue) group_repeats: Counter,
    pub(in crate::queue) group_seconds: Histogram,
    pub(in crate::queue) wait_seconds: Histogram,
    pub(in crate::queue) fenced: Counter,
    pub(in crate::queue) renewals: Counter,
    pub(in crate::queue) scans: Counter,
    pub(in crate::queue) scans_answered: Counter,
    pub(in crate::queue) queues: Gauge,
    pub(in crate::queue) standing: Gauge,
    pub(in crate::queue) behind: Gauge,
}

impl Metrics {
    pub(in crate::queue) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            receives: Counter::default(),
            deliveries: Counter::default(),
            settled: Counter::default(),
            expired: Counter::default(),
            unwritten: Counter::default(),
            dead_letters: Counter::default(),
            redriven: Counter::default(),
            forwarded: Counter::default(),
            forwards_refused: Counter::default(),
            lost: Counter::default(),
            incidents: Counter::default(),
            groups: Counter::default(),
            group_repeats: Counter::default(),
            group_seconds: Histogram::new(exponential_buckets(0.000_25, 2.0, 16)),
            wait_seconds: Histogram::new(exponential_buckets(0.000_25, 1.5, 26)),
            fenced: Counter::default(),
            renewals: Counter::default(),
            scans: Counter::default(),
            scans_answered: Counter::default(),
            queues: Gauge::default(),
            standing: Gauge::default(),
            behind: Gauge::default(),
        };
        metrics.register(registry);
        metrics
    }

    fn register(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("postroad_queue_receives", "Receives", &self.receives),
            (
                "postroad_queue_deliveries",
                "Messages handed out",
                &self.deliveries,
            ),
            ("postroad_queue_settled", "Messages acked", &self.settled),
            (
                "postroad_queue_expired",
                "Deliveries whose time ran out",
                &self.expired,
            ),
            (
                "postroad_queue_unwritten",
                "Deliveries taken back since their answer was never written",
                &self.unwritten,
            ),
            (
                "postroad_queue_dead_letters",
                "Messages rejected or out of attempts",
                &self.dead_letters,
            ),
            (
                "postroad_queue_redriven",
                "Dead letters brought back by redrives",
                &self.redriven,
            ),
            (
                "postroad_queue_dead_letters_forwarded",
                "Dead letters whose copies were published to their queue's dead_letter_topic",
                &self.forwarded,
            ),
            (
                "postroad_queue_dead_letter_forwards_refused",
                "Dead letters whose copies cannot be published",
                &self.forwards_refused,
            ),
            (
                "postroad_queue_lost",
                "Unsettled messages that retention's hard limit dropped",
                &self.lost,
            ),
            (
                "postroad_queue_incidents",
                "Receipts of deliveries that were never issued",
                &self.incidents,
            ),
            (
                "postroad_queue_journal_groups",
                "Group commits of the settlement writer",
                &self.groups,
            ),
            (
                "postroad_queue_journal_group_repeats",
                "Group commits sent again since their outcome was not known",
                &self.group_repeats,
            ),
            (
                "postroad_queue_journal_fenced",
                "Journal writes refused since the slot was taken over",
                &self.fenced,
            ),
            (
                "postroad_queue_renewals",
                "Generations begun by a seek or a purge",
                &self.renewals,
            ),
            (
                "postroad_queue_scans",
                "Scans of a log by queues that catch up",
                &self.scans,
            ),
            (
                "postroad_queue_scans_answered",
                "Queues that those scans were for: one scan serves all that look at about the same place",
                &self.scans_answered,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register_with_unit(
            "postroad_queue_journal_group_duration",
            "How long a group commit took",
            Unit::Seconds,
            self.group_seconds.clone(),
        );
        registry.register_with_unit(
            "postroad_queue_journal_wait_duration",
            "From a queue's decision to its commit, which its answers wait for: of the oldest in each part of a group",
            Unit::Seconds,
            self.wait_seconds.clone(),
        );
        registry.register(
            "postroad_queues",
            "Queues that there are, as far as this process knows",
            self.queues.clone(),
        );
        registry.register(
            "postroad_queues_standing_still",
            "1 while the queues stand still since Postgres cannot be reached",
            self.standing.clone(),
        );
        registry.register(
            "postroad_queues_log_behind",
            "Queues that are not served since their log was restored without them",
            self.behind.clone(),
        );
    }
}

/// The gauges of each queue, read at scrape time.
#[derive(Debug)]
pub(in crate::queue) struct PerQueue(pub(in crate::queue) Arc<Shared>);

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
