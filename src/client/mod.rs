//! A typed client for services in Rust: publish, receive, settle; and a [`Worker`] that does the loop around a handler.
//!
//! Every call may be repeated, so every call is: no answer, 429 and 503 are tried again with growing random delays, within
//! a deadline. A lost answer costs nothing: a receive is repeated under its id and gives the same deliveries, a verb gives
//! what it gave, a publish is deduplicated by the ids that its messages got here. What is refused is an error: a call as
//! [`Error`], one delivery as [`Refused`].
//!
//! ```no_run
//! use postroad::client::{Client, Declaration, Failure, Job, NewEvent, Worker};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! #[derive(serde::Deserialize, serde::Serialize)]
//! struct OrderCreated {
//!     order: u64,
//! }
//!
//! let client = Client::new("http://127.0.0.1:8080")?;
//! let queue = client.queue("mailer")?;
//! queue.declare(&Declaration::of("main").topics(["orders.*"])).await?;
//!
//! // Most messages come from an outbox. This one comes over HTTP.
//! let event = NewEvent::json(&OrderCreated { order: 7 })?.key("order-7");
//! client.publish("orders.created", &event).await?;
//!
//! let stop = tokio_util::sync::CancellationToken::new();
//! let report = Worker::new(queue)
//!     .concurrency(8)
//!     .run(stop, async |job: Job| {
//!         let order: OrderCreated = job.event.json().map_err(Failure::reject)?;
//!         // Delivery is at least once: do what must be done so that doing it twice does no harm.
//!         println!("mail about order {}", order.order);
//!         Ok::<_, Failure>(())
//!     })
//!     .await?;
//! println!("{report:?}");
//! # Ok(())
//! # }
//! ```

mod call;
mod cluster;
mod error;
mod event;
mod queue;
mod verbs;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde::Deserialize;
use serde_json::json;

use self::call::Call;
pub use self::cluster::{Cluster, Duty, DutyState, Held, History, Lease, Node, NodeState, Slot};
pub use self::error::{Error, Problem, ProblemField, ProblemKind};
pub use self::event::{Event, NewEvent, Published};
pub use self::queue::{Declaration, Delivery, Description, Queue, Receive, Received, Status};
pub use self::verbs::{Item, Outcomes, Refusal, Refused, Settled, Verb};
pub use self::worker::{Done, Ended, Failure, Job, Report, Worker};
use crate::domain::authority::Authority;
use crate::domain::name::{QueueName, StreamName, Topic};

/// How calls are made.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a call is repeated, from when it is made; a receive's wait is added.
    pub deadline: Duration,
    /// How long one answer is waited for; a receive's wait is added.
    pub answer_timeout: Duration,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// The delay before the first repeat; doubled for each further one. Each is cut at random to half at most.
    pub first_delay: Duration,
    /// The longest delay.
    pub longest_delay: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(60),
            answer_timeout: Duration::from_secs(15),
            connect_timeout: Duration::from_secs(5),
            first_delay: Duration::from_millis(50),
            longest_delay: Duration::from_secs(2),
        }
    }
}

/// A client of one broker. Cheap to clone; clones share their connections.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    http: reqwest::Client,
    base_url: String,
    options: Options,
}

impl Client {
    /// A client of the broker at this URL, `http://host:port`. Nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Client`].
    pub fn new(base_url: impl Into<String>) -> Result<Self, Error> {
        Self::with(base_url, Options::default())
    }

    /// As [`Client::new`], with options.
    ///
    /// # Errors
    /// [`Error::Client`].
    pub fn with(base_url: impl Into<String>, options: Options) -> Result<Self, Error> {
        let mut base_url = base_url.into();
        let mut http = reqwest::Client::builder().connect_timeout(options.connect_timeout);
        if is_of_this_machine(&base_url) {
            http = http.no_proxy();
        }
        let http = http.build().map_err(Error::Client)?;
        base_url.truncate(base_url.trim_end_matches('/').len());
        Ok(Self {
            inner: Arc::new(Inner {
                http,
                base_url,
                options,
            }),
        })
    }

