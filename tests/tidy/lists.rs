//! Lists in the code that a page or other code repeats.

use crate::source::{Source, root, sources};

/// Names that the code gives to a call of the module `failpoint`, as in `reach("a.b")`.
fn named(sources: &[Source], call: &str) -> Vec<String> {
    let mut names = Vec::new();
    let call = format!("{call}(");
    for source in sources {
        let calls = source.code.split(&call).skip(1);
        let quoted =
            calls.filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next());
        names.extend(quoted.map(str::to_owned));
    }
    names.sort();
    names.dedup();
    names
}

#[test]
fn failpoints_are_where_the_list_says() {
    let sources = sources();
    let in_list = |list: &[&str]| {
        let mut list: Vec<String> = list.iter().map(|&name| name.to_owned()).collect();
        list.sort();
        list
    };
    let reached = named(&sources, "failpoint::reach");
    assert_eq!(reached, in_list(postroad::failpoint::NAMES));
    let limits = named(&sources, "failpoint::limit");
    assert_eq!(limits, in_list(postroad::failpoint::LIMITS));
    let planted = [Source::new("src/queue/a.rs", "failpoint::reach(\n\"a\");")];
    assert_eq!(named(&planted, "failpoint::reach"), ["a"]);
}

/// The names in the first column of the table of planted faults.
fn documented_faults(text: &str) -> Vec<String> {
    let section = text
        .split("\n## Planted faults\n")
        .nth(1)
        .unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut names: Vec<String> = rows
        .filter_map(|row| row.split('`').next().map(str::to_owned))
        .collect();
    names.sort();
    names
}

#[test]
fn every_planted_fault_says_which_test_finds_it() {
    let path = root().join("docs/reliability.md");
    let text = std::fs::read_to_string(path).expect("the page is part of the tree");
    let mut known: Vec<&str> = postroad::failpoint::MUTANTS.to_vec();
    known.sort_unstable();
    assert_eq!(documented_faults(&text), known);
}
