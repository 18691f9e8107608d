//! From the stored state back to machines. The lease was taken before, in a transaction of its own, and its row is locked
//! at that epoch before the read: nobody else can write behind it, and a group of this epoch that is still under way on a
//! lost connection is waited for. A standby, where no row can be locked, is not believed.

use std::collections::HashMap;

use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot};
use crate::domain::queue::{Queue, Random, Record, decode};
use crate::failpoint;
use crate::store::journal::StatePart;
use crate::store::mark::Place;
use crate::store::queue::QueueRow;
use crate::store::redrive::RedriveRow;
use crate::store::{self, Database};

/// Why a slot could not be recovered.
#[derive(Debug, thiserror::Error)]
pub(in crate::queue) enum Error {
    #[error("the database could not be used")]
    Store(#[from] store::Error),
    #[error("the slot was taken over")]
    Fenced,
    #[error("the state of queue {queue} cannot be read")]
    Decode {
        queue: QueueId,
        #[source]
        source: crate::domain::queue::Decode,
    },
}

/// A queue as it was.
pub(in crate::queue) struct Recovered {
    pub(in crate::queue) machine: Queue,
    /// Whether the journal holds rows that no checkpoint does.
    pub(in crate::queue) unfolded: bool,
    /// The redrives that run.
    pub(in crate::queue) redrives: Vec<RedriveRow>,
    /// The end of the log, if that lacks what the queue knows.
    pub(in crate::queue) log_end: Option<Offset>,
}

impl Recovered {
    /// A queue that has nothing to recover.
    pub(in crate::queue) fn new(machine: Queue) -> Self {
        Self {
            machine,
            unfolded: false,
            redrives: Vec::new(),
            log_end: None,
        }
    }
}

/// The slot's queues as they were.
pub(in crate::queue) async fn recover(
    database: &Database,
    fence: &Fence,
    slot: Slot,
    rows: &[&QueueRow],
) -> Result<Vec<Recovered>, Error> {
    failpoint::reach("recovery.before_read");
    let state = store::journal::find_queue_state(database, fence, slot).await?;
    failpoint::reach("recovery.after_read");
    let state = state.ok_or(Error::Fenced)?;
    let positions = state.positions.into_iter();
    let positions: HashMap<(QueueId, Generation), Offset> = positions
        .map(|position| ((position.queue, position.generation), position.through))
        .collect();
    let mut by_queue: HashMap<QueueId, Vec<StatePart>> = HashMap::new();
    for part in state.parts {
        by_queue.entry(part.queue).or_default().push(part);
    }
    // After the state, under whose lock every group is decided.
    let mut redrives: HashMap<QueueId, Vec<RedriveRow>> = HashMap::new();
    for (queue, redrive) in store::redrive::find_running(database, slot).await? {
        redrives.entry(queue).or_default().push(redrive);
    }
    let mut machines = Vec::with_capacity(rows.len());
    for row in rows {
        let parts = by_queue.remove(&row.id).unwrap_or_default();
        let mut machine = rebuild(row, &parts).map_err(|source| Error::Decode {
            queue: row.id,
            source,
        })?;
        if let Some(&through) = positions.get(&(row.id, row.generation)) {
            // With nothing unsettled at that moment: all that is known of later ones is in the journal.
            machine.apply(&Record::Scanned {
                through: through.0,
                matched: Default::default(),
            });
        }
        machines.push(Recovered {
            machine,
            unfolded: parts.iter().any(|part| part.is_journal),
            redrives: redrives.remove(&row.id).unwrap_or_default(),
            log_end: None,
        });
    }
    compare_with_logs(database, rows, &mut machines).await?;
    Ok(machines)
}

/// Looks whether the logs have what the queues know.
async fn compare_with_logs(
    database: &Database,
    rows: &[&QueueRow],
    machines: &mut [Recovered],
) -> Result<(), store::Error> {
    let mut places = Vec::with_capacity(machines.len());
    for (row, recovered) in rows.iter().zip(machines.iter()) {
        let through = recovered.machine.journaled_through();
        // One that was declared to start behind the end has looked at nothing yet.
        if through >= row.start_offset {
            places.push(Place {
                queue: row.id,
                stream: row.stream_id,
                generation: row.generation,
                through,
            });
        }
    }
    let behind = store::mark::find_logs_behind(database, &places).await?;
    for (queue, end) in behind {
        let mut machines = machines.iter_mut();
        if let Some(recovered) = machines.find(|recovered| recovered.machine.id() == queue) {
            recovered.log_end = Some(end);
        }
    }
    Ok(())
}

fn rebuild(row: &QueueRow, parts: &[StatePart]) -> Result<Queue, crate::domain::queue::Decode> {
    let random = Random::new(uuid::Uuid::new_v4().as_u64_pair().0);
    let (id, generation, settings) = (row.id, row.generation, row.settings.clone());
    let mut parts = parts.iter().peekable();
    let mut queue = match parts.next_if(|part| !part.is_journal) {
        Some(part) => {
            let (start, data) = (row.start_offset, &part.data);
            let begun = Queue::from_carried(
                data,
                id,
                generation,
                start,
                settings.clone(),
                random.clone(),
            )?;
            match begun {
                Some(begun) => begun,
                None => Queue::from_checkpoint(data, id, generation, settings, random)?,
            }
        }
        None => Queue::new(id, generation, row.start_offset, settings, random),
    };
    queue.set_former(row.former.clone());
    for part in parts {
        for record in decode(&part.data)? {
            if let Some(record) = planted(record) {
                queue.apply(&record);
            }
        }
    }
    // Of what is unsettled the journal does not know what order goes by.
    queue.arrange();
    Ok(queue)
}

/// The record, but for two planted faults.
fn planted(mut record: Record) -> Option<Record> {
    if let Record::Delivered { first, .. } = &mut record {
        if failpoint::is_mutant("in-flight-forgotten") {
            return None;
        }
        if failpoint::is_mutant("delivered-high-water")
            && let (Some(&(from, _)), Some(&(_, through))) = (first.first(), first.last())
        {
            *first = vec![(from, through)];
        }
    }
    Some(record)
}
