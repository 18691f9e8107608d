#![expect(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use serde_json::Value;

use super::scan::{NAME_MAX_BYTES, NUMBER_MAX_CHARS};
use super::*;

fn pointer_of(text: &str) -> Option<String> {
    check(text.as_bytes())
        .unwrap_err()
        .pointer()
        .map(str::to_owned)
}

#[test]
fn values_are_checked() {
    for (text, valid) in [
        ("null", true),
        (" {\"a\": [1, 2.50, -0e9, \"\\u00e9\\\\\"]} \n", true),
        (
            "[true, false, null, {}, [], \"\", 0, -1, 1E+2, 1e-400]",
            true,
        ),
        ("\"\u{feff}\u{7f}\u{2028}\u{ffff}\"", true),
        ("", false),
        ("{", false),
        ("{} {}", false),
        ("{\"a\":01}", false),
        ("{\"a\" 1}", false),
        ("{\"a\":1,}", false),
        ("{1:1}", false),
        ("[1}", false),
        ("[.5]", false),
        ("[1.]", false),
        ("[1e]", false),
        ("[-]", false),
        ("[+1]", false),
        ("[NaN]", false),
        ("nul", false),
        ("'a'", false),
        ("[1,]", false),
        ("[1 2]", false),
        ("\"\t\"", false),
        ("\"\\x\"", false),
        ("\"\\u00g0\"", false),
        ("\"\\u00", false),
        ("\"a", false),
    ] {
        let checked = check(text.as_bytes());
        assert_eq!(checked.is_ok(), valid, "{text}");
        if let Err(error) = checked {
            assert!(matches!(error, Error::Syntax { .. }), "{text}: {error}");
        }
    }
    assert_eq!(check(b"\"a\xff\""), Err(Error::NotUtf8 { position: 2 }));
    let marked = check("\u{feff}{}".as_bytes()).unwrap_err();
    assert!(marked.to_string().contains("byte order mark"), "{marked}");
}

#[test]
fn deep_nesting_is_refused_without_recursion() {
    let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    assert!(check(deep(DEPTH_MAX).as_bytes()).is_ok());
    assert!(check_depth(&deep(DEPTH_MAX)).is_ok());
    for levels in [DEPTH_MAX + 1, 1_000_000] {
        let error = check(deep(levels).as_bytes()).unwrap_err();
        assert!(matches!(error, Error::TooDeep { .. }), "{error}");
        assert!(check_depth(&deep(levels)).is_err());
    }
    let error = check("[".repeat(1_000_000).as_bytes()).unwrap_err();
    assert!(matches!(error, Error::Syntax { .. }), "{error}");
    let brackets_in_text = format!("\"{}\\\"{}\"", "[".repeat(200), "{".repeat(200));
    assert!(check(brackets_in_text.as_bytes()).is_ok());
    // An envelope has its own levels, and a payload is asked for itself.
    let payload = format!("{{\"a\":[{{\"b\":{}}}]}}", deep(DEPTH_MAX));
    assert!(check(payload.as_bytes()).is_err());
    assert!(check_envelope(payload.as_bytes()).is_ok());
}

