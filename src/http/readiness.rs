//! The reasons why the process is not ready, if it is not. Each part reports its own, or is asked.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The reasons against taking traffic, by part. Cheap to clone; all clones share the reasons.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    known: Arc<Mutex<Known>>,
}

#[derive(Default)]
struct Known {
    reasons: BTreeMap<&'static str, String>,
    /// Parts that are asked.
    asked: Vec<(&'static str, Arc<Ask>)>,
}

type Ask = dyn Fn() -> Option<String> + Send + Sync;

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Known")
            .field("reasons", &self.reasons)
            .finish_non_exhaustive()
    }
}

impl Readiness {
    /// Ready until some part says otherwise.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A part cannot take traffic, for a reason that people read.
    pub fn not_ready(&self, part: &'static str, reason: impl Into<String>) {
        self.lock().reasons.insert(part, reason.into());
    }

    /// The part can take traffic.
    pub fn ready(&self, part: &'static str) {
        self.lock().reasons.remove(part);
    }

    /// The part is asked from now on why it cannot take traffic, each time that anybody wants to know.
    pub fn ask(
        &self,
        part: &'static str,
        ask: impl Fn() -> Option<String> + Send + Sync + 'static,
    ) {
        self.lock().asked.push((part, Arc::new(ask)));
    }

    /// All reasons; none when ready.
    #[must_use]
    pub fn reasons(&self) -> Vec<(&'static str, String)> {
        let (mut reasons, asked): (Vec<_>, _) = {
            let known = self.lock();
            let reasons = known.reasons.iter();
            let reasons = reasons.map(|(part, reason)| (*part, reason.clone()));
            (reasons.collect(), known.asked.clone())
        };
        reasons.extend(asked.iter().filter_map(|(part, ask)| Some((*part, ask()?))));
        reasons
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
