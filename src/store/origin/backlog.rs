//! A window of very many rows, counted in pieces, so that nothing is looked at again for each part that is read.

use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, Row as _};

use super::row::{SIZE, read_place};
use super::{LEAF_COUNT, OWN_SIZE, Place, Session, statement};
use crate::store::Error;

/// The first and the last of some transaction ids, or of some blocks.
pub type Range = (i64, i64);

/// Rows of a window in a group of seqs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The seqs, without their lowest bits.
    pub bucket: i64,
    /// How many.
    pub count: u64,
    /// Transaction ids that theirs are among.
    pub ids: Range,
}

/// A piece of a window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Piece {
    /// Its rows by groups. When it was cut: without those of its last id.
    pub groups: Vec<Group>,
    /// Whether there may be more.
    pub is_cut: bool,
    /// The first and the last id that was looked at; none, when no row was.
    pub ids: Option<Range>,
}

/// A window, and the rows of it to read.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The snapshot before it.
    pub since: &'a str,
    /// Its own.
    pub snapshot: &'a str,
    /// Rows after this seq.
    pub after: i64,
}

/// The places to look for rows of a window.
#[derive(Debug, Clone, Copy)]
pub enum Where<'a> {
    /// By their transaction ids, but for certain ones.
    Ids {
        /// These ranges.
        spans: &'a [Range],
        /// But for these.
        but: &'a [i64],
    },
    /// In blocks of a leaf, of certain transactions.
    Blocks {
        /// The leaf.
        leaf: i16,
        /// The blocks.
        blocks: Range,
        /// The transactions.
        of: &'a [i64],
    },
}

const ONE_SPAN: &str = "select outbox.xid, outbox.seq from postroad.outbox
    where outbox.xid >= ($3::text[])[1]::xid8 and outbox.xid <= ($4::text[])[1]::xid8
    order by outbox.xid
    limit $7::bigint";
const ALL_SPANS: &str = "select o.xid, o.seq
    from unnest($3::text[]::xid8[], $4::text[]::xid8[]) as span (low, high), lateral (
        select outbox.xid, outbox.seq from postroad.outbox where outbox.xid >= span.low and outbox.xid <= span.high offset 0
    ) as o
    limit $7::bigint";
const BY_IDS: &str = "(
    select f.* from unnest($6::text[]::xid8[], $7::text[]::xid8[]) as span (low, high), lateral (
        select outbox.xid, outbox.seq, outbox.bucket as leaf, outbox.ctid as place,
            least(0::bigint + /*size*/, 2147483647)::integer as bytes
        from postroad.outbox
        where outbox.xid >= span.low and outbox.xid <= span.high and outbox.seq between $3::bigint and $4::bigint offset 0
    ) as f
    where cardinality($8::text[]) = 0 or f.xid::text <> all($8::text[])
)";
/// The ids as texts, which no index has: the blocks alone say where to look.
const BY_BLOCKS: &str = "(
    select outbox.xid, outbox.seq, outbox.bucket as leaf, outbox.ctid as place,
        least(0::bigint + /*size*/, 2147483647)::integer as bytes
    from postroad.outbox
    where outbox.bucket = $6::smallint and outbox.ctid >= $7::text::tid and outbox.ctid < $8::text::tid
        and outbox.seq between $3::bigint and $4::bigint and outbox.xid::text = any($9::text[])
)";

fn lows(spans: &[Range]) -> Vec<String> {
    spans.iter().map(|(low, _)| low.to_string()).collect()
}

fn highs(spans: &[Range]) -> Vec<String> {
    spans.iter().map(|(_, high)| high.to_string()).collect()
}

fn texts(ids: &[i64]) -> Vec<String> {
    ids.iter().map(i64::to_string).collect()
}

impl Session {
    /// From now on statements are for a backlog, or no more. Then the planner goes by the index in its order, and the server ends a
    /// statement after `longest`: [`Error::is_canceled`].
    ///
    /// # Errors
    /// The statement failed.
    pub async fn read_backlog(
        &mut self,
        longest: Option<std::time::Duration>,
    ) -> Result<(), Error> {
        if longest.is_some() == self.reads_backlog {
            return Ok(());
        }
        self.keep_plans(false).await?;
        let (others, milliseconds) = match longest {
            Some(longest) => ("off", longest.as_millis().max(1)),
            None => ("on", 0),
        };
        let text = format!(
            "select set_config('enable_sort', '{others}', false), set_config('enable_bitmapscan', '{others}', false),
                set_config('statement_timeout', '{milliseconds}', false)"
        );
        let setting = sqlx::query(AssertSqlSafe(text)).execute(&mut self.connection);
        statement("choosing how to read a backlog", setting).await?;
        self.reads_backlog = longest.is_some();
        Ok(())
    }

