//! The queues' decisions: their journal, checkpoints and positions. Called from tasks that are never aborted.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::bounded::{HEARTBEAT, STATEMENT, bounded};
use super::call::Function;
use super::queue::to_json;
use super::redrive::RedriveStep;
use super::{Connection, Database, Error};
use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot};
use crate::domain::name::Topic;
use crate::domain::queue::{Chunk, ChunkId, Letter};
use crate::failpoint;

const WRITING: &str = "writing the journal of queues";

static WRITE_POSITIONS: Function = Function::new("write_queue_positions", "*");
static WRITE_JOURNAL: Function = Function::new("write_queue_journal", "*");
static WRITE_GROUP: Function = Function::new("write_queue_group", "current_turn, fenced");

/// Up to where a queue that keeps up has settled all that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The queue.
    pub queue: QueueId,
    /// In which generation.
    pub generation: Generation,
    /// The offset.
    pub through: Offset,
}

/// The positions of a slot's queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPositions {
    /// The slot.
    pub slot: Slot,
    /// Its lease, at the writer's epoch.
    pub fence: Fence,
    /// The position of each queue that ever kept up.
    pub positions: Vec<Position>,
}

/// Writes the rows of slots, those that are still held; they take the place of the former ones. One statement for all.
///
/// # Errors
/// The database's.
pub async fn write_positions(
    database: &Database,
    incarnation: i64,
    slots: &[SlotPositions],
) -> Result<(), Error> {
    let all = || {
        let slots = slots.iter();
        slots.flat_map(|slot| slot.positions.iter().map(move |position| (slot, position)))
    };
    let call = WRITE_POSITIONS
        .call()
        .with("holder_incarnation", incarnation)
        .with("slots", collect(slots.iter(), |slot| slot.slot.0))
        .with(
            "slot_leases",
            collect(slots.iter(), |slot| slot.fence.lease.clone()),
        )
        .with(
            "slot_epochs",
            collect(slots.iter(), |slot| slot.fence.epoch.0),
        )
        .with("position_slots", collect(all(), |(slot, _)| slot.slot.0))
        .with(
            "position_queues",
            collect(all(), |(_, position)| position.queue.0),
        )
        .with(
            "position_generations",
            collect(all(), |(_, position)| position.generation.0),
        )
        .with(
            "position_throughs",
            collect(all(), |(_, position)| position.through.0),
        );
    let writing = async { call.query()?.execute(database.pooled()).await };
    let failed = Error::query("writing the positions of queues");
    writing.await.map_err(failed)?;
    Ok(())
}

/// One group commit: per slot its lease, epoch and number, and what its queues wrote.
#[derive(Debug, Clone, Default)]
pub struct Group {
    /// The slots, each once.
    pub slots: Vec<GroupSlot>,
    /// The writes of the queues, each queue once.
    pub parts: Vec<GroupPart>,
}

/// A slot of a group.
#[derive(Debug, Clone)]
pub struct GroupSlot {
    /// The slot.
    pub slot: Slot,
    /// Its lease, at the writer's epoch.
    pub fence: Fence,
    /// The group's number under that epoch.
    pub number: i64,
}

/// A checkpoint's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointHead {
    /// Its content.
    pub state: Vec<u8>,
    /// The chunks that it is made of, stored by then.
    pub chunks: Vec<ChunkId>,
    /// The number of the group under this epoch that it is as of; the group's own without.
    pub as_of: Option<i64>,
}

/// The writes of one queue.
#[derive(Debug, Clone)]
pub struct GroupPart {
    /// The queue's slot.
    pub slot: Slot,
    /// The queue.
    pub queue: QueueId,
    /// Its generation.
    pub generation: Generation,
    /// The encoded records; empty for none.
    pub records: Vec<u8>,
    /// The state after these records or an earlier group's, if it is time for one.
    pub checkpoint: Option<CheckpointHead>,
    /// Chunks of a checkpoint whose head comes later.
    pub chunks: Vec<Chunk>,
    /// Messages that died.
    pub letters: Vec<Letter>,
    /// The topic of their copies.
    pub forward: Option<Topic>,
    /// Dead letters to be removed.
    pub removed_letters: Vec<Offset>,
    /// The steps of redrives, each redrive at most once.
    pub redrives: Vec<RedriveStep>,
}

