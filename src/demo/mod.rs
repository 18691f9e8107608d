//! `postroad demo`: a real run of a small shop, and the proof that nothing was lost on the way.
//!
//! Producers place orders, each in one transaction with its message; two services consume them over HTTP; at the end the
//! demo compares the tables with the consumers' own records. Nothing here is a shortcut into the broker: producers speak
//! SQL, consumers speak HTTP, and with `--kills` the broker is a separate process that the demo kills during the run.

mod broker;
mod consumer;
mod killer;
mod producer;
mod progress;
mod random;
mod report;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::broker::Broker;
use self::consumer::{Consumer, Said, Service};
use self::producer::{Placed, Shop};
use self::progress::{Display, Progress};
use self::random::Random;
use self::report::Latencies;
pub use self::report::Report;
use crate::client::{self, Client, Declaration};
use crate::config::{self, Config, Environment, Flags};
use crate::local_postgres;
use crate::store::shop::{self, End};
use crate::store::{self, Database};
use crate::supervisor::{OnEnd, Supervisor};
use crate::telemetry::{self, Hangup, say, tell};

const DEFAULT_ORDERS: u64 = 2_000;
const STREAM: &str = "shop";
const STREAM_TOPICS: &str = "shop.>";
const QUEUE_TOPICS: &str = "shop.orders.*";
/// How long the consumers may go without anything new, while orders are missing, before the run is given up.
const STALLED_AFTER: Duration = Duration::from_secs(60);
/// How long the consumers go on once everything has arrived, to see whether anything comes twice.
const LINGER: Duration = Duration::from_secs(1);

/// The options of a run.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The number of orders to place, including those rolled back; 2000 unless --seconds is given
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub orders: Option<u64>,
    /// Place orders for at most this many seconds
    #[arg(long)]
    pub seconds: Option<u64>,
    /// Orders per second, all producers together; 0 places them as fast as the database accepts them
    #[arg(long, default_value_t = 500)]
    pub rate: u32,
    /// The number of producers, each with its own connection
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub producers: u64,
    /// The number of consumers for each of the two queues
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub consumers: u64,
    /// Kill the broker (kill -9) this many times during the run, and restart it each time
    #[arg(long, default_value_t = 0)]
    pub kills: u64,
    /// The seed of every random choice
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Keep the broker running after the demo, until Ctrl-C
    #[arg(long)]
    pub serve: bool,
    /// Use this Postgres instead of a private one. The demo creates a schema `shop` in it
    #[arg(long)]
    pub database_url: Option<String>,
    /// The data folder of the private Postgres
    #[arg(long)]
    pub data_dir: Option<String>,
    /// The address the broker listens on; if it is in use, the demo takes a free port
    #[arg(long)]
    pub bind: Option<String>,
}

impl Options {
    /// The broker's configuration: as `postroad serve` reads it, with the demo's own flags before the rest.
    fn config(&self) -> Result<Config, config::Error> {
        let flags = [
            ("database_url", &self.database_url),
            ("data_dir", &self.data_dir),
            ("bind", &self.bind),
        ];
        let given = flags
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.clone()?)));
        let flags = Flags {
            file: None,
            values: given.collect(),
        };
        let mut config = config::load(&flags, &Environment::of_process())?;
        if config.log_level == Config::default().log_level {
            // The broker in this process says what is wrong, and nothing else.
            "warn".clone_into(&mut config.log_level);
        }
        Ok(config)
    }
}

