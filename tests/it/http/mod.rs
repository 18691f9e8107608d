//! The HTTP API on real engines and a real database.

mod connections;
mod door;
mod follow;
mod framing;
mod keyed;
mod later_schema;

mod letters;
mod load;
mod messages;
mod operate;
mod order;
mod publishing;
mod readable;
mod receive;
mod refusals;
mod scheduled;
mod schedules;
mod schemas;
mod topics;
mod vectors;
mod windows;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use postroad::http::{self, Early, Metrics, Options, Parts, Readiness};
use postroad::supervisor::Supervisor;
use postroad::{cluster, lock, queue, relay, stream, topic};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{self, TestDatabase};

/// A broker without the program around it.
pub struct Api {
    pub address: SocketAddr,
    pub client: reqwest::Client,
    pub readiness: Readiness,
    server: Supervisor,
    engines: Supervisor,
    nodes: Supervisor,
    pub database: TestDatabase,
}

/// An answer, taken apart.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Value,
}

impl Api {
    pub async fn start() -> Self {
        Self::with(Options::default()).await
    }

    pub async fn with(options: Options) -> Self {
        let database = support::database().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut registry = Registry::default();
        let (server, engines, nodes) = (Supervisor::new(), Supervisor::new(), Supervisor::new());
        let db = database.database.clone();
        // The tests' server runs without fsync.
        let node = cluster::Options {
            allow_unsafe_postgres: true,
            ..cluster::Options::new(format!("http://{address}"))
        };
        let cluster = cluster::start(node, db.clone(), &nodes, &mut registry)
            .await
            .unwrap();
        let stream = stream::start(
            stream::Options::default(),
            db.clone(),
            cluster.clone(),
            &engines,
            &mut registry,
        )
        .await
        .unwrap();
        let topics = topic::start(db.clone(), &engines).await.unwrap();
        let locks = lock::start(db.clone(), &engines, &mut registry);
        let relay = relay::start(
            relay::Options::default(),
            db.clone(),
            (stream.clone(), topics.clone()),
            cluster.clone(),
            &engines,
            &mut registry,
        )
        .await
        .unwrap();
        let queue = queue::start(
            queue::Options::default(),
            db,
            stream.clone(),
            cluster.clone(),
            &engines,
            &mut registry,
        )
        .await
        .unwrap();
        let metrics = Metrics::new(&mut registry);
        let readiness = Readiness::new();
        let early = Early {
            readiness: readiness.clone(),
            metrics: metrics.clone(),
            registry: Arc::default(),
        };
        let parts = Parts {
            stream,
            queue,
            topics,
            locks,
            relay,
            cluster,
            registry: Arc::new(registry),
            metrics,
            readiness: readiness.clone(),
        };
        let served = http::serve(listener, early, options, &server).unwrap();
        served.open(parts);
        Self {
            address,
            client: reqwest::Client::new(),
            readiness,
            server,
            engines,
            nodes,
            database,
        }
    }

    /// Ends the server and then the engines.
    pub async fn stop(&self) {
        for step in [&self.server, &self.engines, &self.nodes] {
            step.stop(Duration::from_secs(20)).await.unwrap();
        }
    }

    /// Ends the server alone.
    pub async fn stop_server(&self) {
        self.server.stop(Duration::from_secs(20)).await.unwrap();
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A JSON call.
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        let mut request = self.client.request(method.parse().unwrap(), self.url(path));
        if let Some(body) = body {
            request = request.json(&body);
        }
        answer(request.send().await.unwrap()).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.call("POST", path, Some(body)).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, None).await
    }

    /// Publishes a body of a content type, with headers.
    pub async fn publish(
        &self,
        topic: &str,
        content_type: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> Answer {
        let path = format!("/v1/topics/{topic}/messages");
        let mut request = self
            .client
            .post(self.url(&path))
            .header("content-type", content_type)
            .body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        answer(request.send().await.unwrap()).await
    }

    /// Declares a queue and waits until it answers.
    pub async fn queue(&self, name: &str, declaration: Value) {
        let path = format!("/v1/queues/{name}");
        let declared = self.call("PUT", &path, Some(declaration)).await;
        assert_eq!(declared.status, 201, "{declared:?}");
        support::eventually("the queue answers", || async {
            let found = self.receive(name, json!({"wait_seconds": 0})).await;
            (found.status == 200).then_some(())
        })
        .await;
    }

    pub async fn receive(&self, queue: &str, body: Value) -> Answer {
        self.post(&format!("/v1/queues/{queue}/receive"), body)
            .await
    }
}

/// Takes an answer apart; a body that is not JSON becomes a string.
pub async fn answer(response: reqwest::Response) -> Answer {
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = response.text().await.unwrap();
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Answer {
        status,
        headers,
        body,
    }
}

/// A problem of the kind, complete.
#[track_caller]
pub fn assert_problem(answer: &Answer, status: u16, slug: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    assert_eq!(
        answer.body["type"],
        format!("/problems/{slug}"),
        "{answer:?}"
    );
    assert_eq!(answer.body["status"], status);
    let id = answer.body["request_id"].as_str().unwrap();
    assert_eq!(answer.headers["x-request-id"], id);
}
