//! Links of the pages: what they lead to is there. And the guarantees: each names a test that exists.

use std::path::{Path, PathBuf};

use crate::check;
use crate::source::{files, root};

/// A link of a page: the line it stands on, and where it leads.
struct Link {
    line: usize,
    target: String,
}

/// The links of a Markdown text to other files or to headings, without those that lead outside the repository.
fn links(text: &str) -> Vec<Link> {
    let mut found = Vec::new();
    let mut is_code = false;
    for (at, line) in text.lines().enumerate() {
        is_code ^= line.trim_start().starts_with("```");
        if is_code || line.starts_with("    ") {
            continue;
        }
        for part in line.split("](").skip(1) {
            let target = part.split(')').next().unwrap_or_default();
            if !target.contains("://") && !target.starts_with("mailto:") {
                let target = target.to_owned();
                found.push(Link {
                    line: at + 1,
                    target,
                });
            }
        }
    }
    found
}

/// The fragment by which a heading is reached: lower case, letters, digits and hyphens, blanks as hyphens.
fn fragment(heading: &str) -> String {
    let mut fragment = String::new();
    for letter in heading.trim_start_matches('#').trim().chars() {
        match letter {
            ' ' | '-' => fragment.push('-'),
            '_' => fragment.push('_'),
            _ if letter.is_alphanumeric() => fragment.extend(letter.to_lowercase()),
            _ => {}
        }
    }
    fragment
}

fn has_heading(text: &str, wanted: &str) -> bool {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings.map(fragment).any(|known| known == wanted)
}

fn link_faults(page: &Path, text: &str) -> Vec<String> {
    let folder = page.parent().expect("a page is in a folder");
    let mut faults = Vec::new();
    for Link { line, target } in links(text) {
        let (path, heading) = target.split_once('#').unwrap_or((&target, ""));
        let there = match path {
            "" => page.to_owned(),
            _ => folder.join(path),
        };
        let is_there = match heading {
            "" => there.exists(),
            _ if path.is_empty() => has_heading(text, heading),
            _ => std::fs::read_to_string(&there).is_ok_and(|text| has_heading(&text, heading)),
        };
        if !is_there {
            let page = page.display();
            faults.push(format!("{page}:{line}: {target} leads nowhere"));
        }
    }
    faults
}

/// Rows of the table of promises whose second cell names no test: a file below `tests` with a test in it, or a folder of
/// such files.
fn promise_faults(text: &str, folder: &Path) -> Vec<String> {
    let table = text
        .split("| promise | proved by |\n")
        .nth(1)
        .unwrap_or_default();
    let rows = table.lines().skip(1).take_while(|row| row.starts_with('|'));
    let mut faults = Vec::new();
    for row in rows {
        let tests: Vec<PathBuf> = links(row)
            .into_iter()
            .map(|link| folder.join(link.target))
            .collect();
        if tests.is_empty() || !tests.iter().all(|path| has_test(path)) {
            faults.push(format!("no test proves: {row}"));
        }
    }
    faults
}

fn has_test(path: &Path) -> bool {
    let mut sources = Vec::new();
    match path.is_dir() {
        true => files(path, "rs", &mut sources),
        false => sources.push(path.to_owned()),
    }
    let is_test = |text: String| text.contains("#[test]") || text.contains("#[tokio::test");
    sources
        .iter()
        .any(|path| std::fs::read_to_string(path).is_ok_and(is_test))
}

pub(crate) fn pages() -> Vec<PathBuf> {
    let mut pages = Vec::new();
    for folder in ["docs", "examples"] {
        files(&root().join(folder), "md", &mut pages);
    }
    let top = std::fs::read_dir(root()).expect("the root can be read");
    let top = top.map(|entry| entry.expect("the root can be read").path());
    pages.extend(top.filter(|path| path.extension().is_some_and(|ending| ending == "md")));
    pages.sort();
    pages
}

#[test]
fn links_of_the_pages_resolve() {
    let mut faults = Vec::new();
    for page in pages() {
        let text = std::fs::read_to_string(&page).expect("a page is text");
        faults.extend(link_faults(&page, &text));
    }
    check(&faults);
    let readme = root().join("README.md");
    for (text, count) in [
        ("[a](docs/nowhere.md)", 1),
        ("# One\n[a](#two)", 1),
        ("[a](docs/sql.md#no-such-heading)", 1),
        (
            "# It's two\n[a](#its-two) [b](docs/sql.md) [c](https://example.org/x)",
            0,
        ),
        ("    [code](nowhere)", 0),
    ] {
        assert_eq!(link_faults(&readme, text).len(), count, "{text}");
    }
}

#[test]
fn every_promise_names_a_test_that_exists() {
    let text =
        std::fs::read_to_string(root().join("docs/guarantees.md")).expect("the page is text");
    assert!(text.contains("| promise | proved by |\n"));
    check(&promise_faults(&text, &root().join("docs")));
    let table = |row: &str| format!("| promise | proved by |\n| --- | --- |\n{row}\n");
    for row in [
        "| a | nothing |",
        "| a | [b](tests/it/nowhere.rs) |",
        "| a | [b](tests/it/support/clock.rs) |",
    ] {
        assert_eq!(promise_faults(&table(row), root()).len(), 1, "{row}");
    }
    let sound = table("| a | [b](tests/it/demo.rs) |");
    assert!(promise_faults(&sound, root()).is_empty());
}
