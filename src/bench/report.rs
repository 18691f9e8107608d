//! The result: a table on standard output, and the same as JSON and as a page.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::figures::{self, FIGURES};
use super::live::grouped;
use super::measure::{Measured, median};
use super::options::{Ack, Load};
use super::plan::{System, Variant};
use super::proc::Machine;
use super::tracker::Checked;
use super::{Bench, Error, Options, Scenario, html};

/// The results of a bench.
pub struct Report {
    pub(super) scenario: Scenario,
    pub(super) load: Load,
    pub(super) payload: String,
    pub(super) place: String,
    pub(super) machine: Machine,
    pub(super) postgres: String,
    pub(super) settings: Vec<(String, String)>,
    pub(super) at: String,
    pub(super) results: Vec<(Variant, Vec<Measured>)>,
}

impl std::fmt::Debug for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_text())
    }
}

impl Report {
    pub(super) fn new(bench: &Bench, results: Vec<(Variant, Vec<Measured>)>) -> Self {
        Self {
            scenario: bench.options.scenario,
            load: bench.load.clone(),
            payload: match &bench.options.payload_file {
                Some(path) => format!("the lines of {}", path.display()),
                None => format!("{} bytes", bench.options.payload_bytes),
            },
            place: bench.broker.place.clone(),
            machine: Machine::read(),
            postgres: bench.server.version.clone(),
            settings: bench.server.settings.clone(),
            at: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            results,
        }
    }

