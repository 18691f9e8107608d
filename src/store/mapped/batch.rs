//! Pickup by deletion: a batch is read, and deleted once it is in the streams.

use sqlx::{AssertSqlSafe, Connection as _, Row as _};
use uuid::Uuid;

use super::ROW_MAX_BYTES;
use crate::store::origin::{
    Identity, Ids, OutboxRow, Reader, Session, read_identity, read_row, statement,
};
use crate::store::{Connection, Error};

/// The separator between the parts of a key in one text.
const KEY_END: &str = "\u{1f}";
/// Rows that one statement takes out.
const DELETE_MAX_ROWS: usize = 5_000;

/// The first rows of a table.
#[derive(Debug)]
pub struct Batch {
    /// The origin at the moment of reading.
    pub identity: Identity,
    /// The rows, in order.
    pub rows: Vec<OutboxRow>,
    /// Their primary keys, as text.
    pub keys: Vec<Vec<String>>,
    /// Whether the table held no further row.
    pub is_all: bool,
}

/// Refuses to delete from a table whose owner would have code of his run by it: see `postroad.mapped_guard`. Until the transaction
/// ends nobody can add any.
async fn guard(connection: &mut Connection, table: &str) -> Result<(), sqlx::Error> {
    sqlx::query("select postroad.mapped_guard($1, 'delete')")
        .bind(table)
        .execute(connection)
        .await
        .map(|_| ())
}

