//! A queue, through its broker: declaring it, receiving from it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::Client;
use super::call::{Call, is_not_found};
use super::error::Error;
use super::event::Event;
use super::verbs::{Outcomes, Settlement, Verb};
use crate::domain::name::QueueName;

/// A queue of a broker. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Queue {
    client: Client,
    name: QueueName,
}

/// A queue's settings. A setting that is left out takes its default.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(transparent)]
pub struct Declaration {
    members: Map<String, Value>,
}

impl Declaration {
    /// A declaration for this stream: `main`, unless you declared others.
    #[must_use]
    pub fn of(stream: &str) -> Self {
        Self::default().set("stream", stream)
    }

    /// The topics that it takes, 1 to 100 patterns: `orders.*` one token, `orders.>` the rest. All without.
    #[must_use]
    pub fn topics<T: AsRef<str>>(self, topics: impl IntoIterator<Item = T>) -> Self {
        let topics = topics.into_iter().map(|topic| topic.as_ref().into());
        self.set("topics", Value::Array(topics.collect()))
    }

    /// Starts after the newest message, not at the oldest one that the stream has.
    #[must_use]
    pub fn from_latest(self) -> Self {
        self.set("start", "latest")
    }

    /// How long a delivery is held when the receive does not say; 30 s without.
    #[must_use]
    pub fn visibility_timeout(self, timeout: Duration) -> Self {
        self.set("visibility_timeout_seconds", timeout.as_secs_f64())
    }

    /// Attempts before a message is a dead letter; 16 without.
    #[must_use]
    pub fn max_attempts(self, attempts: u32) -> Self {
        self.set("max_attempts", attempts)
    }

    /// Sets the delays before retries: one delay per attempt; the last one applies to all later attempts.
    #[must_use]
    pub fn retry_after(self, delays: impl IntoIterator<Item = Duration>) -> Self {
        let delays = delays.into_iter().map(|delay| delay.as_secs_f64());
        let delays: Vec<f64> = delays.collect();
        self.set("retry", serde_json::json!({ "delays_seconds": delays }))
    }

    /// Any other member of the declaration, by its name in the API.
    #[must_use]
    pub fn set(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.members.insert(name.to_owned(), value.into());
        self
    }
}

/// A queue as it is.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Description {
    /// Its stream.
    pub stream: String,
    /// The incarnation: receipts of another are gone.
    pub generation: i64,
    /// Its numbers now; None while its state is being recovered.
    pub status: Option<Status>,
}

/// A queue's numbers at one moment.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// Unsettled messages.
    pub depth: u64,
    /// Unsettled messages that are handed out and live.
    pub in_flight: u64,
    /// Unsettled messages that are held back by time.
    pub delayed: u64,
    /// Unsettled messages that are ready to go out.
    pub ready: u64,
    /// Dead letters that are still there.
    pub dead_letters: u64,
    /// Receives that wait.
    pub waiters: u64,
}

/// How to receive.
#[derive(Debug, Clone, PartialEq)]
pub struct Receive {
    /// Most messages, 1 to 1,000.
    pub max_messages: u32,
    /// Most bytes of events; one message always comes, however large.
    pub max_bytes: Option<u64>,
    /// How long to wait for the first message, at most 50 s.
    pub wait: Duration,
    /// From the first message on, how long to wait for others until there are `max_messages`, at most 5 s.
    pub batch_wait: Duration,
    /// Held for so long, 1 s to 12 h; as the queue says without.
    pub visibility_timeout: Option<Duration>,
    /// The consumer's name, shown in the list of live deliveries.
    pub consumer: Option<String>,
    /// The name of this receive: the same again gives the same deliveries while they live. A random one without, so
    /// that a lost answer comes again.
    pub receive_id: Option<String>,
    /// Receipts of deliveries that are done, at most 1,000: acknowledged before anything else, in the same commit.
    pub ack: Vec<String>,
}

impl Default for Receive {
    fn default() -> Self {
        Self {
            max_messages: 10,
            max_bytes: None,
            wait: Duration::from_secs(20),
            batch_wait: Duration::ZERO,
            visibility_timeout: None,
            consumer: None,
            receive_id: None,
            ack: Vec::new(),
        }
    }
}

/// Without any wait a full queue is answered 429, which would be repeated; with the shortest it says why it gives nothing.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

