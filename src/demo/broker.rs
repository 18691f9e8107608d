//! The broker of the demo: part of this process, or a separate process when the demo kills it.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use super::Options;
use crate::app;
use crate::client::{self, Client};
use crate::config::Config;
use crate::telemetry::tell;

const START_DEADLINE: Duration = Duration::from_secs(60);
/// Longer than `serve` gives itself.
const STOP_DEADLINE: Duration = Duration::from_secs(40);

/// A broker that the demo started.
#[derive(Debug)]
pub(super) struct Broker {
    client: Client,
    running: Running,
}

#[derive(Debug)]
enum Running {
    /// In this process; taken out to be stopped.
    Inside(Mutex<Option<Box<app::Broker>>>),
    Process(Box<Process>),
}

/// `postroad serve` as a child.
#[derive(Debug)]
struct Process {
    address: SocketAddr,
    url: String,
    log_path: PathBuf,
    child: Mutex<Child>,
}

/// Reasons why the broker did not start, or could not be killed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No port to listen on.
    #[error("no free port at {address}")]
    Port {
        /// The address wanted.
        address: SocketAddr,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The operating system refused.
    #[error("{doing} the broker's process failed")]
    Process {
        /// The operation that failed.
        doing: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The part of this process.
    #[error("the broker in this process did not start")]
    Inside(#[from] app::Error),
    /// The HTTP client.
    #[error("making an HTTP client failed")]
    Client(#[from] client::Error),
    /// It ended, or was not ready in time.
    #[error("it was not ready within {waited:?}; see {log}", log = log.display())]
    NotReady {
        /// How long it was waited for.
        waited: Duration,
        /// The broker's log.
        log: PathBuf,
    },
}

impl Broker {
    /// Starts a broker and waits until it is ready.
    pub(super) async fn start(options: &Options, config: &Config) -> Result<Self, Error> {
        let address = free_address(config.bind)?;
        if options.kills == 0 {
            let mut config = config.clone();
            config.bind = address;
            let broker = Box::pin(app::Broker::start(config)).await?;
            return Ok(Self {
                client: Client::new(broker.url())?,
                running: Running::Inside(Mutex::new(Some(Box::new(broker)))),
            });
        }
        let url = config.database_url.clone().unwrap_or_default();
        let log_path =
            std::env::temp_dir().join(format!("postroad-demo-{}.log", std::process::id()));
        let broker = Self {
            client: Client::new(format!("http://{address}"))?,
            running: Running::Process(Box::new(Process {
                address,
                child: Mutex::new(spawn(address, &url, &log_path)?),
                url,
                log_path,
            })),
        };
        broker.wait_until_ready().await?;
        Ok(broker)
    }

    /// A client of it.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The root of its URLs.
    pub(super) fn base(&self) -> &str {
        self.client.base_url()
    }

    /// A description in one clause.
    pub(super) fn describe(&self) -> String {
        match &self.running {
            Running::Inside(_) => "in this process".into(),
            Running::Process(process) => format!(
                "a separate process, which logs to {}",
                process.log_path.display()
            ),
        }
    }

    /// Kills it with SIGKILL and waits until it is gone. A broker inside this process stays.
    pub(super) async fn kill(&self) -> Result<(), Error> {
        match &self.running {
            Running::Inside(_) => Ok(()),
            Running::Process(process) => process
                .child
                .lock()
                .await
                .kill()
                .await
                .map_err(failed("killing")),
        }
    }

    /// Starts it again at the same address and waits until it is ready.
    pub(super) async fn start_again(&self) -> Result<(), Error> {
        if let Running::Process(process) = &self.running {
            *process.child.lock().await = spawn(process.address, &process.url, &process.log_path)?;
        }
        self.wait_until_ready().await
    }

    async fn wait_until_ready(&self) -> Result<(), Error> {
        let since = Instant::now();
        while !self.client.is_ready().await {
            if let Running::Process(process) = &self.running {
                let mut child = process.child.lock().await;
                let ended = child.try_wait().map_err(failed("watching"))?.is_some();
                if ended || since.elapsed() > START_DEADLINE {
                    return Err(Error::NotReady {
                        waited: since.elapsed(),
                        log: process.log_path.clone(),
                    });
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Stops it in order.
    pub(super) async fn stop(&self) {
        match &self.running {
            Running::Inside(broker) => {
                if let Some(broker) = broker.lock().await.take()
                    && let Err(late) = broker.stop().await
                {
                    tell!("the broker did not stop cleanly: {late}");
                }
            }
            Running::Process(process) => process.stop().await,
        }
    }
}

impl Process {
    async fn stop(&self) {
        let mut child = self.child.lock().await;
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if tokio::time::timeout(STOP_DEADLINE, child.wait())
            .await
            .is_err()
        {
            let _ = child.kill().await;
        }
    }
}

/// The wanted address, or one with a free port if that one is taken.
fn free_address(wanted: SocketAddr) -> Result<SocketAddr, Error> {
    let bind = |address: SocketAddr| std::net::TcpListener::bind(address)?.local_addr();
    bind(wanted)
        .or_else(|_| bind(SocketAddr::new(wanted.ip(), 0)))
        .map_err(|source| Error::Port {
            address: wanted,
            source,
        })
}

fn spawn(address: SocketAddr, url: &str, log_path: &Path) -> Result<Child, Error> {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(log_path)
        .map_err(failed("opening the log of"))?;
    let program = std::env::current_exe().map_err(failed("finding"))?;
    Command::new(program)
        .args(["serve", "--bind", &address.to_string()])
        // Not an argument: everybody on the machine can read those, and the URL may hold a password.
        .env("POSTROAD_DATABASE_URL", url)
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed("opening the log of"))?)
        .stderr(log)
        // Ctrl-C reaches the demo alone, which then stops the broker in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed("starting"))
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Process { doing, source }
}
