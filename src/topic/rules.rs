//! The settings that apply to a topic: for each setting, that of the most specific pattern that has it.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use super::rate::Bucket;
use super::schema::Schema;
use crate::domain::name::{Topic, TopicPattern};
use crate::store::topic::SettingsRow;

/// Memory of all schemas together, by their own measure.
pub(super) const SCHEMAS_MAX_BYTES: usize = 128 << 20;
/// Topics whose rules are remembered; beyond it they are looked up again.
const APPLIED_MAX: usize = 100_000;

/// The settings as of one version, ready to be applied.
#[derive(Debug, Default)]
pub struct Rules {
    pub(super) version: i64,
    /// The most specific first.
    rules: Vec<Rule>,
    applied: RwLock<HashMap<Topic, Arc<Applied>>>,
}

/// The declaration of a pattern, ready to be applied.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) row: Arc<SettingsRow>,
    schema: Option<Arc<Schema>>,
    /// The reason why the schema is not applied.
    pub(super) schema_fault: Option<Arc<str>>,
    bucket: Option<Arc<Bucket>>,
}

/// The settings that apply to one topic.
#[derive(Debug, Default)]
pub struct Applied {
    /// The pattern and its schema.
    pub schema: Option<(TopicPattern, Arc<Schema>)>,
    /// The largest payload over HTTP, in bytes.
    pub max_bytes: Option<u64>,
    /// The pattern and its rate over HTTP.
    pub(super) bucket: Option<(TopicPattern, Arc<Bucket>)>,
}

impl Rules {
    /// Takes over unchanged parts: a schema is compiled once, even for several patterns, and a rate goes on where it was. This takes
    /// a while, and the stack that schemas need.
    pub(super) fn new(version: i64, rows: Vec<SettingsRow>, before: &Self) -> Self {
        let mut compiled: HashMap<String, Arc<Schema>> = before
            .rules
            .iter()
            .filter_map(|rule| rule.schema.as_ref())
            .map(|schema| (schema.text().to_owned(), Arc::clone(schema)))
            .collect();
        let (mut used, mut bytes) = (HashSet::new(), 0);
        let rows = rows.into_iter().map(|row| {
            let schema = row.schema.as_deref().map(|text| {
                let schema = find_or_compile(text, &mut compiled)?;
                if !used.contains(text) {
                    if bytes + schema.bytes() > SCHEMAS_MAX_BYTES {
                        return Err(too_many_bytes());
                    }
                    bytes += schema.bytes();
                    used.insert(text.to_owned());
                }
                Ok(schema)
            });
            Rule::new(row, schema, before)
        });
        let mut rules: Vec<Rule> = rows.collect();
        rules.sort_by(|left, right| specificity(&left.row.pattern, &right.row.pattern));
        Self {
            version,
            rules,
            applied: RwLock::default(),
        }
    }

    /// The declarations, by pattern.
    pub(super) fn declared(&self) -> Vec<&Rule> {
        let mut rules: Vec<&Rule> = self.rules.iter().collect();
        rules.sort_by(|left, right| left.row.pattern.as_str().cmp(right.row.pattern.as_str()));
        rules
    }

    /// Whether a pattern's new schema finds room beside those of the others.
    pub(super) fn has_room(&self, pattern: &TopicPattern, schema: &Schema) -> Result<(), String> {
        let others = self
            .rules
            .iter()
            .filter(|rule| rule.row.pattern != *pattern);
        let mut sizes: HashMap<&str, usize> = others
            .filter_map(|rule| rule.schema.as_ref())
            .map(|schema| (schema.text(), schema.bytes()))
            .collect();
        sizes.insert(schema.text(), schema.bytes());
        match sizes.values().sum::<usize>() > SCHEMAS_MAX_BYTES {
            true => Err(too_many_bytes()),
            false => Ok(()),
        }
    }

    /// The settings that apply to a topic; none when nothing is declared at all.
    #[must_use]
    pub fn of(&self, topic: &Topic) -> Option<Arc<Applied>> {
        if self.rules.is_empty() {
            return None;
        }
        let known = self.applied.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(applied) = known.get(topic) {
            return Some(Arc::clone(applied));
        }
        drop(known);
        let applied = Arc::new(self.find(topic));
        let mut known = self.applied.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= APPLIED_MAX {
            known.clear();
        }
        known.insert(topic.clone(), Arc::clone(&applied));
        Some(applied)
    }

