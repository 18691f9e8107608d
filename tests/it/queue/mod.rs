//! Queues through their handles, on a real database. A broker of a test runs on a runtime of its own, so that it can be
//! killed: its tasks end wherever they stand, as a process's do.

mod apart;
mod behind;
mod beside;
mod drain;
mod fence;
mod letters;
mod life;
mod locked;
mod matrix;
mod message;
mod order;
mod outage;
mod receive;
mod redrive;
mod renewal;
mod restart;
mod scale;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use postroad::cluster;
use postroad::domain::message::{Data, Message};
use postroad::domain::name::{QueueName, StreamName, Topic, TopicPattern};
use postroad::domain::policy::{RetryPolicy, Settings, Start};
use postroad::queue::{
    self, Declaration, Delivery, Outcome, ReceiveRequest, Received, Status, Verb, VerbItem,
};
use postroad::store::Database;
use postroad::stream::{self, Member};
use postroad::supervisor::Supervisor;
use prometheus_client::registry::Registry;
use tokio::runtime::Runtime;

use super::support;

/// The engines of one broker.
struct Broker {
    runtime: Option<Runtime>,
    supervisor: Supervisor,
    cluster: cluster::Handle,
    stream: stream::Handle,
    queue: queue::Handle,
}

impl Broker {
    /// Starts the engines on the database; the queue engine reaches it by `queue_url`.
    async fn start(url: &str, queue_url: &str, options: queue::Options) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (url, queue_url) = (url.to_owned(), queue_url.to_owned());
        let started = runtime.spawn(async move {
            let database = Database::new(&url, 5).unwrap();
            let supervisor = Supervisor::new();
            let mut registry = Registry::default();
            let mut node = cluster::Options::new("http://127.0.0.1:1");
            node.heartbeat = Duration::from_millis(200);
            node.allow_unsafe_postgres = true;
            let cluster = cluster::start(node, database.clone(), &supervisor, &mut registry)
                .await
                .unwrap();
            let stream = stream::start(
                stream::Options::default(),
                database,
                cluster.clone(),
                &supervisor,
                &mut registry,
            )
            .await
            .unwrap();
            let queue = queue::start(
                options,
                Database::new(&queue_url, 5).unwrap(),
                stream.clone(),
                cluster.clone(),
                &supervisor,
                &mut registry,
            )
            .await
            .unwrap();
            (supervisor, cluster, stream, queue)
        });
        let (supervisor, cluster, stream, queue) = started.await.unwrap();
        Self {
            runtime: Some(runtime),
            supervisor,
            cluster,
            stream,
            queue,
        }
    }

    async fn on(database: &support::TestDatabase) -> Self {
        Self::start(&database.url, &database.url, queue::Options::default()).await
    }

    /// With the tests' queue declared.
    async fn with(database: &support::TestDatabase, settings: Settings) -> Self {
        let broker = Self::on(database).await;
        let declaration = declaration(settings);
        broker.queue.declare(name(), declaration).await.unwrap();
        broker
    }

    /// Ends every task where it stands.
    fn kill(self) {
        drop(self);
    }

    /// Ends in order.
    async fn stop(self) {
        self.supervisor.stop(Duration::from_secs(20)).await.unwrap();
    }

    async fn publish(&self, topic: &str, count: usize) {
        self.publish_keyed(topic, &vec![None; count]).await;
    }

    /// Publishes a message of each key.
    async fn publish_keyed(&self, topic: &str, keys: &[Option<&str>]) {
        let messages = keys
            .iter()
            .map(|key| Message {
                id: uuid::Uuid::new_v4().to_string(),
                source: "/test".into(),
                kind: None,
                topic: Topic::parse(topic).unwrap(),
                key: key.map(str::to_owned),
                subject: None,
                time: None,
                data_content_type: None,
                data_schema: None,
                data: Data::Json(Bytes::from_static(b"{\"a\":1}")),
                extensions: serde_json::Map::new(),
                expected_version: None,
            })
            .collect();
        let member = Member::Publish {
            messages,
            check_ids: false,
            as_one: Vec::new(),
        };
        self.stream.append(member).await.unwrap();
    }

    async fn receive(&self, request: ReceiveRequest) -> Received {
        let queue = name();
        let mut tries = 0;
        loop {
            match self.queue.receive(&queue, request.clone()).await {
                Ok(received) => return received,
                Err(
                    queue::Error::Unavailable { .. }
                    | queue::Error::OutcomeUnknown
                    | queue::Error::NotOwner { .. },
                ) if tries < 200 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(25)).await;
                }
                Err(error) => panic!("receive: {error:?}"),
            }
        }
    }

    /// Receives `count` messages, by as many receives as it takes, and keeps them.
    async fn take(&self, count: usize, visible: Duration) -> Vec<Delivery> {
        let mut taken: Vec<Delivery> = Vec::new();
        while taken.len() < count {
            let received = self
                .receive(ReceiveRequest {
                    max_messages: (count - taken.len()).min(1_000) as u32,
                    max_bytes: 64 << 20,
                    wait: Duration::from_secs(10),
                    visibility_timeout: Some(visible),
                    consumer: Some("test".into()),
                    ..ReceiveRequest::default()
                })
                .await;
            assert!(
                !received.deliveries.is_empty(),
                "{} of {count}",
                taken.len()
            );
            taken.extend(received.deliveries);
            received.handout.written();
        }
        taken
    }

    /// Receives without waiting.
    async fn poll(&self) -> Received {
        let wait = Duration::ZERO;
        self.receive(ReceiveRequest {
            wait,
            ..ReceiveRequest::default()
        })
        .await
    }

    async fn settle(&self, verb: Verb, items: Vec<VerbItem>) -> Vec<Outcome> {
        let mut tries = 0;
        loop {
            match self.queue.settle(&name(), verb, items.clone()).await {
                Ok(outcomes) => return outcomes,
                Err(
                    queue::Error::Unavailable { .. }
                    | queue::Error::OutcomeUnknown
                    | queue::Error::NotOwner { .. },
                ) if tries < 200 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(25)).await;
                }
                Err(error) => panic!("{verb:?}: {error:?}"),
            }
        }
    }

    async fn status(&self) -> Status {
        support::eventually("the queue's status", || async {
            self.queue.describe(&name()).await.unwrap().status
        })
        .await
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn name() -> QueueName {
    QueueName::parse("billing").unwrap()
}

fn declaration(settings: Settings) -> Declaration {
    Declaration {
        stream: StreamName::main(),
        topics: vec![TopicPattern::parse("orders.>").unwrap()],
        start: Start::Earliest,
        settings,
    }
}

/// Failed messages are tried again at once.
fn at_once(max_attempts: u32) -> Settings {
    Settings {
        max_attempts,
        retry: RetryPolicy::List {
            delays: vec![Duration::ZERO],
        },
        ..Settings::default()
    }
}

fn item(receipt: &str) -> VerbItem {
    VerbItem {
        receipt: receipt.to_owned(),
        ..VerbItem::default()
    }
}

fn items(deliveries: &[Delivery]) -> Vec<VerbItem> {
    deliveries
        .iter()
        .map(|delivery| item(&delivery.receipt))
        .collect()
}

fn delayed(deliveries: &[Delivery], delay: Duration) -> Vec<VerbItem> {
    let delay = Some(delay);
    items(deliveries)
        .into_iter()
        .map(|item| VerbItem { delay, ..item })
        .collect()
}

const HOUR: Duration = Duration::from_secs(3_600);

/// What a consumer of a shared handle needs.
fn shared(broker: Broker) -> Arc<Broker> {
    Arc::new(broker)
}
