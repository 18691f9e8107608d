//! JSON that counts how often it is looked at, and ends the check after a limit.
//!
//! The size of a payload does not bound the cost of a schema: where branches lead back to themselves, each level of the
//! payload can double the work. The validator cannot be told to stop, but it reads the payload through an interface: so the
//! payload counts. Each look spends a step; when no step is left, the look unwinds the stack to [`within`]. The same
//! payload takes the same steps on every machine, so no clock decides whether a message is accepted.

use std::any::Any;
use std::borrow::Cow;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use jsonschema::JsonType;
use jsonschema::json::{Array, Json, Node, NodeIdentity, Object, cmp, unique};
use serde_json::{Map, Number, Value};

/// Bytes of a text that one step reads.
const BYTES_PER_STEP: usize = 64;
/// The cost of a value's identity: the validator looks for it in a list of those that it is inside of.
const IDENTITY_STEPS: u64 = 4;

/// The limits of a check.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Looks at the payload.
    pub(super) steps: u64,
    /// Faults that are made, each of which has its place as a text.
    pub(super) faults: u64,
    /// Further steps for each byte of a text, by the patterns that it may have to match.
    pub(super) text_steps: u64,
    /// The same for a member's name.
    pub(super) name_steps: u64,
}

/// Reasons why a check ended without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It would have cost more than it may.
    Exhausted,
    /// The validator failed.
    Failed,
}

struct Left {
    steps: Cell<u64>,
    faults: Cell<u64>,
    text_steps: Cell<u64>,
    name_steps: Cell<u64>,
}

thread_local! {
    static LEFT: Left = const {
        Left { steps: Cell::new(0), faults: Cell::new(0), text_steps: Cell::new(0), name_steps: Cell::new(0) }
    };
}

/// The panic payload when no step is left.
struct Exhausted;

/// Asks within limits. The steps that were spent come with the answer.
pub(super) fn within<T>(limits: Limits, ask: impl FnOnce() -> T) -> (Result<T, Ended>, u64) {
    LEFT.with(|left| {
        left.steps.set(limits.steps);
        left.faults.set(limits.faults);
        left.text_steps.set(limits.text_steps);
        left.name_steps.set(limits.name_steps);
    });
    // The validator keeps nothing of one asking for the next, so nothing is left half done.
    let asked = catch_unwind(AssertUnwindSafe(ask));
    let spent = limits.steps - LEFT.with(|left| left.steps.get());
    let asked = asked.map_err(
        |thrown: Box<dyn Any + Send>| match thrown.is::<Exhausted>() {
            true => Ended::Exhausted,
            false => Ended::Failed,
        },
    );
    (asked, spent)
}

/// Takes steps from the remaining ones.
#[inline]
fn spend(steps: u64) {
    let is_left = LEFT.with(|left| {
        let after = left.steps.get().checked_sub(steps);
        left.steps.set(after.unwrap_or(0));
        after.is_some()
    });
    if !is_left {
        exhausted();
    }
}

#[cold]
fn exhausted() -> ! {
    // Unlike a panic it is reported nowhere: it is an answer.
    resume_unwind(Box::new(Exhausted))
}

fn spend_fault() {
    let is_left = LEFT.with(|left| {
        let after = left.faults.get().checked_sub(1);
        left.faults.set(after.unwrap_or(0));
        after.is_some()
    });
    if !is_left {
        exhausted();
    }
}

fn pieces(text: &str) -> u64 {
    1 + (text.len() / BYTES_PER_STEP) as u64
}

fn spend_text(text: &str) {
    spend(pieces(text) + text.len() as u64 * LEFT.with(|left| left.text_steps.get()));
}

fn spend_name(name: &str) {
    spend(pieces(name) + name.len() as u64 * LEFT.with(|left| left.name_steps.get()));
}

/// Spends what comparing the whole of a value costs.
fn spend_whole(value: &Value) {
    match value {
        Value::Array(items) => {
            spend(1);
            items.iter().for_each(spend_whole);
        }
        Value::Object(members) => {
            spend(1);
            for (name, value) in members {
                spend(pieces(name));
                spend_whole(value);
            }
        }
        Value::String(text) => spend(pieces(text)),
        _ => spend(1),
    }
}

/// The representation, for the validator.
#[derive(Debug)]
pub(super) struct Counting;

/// A value of the payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counted<'a>(pub(super) &'a Value);

/// An object of the payload.
#[derive(Debug)]
pub(super) struct Members<'a>(&'a Map<String, Value>);

/// An array of the payload.
#[derive(Debug)]
pub(super) struct Items<'a>(&'a [Value]);

