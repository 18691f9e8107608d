//! The server: accepts connections, speaks HTTP/1.1 and HTTP/2 without TLS on each, and ends them in order.
//!
//! It serves from the first moment on: until the engines run, `front` answers.
//!
//! Clients hold few resources. There is a cap on connections; there are time limits for a request's head, for idling and
//! for reading a large answer; the head has size limits; and bodies have (in the extractors) a size limit, a time limit and
//! a common budget. At the end readiness goes off first, then long polls answer with what they have, then each connection
//! finishes the requests it has; whatever is left after that is cut.

use std::convert::Infallible;
use std::fmt::Display;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response};
use futures_util::FutureExt as _;
use futures_util::future::Either;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::body::Outgoing;
use super::budget;
use super::connection::{Activity, Watched};
use super::connections::{Connections, Place, SPARE_TIME, Spare};
use super::front::{Early, Front};
use super::route::Routes;
use super::state::{Options, Parts, State};
use super::unread::Standing;
use crate::supervisor::{Backoff, OnEnd, Supervisor};

/// Largest head of an HTTP/1.1 request, and the largest list of headers of HTTP/2.
const HEAD_MAX_BYTES: usize = 32 * 1024;
/// Most headers of an HTTP/1.1 request.
const HEADERS_MAX_COUNT: usize = 128;
/// How often an HTTP/2 peer without traffic is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// How long the rest of HTTP/2's preface may take, and how often it is looked for: less and less.
const PREFACE_TIME: Duration = Duration::from_secs(5);
const PREFACE_PAUSE: Backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(250));

/// A server that runs.
#[derive(Debug, Clone)]
pub struct Server {
    /// The address that it listens on.
    pub address: SocketAddr,
    front: Arc<Front>,
    supervisor: Supervisor,
}

impl Server {
    /// The engines are there: the whole API is served from now on.
    pub fn open(&self, parts: Parts) {
        let ends = (self.supervisor.clone(), self.front.stopping.clone());
        let Routes { router, natures } = super::api();
        let options = self.front.options.clone();
        let state = State::new(parts, options, self.address, ends, natures);
        self.front.open(super::router(router, state));
    }
}

/// Reasons why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The listener has no address.
    #[error("the listening socket could not be used")]
    Listener(#[source] std::io::Error),
}

/// Serves until the supervisor says stop; its stop waits until all connections are done. The API is there once the server is opened
/// ([`Server::open`]).
///
/// # Errors
/// A listener that cannot be used.
pub fn serve(
    listener: TcpListener,
    early: Early,
    options: Options,
    supervisor: &Supervisor,
) -> Result<Server, Error> {
    let address = listener.local_addr().map_err(Error::Listener)?;
    let front = Arc::new(Front::new(early, options, address));
    let server = Accept {
        connections: Connections::new(front.options.connections_max),
        front: Arc::clone(&front),
        listener,
        supervisor: supervisor.clone(),
        close: CancellationToken::new(),
        cut: CancellationToken::new(),
        open: TaskTracker::new(),
    };
    supervisor.spawn("http server", OnEnd::StopProcess, server.run());
    Ok(Server {
        address,
        front,
        supervisor: supervisor.clone(),
    })
}

/// The accept loop.
struct Accept {
    front: Arc<Front>,
    listener: TcpListener,
    supervisor: Supervisor,
    connections: Arc<Connections>,
    /// Connections finish what they have.
    close: CancellationToken,
    /// Connections end now.
    cut: CancellationToken,
    open: TaskTracker,
}

impl Accept {
    async fn run(self) {
        let mut stopping = pin!(self.supervisor.stopping());
        loop {
            tokio::select! {
                () = &mut stopping => break,
                (place, stream) = self.accept() => self.spawn(stream, place),
            }
        }
        let Options {
            lame_duck, drain, ..
        } = self.front.options;
        (self.front.early.readiness).not_ready("http", "the process is stopping");
        // Who never was ready, no balancer has to notice.
        let lame_duck = self.front.routes().map_or(Duration::ZERO, |_| lame_duck);
        let ready_until = Instant::now() + lame_duck;
        loop {
            tokio::select! {
                () = sleep_until(ready_until) => break,
                (place, stream) = self.accept() => self.spawn(stream, place),
            }
        }
        self.front.stopping.cancel();
        self.close.cancel();
        self.open.close();
        if timeout(drain, self.open.wait()).await.is_err() {
            tracing::warn!(
                connections = self.open.len(),
                "connections did not finish in time and are closed"
            );
            self.cut.cancel();
            self.open.wait().await;
        }
    }

