//! How long a stream keeps its messages.

use std::time::Duration;

/// How long settled messages are kept unless declared otherwise (docs/protocol.md, Parameters).
pub const DEFAULT_RETENTION: Duration = Duration::from_secs(7 * 86_400);
/// How long unsettled messages are kept unless declared otherwise (docs/protocol.md, Parameters).
pub const DEFAULT_HARD_LIMIT: Duration = Duration::from_secs(14 * 86_400);

/// How long messages are kept. Space comes back a partition at a time, so a message can live somewhat longer, never shorter.
/// `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The least age at which a message goes that every queue has settled.
    pub settled: Option<Duration>,
    /// Bytes on disk beyond which the oldest messages go that every queue has settled, however young.
    pub settled_bytes: Option<u64>,
    /// The age at which a message goes whether settled or not.
    pub unsettled: Option<Duration>,
    /// Bytes on disk beyond which the oldest messages go whether settled or not.
    pub unsettled_bytes: Option<u64>,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            settled: Some(DEFAULT_RETENTION),
            settled_bytes: None,
            unsettled: Some(DEFAULT_HARD_LIMIT),
            unsettled_bytes: None,
        }
    }
}

impl Retention {
    /// The smaller limit in bytes, if there is one: partitions should be small in comparison.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        match (self.settled_bytes, self.unsettled_bytes) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        }
    }

    /// Whether messages can be dropped that no queue has settled.
    #[must_use]
    pub const fn has_hard_limit(&self) -> bool {
        self.unsettled.is_some() || self.unsettled_bytes.is_some()
    }
}