impl Session {
    /// Reads the first rows of the mapped table, up to so many and so many bytes, but always one, and none of those with the keys
    /// `left`, which stay where they are.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn open_batch(
        &mut self,
        mark: Option<Uuid>,
        max_rows: usize,
        max_bytes: usize,
        left: &[Vec<String>],
    ) -> Result<Batch, Error> {
        const DOING: &str = "reading a batch of a mapped table";
        let relation = self.relation()?;
        let fits = format!("outbox.size <= {ROW_MAX_BYTES}");
        // Asked in this order, since of a row that cannot be printed the size cannot be told either.
        let kept = match left.is_empty() {
            true => fits,
            false => format!(
                "case when array_to_string(outbox.keys, '{KEY_END}') = any($4) then false else {fits} end"
            ),
        };
        let text = relation
            .rewrite(include_str!("../sql/open_mapped_batch.sql"))
            .replace("/*kept*/", &kept)
            .replace("/*order*/", &relation.order);
        let mut reading = sqlx::query(AssertSqlSafe(text))
            .bind(mark)
            .bind(i64::try_from(max_rows).unwrap_or(i64::MAX))
            .bind(i64::try_from(max_bytes).unwrap_or(i64::MAX));
        if !left.is_empty() {
            reading = reading.bind(left.iter().map(|key| key.join(KEY_END)).collect::<Vec<_>>());
        }
        let reading = reading.fetch_all(&mut self.connection);
        let found = statement(DOING, reading).await?;
        let read = || {
            let first = found.first().ok_or(sqlx::Error::RowNotFound)?;
            let found_count: i64 = first.try_get("found_count")?;
            let mut rows = Vec::new();
            let mut keys = Vec::new();
            for row in &found {
                if row.try_get::<Option<i64>, _>("n")?.is_some() {
                    rows.push(read_row(row)?);
                    keys.push(row.try_get("keys")?);
                }
            }
            Ok(Batch {
                identity: read_identity(first)?,
                is_all: usize::try_from(found_count).is_ok_and(|count| count == rows.len()),
                rows,
                keys,
            })
        };
        read().map_err(Error::query(DOING))
    }

    /// Takes rows out by their primary keys, and notes the number of the position that they were relayed by, in one transaction.
    /// Rows that are gone already are no fault. Returns how many of them are still there: a trigger or a policy that keeps
    /// rows keeps them here too.
    ///
    /// # Errors
    /// The transaction failed, or nobody knows whether it did; it can be repeated.
    pub async fn delete_rows(
        &mut self,
        keys: &[Vec<String>],
        reader: Reader,
        number: i64,
    ) -> Result<i64, Error> {
        let relation = self.relation()?.clone();
        let (table, rows, matches) = (&relation.table, relation.key_rows(), relation.key_matches());
        let delete = format!("delete from {table} as t using {rows} as gone where {matches}");
        let look = format!("select count(*) from {table} as t join {rows} as gone on {matches}");
        let mut left = 0;
        for chunk in keys.chunks(DELETE_MAX_ROWS) {
            let width = relation.keys.len();
            let columns: Vec<Vec<&str>> = (0..width)
                .map(|n| {
                    chunk
                        .iter()
                        .filter_map(|key| key.get(n).map(String::as_str))
                        .collect()
                })
                .collect();
            left += statement("taking relayed rows out of a mapped table", async {
                let mut transaction = self.connection.begin().await?;
                guard(&mut transaction, &relation.table).await?;
                let mut deleting = sqlx::query(AssertSqlSafe(delete.clone()));
                let mut looking = sqlx::query_scalar(AssertSqlSafe(look.clone()));
                for column in columns {
                    deleting = deleting.bind(column.clone());
                    looking = looking.bind(column);
                }
                deleting.execute(&mut *transaction).await?;
                let left: i64 = looking.fetch_one(&mut *transaction).await?;
                sqlx::query(
                    "insert into postroad.mapped_emptied (broker, origin_id, table_name, number) values ($1, $2, $3, $4)
                    on conflict do nothing",
                )
                .bind(reader.broker)
                .bind(reader.origin.0)
                .bind(&relation.table)
                .bind(number)
                .execute(&mut *transaction)
                .await?;
                transaction.commit().await?;
                Ok(left)
            })
            .await?;
        }
        Ok(left)
    }

    /// The primary keys after `after` (none: from the start) with what each row's message is known by, at most `limit`, by primary key.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn read_keys(
        &mut self,
        after: Option<&[String]>,
        limit: usize,
    ) -> Result<Vec<(Vec<String>, Ids)>, Error> {
        const DOING: &str = "reading the ids of a mapped table";
        let relation = self.relation()?;
        let names: Vec<String> = (0..relation.keys.len())
            .map(|n| format!("key_{n}"))
            .collect();
        let casts = relation.keys.iter().enumerate();
        let casts: Vec<String> = casts
            .map(|(n, (_, kind))| format!("${}::text::{kind}", n + 2))
            .collect();
        let typed = relation.keys.iter().zip(&names);
        let typed: Vec<String> = typed
            .map(|((_, kind), name)| format!("{name}::{kind}"))
            .collect();
        // The keys come as text; they are compared and ordered as what they are.
        let unpacked: Vec<String> = (0..names.len())
            .map(|n| format!("keys[{}]::{} as {}", n + 1, relation.keys[n].1, names[n]))
            .collect();
        let condition = match after {
            Some(_) => format!("where ({}) > ({})", typed.join(", "), casts.join(", ")),
            None => String::new(),
        };
        let text = relation.rewrite(&format!(
            "select keys, topic, source, id
            from (select keys, topic, source, id, {} from postroad.outbox) as o
            {condition}
            order by {}
            limit $1",
            unpacked.join(", "),
            names.join(", "),
        ));
        let mut reading =
            sqlx::query(AssertSqlSafe(text)).bind(i64::try_from(limit).unwrap_or(i64::MAX));
        for key in after.unwrap_or_default() {
            reading = reading.bind(key.clone());
        }
        let found = statement(DOING, reading.fetch_all(&mut self.connection)).await?;
        let read = |row: &sqlx::postgres::PgRow| {
            let ids = Ids {
                topic: row.try_get::<Option<_>, _>("topic")?.unwrap_or_default(),
                source: row.try_get::<Option<_>, _>("source")?.unwrap_or_default(),
                id: row.try_get::<Option<_>, _>("id")?.unwrap_or_default(),
            };
            Ok((row.try_get("keys")?, ids))
        };
        let rows: Result<Vec<_>, sqlx::Error> = found.iter().map(read).collect();
        rows.map_err(Error::query(DOING))
    }

    /// Rows in the mapped table, counted up to 100,000.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn count_rows(&mut self) -> Result<u64, Error> {
        let table = &self.relation()?.table;
        let text = format!("select count(*) from (select from {table} limit 100000) as rows");
        let counting = sqlx::query_scalar(AssertSqlSafe(text)).fetch_one(&mut self.connection);
        let count: i64 = statement("counting the rows of a mapped table", counting).await?;
        Ok(count.unsigned_abs())
    }

    /// Takes out rows that the snapshot of a position shows that was passed a grace ago, at most `limit`, and notes the position's
    /// number in the same transaction. Returns how many.
    ///
    /// # Errors
    /// The transaction failed.
    pub async fn delete_passed(
        &mut self,
        snapshot: &str,
        reader: Reader,
        number: i64,
        limit: i64,
    ) -> Result<u64, Error> {
        let relation = self.relation()?.clone();
        let (Some(xid), table) = (&relation.xid, &relation.table) else {
            return Ok(0);
        };
        // Each place with its leaf: in a partitioned table a place alone is ambiguous.
        let delete = format!(
            "delete from {table} as t
            using (
                select tableoid as leaf, ctid as place from {table} as passed
                where passed.{xid} < pg_snapshot_xmax($1::text::pg_snapshot)
                    and pg_visible_in_snapshot(passed.{xid}, $1::text::pg_snapshot)
                limit $2
            ) as gone
            where t.ctid = gone.place and t.tableoid = gone.leaf"
        );
        statement("taking passed rows out of a mapped table", async {
            let mut transaction = self.connection.begin().await?;
            guard(&mut transaction, table).await?;
            let deleted = sqlx::query(AssertSqlSafe(delete))
                .bind(snapshot)
                .bind(limit)
                .execute(&mut *transaction)
                .await?
                .rows_affected();
            if deleted > 0 {
                sqlx::query(
                    "insert into postroad.mapped_emptied (broker, origin_id, table_name, number) values ($1, $2, $3, $4)
                    on conflict do nothing",
                )
                .bind(reader.broker)
                .bind(reader.origin.0)
                .bind(&relation.table)
                .bind(number)
                .execute(&mut *transaction)
                .await?;
            }
            transaction.commit().await?;
            Ok(deleted)
        })
        .await
    }

    /// Takes out the marks and notes of the mapped table that a later one has made useless.
    ///
    /// # Errors
    /// A statement failed.
    pub(in crate::store) async fn fold_mapped_marks(&mut self, kept: Uuid) -> Result<bool, Error> {
        let table = self.relation()?.table.clone();
        statement("folding the marks of a mapped table", async {
            sqlx::query("delete from postroad.mapped_mark where table_name = $1 and id <> $2")
                .bind(&table)
                .bind(kept)
                .execute(&mut self.connection)
                .await?;
            sqlx::query(
                "delete from postroad.mapped_emptied as e
                where e.table_name = $1 and e.number < (
                    select max(l.number) from postroad.mapped_emptied as l
                    where l.table_name = e.table_name and l.broker = e.broker and l.origin_id = e.origin_id
                )",
            )
            .bind(&table)
            .execute(&mut self.connection)
            .await?;
            Ok(true)
        })
        .await
    }
}
