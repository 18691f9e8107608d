//! The keys of keyed streams. See `migrations/broker` for how they are folded.

use crate::domain::id::{Offset, StreamId};
use crate::store::bounded::{LONG_STATEMENT, STATEMENT, bounded};
use crate::store::{Connection, Error};

use super::log::SliceItem;

/// The state of a key's folded messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyHead {
    /// The key.
    pub key: String,
    /// How many they are.
    pub version: i64,
    /// The last one's offset.
    pub last: Offset,
}

/// Folds the keys of a leaf, and indexes it if it is full. Returns up to where all is folded; `None` when its turn has not come or it
/// is gone.
///
/// # Errors
/// The database's.
pub async fn fold_keys(
    connection: &mut Connection,
    stream: StreamId,
    first: Offset,
) -> Result<Option<Offset>, Error> {
    let (through,): (Option<i64>,) = bounded(
        "folding the keys of a leaf",
        LONG_STATEMENT,
        sqlx::query_as("select postroad_broker.fold_keys($1, $2)")
            .bind(stream.0)
            .bind(first.0)
            .fetch_one(connection),
    )
    .await?;
    Ok(through.map(Offset))
}

/// The keys of messages after an offset and through another, in offset order; without those that have none.
///
/// # Errors
/// The database's.
pub async fn read_keys(
    connection: &mut Connection,
    stream: StreamId,
    after: Offset,
    through: Offset,
) -> Result<Vec<(Offset, String)>, Error> {
    let rows: Vec<(i64, String)> = bounded(
        "reading the keys of messages",
        STATEMENT,
        sqlx::query_as(include_str!("../sql/read_keys.sql"))
            .bind(stream.0)
            .bind(after.0)
            .bind(through.0)
            // The appender asks it too, in a session that keeps plans: one for all offsets would lock all leaves.
            .persistent(false)
            .fetch_all(connection),
    )
    .await?;
    Ok(rows
        .into_iter()
        .map(|(offset, key)| (Offset(offset), key))
        .collect())
}

/// A stream's fold, and what it has of one key; `None` when the stream is gone or not keyed.
///
/// # Errors
/// The database's.
pub async fn find_key_head(
    connection: &mut Connection,
    stream: StreamId,
    key: &str,
) -> Result<Option<(Offset, Option<KeyHead>)>, Error> {
    type Columns = (Option<i64>, Option<i64>, Option<i64>);
    let row: Option<Columns> = bounded(
        "reading the head of a key",
        STATEMENT,
        sqlx::query_as(include_str!("../sql/find_key_head.sql"))
            .bind(stream.0)
            .bind(key)
            .fetch_optional(connection),
    )
    .await?;
    let Some((Some(through), version, last)) = row else {
        return Ok(None);
    };
    let head = version.zip(last).map(|(version, last)| KeyHead {
        key: key.to_owned(),
        version,
        last: Offset(last),
    });
    Ok(Some((Offset(through), head)))
}

/// A stream's fold, and what it has of the keys after one of them, in the order of their bytes; `None` when the stream is gone or not
/// keyed.
///
/// # Errors
/// The database's.
pub async fn list_key_heads(
    connection: &mut Connection,
    stream: StreamId,
    after: Option<&str>,
    limit: usize,
) -> Result<Option<(Offset, Vec<KeyHead>)>, Error> {
    type Columns = (Option<i64>, Option<String>, Option<i64>, Option<i64>);
    let rows: Vec<Columns> = bounded(
        "listing the heads of keys",
        STATEMENT,
        sqlx::query_as(include_str!("../sql/list_key_heads.sql"))
            .bind(stream.0)
            // No key is empty.
            .bind(after.unwrap_or_default())
            .bind(limit as i64)
            .fetch_all(connection),
    )
    .await?;
    let Some(&(Some(through), ..)) = rows.first() else {
        return Ok(None);
    };
    let heads = rows.into_iter().filter_map(|(_, key, version, last)| {
        Some(KeyHead {
            key: key?,
            version: version?,
            last: Offset(last?),
        })
    });
    let mut heads: Vec<KeyHead> = heads.collect();
    heads.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(Some((Offset(through), heads)))
}

/// The end of the 64th leaf that has something after an offset, or the offset where the leaves end: what one statement may go through.
///
/// # Errors
/// The database's.
pub async fn find_span_end(
    connection: &mut Connection,
    stream: StreamId,
    after: Offset,
) -> Result<Option<Offset>, Error> {
    let (end,): (Option<i64>,) = bounded(
        "reading where leaves end",
        STATEMENT,
        sqlx::query_as(
            "select max(l.last_offset) from ( \
                 select last_offset from postroad_broker.message_leaf \
                 where stream_id = $1 and last_offset > $2 and emptied_at is null \
                 order by first_offset limit 64) l",
        )
        .bind(stream.0)
        .bind(after.0)
        .fetch_one(connection),
    )
    .await?;
    Ok(end.map(Offset))
}

/// Messages of a key in folded leaves, in offset order, by the leaves' indexes. Without payloads.
///
/// # Errors
/// The database's.
pub async fn read_key_slice(
    connection: &mut Connection,
    stream: StreamId,
    (key, key_hash): (&str, i64),
    (after, through): (Offset, Offset),
    limit: usize,
) -> Result<Vec<SliceItem>, Error> {
    let rows = bounded(
        "reading the history of a key",
        STATEMENT,
        sqlx::query_as(include_str!("../sql/read_key_slice.sql"))
            .bind(stream.0)
            .bind(key_hash)
            .bind(key)
            .bind(after.0)
            .bind(through.0)
            .bind(limit as i64)
            .fetch_all(connection),
    )
    .await?;
    Ok(rows.into_iter().map(SliceItem::of).collect())
}

/// The columns of [`read_key_slice`] for single messages, in offset order. Gone messages are absent. `offsets` ascend.
///
/// # Errors
/// The database's.
pub async fn fetch_items(
    connection: &mut Connection,
    stream: StreamId,
    offsets: &[Offset],
) -> Result<Vec<SliceItem>, Error> {
    let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else {
        return Ok(Vec::new());
    };
    let rows = bounded(
        "reading messages of a key",
        STATEMENT,
        sqlx::query_as(include_str!("../sql/fetch_items.sql"))
            .bind(stream.0)
            .bind(offsets.iter().map(|offset| offset.0).collect::<Vec<_>>())
            .bind(first.0)
            .bind(last.0)
            .fetch_all(connection),
    )
    .await?;
    let mut items: Vec<SliceItem> = rows.into_iter().map(SliceItem::of).collect();
    items.sort_unstable_by_key(|item| item.offset);
    Ok(items)
}
