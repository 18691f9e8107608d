//! A TCP proxy before a Postgres server: it cuts, holds and delays, at once or when it sees certain bytes pass.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    ToServer,
    /// From the server to the client.
    ToClient,
}

/// What becomes of a chunk of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Passed on.
    Forward,
    /// The connection ends, and the chunk is not passed on.
    CutBefore,
    /// The chunk is passed on, then the connection ends.
    CutAfter,
    /// The chunk is lost, and the connection stays.
    Swallow,
}

type Filter = Box<dyn FnMut(Direction, &[u8]) -> Action + Send>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    /// Connections stay and nothing moves on them.
    Held,
    /// New connections are closed at once.
    Cut,
}

#[derive(Clone)]
enum Target {
    Tcp(String),
    Unix(PathBuf),
}

impl Target {
    fn of(database_url: &str) -> Self {
        let options: PgConnectOptions = database_url.parse().unwrap();
        match options.get_socket() {
            Some(folder) => Self::Unix(folder.join(format!(".s.PGSQL.{}", options.get_port()))),
            None => Self::Tcp(format!("{}:{}", options.get_host(), options.get_port())),
        }
    }
}

struct Shared {
    target: Mutex<Target>,
    filter: Mutex<Option<Filter>>,
    delay: watch::Sender<Duration>,
    mode: watch::Sender<Mode>,
    /// Connections made under an older number are closed.
    generation: watch::Sender<u64>,
    accepted: watch::Sender<usize>,
    /// Of the connections accepted up to this number nothing is heard again.
    vanished: watch::Sender<usize>,
}

/// The proxy. Ends, with its connections, when dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: tokio::task::JoinHandle<()>,
}

/// A proxy before the server of a database URL.
pub async fn proxy(database_url: &str) -> Proxy {
    let target = Mutex::new(Target::of(database_url));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shared = Arc::new(Shared {
        target,
        filter: Mutex::new(None),
        delay: watch::Sender::new(Duration::ZERO),
        mode: watch::Sender::new(Mode::Open),
        generation: watch::Sender::new(0),
        accepted: watch::Sender::new(0),
        vanished: watch::Sender::new(0),
    });
    let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
    Proxy {
        shared,
        address,
        accepting,
    }
}