impl Json for Counting {
    type Node<'a> = Counted<'a>;
    type PreparedKey = String;
    type StringBuffer = Value;

    // As for a `serde_json::Map`, which this is.
    const KEYS_PER_LOOKUP: usize = 2;

    fn prepare_key(key: &str) -> String {
        key.to_owned()
    }

    fn with_string_node<T>(
        buffer: &mut Value,
        string: &str,
        f: impl FnOnce(Counted<'_>) -> T,
    ) -> T {
        *buffer = Value::String(string.to_owned());
        f(Counted(buffer))
    }
}

impl<'a> Node<'a, Counting> for Counted<'a> {
    type Object = Members<'a>;
    type Array = Items<'a>;
    type Number = &'a Number;

    fn as_object(&self) -> Option<Members<'a>> {
        spend(1);
        self.0.as_object().map(Members)
    }

    fn as_array(&self) -> Option<Items<'a>> {
        spend(1);
        self.0.as_array().map(|items| Items(items))
    }

    fn as_string(&self) -> Option<Cow<'a, str>> {
        match self.0 {
            Value::String(text) => {
                spend_text(text);
                Some(Cow::Borrowed(text))
            }
            _ => {
                spend(1);
                None
            }
        }
    }

    fn as_number(&self) -> Option<&'a Number> {
        spend(1);
        match self.0 {
            Value::Number(number) => Some(number),
            _ => None,
        }
    }

    fn as_boolean(&self) -> Option<bool> {
        spend(1);
        self.0.as_bool()
    }

    fn is_null(&self) -> bool {
        spend(1);
        self.0.is_null()
    }

    fn json_type(&self) -> JsonType {
        spend(1);
        match self.0 {
            Value::Null => JsonType::Null,
            Value::Bool(_) => JsonType::Boolean,
            Value::Number(_) => JsonType::Number,
            Value::String(_) => JsonType::String,
            Value::Array(_) => JsonType::Array,
            Value::Object(_) => JsonType::Object,
        }
    }

    fn string_length(&self) -> Option<u64> {
        let text = self.0.as_str();
        spend(text.map_or(1, pieces));
        text.map(|text| text.chars().count() as u64)
    }

    fn equals_value(&self, expected: &Value) -> bool {
        spend_whole(self.0);
        cmp::equal(self.0, expected)
    }

    /// For faults alone: what else would use it is overridden here.
    fn to_value(&self) -> Cow<'a, Value> {
        spend(1);
        spend_fault();
        Cow::Borrowed(self.0)
    }

    fn identity(&self) -> Option<NodeIdentity> {
        spend(IDENTITY_STEPS);
        Some(NodeIdentity::new(std::ptr::from_ref(self.0).addr()))
    }
}

impl<'a> Object<'a, Counting> for Members<'a> {
    type Node = Counted<'a>;
    type MemberName = &'a str;
    type MembersIter = MembersIter<'a>;

    fn len(&self) -> usize {
        self.0.len()
    }

    fn get(&self, key: &String) -> Option<Counted<'a>> {
        spend(1);
        self.0.get(key.as_str()).map(Counted)
    }

    fn members(&self) -> MembersIter<'a> {
        spend(1);
        MembersIter(self.0.iter())
    }
}

/// The members of an object, one by one.
#[derive(Debug)]
pub(super) struct MembersIter<'a>(serde_json::map::Iter<'a>);

impl<'a> Iterator for MembersIter<'a> {
    type Item = (&'a str, Counted<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, value) = self.0.next()?;
        spend_name(name);
        Some((name, Counted(value)))
    }
}

impl<'a> Array<'a, Counting> for Items<'a> {
    type Node = Counted<'a>;
    type ElementsIter = ItemsIter<'a>;

    fn len(&self) -> usize {
        self.0.len()
    }

    fn elements(&self) -> ItemsIter<'a> {
        spend(1);
        ItemsIter(self.0.iter())
    }

    fn is_unique(&self) -> bool {
        // Up to 15 items are compared each with each, more are hashed.
        let rounds = if self.0.len() > 15 { 2 } else { self.0.len() };
        for _ in 0..rounds {
            self.0.iter().for_each(spend_whole);
        }
        unique::is_unique(self.0)
    }
}

/// The elements of an array, one by one.
#[derive(Debug)]
pub(super) struct ItemsIter<'a>(std::slice::Iter<'a, Value>);

impl<'a> Iterator for ItemsIter<'a> {
    type Item = Counted<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.0.next()?;
        spend(1);
        Some(Counted(item))
    }
}
