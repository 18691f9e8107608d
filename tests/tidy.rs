//! The rules of the tree that no compiler holds: which layer may use which, what lives in one place only, how long a file
//! may be, how it may not be named. Each check is shown to find its fault.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What each module may use of the crate. A module not listed here is a fault, and so is an edge that is not drawn.
const EDGES: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("supervisor", &[]),
    // For tests, and known to all; nothing in a release.
    ("failpoint", &[]),
    ("simulation", &["domain"]),
    ("client", &["domain"]),
    // For producing services. It uses nothing of the broker, and nothing of the broker uses it.
    ("outbox", &[]),
    ("store", &["domain"]),
    ("cluster", &["domain", "supervisor", "store"]),
    ("stream", &["domain", "supervisor", "store", "cluster"]),
    ("topic", &["domain", "supervisor", "store"]),
    ("lock", &["domain", "supervisor", "store"]),
    (
        "relay",
        &[
            "domain",
            "supervisor",
            "store",
            "cluster",
            "stream",
            "topic",
        ],
    ),
    (
        "queue",
        &["domain", "supervisor", "store", "cluster", "stream"],
    ),
    (
        "http",
        &[
            "domain",
            "supervisor",
            "store",
            "cluster",
            "stream",
            "topic",
            "lock",
            "relay",
            "queue",
        ],
    ),
    ("telemetry", &["config"]),
    ("config", &["domain", "telemetry"]),
    ("local_postgres", &["supervisor"]),
    (
        "app",
        &[
            "domain",
            "supervisor",
            "store",
            "cluster",
            "stream",
            "topic",
            "lock",
            "relay",
            "queue",
            "http",
            "config",
            "telemetry",
            "local_postgres",
        ],
    ),
    (
        "demo",
        &[
            "domain",
            "client",
            "supervisor",
            "store",
            "app",
            "config",
            "telemetry",
            "local_postgres",
        ],
    ),
    (
        "bench",
        &["domain", "supervisor", "store", "config", "local_postgres"],
    ),
    (
        "cli",
        &[
            "app",
            "bench",
            "config",
            "demo",
            "http",
            "store",
            "telemetry",
        ],
    ),
];

/// Words that may stand only in certain modules, with the reason.
const PLACES: &[(&str, &[&str], &str)] = &[
    (
        "sqlx::",
        &["store", "outbox"],
        "all SQL of the broker is in the store; the outbox is in a service's own transaction",
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

/// Names for drawers.
const NAMES: &[&str] = &[
    "utils", "util", "common", "helpers", "types", "manager", "service", "misc",
];

const LINES_MAX: usize = 1_000;

/// A file's code: path from the root of the tree, and text without comments and without its test module.
struct Source {
    path: String,
    code: String,
    lines: usize,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let code = text
            .split("#[cfg(test)]\nmod ")
            .next()
            .unwrap_or_default()
            .split("#[cfg(test)]\n#[")
            .next()
            .unwrap_or_default();
        let code: Vec<&str> = code
            .lines()
            .map(|line| match line.trim_start().starts_with("//") {
                true => "",
                false => line.split(" // ").next().unwrap_or_default(),
            })
            .collect();
        Self {
            path: path.to_owned(),
            code: code.join("\n"),
            lines: text.lines().count(),
        }
    }

    /// The module of the crate that the file belongs to; `None` for what is above all layers.
    fn module(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let module = inside.split('/').next().unwrap_or(inside);
        let module = module.strip_suffix(".rs").unwrap_or(module);
        (!matches!(module, "main" | "lib")).then_some(module)
    }

    /// The modules of the crate that the code names.
    fn uses(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (at, _) in self.code.match_indices("crate::") {
            let before = self.code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
                continue;
            }
            let rest = &self.code[at + "crate::".len()..];
            match rest.strip_prefix('{') {
                Some(group) => found.extend(group_names(group)),
                None => found.push(first_name(rest)),
            }
        }
        found.retain(|name| !name.is_empty());
        found
    }
}

fn first_name(text: &str) -> String {
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

/// The first name of each path of a `{a::b, c::{d, e}}` group, given from behind its opening brace.
fn group_names(group: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut depth = 0;
    let mut start = 0;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(first_name(group[start..at].trim_start()));
                if c == '}' {
                    break;
                }
                start = at + 1;
            }
            _ => {}
        }
    }
    names
}

fn edge_faults(sources: &[Source]) -> Vec<String> {
    let edges: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    let mut faults = Vec::new();
    for source in sources {
        let Some(module) = source.module() else {
            continue;
        };
        let Some(allowed) = edges.get(module) else {
            faults.push(format!(
                "{}: the module {module} has no place in the table of edges",
                source.path
            ));
            continue;
        };
        for used in source.uses() {
            if used != module
                && !["failpoint", "simulation"].contains(&used.as_str())
                && !allowed.contains(&used.as_str())
            {
                faults.push(format!("{}: {module} may not use {used}", source.path));
            }
        }
    }
    faults
}

fn has_word(code: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).any(|(at, _)| {
        let is_open = word.ends_with(':') || !is_part(code[at + word.len()..].chars().next());
        is_open && !is_part(code[..at].chars().next_back())
    })
}