    fn find(&self, topic: &Topic) -> Applied {
        let mut applied = Applied::default();
        for rule in self
            .rules
            .iter()
            .filter(|rule| rule.row.pattern.matches(topic))
        {
            let pattern = || rule.row.pattern.clone();
            if applied.schema.is_none() {
                applied.schema = rule.schema.clone().map(|schema| (pattern(), schema));
            }
            if applied.max_bytes.is_none() {
                applied.max_bytes = rule.row.max_bytes.map(i64::unsigned_abs);
            }
            if applied.bucket.is_none() {
                applied.bucket = rule.bucket.clone().map(|bucket| (pattern(), bucket));
            }
        }
        applied
    }
}

impl Rule {
    fn new(row: SettingsRow, schema: Option<Result<Arc<Schema>, String>>, before: &Rules) -> Self {
        let same = before
            .rules
            .iter()
            .find(|rule| rule.row.pattern == row.pattern);
        let (schema, schema_fault) = match schema {
            Some(Err(reason)) => {
                // It was fit when it was declared: by another version of this program, or beside others at the same moment.
                let is_known =
                    same.is_some_and(|rule| rule.schema_fault.as_deref() == Some(&*reason));
                if !is_known {
                    tracing::error!(pattern = %row.pattern, reason, "a declared schema cannot be used: payloads of these topics are not checked until it is declared again");
                }
                (None, Some(reason.into()))
            }
            found => (found.and_then(Result::ok), None),
        };
        let bucket = row.rate_per_second.map(|rate| {
            let burst = burst(&row, rate);
            let known = same.and_then(|rule| rule.bucket.as_ref());
            match known.filter(|known| known.is(rate, burst)) {
                Some(known) => Arc::clone(known),
                None => Arc::new(Bucket::new(rate, burst, Instant::now())),
            }
        });
        Self {
            row: Arc::new(row),
            schema,
            schema_fault,
            bucket,
        }
    }
}

fn find_or_compile(
    text: &str,
    compiled: &mut HashMap<String, Arc<Schema>>,
) -> Result<Arc<Schema>, String> {
    if let Some(known) = compiled.get(text) {
        return Ok(Arc::clone(known));
    }
    let schema = Arc::new(Schema::compile(text)?);
    compiled.insert(text.to_owned(), Arc::clone(&schema));
    Ok(schema)
}

fn too_many_bytes() -> String {
    format!(
        "needs too much memory: all schemas together would take more than {} MiB",
        SCHEMAS_MAX_BYTES >> 20
    )
}

/// Without one, what comes in a second, and one at least.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a positive rate, saturating"
)]
fn burst(row: &SettingsRow, rate: f64) -> u64 {
    row.burst
        .map_or_else(|| rate.ceil().max(1.0) as u64, i64::unsigned_abs)
}