    /// Waits for a client, then for a place. A client that waits for a place when this is dropped loses its connection.
    async fn accept(&self) -> (Place, TcpStream) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return (self.connections.place().await, stream),
                Err(error) => {
                    // Out of descriptors, mostly: the next try would fail at once too.
                    tracing::warn!(%error, "accepting a connection failed");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream, place: Place) {
        let connection = Connection {
            connections: Arc::clone(&self.connections),
            idle_timeout: match place.is_spare {
                true => SPARE_TIME.min(self.front.options.idle_timeout),
                false => self.front.options.idle_timeout,
            },
            is_spare: place.is_spare,
            front: Arc::clone(&self.front),
            close: self.close.clone(),
            cut: self.cut.clone(),
        };
        let task = self.open.track_future(async move {
            let _place = place;
            connection.run(stream).await;
        });
        self.supervisor
            .spawn("http connection", OnEnd::Ordinary, task);
    }
}

/// One connection.
struct Connection {
    front: Arc<Front>,
    connections: Arc<Connections>,
    idle_timeout: Duration,
    /// It ends after one request.
    is_spare: bool,
    close: CancellationToken,
    cut: CancellationToken,
}

/// Counts a request until its answer's head is there, whatever way it ends.
struct Busy(Arc<AtomicUsize>);

impl Busy {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connection {
    async fn run(self, stream: TcpStream) {
        // Answers are small and somebody waits for them.
        let _ = stream.set_nodelay(true);
        let gauge = self.front.early.metrics.connections.clone();
        gauge.inc();
        self.serve(stream).await;
        gauge.dec();
    }

