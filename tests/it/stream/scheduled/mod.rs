//! Scheduled messages: accepted once, published once when due and in order, cancelled or published and never both, whatever the
//! clock, the nodes and the number.

mod bulk;
mod clock;
mod dues;
mod life;
mod race;
mod recurring;

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use postroad::domain::id::{ScheduledId, StreamId};
use postroad::domain::message::Message;
use postroad::stream::ScheduledQuery;

use super::{Node, leading, message, node, node_with, quick, read};

/// A message that is due at a time.
pub(super) fn due(id: &str, at: DateTime<Utc>) -> Message {
    let mut message = message("later", id, "1");
    let at = at.to_rfc3339_opts(SecondsFormat::Micros, true);
    message.extensions.insert("deliverat".to_owned(), at.into());
    message
}

/// One that is due so many milliseconds from now.
fn due_in(node: &Node, id: &str, milliseconds: i64) -> Message {
    due(
        id,
        node.cluster.now() + TimeDelta::milliseconds(milliseconds),
    )
}

impl Node {
    /// Publishes one message that is due later, and gives its name.
    async fn schedule(&self, message: Message) -> ScheduledId {
        let placed = self.publish(vec![message], true).await.unwrap();
        placed[0].scheduled.unwrap()
    }

    /// Waits until the stream has so many messages, and gives their ids in order.
    pub(super) async fn ids(&self, stream: StreamId, count: i64) -> Vec<String> {
        let mut last = self.stream.last_offset(stream);
        let waiting = last.wait_for(|last| last.0 >= count);
        tokio::time::timeout(Duration::from_secs(120), waiting)
            .await
            .expect("published in time")
            .unwrap();
        self.all_ids(stream).await
    }

    /// The ids of all messages of the stream, in order.
    async fn all_ids(&self, stream: StreamId) -> Vec<String> {
        let mut ids = Vec::new();
        let mut after = 0;
        loop {
            let page = self.stream.read(read(stream, after)).await.unwrap();
            for entry in &page.entries {
                assert!(entry.offset.0 > after, "offsets rise");
                after = entry.offset.0;
                let event: serde_json::Value = serde_json::from_slice(&entry.event).unwrap();
                ids.push(event["id"].as_str().unwrap().to_owned());
            }
            if page.through.0 <= after && page.entries.is_empty() {
                return ids;
            }
            after = after.max(page.through.0);
        }
    }

    /// All that waits.
    async fn waiting(&self) -> Vec<ScheduledId> {
        let query = ScheduledQuery {
            max_messages: 10_000,
            ..ScheduledQuery::default()
        };
        let page = self.stream.list_scheduled(query).await.unwrap();
        page.messages.iter().map(|waiting| waiting.row.id).collect()
    }
}