/// The more specific first: token by token, a name before `*` before `>`; a total order, so that all nodes agree.
fn specificity(left: &TopicPattern, right: &TopicPattern) -> Ordering {
    let rank = |token: &str| match token {
        ">" => 2,
        "*" => 1,
        _ => 0,
    };
    let (left, right) = (left.as_str(), right.as_str());
    let mut tokens = left.split('.').zip(right.split('.'));
    let differing = tokens.find_map(|(l, r)| match rank(l).cmp(&rank(r)) {
        Ordering::Equal => None,
        order => Some(order),
    });
    differing.unwrap_or_else(|| left.cmp(right))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn row(pattern: &str, max_bytes: Option<i64>, rate: Option<f64>) -> SettingsRow {
        SettingsRow {
            pattern: TopicPattern::parse(pattern).unwrap(),
            schema: None,
            max_bytes,
            rate_per_second: rate,
            burst: None,
            created_at: DateTime::UNIX_EPOCH,
            changed_at: DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn of_each_setting_the_most_specific_pattern_counts() {
        let rows = vec![
            row(">", Some(1), Some(1.0)),
            row("orders.>", Some(2), None),
            row("orders.*", None, Some(3.0)),
            row("*.created", Some(4), Some(4.0)),
            row("orders.created", Some(5), None),
        ];
        let rules = Rules::new(1, rows, &Rules::default());
        let declared: Vec<&str> = rules
            .declared()
            .iter()
            .map(|rule| rule.row.pattern.as_str())
            .collect();
        assert_eq!(
            declared,
            ["*.created", ">", "orders.*", "orders.>", "orders.created"]
        );
        for (topic, max_bytes, rate) in [
            ("orders.created", 5, "orders.*"),
            ("orders.paid", 2, "orders.*"),
            ("orders.paid.late", 2, ">"),
            ("users.created", 4, "*.created"),
            ("users", 1, ">"),
        ] {
            let applied = rules.of(&Topic::parse(topic).unwrap()).unwrap();
            assert_eq!(applied.max_bytes, Some(max_bytes), "{topic}");
            assert_eq!(applied.bucket.as_ref().unwrap().0.as_str(), rate, "{topic}");
        }
        assert!(Rules::default().of(&Topic::parse("a").unwrap()).is_none());
        // A change elsewhere leaves the rate where it was.
        let next = Rules::new(2, vec![row(">", Some(9), Some(1.0))], &rules);
        let topic = Topic::parse("users").unwrap();
        let bucket =
            |rules: &Rules| Arc::clone(&rules.of(&topic).unwrap().bucket.as_ref().unwrap().1);
        assert!(Arc::ptr_eq(&bucket(&rules), &bucket(&next)));
    }

    #[test]
    fn schemas_are_compiled_once_and_what_cannot_be_used_says_why() {
        let with = |pattern: &str, schema: &str| SettingsRow {
            schema: Some(schema.to_owned()),
            ..row(pattern, None, None)
        };
        // Some 4 MiB each by their own measure, and no two alike.
        let large = |number: usize| {
            format!(
                r#"{{"title": "{number}", "allOf": [{}]}}"#,
                ["{}"; 9_000].join(",")
            )
        };
        let of = |rules: &Rules, topic: &str| {
            let applied = rules.of(&Topic::parse(topic).unwrap()).unwrap();
            applied
                .schema
                .as_ref()
                .map(|(_, schema)| Arc::clone(schema))
        };
        let rows = vec![
            with("a", r#"{"type": "integer"}"#),
            with("b", r#"{"type": "integer"}"#),
            with("c", r##"{"allOf": [{"$ref": "#"}]}"##),
        ];
        let rules = Rules::new(1, rows.clone(), &Rules::default());
        assert!(Arc::ptr_eq(
            &of(&rules, "a").unwrap(),
            &of(&rules, "b").unwrap()
        ));
        assert!(of(&rules, "c").is_none());
        let faults: Vec<bool> = rules
            .declared()
            .iter()
            .map(|rule| rule.schema_fault.is_some())
            .collect();
        assert_eq!(faults, [false, false, true]);
        let next = Rules::new(2, rows, &rules);
        assert!(Arc::ptr_eq(
            &of(&rules, "a").unwrap(),
            &of(&next, "a").unwrap()
        ));

        // Together no more than they may take: the first ones by pattern stay.
        let one = Schema::compile(&large(0)).unwrap();
        let fit = SCHEMAS_MAX_BYTES / one.bytes();
        let rows = (0..fit + 2).map(|number| with(&format!("t{number:02}"), &large(number)));
        let rules = Rules::new(1, rows.collect(), &Rules::default());
        let used = rules
            .declared()
            .iter()
            .filter(|rule| rule.schema_fault.is_none())
            .count();
        assert_eq!(used, fit);
        let pattern = |text: &str| TopicPattern::parse(text).unwrap();
        let refused = rules.has_room(&pattern("more"), &one);
        // The same text again takes no room.
        assert_eq!(refused, Ok(()));
        let other = Schema::compile(&large(99)).unwrap();
        assert!(
            rules
                .has_room(&pattern("more"), &other)
                .unwrap_err()
                .contains("needs too much memory")
        );
        // In the place of one that is there it does.
        assert_eq!(rules.has_room(&pattern("t00"), &other), Ok(()));
    }
}
