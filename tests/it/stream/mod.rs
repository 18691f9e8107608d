//! Streams: the append's promises, with several appenders, faults, and sessions that hold what they read.

mod append;
mod faults;
mod held;
mod keeping;
mod keyed;
pub mod log;
mod plans;
mod priority;
mod scheduled;

use std::time::Duration;

use bytes::Bytes;
use postroad::cluster;
use postroad::domain::id::{Offset, StreamId};
use postroad::domain::message::{Data, Message};
use postroad::domain::name::{StreamName, Topic, TopicPattern};
use postroad::store::Database;
use postroad::stream::{
    self, AppendError, Handle, Member, Options, Placed, Read, Retention, Settings,
};
use postroad::supervisor::Supervisor;
use prometheus_client::registry::Registry;

use crate::support::TestDatabase;

/// A node with a stream engine: what one process runs.
struct Node {
    stream: Handle,
    cluster: cluster::Handle,
    supervisor: Supervisor,
}

async fn node_with(db: &Database, address: &str, options: Options) -> Node {
    let supervisor = Supervisor::new();
    let mut registry = Registry::default();
    let cluster_options = cluster::Options {
        heartbeat: Duration::from_millis(100),
        allow_unsafe_postgres: true,
        ..cluster::Options::new(address)
    };
    let cluster = cluster::start(cluster_options, db.clone(), &supervisor, &mut registry)
        .await
        .unwrap();
    let stream = stream::start(
        options,
        db.clone(),
        cluster.clone(),
        &supervisor,
        &mut registry,
    )
    .await
    .unwrap();
    Node {
        stream,
        cluster,
        supervisor,
    }
}

async fn node(db: &TestDatabase) -> Node {
    node_with(&db.database, "http://one", quick()).await
}

fn quick() -> Options {
    Options {
        poll: Duration::from_millis(20),
        maintenance: Duration::from_millis(20),
        leaf_offsets: 100,
        ..Options::default()
    }
}

/// The same, with a node's clock that is never behind: the database's alone decides, for tests that set it.
fn leading() -> Options {
    Options {
        clock_lead: Duration::from_secs(10 * 365 * 86_400),
        ..quick()
    }
}

impl Node {
    async fn main(&self) -> StreamId {
        self.stream.describe(&StreamName::main()).await.unwrap().id
    }

    async fn publish(
        &self,
        messages: Vec<Message>,
        check_ids: bool,
    ) -> Result<Vec<Placed>, AppendError> {
        let member = Member::Publish {
            messages,
            check_ids,
            as_one: Vec::new(),
        };
        self.stream.append(member).await
    }

    async fn stop(&self) {
        self.supervisor.stop(Duration::from_secs(10)).await.unwrap();
    }
}

fn message(topic: &str, id: &str, data: &str) -> Message {
    Message {
        id: id.to_owned(),
        source: "/test".to_owned(),
        kind: None,
        topic: Topic::parse(topic).unwrap(),
        key: Some(format!("key {}", id.len())),
        subject: None,
        time: chrono::DateTime::from_timestamp_nanos(1_700_000_000_123_456_789).into(),
        data_content_type: Some("application/json".to_owned()),
        data_schema: None,
        data: Data::Json(Bytes::from(data.to_owned())),
        extensions: serde_json::Map::from_iter([("traceparent".to_owned(), "00-1".into())]),
        expected_version: None,
    }
}

fn offsets(placed: &[Placed]) -> Vec<i64> {
    placed.iter().map(|placed| placed.offset.0).collect()
}

fn read(stream: StreamId, after: i64) -> Read {
    Read {
        stream,
        after: Offset(after),
        through: None,
        topics: None,
        key: None,
        max_messages: 10_000,
        max_bytes: 64 << 20,
    }
}

fn settings(patterns: &[&str], retention: Retention) -> Settings {
    Settings {
        patterns: patterns
            .iter()
            .map(|pattern| TopicPattern::parse(pattern).unwrap())
            .collect(),
        retention,
        is_keyed: false,
    }
}
