//! The rows that became visible in an outbox between two snapshots: opened in one statement, and read in pages when there
//! are many.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Row as _, SqlSafeStr as _};
use uuid::Uuid;

use super::leaf::LEAF_COUNT;
use super::row::{OWN_SIZE, SIZE, read_place, read_row};
use super::{OutboxRow, Place, Session, statement};
use crate::failpoint;
use crate::store::Error;

/// The identity of the origin at the moment of a window's snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// A standby: its snapshots have no list of transactions in progress.
    pub in_recovery: bool,
    /// The cluster's identifier, made by initdb.
    pub system_identifier: String,
    /// The timeline of its log; rises when a standby is promoted.
    pub timeline: i32,
    /// The backend that answered: a pooler in between can change it.
    pub backend_pid: i32,
    /// Whether the mark asked for exists (or none was asked for).
    pub has_mark: bool,
    /// Whether the last snapshot is from this cluster's future.
    pub is_ahead: bool,
    /// The new snapshot.
    pub snapshot: String,
    /// The origin's clock.
    pub read_at: DateTime<Utc>,
}

/// An opened window.
#[derive(Debug)]
pub struct Opened {
    /// The origin's identity and the window's end.
    pub identity: Identity,
    /// Its rows by seq, or the first of them that came when it is large.
    pub rows: Vec<OutboxRow>,
    /// Whether `rows` is all of it, payloads included.
    pub is_whole: bool,
    /// Whether it has rows that were not asked for, as its reader knows.
    pub has_more: bool,
}

static OWN_WINDOW: LazyLock<String> =
    LazyLock::new(|| include_str!("../sql/open_outbox_window.sql").replace(SIZE, OWN_SIZE));

/// The rows at places of one leaf.
const ROWS_BY_PLACE: &str = "select seq, topic, payload, payload_bytes, key, type, id, source, subject, content_type, data_schema,
        headers::text as headers, expected_version,
        case when time >= '0001-01-01 00:00:00+00' and time < '10000-01-01 00:00:00+00' then time end as time,
        coalesce(time >= '0001-01-01 00:00:00+00' and time < '10000-01-01 00:00:00+00', true) as time_is_valid,
        case when deliver_at >= '0001-01-01 00:00:00+00' and deliver_at < '10000-01-01 00:00:00+00'
            then deliver_at end as deliver_at,
        coalesce(deliver_at >= '0001-01-01 00:00:00+00' and deliver_at < '10000-01-01 00:00:00+00', true)
            as deliver_at_is_valid
    from postroad.outbox_/*leaf*/ where ctid = any($1::text[]::tid[])";

const IDS_BY_PLACE: &str = "select outbox.seq, 0::smallint as leaf, outbox.ctid::text as place, 0 as bytes, outbox.topic, outbox.source, outbox.id
    from postroad.outbox_/*leaf*/ as outbox where outbox.ctid = any($1::text[]::tid[])";

/// The identity of a message, in the streams of its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the columns")]
pub struct Ids {
    pub topic: String,
    pub source: String,
    pub id: String,
}

fn ctids(places: &[Place], leaf: i16) -> Vec<String> {
    let of_leaf = places.iter().filter(|place| place.leaf == leaf);
    of_leaf
        .map(|place| format!("({},{})", place.block, place.line))
        .collect()
}

