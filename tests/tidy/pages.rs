//! The pages: prose that wraps, in plain English, and a line for each metric.

use std::path::Path;

use crate::check;
use crate::links::pages;
use crate::source::{Source, root, sources};

/// The longest line of prose, in characters. Tables and code are as long as they must be.
const PROSE_MAX: usize = 100;

/// Turns that a native reader stumbles over. How a sentence may not begin, and words that have a plain form.
const BEGINNINGS: &[&str] = &["What ", "Whoever ", "That which ", "Whether "];
const TURNS: &[(&str, &str)] = &[
    ("is to be", "say who does it: `must`, `will`"),
    ("are to be", "say who does it: `must`, `will`"),
    (" of now", "present"),
    ("one that is none", "invalid"),
    ("come by", "reach"),
    ("came by", "reached"),
];

/// The lines of a page that are prose: neither code nor a table nor a heading.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let mut lines = Vec::new();
    let mut is_code = false;
    for (at, line) in text.lines().enumerate() {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        if !is_code && !is_fence && !line.starts_with(['|', '#', '<']) && !line.starts_with("    ")
        {
            lines.push((at + 1, line));
        }
    }
    lines
}

fn prose_faults(page: &Path, text: &str) -> Vec<String> {
    let page = page.display();
    let mut faults = Vec::new();
    // Whether the line before ends a sentence, so that this one begins with one.
    let mut is_start = true;
    for (number, line) in prose(text) {
        let length = line.chars().count();
        // A single word, such as a link, cannot be wrapped.
        if length > PROSE_MAX && line.trim_start_matches("- ").trim().contains(' ') {
            faults.push(format!(
                "{page}:{number}: {length} characters, wrap at {PROSE_MAX}"
            ));
        }
        let words = line.trim_start().trim_start_matches(['-', '*', ' ']);
        for beginning in BEGINNINGS {
            let inside = format!(". {beginning}");
            if is_start && words.starts_with(beginning) || words.contains(&inside) {
                faults.push(format!(
                    "{page}:{number}: a sentence begins with `{beginning}`; name its subject"
                ));
            }
        }
        for (turn, plain) in TURNS {
            if line.contains(turn) {
                faults.push(format!("{page}:{number}: `{turn}`; write {plain}"));
            }
        }
        let end = line.trim_end();
        is_start = end.is_empty() || end.ends_with(['.', ':', '!', '?']);
    }
    faults
}

#[test]
fn pages_wrap_and_are_in_plain_english() {
    let mut faults = Vec::new();
    for page in pages() {
        // Its lines are entries, each as long as it is.
        if page.ends_with("CHANGELOG.md") {
            continue;
        }
        let text = std::fs::read_to_string(&page).expect("a page is text");
        let page = page.strip_prefix(root()).unwrap_or(&page);
        faults.extend(prose_faults(page, &text));
    }
    check(&faults);
    let page = Path::new("docs/a.md");
    let long = format!("{} end", "word ".repeat(20));
    for (text, count) in [
        (long.as_str(), 1),
        ("What is there is kept.", 1),
        ("It is kept. What is there", 1),
        ("- Whoever asks", 1),
        ("It is to be kept.", 1),
        ("It says\nWhat is a name here", 0),
        ("| What | is to be |\n# What\n    What is to be", 0),
        (&format!("`{}`", "x".repeat(120)), 0),
    ] {
        assert_eq!(prose_faults(page, text).len(), count, "{text}");
    }
}

/// Literals that look like a metric and name something in a database.
const NO_METRICS: &[&str] = &[
    "postroad_appended",
    "postroad_broker",
    "postroad_consumer",
    "postroad_fenced",
    "postroad_producer",
    "postroad_relay",
    "postroad_seq",
    "postroad_xid",
];