#[test]
fn what_parsers_refuse_is_refused_with_its_place() {
    let digits = |count: usize| "9".repeat(count);
    for (text, place) in [
        // Half a pair, in either order, cut off by the end, by another escape, by a text.
        ("\"\\ud800\"".to_owned(), ""),
        ("{\"a\": [0, \"x\\uDC00\"]}".to_owned(), "/a/1"),
        ("[\"\\ud83d\\ud83d\"]".to_owned(), "/0"),
        ("[\"\\ude00\\ud83d\"]".to_owned(), "/0"),
        ("[\"\\ud83d\\n\"]".to_owned(), "/0"),
        ("[\"\\ud83d\\u0041\"]".to_owned(), "/0"),
        ("[[], \"\\ud83dx\"]".to_owned(), "/1"),
        ("{\"a/b\": {\"~\\ud800\": 1}}".to_owned(), "/a~1b"),
        // No double holds it.
        ("[1e400]".to_owned(), "/0"),
        ("{\"n\": -1.8e308}".to_owned(), "/n"),
        ("[0, 1, 0e99999999999999999999]".to_owned(), "/2"),
        ("1e-20000".to_owned(), ""),
        (digits(NUMBER_MAX_CHARS + 1), ""),
        (format!("0.{}", digits(NUMBER_MAX_CHARS)), ""),
        (digits(5_000), ""),
        // U+0000, in a string and in a name.
        ("{\"a\": \"\\u0000\"}".to_owned(), "/a"),
        ("{\"a\": {\"\\u0000\": 1}}".to_owned(), "/a"),
        // A name that is too long, in bytes as it is read.
        (
            format!("[{{\"{}\": 1}}]", "x".repeat(NAME_MAX_BYTES + 1)),
            "/0",
        ),
        (
            format!("{{\"{}\": 1}}", "\\u00e9".repeat(NAME_MAX_BYTES / 2 + 1)),
            "",
        ),
        // A name twice, next to each other, far from each other, written in two ways.
        ("{\"a\": 1, \"b\": {\"c\": 1, \"c\": 2}}".to_owned(), "/b/c"),
        ("{\"a\": 1, \"b\": 2, \"\\u0061\": 3}".to_owned(), "/a"),
        ("[{\"\\u00e9\": 1, \"é\": 2}]".to_owned(), "/0/é"),
    ] {
        let error = check(text.as_bytes()).unwrap_err();
        assert!(
            matches!(error, Error::Unreadable { .. } | Error::Duplicate { .. }),
            "{text:.50}: {error}"
        );
        assert_eq!(pointer_of(&text).as_deref(), Some(place), "{text:.50}");
        assert!(check_envelope(text.as_bytes()).is_err());
    }
    for text in [
        "\"\\ud83d\\ude00 \\u0041 \\uFFFF \\ufdd0\"".to_owned(),
        digits(NUMBER_MAX_CHARS),
        "[1.7976931348623157e308, 5e-324, -1e308, 1e-400]".to_owned(),
        format!("{{\"{}\": 1}}", "x".repeat(NAME_MAX_BYTES)),
        format!("{{\"{}\": 1}}", "\\u00e9".repeat(NAME_MAX_BYTES / 2)),
        "[{\"a\": 1}, {\"a\": {\"a\": 2}}]".to_owned(),
        "{\"a\": {\"b\": 1}, \"b\": {\"a\": 1}}".to_owned(),
    ] {
        assert_eq!(check(text.as_bytes()), Ok(text.as_str()), "{text:.50}");
    }
}

#[test]
fn a_name_twice_is_found_among_many() {
    let object = |names: &mut dyn Iterator<Item = usize>| {
        let members: Vec<String> = names
            .map(|name| format!("\"n{name}\":[{{\"n0\":1}}]"))
            .collect();
        format!("[0,{{{}}}]", members.join(","))
    };
    for count in [2, 15, 16, 17, 18, 1_000] {
        assert!(check(object(&mut (0..count)).as_bytes()).is_ok(), "{count}");
        for twice in [0, count / 2, count - 1] {
            let text = object(&mut (0..count).chain([twice]));
            let place = format!("/1/n{twice}");
            assert_eq!(pointer_of(&text), Some(place), "{count} {twice}");
        }
    }
}

/// Texts that are nearly JSON: its tokens in any order, and its values with a byte changed.
fn nearly_json() -> impl Strategy<Value = Vec<u8>> {
    let token = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        " ",
        "\n",
        "\"",
        "\\",
        "\"a\"",
        "\"b\"",
        "\"\\u0061\"",
        "true",
        "false",
        "null",
        "0",
        "-",
        "1",
        "12",
        ".",
        "e",
        "E+3",
        "1e309",
        "-0.5",
        "\\ud83d",
        "\\ude00",
        "\\u0000",
        "\\n",
        "\u{e9}",
        "\u{1}",
        "u",
        "x",
        "\u{feff}",
    ]);
    let tokens =
        prop::collection::vec(token, 0..24).prop_map(|tokens| tokens.concat().into_bytes());
    let changed =
        (json_text(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(text, place, byte)| {
            let mut bytes = text.into_bytes();
            let place = place.index(bytes.len());
            bytes[place] = byte;
            bytes
        });
    prop_oneof![tokens, changed, json_text().prop_map(String::into_bytes)]
}