impl Session {
    /// Whether this is the backend that took the snapshot, and would take the very same one now: nothing that writes began or
    /// ended. Costs a tenth of opening a window.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn is_unchanged(&mut self, snapshot: &str, backend_pid: i32) -> Result<bool, Error> {
        self.keep_plans(true).await?;
        let asking =
            sqlx::query_scalar("select pg_current_snapshot()::text = $1 and pg_backend_pid() = $2")
                .bind(snapshot)
                .bind(backend_pid)
                .fetch_one(&mut self.connection);
        statement("asking for the origin's snapshot", asking).await
    }

    /// Opens a window after the snapshot `last`, and reads it if it is small: up to `max_rows` rows and `max_bytes` bytes.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn open_window(
        &mut self,
        last: &str,
        mark: Option<Uuid>,
        max_rows: usize,
        max_bytes: usize,
    ) -> Result<Opened, Error> {
        const DOING: &str = "opening a window of the outbox";
        self.keep_plans(true).await?;
        let text = match failpoint::is_mutant("order-by-xid") {
            // Asked thousands of times a second.
            false if self.mapped.is_none() => AssertSqlSafe(OWN_WINDOW.as_str()).into_sql_str(),
            false => self.text(include_str!("../sql/open_outbox_window.sql")),
            true => AssertSqlSafe(OWN_WINDOW.replace(
                "over (order by found.seq rows",
                "over (order by found.xid, found.seq rows",
            ))
            .into_sql_str(),
        };
        let reading = sqlx::query(text)
            .bind(last)
            .bind(mark)
            .bind(i64::try_from(max_rows).unwrap_or(i64::MAX))
            .bind(i64::try_from(max_bytes).unwrap_or(i64::MAX))
            .fetch_all(&mut self.connection);
        let found = statement(DOING, reading).await?;
        let opened = read_opened(&found, max_rows);
        #[cfg(feature = "failpoints")]
        let opened = opened.map(|mut opened| {
            crate::store::mutant::drop_late(&mut opened.rows);
            opened
        });
        opened.map_err(Error::query(DOING))
    }

    /// The rows at these places, by seq. Fewer, when a row is not where the manifest saw it (VACUUM FULL, a person): the
    /// manifest must be read again.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn read_places(&mut self, places: &[Place]) -> Result<Vec<OutboxRow>, Error> {
        self.keep_plans(false).await?;
        const DOING: &str = "reading a page of the outbox";
        let mut rows = Vec::with_capacity(places.len());
        // A mapped table is one leaf; of a partitioned one, rows of other leaves at the same place have other numbers.
        let leaves = if self.mapped.is_some() { 1 } else { LEAF_COUNT };
        for leaf in 0..leaves {
            let ctids = ctids(places, leaf);
            if ctids.is_empty() {
                continue;
            }
            let of_leaf = places.iter().filter(|place| place.leaf == leaf);
            let seqs: HashSet<i64> = of_leaf.map(|place| place.seq).collect();
            // The leaf is one of eight names of the schema, each with a statement of its own.
            let text = ROWS_BY_PLACE.replace("/*leaf*/", &leaf.to_string());
            let text = match &self.mapped {
                Some(relation) => relation.rewrite(&ROWS_BY_PLACE.replace("_/*leaf*/", "")),
                None => text,
            };
            let reading = sqlx::query(AssertSqlSafe(text))
                .bind(ctids)
                .fetch_all(&mut self.connection);
            for row in statement(DOING, reading).await? {
                let row = read_row(&row).map_err(Error::query(DOING))?;
                if seqs.contains(&row.seq) {
                    rows.push(row);
                }
            }
        }
        rows.sort_by_key(|row| row.seq);
        Ok(rows)
    }

    /// The topic, source and id of the rows at these places, each with its place, in any order.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn read_ids(&mut self, places: &[Place]) -> Result<Vec<(Place, Ids)>, Error> {
        const DOING: &str = "reading ids of the outbox";
        self.keep_plans(false).await?;
        let at: HashMap<(i64, u32, u16), Place> = places
            .iter()
            .map(|place| ((place.seq, place.block, place.line), *place))
            .collect();
        let leaves = if self.mapped.is_some() { 1 } else { LEAF_COUNT };
        let mut found = Vec::with_capacity(places.len());
        for leaf in 0..leaves {
            let ctids = ctids(places, leaf);
            if ctids.is_empty() {
                continue;
            }
            let text = IDS_BY_PLACE.replace("/*leaf*/", &leaf.to_string());
            let text = match &self.mapped {
                Some(relation) => relation.rewrite(&IDS_BY_PLACE.replace("_/*leaf*/", "")),
                None => text,
            };
            let reading = sqlx::query(AssertSqlSafe(text))
                .bind(ctids)
                .fetch_all(&mut self.connection);
            for row in statement(DOING, reading).await? {
                let read = || {
                    let place = read_place(&row)?;
                    let known = at.get(&(place.seq, place.block, place.line));
                    let known = known.filter(|known| known.leaf == leaf);
                    let ids = Ids {
                        topic: row.try_get::<Option<_>, _>("topic")?.unwrap_or_default(),
                        source: row.try_get::<Option<_>, _>("source")?.unwrap_or_default(),
                        id: row.try_get::<Option<_>, _>("id")?.unwrap_or_default(),
                    };
                    Ok(known.map(|known| (*known, ids)))
                };
                found.extend(read().map_err(Error::query(DOING))?);
            }
        }
        Ok(found)
    }

    /// The row at a place as the server prints it, in its own encoding and then in base64; none, when it is not there.
    ///
    /// # Errors
    /// The statement failed: not even that can be had of the row.
    pub async fn read_raw(&mut self, place: Place) -> Result<Option<String>, Error> {
        const RAW: &str = "select translate(encode(convert_to(t::text, getdatabaseencoding()), 'base64'), E'\\n', '')";
        self.keep_plans(false).await?;
        let text = match &self.mapped {
            None => format!(
                "{RAW} from postroad.outbox_{} as t where t.ctid = $1::text::tid and t.seq = $2",
                place.leaf
            ),
            Some(relation) => relation.raw_by_place(RAW),
        };
        let reading = sqlx::query_scalar(AssertSqlSafe(text))
            .bind(format!("({},{})", place.block, place.line))
            .bind(place.seq)
            .fetch_optional(&mut self.connection);
        statement("reading a row of the outbox as it is", reading).await
    }
}

/// A row and its place, null where there is none but this.
fn numbered(row: &PgRow) -> Result<(Option<i64>, &PgRow), sqlx::Error> {
    Ok((row.try_get("n")?, row))
}

fn read_opened(found: &[PgRow], max_rows: usize) -> Result<Opened, sqlx::Error> {
    let mut found = found.iter().map(numbered).collect::<Result<Vec<_>, _>>()?;
    // As they come, but nobody promises that.
    found.sort_by_key(|(n, _)| *n);
    let (_, first) = found.first().ok_or(sqlx::Error::RowNotFound)?;
    let identity = read_identity(first)?;
    let mut rows = Vec::new();
    let mut is_whole = true;
    if first.try_get::<Option<i64>, _>("seq")?.is_some() {
        is_whole = found.len() <= max_rows;
        for (_, row) in found {
            is_whole &= row.try_get::<Option<bool>, _>("is_whole")?.unwrap_or(false);
            rows.push(read_row(row)?);
        }
    }
    Ok(Opened {
        identity,
        rows,
        is_whole,
        has_more: false,
    })
}

pub(in crate::store) fn read_identity(first: &PgRow) -> Result<Identity, sqlx::Error> {
    Ok(Identity {
        in_recovery: first.try_get("in_recovery")?,
        system_identifier: first.try_get("system_identifier")?,
        timeline: first.try_get("timeline")?,
        backend_pid: first.try_get("backend_pid")?,
        has_mark: first.try_get("has_mark")?,
        is_ahead: first.try_get("is_ahead")?,
        snapshot: first.try_get("snapshot")?,
        read_at: first.try_get("read_at")?,
    })
}
