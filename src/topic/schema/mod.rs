//! JSON Schema over payloads. A schema is compiled once; no reference leads to the network or to a file.
//!
//! Anyone who may declare can bring a schema, and anyone who may publish a payload: neither may cost much more than its
//! size. A schema is measured before it is compiled (`shape`), and the cost of a check is counted while it runs
//! (`counted`).

mod counted;
mod shape;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use serde_json::Value;

use crate::domain::json;
use crate::domain::message::Data;

use counted::{Counted, Counting, Ended, Limits};
use shape::Shape;

/// The largest schema, in bytes.
pub const SCHEMA_MAX_BYTES: usize = 64 << 10;
/// Faults of one payload that are named.
pub const MISMATCHES_MAX: usize = 10;
/// Characters of one fault's text.
const DETAIL_MAX_CHARS: usize = 300;
/// The largest compiled pattern, in bytes.
const PATTERN_MAX_BYTES: usize = 1 << 20;
/// The memory of a pattern for the states that it reached; beyond it, it forgets and works them out again.
const PATTERN_MEMORY_BYTES: usize = 64 << 10;
/// Steps that every payload has, and those that it has for each of its bytes. One is some nanoseconds; payloads of ordinary schemas take
/// 0.2 to 0.7 of them for each byte.
const STEPS: u64 = 200_000;
const STEPS_PER_BYTE: u64 = 32;
/// Characters of a pattern, repetitions written out, that one step tries for each byte of a text.
const PATTERN_PER_STEP: u64 = 16;
/// The longest text that can be a pattern, where a schema says `format: "regex"`. The validator's check takes time with the square of a text, in
/// one look that no step counts, and keeps the last texts.
const REGEX_MAX_BYTES: usize = 1 << 10;
/// Memory for the faults of one payload: each has its place as a text, which is no longer than the payload.
const FAULTS_BYTES: usize = 32 << 20;
const FAULTS_MAX: u64 = 1_000;

/// Schemas on top of each other on a stack, where it is one that others use too. Each takes some 500 bytes.
const BRIEF_LEVELS: u64 = 256;

/// A schema that is ready to be asked.
#[derive(Debug)]
pub struct Schema {
    text: String,
    validator: jsonschema::Validator<Counting>,
    shape: Shape,
}

/// A mismatch: the place in the payload, and the fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// A JSON pointer into the payload.
    pub pointer: String,
    /// One clause. Shows no value of the payload.
    pub detail: String,
}

/// The answer to one payload.
pub(super) type Answer = Result<(), Vec<Mismatch>>;

impl Schema {
    /// Compiles a schema. This takes some milliseconds, and a stack of some megabytes.
    ///
    /// # Errors
    /// The reason why it is not a schema, or costs too much, as one clause.
    pub fn compile(text: &str) -> Result<Self, String> {
        if text.len() > SCHEMA_MAX_BYTES {
            return Err(format!(
                "is {} bytes long, at most {SCHEMA_MAX_BYTES} are allowed",
                text.len()
            ));
        }
        let schema: Value =
            serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
        let shape = shape::measure(&schema)?;
        // A pattern that backtracks could be made to run for ever by a payload: these cannot.
        let patterns = jsonschema::PatternOptions::regex()
            .size_limit(PATTERN_MAX_BYTES)
            .dfa_size_limit(PATTERN_MEMORY_BYTES);
        let options = jsonschema::options_for::<Counting>()
            .offline()
            .with_pattern_options(patterns)
            .with_format("regex", is_regex);
        let built = catch_unwind(AssertUnwindSafe(|| options.build(&schema)));
        let built = built.map_err(|_| "cannot be compiled: the compiler failed".to_owned())?;
        let validator = built.map_err(|error| {
            let at = error.instance_path().to_string();
            let place = if at.is_empty() {
                String::new()
            } else {
                format!(" at {at}")
            };
            shorten(&format!("is not a JSON Schema{place}: {error}"))
        })?;
        Ok(Self {
            text: text.to_owned(),
            validator,
            shape,
        })
    }

    /// As it was given.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Memory that it takes, about and at most.
    pub(super) const fn bytes(&self) -> usize {
        self.shape.bytes
    }

