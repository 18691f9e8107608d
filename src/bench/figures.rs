//! The figures of a report, one row each: the table, the JSON and the page all print these.

use super::measure::{Measured, Percentiles, median};
use super::metrics::Times;

/// Whether more is better, for the reader of a ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Better {
    More,
    Less,
}

/// One row.
pub(super) struct Figure {
    /// In JSON.
    pub(super) key: &'static str,
    pub(super) label: &'static str,
    pub(super) better: Better,
    /// Digits behind the point.
    pub(super) digits: usize,
    pub(super) read: fn(&Measured) -> Option<f64>,
}

macro_rules! figures {
    ($($key:ident, $label:literal, $better:ident, $digits:literal, $read:expr;)*) => {
        &[$(Figure { key: stringify!($key), label: $label, better: Better::$better, digits: $digits, read: $read }),*]
    };
}

fn latency(measured: &Measured, read: fn(&Percentiles) -> f64) -> Option<f64> {
    measured.latency.as_ref().map(read)
}

fn single(measured: &Measured, read: fn(&Percentiles) -> f64) -> Option<f64> {
    measured.first_after_silence.as_ref().map(read)
}

fn wait(measured: &Measured, read: fn(&Times) -> f64) -> Option<f64> {
    measured.journal_wait.as_ref().map(read)
}

fn commit(measured: &Measured, read: fn(&Times) -> f64) -> Option<f64> {
    measured.journal_commit.as_ref().map(read)
}

/// Nothing was sent: costs are those of doing nothing.
fn is_idle(measured: &Measured) -> bool {
    measured.messages == 0.0
}

fn busy(measured: &Measured, value: f64) -> Option<f64> {
    (!is_idle(measured)).then_some(value)
}

/// From a commit of the journal to the number of messages that shared it.
fn per_commit(measured: &Measured) -> Option<f64> {
    let commits = measured.journal_commit?.count;
    busy(measured, measured.messages / commits)
}

/// All of them, in the order of the table.
pub(super) const FIGURES: &[Figure] = figures! {
    messages_per_second, "messages per second", More, 0, |m| busy(m, m.messages_per_second);
    deliveries_per_second, "deliveries per second", More, 0, |m| {
        busy(m, m.deliveries_per_second).filter(|_| m.deliveries_per_second > m.messages_per_second * 1.01)
    };
    published_per_second, "sent per second", More, 0, |m| busy(m, m.published_per_second).filter(|sent| *sent > 0.0);
    fill_per_second, "filled per second, commit to stream", More, 0, |m| m.fill_per_second;
    latency_p50_ms, "commit to receipt p50, ms", Less, 2, |m| latency(m, |l| l.p50);
    latency_p90_ms, "commit to receipt p90, ms", Less, 2, |m| latency(m, |l| l.p90);
    latency_p99_ms, "commit to receipt p99, ms", Less, 2, |m| latency(m, |l| l.p99);
    latency_p999_ms, "commit to receipt p99.9, ms", Less, 2, |m| latency(m, |l| l.p999);
    latency_max_ms, "commit to receipt max, ms", Less, 2, |m| latency(m, |l| l.max);
    first_p50_ms, "first message after silence p50, ms", Less, 2, |m| single(m, |l| l.p50);
    first_p99_ms, "first message after silence p99, ms", Less, 2, |m| single(m, |l| l.p99);
    journal_wait_mean_ms, "journal's wait on receive and ack, mean ms", Less, 3, |m| wait(m, |t| t.mean_ms);
    journal_wait_p99_ms, "journal's wait on receive and ack, p99 ms", Less, 3, |m| wait(m, |t| t.p99_ms);
    journal_commit_mean_ms, "one group commit of the journal, mean ms", Less, 3, |m| commit(m, |t| t.mean_ms);
    messages_per_journal_commit, "messages per group commit of the journal", More, 1, per_commit;
    broker_cpu_us, "CPU per message, broker, us", Less, 1, |m| m.broker_cpu_us;
    postgres_cpu_us, "CPU per message, Postgres, us", Less, 1, |m| m.postgres_cpu_us;
    system_cpu_us, "CPU per message, broker and Postgres, us", Less, 1, |m| {
        Some(m.broker_cpu_us.unwrap_or(0.0) + m.postgres_cpu_us?)
    };
    load_cpu_us, "CPU per message, load generator, us", Less, 1, |m| m.own_cpu_us;
    broker_cpu_percent, "CPU, broker, percent of a core", Less, 2, |m| m.broker_cpu_percent;
    postgres_cpu_percent, "CPU, Postgres, percent of a core", Less, 2, |m| m.postgres_cpu_percent;
    wal_bytes, "WAL per message, bytes", Less, 0, |m| m.wal_bytes;
    database_growth_mib, "growth of the database, MiB", Less, 1, |m| Some(m.database_growth_mib);
    broker_memory_mib, "broker's peak memory, MiB", Less, 0, |m| m.broker_memory_mib;
    first_window_per_second, "first window, messages per second", More, 0, |m| window(m, 0).map(|w| w.per_second);
    last_window_per_second, "last window, messages per second", More, 0, |m| window(m, usize::MAX).map(|w| w.per_second);
    first_window_p99_ms, "first window, p99 ms", Less, 2, |m| window(m, 0).and_then(|w| w.p99_ms);
    last_window_p99_ms, "last window, p99 ms", Less, 2, |m| window(m, usize::MAX).and_then(|w| w.p99_ms);
};

/// The first window, or the last one; None when there are too few to compare.
fn window(measured: &Measured, place: usize) -> Option<&super::measure::Window> {
    let windows = &measured.windows;
    let count = windows.len();
    // Windows of one second are for the chart.
    if count < 2 || is_idle(measured) || windows[0].seconds == 1 {
        return None;
    }
    windows.get(place.min(count - 1))
}

/// The median over rounds; None when a round has no such figure.
pub(super) fn of(figure: &Figure, rounds: &[Measured]) -> Option<f64> {
    let values: Option<Vec<f64>> = rounds.iter().map(figure.read).collect();
    median(values?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_median_of_its_rounds() {
        let round = |rate| Measured {
            messages: 10.0,
            messages_per_second: rate,
            deliveries_per_second: rate,
            ..Measured::default()
        };
        let rounds = [round(30.0), round(10.0), round(20.0)];
        assert_eq!(of(&FIGURES[0], &rounds), Some(20.0));
        // One delivery per message: the row would say nothing.
        assert_eq!(of(&FIGURES[1], &rounds), None);
        assert_eq!(of(&FIGURES[0], &[]), None);
    }

    #[test]
    fn keys_are_unique() {
        let mut keys: Vec<&str> = FIGURES.iter().map(|figure| figure.key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), FIGURES.len());
    }
}