fn json_text() -> impl Strategy<Value = String> {
    let number = prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>()
            .prop_filter("JSON has none", |number| number.is_finite())
            .prop_map(|number| format!("{number:e}")),
    ];
    let string = prop_oneof![
        "[ -~é😀]{0,5}".prop_map(|text| serde_json::to_string(&text).unwrap()),
        "(\\\\u[0-9a-fA-F]{4}|\\\\[nrt\"]|a){0,4}".prop_map(|text| format!("\"{text}\"")),
    ];
    let leaf = prop_oneof![
        number,
        string.clone(),
        Just("null".to_owned()),
        Just("true".to_owned())
    ];
    leaf.prop_recursive(6, 40, 5, move |inner| {
        let member =
            (string.clone(), inner.clone()).prop_map(|(name, value)| format!("{name} :{value}"));
        prop_oneof![
            prop::collection::vec(inner, 0..5).prop_map(|items| format!("[{}]", items.join(", "))),
            prop::collection::vec(member, 0..5)
                .prop_map(|members| format!("{{{}}}", members.join(","))),
        ]
    })
}

/// Names that an object has twice, as a parser that keeps all of them finds them.
fn has_twice(text: &str) -> bool {
    #[derive(serde::Deserialize)]
    #[serde(transparent)]
    struct Any<'a>(#[serde(borrow)] &'a serde_json::value::RawValue);

    struct Members<'a>(Vec<(String, Any<'a>)>);

    impl<'de> serde::Deserialize<'de> for Members<'de> {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = Members<'de>;

                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an object")
                }

                fn visit_map<A: serde::de::MapAccess<'de>>(
                    self,
                    mut map: A,
                ) -> Result<Self::Value, A::Error> {
                    let mut members = Vec::new();
                    while let Some(member) = map.next_entry()? {
                        members.push(member);
                    }
                    Ok(Members(members))
                }
            }
            deserializer.deserialize_map(Visitor)
        }
    }

    if let Ok(Members(members)) = serde_json::from_str(text) {
        let mut names: Vec<&String> = members.iter().map(|(name, _)| name).collect();
        names.sort();
        return names.windows(2).any(|pair| pair[0] == pair[1])
            || members.iter().any(|(_, value)| has_twice(value.0.get()));
    }
    if let Ok(items) = serde_json::from_str::<Vec<Any<'_>>>(text) {
        return items.iter().any(|item| has_twice(item.0.get()));
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// serde_json is the judge of the grammar, and what passes is read by it whole.
    #[test]
    fn a_parser_agrees(bytes in nearly_json()) {
        let is_json = serde_json::from_slice::<&serde_json::value::RawValue>(&bytes).is_ok();
        match check(&bytes) {
            Ok(text) => {
                prop_assert!(is_json);
                let value: Value = serde_json::from_slice(&bytes).unwrap();
                prop_assert!(!has_twice(text));
                prop_assert!(!value.to_string().contains("\\u0000"));
            }
            Err(Error::Syntax { .. } | Error::NotUtf8 { .. }) => prop_assert!(!is_json),
            Err(Error::Duplicate { pointer, .. }) => {
                prop_assert!(!pointer.is_empty());
                if let Ok(text) = std::str::from_utf8(&bytes)
                    && serde_json::from_str::<Value>(text).is_ok()
                {
                    prop_assert!(has_twice(text));
                }
            }
            Err(Error::Unreadable { what: "the character U+0000", .. }) => {
                prop_assert!(String::from_utf8_lossy(&bytes).contains("\\u0000"));
            }
            // As an exponent, which may be one that a parser takes for zero.
            Err(Error::Unreadable { what: "a number too large for a double", .. }) => {
                prop_assert!(String::from_utf8_lossy(&bytes).contains(['e', 'E']));
            }
            // Found before the end: what follows may be no JSON.
            Err(Error::Unreadable { .. }) => prop_assert!(serde_json::from_slice::<Value>(&bytes).is_err()),
            Err(Error::TooDeep { .. }) => prop_assert!(false),
        }
    }
}