fn place_faults(sources: &[Source]) -> Vec<String> {
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

fn shape_faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for source in sources {
        if source.lines > LINES_MAX {
            faults.push(format!(
                "{}: {} lines, at most {LINES_MAX}: split it by noun",
                source.path, source.lines
            ));
        }
        let is_drawer = |part: &str| NAMES.contains(&part.trim_end_matches(".rs"));
        if source.path.split('/').any(is_drawer) {
            faults.push(format!(
                "{}: a name for a drawer; name what is in it",
                source.path
            ));
        }
    }
    faults
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).expect("the folder is part of the tree");
    for entry in entries {
        let path = entry.expect("the folder can be read").path();
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
}

fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for folder in ["src", "tests"] {
        files(&root().join(folder), "rs", &mut paths);
    }
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text = std::fs::read_to_string(path).expect("a source file is text");
            let path = path.strip_prefix(root()).expect("found below the root");
            Source::new(&path.to_string_lossy(), &text)
        })
        .collect()
}

fn check(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn layers_use_only_what_stands_above_them() {
    check(&edge_faults(&sources()));
}

#[test]
fn what_belongs_in_one_place_is_there() {
    check(&place_faults(&sources()));
}

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

#[test]
fn files_are_short_and_named_for_what_they_hold() {
    check(&shape_faults(&sources()));
}

/// Two types of one name in the API's description: one of them silently takes the other's place.
fn schema_faults(sources: &[(&str, &str)]) -> Vec<String> {
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    let mut faults = Vec::new();
    let word = |text: &str| -> String {
        let is_part = |letter: &char| letter.is_alphanumeric() || *letter == '_';
        text.chars().take_while(is_part).collect()
    };
    for &(path, text) in sources {
        let mut name: Option<Option<String>> = None;
        for line in text.lines().map(str::trim) {
            if line.starts_with("#[derive(") && line.contains("ToSchema") {
                name = Some(None);
            }
            let Some(given) = &mut name else { continue };
            let alias = line
                .strip_prefix("#[schema(as = ")
                .or(line.strip_prefix("as = "));
            if let Some(alias) = alias {
                *given = Some(word(alias));
            }
            let line = line
                .trim_start_matches("pub(super) ")
                .trim_start_matches("pub ");
            let kind = line.strip_prefix("struct ").or(line.strip_prefix("enum "));
            if let Some(own) = kind {
                let name = name.take().flatten().unwrap_or_else(|| word(own));
                // A macro's parameter has none.
                if name.is_empty() {
                    continue;
                }
                if let Some(other) = seen.insert(name.clone(), path) {
                    faults.push(format!("{path}: the schema {name} is in {other}, too"));
                }
            }
        }
    }
    faults
}

#[test]
fn every_schema_of_the_api_has_a_name_of_its_own() {
    let mut paths = Vec::new();
    files(&root().join("src/http"), "rs", &mut paths);
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).expect("a source file is text");
        (path.to_string_lossy().into_owned(), text)
    };
    let read: Vec<(String, String)> = paths.iter().map(read).collect();
    let sources: Vec<(&str, &str)> = read
        .iter()
        .map(|(path, text)| (path.as_str(), text.as_str()))
        .collect();
    check(&schema_faults(&sources));
    let schema = |name: &str| format!("#[derive(ToSchema)]\n{name} {{}}\n");
    let twice = [schema("struct Page"), schema("pub(super) enum Page")].concat();
    assert_eq!(schema_faults(&[("a.rs", &twice)]).len(), 1);
    let aliased = [
        schema("struct Page"),
        schema("#[schema(as = Leaf)]\nstruct Page"),
    ]
    .concat();
    assert!(schema_faults(&[("a.rs", &aliased)]).is_empty());
}

#[test]
fn every_check_finds_its_fault() {
    let planted = |path: &str, text: &str| {
        let source = [Source::new(path, text)];
        let mut faults = edge_faults(&source);
        faults.extend(place_faults(&source));
        faults.extend(shape_faults(&source));
        faults
    };
    for (path, text) in [
        ("src/domain/a.rs", "use crate::store;"),
        ("src/queue/a.rs", "use crate::{domain::id, relay::Handle};"),
        ("src/queue/a.rs", "fn f() { crate::http::f(); }"),
        ("src/cluster/a.rs", "use crate::{store::{a, b}, stream};"),
        ("src/drawer/a.rs", ""),
        ("src/queue/a.rs", "use sqlx::Row;"),
        ("src/relay/a.rs", "fn f() { tokio::spawn(g()); }"),
        ("src/domain/a.rs", "fn f() { Utc::now(); }"),
        ("src/http/utils.rs", ""),
        ("src/http/a.rs", &"\n".repeat(LINES_MAX + 1)),
    ] {
        assert_eq!(planted(path, text).len(), 1, "{path}: {text:.60}");
    }
    for (path, text) in [
        (
            "src/queue/a.rs",
            "use crate::{domain::{id, name}, store::queue};",
        ),
        (
            "src/queue/a.rs",
            "/// Not crate::http.\nuse crate::queue::b; // nor sqlx",
        ),
        ("src/store/a.rs", "use sqlx::Row;"),
        (
            "src/relay/a.rs",
            "#[cfg(test)]\nmod tests { fn f() { tokio::spawn(g()); } }",
        ),
        ("src/main.rs", "postroad::cli::main()"),
    ] {
        assert_eq!(planted(path, text), Vec::<String>::new(), "{text}");
    }
}
