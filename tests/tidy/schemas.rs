//! Names in the API's description.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::check;
use crate::source::{files, root};

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
