//! Topic numbers and names. Numbers commit in order (see `intern_topics` in `migrations/broker`), so whoever has read the
//! topics up to a number misses none below it.

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
        if let Some(&(last, _)) = fresh.last() {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            known.last = known.last.max(last);
            known.names.extend(fresh);
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
        let mut found: Vec<TopicId> = known
            .names
            .iter()
            .filter(|(_, name)| patterns.iter().any(|pattern| pattern.matches(name)))
            .map(|(&id, _)| id)
            .collect();
        found.sort_unstable();
        found
    }
}
