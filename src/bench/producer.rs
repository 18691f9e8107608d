//! Producers: of outbox rows in transactions, of publishes over HTTP, and of rows of the table queue.

use std::sync::Arc;
use std::time::Instant;

use super::Error;
use super::load::Shared;
use super::wire;
use crate::domain::queue::Random;
use crate::store::{self, Connection};

/// The route of a producer's messages.
pub(super) enum Via {
    /// The outbox, by SQL.
    Outbox(Box<Connection>),
    /// The broker, over HTTP.
    Publish(Box<wire::Connection>),
    /// The table queue, by SQL.
    Lease(Box<Connection>),
}

/// One producer.
pub(super) struct Producer {
    pub(super) shared: Arc<Shared>,
    /// Among the producers of the round.
    pub(super) number: usize,
    pub(super) random: Random,
    pub(super) via: Via,
    /// The number of its next message.
    pub(super) next: u64,
}

impl Producer {
    /// Sends until there is enough.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        while let Some(count) = self.shared.next_batch().await {
            self.send(count).await?;
        }
        Ok(())
    }

    /// Sends this many messages at once.
    pub(super) async fn send(&mut self, count: u32) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let numbers = self.next..self.next + u64::from(count);
        let mut texts = Vec::with_capacity(count as usize);
        for number in numbers.clone() {
            let id = format!("{}-{}-{number}", shared.run, self.number);
            let topic = match shared.has_topic_per_queue {
                true => format!("{}.{}", shared.topic, shared.tracker.queue_of(number)),
                false => String::new(),
            };
            let key = shared.keys.next(&mut self.random);
            texts.push((number, id, topic, key));
        }
        let rows: Vec<store::bench::Row<'_>> = texts
            .iter()
            .map(|(number, id, topic, key)| store::bench::Row {
                number: number.cast_signed(),
                id,
                topic: if topic.is_empty() {
                    &shared.topic
                } else {
                    topic
                },
                key: key.map(|key| shared.key_names[key].as_str()),
                payload: &shared.payloads
                    [(*number as usize).wrapping_add(self.number * 7) % shared.payloads.len()],
            })
            .collect();
        let at = Instant::now();
        for number in numbers {
            shared.tracker.sending(self.number, number, at);
        }
        self.next += u64::from(count);
        let producer = i32::try_from(self.number).unwrap_or(i32::MAX);
        let note = shared.note.as_deref();
        match &mut self.via {
            Via::Outbox(connection) => {
                store::bench::insert_outbox(connection, producer, note, &rows).await?;
            }
            Via::Lease(connection) => {
                store::bench::insert_lease(connection, producer, note, &rows).await?;
            }
            Via::Publish(connection) => publish(connection, &rows).await?,
        }
        shared.published(u64::from(count));
        Ok(())
    }
}

/// One message in binary mode, several as a batch for each topic they go to.
async fn publish(
    connection: &mut wire::Connection,
    rows: &[store::bench::Row<'_>],
) -> Result<(), Error> {
    if let [row] = rows {
        let mut headers = format!(
            "content-type: application/json\r\nce-specversion: 1.0\r\nce-id: {}\r\n",
            row.id
        );
        if let Some(key) = row.key {
            headers.push_str("ce-partitionkey: ");
            headers.push_str(key);
            headers.push_str("\r\n");
        }
        let path = format!("/v1/topics/{}/messages", row.topic);
        connection
            .post(&path, &headers, row.payload.as_bytes())
            .await?;
        return Ok(());
    }
    let mut topics: Vec<&str> = rows.iter().map(|row| row.topic).collect();
    topics.sort_unstable();
    topics.dedup();
    for topic in topics {
        let mut body = Vec::with_capacity(rows.len() * 400);
        for row in rows.iter().filter(|row| row.topic == topic) {
            body.extend_from_slice(if body.is_empty() { b"[" } else { b"," });
            for part in ["{\"specversion\":\"1.0\",\"id\":\"", row.id, "\""] {
                body.extend_from_slice(part.as_bytes());
            }
            if let Some(key) = row.key {
                for part in [",\"partitionkey\":\"", key, "\""] {
                    body.extend_from_slice(part.as_bytes());
                }
            }
            for part in [",\"data\":", row.payload, "}"] {
                body.extend_from_slice(part.as_bytes());
            }
        }
        body.push(b']');
        let path = format!("/v1/topics/{topic}/messages");
        let headers = "content-type: application/cloudevents-batch+json\r\n";
        connection.post(&path, headers, &body).await?;
    }
    Ok(())
}
