//! The state of handlers: the engines' handles, and the server's own limits.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::http::HeaderValue;
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::budget::Budget;
use super::door::Hosts;
use super::follow::Readers;
use super::forward::{Gaps, Lines, Peers, Secret};
use super::route::Natures;
use super::unread::PATIENCE;
use super::{Metrics, Readiness};
use crate::domain::cloudevents::Limits;
use crate::domain::id::StreamId;
use crate::domain::name::StreamName;
use crate::supervisor::{Supervisor, beside};
use crate::{cluster, lock, queue, relay, stream, topic};

/// By how much a connection stays longer than answers say.
const KEEP_ALIVE_GRACE: Duration = Duration::from_secs(2);

/// A body above this size is read beside the requests: what it takes would hold up all that share a thread.
pub(in crate::http) const LARGE_BYTES: usize = 256 << 10;
/// Such bodies at a time. They compete with the requests for the processors, and each can take some times its size while it is read.
const READERS: usize = 2;

/// The limits of the server.
#[derive(Debug, Clone)]
pub struct Options {
    /// The limits of a publish.
    pub publish: Limits,
    /// The largest request body, in bytes.
    pub body_max_bytes: usize,
    /// The memory, in bytes, that all bodies on their way in and all answers on their way out may hold: half of it each.
    pub memory_bytes: usize,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// How long a client may take nothing of its answer, and how long an answer may take besides its time at 64 KiB a second.
    pub answer_patience: Duration,
    /// How long a connection may be without a request, and how long a request's head may take to arrive.
    pub idle_timeout: Duration,
    /// The time that answers announce; below it, so that no client counts on a connection that is about to end.
    pub keep_alive: Duration,
    /// The names that requests may ask for besides the usual ones.
    pub allowed_hosts: Vec<String>,
    /// The URL at which others reach this node, other nodes above all; its name is a usual one.
    pub advertise_url: Option<String>,
    /// The most connections at a time; further ones wait in the socket's backlog.
    pub connections_max: usize,
    /// The most requests at a time on one HTTP/2 connection.
    pub streams_per_connection_max: u32,
    /// The most readers by server-sent events at a time; further ones are answered 429.
    pub readers_max: usize,
    /// How long such a reader may take nothing while something waits for it, before it is disconnected.
    pub reader_patience: Duration,
    /// How long such a reader hears nothing at most; below `idle_timeout`.
    pub reader_heartbeat: Duration,
    /// How long the process goes on serving after it said that it is not ready, so that balancers notice.
    pub lame_duck: Duration,
    /// The secret by which nodes recognize each other; by default a key in the broker's database.
    pub node_secret: Option<String>,
    /// How long open connections have to finish after that.
    pub drain: Duration,
}

impl Options {
    /// With connections that stay open so long without a request, at least.
    #[must_use]
    pub fn with_keep_alive(self, keep_alive: Duration) -> Self {
        Self {
            keep_alive,
            idle_timeout: keep_alive + KEEP_ALIVE_GRACE,
            reader_heartbeat: self.reader_heartbeat.min(keep_alive / 2),
            ..self
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            publish: Limits::default(),
            // What 16 MiB of messages need, with the members of a JSON batch around them.
            body_max_bytes: 16 * 1024 * 1024 + 64 * 1024,
            memory_bytes: 256 << 20,
            body_timeout: Duration::from_secs(30),
            answer_patience: PATIENCE,
            idle_timeout: Duration::from_secs(75) + KEEP_ALIVE_GRACE,
            keep_alive: Duration::from_secs(75),
            allowed_hosts: Vec::new(),
            advertise_url: None,
            connections_max: 20_000,
            streams_per_connection_max: 256,
            readers_max: 5_000,
            reader_patience: Duration::from_secs(30),
            reader_heartbeat: Duration::from_secs(15),
            lame_duck: Duration::ZERO,
            node_secret: None,
            drain: Duration::from_secs(10),
        }
    }
}

/// The parts behind the API.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The streams.
    pub stream: stream::Handle,
    /// The queues.
    pub queue: queue::Handle,
    /// The settings of topics.
    pub topics: topic::Handle,
    /// The locks of users.
    pub locks: lock::Handle,
    /// The relays of the origins.
    pub relay: relay::Handle,
    /// This node, for its clock.
    pub cluster: cluster::Handle,
    /// All metrics of the process, for `/metrics`.
    pub registry: Arc<Registry>,
    /// The server's own.
    pub metrics: Metrics,
    /// The reasons why the process is not ready, if it is not.
    pub readiness: Readiness,
}

