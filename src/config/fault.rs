//! The faults of a configuration.

use std::fmt;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The place: `postroad.toml`, `--bind`, `POSTROAD_BIND`.
    pub source: String,
    /// The key, with its table: `origins.shop.url_env`.
    pub key: String,
    /// One clause after the key: "is `x`, and must be …".
    pub what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: `{}` {}", self.source, self.key, self.what)
    }
}

/// Reasons why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file that was asked for cannot be read.
    #[error("reading the configuration file {path} failed")]
    Read {
        /// Its path.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{path} is not valid TOML: {message}")]
    Syntax {
        /// Its path.
        path: String,
        /// The place and the fault.
        message: String,
    },
    /// Values or keys are wrong. All of them are named.
    #[error("{}", lines(.0))]
    Invalid(Vec<Fault>),
}

fn lines(faults: &[Fault]) -> String {
    let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

/// Adds "did you mean" when one of the known names is near.
pub(super) fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known
        .map(|candidate| (distance(name, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().div_ceil(3))
        .min();
    match near {
        Some((_, candidate)) => format!("is not a key; did you mean `{candidate}`?"),
        None => "is not a key".to_owned(),
    }
}

/// Edits between two names.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, l) in left.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, r) in right.iter().enumerate() {
            let replaced = corner + usize::from(l != *r);
            corner = row[j + 1];
            row[j + 1] = replaced.min(corner + 1).min(row[j] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_offered() {
        let known = ["bind", "data_dir", "log_level"];
        for (name, expected) in [
            ("bnd", "is not a key; did you mean `bind`?"),
            ("data-dir", "is not a key; did you mean `data_dir`?"),
            ("loglevel", "is not a key; did you mean `log_level`?"),
            ("colour", "is not a key"),
        ] {
            assert_eq!(unknown(name, known.into_iter()), expected, "{name}");
        }
    }
}
