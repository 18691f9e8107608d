//! The histories of the broker's database: which one it is in, and where the streams continued in each.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::bounded::{STATEMENT, bounded};
use super::{Database, Error, guard};
use crate::domain::id::{Offset, StreamId};

/// A history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// Its number, from 1.
    pub era: i64,
    /// The cluster that it was found in.
    pub system_identifier: String,
    /// The timeline of that cluster's log.
    pub timeline: i32,
    /// The time when it was found.
    pub began_at: DateTime<Utc>,
    /// By the streams' names: the first offset that was given in it. Empty for the first.
    pub first_offsets: BTreeMap<String, Offset>,
}

/// The offset where a stream continued in a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamHistory {
    /// The stream.
    pub stream: StreamId,
    /// The history's number.
    pub era: i64,
    /// The first offset that was given in it.
    pub first_offset: Offset,
    /// The salt of the receipts of its messages.
    pub salt: Uuid,
}

/// The history that the database is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    /// Its number.
    pub era: i64,
    /// The salts of this history and of those before it.
    pub salts: Vec<Uuid>,
    /// It was begun just now.
    pub is_begun: bool,
}

/// Begins another history of the database, if it is in another one than the last that was noted, or that one is among those that are `void`; and has
/// all later connections refused that lead to yet another. Called after the migrations, and before anything else is read. Safe to
/// call from several processes at once.
///
/// # Errors
/// The database's; it is a standby.
pub async fn begin(database: &Database, void: &[Uuid]) -> Result<Present, Error> {
    const DOING: &str = "finding out which history the database is in";
    let mut connection = database.connect().await?;
    let beginning = async {
        let (era, is_begun): (i64, bool) =
            sqlx::query_as("select found_era, is_begun from postroad_broker.begin_history($1)")
                .bind(void)
                .fetch_one(&mut connection)
                .await?;
        let known = "select h.salt from postroad_broker.history h where h.era <= $1 order by h.era";
        let salts = sqlx::query_scalar(known)
            .bind(era)
            .fetch_all(&mut connection);
        let salts: Vec<Uuid> = salts.await?;
        let identity = guard::identity(&mut connection).await?;
        let present = Present {
            era,
            salts,
            is_begun,
        };
        Ok((present, identity))
    };
    let (present, identity) = bounded(DOING, STATEMENT, beginning).await?;
    let identity = identity.ok_or_else(|| {
        let standby = "the server is a standby".to_owned();
        Error::query(DOING)(sqlx::Error::Protocol(standby))
    })?;
    database.guard.expect(identity);
    Ok(present)
}

/// The salts of the history that the database is in, and of those before it in the same server and database, latest first. None where no
/// process has begun one.
///
/// # Errors
/// The statement failed.
pub async fn lineage(database: &Database) -> Result<Vec<Uuid>, Error> {
    sqlx::query_scalar(
        "select h.salt from postroad_broker.history h \
         where not exists ( \
            select from postroad_broker.history o, \
                (select l.* from postroad_broker.history l order by l.era desc limit 1) last \
            where o.era >= h.era and (o.system_identifier, o.database_oid) <> (last.system_identifier, last.database_oid)) \
         order by h.era desc",
    )
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query("reading the lineage of the database"))
}

/// All histories, by number.
///
/// # Errors
/// The statement failed.
pub async fn list(database: &Database) -> Result<Vec<History>, Error> {
    type Row = (i64, String, i32, DateTime<Utc>, Vec<String>, Vec<i64>);
    let rows: Vec<Row> = sqlx::query_as(
        "select h.era, h.system_identifier, h.timeline, h.began_at, coalesce(f.streams, '{}'), coalesce(f.offsets, '{}') \
         from postroad_broker.history h \
         left join lateral ( \
            select array_agg(s.name order by s.id) as streams, array_agg(o.first_offset order by s.id) as offsets \
            from postroad_broker.stream_history o join postroad_broker.stream s on s.id = o.stream_id where o.era = h.era \
         ) f on true \
         order by h.era",
    )
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query("reading the histories"))?;
    let rows = rows.into_iter();
    Ok(rows
        .map(
            |(era, system_identifier, timeline, began_at, streams, offsets)| History {
                era,
                system_identifier,
                timeline,
                began_at,
                first_offsets: streams
                    .into_iter()
                    .zip(offsets.into_iter().map(Offset))
                    .collect(),
            },
        )
        .collect())
}

/// The offsets where the streams continued in each history except the first, by stream and number.
///
/// # Errors
/// The statement failed.
pub async fn find_streams(database: &Database) -> Result<Vec<StreamHistory>, Error> {
    let rows: Vec<(i32, i64, i64, Uuid)> = sqlx::query_as(
        "select s.stream_id, s.era, s.first_offset, h.salt from postroad_broker.stream_history s \
         join postroad_broker.history h on h.era = s.era order by s.stream_id, s.era",
    )
    .fetch_all(database.pooled())
    .await
    .map_err(Error::query("reading the histories of streams"))?;
    let rows = rows.into_iter();
    Ok(rows
        .map(|(stream, era, first_offset, salt)| StreamHistory {
            stream: StreamId(stream),
            era,
            first_offset: Offset(first_offset),
            salt,
        })
        .collect())
}
