//! A relay's report about itself: the API, the metrics and the tests read the same value.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::domain::id::OriginId;
use crate::domain::mapping::Pickup;
use crate::domain::name::OriginName;
use crate::domain::word::words;

words! {
    /// The states of a relay.
    pub enum State {
        /// Another node relays this origin, or this one is about to.
        Waiting = "waiting",
        /// Finding its origin.
        Connecting = "connecting",
        /// Moving what producers commit.
        Running = "running",
        /// The origin went back in time (or is new): all that its outbox holds is read again, and what streams have is dropped.
        Rerelaying = "re-relaying",
        /// The URL points at a standby. It is asked again until it is promoted.
        Standby = "standby",
        /// The origin does not answer. It is tried again.
        Unreachable = "unreachable",
        /// The origin has no outbox: somebody must run `postroad install` there. The relay keeps asking.
        NotInstalled = "not_installed",
        /// The origin refuses what a relay needs (rights, a wrong password), or a mapped table is not as its mapping says. It is
        /// asked again.
        Refused = "refused",
        /// The streams do not take some row of the outbox, for what it holds. Fewer rows at a time are tried until it is found and listed
        /// as rejected; then it goes on.
        RowsRefused = "rows_refused",
        /// The broker's own database is away, or refuses what the broker does. It is tried again.
        BrokerUnavailable = "broker_unavailable",
        /// The process is ending.
        Stopped = "stopped",
    }
}

/// A leaf of an outbox that could not be emptied since somebody holds a lock on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    /// The leaf, `postroad.outbox_3`.
    pub leaf: String,
    /// The session that holds it; none is a prepared transaction.
    pub pid: Option<i32>,
    /// The time since when, by the database's clock.
    pub since: DateTime<Utc>,
}

/// The table that is read in place of the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapped {
    /// Its name, as configured.
    pub table: String,
    /// How its rows are picked up.
    pub pickup: Pickup,
}

/// An origin as its relay sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// Its name.
    pub name: OriginName,
    /// Its number.
    pub id: OriginId,
    /// Host, port and database; never a user or a password.
    pub place: String,
    /// The table in place of the outbox; none where the outbox is Postroad's own.
    pub mapped: Option<Mapped>,
    /// The relay's state.
    pub state: State,
    /// The reason, if something is wrong.
    pub detail: Option<String>,
    /// The time since when it is in this state.
    pub state_since: DateTime<Utc>,
    /// The number of the position stored last; rises with each append.
    pub position: i64,
    /// Everything committed in the origin before then is in the streams; none until that is known.
    pub relayed_through: Option<DateTime<Utc>>,
    /// Rows known to be committed and not yet relayed.
    pub lag_rows: u64,
    /// Messages relayed by this process.
    pub relayed_count: u64,
    /// Rows that could not become messages and have not been sent on.
    pub rejected_count: u64,
    /// Times that this process read all of the outbox again.
    pub rerelay_count: u64,
    /// Times that rows were found emptied that the broker's database, restored from a backup, can lack: ever, by whatever process.
    /// None until the stored position is read, which says so.
    pub gap_count: Option<u64>,
    /// The time of the last one.
    pub gap_at: Option<DateTime<Utc>>,
    /// Windows opened by this process.
    pub step_count: u64,
    /// How long the last window took to open.
    pub step_time: Duration,
    /// Leaves emptied by this process.
    pub emptied_count: u64,
    /// A leaf that cannot be emptied, the one blocked longest.
    pub blocked: Option<Blocked>,
}

impl Status {
    pub(super) fn new(name: OriginName, id: OriginId, place: String, now: DateTime<Utc>) -> Self {
        Self {
            name,
            id,
            place,
            mapped: None,
            state: State::Waiting,
            detail: None,
            state_since: now,
            position: 0,
            relayed_through: None,
            lag_rows: 0,
            relayed_count: 0,
            rejected_count: 0,
            rerelay_count: 0,
            gap_count: None,
            gap_at: None,
            step_count: 0,
            step_time: Duration::ZERO,
            emptied_count: 0,
            blocked: None,
        }
    }

    /// How long the relay has not been sure that everything is relayed: a fraction of a second while all is well. None until the
    /// first window.
    #[must_use]
    pub fn lag(&self, now: DateTime<Utc>) -> Option<Duration> {
        let through = self.relayed_through?;
        Some((now - through).to_std().unwrap_or_default())
    }
}
