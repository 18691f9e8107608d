//! A row of an outbox, and the place of a row.

use chrono::{DateTime, Utc};
use sqlx::Row as _;
use sqlx::postgres::PgRow;

/// The expression for a row's size in bytes, as a message is measured (`Message::size`), and not less than that.
pub(in crate::store) const SIZE: &str = "/*size*/";
/// The size of a row of Postroad's own outbox. The length of a text is known without reading it.
pub(in crate::store) const OWN_SIZE: &str = "256 + coalesce(octet_length(payload), 0) + coalesce(octet_length(payload_bytes), 0)
    + coalesce(octet_length(key), 0) + coalesce(octet_length(type), 0) + coalesce(octet_length(id), 0)
    + coalesce(octet_length(source), 0) + coalesce(octet_length(subject), 0) + coalesce(octet_length(content_type), 0)
    + coalesce(octet_length(data_schema), 0) + 2 * coalesce(octet_length(headers::text), 0)";

/// A row of an outbox. What the outbox's constraints promise is checked by the relay: they can have been bypassed.
#[derive(Debug, Clone, PartialEq, Default)]
#[expect(missing_docs, reason = "the columns, as the outbox documents them")]
pub struct OutboxRow {
    pub seq: i64,
    pub topic: Option<String>,
    pub payload: Option<String>,
    pub payload_bytes: Option<Vec<u8>>,
    pub key: Option<String>,
    pub kind: Option<String>,
    pub id: Option<String>,
    pub source: Option<String>,
    pub subject: Option<String>,
    pub content_type: Option<String>,
    pub data_schema: Option<String>,
    pub headers: Option<String>,
    pub time: Option<DateTime<Utc>>,
    pub time_is_valid: bool,
    pub expected_version: Option<i64>,
    pub deliver_at: Option<DateTime<Utc>>,
    pub deliver_at_is_valid: bool,
}

/// The place of a row of a large window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The row's number: checked when it is read by place.
    pub seq: i64,
    /// The leaf.
    pub leaf: i16,
    /// The block of its ctid.
    pub block: u32,
    /// The line of its ctid.
    pub line: u16,
    /// Its size.
    pub bytes: u32,
}

pub(in crate::store) fn read_row(row: &PgRow) -> Result<OutboxRow, sqlx::Error> {
    Ok(OutboxRow {
        seq: row.try_get("seq")?,
        topic: row.try_get("topic")?,
        payload: row.try_get("payload")?,
        payload_bytes: row.try_get("payload_bytes")?,
        key: row.try_get("key")?,
        kind: row.try_get("type")?,
        id: row.try_get("id")?,
        source: row.try_get("source")?,
        subject: row.try_get("subject")?,
        content_type: row.try_get("content_type")?,
        data_schema: row.try_get("data_schema")?,
        headers: row.try_get("headers")?,
        time: row.try_get("time")?,
        time_is_valid: row.try_get("time_is_valid")?,
        expected_version: row.try_get("expected_version")?,
        deliver_at: row.try_get("deliver_at")?,
        deliver_at_is_valid: row.try_get("deliver_at_is_valid")?,
    })
}

pub(in crate::store) fn read_place(row: &PgRow) -> Result<Place, sqlx::Error> {
    let text: &str = row.try_get("place")?;
    let place = text
        .trim_matches(['(', ')'])
        .split_once(',')
        .and_then(|(block, line)| Some((block.parse().ok()?, line.parse().ok()?)));
    let (block, line) = place
        .ok_or_else(|| sqlx::Error::Decode(format!("`{text}` is not the place of a row").into()))?;
    let bytes: i32 = row.try_get("bytes")?;
    Ok(Place {
        seq: row.try_get("seq")?,
        leaf: row.try_get("leaf")?,
        block,
        line,
        bytes: bytes.unsigned_abs(),
    })
}
