//! The tree as text: files, and the code in them.

use std::path::{Path, PathBuf};

/// A file's code: path from the root of the tree, and text without comments and without its test module.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) code: String,
    pub(crate) lines: usize,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let code: Vec<&str> = without_tests(text)
            .into_iter()
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
    pub(crate) fn module(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let module = inside.split('/').next().unwrap_or(inside);
        let module = module.strip_suffix(".rs").unwrap_or(module);
        (!matches!(module, "main" | "lib")).then_some(module)
    }

    /// The modules of the crate that the code names.
    pub(crate) fn uses(&self) -> Vec<String> {
        self.names_behind("crate::")
    }

    /// The names that come first behind this beginning of a path.
    pub(crate) fn names_behind(&self, beginning: &str) -> Vec<String> {
        let mut found = Vec::new();
        for (at, _) in self.code.match_indices(beginning) {
            let before = self.code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | '$' | ':')) {
                continue;
            }
            let rest = &self.code[at + beginning.len()..];
            match rest.strip_prefix('{') {
                Some(group) => found.extend(group_names(group)),
                None => found.push(first_name(rest)),
            }
        }
        found.retain(|name| !name.is_empty());
        found
    }
}

/// The lines of a file without its items for tests. An item ends where rustfmt puts its end: at a line of its own
/// indentation that closes a brace, or, for one without a body, at the first line that ends with a semicolon. So a file that
/// only declares a module for tests (`mod simulation;`) is read to its end.
fn without_tests(text: &str) -> Vec<&str> {
    let mut kept = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push(line);
            continue;
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        let closing = format!("{indent}}}");
        for line in lines.by_ref() {
            let is_outer = line.len() - line.trim_start().len() == indent.len();
            let is_attribute = line.trim_start().starts_with("#[") || line.trim() == ")]";
            let is_whole = is_outer && !is_attribute && line.ends_with([';', '}', ',']);
            if line.starts_with(&closing) || is_whole {
                break;
            }
        }
    }
    kept
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

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn files(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
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

pub(crate) fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for folder in ["src", "tests", "benches"] {
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
