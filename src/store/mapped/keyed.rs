//! Rows of a mapped table by their primary keys: they are read one by one when a batch cannot be read.

use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Postgres, Row as _};

use super::{ROW_MAX_BYTES, Relation};
use crate::store::Error;
use crate::store::origin::{OutboxRow, Session, read_row, statement};

const COLUMNS: &str = "keys, seq, topic, payload, payload_bytes, key, type, id, source, subject, content_type, data_schema,
    headers::text as headers, expected_version,
    case when time >= '0001-01-01 00:00:00+00' and time < '10000-01-01 00:00:00+00' then time end as time,
    coalesce(time >= '0001-01-01 00:00:00+00' and time < '10000-01-01 00:00:00+00', true) as time_is_valid,
    case when deliver_at >= '0001-01-01 00:00:00+00' and deliver_at < '10000-01-01 00:00:00+00' then deliver_at end as deliver_at,
    coalesce(deliver_at >= '0001-01-01 00:00:00+00' and deliver_at < '10000-01-01 00:00:00+00', true) as deliver_at_is_valid";

/// Primary keys, a column each.
fn columns(relation: &Relation, keys: &[Vec<String>]) -> Vec<Vec<String>> {
    let of = |n: usize| keys.iter().filter_map(|key| key.get(n).cloned()).collect();
    (0..relation.keys.len()).map(of).collect()
}

fn bind<'q>(
    query: Query<'q, Postgres, PgArguments>,
    columns: Vec<Vec<String>>,
) -> Query<'q, Postgres, PgArguments> {
    columns.into_iter().fold(query, Query::bind)
}

impl Session {
    /// The primary keys of the first rows in order. Nothing else of them is looked at.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn first_keys(&mut self, limit: usize) -> Result<Vec<Vec<String>>, Error> {
        const DOING: &str = "reading the keys of a mapped table";
        let relation = self.relation()?;
        let text = relation.rewrite(&format!(
            "select keys from postroad.outbox order by {} limit $1",
            relation.order
        ));
        let reading = sqlx::query_scalar(AssertSqlSafe(text))
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_all(&mut self.connection);
        statement(DOING, reading).await
    }

    /// The rows with these primary keys, in any order; none that is too large to be read, or gone.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn read_by_keys(
        &mut self,
        keys: &[Vec<String>],
    ) -> Result<Vec<(Vec<String>, OutboxRow)>, Error> {
        const DOING: &str = "reading rows of a mapped table";
        let relation = self.relation()?.clone();
        let text = format!(
            "select {COLUMNS} from {} as outbox where size <= {ROW_MAX_BYTES}",
            relation.source_by_keys()
        );
        let reading = bind(sqlx::query(AssertSqlSafe(text)), columns(&relation, keys));
        let found = statement(DOING, reading.fetch_all(&mut self.connection)).await?;
        let rows: Result<Vec<_>, sqlx::Error> = found
            .iter()
            .map(|row| Ok((row.try_get("keys")?, read_row(row)?)))
            .collect();
        rows.map_err(Error::query(DOING))
    }

    /// The row with this primary key as the server prints it, in its own encoding and then in base64.
    ///
    /// # Errors
    /// The statement failed: not even that can be had of the row.
    pub async fn read_raw_by_key(&mut self, key: &[String]) -> Result<Option<String>, Error> {
        let relation = self.relation()?.clone();
        let (table, rows, matches) = (&relation.table, relation.key_rows(), relation.key_matches());
        let text = format!(
            "select translate(encode(convert_to(t::text, getdatabaseencoding()), 'base64'), E'\n', '') as raw
            from {table} as t join {rows} as gone on {matches}"
        );
        let keys = columns(&relation, std::slice::from_ref(&key.to_vec()));
        let reading = bind(sqlx::query(AssertSqlSafe(text)), keys);
        let found = statement(
            "reading a row of a mapped table as it is",
            reading.fetch_optional(&mut self.connection),
        );
        let read = |row: &sqlx::postgres::PgRow| row.try_get("raw");
        let raw = found.await?.as_ref().map(read).transpose();
        raw.map_err(Error::query("reading a row of a mapped table as it is"))
    }
}