    /// The root of the broker's URLs.
    #[must_use]
    pub fn base_url(&self) -> &str {
        &self.inner.base_url
    }

    fn http(&self) -> &reqwest::Client {
        &self.inner.http
    }

    fn options(&self) -> &Options {
        &self.inner.options
    }

    /// A queue of this name; it need not be there yet.
    ///
    /// # Errors
    /// [`Error::Name`].
    pub fn queue(&self, name: &str) -> Result<Queue, Error> {
        Ok(Queue::new(self.clone(), QueueName::parse(name)?))
    }

    /// Whether the broker answers now, and is ready to serve. Asks once.
    pub async fn is_ready(&self) -> bool {
        let call = Call::new(Method::GET, "/readyz");
        self.call_once(&call).await.is_ok()
    }

    /// Makes a stream of these topics, or changes it to have them.
    ///
    /// # Errors
    /// [`Error::Name`], or a failed call.
    pub async fn declare_stream<T: AsRef<str>>(
        &self,
        name: &str,
        topics: impl IntoIterator<Item = T>,
    ) -> Result<(), Error> {
        let name = StreamName::parse(name)?;
        let topics = topics.into_iter().map(|topic| topic.as_ref().to_owned());
        let topics: Vec<String> = topics.collect();
        let call = Call::new(Method::PUT, format!("/v1/streams/{name}"));
        self.call(call.json(&json!({ "topics": topics }))?).await?;
        Ok(())
    }

    /// Publishes a message. It is durable when this returns, and published once however often the call was repeated.
    ///
    /// # Errors
    /// [`Error::Name`], or a failed call: `id-conflict` when the id stands for another message.
    pub async fn publish(&self, topic: &str, event: &NewEvent) -> Result<Published, Error> {
        let (call, name) = publishing(topic)?;
        let call = call
            .content_type("application/cloudevents+json")
            .json(event)?;
        let mut published = self.published(call).await?;
        let nothing = || Error::Answer {
            call: name,
            source: serde::de::Error::custom("it has no message"),
        };
        published.pop().ok_or_else(nothing)
    }

    /// Publishes up to 1,000 messages, all or none, and tells where each went, in the order sent.
    ///
    /// # Errors
    /// [`Error::Name`], or a failed call.
    pub async fn publish_all(
        &self,
        topic: &str,
        events: &[NewEvent],
    ) -> Result<Vec<Published>, Error> {
        let (call, _) = publishing(topic)?;
        let call = call.content_type("application/cloudevents-batch+json");
        self.published(call.json(&events)?).await
    }

    async fn published(&self, call: Call) -> Result<Vec<Published>, Error> {
        #[derive(Deserialize)]
        struct Answer {
            messages: Vec<Published>,
        }
        Ok(self.ask::<Answer>(call).await?.messages)
    }
}

/// True if a URL leads to this machine. A proxy of the environment (`HTTP_PROXY`) does not lead there.
fn is_of_this_machine(base_url: &str) -> bool {
    let rest = base_url
        .split_once("://")
        .map_or(base_url, |(_, rest)| rest);
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    Authority::parse(&rest[..end]).is_some_and(|authority| authority.host.is_loopback())
}

fn publishing(topic: &str) -> Result<(Call, String), Error> {
    let topic = Topic::parse(topic)?;
    let path = format!("/v1/topics/{topic}/messages");
    let name = format!("POST {path}");
    Ok((Call::new(Method::POST, path), name))
}

#[cfg(test)]
mod tests {
    use super::is_of_this_machine;

    #[test]
    fn a_url_is_of_this_machine_or_not() {
        for (url, is) in [
            ("http://127.0.0.1:8080", true),
            ("http://localhost:8080/prefix", true),
            ("http://[::1]:8080", true),
            ("http://broker.localhost", true),
            ("http://postroad:8080", false),
            ("https://localhost.example.com", false),
            ("http://10.0.0.1/localhost", false),
            ("", false),
        ] {
            assert_eq!(is_of_this_machine(url), is, "{url}");
        }
    }
}
