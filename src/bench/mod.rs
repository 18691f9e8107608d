//! `postroad bench`: measures what a broker on this machine and this Postgres can do, and checks that it did it right.
//!
//! Producers and consumers run in this process. The broker is a separate process, so that the processor time of each, and
//! of Postgres, can be told apart. Every message is recorded when it is sent and when it arrives: a run that loses, doubles
//! or reorders a message fails. With `--baseline` the same Postgres is measured without the broker, in turn with it,
//! because only ratios within one run mean something on another machine.

mod api;
mod broker;
mod consumer;
mod figures;
mod html;
mod live;
mod load;
mod measure;
mod metrics;
mod options;
mod plan;
mod proc;
mod producer;
mod random;
mod report;
mod round;
mod series;
mod tracker;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use self::broker::Broker;
use self::measure::Measured;
use self::options::Load;
pub use self::options::{Ack, Options, Scenario, Skew};
use self::plan::Variant;
pub use self::report::Report;
use crate::config;
use crate::local_postgres;
use crate::store::bench::{Server, Tables};
use crate::store::{self, Connection};
use crate::supervisor::{OnEnd, Supervisor};
use crate::telemetry::{self, Hangup, tell};

/// How long the private Postgres may take to stop.
const POSTGRES_STOP: Duration = Duration::from_secs(30);
/// Updates that age the tables of `held`.
const AGE_UPDATES: u32 = 20_000;