    async fn serve(&self, stream: TcpStream) {
        let outgoing = Outgoing::new(self.front.options.answer_patience);
        let activity = Activity::new();
        let busy = Arc::new(AtomicUsize::new(0));
        let entry = (!self.is_spare).then(|| self.connections.enter(&activity, &busy, &outgoing));
        let Some(is_http2) = self.speaks_http2(&stream, &outgoing).await else {
            return;
        };
        let outgoing = match is_http2 {
            true => outgoing.with_windows(),
            false => outgoing,
        };
        let io = Watched::new(stream, activity.clone(), outgoing.clone());
        let on_connection = outgoing.clone();
        let (front, requests) = (Arc::clone(&self.front), Arc::clone(&busy));
        let (connections, is_spare) = (Arc::clone(&self.connections), self.is_spare);
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let busy = Busy::new(&requests);
            let mut request = request.map(Body::new);
            let outgoing = on_connection.clone();
            outgoing.begins(!request.body().is_end_stream());
            request.extensions_mut().insert(outgoing.clone());
            let place = match is_spare {
                true => connections.try_place(),
                false => None,
            };
            if is_spare {
                // Over HTTP/1 the connection ends after one anyway.
                outgoing.is_last();
            }
            if is_spare && place.is_none() {
                request.extensions_mut().insert(Spare);
            }
            let answer = match front.routes() {
                Some(routes) => Either::Left(routes.clone().oneshot(request)),
                None => {
                    let answer = Arc::clone(&front).answer_early(request);
                    Either::Right(Box::pin(answer.map(Ok)))
                }
            };
            async move {
                let _place = place;
                let answer: Result<Response<Body>, Infallible> = answer.await;
                drop(busy);
                outgoing.answered();
                answer.map(|answer| match answer.body().size_hint().exact() {
                    Some(_) => budget::bound(&outgoing, answer),
                    None => {
                        let endless = outgoing.endless();
                        answer.map(|body| {
                            Body::new(body.map_frame(move |frame| {
                                let _ = &endless;
                                frame
                            }))
                        })
                    }
                })
            }
        });
        // Boxed, since a connection is one or the other: it does not take the place of both.
        let watch = (&activity, &*busy, &outgoing);
        if is_http2 {
            let builder = http2_builder(&self.front.options);
            let connection = builder.serve_connection(TokioIo::new(io), service);
            self.drive(Box::pin(connection), watch).await;
        } else {
            let builder = http1_builder(self.idle_timeout, !self.is_spare);
            let connection = builder.serve_connection(TokioIo::new(io), service);
            self.drive(Box::pin(connection), watch).await;
        }
        drop(entry);
    }

    /// The protocol of a client, by its first bytes, which stay in the socket: if they were read here and put back before the rest,
    /// hyper would need a second buffer for the life of the connection. None when the client sends nothing.
    async fn speaks_http2(&self, stream: &TcpStream, outgoing: &Outgoing) -> Option<bool> {
        const START: &[u8] = b"PRI ";
        let mut over = pin!(sleep(self.idle_timeout));
        let mut start = [0; START.len()];
        let mut pause = PREFACE_PAUSE;
        let mut has_begun = false;
        loop {
            let seen = tokio::select! {
                seen = stream.peek(&mut start) => seen.ok()?,
                // Another is to have its place: nothing was asked yet.
                () = outgoing.attention() => return None,
                () = self.close.cancelled() => return None,
                () = &mut over => return None,
            };
            if seen == 0 {
                return None;
            }
            if !START.starts_with(&start[..seen]) {
                return Some(false);
            }
            if seen == START.len() {
                return Some(true);
            }
            // Bytes that were peeked at are there again at once. A preface comes in one piece, but for a client that means to keep this awake.
            if !std::mem::replace(&mut has_begun, true) {
                let until = Instant::now() + PREFACE_TIME.min(self.idle_timeout);
                over.as_mut().reset(until);
            }
            tokio::select! {
                () = pause.wait() => {}
                () = self.close.cancelled() => return None,
                () = &mut over => return None,
            }
        }
    }

    /// Serves a connection until it ends, is told to, is idle for too long, or does not take its answer.
    async fn drive<C>(
        &self,
        mut connection: Pin<Box<C>>,
        (activity, busy, outgoing): (&Activity, &AtomicUsize, &Outgoing),
    ) where
        C: GracefulConnection,
        C::Error: Display,
    {
        let mut is_closing = false;
        // Over HTTP/1 a spare place ends with its request. Over HTTP/2 a client could keep it by pings.
        let mut spare_since = (self.is_spare && outgoing.has_windows()).then(Instant::now);
        loop {
            let standing = outgoing.standing();
            let idle_at = self.idle_at(activity, outgoing, standing, spare_since);
            let wake_at = match standing {
                Standing::Over => {
                    tracing::debug!("a client did not take its answer in time");
                    return;
                }
                Standing::LookAt(at) => at.min(idle_at),
                Standing::Taken => idle_at,
            };
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended with an error");
                    }
                    return;
                }
                () = self.close.cancelled(), if !is_closing => {
                    is_closing = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = self.cut.cancelled() => return,
                () = outgoing.attention() => {
                    if outgoing.has_last() && !is_closing {
                        is_closing = true;
                        connection.as_mut().graceful_shutdown();
                    }
                    if outgoing.is_to_end() {
                        if is_idle(busy, outgoing) {
                            tracing::debug!("closed an idle connection for a new one");
                            return;
                        }
                        // A request came in between: it is answered, and is the last.
                        is_closing = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
                () = sleep_until(wake_at) => {
                    let standing = outgoing.standing();
                    let idle_at = self.idle_at(activity, outgoing, standing, spare_since);
                    if Instant::now() < idle_at {
                        continue;
                    }
                    // A long poll is silent and not idle. It ends by itself; look again a while later.
                    if busy.load(Ordering::Relaxed) > 0 {
                        activity.touch();
                        spare_since = spare_since.map(|_| Instant::now());
                    } else {
                        tracing::debug!("a connection was idle for too long");
                        return;
                    }
                }
            }
        }
    }

    /// When the connection has been idle for too long. A client that is to take something has its patience for that, however short the
    /// time between requests is; at a spare place nothing lengthens the time.
    fn idle_at(
        &self,
        activity: &Activity,
        outgoing: &Outgoing,
        standing: Standing,
        spare_since: Option<Instant>,
    ) -> Instant {
        let is_taking = standing != Standing::Taken || outgoing.is_busy();
        let time = match is_taking && !self.is_spare {
            true => self.idle_timeout.max(self.front.options.answer_patience),
            false => self.idle_timeout,
        };
        spare_since.unwrap_or_else(|| activity.last()) + time
    }
}

fn is_idle(busy: &AtomicUsize, outgoing: &Outgoing) -> bool {
    busy.load(Ordering::Relaxed) == 0 && !outgoing.is_busy()
}

fn http1_builder(idle_timeout: Duration, keeps_alive: bool) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .keep_alive(keeps_alive)
        .header_read_timeout(idle_timeout)
        .max_headers(HEADERS_MAX_COUNT)
        .max_buf_size(HEAD_MAX_BYTES)
        .half_close(false);
    builder
}

fn http2_builder(options: &Options) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(options.streams_per_connection_max)
        .max_header_list_size(u32::try_from(HEAD_MAX_BYTES).unwrap_or(u32::MAX))
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL);
    builder
}
