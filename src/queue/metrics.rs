//! The metrics of the queue engine. A queue's own gauges are read at scrape time from its task's last notes.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Counters and gauges of all queues of this process.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    pub(super) receives: Counter,
    pub(super) deliveries: Counter,
    pub(super) settled: Counter,
    pub(super) expired: Counter,
    pub(super) unwritten: Counter,
    pub(super) dead_letters: Counter,
    pub(super) redriven: Counter,
    pub(super) forwarded: Counter,
    pub(super) forwards_refused: Counter,
    pub(super) lost: Counter,
    pub(super) incidents: Counter,
    pub(super) groups: Counter,
    pub(super) group_repeats: Counter,
    pub(super) group_seconds: Histogram,
    pub(super) wait_seconds: Histogram,
    pub(super) fenced: Counter,
    pub(super) renewals: Counter,
    pub(super) scans: Counter,
    pub(super) scans_answered: Counter,
    pub(super) queues: Gauge,
    pub(super) standing: Gauge,
    pub(super) behind: Gauge,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
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
                "Deliveries taken back because their answer was never written",
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
                "Group commits of the journal's writer",
                &self.groups,
            ),
            (
                "postroad_queue_journal_group_repeats",
                "Group commits sent again because their outcome was unknown",
                &self.group_repeats,
            ),
            (
                "postroad_queue_journal_fenced",
                "Journal writes refused because the slot was taken over",
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
                "Queues that those scans served: one scan serves all that look at about the same place",
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
            "From a queue's decision to its commit, of the oldest decision in each part of a group; answers wait for it",
            Unit::Seconds,
            self.wait_seconds.clone(),
        );
        registry.register(
            "postroad_queues",
            "Queues that exist, as far as this process knows",
            self.queues.clone(),
        );
        registry.register(
            "postroad_queues_standing_still",
            "1 while the queues stand still because Postgres cannot be reached",
            self.standing.clone(),
        );
        registry.register(
            "postroad_queues_log_behind",
            "Queues that are not served because their log was restored without them",
            self.behind.clone(),
        );
    }
}
