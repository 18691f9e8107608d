//! JSON that passes through as raw text: checked once, where it comes in, and never printed again.
//!
//! A message goes out inside an answer, beside others. What one consumer's parser refuses costs that consumer the whole answer, the
//! receipts of the other messages included. So the check asks for more than RFC 8259 does: it refuses everything that is JSON by the
//! grammar and that widespread parsers do not read.
//!
//! | refused | parsers that refuse it |
//! | --- | --- |
//! | nesting beyond 60 levels | .NET (64), Ruby (100), serde_json (128), jq, Python |
//! | half a surrogate pair, as in `"\ud83d"` | jq, Perl, serde_json, jsonb of Postgres |
//! | a number that is not finite as a double | serde_json, Go; jsonb by its exponent |
//! | a number of more than 300 characters | Python (4,300 digits), and others by their time |
//! | a name of more than 50,000 bytes | Jackson (50,000 characters), and what is built on it |
//! | a name that an object has twice | JSON-java, Gson, json/v2 of Go, Ruby's json from 3.0 on |
//! | the character U+0000 | jansson, jsonb of Postgres, PHP in a name |
//! | a byte order mark, what is not UTF-8 | most |
//!
//! It is one pass over the bytes, without recursion, so no nesting can overflow the stack.

mod scan;
#[cfg(test)]
mod tests;

use serde::Deserialize as _;

use scan::{Fault, Scan};

/// The deepest nesting of arrays and objects that a payload may have.
pub const DEPTH_MAX: usize = 60;
/// Levels of a request around its payloads: `{"messages": [{"event": {"data": …}}]}`.
const ENVELOPE_DEPTH: usize = 4;
/// Characters of a name that a fault shows.
const SHOWN_CHARS: usize = 40;

/// Reasons why some bytes are not a JSON value that Postroad passes on. The text is one clause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not UTF-8.
    #[error("is not UTF-8: the byte at {position} is not valid")]
    NotUtf8 {
        /// Bytes before the first bad one.
        position: usize,
    },
    /// Not JSON.
    #[error("is not valid JSON: {detail}")]
    Syntax {
        /// The parser's message, with line and column.
        detail: String,
    },
    /// Nested deeper than [`DEPTH_MAX`].
    #[error("nests more than {DEPTH_MAX} levels deep")]
    TooDeep {
        /// The place, as a JSON pointer.
        pointer: String,
    },
    /// An object has a name twice.
    #[error("has the name `{name}` twice in one object")]
    Duplicate {
        /// The member, as a JSON pointer.
        pointer: String,
        /// Its name.
        name: String,
    },
    /// JSON that consumers' parsers refuse.
    #[error("has {what}, which not every JSON parser reads")]
    Unreadable {
        /// The place, as a JSON pointer.
        pointer: String,
        /// The string or number.
        what: &'static str,
    },
}

impl Error {
    /// The JSON pointer of the place, where it has one.
    #[must_use]
    pub fn pointer(&self) -> Option<&str> {
        match self {
            Self::NotUtf8 { .. } | Self::Syntax { .. } => None,
            Self::TooDeep { pointer }
            | Self::Duplicate { pointer, .. }
            | Self::Unreadable { pointer, .. } => Some(pointer),
        }
    }
}

/// Checks that the bytes are one JSON value that every consumer can read inside an answer: see the table above. White space around it
/// is fine. Bytes that fail may still go out, as `data_base64`.
///
/// # Errors
/// The rule that they break.
pub fn check(bytes: &[u8]) -> Result<&str, Error> {
    check_to(bytes, DEPTH_MAX)
}

/// The same for a request that has payloads in it, some levels down. [`check_depth`] remains to be asked of each of them.
///
/// # Errors
/// The rule that the bytes break.
pub fn check_envelope(bytes: &[u8]) -> Result<&str, Error> {
    check_to(bytes, DEPTH_MAX + ENVELOPE_DEPTH)
}

fn check_to(bytes: &[u8], depth_max: usize) -> Result<&str, Error> {
    let text = std::str::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
        position: error.valid_up_to(),
    })?;
    let mut scan = Scan::new(text, depth_max);
    match scan.run() {
        Ok(()) => Ok(text),
        Err(fault) => Err(explain(&scan, fault)),
    }
}

#[cold]
fn explain(scan: &Scan<'_>, fault: Fault) -> Error {
    match fault {
        Fault::Syntax => Error::Syntax {
            detail: syntax(scan.text)
                .unwrap_or_else(|| format!("the byte at {} is not valid", scan.at)),
        },
        // The scan ends at the first such place: the rest may be no JSON at all.
        Fault::TooDeep => match syntax(scan.text) {
            Some(detail) => Error::Syntax { detail },
            None => Error::TooDeep {
                pointer: scan.pointer(0),
            },
        },
        Fault::Value(what) => Error::Unreadable {
            pointer: scan.pointer(0),
            what,
        },
        Fault::Name(what) => Error::Unreadable {
            pointer: scan.pointer(1),
            what,
        },
        Fault::Duplicate(name) => Error::Duplicate {
            pointer: format!("{}/{}", scan.pointer(1), step(&name)),
            name: shown(&name),
        },
    }
}

/// The parser's objection to the text, if it has one.
fn syntax(text: &str) -> Option<String> {
    if text.starts_with('\u{feff}') {
        return Some("it begins with a byte order mark".to_owned());
    }
    let mut parser = serde_json::Deserializer::from_str(text);
    let parsed = serde::de::IgnoredAny::deserialize(&mut parser).and_then(|_| parser.end());
    parsed.err().map(|error| error.to_string())
}

/// Checks the nesting of valid JSON.
///
/// # Errors
/// It is too deep.
pub fn check_depth(json: &str) -> Result<(), Error> {
    if depth(json.as_bytes()) > DEPTH_MAX {
        return Err(Error::TooDeep {
            pointer: String::new(),
        });
    }
    Ok(())
}

/// The levels of arrays and objects in valid JSON.
#[must_use]
pub fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'\\' => {
                            bytes.next();
                        }
                        b'"' => break,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    deepest
}

/// The start of a name, without control characters.
fn shown(name: &str) -> String {
    name.chars()
        .take(SHOWN_CHARS)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// A name as a step of a JSON pointer.
fn step(name: &str) -> String {
    shown(name).replace('~', "~0").replace('/', "~1")
}