    /// Whether everything was delivered once and in order.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.all_rounds().all(|round| round.checked.is_clean())
    }

    fn all_rounds(&self) -> impl Iterator<Item = &Measured> {
        self.results.iter().flat_map(|(_, rounds)| rounds)
    }

    /// The run, in one line.
    pub(super) fn what(&self) -> String {
        let load = &self.load;
        let rate = match load.rate {
            0 => String::new(),
            rate => format!(", {} messages/s", grouped(f64::from(rate))),
        };
        let keys = match load.keys {
            0 => String::new(),
            keys => format!(", {} keys", grouped(f64::from(keys))),
        };
        let length = match self.scenario {
            Scenario::Backlog => format!("{} messages", grouped(load.messages as f64)),
            _ => format!(
                "{} s after {} s of warm-up",
                load.seconds, load.warmup_seconds
            ),
        };
        let ack = match load.ack {
            Ack::WithReceive => "acks with the next receive",
            Ack::Separate => "acks of their own",
        };
        format!(
            "{}: {} producers, {} x {} consumers, batches of {}, {ack}, payload {}{rate}{keys}; {length}; median of {}",
            self.scenario.name(),
            load.producers,
            grouped(f64::from(load.queues)),
            load.consumers,
            load.batch,
            self.payload,
            match load.rounds {
                1 => "1 round".to_owned(),
                rounds => format!("{rounds} rounds, in turn"),
            },
        )
    }

    pub(super) fn environment(&self) -> String {
        let machine = &self.machine;
        let settings: Vec<String> = (self.settings.iter())
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        format!(
            "postroad {}, {}; Postgres {} ({}); {} processors {}, {} MiB, {}; {}",
            env!("CARGO_PKG_VERSION"),
            match cfg!(debug_assertions) {
                true => "a debug build, whose figures mean nothing",
                false => "a release build",
            },
            self.postgres,
            settings.join(", "),
            machine.processors,
            machine.model,
            machine.memory_mib,
            machine.system,
            self.at,
        )
    }

    /// The rows of the table: label, value per variant, ratio of the main one to each baseline.
    pub(super) fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for figure in FIGURES {
            let values: Vec<Option<f64>> = (self.results.iter())
                .map(|(_, rounds)| figures::of(figure, rounds))
                .collect();
            if values.iter().all(Option::is_none) {
                continue;
            }
            let main = values.first().copied().flatten();
            let ratios = (self.results.iter().zip(&values))
                .map(|((variant, _), value)| {
                    let value = value.filter(|value| *value > 0.0 && variant.is_baseline)?;
                    Some(main? / value)
                })
                .collect();
            rows.push(Row {
                key: figure.key,
                label: figure.label,
                better: figure.better,
                digits: figure.digits,
                values,
                ratios,
            });
        }
        rows
    }

    /// The report for people: the run, the table and the verdict.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!("\n{}\n{}\n\n", self.what(), self.environment());
        let rows = self.rows();
        let mut table: Vec<Vec<String>> = Vec::new();
        let mut head = vec![String::new()];
        for (variant, _) in &self.results {
            head.push(variant.name.clone());
            if variant.is_baseline {
                head.push("ratio".to_owned());
            }
        }
        table.push(head);
        for row in &rows {
            let mut line = vec![row.label.to_owned()];
            for (place, (variant, _)) in self.results.iter().enumerate() {
                line.push(row.value(place));
                if variant.is_baseline {
                    line.push(row.ratio(place));
                }
            }
            table.push(line);
        }
        write_table(&mut text, &table);
        let _ = write!(text, "\n{}\n", self.verdict());
        text
    }

    /// Whether all was well, in words.
    pub(super) fn verdict(&self) -> String {
        let mut sums = Checked::default();
        let rounds = (self.results.iter()).filter(|(variant, _)| variant.system != System::Raw);
        for round in rounds.flat_map(|(_, rounds)| rounds) {
            sums.sent += round.checked.sent;
            sums.expected += round.checked.expected;
            sums.lost += round.checked.lost;
            sums.duplicated += round.checked.duplicated;
            sums.out_of_order += round.checked.out_of_order;
            sums.unknown += round.checked.unknown;
            sums.refused += round.checked.refused;
        }
        let counts = format!(
            "{} messages sent, {} deliveries expected",
            grouped(sums.sent as f64),
            grouped(sums.expected as f64)
        );
        if self.is_clean() {
            return format!("{counts}: nothing lost, nothing twice, nothing out of order.");
        }
        format!(
            "FAILED: {counts}: {} lost, {} twice, {} out of order, {} that nobody sent, {} whose ack was refused.",
            sums.lost, sums.duplicated, sums.out_of_order, sums.unknown, sums.refused
        )
    }

    /// Everything, for programs.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let rows = self.rows();
        let variants: Vec<Value> = (self.results.iter().enumerate())
            .map(|(place, (variant, rounds))| {
                let pick = |read: fn(&Row, usize) -> Option<f64>| -> Map<String, Value> {
                    let picked = rows
                        .iter()
                        .filter_map(|row| Some((row.key.to_owned(), json!(read(row, place)?))));
                    picked.collect()
                };
                json!({
                    "name": variant.name,
                    "system": variant.system,
                    "is_baseline": variant.is_baseline,
                    "medians": pick(|row, place| row.values[place]),
                    "ratios": pick(|row, place| row.ratios[place]),
                    "rounds": rounds,
                })
            })
            .collect();
        json!({
            "scenario": self.scenario.name(),
            "at": self.at,
            "version": env!("CARGO_PKG_VERSION"),
            "debug_build": cfg!(debug_assertions),
            "load": self.load,
            "payload": self.payload,
            "broker": self.place,
            "machine": self.machine,
            "postgres": { "version": self.postgres, "settings": self.settings.iter().cloned().collect::<std::collections::BTreeMap<_, _>>() },
            "variants": variants,
            "is_clean": self.is_clean(),
            "verdict": self.verdict(),
        })
    }

    /// Writes the files that were asked for.
    pub(super) fn write(&self, options: &Options) -> Result<(), Error> {
        if let Some(path) = &options.json {
            let mut text = format!("{:#}", self.to_json());
            text.push('\n');
            write(path, &text)?;
        }
        if let Some(path) = &options.html {
            write(path, &html::page(self))?;
        }
        Ok(())
    }

    /// Messages per second of each variant: median, least and most of its rounds.
    pub(super) fn rates(&self) -> Vec<(&str, f64, f64, f64)> {
        (self.results.iter())
            .filter_map(|(variant, rounds)| {
                let rates: Vec<f64> = rounds.iter().map(|r| r.messages_per_second).collect();
                let least = rates.iter().copied().fold(f64::INFINITY, f64::min);
                let most = rates.iter().copied().fold(0.0, f64::max);
                let median = median(rates).filter(|rate| *rate > 0.0)?;
                Some((variant.name.as_str(), median, least, most))
            })
            .collect()
    }
}

/// A row of the table.
pub(super) struct Row {
    pub(super) key: &'static str,
    pub(super) label: &'static str,
    pub(super) better: figures::Better,
    digits: usize,
    pub(super) values: Vec<Option<f64>>,
    /// The main variant's value divided by this one's; none for variants other than baselines.
    pub(super) ratios: Vec<Option<f64>>,
}

impl Row {
    pub(super) fn value(&self, place: usize) -> String {
        match self.values.get(place).copied().flatten() {
            None => "-".to_owned(),
            Some(value) if self.digits == 0 => grouped(value),
            Some(value) => format!("{value:.*}", self.digits),
        }
    }

    pub(super) fn ratio(&self, place: usize) -> String {
        match self.ratios.get(place).copied().flatten() {
            None => "-".to_owned(),
            Some(ratio) if ratio < 0.1 => format!("x{ratio:.3}"),
            Some(ratio) => format!("x{ratio:.2}"),
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}

/// The first column to the left, the others to the right.
fn write_table(text: &mut String, table: &[Vec<String>]) {
    let columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = table.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for line in table {
        text.push_str("  ");
        for (column, cell) in line.iter().enumerate() {
            let _ = match column {
                0 => write!(text, "{cell:<width$}", width = widths[0]),
                _ => write!(text, "  {cell:>width$}", width = widths[column]),
            };
        }
        text.push('\n');
    }
}