impl GroupPart {
    /// One that writes nothing.
    #[must_use]
    pub fn new(slot: Slot, queue: QueueId, generation: Generation) -> Self {
        Self {
            slot,
            queue,
            generation,
            records: Vec::new(),
            checkpoint: None,
            chunks: Vec::new(),
            letters: Vec::new(),
            forward: None,
            removed_letters: Vec::new(),
            redrives: Vec::new(),
        }
    }

    /// Whether it is of a checkpoint that is written beside the queue's decisions.
    #[must_use]
    pub fn is_fold(&self) -> bool {
        let head = self.checkpoint.as_ref();
        !self.chunks.is_empty() || head.is_some_and(|head| head.as_of.is_some())
    }

    /// About how many bytes it takes in a call.
    #[must_use]
    pub fn size(&self) -> usize {
        let reasons = self.letters.iter().flat_map(|letter| &letter.failures);
        let letters: usize = reasons.map(|failure| failure.reason.len() + 64).sum();
        let redrives = self.redrives.iter().map(|step| step.offsets.len() * 12);
        self.records.len()
            + self
                .checkpoint
                .as_ref()
                .map_or(0, |head| head.state.len() + 16 * head.chunks.len())
            + self
                .chunks
                .iter()
                .map(|chunk| chunk.data.len())
                .sum::<usize>()
            + letters
            + redrives.sum::<usize>()
    }

    /// Whether it is a journal row and nothing else.
    fn is_plain(&self) -> bool {
        !self.records.is_empty()
            && self.checkpoint.is_none()
            && self.chunks.is_empty()
            && self.letters.is_empty()
            && self.removed_letters.is_empty()
            && self.redrives.is_empty()
    }
}

/// The outcome of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupWritten {
    /// The turn of the journal that it was written in.
    pub turn: i64,
    /// Slots that were taken over: nothing of theirs is written.
    pub fenced: Vec<Slot>,
    /// The slots among these for which an earlier try may have been written.
    pub unknown: Vec<Slot>,
}

/// Writes a group that has nothing but journal rows, of one slot, in a call that is cheaper than [`write_group`]. Only for the
/// first try: a repetition goes by [`write_group`]. None when it is another kind of group, or the journal is in another turn than
/// `turn`: nothing is done then.
///
/// # Errors
/// The database's. After a lost connection the outcome is unknown.
pub async fn write_journal(
    connection: &mut Connection,
    incarnation: i64,
    turn: i64,
    group: &Group,
) -> Result<Option<GroupWritten>, Error> {
    let [slot] = group.slots.as_slice() else {
        return Ok(None);
    };
    if !group.parts.iter().all(GroupPart::is_plain) {
        return Ok(None);
    }
    let parts = || group.parts.iter();
    let call = WRITE_JOURNAL
        .call()
        .with("of_lease", &slot.fence.lease)
        .with("of_epoch", slot.fence.epoch.0)
        .with("of_holder", incarnation)
        .with("known_turn", turn)
        .with("of_slot", slot.slot.0)
        .with("new_number", slot.number)
        .with("new_queues", collect(parts(), |part| part.queue.0))
        .with(
            "new_generations",
            collect(parts(), |part| part.generation.0),
        )
        .with(
            "new_entries",
            collect(parts(), |part| part.records.as_slice()),
        );
    let writing = async { call.query_scalar()?.fetch_one(connection).await };
    let status: String = bounded(WRITING, STATEMENT, writing).await?;
    let fenced = match status.as_str() {
        "turned" => return Ok(None),
        "fenced" => vec![slot.slot],
        "written" => Vec::new(),
        _ => return Err(Error::unknown_status(WRITING, &status)),
    };
    Ok(Some(GroupWritten {
        turn,
        fenced,
        unknown: Vec::new(),
    }))
}

