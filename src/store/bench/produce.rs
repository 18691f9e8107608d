//! Producers' transactions. Each is one statement, so that the load generator itself costs as little as possible.

use super::super::{Connection, Error};

/// A message to be inserted.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Its number among those of its producer.
    pub number: i64,
    /// The CloudEvents id.
    pub id: &'a str,
    /// Its topic.
    pub topic: &'a str,
    /// The ordering key.
    pub key: Option<&'a str>,
    /// The payload.
    pub payload: &'a str,
}

/// Inserts messages into the outbox in one transaction, with a business row if a note is given.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn insert_outbox(
    connection: &mut Connection,
    producer: i32,
    note: Option<&str>,
    rows: &[Row<'_>],
) -> Result<(), Error> {
    let ids: Vec<&str> = rows.iter().map(|row| row.id).collect();
    let topics: Vec<&str> = rows.iter().map(|row| row.topic).collect();
    let keys: Vec<Option<&str>> = rows.iter().map(|row| row.key).collect();
    let payloads: Vec<&str> = rows.iter().map(|row| row.payload).collect();
    let statement = match note {
        Some(_) => {
            "with business as (
                 insert into postroad_bench.business (producer, number, note) values ($5, $6, $7)
             )
             insert into postroad.outbox (topic, key, id, payload)
             select m.topic, m.key, m.id, m.payload
             from unnest($1::text[], $2::text[], $3::text[], $4::text[]) as m (topic, key, id, payload)"
        }
        None => {
            "insert into postroad.outbox (topic, key, id, payload)
             select m.topic, m.key, m.id, m.payload
             from unnest($1::text[], $2::text[], $3::text[], $4::text[]) as m (topic, key, id, payload)"
        }
    };
    let mut query = sqlx::query(statement)
        .bind(topics)
        .bind(keys)
        .bind(ids)
        .bind(payloads);
    if let Some(note) = note {
        let number = rows.first().map_or(0, |row| row.number);
        query = query.bind(producer).bind(number).bind(note);
    }
    query
        .execute(connection)
        .await
        .map_err(Error::query("inserting into the outbox"))?;
    Ok(())
}

/// Inserts payloads and nothing else: as fast as this server takes rows in transactions of this size.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn insert_raw(connection: &mut Connection, payloads: &[&str]) -> Result<(), Error> {
    sqlx::query("insert into postroad_bench.raw (payload) select unnest($1::text[])")
        .bind(payloads)
        .execute(connection)
        .await
        .map_err(Error::query("inserting rows"))?;
    Ok(())
}
