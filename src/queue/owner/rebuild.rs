//! Turns the stored state back into machines. The lease was taken before, in a separate transaction, and its row is locked
//! at that epoch before the read. So nobody else can write behind the read, and it waits for a group of this epoch that is
//! still under way on a lost connection. A standby, where no row can be locked, is not trusted.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot, StreamId};
use crate::domain::queue::{ChunkId, Decode, Queue, Random, Record, decode};
use crate::failpoint;
use crate::store::mark::Place;
use crate::store::queue::QueueRow;
use crate::store::queue_state::{PartKind, StatePart};
use crate::store::redrive::RedriveRow;
use crate::store::{self, Database};

/// Reasons why a slot could not be recovered.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the database could not be used")]
    Store(#[from] store::Error),
    #[error("the slot was taken over")]
    Fenced,
    #[error("the state of queue {queue} cannot be read")]
    Decode {
        queue: QueueId,
        #[source]
        source: Decode,
    },
}

/// A queue as it was.
pub(super) struct Recovered {
    pub(super) machine: Queue,
    /// Whether the journal holds rows that no checkpoint does.
    pub(super) unfolded: bool,
    /// The redrives that run.
    pub(super) redrives: Vec<RedriveRow>,
    /// The end of the log, if that lacks what the queue knows.
    pub(super) log_end: Option<Offset>,
    /// Somebody has locked the log, so that nobody knows whether it has what the queue knows.
    pub(super) is_log_locked: bool,
}

impl Recovered {
    /// A queue that has nothing to recover.
    pub(super) fn new(machine: Queue) -> Self {
        Self {
            machine,
            unfolded: false,
            redrives: Vec::new(),
            log_end: None,
            is_log_locked: false,
        }
    }
}

/// The queues of these rows, all of a slot or one of it, as they were. The stored state is taken in as it is read.
pub(super) async fn recover(
    database: &Database,
    fence: &Fence,
    slot: Slot,
    rows: &[QueueRow],
    one: Option<QueueId>,
) -> Result<Vec<Recovered>, Error> {
    failpoint::reach("recovery.before_read");
    let rebuilds = rows.iter().map(|row| (row.id, Rebuild::new(row)));
    let mut rebuilds: HashMap<QueueId, Rebuild<'_>> = rebuilds.collect();
    let mut failed = None;
    let mut take = |part: StatePart| {
        if failed.is_none()
            && let Some(rebuild) = rebuilds.get_mut(&part.queue)
            && let Err(source) = rebuild.take(&part)
        {
            failed = Some((part.queue, source));
        }
    };
    let read = store::queue_state::find_queue_state(database, fence, slot, one, &mut take);
    let positions = read.await?.ok_or(Error::Fenced)?;
    failpoint::reach("recovery.after_read");
    if let Some((queue, source)) = failed {
        return Err(Error::Decode { queue, source });
    }
    let positions = positions.into_iter();
    let positions: HashMap<(QueueId, Generation), Offset> = positions
        .map(|position| ((position.queue, position.generation), position.through))
        .collect();
    // After the state, under whose lock every group is decided.
    let mut redrives: HashMap<QueueId, Vec<RedriveRow>> = HashMap::new();
    for (queue, redrive) in store::redrive::find_running(database, slot).await? {
        redrives.entry(queue).or_default().push(redrive);
    }
    let mut machines = Vec::with_capacity(rows.len());
    for row in rows {
        let Some(rebuild) = rebuilds.remove(&row.id) else {
            continue;
        };
        let unfolded = rebuild.has_journal;
        let rebuilt = rebuild.finish();
        let mut machine = rebuilt.map_err(|source| Error::Decode {
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
            unfolded,
            redrives: redrives.remove(&row.id).unwrap_or_default(),
            log_end: None,
            is_log_locked: false,
        });
    }
    compare_with_logs(database, rows, &mut machines).await?;
    Ok(machines)
}

