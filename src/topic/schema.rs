//! JSON Schema over payloads. Compiled once; no reference leads to the network or to a file.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use crate::domain::message::Data;

/// The largest schema, in bytes.
pub const SCHEMA_MAX_BYTES: usize = 64 << 10;
/// Faults of one payload that are named.
pub const MISMATCHES_MAX: usize = 10;
/// Characters of one fault's text.
const DETAIL_MAX_CHARS: usize = 300;
/// Schemas that one can lead through by references and `allOf`, on the way to one place.
const CHAIN_MAX: usize = 256;
/// The largest compiled pattern, in bytes.
const PATTERN_MAX_BYTES: usize = 1 << 20;

/// A schema that is ready to be asked.
#[derive(Debug)]
pub struct Schema {
    text: String,
    validator: jsonschema::Validator,
}

/// Where a payload does not match, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// A JSON pointer into the payload.
    pub pointer: String,
    /// One clause. Shows no value of the payload.
    pub detail: String,
}

impl Schema {
    /// Compiles a schema.
    ///
    /// # Errors
    /// Why it is none, as one clause.
    pub fn compile(text: &str) -> Result<Self, String> {
        if text.len() > SCHEMA_MAX_BYTES {
            return Err(format!(
                "is {} bytes long, at most {SCHEMA_MAX_BYTES} are allowed",
                text.len()
            ));
        }
        let schema: Value =
            serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
        check_references(&schema)?;
        // A pattern that backtracks could be made to run for ever by a payload: these cannot.
        let patterns = jsonschema::PatternOptions::regex().size_limit(PATTERN_MAX_BYTES);
        let built = jsonschema::options()
            .offline()
            .with_pattern_options(patterns)
            .build(&schema);
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
        })
    }

    /// As it was given.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Asks whether a payload matches.
    ///
    /// # Errors
    /// Where it does not, [`MISMATCHES_MAX`] at most.
    pub fn check(&self, data: &Data) -> Result<(), Vec<Mismatch>> {
        let whole = |detail: String| {
            vec![Mismatch {
                pointer: String::new(),
                detail,
            }]
        };
        let bytes = match data {
            Data::Json(bytes) => bytes,
            Data::Absent => {
                return Err(whole(
                    "there is no payload, and the topic has a schema".to_owned(),
                ));
            }
            Data::Text(_) | Data::Binary(_) => {
                return Err(whole(
                    "the payload is not JSON, and the topic has a schema".to_owned(),
                ));
            }
        };
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| whole(format!("the payload cannot be looked into: {error}")))?;
        if self.validator.is_valid(&value) {
            return Ok(());
        }
        let mismatches = self.validator.iter_errors(&value).take(MISMATCHES_MAX);
        Err(mismatches
            .map(|error| Mismatch {
                pointer: error.instance_path().to_string(),
                detail: shorten(&error.masked().to_string()),
            })
            .collect())
    }
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= DETAIL_MAX_CHARS {
        return text.to_owned();
    }
    let kept: String = text.chars().take(DETAIL_MAX_CHARS).collect();
    format!("{kept}…")
}

/// Keywords whose schemas are asked about the very same value.
const IN_PLACE: [&str; 8] = [
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
    "dependentSchemas",
];

/// Refuses a schema that leads back to itself without going into the payload: asking it would never end.
fn check_references(schema: &Value) -> Result<(), String> {
    let mut finished = HashSet::new();
    let mut pending = vec![(String::new(), schema)];
    let mut places: HashMap<String, &Value> = HashMap::new();
    while let Some((pointer, value)) = pending.pop() {
        match value {
            Value::Object(members) => {
                for (name, member) in members {
                    let name = name.replace('~', "~0").replace('/', "~1");
                    pending.push((format!("{pointer}/{name}"), member));
                }
            }
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    pending.push((format!("{pointer}/{index}"), item));
                }
            }
            _ => continue,
        }
        places.insert(pointer, value);
    }
    let mut pointers: Vec<&String> = places.keys().collect();
    pointers.sort();
    for pointer in pointers {
        walk(pointer, &places, schema, &mut Vec::new(), &mut finished)?;
    }
    Ok(())
}

fn walk(
    pointer: &str,
    places: &HashMap<String, &Value>,
    root: &Value,
    path: &mut Vec<String>,
    finished: &mut HashSet<String>,
) -> Result<(), String> {
    if path.iter().any(|earlier| earlier == pointer) {
        return Err(format!(
            "leads back to itself at `#{pointer}` without going into the payload: asking it would never end"
        ));
    }
    if finished.contains(pointer) {
        return Ok(());
    }
    if path.len() >= CHAIN_MAX {
        return Err(format!(
            "leads through more than {CHAIN_MAX} schemas to one place, at `#{pointer}`"
        ));
    }
    let Some(Value::Object(members)) = places.get(pointer) else {
        return Ok(());
    };
    path.push(pointer.to_owned());
    let mut next = Vec::new();
    for name in ["$ref", "$dynamicRef", "$recursiveRef"] {
        if let Some(Value::String(target)) = members.get(name) {
            next.extend(resolve(target, places, root));
        }
    }
    for keyword in IN_PLACE {
        match members.get(keyword) {
            Some(Value::Array(items)) => {
                next.extend((0..items.len()).map(|index| format!("{pointer}/{keyword}/{index}")));
            }
            Some(Value::Object(of)) if keyword == "dependentSchemas" => {
                next.extend(of.keys().map(|name| {
                    let name = name.replace('~', "~0").replace('/', "~1");
                    format!("{pointer}/{keyword}/{name}")
                }));
            }
            Some(Value::Object(_)) => next.push(format!("{pointer}/{keyword}")),
            _ => {}
        }
    }
    for target in next {
        walk(&target, places, root, path, finished)?;
    }
    path.pop();
    finished.insert(pointer.to_owned());
    Ok(())
}

