#![expect(clippy::unwrap_used, reason = "tests")]

use super::shape::SCHEMA_MAX_BYTES as MEMORY_MAX_BYTES;
use super::*;

fn json(text: &str) -> Data {
    Data::Json(text.to_owned().into())
}

#[test]
fn payloads_are_asked_and_faults_named_without_their_values() {
    let schema = r#"{"type": "object", "required": ["order"], "properties": {"order": {"type": "integer", "minimum": 1},
        "sku": {"type": "string", "pattern": "^[a-z]+$"}}, "additionalProperties": false}"#;
    let schema = Schema::compile(schema).unwrap();
    assert_eq!(
        schema.check(&json(r#"{"order": 1, "sku": "a"}"#), MISMATCHES_MAX),
        Ok(())
    );
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
        let found = schema.check(&data, MISMATCHES_MAX).unwrap_err();
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
        (chain.as_str(), "leads through more than 64 schemas"),
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
        tree.check(&json(r#"{"name": 1, "children": [{"name": 2}]}"#), 1)
            .is_ok()
    );
    let found = tree
        .check(&json(r#"{"name": 1, "children": [{"name": 2}, {}]}"#), 1)
        .unwrap_err();
    assert_eq!(found[0].pointer, "/children/1");
}

/// A schema whose branches lead back to themselves: each level of a payload can double the work.
const BRANCHING: &str = r##"{"$ref": "#/$defs/n", "$defs": {"n": {"oneOf": [
    {"type": "string"},
    {"type": "object", "required": ["c"], "properties": {"c": {"$ref": "#/$defs/n"}}},
    {"type": "object", "additionalProperties": false, "properties": {"c": {"$ref": "#/$defs/n"}}}]}}}"##;

/// `{"c": {"c": … 1}}`
fn nested(levels: usize) -> Data {
    json(&format!(
        "{}1{}",
        r#"{"c":"#.repeat(levels),
        "}".repeat(levels)
    ))
}

fn steps(schema: &Schema, data: &Data) -> (Result<bool, Ended>, u64) {
    let value = parse(data).unwrap();
    let limits = schema.limits(data.bytes().len());
    counted::within(limits, || schema.validator.is_valid(Counted(&value)))
}

