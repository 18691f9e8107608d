//! Configuration: flags, then `POSTROAD_*` variables, then `postroad.toml`, then defaults; the first that has a value
//! counts. Every key stands once, in [`KEYS`], and has the same name in the file (`bind`), the environment
//! (`POSTROAD_BIND`) and on the command line (`--bind`). All faults are reported at once, each with its key, its value and
//! the allowed values.

mod fault;
mod given;
mod keys;
mod load;
mod origin;
mod render;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::domain::database_url::DatabaseUrl;
use crate::domain::name::{QueueName, StreamName, TopicPattern};

pub use fault::{Error, Fault};
pub use given::{Environment, Flags};
pub use keys::{KEYS, Key};
pub use load::load;
pub use origin::{Origin, UrlFrom};
pub use render::{effective, markdown_table};

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// A declared stream or queue: the name, and the body that `PUT /v1/streams/{stream}` or `PUT /v1/queues/{queue}` takes.
pub type Declared<Name> = (Name, Map<String, Value>);

/// Everything that can be configured. What each field means stands in [`KEYS`], and so in docs/configuration.md.
#[derive(Clone)]
pub struct Config {
    /// `bind`
    pub bind: SocketAddr,
    /// `advertise_url`
    pub advertise_url: Option<String>,
    /// `allowed_hosts`
    pub allowed_hosts: Vec<String>,
    /// `node_secret`
    pub node_secret: Option<String>,
    /// `database_url`, or what `database_url_file` holds
    pub database_url: Option<String>,
    /// `data_dir`
    pub data_dir: Option<PathBuf>,
    /// `postgres_bin`
    pub postgres_bin: Option<PathBuf>,
    /// `database_pool_size`
    pub database_pool_size: u32,
    /// `allow_unsafe_postgres`
    pub allow_unsafe_postgres: bool,
    /// `log_format`
    pub log_format: LogFormat,
    /// `log_level`
    pub log_level: String,
    /// `node_ttl_seconds`
    pub node_ttl: Duration,
    /// `node_heartbeat_seconds`
    pub node_heartbeat: Duration,
    /// `outbox_grace_seconds`
    pub outbox_grace: Duration,
    /// `lame_duck_seconds`
    pub lame_duck: Duration,
    /// `connections_max`
    pub connections_max: usize,
    /// `keep_alive_seconds`
    pub keep_alive: Duration,
    /// `http_memory_bytes`
    pub http_memory_bytes: Option<usize>,
    /// `message_max_bytes`
    pub message_max_bytes: usize,
    /// `stream_cache_bytes`
    pub stream_cache_bytes: usize,
    /// `shutdown_seconds`
    pub shutdown: Duration,
    /// `[origins.<name>]`
    pub origins: Vec<Origin>,
    /// `[streams.<name>]`
    pub streams: Vec<Declared<StreamName>>,
    /// `[topics."<pattern>"]`
    pub topics: Vec<Declared<TopicPattern>>,
    /// `[queues.<name>]`
    pub queues: Vec<Declared<QueueName>>,
    /// Oddities that are not errors, for the log: a variable that is not a key.
    pub warnings: Vec<String>,
    /// The source of each key's value, in the order of [`KEYS`].
    sources: Vec<String>,
}

/// A warning, if a database URL given by this flag has a password, which anyone who lists the machine's processes can read.
#[must_use]
pub fn exposed_password(flag: &str, url: &str) -> Option<String> {
    let has_password = DatabaseUrl::parse(url).is_ok_and(|url| url.has_password());
    has_password.then(|| {
        format!("everybody on this machine can read the password in {flag}, in the list of processes: set DATABASE_URL instead")
    })
}

impl std::fmt::Debug for Config {
    /// As [`effective`]: without passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&effective(self))
    }
}

impl Default for Config {
    /// The defaults of every key, with no file and no variable read.
    fn default() -> Self {
        let mut config = Self::blank();
        for key in KEYS {
            key.set_default(&mut config);
        }
        config
    }
}

impl Config {
    /// The state before the first key is set.
    fn blank() -> Self {
        Self {
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise_url: None,
            allowed_hosts: Vec::new(),
            node_secret: None,
            database_url: None,
            data_dir: None,
            postgres_bin: None,
            database_pool_size: 1,
            allow_unsafe_postgres: false,
            log_format: LogFormat::Text,
            log_level: String::new(),
            node_ttl: Duration::ZERO,
            node_heartbeat: Duration::ZERO,
            outbox_grace: Duration::ZERO,
            lame_duck: Duration::ZERO,
            connections_max: 0,
            keep_alive: Duration::ZERO,
            http_memory_bytes: None,
            message_max_bytes: 0,
            stream_cache_bytes: 0,
            shutdown: Duration::ZERO,
            origins: Vec::new(),
            streams: Vec::new(),
            topics: Vec::new(),
            queues: Vec::new(),
            warnings: Vec::new(),
            sources: vec!["default".to_owned(); KEYS.len()],
        }
    }
}