/// The places in the schema that a reference can mean: by pointer, by anchor, or the whole by its own id.
fn resolve(target: &str, places: &HashMap<String, &Value>, root: &Value) -> Vec<String> {
    let own = root
        .get("$id")
        .or_else(|| root.get("id"))
        .and_then(Value::as_str);
    let fragment = match target.split_once('#') {
        Some((_, fragment)) => fragment,
        None if Some(target) == own => "",
        // Of an embedded schema: wherever one has this id.
        None => {
            let with_id = places.iter().filter(|(_, value)| {
                let id = value.get("$id").and_then(Value::as_str);
                id.is_some_and(|id| id == target || id.ends_with(&format!("/{target}")))
            });
            return with_id.map(|(pointer, _)| pointer.clone()).collect();
        }
    };
    let fragment = percent_encoding::percent_decode_str(fragment).decode_utf8_lossy();
    if fragment.is_empty() || fragment.starts_with('/') {
        return vec![fragment.into_owned()];
    }
    let anchors = places.iter().filter(|(_, value)| {
        ["$anchor", "$dynamicAnchor"]
            .iter()
            .any(|name| value.get(name).and_then(Value::as_str) == Some(&*fragment))
    });
    anchors.map(|(pointer, _)| pointer.clone()).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn json(text: &str) -> Data {
        Data::Json(text.to_owned().into())
    }

    #[test]
    fn payloads_are_asked_and_faults_named_without_their_values() {
        let schema = r#"{"type": "object", "required": ["order"], "properties": {"order": {"type": "integer", "minimum": 1},
            "sku": {"type": "string", "pattern": "^[a-z]+$"}}, "additionalProperties": false}"#;
        let schema = Schema::compile(schema).unwrap();
        assert_eq!(schema.check(&json(r#"{"order": 1, "sku": "a"}"#)), Ok(()));
        for (data, pointer, detail) in [
            (json("{}"), "", "\"order\" is a required property"),
            (
                json(r#"{"order": "secret"}"#),
                "/order",
                "is not of type \"integer\"",
            ),
            (
                json(r#"{"order": 0}"#),
                "/order",
                "less than the minimum of 1",
            ),
            (
                json(r#"{"order": 1, "sku": "SECRET"}"#),
                "/sku",
                "does not match",
            ),
            (json(r#"{"order": 1, "x": 1}"#), "", "Additional properties"),
            (Data::Absent, "", "there is no payload"),
            (Data::Text("x".into()), "", "is not JSON"),
            (Data::Binary("x".into()), "", "is not JSON"),
            (
                json(&("[".repeat(200) + &"]".repeat(200))),
                "",
                "recursion limit",
            ),
        ] {
            let found = schema.check(&data).unwrap_err();
            assert_eq!(found[0].pointer, pointer, "{found:?}");
            assert!(found[0].detail.contains(detail), "{found:?}");
            assert!(
                !found[0].detail.to_lowercase().contains("secret"),
                "{found:?}"
            );
        }
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        let links = (0..1_500).map(|n| format!(r##""a{n}": {{"$ref": "#/$defs/a{}"}}"##, n + 1));
        let links = links.collect::<Vec<_>>().join(",");
        let chain = format!(r##"{{"$ref": "#/$defs/a0", "$defs": {{{links}}}}}"##);
        let large = format!("{{\"title\": \"{}\"}}", "x".repeat(SCHEMA_MAX_BYTES));
        for (text, what) in [
            ("{", "is not JSON"),
            ("1", "is not a JSON Schema"),
            (r#"{"type": "text"}"#, "is not a JSON Schema at /type"),
            (r#"{"pattern": "(a"}"#, "is not a JSON Schema"),
            // It would have to be looked for backwards.
            (r#"{"pattern": "(?<=a)b"}"#, "is not a JSON Schema"),
            (
                r#"{"$ref": "https://example.com/schema.json"}"#,
                "is not a JSON Schema",
            ),
            (r#"{"$ref": "file:///etc/passwd"}"#, "is not a JSON Schema"),
            (r##"{"$ref": "#"}"##, "leads back to itself"),
            (r##"{"allOf": [{"$ref": "#"}]}"##, "leads back to itself"),
            (
                r##"{"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#/$defs/a"}}}}"##,
                "leads back to itself",
            ),
            (
                r##"{"$ref": "#x", "$defs": {"a": {"$anchor": "x", "$ref": "#x"}}}"##,
                "leads back to itself",
            ),
            (large.as_str(), "at most 65536 are allowed"),
            (chain.as_str(), "leads through more than 256 schemas"),
        ] {
            let refused = Schema::compile(text).unwrap_err();
            assert!(refused.contains(what), "{text:.100}: {refused}");
        }
    }

    #[test]
    fn a_schema_may_lead_back_to_itself_through_the_payload() {
        let tree = r##"{"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}, "required": ["name"]}"##;
        let tree = Schema::compile(tree).unwrap();
        assert!(
            tree.check(&json(r#"{"name": 1, "children": [{"name": 2}]}"#))
                .is_ok()
        );
        let found = tree
            .check(&json(r#"{"name": 1, "children": [{"name": 2}, {}]}"#))
            .unwrap_err();
        assert_eq!(found[0].pointer, "/children/1");
    }
}
