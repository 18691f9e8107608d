//! How long a file may be, and how it may not be named.

use crate::check;
use crate::source::{Source, files, root, sources};

/// Names for drawers.
const NAMES: &[&str] = &[
    "utils", "util", "common", "helpers", "types", "manager", "service", "misc",
];

pub(crate) const LINES_MAX: usize = 600;

pub(crate) fn shape_faults(sources: &[Source]) -> Vec<String> {
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

#[test]
fn files_are_short_and_named_for_what_they_hold() {
    let mut faults = shape_faults(&sources());
    let mut statements = Vec::new();
    for folder in ["migrations", "src", "tests"] {
        files(&root().join(folder), "sql", &mut statements);
    }
    let statements = statements.iter().map(|path| {
        let text = std::fs::read_to_string(path).expect("a statement is text");
        Source::new(&path.to_string_lossy(), &text)
    });
    faults.extend(shape_faults(&statements.collect::<Vec<_>>()));
    check(&faults);
}