/// Writes a group in one autocommit call. Idempotent by (slot, epoch, number): when the connection was lost, writing
/// the very same group again finds out what became of it, or does it.
///
/// # Errors
/// The database's. After a lost connection the outcome is unknown.
pub async fn write_group(
    connection: &mut Connection,
    incarnation: i64,
    group: &Group,
) -> Result<GroupWritten, Error> {
    let slots = &group.slots;
    let journal = || group.parts.iter().filter(|part| !part.records.is_empty());
    let folded = || {
        let parts = group.parts.iter();
        parts.filter_map(|part| Some((part, part.checkpoint.as_ref()?)))
    };
    let named = || folded().flat_map(|(part, head)| head.chunks.iter().map(move |id| (part, id)));
    let chunks = || {
        let parts = group.parts.iter();
        parts.flat_map(|part| part.chunks.iter().map(move |chunk| (part, chunk)))
    };
    let letters = || {
        group
            .parts
            .iter()
            .flat_map(|part| part.letters.iter().map(move |l| (part, l)))
    };
    let removed = || {
        let parts = group.parts.iter();
        parts.flat_map(|part| {
            part.removed_letters
                .iter()
                .map(move |offset| (part, offset))
        })
    };
    let redrives = || {
        let parts = group.parts.iter();
        parts.flat_map(|part| part.redrives.iter().map(move |step| (part, step)))
    };
    let call = WRITE_GROUP
        .call()
        .with("holder_incarnation", incarnation)
        .with("slots", collect(slots.iter(), |slot| slot.slot.0))
        .with(
            "slot_leases",
            collect(slots.iter(), |slot| slot.fence.lease.clone()),
        )
        .with(
            "slot_epochs",
            collect(slots.iter(), |slot| slot.fence.epoch.0),
        )
        .with("slot_numbers", collect(slots.iter(), |slot| slot.number))
        .with("journal_slots", collect(journal(), |part| part.slot.0))
        .with("journal_queues", collect(journal(), |part| part.queue.0))
        .with(
            "journal_generations",
            collect(journal(), |part| part.generation.0),
        )
        .with(
            "journal_entries",
            collect(journal(), |part| part.records.as_slice()),
        )
        .with(
            "checkpoint_slots",
            collect(folded(), |(part, _)| part.slot.0),
        )
        .with(
            "checkpoint_queues",
            collect(folded(), |(part, _)| part.queue.0),
        )
        .with(
            "checkpoint_generations",
            collect(folded(), |(part, _)| part.generation.0),
        )
        .with(
            "checkpoint_states",
            collect(folded(), |(_, head)| head.state.as_slice()),
        )
        .with("letter_slots", collect(letters(), |(part, _)| part.slot.0))
        .with(
            "letter_queues",
            collect(letters(), |(part, _)| part.queue.0),
        )
        .with(
            "letter_generations",
            collect(letters(), |(part, _)| part.generation.0),
        )
        .with(
            "letter_offsets",
            collect(letters(), |(_, letter)| letter.offset.0),
        )
        .with(
            "letter_deliveries",
            collect(letters(), |(_, letter)| {
                i32::try_from(letter.delivery).unwrap_or(i32::MAX)
            }),
        )
        .with(
            "letter_attempts",
            collect(letters(), |(_, letter)| {
                i32::try_from(letter.attempts).unwrap_or(i32::MAX)
            }),
        )
        .with(
            "letter_causes",
            collect(letters(), |(_, letter)| letter.cause),
        )
        .with(
            "letter_failures",
            collect(letters(), |(_, letter)| failures(letter)),
        )
        .with(
            "letter_died_at",
            collect(letters(), |(_, letter)| {
                DateTime::<Utc>::from(letter.died_at)
            }),
        )
        .with(
            "letter_forwards",
            collect(letters(), |(part, _)| {
                part.forward.as_ref().map(Topic::as_str)
            }),
        )
        .with("removed_slots", collect(removed(), |(part, _)| part.slot.0))
        .with(
            "removed_queues",
            collect(removed(), |(part, _)| part.queue.0),
        )
        .with(
            "removed_offsets",
            collect(removed(), |(_, offset)| offset.0),
        )
        .with(
            "redrive_slots",
            collect(redrives(), |(part, _)| part.slot.0),
        )
        .with(
            "redrive_queues",
            collect(redrives(), |(part, _)| part.queue.0),
        )
        .with(
            "redrive_steps",
            collect(redrives(), |(_, step)| to_json(step)),
        )
        .with(
            "checkpoint_numbers",
            collect(folded(), |(_, head)| head.as_of),
        )
        .with("named_slots", collect(named(), |(part, _)| part.slot.0))
        .with("named_queues", collect(named(), |(part, _)| part.queue.0))
        .with(
            "named_chunks",
            collect(named(), |(_, id)| Uuid::from_bytes(*id)),
        )
        .with("chunk_slots", collect(chunks(), |(part, _)| part.slot.0))
        .with("chunk_queues", collect(chunks(), |(part, _)| part.queue.0))
        .with(
            "chunk_ids",
            collect(chunks(), |(_, chunk)| Uuid::from_bytes(chunk.id)),
        )
        .with(
            "chunk_data",
            collect(chunks(), |(_, chunk)| chunk.data.as_slice()),
        );
    let writing = async { call.query_as()?.fetch_one(connection).await };
    let (turn, fenced): (i64, Vec<i16>) = bounded(WRITING, STATEMENT, writing).await?;
    Ok(GroupWritten {
        turn,
        fenced: fenced.into_iter().map(Slot).collect(),
        unknown: Vec::new(),
    })
}