/// Looks whether the logs have what the queues know.
async fn compare_with_logs(
    database: &Database,
    rows: &[QueueRow],
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
    let (behind, locked) = find_logs_behind(database, &places).await?;
    for recovered in machines.iter_mut() {
        let id = recovered.machine.id();
        let found = behind.iter().find(|(queue, _)| *queue == id);
        recovered.log_end = found.map(|&(_, end)| end);
        recovered.is_log_locked = locked.contains(&id);
    }
    Ok(())
}

/// Finds the queues whose logs are behind them, and those whose logs are locked. Queues of other streams do not wait for a locked log.
async fn find_logs_behind(
    database: &Database,
    places: &[Place],
) -> Result<(Vec<(QueueId, Offset)>, HashSet<QueueId>), store::Error> {
    match store::mark::find_logs_behind(database, places).await {
        Err(error) if error.is_held() => {}
        behind => return behind.map(|behind| (behind, HashSet::new())),
    }
    let mut streams: BTreeMap<StreamId, Vec<Place>> = BTreeMap::new();
    for place in places {
        streams.entry(place.stream).or_default().push(*place);
    }
    let (mut behind, mut locked) = (Vec::new(), HashSet::new());
    for (stream, places) in streams {
        match store::mark::find_logs_behind(database, &places).await {
            Ok(found) => behind.extend(found),
            Err(error) if error.is_held() => {
                tracing::warn!(%stream, "another session has locked a leaf of the stream's log: its queues are looked at again later");
                locked.extend(places.iter().map(|place| place.queue));
            }
            Err(error) => return Err(error),
        }
    }
    Ok((behind, locked))
}

/// A queue that is put together from its parts, as they come.
struct Rebuild<'a> {
    row: &'a QueueRow,
    machine: Option<Queue>,
    /// Chunks that the checkpoint names and that have not come.
    missing: HashSet<ChunkId>,
    has_journal: bool,
}

impl<'a> Rebuild<'a> {
    fn new(row: &'a QueueRow) -> Self {
        Self {
            row,
            machine: None,
            missing: HashSet::new(),
            has_journal: false,
        }
    }

    fn take(&mut self, part: &StatePart) -> Result<(), Decode> {
        match part.kind {
            PartKind::Checkpoint => self.begin(&part.data),
            PartKind::Chunk(id) => match (self.missing.remove(&id), &mut self.machine) {
                (true, Some(machine)) => machine.take_chunk(&part.data),
                // Of a checkpoint that never came to its head.
                _ => Ok(()),
            },
            PartKind::Journal => {
                self.has_journal = true;
                let records = decode(&part.data)?;
                let row = self.row;
                let machine = self.machine.get_or_insert_with(|| unseen(row));
                for record in records.into_iter().filter_map(planted) {
                    machine.apply(&record);
                }
                Ok(())
            }
        }
    }

    fn begin(&mut self, data: &[u8]) -> Result<(), Decode> {
        let QueueRow {
            id,
            generation,
            start_offset,
            settings,
            ..
        } = self.row;
        let (id, generation, start) = (*id, *generation, *start_offset);
        let begun = Queue::from_carried(data, id, generation, start, settings.clone(), random())?;
        let machine = match begun {
            Some(begun) => begun,
            None => {
                let read =
                    Queue::from_checkpoint(data, id, generation, settings.clone(), random())?;
                self.missing = read.1.into_iter().collect();
                read.0
            }
        };
        self.machine = Some(machine);
        Ok(())
    }

    fn finish(self) -> Result<Queue, Decode> {
        if !self.missing.is_empty() {
            return Err(Decode {
                what: "a checkpoint without all of its chunks",
            });
        }
        let mut machine = self.machine.unwrap_or_else(|| unseen(self.row));
        machine.set_former(self.row.former.clone());
        // Of what is unsettled the journal does not know what order goes by.
        machine.arrange();
        Ok(machine)
    }
}

fn random() -> Random {
    Random::new(uuid::Uuid::new_v4().as_u64_pair().0)
}

/// A queue of which nothing is stored.
fn unseen(row: &QueueRow) -> Queue {
    let settings = row.settings.clone();
    Queue::new(row.id, row.generation, row.start_offset, settings, random())
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