#[derive(Serialize)]
struct WireReceive<'a> {
    max_messages: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_bytes: Option<u64>,
    wait_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    batch_wait_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    visibility_timeout_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    consumer: Option<&'a str>,
    receive_id: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ack: Vec<WireAck<'a>>,
}

#[derive(Serialize)]
struct WireAck<'a> {
    receipt: &'a str,
}

/// The received messages.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Received {
    /// The results for [`Receive::ack`], in the order of the request.
    pub acked: Outcomes,
    /// The messages, by offset.
    pub deliveries: Vec<Delivery>,
    /// The reason why there are no messages: `empty`, `paused`, `in_flight_full`, `waiting_for_keys` or `delayed`.
    pub reason: Option<String>,
    /// The next time when a delayed message falls due or a live delivery expires, if there are no deliveries.
    pub next_due_at: Option<DateTime<Utc>>,
}

#[derive(Deserialize)]
struct WireReceived {
    #[serde(default)]
    ack: Settlement,
    deliveries: Vec<Delivery>,
    reason: Option<String>,
    next_due_at: Option<DateTime<Utc>>,
}

/// One delivery of one message.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Delivery {
    /// The receipt that settles this delivery.
    pub receipt: String,
    /// The delivery's number, which rises with each delivery of the message.
    pub delivery: u32,
    /// The attempt's number. Released deliveries do not count.
    pub attempt: u32,
    /// Its place in the stream.
    pub offset: i64,
    /// The topic that it was published to.
    pub topic: String,
    /// This consumer holds the delivery until then.
    pub visible_until: DateTime<Utc>,
    /// The message.
    pub event: Event,
}

impl Queue {
    pub(super) fn new(client: Client, name: QueueName) -> Self {
        Self { client, name }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn path(&self, rest: &str) -> String {
        format!("/v1/queues/{}{rest}", self.name)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &QueueName {
        &self.name
    }

    /// Makes the queue, or changes it to be so. Where it starts is fixed when it is made: a message that is published
    /// after this returns is delivered.
    ///
    /// # Errors
    /// A failed call.
    pub async fn declare(&self, declaration: &Declaration) -> Result<(), Error> {
        let call = Call::new(Method::PUT, self.path("")).json(declaration)?;
        self.client.call(call).await?;
        Ok(())
    }

    /// Describes the queue, with its numbers now; None if there is no such queue.
    ///
    /// # Errors
    /// A failed call.
    pub async fn describe(&self) -> Result<Option<Description>, Error> {
        let call = Call::new(Method::GET, self.path(""));
        self.client.find(call).await
    }

    /// Deletes the queue, its dead letters with it. That it is not there is a success.
    ///
    /// # Errors
    /// A failed call.
    pub async fn delete(&self) -> Result<(), Error> {
        match self
            .client
            .call(Call::new(Method::DELETE, self.path("")))
            .await
        {
            Err(error) if !is_not_found(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Receives, and waits for the first message if necessary. If an answer is lost, the call asks again under its id and gets the
    /// same deliveries. Dropping the future ends the wait; deliveries that were on their way then expire, or come again under the
    /// same [`Receive::receive_id`].
    ///
    /// # Errors
    /// A failed call.
    pub async fn receive(&self, receive: &Receive) -> Result<Received, Error> {
        let random;
        let receive_id = match &receive.receive_id {
            Some(id) => id,
            None => {
                random = Uuid::new_v4().to_string();
                &random
            }
        };
        let body = WireReceive {
            max_messages: receive.max_messages,
            max_bytes: receive.max_bytes,
            wait_seconds: receive.wait.max(SHORTEST_WAIT).as_secs_f64(),
            batch_wait_seconds: (!receive.batch_wait.is_zero())
                .then_some(receive.batch_wait.as_secs_f64()),
            visibility_timeout_seconds: receive
                .visibility_timeout
                .map(|timeout| timeout.as_secs_f64()),
            consumer: receive.consumer.as_deref(),
            receive_id,
            ack: receive
                .ack
                .iter()
                .map(|receipt| WireAck { receipt })
                .collect(),
        };
        let call = Call::new(Method::POST, self.path("/receive")).json(&body)?;
        let received: WireReceived = self.client.ask(call.waiting(receive.wait)).await?;
        Ok(Received {
            acked: Outcomes::read(Verb::Ack, received.ack),
            deliveries: received.deliveries,
            reason: received.reason,
            next_due_at: received.next_due_at,
        })
    }
}
