//! JSON that passes through as raw text: checked once, where it comes in, and never printed again.
//!
//! The check is iterative, so no nesting can overflow the stack. Nesting is limited all the same: a reader's parser has a
//! limit (64 in .NET, 100 in Ruby, 128 in serde_json), and one event beyond it would cost the reader the whole answer that
//! carries it.

use serde::Deserialize as _;

/// The deepest nesting of arrays and objects that a payload may have.
pub const DEPTH_MAX: usize = 60;

/// Why some bytes are not a JSON value that Postroad passes on. The text is one clause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not UTF-8.
    #[error("is not UTF-8: the byte at {position} does not fit")]
    NotUtf8 {
        /// Bytes before the first bad one.
        position: usize,
    },
    /// Not JSON.
    #[error("is not valid JSON: {detail}")]
    Syntax {
        /// What the parser said, with line and column.
        detail: String,
    },
    /// Nested deeper than [`DEPTH_MAX`].
    #[error("nests {depth} levels deep, at most {DEPTH_MAX} are allowed")]
    TooDeep {
        /// Levels found.
        depth: usize,
    },
}

/// Checks that the bytes are one JSON value, in UTF-8, nested at most [`DEPTH_MAX`] levels. White space around it is fine.
///
/// # Errors
/// The rule that they break.
pub fn check(bytes: &[u8]) -> Result<&str, Error> {
    let text = std::str::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
        position: error.valid_up_to(),
    })?;
    let mut parser = serde_json::Deserializer::from_str(text);
    serde::de::IgnoredAny::deserialize(&mut parser)
        .and_then(|_| parser.end())
        .map_err(|error| Error::Syntax {
            detail: error.to_string(),
        })?;
    check_depth(text)?;
    Ok(text)
}

/// Checks the nesting of what is known to be JSON.
///
/// # Errors
/// It is too deep.
pub fn check_depth(json: &str) -> Result<(), Error> {
    let depth = depth(json.as_bytes());
    if depth > DEPTH_MAX {
        return Err(Error::TooDeep { depth });
    }
    Ok(())
}

/// The levels of arrays and objects in what is known to be JSON.
fn depth(json: &[u8]) -> usize {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_checked() {
        for (text, valid) in [
            ("null", true),
            (" {\"a\": [1, 2.50, -0e9, \"\\u00e9\\\\\"]} \n", true),
            ("", false),
            ("{", false),
            ("{} {}", false),
            ("{\"a\":01}", false),
            ("nul", false),
            ("'a'", false),
            ("[1,]", false),
        ] {
            assert_eq!(check(text.as_bytes()).is_ok(), valid, "{text}");
        }
        assert_eq!(check(b"\"a\xff\""), Err(Error::NotUtf8 { position: 2 }));
    }

    #[test]
    fn deep_nesting_is_refused_without_recursion() {
        let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(check(deep(DEPTH_MAX).as_bytes()).is_ok());
        assert_eq!(
            check(deep(1_000_000).as_bytes()),
            Err(Error::TooDeep { depth: 1_000_000 })
        );
        assert!(check("[".repeat(1_000_000).as_bytes()).is_err());
        let brackets_in_text = format!("\"{}\\\"{}\"", "[".repeat(200), "{".repeat(200));
        assert!(check(brackets_in_text.as_bytes()).is_ok());
    }
}
