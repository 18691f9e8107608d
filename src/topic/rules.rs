//! What applies to a topic: of each setting, that of the most specific pattern that has it.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use super::rate::Bucket;
use super::schema::{Mismatch, Schema};
use crate::domain::message::{Data, Message};
use crate::domain::name::{Topic, TopicPattern};
use crate::store::topic::SettingsRow;

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

#[derive(Debug)]
struct Rule {
    row: SettingsRow,
    schema: Option<Arc<Schema>>,
    bucket: Option<Arc<Bucket>>,
}

/// What applies to one topic.
#[derive(Debug, Default)]
pub struct Applied {
    /// The pattern and its schema.
    pub schema: Option<(TopicPattern, Arc<Schema>)>,
    /// The largest payload over HTTP, in bytes.
    pub max_bytes: Option<u64>,
    /// The pattern and its rate over HTTP.
    pub(super) bucket: Option<(TopicPattern, Arc<Bucket>)>,
}

impl Applied {
    /// Asks whether the payload is what the topic's schema says.
    ///
    /// # Errors
    /// The pattern whose schema it is, and where the payload does not match.
    pub fn check(&self, data: &Data) -> Result<(), (TopicPattern, Vec<Mismatch>)> {
        match &self.schema {
            Some((pattern, schema)) => schema
                .check(data)
                .map_err(|mismatches| (pattern.clone(), mismatches)),
            None => Ok(()),
        }
    }
}

impl Rules {
    /// Takes over what has not changed: a schema is compiled once, and a rate goes on where it was.
    pub(super) fn new(version: i64, rows: Vec<SettingsRow>, before: &Self) -> Self {
        let mut rules: Vec<Rule> = rows.into_iter().map(|row| Rule::new(row, before)).collect();
        rules.sort_by(|left, right| specificity(&left.row.pattern, &right.row.pattern));
        Self {
            version,
            rules,
            applied: RwLock::default(),
        }
    }

    /// What applies to a topic; none when nothing is declared at all.
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

    /// Why a message of the broker's own may not go to its topic, by its size or its schema, as one clause. `most` bounds every topic.
    #[must_use]
    pub fn refusal_within(&self, message: &Message, most: usize) -> Option<String> {
        let applied = self.of(&message.topic);
        let own = applied.and_then(|applied| applied.max_bytes);
        let own = own.and_then(|own| usize::try_from(own).ok());
        let most = own.map_or(most, |own| own.min(most));
        let size = message.data.bytes().len();
        if size > most {
            return Some(format!(
                "the payload is {size} bytes long, at most {most} are allowed"
            ));
        }
        self.refusal(message)
    }

    /// Why a message may not go to its topic by its schema, as one clause.
    #[must_use]
    pub fn refusal(&self, message: &Message) -> Option<String> {
        let (pattern, mismatches) = self.of(&message.topic)?.check(&message.data).err()?;
        let first = mismatches.first()?;
        let place = match first.pointer.as_str() {
            "" => String::new(),
            pointer => format!(" at {pointer}"),
        };
        Some(format!(
            "the payload does not match the schema of `{pattern}`{place}: {}",
            first.detail
        ))
    }
}

impl Rule {
    fn new(row: SettingsRow, before: &Rules) -> Self {
        let same = before
            .rules
            .iter()
            .find(|rule| rule.row.pattern == row.pattern);
        let schema = row.schema.as_deref().and_then(|text| {
            let known = same.and_then(|rule| rule.schema.as_ref());
            if let Some(known) = known.filter(|known| known.text() == text) {
                return Some(Arc::clone(known));
            }
            match Schema::compile(text) {
                Ok(schema) => Some(Arc::new(schema)),
                Err(reason) => {
                    // It was compiled when it was declared: by another version of this program.
                    tracing::error!(pattern = %row.pattern, reason, "a declared schema cannot be used: nothing is asked of these topics");
                    None
                }
            }
        });
        let bucket = row.rate_per_second.map(|rate| {
            let burst = burst(&row, rate);
            let known = same.and_then(|rule| rule.bucket.as_ref());
            match known.filter(|known| known.is(rate, burst)) {
                Some(known) => Arc::clone(known),
                None => Arc::new(Bucket::new(rate, burst, Instant::now())),
            }
        });
        Self {
            row,
            schema,
            bucket,
        }
    }
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
}
