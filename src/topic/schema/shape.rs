//! The cost of applying a schema, seen from the schema alone: too costly ones are refused before they are compiled.
//!
//! Some keywords apply further schemas to the very same value: `$ref`, `allOf`, `if` and others. Together they form a
//! graph. A way back to its beginning would never end; two ways to each schema double the work with each step; and a long
//! way is deep on the stack. The looks at a payload are counted during a check, but a schema such as `true` looks at
//! nothing, so ways are counted here.

use std::collections::HashMap;

use serde_json::Value;

/// Ways to ask about one value.
const WAYS_MAX: u64 = 10_000;
/// Schemas that one can lead through by references and `allOf`, on the way to one place.
const CHAIN_MAX: u64 = 64;
/// Memory that a value of the schema takes once it is compiled, roughly and rather more: keywords, places, tables of names.
const VALUE_BYTES: usize = 512;
/// The same for a pattern, beside its states, with what it keeps while it is matched.
const PATTERN_BYTES: usize = 8 << 10;
/// And for a range of characters at one place of a pattern: the states are there forwards and backwards.
const RANGE_BYTES: u64 = 64;
/// The largest pattern: characters, repetitions written out, and memory.
const PATTERN_MAX_CHARACTERS: u64 = 1_024;
const PATTERN_MAX_BYTES: u64 = 1 << 20;
/// The largest schema, in such bytes.
pub(super) const SCHEMA_MAX_BYTES: usize = 32 << 20;

/// Keywords whose schemas are asked about the very same value. `dependencies` is `dependentSchemas` of the older drafts.
const IN_PLACE: [&str; 9] = [
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
    "dependentSchemas",
    "dependencies",
];

/// The highest cost of a schema, beside its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Schemas on the longest way to one place.
    pub(super) chain: u64,
    /// Memory once it is compiled.
    pub(super) bytes: usize,
    /// Characters of the largest pattern, repetitions written out.
    pub(super) pattern: u64,
    /// The same of all patterns for names together.
    pub(super) names: u64,
}

/// Measures a schema.
///
/// # Errors
/// It would cost too much, or never end. One clause.
pub(super) fn measure(schema: &Value) -> Result<Shape, String> {
    let graph = Graph::new(schema);
    let chain = graph.walk()?;
    let mut shape = Shape {
        chain,
        bytes: graph.places.len() * VALUE_BYTES,
        pattern: 0,
        names: 0,
    };
    for place in &graph.places {
        let Value::Object(members) = place.value else {
            // A name, a number, a text of the schema: counted with its object.
            continue;
        };
        shape.bytes += members.len() * VALUE_BYTES;
        if let Some(Value::String(pattern)) = members.get("pattern") {
            let size = pattern_size(pattern)?;
            shape.pattern = shape.pattern.max(size.characters);
            shape.bytes += size.bytes;
        }
        if let Some(Value::Object(patterns)) = members.get("patternProperties") {
            for pattern in patterns.keys() {
                let size = pattern_size(pattern)?;
                shape.names += size.characters;
                shape.bytes += size.bytes;
            }
        }
        if shape.bytes > SCHEMA_MAX_BYTES {
            return Err(format!(
                "takes more than {} MiB of memory once it is compiled",
                SCHEMA_MAX_BYTES >> 20
            ));
        }
    }
    Ok(shape)
}

struct PatternSize {
    characters: u64,
    bytes: usize,
}

