//! The state from which queues recover: checkpoints, their chunks, the journal and the positions of slots. It is read as a
//! stream, because it is more than memory should hold at a time.

use futures_util::TryStreamExt as _;
use sqlx::Connection as _;
use uuid::Uuid;

use super::cluster::lock_lease;
use super::journal::Position;
use super::{Connection, Database, Error};
use crate::domain::id::{Fence, Generation, Offset, QueueId, Slot};
use crate::domain::queue::ChunkId;
use crate::failpoint;

const READING: &str = "reading the state of queues";

/// A part of a queue's stored state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatePart {
    /// Its queue.
    pub queue: QueueId,
    /// The kind of the part.
    pub kind: PartKind,
    /// The blob.
    pub data: Vec<u8>,
}

/// A part of a queue's stored state. Of each queue they come in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartKind {
    /// The checkpoint's head, or what a generation begins with.
    Checkpoint,
    /// A chunk, which the checkpoint need not name.
    Chunk(ChunkId),
    /// A row of the journal, in order.
    Journal,
}

/// Takes in the parts one by one.
pub type TakePart<'a> = &'a mut (dyn FnMut(StatePart) + Send);

/// A row of the statement: queue, kind, chunk, blob.
type PartRow = (i64, i16, Option<Uuid>, Vec<u8>);
type PositionRow = (Vec<i64>, Vec<i64>, Vec<i64>);
/// All of a slot at once, for a planted fault.
#[cfg(feature = "failpoints")]
pub(in crate::store) type Rows = (Vec<PartRow>, Option<PositionRow>);

fn part((queue, kind, chunk, data): PartRow) -> Result<StatePart, Error> {
    let kind = match (kind, chunk) {
        (0, None) => PartKind::Checkpoint,
        (1, Some(id)) => PartKind::Chunk(id.into_bytes()),
        (2, None) => PartKind::Journal,
        (kind, _) => {
            return Err(Error::corrupt(
                READING,
                format!("a part of the kind {kind}"),
            ));
        }
    };
    Ok(StatePart {
        queue: QueueId(queue),
        kind,
        data,
    })
}

async fn read_parts(
    connection: &mut Connection,
    slot: Slot,
    one: Option<QueueId>,
    take: TakePart<'_>,
) -> Result<(), Error> {
    let mut rows = sqlx::query_as(include_str!("sql/read_queue_state.sql"))
        .bind(slot.0)
        .bind(one.map(|queue| queue.0))
        .fetch(connection);
    while let Some(row) = rows.try_next().await.map_err(Error::query(READING))? {
        take(part(row)?);
    }
    Ok(())
}

async fn read_positions(
    connection: &mut Connection,
    slot: Slot,
) -> Result<Option<PositionRow>, sqlx::Error> {
    sqlx::query_as(
        "select queue_ids, generations, throughs from postroad_broker.queue_position where slot = $1",
    )
    .bind(slot.0)
    .fetch_optional(connection)
    .await
}

#[cfg(feature = "failpoints")]
pub(in crate::store) async fn read_rows(
    connection: &mut Connection,
    slot: Slot,
) -> Result<Rows, sqlx::Error> {
    let parts = sqlx::query_as(include_str!("sql/read_queue_state.sql"))
        .bind(slot.0)
        .bind(None::<i64>)
        .fetch_all(&mut *connection)
        .await?;
    Ok((parts, read_positions(connection, slot).await?))
}

/// Reads what the queues of a slot recover from, or one of them, and gives the slot's positions. None when the
/// lease is no longer at the fence's epoch. The lease's row first, in a statement of its own: a group whose outcome is
/// unknown holds it until it is decided, and the state is read by a later snapshot.
///
/// # Errors
/// The transaction failed; some parts may have been given by then.
pub async fn find_queue_state(
    database: &Database,
    fence: &Fence,
    slot: Slot,
    one: Option<QueueId>,
    take: TakePart<'_>,
) -> Result<Option<Vec<Position>>, Error> {
    let mut connection = database
        .pool()
        .acquire()
        .await
        .map_err(Error::query(READING))?;
    let mut transaction = connection.begin().await.map_err(Error::query(READING))?;
    let locked = lock_lease(&mut transaction, fence).await;
    if !locked.map_err(Error::query(READING))? {
        transaction
            .rollback()
            .await
            .map_err(Error::query(READING))?;
        return Ok(None);
    }
    failpoint::reach("recovery.lease_locked");
    let positions = read(&mut transaction, slot, one, take).await?;
    transaction.commit().await.map_err(Error::query(READING))?;
    let (queues, generations, throughs) = positions.unwrap_or_default();
    let positions = queues.into_iter().zip(generations).zip(throughs);
    let positions = positions.map(|((queue, generation), through)| Position {
        queue: QueueId(queue),
        generation: Generation(generation),
        through: Offset(through),
    });
    Ok(Some(positions.collect()))
}

async fn read(
    connection: &mut Connection,
    slot: Slot,
    one: Option<QueueId>,
    take: TakePart<'_>,
) -> Result<Option<PositionRow>, Error> {
    #[cfg(feature = "failpoints")]
    if let Some((parts, positions)) = super::mutant::early(slot) {
        for row in parts {
            take(part(row)?);
        }
        return Ok(positions);
    }
    read_parts(connection, slot, one, take).await?;
    let positions = read_positions(connection, slot).await;
    positions.map_err(Error::query(READING))
}
