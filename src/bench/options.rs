//! The options of a run: a scenario, and values that replace its defaults.

use std::path::PathBuf;

use clap::ValueEnum;

/// The scenario to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Producers commit a business row and messages with SQL; consumers receive and ack over HTTP
    Outbox,
    /// The same, but producers publish over HTTP
    Publish,
    /// Every message goes to several queues
    Fanout,
    /// A queue with ordering = key
    Keys,
    /// Fill a stream, then drain it
    Backlog,
    /// Many active queues on one stream, each with its own topic
    Queues,
    /// The cost of doing nothing: queues with long polls, and no message
    Idle,
    /// A steady load beside a reader's old snapshot, then beside an open writing transaction
    Held,
    /// A steady load, measured from commit to receipt; then the first message after a silence
    Latency,
}

impl Scenario {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Outbox => "outbox",
            Self::Publish => "publish",
            Self::Fanout => "fanout",
            Self::Keys => "keys",
            Self::Backlog => "backlog",
            Self::Queues => "queues",
            Self::Idle => "idle",
            Self::Held => "held",
            Self::Latency => "latency",
        }
    }
}

/// How often each key is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Skew {
    /// All equally often
    #[default]
    Uniform,
    /// The n-th key 1/n as often as the first
    Zipf,
}

/// How consumers acknowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ack {
    /// With the next receive: one request and one commit per batch
    #[default]
    WithReceive,
    /// With a separate request
    Separate,
}

/// `postroad bench`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = DEFAULTS)]
pub struct Options {
    /// What to measure
    pub scenario: Scenario,
    /// A running broker, such as http://127.0.0.1:8080; needs --database-url, the broker's own database. By default the
    /// bench starts a broker as a separate process
    #[arg(long)]
    pub url: Option<String>,
    /// A Postgres. With --url, the broker's database; without it, a server where the bench creates its own database and
    /// drops it at the end. Without either option the bench starts a private server
    #[arg(long)]
    pub database_url: Option<String>,
    /// The data folder of the private Postgres, kept for the next run
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// The number of producers, each with its own connection
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub producers: Option<u32>,
    /// The number of consumers per queue, each with its own connection
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub consumers: Option<u32>,
    /// Messages per transaction or publish, and the most per receive and ack
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub batch: Option<u32>,
    /// The size of each payload in bytes; payloads are generated JSON documents
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    pub payload_bytes: u32,
    /// Read payloads from this file instead: one JSON document per line, used in turn
    #[arg(long)]
    pub payload_file: Option<PathBuf>,
    /// How consumers acknowledge
    #[arg(long, value_enum, default_value_t = Ack::WithReceive)]
    pub ack: Ack,
    /// Messages per second, all producers together; 0 sends as fast as consumers keep up
    #[arg(long)]
    pub rate: Option<u32>,
    /// Seconds to measure in each round
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: Option<u64>,
    /// Seconds of load before measuring, in each round
    #[arg(long)]
    pub warmup_seconds: Option<u64>,
    /// The number of messages of `backlog`
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub messages: u64,
    /// The number of queues
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub queues: Option<u32>,
    /// The number of ordering keys; 0 sends messages without a key
    #[arg(long)]
    pub keys: Option<u32>,
    /// How often each key is used
    #[arg(long, value_enum, default_value_t = Skew::Uniform)]
    pub skew: Skew,
    /// The most unacknowledged messages before producers wait, so that a load without --rate stays in balance
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub outstanding: Option<u32>,
    /// Let transactions insert only messages, without a business row
    #[arg(long)]
    pub no_business_row: bool,
    /// Rounds of each measurement, in turn; figures are medians. 3 with --baseline, otherwise 1
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,
    /// Also measure, on the same Postgres and in turn with the broker: plain batched inserts, a queue made from a table, and
    /// the plainest form of the scenario
    #[arg(long)]
    pub baseline: bool,
    /// Write all measurements to this file as JSON
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Write a page with charts to this file
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// Give up when no message has arrived for this many seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub patience_seconds: u64,
    /// The seed of every random choice
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

const DEFAULTS: &str = "\
Defaults by scenario (consumers are per queue):
  outbox   4 producers, 4 consumers, batches of 10, 10 s
  publish  32 producers, 32 consumers, message by message, 10 s
  fanout   4 producers, 10 queues, 2 consumers, batches of 10, 10 s
  keys     4 producers, 4 consumers, 100,000 keys, batches of 10, 10 s
  backlog  4 producers, 4 consumers, batches of 1,000
  queues   4 producers, 1,000 queues, 1 consumer, batches of 10, 10 s
  idle     1,000 queues, 1 consumer, 10 s
  held     4 producers, 4 consumers, 2,000 messages/s in batches of 10, 60 s, on tables aged by 20,000 updates
  latency  4 producers, 4 consumers, 1,000 messages/s one by one, received by up to 10, 10 s; then 20 single messages, 1 s apart

Exit status: 0 everything was delivered once and in order, 1 it was not or the bench failed, 2 the command line is wrong.";

/// The options with the scenario's own choices filled in.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(super) struct Load {
    pub(super) producers: u32,
    pub(super) consumers: u32,
    pub(super) batch: u32,
    /// Messages per receive, at most.
    pub(super) receive: u32,
    pub(super) ack: Ack,
    pub(super) rate: u32,
    pub(super) seconds: u64,
    pub(super) warmup_seconds: u64,
    pub(super) messages: u64,
    pub(super) queues: u32,
    pub(super) keys: u32,
    pub(super) outstanding: u32,
    pub(super) business_row: bool,
    pub(super) rounds: u32,
}

impl Options {
    pub(super) fn load(&self) -> Load {
        use Scenario::{Backlog, Fanout, Held, Idle, Keys, Latency, Publish, Queues};
        let (producers, consumers, batch) = match self.scenario {
            Publish => (32, 32, 1),
            Fanout => (4, 2, 10),
            Backlog => (4, 4, 1_000),
            Queues | Idle => (4, 1, 10),
            Latency => (4, 4, 1),
            _ => (4, 4, 10),
        };
        let producers = self.producers.unwrap_or(producers);
        let consumers = self.consumers.unwrap_or(consumers);
        let batch = self.batch.unwrap_or(batch);
        let queues = self.queues.unwrap_or(match self.scenario {
            Fanout => 10,
            Queues | Idle => 1_000,
            _ => 1,
        });
        let all = producers.saturating_add(consumers.saturating_mul(queues));
        let outstanding = all.saturating_mul(batch).saturating_mul(8);
        Load {
            producers,
            consumers,
            batch,
            // A consumer that takes one at a time would make a line of what comes in a moment.
            receive: match self.scenario {
                Latency => batch.max(10),
                _ => batch,
            },
            ack: self.ack,
            rate: self.rate.unwrap_or(match self.scenario {
                Held => 2_000,
                Latency => 1_000,
                _ => 0,
            }),
            seconds: self.seconds.unwrap_or(match self.scenario {
                Held => 60,
                _ => 10,
            }),
            warmup_seconds: self.warmup_seconds.unwrap_or(2),
            messages: self.messages,
            queues,
            keys: self.keys.unwrap_or(match self.scenario {
                Keys => 100_000,
                _ => 0,
            }),
            outstanding: self
                .outstanding
                .unwrap_or(outstanding.clamp(4_000, 100_000)),
            business_row: !self.no_business_row,
            rounds: self.rounds.unwrap_or(if self.baseline { 3 } else { 1 }),
        }
    }
}