/// How large a pattern becomes, repetitions written out.
fn pattern_size(pattern: &str) -> Result<PatternSize, String> {
    use regex_syntax::hir::{Class, Hir, HirKind};

    /// Characters, and ranges of characters.
    fn sizes(hir: &Hir) -> (u64, u64) {
        let sum = |hirs: &[Hir]| {
            hirs.iter().map(sizes).fold((0_u64, 0_u64), |sum, size| {
                (sum.0.saturating_add(size.0), sum.1.saturating_add(size.1))
            })
        };
        match hir.kind() {
            HirKind::Empty | HirKind::Look(_) => (1, 1),
            HirKind::Literal(literal) => {
                let length = literal.0.len() as u64;
                (length, length)
            }
            // Beyond ASCII a range is several of bytes, one behind the other.
            HirKind::Class(Class::Unicode(class)) => {
                let ranges = class.ranges().len() as u64;
                (
                    1,
                    if class.is_ascii() {
                        ranges
                    } else {
                        8 + 4 * ranges
                    },
                )
            }
            HirKind::Class(Class::Bytes(class)) => (1, class.ranges().len() as u64),
            HirKind::Capture(capture) => sizes(&capture.sub),
            HirKind::Concat(hirs) | HirKind::Alternation(hirs) => sum(hirs),
            HirKind::Repetition(repetition) => {
                let times = repetition.max.unwrap_or(repetition.min.saturating_add(1));
                let times = u64::from(times.max(1));
                let (characters, ranges) = sizes(&repetition.sub);
                (
                    characters.saturating_mul(times),
                    ranges.saturating_mul(times),
                )
            }
        }
    }

    // One that is not read here is refused, or taken, by the compiler; it has the size that its text allows it to have.
    let (characters, ranges) = match regex_syntax::parse(pattern) {
        Ok(hir) => sizes(&hir),
        Err(_) => (pattern.len() as u64, pattern.len() as u64 * 4),
    };
    let bytes = ranges.saturating_mul(RANGE_BYTES);
    if bytes > PATTERN_MAX_BYTES || characters > PATTERN_MAX_CHARACTERS {
        let shown: String = pattern.chars().take(40).collect();
        return Err(format!(
            "has a pattern of more than {PATTERN_MAX_CHARACTERS} characters, repetitions written out, or of too large classes, \
             `{shown}`: `maxLength` says how long a text may be"
        ));
    }
    Ok(PatternSize {
        characters,
        bytes: PATTERN_BYTES + usize::try_from(bytes).unwrap_or(usize::MAX),
    })
}

/// An object or an array of the schema.
struct Place<'s> {
    pointer: String,
    value: &'s Value,
}

struct Graph<'s> {
    root: &'s Value,
    places: Vec<Place<'s>>,
    by_pointer: HashMap<String, usize>,
    /// Embedded schemas with their own id, by place.
    with_id: Vec<(usize, &'s str)>,
    /// Places that have a name, by name.
    anchors: HashMap<&'s str, Vec<usize>>,
}

/// The state of a walk at a place.
#[derive(Clone, Copy)]
enum Walked {
    Not,
    /// It is on the way that is being walked.
    Open,
    /// Ways through it, schemas on the longest of them.
    Done(u64, u64),
}

impl<'s> Graph<'s> {
    fn new(root: &'s Value) -> Self {
        let mut graph = Self {
            root,
            places: Vec::new(),
            by_pointer: HashMap::new(),
            with_id: Vec::new(),
            anchors: HashMap::new(),
        };
        let mut pending = vec![(String::new(), root)];
        while let Some((pointer, value)) = pending.pop() {
            let number = graph.places.len();
            match value {
                Value::Object(members) => {
                    for (name, member) in members {
                        pending.push((format!("{pointer}/{}", escape(name)), member));
                    }
                    if let Some(Value::String(id)) = members.get("$id").or(members.get("id")) {
                        graph.with_id.push((number, id));
                    }
                    for name in ["$anchor", "$dynamicAnchor"] {
                        if let Some(Value::String(anchor)) = members.get(name) {
                            graph.anchors.entry(anchor).or_default().push(number);
                        }
                    }
                }
                Value::Array(items) => {
                    for (index, item) in items.iter().enumerate() {
                        pending.push((format!("{pointer}/{index}"), item));
                    }
                }
                _ => continue,
            }
            graph.by_pointer.insert(pointer.clone(), number);
            graph.places.push(Place { pointer, value });
        }
        graph
    }

