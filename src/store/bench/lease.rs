//! The baseline: a queue made from a table, one row lease per delivery.

use super::super::{Connection, Error};
use super::produce::Row;

/// A row that a consumer has claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// Its place in the table.
    pub id: i64,
    /// The producer that wrote it.
    pub producer: i32,
    /// Its number among those of its producer.
    pub number: i64,
    /// Its payload.
    pub payload: String,
}

/// Inserts messages in one transaction, with a business row if a note is given.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn insert_lease(
    connection: &mut Connection,
    producer: i32,
    note: Option<&str>,
    rows: &[Row<'_>],
) -> Result<(), Error> {
    let numbers: Vec<i64> = rows.iter().map(|row| row.number).collect();
    let keys: Vec<Option<&str>> = rows.iter().map(|row| row.key).collect();
    let payloads: Vec<&str> = rows.iter().map(|row| row.payload).collect();
    let statement = match note {
        Some(_) => {
            "with business as (
                 insert into postroad_bench.business (producer, number, note) values ($1, $5, $6)
             )
             insert into postroad_bench.lease (producer, number, key, payload)
             select $1, m.number, m.key, m.payload
             from unnest($2::bigint[], $3::text[], $4::text[]) as m (number, key, payload)"
        }
        None => {
            "insert into postroad_bench.lease (producer, number, key, payload)
             select $1, m.number, m.key, m.payload
             from unnest($2::bigint[], $3::text[], $4::text[]) as m (number, key, payload)"
        }
    };
    let mut query = sqlx::query(statement)
        .bind(producer)
        .bind(&numbers)
        .bind(keys)
        .bind(payloads);
    if let Some(note) = note {
        query = query.bind(numbers.first().copied().unwrap_or(0)).bind(note);
    }
    query
        .execute(connection)
        .await
        .map_err(Error::query("inserting into the table queue"))?;
    Ok(())
}

/// Claims up to `most` visible rows for 30 seconds.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn claim(connection: &mut Connection, most: i32) -> Result<Vec<Claimed>, Error> {
    let rows = sqlx::query_as::<_, (i64, i32, i64, String)>(
        "with claimed as (
             select id from postroad_bench.lease
             where visible_at <= clock_timestamp()
             order by id limit $1
             for update skip locked
         )
         update postroad_bench.lease
         set visible_at = clock_timestamp() + interval '30 seconds', deliveries = deliveries + 1
         from claimed where lease.id = claimed.id
         returning lease.id, producer, number, payload",
    )
    .bind(most)
    .fetch_all(connection)
    .await
    .map_err(Error::query("claiming from the table queue"))?;
    let claimed = rows
        .into_iter()
        .map(|(id, producer, number, payload)| Claimed {
            id,
            producer,
            number,
            payload,
        });
    Ok(claimed.collect())
}

/// Deletes rows that are done, and gives how many there were.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn delete(connection: &mut Connection, ids: &[i64]) -> Result<u64, Error> {
    let done = sqlx::query("delete from postroad_bench.lease where id = any($1)")
        .bind(ids)
        .execute(connection)
        .await
        .map_err(Error::query("deleting from the table queue"))?;
    Ok(done.rows_affected())
}
