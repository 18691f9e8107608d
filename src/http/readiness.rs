//! Why the process is not ready, if it is not. Each part says so for itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The reasons against taking traffic, by part. Cheap to clone; all clones share the reasons.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    reasons: Arc<Mutex<BTreeMap<&'static str, String>>>,
}

impl Readiness {
    /// Ready until some part says otherwise.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A part cannot take traffic, for a reason that people read.
    pub fn not_ready(&self, part: &'static str, reason: impl Into<String>) {
        self.lock().insert(part, reason.into());
    }

    /// The part can take traffic.
    pub fn ready(&self, part: &'static str) {
        self.lock().remove(part);
    }

    /// All reasons; none when ready.
    #[must_use]
    pub fn reasons(&self) -> Vec<(&'static str, String)> {
        self.lock()
            .iter()
            .map(|(part, reason)| (*part, reason.clone()))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, String>> {
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