    /// Walks every way. The schemas on the longest.
    fn walk(&self) -> Result<u64, String> {
        let mut walked = vec![Walked::Not; self.places.len()];
        let mut longest = 0;
        for start in 0..self.places.len() {
            // On a stack of its own: a way can be longer than the thread's stack is deep.
            let mut open = vec![(start, self.next(start), 0)];
            while let Some((place, next, number)) = open.last_mut() {
                let place = *place;
                if let Walked::Done(..) = walked[place] {
                    open.pop();
                    continue;
                }
                walked[place] = Walked::Open;
                if let Some(&to) = next.get(*number) {
                    match walked[to] {
                        Walked::Done(..) => *number += 1,
                        Walked::Not => {
                            let next = self.next(to);
                            open.push((to, next, 0));
                        }
                        Walked::Open => {
                            return Err(format!(
                                "leads back to itself at `#{}` without going deeper into the payload: checking it would never end",
                                self.places[to].pointer
                            ));
                        }
                    }
                    continue;
                }
                let (mut ways, mut chain) = (1_u64, 0);
                for &to in next.iter() {
                    if let Walked::Done(further, length) = walked[to] {
                        ways = ways.saturating_add(further);
                        chain = chain.max(length);
                    }
                }
                // To find what has not been evaluated, the others are asked once more.
                if ["unevaluatedProperties", "unevaluatedItems"]
                    .iter()
                    .any(|keyword| self.places[place].value.get(keyword).is_some())
                {
                    ways = ways.saturating_mul(2);
                }
                chain += 1;
                self.check(place, ways, chain)?;
                longest = longest.max(chain);
                walked[place] = Walked::Done(ways, chain);
                open.pop();
            }
        }
        Ok(longest)
    }

    fn check(&self, place: usize, ways: u64, chain: u64) -> Result<(), String> {
        let pointer = &self.places[place].pointer;
        if chain > CHAIN_MAX {
            return Err(format!(
                "leads through more than {CHAIN_MAX} schemas to one place, at `#{pointer}`"
            ));
        }
        if ways > WAYS_MAX {
            return Err(format!(
                "asks about one value in more than {WAYS_MAX} ways, at `#{pointer}`: each way is a path of references, `allOf`, `oneOf` and their like"
            ));
        }
        Ok(())
    }

    /// The schemas that one asks about the same value; one as often as it asks it.
    fn next(&self, place: usize) -> Vec<usize> {
        let Place { pointer, value } = &self.places[place];
        let Value::Object(members) = value else {
            return Vec::new();
        };
        let mut next = Vec::new();
        for name in ["$ref", "$dynamicRef", "$recursiveRef"] {
            if let Some(Value::String(target)) = members.get(name) {
                next.extend(self.resolve(target));
            }
        }
        let mut add = |pointer: String| next.extend(self.by_pointer.get(&pointer));
        for keyword in IN_PLACE {
            match members.get(keyword) {
                Some(Value::Array(items)) => {
                    (0..items.len()).for_each(|index| add(format!("{pointer}/{keyword}/{index}")));
                }
                Some(Value::Object(of)) if keyword.starts_with("depend") => {
                    of.keys()
                        .for_each(|name| add(format!("{pointer}/{keyword}/{}", escape(name))));
                }
                Some(Value::Object(_)) => add(format!("{pointer}/{keyword}")),
                _ => {}
            }
        }
        next
    }

    /// The places that a reference can mean: by pointer, by anchor, or the whole by its id. Rather one too many.
    fn resolve(&self, target: &str) -> Vec<usize> {
        let own = self.root.get("$id").or_else(|| self.root.get("id"));
        let (base, fragment) = target.split_once('#').unwrap_or((target, ""));
        let fragment = percent_encoding::percent_decode_str(fragment).decode_utf8_lossy();
        let is_own = base.is_empty() || own.and_then(Value::as_str) == Some(base);
        if !fragment.is_empty() && !fragment.starts_with('/') {
            return self.anchors.get(&*fragment).cloned().unwrap_or_default();
        }
        let mut found: Vec<usize> = Vec::new();
        if is_own {
            found.extend(self.by_pointer.get(&*fragment));
        }
        for (place, id) in &self.with_id {
            // Without a base: of the schema that the reference stands in, whichever that is. `#` alone is the whole.
            let is_meant = match base {
                "" => !fragment.is_empty(),
                base => *id == base || id.ends_with(&format!("/{base}")),
            };
            let pointer = format!("{}{fragment}", self.places[*place].pointer);
            if let Some(&number) = self.by_pointer.get(&pointer)
                && is_meant
                && !found.contains(&number)
            {
                found.push(number);
            }
        }
        found
    }
}

fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}