    /// Asks whether a payload matches, on a thread with a stack for it. Takes as many steps as the payload may, and no more.
    ///
    /// # Errors
    /// Where it does not, `most` places at most.
    pub fn check(&self, data: &Data, most: usize) -> Result<(), Vec<Mismatch>> {
        let value = parse(data)?;
        let limits = self.limits(data.bytes().len());
        let valid = counted::within(limits, || self.validator.is_valid(Counted(&value))).0;
        match valid {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.explain(&value, limits, most)),
            Err(Ended::Exhausted) => Err(whole(format!(
                "checking this payload takes more than {} steps: the schema's branches lead to the same values again and again",
                limits.steps
            ))),
            Err(Ended::Failed) => Err(whole(
                "the payload could not be checked: the validator failed".to_owned(),
            )),
        }
    }

    /// Asks the same where nothing may take long: `None` where it might, or where there is something to explain. Takes what it took
    /// out of `steps`.
    pub(super) fn check_briefly(&self, data: &Data, steps: &mut u64) -> Option<()> {
        let Data::Json(bytes) = data else {
            return None;
        };
        let levels = json::depth(bytes) as u64 + 2;
        if levels.saturating_mul(self.shape.chain) > BRIEF_LEVELS {
            return None;
        }
        let value = parse(data).ok()?;
        let limits = Limits {
            steps: *steps,
            ..self.limits(bytes.len())
        };
        let (valid, spent) = counted::within(limits, || self.validator.is_valid(Counted(&value)));
        *steps -= spent;
        (valid == Ok(true)).then_some(())
    }

    fn limits(&self, bytes: usize) -> Limits {
        let most = FAULTS_BYTES / (bytes + 4_096);
        Limits {
            steps: STEPS + STEPS_PER_BYTE * bytes as u64,
            faults: (most as u64).clamp(MISMATCHES_MAX as u64 + 6, FAULTS_MAX),
            text_steps: self.shape.pattern.div_ceil(PATTERN_PER_STEP),
            name_steps: self.shape.names.div_ceil(PATTERN_PER_STEP),
        }
    }

    /// The places where a payload does not match: all, or only the first one if all would cost too much.
    fn explain(&self, value: &Value, limits: Limits, most: usize) -> Vec<Mismatch> {
        let named = |error: jsonschema::ValidationError<'_>| Mismatch {
            pointer: error.instance_path().to_string(),
            detail: shorten(&error.masked().to_string()),
        };
        if most > 1 {
            let all = counted::within(limits, || {
                let errors = self.validator.iter_errors(Counted(value)).take(most);
                errors.map(named).collect::<Vec<_>>()
            });
            if let Ok(all) = all.0
                && !all.is_empty()
            {
                return all;
            }
        }
        let first = counted::within(limits, || {
            self.validator.validate(Counted(value)).map_err(named)
        });
        match first.0 {
            Ok(Err(first)) => vec![first],
            _ => whole("it does not match, and has too many faults to name one".to_owned()),
        }
    }
}

/// The validator's own check of `format: "regex"`, for texts of a bounded length.
fn is_regex(text: &str) -> bool {
    static CHECK: LazyLock<jsonschema::Validator> = LazyLock::new(|| {
        let schema = serde_json::json!({ "format": "regex" });
        let options = jsonschema::options().should_validate_formats(true);
        options.build(&schema).expect("the schema is one")
    });
    text.len() <= REGEX_MAX_BYTES && CHECK.is_valid(&Value::String(text.to_owned()))
}

fn whole(detail: String) -> Vec<Mismatch> {
    vec![Mismatch {
        pointer: String::new(),
        detail,
    }]
}

fn parse(data: &Data) -> Result<Value, Vec<Mismatch>> {
    match data {
        Data::Json(bytes) => serde_json::from_slice(bytes)
            .map_err(|error| whole(format!("the payload cannot be read: {error}"))),
        Data::Absent => Err(whole(
            "there is no payload, and the topic has a schema".to_owned(),
        )),
        Data::Text(_) | Data::Binary(_) => Err(whole(
            "the payload is not JSON, and the topic has a schema".to_owned(),
        )),
    }
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= DETAIL_MAX_CHARS {
        return text.to_owned();
    }
    let kept: String = text.chars().take(DETAIL_MAX_CHARS).collect();
    format!("{kept}…")
}
