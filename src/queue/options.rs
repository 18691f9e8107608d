//! How the queue engine runs.

use std::time::Duration;

/// Most queues of one process (docs/protocol.md, Parameters).
pub const QUEUES_MAX: usize = 10_000;

/// How the queue engine runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// A request whose write has no known outcome for so long is answered [`Error::OutcomeUnknown`](super::Error::OutcomeUnknown).
    pub outcome_wait: Duration,
    /// Most queues, at most [`QUEUES_MAX`].
    pub queues_max: usize,
    /// Bytes of a journal segment after which the next one is begun. Recovery reads four segments at most.
    pub journal_full_bytes: i64,
    /// A segment with anything in it is full after so long.
    pub journal_full_after: Duration,
    /// How often dead letters are looked at for those that are older.
    pub trim_every: Duration,
    /// How often it is written down how far the queues that keep up are.
    pub positions_every: Duration,
    /// How many offsets such a queue must have moved to be worth a row for its slot.
    pub position_worth: i64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            outcome_wait: Duration::from_secs(10),
            queues_max: QUEUES_MAX,
            journal_full_bytes: 16 * 1024 * 1024,
            journal_full_after: Duration::from_secs(10 * 60),
            trim_every: Duration::from_secs(60),
            positions_every: Duration::from_secs(30),
            position_worth: 10_000,
        }
    }
}