/// Reasons why a bench could not finish.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable or postroad.toml.
    #[error("the configuration is not valid")]
    Config(#[from] config::Error),
    /// `--url` is not one.
    #[error(
        "`{url}` is not the URL of a broker: use http://host:port, without TLS and without a password"
    )]
    Url {
        /// The given text.
        url: String,
    },
    /// `--url` alone.
    #[error("--url needs --database-url: the database of that broker, where producers insert")]
    NoDatabaseUrl,
    /// Nothing answers there.
    #[error("no broker is ready at {url}")]
    NotThere {
        /// The URL where it was expected.
        url: String,
    },
    /// A file of payloads that cannot be read.
    #[error("reading {path} failed", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A line of it is not JSON.
    #[error("{path}, line {line} is not a JSON document", path = path.display())]
    Payload {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The fault.
        #[source]
        source: serde_json::Error,
    },
    /// It is empty.
    #[error("{path} has no payload", path = path.display())]
    NoPayload {
        /// The file.
        path: PathBuf,
    },
    /// A result that could not be written.
    #[error("writing {path} failed", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// No private Postgres.
    #[error("the private Postgres did not start")]
    LocalPostgres(#[from] local_postgres::Error),
    /// The database.
    #[error("the database failed")]
    Store(#[from] store::Error),
    /// Somebody else's tables are in the way.
    #[error(
        "the database has a schema `postroad_bench` that was not made by a bench: drop it, or give the bench another --database-url"
    )]
    SchemaTaken,
    /// One at a time.
    #[error("another bench is running on this database")]
    InUse,
    /// A call that is not part of the load.
    #[error("the broker refused a call")]
    Api(#[from] api::Error),
    /// A call of the load.
    #[error("the load failed")]
    Wire(#[from] wire::Error),
    /// The HTTP client.
    #[error("making an HTTP client failed")]
    Client(#[from] reqwest::Error),
    /// No free port.
    #[error("no free port for the broker")]
    Port(#[source] std::io::Error),
    /// The broker's process.
    #[error("running the broker's process failed")]
    Process(#[source] std::io::Error),
    /// It ended, or was not ready in time.
    #[error("the broker did not start; see {log}", log = log.display())]
    NotReady {
        /// The log that it wrote.
        log: PathBuf,
    },
    /// No handler for Ctrl-C.
    #[error("listening for signals failed")]
    Signal(#[source] std::io::Error),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// The report cannot be printed.
    #[error("writing the report to standard output failed")]
    Print(#[source] std::io::Error),
    /// A task ended without a word, or did not end.
    #[error("a task of the bench ended unexpectedly")]
    TaskEnded,
}

/// Ctrl-C, SIGTERM and SIGHUP: the bench ends in order, so that it leaves nothing behind.
#[derive(Debug, Clone)]
struct Interrupt(CancellationToken);

impl Interrupt {
    fn listen(supervisor: &Supervisor) -> Result<Self, Error> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut hangup = Hangup::listen().map_err(Error::Signal)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signal)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signal)?;
        let token = CancellationToken::new();
        let (heard, stop) = (token.clone(), supervisor.clone());
        supervisor.spawn("interrupt", OnEnd::Ordinary, async move {
            tokio::select! {
                _ = interrupt.recv() => heard.cancel(),
                _ = terminate.recv() => heard.cancel(),
                () = hangup.received() => heard.cancel(),
                () = stop.stopping() => {}
            }
        });
        Ok(Self(token))
    }

    /// Waits so long, or fails when interrupted. Cancel-safe.
    async fn pause(&self, time: Duration) -> Result<(), Error> {
        tokio::select! {
            () = tokio::time::sleep(time) => Ok(()),
            () = self.0.cancelled() => Err(Error::Interrupted),
        }
    }
}

/// State that all rounds share.
struct Bench {
    options: Options,
    load: Load,
    /// Stands in every name and id of this run.
    run: String,
    broker: Broker,
    /// A connection for queries beside the load.
    connection: Connection,
    server: Server,
    postgres: Option<proc::Postgres>,
    payloads: Arc<[String]>,
    interrupt: Interrupt,
}

impl Bench {
    fn patience(&self) -> Duration {
        Duration::from_secs(self.options.patience_seconds)
    }

    /// A short run ages its tables less.
    fn age_updates(&self) -> u32 {
        let seconds = u32::try_from(self.load.seconds).unwrap_or(u32::MAX);
        AGE_UPDATES.min(seconds.saturating_mul(1_000))
    }

    /// A short run sends fewer single messages.
    fn singles(&self, most: u32) -> u32 {
        let seconds = u32::try_from(self.load.seconds).unwrap_or(u32::MAX);
        most.min(seconds.saturating_mul(2))
    }
}

/// Runs a bench, and prints the result to standard output.
///
/// # Errors
/// It could not be run to its end. One that was, and found something wrong, gives a report that is not clean.
pub async fn run(options: Options) -> Result<Report, Error> {
    let supervisor = Supervisor::new();
    let interrupt = Interrupt::listen(&supervisor)?;
    let result = run_with(options, &supervisor, interrupt).await;
    // After everything that uses it.
    if supervisor.stop(POSTGRES_STOP).await.is_err() {
        tell!("the private Postgres is still stopping");
    }
    result
}

async fn run_with(
    options: Options,
    postgres: &Supervisor,
    interrupt: Interrupt,
) -> Result<Report, Error> {
    let payloads = match &options.payload_file {
        Some(path) => random::payloads_of(path)?,
        None => random::payloads(options.payload_bytes, options.seed),
    };
    let broker = Broker::start(&options, postgres, &interrupt).await?;
    let mut bench = match prepare(options, broker, payloads, interrupt).await {
        Ok(bench) => bench,
        Err((broker, error)) => {
            broker.stop().await;
            return Err(error);
        }
    };
    let result = measure(&mut bench).await;
    let dropped = store::bench::drop_tables(&mut bench.connection).await;
    let report = result.map(|results| Report::new(&bench, results));
    let options = bench.options.clone();
    drop(bench.connection);
    bench.broker.stop().await;
    dropped?;
    let report = report?;
    telemetry::print(&report.to_text()).map_err(Error::Print)?;
    report.write(&options)?;
    Ok(report)
}

/// Everything before the first round. An error gives the broker back, to be stopped.
async fn prepare(
    options: Options,
    broker: Broker,
    payloads: Vec<String>,
    interrupt: Interrupt,
) -> Result<Bench, (Broker, Error)> {
    let asking = async {
        let mut connection = broker.database.connect().await?;
        match store::bench::create_tables(&mut connection).await? {
            Tables::Made => {}
            Tables::Taken => return Err(Error::SchemaTaken),
            Tables::InUse => return Err(Error::InUse),
        }
        let server = store::bench::server(&mut connection).await?;
        Ok((connection, server))
    };
    match asking.await {
        Ok((connection, server)) => Ok(Bench {
            load: options.load(),
            // Short, since it is in every id.
            run: short_name(),
            postgres: proc::Postgres::find(server.backend_pid, server.started_at),
            options,
            broker,
            connection,
            server,
            payloads: payloads.into(),
            interrupt,
        }),
        Err(error) => Err((broker, error)),
    }
}

fn short_name() -> String {
    let bits = uuid::Uuid::new_v4().as_u128();
    format!("{:06x}", bits & 0xff_ffff)
}

/// All rounds of all variants, in turn.
async fn measure(bench: &mut Bench) -> Result<Vec<(Variant, Vec<Measured>)>, Error> {
    let variants = plan::variants(&bench.options, &bench.load);
    let mut results: Vec<(Variant, Vec<Measured>)> = variants
        .into_iter()
        .map(|variant| (variant, Vec::new()))
        .collect();
    tell!(
        "postroad bench {}: broker {}",
        bench.options.scenario.name(),
        bench.broker.place
    );
    let mut number = 0;
    for _ in 0..bench.load.rounds {
        for (variant, measured) in &mut results {
            measured.push(Box::pin(round::run(bench, variant, number)).await?);
            number += 1;
        }
    }
    Ok(results)
}
