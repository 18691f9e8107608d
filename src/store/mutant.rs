//! Planted faults of the store that take more than a line. See [`crate::failpoint`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Connection;
use super::origin::OutboxRow;
use super::queue_state::{Rows, read_rows};
use crate::domain::id::Slot;
use crate::failpoint;

/// `seq-after-last`: of the rows that became visible only those with a higher number than all that were read before. For one
/// outbox in a process.
pub(in crate::store) fn drop_late(rows: &mut Vec<OutboxRow>) {
    static LAST: AtomicI64 = AtomicI64::new(0);
    if failpoint::is_mutant("seq-after-last") {
        let last = LAST.load(Ordering::Acquire);
        rows.retain(|row| row.seq > last);
        LAST.fetch_max(rows.last().map_or(0, |row| row.seq), Ordering::AcqRel);
    }
}

static EARLY: Mutex<Option<HashMap<i16, Rows>>> = Mutex::new(None);

/// `snapshot-before-epoch`: the state of slots as it is before their leases are taken.
pub(in crate::store) async fn read_early(connection: &mut Connection, leases: &[String]) {
    if !failpoint::is_mutant("snapshot-before-epoch") {
        return;
    }
    for lease in leases {
        let slot = lease
            .strip_prefix("slot/")
            .and_then(|slot| slot.parse().ok());
        if let Some(slot) = slot
            && let Ok(rows) = read_rows(connection, Slot(slot)).await
        {
            let mut early = EARLY.lock().unwrap_or_else(PoisonError::into_inner);
            // The first look: a lease that is not free is asked for again.
            let early = early.get_or_insert_default();
            early.entry(slot).or_insert(rows);
        }
    }
}

/// The part of the slot that [`read_early`] has read.
pub(in crate::store) fn early(slot: Slot) -> Option<Rows> {
    let mut early = EARLY.lock().unwrap_or_else(PoisonError::into_inner);
    early.as_mut()?.remove(&slot.0)
}
