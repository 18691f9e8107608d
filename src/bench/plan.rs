//! The variants that a scenario measures, in turn, round by round.

use serde::Serialize;

use super::options::{Load, Options, Scenario};
use super::tracker::Spread;
use crate::store::bench::Hold;

/// The system that carries the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum System {
    /// The broker, by its outbox.
    Outbox,
    /// The broker, by HTTP.
    Publish,
    /// A queue made from a table.
    Lease,
    /// Rows inserted by one connection, 1,000 at a time, and nothing else.
    Raw,
}

/// How a round goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Course {
    /// Producers and consumers at once, for a time.
    Steady,
    /// As steady; then single messages after silences.
    SteadyThenSingle,
    /// All is sent, then all is consumed.
    FillThenDrain,
    /// Consumers wait, and nothing is sent.
    Idle,
}

/// Something to be measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variant {
    pub(super) name: String,
    pub(super) system: System,
    pub(super) course: Course,
    pub(super) queues: u32,
    /// Consumers of each queue.
    pub(super) consumers: u32,
    pub(super) spread: Spread,
    /// Whether queues are declared with `ordering = key`.
    pub(super) is_ordered: bool,
    pub(super) hold: Option<Hold>,
    /// The others' figures are compared with those of the main one.
    pub(super) is_baseline: bool,
}

/// The variants of a scenario, the main one first.
pub(super) fn variants(options: &Options, load: &Load) -> Vec<Variant> {
    let scenario = options.scenario;
    let main = Variant {
        name: scenario.name().to_owned(),
        system: match scenario {
            Scenario::Publish => System::Publish,
            _ => System::Outbox,
        },
        course: match scenario {
            Scenario::Backlog => Course::FillThenDrain,
            Scenario::Idle => Course::Idle,
            Scenario::Latency => Course::SteadyThenSingle,
            _ => Course::Steady,
        },
        queues: load.queues,
        consumers: load.consumers,
        spread: match scenario {
            Scenario::Queues | Scenario::Idle => Spread::One,
            _ => Spread::All,
        },
        is_ordered: scenario == Scenario::Keys,
        hold: None,
        is_baseline: false,
    };
    let mut variants = Vec::new();
    if scenario == Scenario::Held {
        for (name, hold) in [
            ("reader held", Some(Hold::Reader)),
            ("writer held", Some(Hold::Writer)),
            ("nothing held", None),
        ] {
            variants.push(Variant {
                name: name.to_owned(),
                hold,
                is_baseline: hold.is_none(),
                ..main.clone()
            });
        }
        if !options.baseline {
            variants.pop();
        }
    } else {
        variants.push(main.clone());
    }
    if options.baseline {
        variants.extend(plainest(scenario, &main));
        variants.extend(others(scenario, &main));
    }
    variants
}

/// The scenario without what it is about.
fn plainest(scenario: Scenario, main: &Variant) -> Option<Variant> {
    let plain = Variant {
        queues: 1,
        spread: Spread::All,
        is_ordered: false,
        is_baseline: true,
        ..main.clone()
    };
    match scenario {
        Scenario::Fanout => Some(Variant {
            name: "one queue".to_owned(),
            ..plain
        }),
        Scenario::Queues => Some(Variant {
            name: "one queue".to_owned(),
            consumers: 4,
            ..plain
        }),
        Scenario::Keys => Some(Variant {
            name: "unordered".to_owned(),
            ..plain
        }),
        _ => None,
    }
}

/// Other ways on the same Postgres.
fn others(scenario: Scenario, main: &Variant) -> Vec<Variant> {
    let other = Variant {
        queues: 1,
        spread: Spread::All,
        is_ordered: false,
        is_baseline: true,
        ..main.clone()
    };
    let lease = Variant {
        name: "table queue".to_owned(),
        system: System::Lease,
        consumers: match scenario {
            // As many as there are in all would only be in each other's way.
            Scenario::Queues | Scenario::Fanout => 4,
            _ => main.consumers,
        },
        ..other.clone()
    };
    let raw = Variant {
        name: "raw inserts".to_owned(),
        system: System::Raw,
        course: Course::Steady,
        ..other
    };
    match scenario {
        Scenario::Idle => Vec::new(),
        Scenario::Held => vec![Variant {
            name: "table queue, reader held".to_owned(),
            hold: Some(Hold::Reader),
            ..lease
        }],
        Scenario::Latency => vec![lease],
        _ => vec![lease, raw],
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn names(arguments: &[&str]) -> Vec<String> {
        let line = Line::parse_from(["bench"].iter().chain(arguments));
        let variants = variants(&line.options, &line.options.load());
        assert!(!variants[0].is_baseline);
        variants.into_iter().map(|variant| variant.name).collect()
    }

    #[test]
    fn the_main_variant_comes_first_and_baselines_when_asked() {
        assert_eq!(names(&["outbox"]), ["outbox"]);
        assert_eq!(
            names(&["outbox", "--baseline"]),
            ["outbox", "table queue", "raw inserts"]
        );
        assert_eq!(
            names(&["keys", "--baseline"]),
            ["keys", "unordered", "table queue", "raw inserts"]
        );
        assert_eq!(names(&["held"]), ["reader held", "writer held"]);
        assert_eq!(names(&["idle", "--baseline"]), ["idle"]);
        assert_eq!(
            names(&["latency", "--baseline"]),
            ["latency", "table queue"]
        );
    }

    #[test]
    fn rounds_are_three_with_baselines() {
        let load = |arguments: &[&str]| {
            let line = Line::parse_from(["bench"].iter().chain(arguments));
            line.options.load()
        };
        assert_eq!(load(&["outbox"]).rounds, 1);
        assert_eq!(load(&["outbox", "--baseline"]).rounds, 3);
        let queues = load(&["queues"]);
        assert_eq!((queues.queues, queues.consumers), (1_000, 1));
        assert_eq!(load(&["publish"]).producers, 32);
    }
}
