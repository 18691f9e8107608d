//! Scheduled messages, which enter their stream later.
//!
//! An append accepts them under the head's lock, as rows beside the log (`number_scheduled` in `migrations/broker`). One
//! task, on the node that holds the lease, publishes the due ones: one call moves a stream's horizon and copies the
//! messages that it passed to the end of the log, a bounded number at a time. Each call is right on any number of nodes and
//! after any crash, since the horizon commits with the messages that it passed; the lease only saves work. A second task
//! makes leaves ahead, empties old ones and counts, so that nothing slow delays due messages. The first task sleeps until
//! the next message that it knows of is due, and looks every half second for messages that other nodes accepted.

mod desk;
mod handle;
mod metrics;
mod publisher;
mod recurring;
mod schedules;
mod upkeep;
mod wire;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use tokio::sync::Notify;

use crate::domain::id::{ScheduledId, StreamId};
use crate::domain::name::StreamName;

pub(super) use desk::Scheduling;
pub use handle::{Cancelled, Scheduled, ScheduledPage, ScheduledQuery, ScheduledStatus, Waiting};
pub(super) use metrics::register;
pub(super) use publisher::{Knows, LEASE, Publisher};
pub use recurring::Acceptance;
pub use schedules::{ScheduleDescription, ScheduleFailure, check_event};
pub(super) use upkeep::Upkeep;

use super::metrics::Metrics;

/// The common state of the appender, the desk and the duty.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// Wakes the duty: something is due before it meant to look again.
    wake: Arc<Notify>,
    /// Wakes the upkeep: a stream has its first.
    count: Arc<Notify>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The time when the duty looks again, as far as scheduled messages go; `None` while it looks.
    next: Option<DateTime<Utc>>,
    /// A schedule was declared or deleted.
    has_changed: bool,
    /// The waiting messages, as the publishing node knows them; empty on the others.
    streams: HashMap<StreamId, OfStream>,
    schedules: OfSchedules,
}

#[derive(Debug)]
struct OfStream {
    name: StreamName,
    /// How many wait: counted from time to time, and kept up with what this node does.
    count: i64,
    /// The next due time, if it is soon, as of the last look.
    next_due_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct OfSchedules {
    /// Schedules whose latest occurrence could not be published.
    failing_count: usize,
    /// The time when the next occurrence of any schedule is due.
    next_due_at: Option<DateTime<Utc>>,
}

impl Schedule {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes accepted messages.
    pub(super) fn note_accepted(&self, metrics: &Metrics, accepted: &[ScheduledId]) {
        let Some(first) = accepted.iter().map(|id| id.due_at).min() else {
            return;
        };
        metrics.scheduled_accepted.inc_by(accepted.len() as u64);
        let mut known = self.known();
        for id in accepted {
            if let Some(stream) = known.streams.get_mut(&id.stream) {
                stream.count += 1;
            }
        }
        let is_sooner = known.next.is_none_or(|next| first < next);
        drop(known);
        if is_sooner {
            self.wake.notify_one();
        }
    }

    /// Notes that a schedule was declared or deleted.
    fn note_changed(&self) {
        self.known().has_changed = true;
        self.wake.notify_one();
    }

    /// Notes that this many messages of a stream no longer wait.
    fn note_gone(&self, stream: StreamId, gone: u64) {
        if let Some(stream) = self.known().streams.get_mut(&stream) {
            stream.count = (stream.count - gone.cast_signed()).max(0);
        }
    }

    /// Another node publishes.
    fn forget(&self) {
        let mut known = self.known();
        known.streams.clear();
        known.schedules = OfSchedules::default();
    }
}