/// Shared by all requests.
#[derive(Debug, Clone)]
pub(in crate::http) struct State(Arc<Inner>);

#[derive(Debug)]
pub(in crate::http) struct Inner {
    pub(in crate::http) parts: Parts,
    pub(in crate::http) options: Options,
    /// The bytes that bodies may hold together.
    pub(in crate::http) bodies: Budget,
    /// Places for bodies whose reading takes its time.
    reading: Arc<Semaphore>,
    /// The bytes that answers may hold together.
    pub(in crate::http) answers: Budget,
    /// The names that requests may ask for.
    pub(in crate::http) hosts: Hosts,
    /// The readers that follow streams by server-sent events.
    pub(in crate::http) readers: Readers,
    /// For work after a request.
    pub(in crate::http) supervisor: Supervisor,
    /// The natures of the routes.
    pub(in crate::http) natures: Natures,
    /// The way to other nodes.
    pub(in crate::http) peers: Peers,
    pub(in crate::http) lines: Arc<Lines>,
    /// Requests that wait for an owner.
    pub(in crate::http) gaps: Gaps,
    pub(in crate::http) secret: Secret,
    /// The tag that this node shows to others.
    pub(in crate::http) tag: HeaderValue,
    /// The value of `Keep-Alive`; none where it would be below a second.
    pub(in crate::http) keep_alive: Option<HeaderValue>,
    /// Long polls answer at once, with what they have.
    pub(in crate::http) stopping: CancellationToken,
    /// Streams' names by number, as far as they were asked for. Numbers are never used again.
    names: RwLock<HashMap<StreamId, StreamName>>,
}

impl State {
    pub(in crate::http) fn new(
        parts: Parts,
        options: Options,
        address: SocketAddr,
        (supervisor, stopping): (Supervisor, CancellationToken),
        natures: Natures,
    ) -> Self {
        let secret = match &options.node_secret {
            Some(secret) => Secret::new(secret.as_bytes()),
            None => Secret::new(&parts.cluster.identity().receipt_key.0),
        };
        let tag = HeaderValue::try_from(secret.tag()).expect("base64 is visible ASCII");
        Self(Arc::new(Inner {
            keep_alive: keep_alive(options.keep_alive),
            bodies: Budget::new(options.memory_bytes / 2, "bodies"),
            reading: Arc::new(Semaphore::new(READERS)),
            answers: Budget::new(options.memory_bytes / 2, "answers"),
            hosts: Hosts::new(address, &options),
            supervisor: supervisor.clone(),
            peers: Peers::default(),
            lines: Arc::default(),
            gaps: Gaps::default(),
            secret,
            tag,
            natures,
            readers: Readers::new(supervisor, options.readers_max),
            parts,
            options,
            stopping,
            names: RwLock::default(),
        }))
    }

    /// Reads a large body beside the requests.
    pub(in crate::http) async fn beside<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let place = Arc::clone(&self.reading).acquire_owned().await;
        beside(move || {
            // For as long as it takes, also when the client goes away.
            let _place = place;
            read()
        })
        .await
    }

    /// The names of streams; one that was deleted in the meantime is absent.
    pub(in crate::http) async fn stream_names(
        &self,
        ids: impl Iterator<Item = StreamId> + Clone,
    ) -> Result<HashMap<StreamId, StreamName>, stream::Error> {
        let known = |names: &HashMap<StreamId, StreamName>| -> HashMap<StreamId, StreamName> {
            ids.clone()
                .filter_map(|id| Some((id, names.get(&id)?.clone())))
                .collect()
        };
        let found = known(&self.names.read().unwrap_or_else(PoisonError::into_inner));
        if ids.clone().all(|id| found.contains_key(&id)) {
            return Ok(found);
        }
        let list = self.parts.stream.list().await?;
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        *names = list
            .into_iter()
            .map(|stream| (stream.id, stream.name))
            .collect();
        Ok(known(&names))
    }
}

fn keep_alive(time: Duration) -> Option<HeaderValue> {
    let seconds = time.as_secs();
    (seconds > 0).then(|| {
        HeaderValue::try_from(format!("timeout={seconds}")).expect("a number is visible ASCII")
    })
}

impl Deref for State {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}
