//! Topic numbers and names. Numbers commit in order (see `intern_topics` in `migrations/broker`), so a reader that has read
//! the topics up to a number misses none below it.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use crate::domain::id::TopicId;
use crate::domain::name::{Topic, TopicPattern};
use crate::store::{self, Connection};

/// All topics read so far.
#[derive(Debug, Default)]
pub(super) struct Topics {
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    names: HashMap<TopicId, Topic>,
    last: TopicId,
    /// By pattern, the topics that match it, by number. Kept up with `names`, so that no scan walks over all of them.
    matches: HashMap<TopicPattern, Vec<TopicId>>,
}

/// Patterns whose topics are kept; with more, all are looked up again.
const PATTERNS_MAX: usize = 10_000;

impl Known {
    fn learn(&mut self, fresh: Vec<(TopicId, Topic)>) {
        for (id, name) in fresh {
            // Two readers can have read the same ones.
            if id <= self.last {
                continue;
            }
            self.last = id;
            for (pattern, found) in &mut self.matches {
                if pattern.matches(&name) {
                    found.push(id);
                }
            }
            self.names.insert(id, name);
        }
    }

    fn find(&self, pattern: &TopicPattern) -> Vec<TopicId> {
        let all = self.names.iter();
        let mut found: Vec<TopicId> = all
            .filter(|(_, name)| pattern.matches(name))
            .map(|(&id, _)| id)
            .collect();
        found.sort_unstable();
        found
    }

    fn matching(&self, patterns: &[TopicPattern]) -> Option<Vec<TopicId>> {
        let mut all = Vec::new();
        for pattern in patterns {
            all.extend_from_slice(self.matches.get(pattern)?);
        }
        all.sort_unstable();
        all.dedup();
        Some(all)
    }
}

impl Topics {
    /// Reads the topics that came since.
    pub(super) async fn refresh(&self, connection: &mut Connection) -> Result<(), store::Error> {
        let after = self
            .known
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .last;
        let fresh = store::stream::list_topics(connection, after).await?;
        if !fresh.is_empty() {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            known.learn(fresh);
        }
        Ok(())
    }

    pub(super) fn name(&self, id: TopicId) -> Option<Topic> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.names.get(&id).cloned()
    }

    /// The topics that match one of the patterns.
    pub(super) fn matching(&self, patterns: &[TopicPattern]) -> Vec<TopicId> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.matching(patterns) {
            return found;
        }
        drop(known);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.matches.len() + patterns.len() > PATTERNS_MAX {
            known.matches.clear();
        }
        for pattern in patterns {
            if !known.matches.contains_key(pattern) {
                let found = known.find(pattern);
                known.matches.insert(pattern.clone(), found);
            }
        }
        known.matching(patterns).unwrap_or_default()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn what_matches_is_kept_up_with_new_topics() {
        let topics = Topics::default();
        let learn = |names: &[(i32, &str)]| {
            let named = |&(id, name): &(i32, &str)| (TopicId(id), Topic::parse(name).unwrap());
            let fresh = names.iter().map(named).collect();
            topics.known.write().unwrap().learn(fresh);
        };
        let check = |patterns: &[&str], expected: &[i32]| {
            let patterns: Vec<_> = patterns
                .iter()
                .map(|text| TopicPattern::parse(text).unwrap())
                .collect();
            let expected: Vec<_> = expected.iter().map(|&id| TopicId(id)).collect();
            assert_eq!(topics.matching(&patterns), expected, "{patterns:?}");
        };
        check(&["a.>"], &[]);
        learn(&[(1, "a.b"), (2, "c"), (4, "a.c")]);
        check(&["a.>"], &[1, 4]);
        check(&["a.*", "a.b", "c"], &[1, 2, 4]);
        // Read twice, by two readers.
        learn(&[(4, "a.c"), (7, "a.d")]);
        check(&["a.>"], &[1, 4, 7]);
        check(&["a.*", "a.b", "c"], &[1, 2, 4, 7]);
    }
}