/// Definitions `a0` to `a<levels>`, each made of the one before it.
fn chain(levels: usize, first: &str, next: impl Fn(String) -> String) -> String {
    let mut definitions = vec![format!(r#""a0": {first}"#)];
    for level in 1..=levels {
        let before = format!(r##"{{"$ref": "#/$defs/a{}"}}"##, level - 1);
        definitions.push(format!(r#""a{level}": {}"#, next(before)));
    }
    format!(
        r##"{{"$ref": "#/$defs/a{levels}", "$defs": {{{}}}}}"##,
        definitions.join(",")
    )
}

#[test]
fn no_payload_costs_much_more_than_its_size() {
    let branching = Schema::compile(BRANCHING).unwrap();
    // Each level asks the one below it twice; what it has asked it remembers.
    let (valid, ten) = steps(&branching, &nested(25));
    assert_eq!(valid, Ok(false));
    let (valid, twenty) = steps(&branching, &nested(50));
    assert_eq!(valid, Ok(false));
    assert!(twenty < 4 * ten, "{ten} steps, then {twenty}");
    // Naming every fault would double with each level: then one is named, or none.
    for levels in [14, 22, 58] {
        let found = branching
            .check(&nested(levels), MISMATCHES_MAX)
            .unwrap_err();
        assert!(found[0].detail.contains("does not match"), "{found:?}");
    }
    // Nothing is remembered of schemas that do not lead back: there the steps run out.
    let doubling = chain(50, r#"{"type": "string"}"#, |before| {
        format!(
            r#"{{"properties": {{"c": {{"allOf": [{{"not": {before}}}, {{"not": {before}}}]}}}}}}"#
        )
    });
    let doubling = Schema::compile(&doubling).unwrap();
    let (ended, spent) = steps(&doubling, &nested(50));
    assert_eq!(ended, Err(Ended::Exhausted));
    assert!(spent <= STEPS + STEPS_PER_BYTE * nested(50).bytes().len() as u64);
    let found = doubling.check(&nested(50), 1).unwrap_err();
    assert!(found[0].detail.contains("steps"), "{found:?}");
    // A pattern is tried against each byte of a text.
    let pattern = Schema::compile(r#"{"pattern": "[ab]*a[ab]{900}$"}"#).unwrap();
    let short = json(&format!("\"{}\"", "a".repeat(1_000)));
    assert_eq!(steps(&pattern, &short).0, Ok(true));
    let long = json(&format!("\"{}\"", "ab".repeat(200_000)));
    assert_eq!(steps(&pattern, &long).0, Err(Ended::Exhausted));
}

#[test]
fn ordinary_schemas_are_far_from_the_limits() {
    let schema = Schema::compile(
        r#"{"type": "object", "required": ["order"], "additionalProperties": false, "properties": {
            "order": {"type": "integer", "minimum": 1},
            "sku": {"type": "string", "pattern": "^[A-Za-z0-9-]{1,40}$"},
            "lines": {"type": "array", "uniqueItems": true, "items": {"oneOf": [
                {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "maxLength": 100}}},
                {"type": "object", "required": ["number"], "properties": {"number": {"enum": [1, 2, 3]}}}]}}}}"#,
    )
    .unwrap();
    for lines in [1, 100, 5_000] {
        let lines: Vec<String> = (0..lines)
            .map(|n| format!(r#"{{"text": "line {n}"}}"#))
            .collect();
        let data = json(&format!(
            r#"{{"order": 1, "sku": "abc-1", "lines": [{}]}}"#,
            lines.join(",")
        ));
        let (valid, spent) = steps(&schema, &data);
        assert_eq!(valid, Ok(true));
        let limit = schema.limits(data.bytes().len()).steps;
        assert!(spent * 10 < limit, "{spent} of {limit} steps");
    }
    let texts = Schema::compile(r#"{"additionalProperties": {"pattern": "^.{1,1000}$"}}"#).unwrap();
    let full: Vec<String> = (0..5)
        .map(|n| format!(r#""{n}": "{}""#, "x".repeat(1_000)))
        .collect();
    let full = json(&format!("{{{}}}", full.join(",")));
    assert_eq!(steps(&texts, &full).0, Ok(true));
    // What is small is asked at once, and its steps are taken out.
    let small = json(r#"{"order": 1, "sku": "abc-1"}"#);
    let mut left = 1_000;
    assert_eq!(schema.check_briefly(&small, &mut left), Some(()));
    assert!((500..1_000).contains(&left), "{left}");
    assert_eq!(schema.check_briefly(&small, &mut 3), None);
    assert_eq!(schema.check_briefly(&json("{}"), &mut left), None);
    assert_eq!(schema.check_briefly(&Data::Absent, &mut left), None);
}

#[test]
fn what_would_cost_too_much_is_refused_before_it_is_compiled() {
    let doubling = |levels| {
        chain(levels, r#"{"type": "integer"}"#, |before| {
            format!(r#"{{"allOf": [{before}, {before}]}}"#)
        })
    };
    // Each step looks for what was evaluated by asking the others again.
    let unevaluated = |levels| {
        chain(levels, r#"{"properties": {"x": true}}"#, |before| {
            format!(r#"{{"allOf": [{before}], "unevaluatedProperties": false}}"#)
        })
    };
    // The end of the chain is what a walk by name comes to first.
    let long = |levels| chain(levels, "true", |before| before);
    for taken in [doubling(8), unevaluated(8), long(60)] {
        let schema = Schema::compile(&taken).unwrap();
        assert!(steps(&schema, &json("1")).1 < 10_000);
    }
    let patterns = |count: usize, pattern: &str| {
        let each = (0..count).map(|n| format!(r#""p{n}": {{"pattern": "{pattern}{n}"}}"#));
        format!(
            r#"{{"properties": {{{}}}}}"#,
            each.collect::<Vec<_>>().join(",")
        )
    };
    assert!(Schema::compile(&patterns(20, "^[a-z]+[0-9]{1,10}x")).is_ok());
    for (refused, why) in [
        (doubling(40), "in more than 10000 ways"),
        (unevaluated(40), "in more than 10000 ways"),
        (long(1_400), "more than 64 schemas"),
        (
            patterns(1, ".{5000}"),
            "a pattern of more than 1024 characters",
        ),
        (
            patterns(1, "(a{1000}){1000}"),
            "a pattern of more than 1024 characters",
        ),
        (patterns(1_500, "[^a]{200}"), "MiB of memory"),
    ] {
        let found = Schema::compile(&refused).unwrap_err();
        assert!(found.contains(why), "{refused:.100}: {found}");
    }
    let ordinary = Schema::compile(&patterns(20, "^[a-z]+[0-9]{1,10}x")).unwrap();
    assert!(
        ordinary.bytes() < MEMORY_MAX_BYTES / 50,
        "{}",
        ordinary.bytes()
    );
}

/// Texts that a check of a format may be slow on.
fn hostile(bytes: usize) -> Vec<String> {
    let groups = (0..bytes / 12).map(|n| format!("(?<g{n}>)"));
    let mut texts = vec![groups.collect::<String>()];
    for part in [
        "(", "[", "a", "{", "é", "1", "0", ":", "/0", "a.", "a-", "-", "%41", "~0", "a@", "1.",
        "P1Y", "::", "xn--", "{a}", "\\\\",
    ] {
        texts.push(part.repeat(bytes / part.len()));
    }
    texts
}

#[test]
fn no_format_takes_much_longer_than_its_text_is_long() {
    let formats = [
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "idn-email",
        "idn-hostname",
        "ipv4",
        "ipv6",
        "iri",
        "iri-reference",
        "json-pointer",
        "regex",
        "relative-json-pointer",
        "time",
        "uri",
        "uri-reference",
        "uri-template",
        "uuid",
    ];
    let texts = hostile(256 << 10).into_iter();
    let payloads: Vec<Data> = texts.map(|text| json(&format!("\"{text}\""))).collect();
    for format in formats {
        let schema = format!(
            r#"{{"$schema": "http://json-schema.org/draft-07/schema#", "format": "{format}"}}"#
        );
        let schema = Schema::compile(&schema).unwrap();
        for (number, payload) in payloads.iter().enumerate() {
            let began = std::time::Instant::now();
            let _ = schema.check(payload, 1);
            let took = began.elapsed();
            assert!(took.as_secs() < 2, "{format}: text {number} took {took:?}");
        }
    }
}

#[test]
fn a_pattern_in_a_payload_is_one_up_to_its_longest_length() {
    let schema = r#"{"$schema": "http://json-schema.org/draft-07/schema#", "format": "regex"}"#;
    let schema = Schema::compile(schema).unwrap();
    let longest = "a".repeat(1_024);
    for (text, is_pattern) in [
        ("^(?=a)b$", true),
        ("(", false),
        (longest.as_str(), true),
        (&format!("{longest}a"), false),
    ] {
        let found = schema.check(&json(&format!("\"{text}\"")), 1);
        assert_eq!(found.is_ok(), is_pattern, "{text}");
    }
}
