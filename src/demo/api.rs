//! The part of Postroad's HTTP API that the shop uses, as a client in any language would.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

/// A client of one broker. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Api {
    client: reqwest::Client,
    base: String,
}

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer, or one that broke off: the broker is not there, or has just gone.
    #[error("{call} got no answer")]
    NoAnswer {
        /// Method and path.
        call: String,
        /// What the HTTP client says.
        #[source]
        source: reqwest::Error,
    },
    /// The broker refused.
    #[error("{call} was answered {status}: {body}")]
    Refused {
        /// Method and path.
        call: String,
        /// The HTTP status.
        status: u16,
        /// The problem document.
        body: String,
    },
    /// The answer is not what the contract says.
    #[error("{call} was answered with something else than expected")]
    Answer {
        /// Method and path.
        call: String,
        /// Where the JSON differs.
        #[source]
        source: serde_json::Error,
    },
}

impl Error {
    /// Whether a repeat can help: the broker is away, starting or overloaded.
    pub(super) const fn is_transient(&self) -> bool {
        match self {
            Self::NoAnswer { .. } => true,
            Self::Refused { status, .. } => matches!(*status, 421 | 429 | 500..),
            Self::Answer { .. } => false,
        }
    }
}

/// One delivery.
#[derive(Debug, Deserialize)]
pub(super) struct Delivery {
    pub(super) receipt: String,
    pub(super) delivery: i32,
    pub(super) attempt: i32,
    pub(super) offset: i64,
    pub(super) event: Event,
}

/// What the shop reads of the CloudEvent.
#[derive(Debug, Deserialize)]
pub(super) struct Event {
    pub(super) data: OrderCreated,
}

/// The payload that the producers write.
#[derive(Debug, Deserialize)]
pub(super) struct OrderCreated {
    pub(super) order: Uuid,
    pub(super) product: i32,
    pub(super) version: i64,
}

#[derive(Debug, Deserialize)]
struct Received {
    deliveries: Vec<Delivery>,
}

/// One item's answer to a verb.
#[derive(Debug, Deserialize)]
pub(super) struct Answer {
    pub(super) receipt: String,
    pub(super) result: String,
}

#[derive(Debug, Deserialize)]
struct Answers {
    deliveries: Vec<Answer>,
}

impl Api {
    pub(super) fn new(base: String) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(2))
            // Longer than the longest poll.
            .timeout(Duration::from_secs(60))
            .build()?;
        Ok(Self { client, base })
    }

    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Whether the broker answers and is ready to serve.
    pub(super) async fn is_ready(&self) -> bool {
        self.call(reqwest::Method::GET, "/readyz", None)
            .await
            .is_ok()
    }

    pub(super) async fn declare_stream(&self, name: &str, topics: &[&str]) -> Result<(), Error> {
        let body = json!({ "topics": topics });
        let path = format!("/v1/streams/{name}");
        self.call(reqwest::Method::PUT, &path, Some(body)).await?;
        Ok(())
    }

    /// Which stream the queue reads; `None` without such a queue.
    pub(super) async fn stream_of_queue(&self, name: &str) -> Result<Option<String>, Error> {
        #[derive(Deserialize)]
        struct Queue {
            stream: String,
        }
        let path = format!("/v1/queues/{name}");
        match self.call(reqwest::Method::GET, &path, None).await {
            Ok(body) => Ok(Some(parse::<Queue>(&path, &body)?.stream)),
            Err(Error::Refused { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn declare_queue(
        &self,
        name: &str,
        stream: &str,
        topic: &str,
    ) -> Result<(), Error> {
        let body = json!({ "stream": stream, "topics": [topic], "start": "latest" });
        let path = format!("/v1/queues/{name}");
        self.call(reqwest::Method::PUT, &path, Some(body)).await?;
        Ok(())
    }

    pub(super) async fn delete_queue(&self, name: &str) -> Result<(), Error> {
        let path = format!("/v1/queues/{name}");
        self.call(reqwest::Method::DELETE, &path, None).await?;
        Ok(())
    }

    pub(super) async fn receive(
        &self,
        queue: &str,
        consumer: &str,
        max_messages: u32,
        wait: Duration,
    ) -> Result<Vec<Delivery>, Error> {
        let body = json!({
            "max_messages": max_messages,
            "wait_seconds": wait.as_secs(),
            "consumer": consumer,
        });
        let path = format!("/v1/queues/{queue}/receive");
        let answer = self.call(reqwest::Method::POST, &path, Some(body)).await?;
        Ok(parse::<Received>(&path, &answer)?.deliveries)
    }

    /// Acknowledges, or with a delay refuses, some deliveries. Safe to repeat: every verb is idempotent.
    pub(super) async fn settle(
        &self,
        queue: &str,
        receipts: &[String],
        nack_after: Option<Duration>,
    ) -> Result<Vec<Answer>, Error> {
        let items: Vec<Value> = receipts
            .iter()
            .map(|receipt| match nack_after {
                None => json!({ "receipt": receipt }),
                Some(delay) => {
                    json!({ "receipt": receipt, "delay_seconds": delay.as_secs(), "reason": "the courier is out" })
                }
            })
            .collect();
        let verb = if nack_after.is_some() { "nack" } else { "ack" };
        let path = format!("/v1/queues/{queue}/{verb}");
        let body = json!({ "deliveries": items });
        let answer = self.call(reqwest::Method::POST, &path, Some(body)).await?;
        Ok(parse::<Answers>(&path, &answer)?.deliveries)
    }

    async fn call(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Vec<u8>, Error> {
        let call = || format!("{method} {path}");
        let no_answer = |source| Error::NoAnswer {
            call: call(),
            source,
        };
        let mut request = self
            .client
            .request(method.clone(), format!("{}{path}", self.base));
        if let Some(body) = &body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(no_answer)?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(no_answer)?;
        if status.is_success() {
            return Ok(body.to_vec());
        }
        Err(Error::Refused {
            call: call(),
            status: status.as_u16(),
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }
}

fn parse<'a, T: Deserialize<'a>>(path: &str, body: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|source| Error::Answer {
        call: path.to_owned(),
        source,
    })
}
