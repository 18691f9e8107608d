//! Keys that stand still, for the queue's description.

use std::collections::HashMap;

use super::order::Order;
use super::{At, Queue, State};
use crate::domain::id::Offset;

/// The reasons why no message of a key goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockedBy {
    /// A message of it is handed out.
    Live,
    /// Its next message is held back by a delay.
    Delayed,
    /// A dead letter of it waits for a person.
    Held,
}

/// A key with messages that wait for an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockedKey {
    /// The message that they wait for.
    pub by: Offset,
    /// In which state it is.
    pub state: BlockedBy,
    /// The attempt that is under way, or was the last; None for a dead letter.
    pub attempt: Option<u32>,
    /// The time when it is due or expires; None for a dead letter.
    pub due_at: Option<At>,
    /// The time since when, as far as known: the earliest failure that is kept, or the time when it was handed out or died.
    pub since: At,
    /// How many wait.
    pub waiting: u64,
}

impl Queue {
    /// The keys that stand still for longest, at most `count`. Looks at all that was handed out and is not settled.
    #[must_use]
    pub fn blocked_keys(&self, count: usize) -> Vec<BlockedKey> {
        let Order::Keys(keys) = &self.order else {
            return Vec::new();
        };
        let mut blocked: HashMap<i64, BlockedKey> = HashMap::new();
        for (&offset, entry) in &self.entries {
            let Some((hash, key)) = self.key_of(offset) else {
                continue;
            };
            let (state, due) = match entry.state {
                State::Live { deadline } => (BlockedBy::Live, deadline),
                State::Ended { due, .. } => (BlockedBy::Delayed, due),
            };
            let is_blocker = match state {
                BlockedBy::Live => true,
                _ => {
                    key.live == 0
                        && key.members.first() == Some(offset)
                        && !self.again.contains(&offset)
                }
            };
            let waiting = key.members.len() - u64::from(key.live.max(1));
            if !is_blocker || waiting == 0 {
                continue;
            }
            let failed = entry.failures.first().map(|failure| failure.at);
            blocked.entry(hash).or_insert(BlockedKey {
                by: Offset(offset),
                state,
                attempt: Some(entry.attempt()),
                due_at: Some(due),
                since: failed.map_or(entry.since, |failed| failed.min(entry.since)),
                waiting,
            });
        }
        if self.settings.hold_key {
            for (hash, _) in keys.held() {
                let Some(key) = keys.get(hash) else { continue };
                let held = key
                    .members
                    .first()
                    .and_then(|first| keys.holder(hash, first));
                if let Some(offset) = held
                    && let Some(dead) = self.dead.get(&offset)
                {
                    blocked.entry(hash).or_insert(BlockedKey {
                        by: Offset(offset),
                        state: BlockedBy::Held,
                        attempt: None,
                        due_at: None,
                        since: dead.at,
                        waiting: key.members.len() - u64::from(key.live),
                    });
                }
            }
        }
        let mut blocked: Vec<BlockedKey> = blocked.into_values().collect();
        blocked.sort_unstable_by_key(|blocked| (blocked.since, blocked.by));
        blocked.truncate(count);
        blocked
    }
}
