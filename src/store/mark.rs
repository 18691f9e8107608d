//! The places of queues in their logs, and whether the logs have those places. Called from tasks that are never aborted.

use super::journal::Position;
use super::{Database, Error};
use crate::domain::id::{Generation, Offset, QueueId, StreamId};

/// The place of a queue, from its stored state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The queue.
    pub queue: QueueId,
    /// Its stream.
    pub stream: StreamId,
    /// Its generation.
    pub generation: Generation,
    /// It has looked at everything up to here.
    pub through: Offset,
}

/// Finds the queues whose log does not have their place: it ends before, or another message stands where the queue noted one. With
/// the log's last offset.
///
/// # Errors
/// The statement failed.
pub async fn find_logs_behind(
    database: &Database,
    places: &[Place],
) -> Result<Vec<(QueueId, Offset)>, Error> {
    if places.is_empty() {
        return Ok(Vec::new());
    }
    let look = || async {
        let rows: Vec<(i64, i64)> = sqlx::query_as(include_str!("sql/find_logs_behind.sql"))
            .bind(places.iter().map(|p| p.queue.0).collect::<Vec<_>>())
            .bind(places.iter().map(|p| p.stream.0).collect::<Vec<_>>())
            .bind(places.iter().map(|p| p.through.0).collect::<Vec<_>>())
            .bind(places.iter().map(|p| p.generation.0).collect::<Vec<_>>())
            .fetch_all(database.pooled())
            .await
            .map_err(Error::query("comparing queues with their logs"))?;
        let rows = rows.into_iter();
        Ok(rows
            .map(|(queue, end)| (QueueId(queue), Offset(end)))
            .collect::<Vec<_>>())
    };
    let seen = look().await?;
    if seen.is_empty() {
        return Ok(seen);
    }
    let again = look().await?;
    let both = |queue: QueueId| seen.iter().any(|(before, _)| *before == queue);
    Ok(again
        .into_iter()
        .filter(|(queue, _)| both(*queue))
        .collect())
}

/// Notes which messages stand where these queues have settled everything up to.
///
/// # Errors
/// The statement failed.
pub async fn write_marks(database: &Database, places: &[Position]) -> Result<(), Error> {
    sqlx::query(include_str!("sql/write_queue_marks.sql"))
        .bind(places.iter().map(|p| p.queue.0).collect::<Vec<_>>())
        .bind(places.iter().map(|p| p.generation.0).collect::<Vec<_>>())
        .bind(places.iter().map(|p| p.through.0).collect::<Vec<_>>())
        .execute(database.pooled())
        .await
        .map_err(Error::query("noting where queues are"))?;
    Ok(())
}