    /// Counts a piece of a window: of one span in the order of ids, or of several at once. At most `limit` rows are looked at.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn count_by_ids(
        &mut self,
        asked: Asked<'_>,
        spans: &[Range],
        shift: u32,
        limit: usize,
    ) -> Result<Piece, Error> {
        const DOING: &str = "counting a piece of the outbox";
        let piece = match spans.len() {
            1 => ONE_SPAN,
            _ => ALL_SPANS,
        };
        let text = include_str!("../sql/count_backlog.sql").replace("/*piece*/", piece);
        let limit = i64::try_from(limit.max(1)).unwrap_or(i64::MAX);
        let counting = sqlx::query(self.texts(&text))
            .bind(asked.since)
            .bind(asked.snapshot)
            .bind(lows(spans))
            .bind(highs(spans))
            .bind(asked.after)
            .bind(shift.cast_signed())
            .bind(limit)
            .fetch_all(&mut self.connection);
        let rows = statement(DOING, counting).await?;
        let read = || {
            let mut piece = Piece::default();
            for row in &rows {
                let (low, high): (Option<i64>, Option<i64>) =
                    (row.try_get("low")?, row.try_get("high")?);
                let (count, ids): (i64, _) = (row.try_get("count")?, low.zip(high));
                match (row.try_get::<Option<i64>, _>("bucket")?, ids) {
                    (Some(bucket), Some(ids)) => piece.groups.push(Group {
                        bucket,
                        count: count.unsigned_abs(),
                        ids,
                    }),
                    (Some(_), None) => {}
                    (None, ids) => (piece.is_cut, piece.ids) = (count >= limit, ids),
                }
            }
            Ok(piece)
        };
        read().map_err(Error::query(DOING))
    }

    /// Counts the rows of certain transactions in some blocks of a leaf, by groups.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn count_by_blocks(
        &mut self,
        after: i64,
        (leaf, blocks): (i16, Range),
        of: &[i64],
        shift: u32,
    ) -> Result<Vec<(i64, u64)>, Error> {
        let text = "select outbox.seq >> $6::integer as bucket, count(*) as count from postroad.outbox
            where outbox.bucket = $1::smallint and outbox.ctid >= $2::text::tid and outbox.ctid < $3::text::tid
                and outbox.xid::text = any($4::text[]) and outbox.seq > $5::bigint
            group by 1";
        let counting = sqlx::query_as(self.texts(text))
            .bind(leaf)
            .bind(format!("({},0)", blocks.0))
            .bind(format!("({},0)", blocks.1 + 1))
            .bind(texts(of))
            .bind(after)
            .bind(shift.cast_signed())
            .fetch_all(&mut self.connection);
        let found: Vec<(i64, i64)> = statement("counting blocks of the outbox", counting).await?;
        let found = found.into_iter();
        Ok(found
            .map(|(bucket, count)| (bucket, count.unsigned_abs()))
            .collect())
    }

    /// The leaves that have rows of these transactions, with how many blocks each has.
    ///
    /// # Errors
    /// A statement failed.
    pub async fn find_leaves(&mut self, of: &[i64]) -> Result<Vec<(i16, i64)>, Error> {
        const DOING: &str = "looking for leaves of the outbox";
        let leaves = if self.mapped.is_some() { 1 } else { LEAF_COUNT };
        let mut found = Vec::new();
        for leaf in 0..leaves {
            let text = "select exists (
                select from postroad.outbox where outbox.bucket = $1::smallint and outbox.xid = any($2::text[]::xid8[]))";
            let looking = sqlx::query_scalar(self.texts(text))
                .bind(leaf)
                .bind(texts(of))
                .fetch_one(&mut self.connection);
            if !statement(DOING, looking).await? {
                continue;
            }
            let table = match &self.mapped {
                None => format!("postroad.outbox_{leaf}"),
                Some(relation) => relation.table.clone(),
            };
            // Of a partitioned one the longest: a block's number is one of each of them.
            let measuring = sqlx::query_scalar(
                "select coalesce(max(pg_relation_size(relid)), 0) / current_setting('block_size')::bigint
                from pg_partition_tree($1::text::regclass)",
            )
            .bind(table)
            .fetch_one(&mut self.connection);
            found.push((leaf, statement(DOING, measuring).await?));
        }
        Ok(found)
    }

    /// The places of a window's rows with seqs from `seqs.0` to `seqs.1`, the first `limit` by seq.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn find_places(
        &mut self,
        asked: Asked<'_>,
        seqs: Range,
        limit: usize,
        place: Where<'_>,
    ) -> Result<Vec<Place>, Error> {
        let found = match place {
            Where::Ids { .. } => BY_IDS,
            Where::Blocks { .. } => BY_BLOCKS,
        };
        let text = include_str!("../sql/read_backlog.sql").replace("/*found*/", found);
        let finding = sqlx::query(self.texts(&text))
            .bind(asked.since)
            .bind(asked.snapshot)
            .bind(seqs.0)
            .bind(seqs.1)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let finding = match place {
            Where::Ids { spans, but } => finding
                .bind(lows(spans))
                .bind(highs(spans))
                .bind(texts(but)),
            Where::Blocks { leaf, blocks, of } => finding
                .bind(leaf)
                .bind(format!("({},0)", blocks.0))
                .bind(format!("({},0)", blocks.1 + 1))
                .bind(texts(of)),
        };
        statement("reading the places of a window", async {
            let mut rows = finding.fetch(&mut self.connection);
            let mut places = Vec::new();
            while let Some(row) = rows.try_next().await? {
                places.push(read_place(&row)?);
            }
            Ok(places)
        })
        .await
    }

    /// A statement over the outbox, or over the table in its place.
    fn texts(&self, own: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(match &self.mapped {
            None => own.replace(SIZE, OWN_SIZE),
            Some(relation) => relation.rewrite(own),
        })
    }
}
