//! What lives in one place only.

use crate::check;
use crate::source::{Source, sources};

/// Words that may stand only in certain modules, with the reason.
const PLACES: &[(&str, &[&str], &str)] = &[
    (
        "sqlx::",
        &["store", "outbox"],
        "all SQL of the broker is in the store; the outbox is in a service's own transaction",
    ),
    (
        "sqlstate",
        &["store"],
        "the store's errors say by a name what the server's codes mean",
    ),
    (
        "constraint()",
        &["store", "outbox"],
        "the store's errors say by a name which row was refused",
    ),
    ("axum::", &["http", "app"], "the wire has one layer"),
    (
        "tokio::spawn",
        &["supervisor"],
        "a task that nobody waits for is lost at the stop",
    ),
    (
        "task::spawn",
        &["supervisor"],
        "a task that nobody waits for is lost at the stop",
    ),
    (
        "spawn_blocking",
        &["supervisor"],
        "a task that nobody waits for is lost at the stop",
    ),
    (
        "thread::spawn",
        &["supervisor"],
        "a task that nobody waits for is lost at the stop",
    ),
    (
        "thread::Builder",
        &["supervisor"],
        "a thread that nobody knows of is lost at the stop",
    ),
    (
        "println!",
        &["failpoint", "simulation"],
        "it panics when nobody reads: say!, or telemetry::print",
    ),
    (
        "print!",
        &["failpoint", "simulation"],
        "it panics when nobody reads: say!, or telemetry::print",
    ),
    (
        "eprintln!",
        &["failpoint"],
        "it panics when nobody reads: tell!, or a line of the log",
    ),
    (
        "eprint!",
        &["failpoint"],
        "it panics when nobody reads: tell!, or a line of the log",
    ),
    (
        "JoinSet",
        // A worker that is dropped drops its handlers: nobody would settle what they do.
        &["supervisor", "client"],
        "dropping it aborts its tasks",
    ),
];

/// What the domain may not know: I/O and clocks.
const NOT_IN_DOMAIN: &[&str] = &[
    "tokio",
    "std::fs",
    "std::net",
    "std::env",
    "Instant",
    "SystemTime",
    "::now()",
];

fn has_word(code: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).any(|(at, _)| {
        let is_open = word.ends_with(':') || !is_part(code[at + word.len()..].chars().next());
        is_open && !is_part(code[..at].chars().next_back())
    })
}

pub(crate) fn place_faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for source in sources {
        let Some(module) = source.module() else {
            continue;
        };
        for (word, places, why) in PLACES {
            if !places.contains(&module) && has_word(&source.code, word) {
                faults.push(format!(
                    "{}: {word} belongs in {}: {why}",
                    source.path,
                    places.join(", ")
                ));
            }
        }
        if module == "domain" {
            for word in NOT_IN_DOMAIN {
                if source.code.contains(word) {
                    faults.push(format!(
                        "{}: the domain knows nothing of {word}",
                        source.path
                    ));
                }
            }
        }
    }
    faults
}

#[test]
fn what_belongs_in_one_place_is_there() {
    check(&place_faults(&sources()));
}