/// Reasons why the demo could not finish.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable, a flag or postroad.toml.
    #[error("the configuration is not valid")]
    Config(#[from] config::Error),
    /// No private Postgres.
    #[error("the private Postgres did not start")]
    LocalPostgres(#[from] local_postgres::Error),
    /// The shop's own tables.
    #[error("the demo's database failed")]
    Store(#[from] store::Error),
    /// The broker did not start, or not again.
    #[error("the broker did not start")]
    Broker(#[from] broker::Error),
    /// A call to the broker that ought to succeed.
    #[error("the broker refused a call")]
    Client(#[from] client::Error),
    /// A consumer gave up.
    #[error("a consumer stopped")]
    Consumer(#[from] consumer::Error),
    /// Somebody else's tables are in the way.
    #[error(
        "the database has a schema `shop` that the demo did not make: drop it, or give the demo another --database-url"
    )]
    SchemaTaken,
    /// Somebody else's queue is in the way.
    #[error(
        "the broker has a queue `{queue}` on the stream `{stream}`, which the demo did not make: delete it, or give the demo another --database-url"
    )]
    QueueTaken {
        /// The queue's name.
        queue: &'static str,
        /// The stream it reads.
        stream: String,
    },
    /// Ctrl-C before there was anything to reconcile.
    #[error("interrupted while it was starting")]
    Interrupted,
    /// No handler for Ctrl-C.
    #[error("listening for signals failed")]
    Signal(#[source] std::io::Error),
    /// A consumer or a producer ended without a word.
    #[error("a task of the demo ended unexpectedly")]
    TaskEnded,
}

/// Runs the demo, printing to standard output. With `serve` it returns only after Ctrl-C.
///
/// # Errors
/// The run could not be finished. A run that was, and found something wrong, returns a report that is not clean.
pub async fn run(options: Options) -> Result<Report, Error> {
    let mut config = options.config()?;
    telemetry::start(&config);
    let postgres = Supervisor::new();
    let result = run_with(&options, &mut config, &postgres).await;
    // After everything that uses it; a private server that does not stop in time is adopted by the next run.
    if postgres.stop(Duration::from_secs(30)).await.is_err() {
        tell!("the private Postgres is still stopping");
    }
    result
}

async fn run_with(
    options: &Options,
    config: &mut Config,
    postgres: &Supervisor,
) -> Result<Report, Error> {
    say!(
        "Postroad demo: a shop, its orders, and two services that must receive every one of them\n"
    );
    let mut interrupt = Interrupt::new()?;
    let (url, local) = match config.database_url.clone() {
        Some(url) => (url, None),
        None => {
            let server = tokio::select! {
                server = start_postgres(config, postgres) => server?,
                () = interrupt.received() => return Err(Error::Interrupted),
            };
            (server.url(), Some(server))
        }
    };
    config.database_url = Some(url.clone());
    let database = Database::new(&url, 4)?;
    match &local {
        Some(server) => say!(
            "  Postgres   a private server; its data stays in {}",
            server.cluster_dir().display()
        ),
        None => say!("  Postgres   {}", database.place()),
    }
    let broker = tokio::select! {
        broker = Broker::start(options, config) => Arc::new(broker?),
        () = interrupt.received() => return Err(Error::Interrupted),
    };
    let result = run_shop(options, &database, &broker).await;
    if let Ok(report) = &result {
        say!(
            "\nReconciliation, read from the shop's tables, the stream's table and the consumers' own records\n"
        );
        say!("{}", report.to_text());
        say!(
            "  Time is taken by one monotonic clock, from just before the producer sends COMMIT until a consumer has read"
        );
        say!("  the answer with the order in it for the first time.\n");
        say!("{}\n", report.verdict());
        print_next_steps(options, &url, local.as_ref(), &broker);
        if options.serve {
            Interrupt::new()?.received().await;
            say!("\nStopping.");
        }
    }
    broker.stop().await;
    database.close().await;
    result
}

async fn start_postgres(
    config: &Config,
    supervisor: &Supervisor,
) -> Result<local_postgres::Handle, local_postgres::Error> {
    let data_dir = config.data_dir.clone();
    let mut settings =
        local_postgres::Settings::new(data_dir.unwrap_or_else(local_postgres::default_data_dir));
    settings.bin_dir.clone_from(&config.postgres_bin);
    local_postgres::start(settings, supervisor).await
}

/// Everything between the broker's start and the figures.
async fn run_shop(
    options: &Options,
    database: &Database,
    broker: &Arc<Broker>,
) -> Result<Report, Error> {
    let client = broker.client();
    say!("  Broker     {}, {}", broker.base(), broker.describe());
    let mut connection = database.connect().await?;
    if !shop::create(&mut connection, producer::PRODUCTS).await? {
        return Err(Error::SchemaTaken);
    }
    declare(client).await?;
    let before = shop::last_offset(&mut connection, STREAM).await?;
    say!(
        "  Producers  {}, in transactions: lock and update a stock row, insert an order, insert a message",
        options.producers
    );
    say!(
        "  Consumers  {consumers} of billing, {consumers} of shipping, over HTTP; shipping refuses some orders at first\n",
        consumers = options.consumers
    );

    let mut figures = play(options, database, broker).await?;
    figures.report.stream =
        shop::reconcile_stream(&mut connection, figures.run, STREAM, before).await?;
    for service in Service::ALL {
        figures.report.queues[service as usize] =
            shop::reconcile_queue(&mut connection, service.queue()).await?;
    }
    Ok(figures.report)
}

/// Declares the demo's stream, and recreates its queues: leftovers of an earlier run are not part of this one.
async fn declare(client: &Client) -> Result<(), Error> {
    client.declare_stream(STREAM, [STREAM_TOPICS]).await?;
    let declaration = Declaration::of(STREAM).topics([QUEUE_TOPICS]).from_latest();
    for service in Service::ALL {
        let queue = client.queue(service.queue())?;
        match queue.describe().await? {
            None => {}
            Some(found) if found.stream == STREAM => queue.delete().await?,
            Some(found) => {
                return Err(Error::QueueTaken {
                    queue: service.queue(),
                    stream: found.stream,
                });
            }
        }
        queue.declare(&declaration).await?;
    }
    Ok(())
}

struct Figures {
    run: Uuid,
    report: Report,
}

/// The tasks of one run, and the channels they report through.
struct Cast {
    supervisor: Supervisor,
    shop: Arc<Shop>,
    progress: Arc<Progress>,
    placed: mpsc::Receiver<Placed>,
    said: mpsc::Receiver<Said>,
    failed: mpsc::Receiver<Error>,
    failed_tx: mpsc::Sender<Error>,
    consumers_stop: CancellationToken,
    kills_done: CancellationToken,
}

async fn cast(options: &Options, database: &Database, client: &Client) -> Result<Cast, Error> {
    let supervisor = Supervisor::new();
    let progress = Arc::new(Progress::default());
    let consumers_stop = CancellationToken::new();
    let (failed_tx, failed) = mpsc::channel(16);
    let (said_tx, said) = mpsc::channel(1_000);
    let (placed_tx, placed) = mpsc::channel(1_000);
    for service in Service::ALL {
        for number in 1..=options.consumers {
            let name = format!("{}-{number}", service.queue());
            let consumer = Consumer {
                service,
                name: name.clone(),
                queue: client.queue(service.queue())?,
                connection: database.connect().await?,
                said: said_tx.clone(),
                progress: Arc::clone(&progress),
                stop: consumers_stop.clone(),
            };
            let failed = failed_tx.clone();
            supervisor.spawn(name, OnEnd::Ordinary, async move {
                if let Err(error) = consumer.run().await {
                    let _ = failed.send(error.into()).await;
                }
            });
        }
    }
    let shop = Arc::new(Shop {
        database: database.clone(),
        run: Uuid::now_v7(),
        started: Instant::now(),
        orders: match (options.orders, options.seconds) {
            (Some(orders), _) => orders,
            (None, Some(_)) => u64::MAX,
            (None, None) => DEFAULT_ORDERS,
        },
        seconds: options.seconds.map(Duration::from_secs),
        rate: options.rate,
        next: AtomicU64::new(0),
        progress: Arc::clone(&progress),
        enough: CancellationToken::new(),
    });
    for number in 0..options.producers {
        let connection = shop.database.connect().await?;
        let shop = Arc::clone(&shop);
        let random = Random::new(options.seed, number);
        let placed = placed_tx.clone();
        let failed = failed_tx.clone();
        supervisor.spawn(format!("producer-{number}"), OnEnd::Ordinary, async move {
            if let Err(error) = producer::run(shop, connection, random, placed).await {
                let _ = failed.send(error.into()).await;
            }
        });
    }
    Ok(Cast {
        supervisor,
        shop,
        progress,
        placed,
        said,
        failed,
        failed_tx,
        consumers_stop,
        kills_done: CancellationToken::new(),
    })
}

/// The reports that the demo has received so far.
#[derive(Default)]
struct Told {
    latencies: Latencies,
    committed: HashSet<Uuid>,
    acknowledged: [HashSet<Uuid>; 2],
    rolled_back: u64,
}

impl Told {
    fn placed(&mut self, placed: &Placed) {
        match placed.end {
            End::RollBack => self.rolled_back += 1,
            End::Commit => {
                self.latencies.committed(placed.order, placed.at);
                self.committed.insert(placed.order);
            }
        }
    }

    fn said(&mut self, said: &Said) {
        match *said {
            Said::Received { service, order, at } => self.latencies.received(service, order, at),
            Said::Acknowledged { service, order } => {
                self.acknowledged[service as usize].insert(order);
            }
        }
    }

    /// Whether both queues have acknowledged as many orders as were committed. Which ones they are, the tables tell.
    fn is_all_acknowledged(&self) -> bool {
        self.acknowledged
            .iter()
            .all(|acknowledged| acknowledged.len() >= self.committed.len())
    }
}

async fn play(
    options: &Options,
    database: &Database,
    broker: &Arc<Broker>,
) -> Result<Figures, Error> {
    let mut cast = cast(options, database, broker.client()).await?;
    let run = cast.shop.run;
    let (broker, shop, kills) = (Arc::clone(broker), Arc::clone(&cast.shop), options.kills);
    let (failed, kills_done) = (cast.failed_tx.clone(), cast.kills_done.clone());
    cast.supervisor
        .spawn("killer", OnEnd::Ordinary, async move {
            if let Err(error) = killer::run(broker, shop, kills).await {
                let _ = failed.send(error.into()).await;
            }
            kills_done.cancel();
        });
    let mut display = Display::new(Arc::clone(&cast.progress), cast.shop.started);
    let watched = watch(&mut cast, &mut display).await;
    cast.shop.enough.cancel();
    cast.consumers_stop.cancel();
    // Consumers that still have something to say must not wait for a full channel.
    let mut said = cast.said;
    cast.supervisor
        .spawn("late-words", OnEnd::Ordinary, async move {
            while said.recv().await.is_some() {}
        });
    drop(cast.placed);
    if cast.supervisor.stop(Duration::from_secs(30)).await.is_err() {
        return Err(Error::TaskEnded);
    }
    display.end();
    let told = watched?;
    let report = Report {
        rolled_back: told.rolled_back,
        latencies: Service::ALL.map(|service| told.latencies.percentiles(service)),
        kills: cast.progress.kills.load(Ordering::Relaxed),
        ..Report::default()
    };
    Ok(Figures { run, report })
}

/// Shows the run until everything placed is acknowledged, or nothing moves.
async fn watch(cast: &mut Cast, display: &mut Display) -> Result<Told, Error> {
    let mut interrupt = Interrupt::new()?;
    let mut told = Told::default();
    let mut tick = tokio::time::interval(Display::EVERY);
    let mut moved = Instant::now();
    let mut producing = true;
    let mut complete_since: Option<Instant> = None;
    loop {
        tokio::select! {
            placed = cast.placed.recv(), if producing => match placed {
                Some(placed) => {
                    moved = Instant::now();
                    told.placed(&placed);
                }
                None => producing = false,
            },
            Some(said) = cast.said.recv() => {
                moved = Instant::now();
                told.said(&said);
            }
            Some(error) = cast.failed.recv() => return Err(error),
            _ = tick.tick() => display.tick(),
            () = interrupt.received() => {
                if cast.shop.enough.is_cancelled() {
                    display.note("Interrupted again: not waiting for the consumers.");
                    return Ok(told);
                }
                display.note("Interrupted: no more orders, waiting for the consumers.");
                cast.shop.enough.cancel();
            }
        }
        if !cast.kills_done.is_cancelled() {
            continue;
        }
        if !producing && told.is_all_acknowledged() {
            if complete_since.get_or_insert_with(Instant::now).elapsed() >= LINGER {
                return Ok(told);
            }
        } else if !producing && moved.elapsed() >= STALLED_AFTER {
            display.note(&format!(
                "Nothing has arrived for {} s: giving up on the missing orders.",
                STALLED_AFTER.as_secs()
            ));
            return Ok(told);
        }
    }
}

fn print_next_steps(
    options: &Options,
    url: &str,
    local: Option<&local_postgres::Handle>,
    broker: &Broker,
) {
    let psql = match local {
        Some(server) => format!(
            "psql -h {} -U {} {}",
            server.socket_dir().display(),
            local_postgres::USER,
            local_postgres::DATABASE
        ),
        // A password stays where it came from.
        None if url.contains('@') => "psql \"$DATABASE_URL\"".to_owned(),
        None => format!("psql '{url}'"),
    };
    let base = broker.base();
    if !options.serve {
        say!(
            "Run it again with --serve to keep the broker running and try it by hand. The data is kept."
        );
        return;
    }
    say!(
        "The broker keeps running until Ctrl-C. In another terminal, send a message by a transaction:\n"
    );
    say!(
        "  {psql} -c \"insert into postroad.outbox (topic, payload) values ('shop.orders.created', '{{\\\"order\\\": 1}}')\"\n"
    );
    say!("receive it:\n");
    say!("  curl -s {base}/v1/queues/billing/receive -d '{{\"wait_seconds\": 5}}'\n");
    say!("and acknowledge it with the receipt from the answer:\n");
    say!(
        "  curl -s {base}/v1/queues/billing/ack -d '{{\"deliveries\": [{{\"receipt\": \"…\"}}]}}'\n"
    );
    say!("Look at the queue, read the stream from its start, browse the API:\n");
    say!("  curl -s {base}/v1/queues/billing");
    say!("  curl -s '{base}/v1/streams/shop/messages?max_messages=3'");
    say!("  {base}/docs");
}

/// Ctrl-C, SIGTERM, and SIGHUP of a terminal that closes.
struct Interrupt {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: Hangup,
}

impl Interrupt {
    fn new() -> Result<Self, Error> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            hangup: Hangup::listen().map_err(Error::Signal)?,
            interrupt: signal(SignalKind::interrupt()).map_err(Error::Signal)?,
            terminate: signal(SignalKind::terminate()).map_err(Error::Signal)?,
        })
    }

    /// Resolves at the next of them. Cancel-safe.
    async fn received(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            () = self.hangup.received() => {}
        }
    }
}