fn collect<I: Iterator, T>(items: I, part: impl FnMut(I::Item) -> T) -> Vec<T> {
    items.map(part).collect()
}

fn failures(letter: &Letter) -> String {
    let failures: Vec<serde_json::Value> = letter
        .failures
        .iter()
        .map(|failure| {
            let at = DateTime::<Utc>::from(failure.at).to_rfc3339();
            serde_json::json!({ "at": at, "reason": failure.reason })
        })
        .collect();
    serde_json::Value::Array(failures).to_string()
}

/// The fate of a group whose slot was taken over since it was first sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupFate {
    /// It is in the journal.
    Written,
    /// It was not written, and no longer can be.
    NotWritten,
    /// The new owner has written checkpoints since, and the journal may have been emptied.
    Unknown,
}

/// Finds out what became of a group of a slot that was taken over since it was first sent.
///
/// # Errors
/// The database's.
pub async fn find_group(
    connection: &mut Connection,
    group: &GroupSlot,
) -> Result<GroupFate, Error> {
    let (is_written, is_folded): (bool, bool) = bounded(
        "looking for a group of the journal",
        STATEMENT,
        sqlx::query_as(
            "select exists (select from postroad_broker.queue_journal j \
                where j.slot = $1 and j.epoch = $2 and j.number = $3), \
             exists (select from postroad_broker.queue_checkpoint c \
                join postroad_broker.queue q on q.id = c.queue_id where q.slot = $1 and c.epoch > $2)",
        )
        .bind(group.slot.0)
        .bind(group.fence.epoch.0)
        .bind(group.number)
        .fetch_one(connection),
    )
    .await?;
    Ok(match (is_written, is_folded) {
        (true, _) => GroupFate::Written,
        (false, false) => GroupFate::NotWritten,
        (false, true) => GroupFate::Unknown,
    })
}

/// Asks the server for a sign of life.
///
/// # Errors
/// The database's.
pub async fn probe(connection: &mut Connection) -> Result<(), Error> {
    bounded(
        "asking for a sign of life",
        HEARTBEAT,
        sqlx::query("select 1").execute(connection),
    )
    .await?;
    Ok(())
}

/// Turns the journal to its next segment if the current one is full, and truncates segments that every checkpoint is
/// past. Returns the turn, and how many former segments still have rows.
///
/// # Errors
/// The database's.
pub async fn turn_journal(
    database: &Database,
    full_bytes: i64,
    full_after_seconds: f64,
) -> Result<(i64, i32), Error> {
    const DOING: &str = "turning the journal of queues";
    failpoint::reach("journal.before_truncate");
    let left: i32 = sqlx::query_scalar("select postroad_broker.truncate_queue_journal()")
        .fetch_one(database.pooled())
        .await
        .map_err(Error::query(DOING))?;
    failpoint::reach("journal.before_turn");
    let turn: i64 = sqlx::query_scalar(
        "select postroad_broker.turn_queue_journal($1, make_interval(secs => $2))",
    )
    .bind(full_bytes)
    .bind(full_after_seconds)
    .fetch_one(database.pooled())
    .await
    .map_err(Error::query(DOING))?;
    Ok((turn, left))
}