impl Proxy {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same database, user and password, by way of the proxy.
    pub fn url(&self, database_url: &str) -> String {
        let rest = database_url.split_once("://").unwrap().1;
        let (main, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = main.split_once('/').unwrap_or((main, ""));
        let user = authority
            .rsplit_once('@')
            .map_or("postgres", |(user, _)| user);
        let query: Vec<&str> = query
            .split('&')
            .filter(|pair| !pair.is_empty() && !pair.starts_with("host="))
            .collect();
        format!(
            "postgres://{user}@{}/{path}?{}",
            self.address,
            query.join("&")
        )
    }

    /// New connections lead to another server, as an address does after a failover.
    pub fn lead_to(&self, database_url: &str) {
        *self.shared.target.lock().unwrap() = Target::of(database_url);
    }

    /// Ends all connections, and closes new ones at once, until [`Proxy::open`].
    pub fn cut(&self) {
        self.shared.mode.send_replace(Mode::Cut);
        self.cut_once();
    }

    /// Ends all connections; new ones work.
    pub fn cut_once(&self) {
        self.shared.generation.send_modify(|number| *number += 1);
    }

    /// Connections stay open and nothing moves on them, until [`Proxy::open`].
    pub fn hold(&self) {
        self.shared.mode.send_replace(Mode::Held);
    }

    /// Nothing is heard again of the connections that there are, as when a host loses its power; new ones work.
    pub fn vanish(&self) {
        let accepted = *self.shared.accepted.borrow();
        self.shared.vanished.send_replace(accepted);
    }

    /// Lets everything pass again.
    pub fn open(&self) {
        self.shared.mode.send_replace(Mode::Open);
    }

    /// Delays every chunk, in both directions.
    pub fn delay(&self, delay: Duration) {
        self.shared.delay.send_replace(delay);
    }

    /// Decides on every chunk of every connection. Replaces the filter before it.
    pub fn filter(&self, filter: impl FnMut(Direction, &[u8]) -> Action + Send + 'static) {
        *self.shared.filter.lock().unwrap() = Some(Box::new(filter));
    }

    /// Takes the filter away.
    pub fn no_filter(&self) {
        *self.shared.filter.lock().unwrap() = None;
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> watch::Receiver<usize> {
        self.shared.accepted.subscribe()
    }
}

/// Cuts once before each chunk to the server with `before-` in it, and once after each with `after-`, by what follows: three digits. The
/// repeat of it goes through.
pub fn cut_marked(proxy: &Proxy) {
    let mut cut = HashSet::new();
    proxy.filter(move |direction, bytes| {
        let find = |marker: &str| {
            let marker = marker.as_bytes();
            let at = bytes
                .windows(marker.len())
                .position(|window| window == marker)?;
            Some(bytes[at..at + marker.len() + 3].to_vec())
        };
        if direction == Direction::ToClient {
            return Action::Forward;
        }
        match (find("before-"), find("after-")) {
            (Some(marker), _) if cut.insert(marker.clone()) => Action::CutBefore,
            (_, Some(marker)) if cut.insert(marker.clone()) => Action::CutAfter,
            _ => Action::Forward,
        }
    });
}

/// Bytes that show in a statement or its parameters; the next chunk to the server that holds them is acted on, once.
#[derive(Clone, Default)]
pub struct Trap(Arc<Mutex<Option<(Vec<u8>, Action)>>>);

impl Trap {
    /// A trap on a proxy, not armed.
    pub fn on(proxy: &Proxy) -> Self {
        let trap = Self::default();
        let armed = trap.clone();
        proxy.filter(move |direction, chunk| {
            let mut armed = armed.0.lock().unwrap();
            let hit = direction == Direction::ToServer
                && armed
                    .as_ref()
                    .is_some_and(|(bytes, _)| chunk.windows(bytes.len()).any(|part| part == bytes));
            armed
                .take_if(|_| hit)
                .map_or(Action::Forward, |(_, action)| action)
        });
        trap
    }

    /// Waits for these bytes.
    pub fn arm(&self, bytes: impl AsRef<[u8]>, action: Action) {
        *self.0.lock().unwrap() = Some((bytes.as_ref().to_vec(), action));
    }

    /// Whether they came by.
    pub fn has_sprung(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }

    /// Resolves when they have.
    pub async fn sprung(&self, what: &str) {
        super::eventually(what, || async { self.has_sprung().then_some(()) }).await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut_once();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            return;
        };
        if *shared.mode.borrow() == Mode::Cut {
            continue;
        }
        shared.accepted.send_modify(|count| *count += 1);
        let number = *shared.accepted.borrow();
        tokio::spawn(serve(client, number, Arc::clone(&shared)));
    }
}

async fn serve(client: TcpStream, number: usize, shared: Arc<Shared>) {
    client.set_nodelay(true).unwrap();
    let mut generation = shared.generation.subscribe();
    let target = shared.target.lock().unwrap().clone();
    let work = async {
        match &target {
            Target::Tcp(address) => {
                if let Ok(server) = TcpStream::connect(address).await {
                    join(client, server, number, &shared).await;
                }
            }
            Target::Unix(path) => {
                if let Ok(server) = UnixStream::connect(path).await {
                    join(client, server, number, &shared).await;
                }
            }
        }
    };
    tokio::select! {
        () = work => {}
        _ = generation.changed() => {}
    }
}

async fn join<S: AsyncRead + AsyncWrite>(
    client: TcpStream,
    server: S,
    number: usize,
    shared: &Shared,
) {
    let mut vanished = shared.vanished.subscribe();
    let (client_read, client_write) = tokio::io::split(client);
    let (server_read, server_write) = tokio::io::split(server);
    // One way at its end ends both: Postgres' protocol has no half-closed state.
    let mut passing = std::pin::pin!(async {
        tokio::select! {
            () = pass(client_read, server_write, Direction::ToServer, shared) => {}
            () = pass(server_read, client_write, Direction::ToClient, shared) => {}
        }
    });
    let is_gone = tokio::select! {
        () = &mut passing => false,
        gone = vanished.wait_for(|last| *last >= number) => gone.is_ok(),
    };
    if is_gone {
        // The sockets stay open, and nothing moves.
        std::future::pending().await
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    direction: Direction,
    shared: &Shared,
) {
    let mut buffer = vec![0; 64 * 1024];
    let mut mode = shared.mode.subscribe();
    loop {
        let Ok(length) = from.read(&mut buffer).await else {
            return;
        };
        if length == 0 || mode.wait_for(|mode| *mode != Mode::Held).await.is_err() {
            return;
        }
        let delay = *shared.delay.borrow();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let chunk = &buffer[..length];
        let action = match shared.filter.lock().unwrap().as_mut() {
            Some(filter) => filter(direction, chunk),
            None => Action::Forward,
        };
        if action == Action::Swallow {
            continue;
        }
        if action == Action::CutBefore || to.write_all(chunk).await.is_err() {
            return;
        }
        if action == Action::CutAfter {
            let _ = to.flush().await;
            return;
        }
    }
}