/// The metrics that the code registers.
fn registered(sources: &[Source]) -> Vec<String> {
    let mut names = Vec::new();
    for source in sources {
        if matches!(source.module(), None | Some("bench" | "demo")) {
            continue;
        }
        for part in source.code.split("\"postroad_").skip(1) {
            let rest: String = part.chars().take_while(|&c| c != '"').collect();
            if !rest.is_empty() && rest.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
                names.push(format!("postroad_{rest}"));
            }
        }
    }
    names.retain(|name| !NO_METRICS.contains(&name.as_str()));
    names.sort();
    names.dedup();
    names
}

/// Metrics that the page lacks, and lines of the page that are no metric's.
fn metric_faults(page: &str, registered: &[String]) -> Vec<String> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let rows: Vec<&str> = rows.filter_map(|row| row.split('`').next()).collect();
    // The text format adds the unit and the ending of a counter.
    let is_of = |shown: &str, name: &str| {
        shown.strip_prefix(name).is_some_and(|ending| {
            matches!(
                ending,
                "" | "_total" | "_seconds" | "_bytes" | "_seconds_total"
            )
        })
    };
    let mut faults = Vec::new();
    for name in registered {
        if !rows.iter().any(|shown| is_of(shown, name)) {
            faults.push(format!("docs/metrics.md lacks {name}"));
        }
    }
    for shown in rows.iter().filter(|shown| shown.starts_with("postroad_")) {
        if !registered.iter().any(|name| is_of(shown, name)) {
            faults.push(format!(
                "docs/metrics.md has {shown}, which is not in the code"
            ));
        }
    }
    faults
}

#[test]
fn every_metric_has_its_line() {
    let page = std::fs::read_to_string(root().join("docs/metrics.md"))
        .expect("the page is part of the tree");
    check(&metric_faults(&page, &registered(&sources())));
    let planted = Source::new(
        "src/lock/a.rs",
        "r(\n\"postroad_locks\",\n\"postroad_relay\")",
    );
    let names = registered(&[planted]);
    assert_eq!(names, ["postroad_locks"]);
    assert!(metric_faults("| `postroad_locks_total` | a |\n", &names).is_empty());
    assert_eq!(metric_faults("| `postroad_lock` | a |\n", &names).len(), 2);
}

/// Paths of the tree that a page names in code, as `src/main.rs`, and that are not there.
fn path_faults(page: &Path, text: &str) -> Vec<String> {
    let roots = [
        "docs/",
        "examples/",
        "migrations/",
        "scripts/",
        "src/",
        "tests/",
    ];
    let mut faults = Vec::new();
    for (at, line) in text.lines().enumerate() {
        for name in line.split('`').skip(1).step_by(2) {
            let is_path = roots.iter().any(|root| name.starts_with(root));
            // A pattern such as `<name>` is no path.
            let is_plain = !name.contains(['<', '{', '*', '…', ' ', ':']);
            if is_path && is_plain && !root().join(name).exists() {
                let page = page.display();
                faults.push(format!("{page}:{}: there is no {name}", at + 1));
            }
        }
    }
    faults
}

#[test]
fn paths_in_the_pages_exist() {
    let mut faults = Vec::new();
    for page in pages() {
        if page.ends_with("CHANGELOG.md") {
            continue;
        }
        let text = std::fs::read_to_string(&page).expect("a page is text");
        let page = page.strip_prefix(root()).unwrap_or(&page);
        faults.extend(path_faults(page, &text));
    }
    check(&faults);
    let page = Path::new("docs/a.md");
    assert_eq!(path_faults(page, "see `src/nowhere.rs`, `make`").len(), 1);
    assert!(path_faults(page, "`src/main.rs`, `src/<area>/a.rs`").is_empty());
}

/// The most lines of the README, and the most bytes of ARCHITECTURE.md: both are read as a whole.
const README_MAX_LINES: usize = 200;
const ARCHITECTURE_MAX_BYTES: usize = 15_000;

#[test]
fn the_first_pages_are_short() {
    let read = |page: &str| std::fs::read_to_string(root().join(page)).expect("the page is text");
    assert!(read("README.md").lines().count() <= README_MAX_LINES);
    assert!(read("ARCHITECTURE.md").len() <= ARCHITECTURE_MAX_BYTES);
}
