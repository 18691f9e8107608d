//! The one table of keys.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::{Config, LogFormat};
use crate::domain::authority::Authority;
use crate::domain::database_url::{DatabaseUrl, Fault};

const LIST: &str = "separated by commas";
const SWITCH: &str = "true or false";

/// A key of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// The name in `postroad.toml`.
    pub name: &'static str,
    /// The default as text; empty when there is none.
    pub default: &'static str,
    /// The allowed values, as a clause after "must be".
    pub allowed: &'static str,
    /// The purpose of the key.
    pub about: &'static str,
    /// Whether the value can hold a password: then it is never shown.
    pub is_secret: bool,
    set: fn(&mut Config, &str) -> Option<()>,
}

impl Key {
    /// The name as an environment variable.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("POSTROAD_{}", self.name.to_uppercase())
    }

    /// The name as a flag, without the dashes before it.
    #[must_use]
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// Whether it is on or off, so that the flag alone turns it on.
    #[must_use]
    pub fn is_switch(&self) -> bool {
        self.allowed == SWITCH
    }

    /// Whether the file may say it as a list of texts.
    pub(super) fn is_list(&self) -> bool {
        self.allowed.contains(LIST)
    }

    /// Takes a value; `None` when it is not one of those allowed.
    pub(super) fn set(&self, config: &mut Config, text: &str) -> Option<()> {
        (self.set)(config, text)
    }

    /// The reason why a value is refused, where there is more to say than the allowed values. It never has a part of a secret.
    pub(super) fn why_not(&self, text: &str) -> Option<String> {
        let url = match self.name {
            "database_url" => text.to_owned(),
            "database_url_file" | "node_secret_file" => match secret_in(text) {
                Ok(secret) if self.name == "database_url_file" => secret,
                Ok(_) => return Some("the file holds something else".to_owned()),
                Err(error) => return Some(format!("reading it failed: {error}")),
            },
            _ => return None,
        };
        postgres_url(&url).err().map(|fault| fault.to_string())
    }

    /// Whether the value itself is a secret, or has one in it.
    pub(super) fn holds_secret(&self, text: &str) -> bool {
        let has_password = || DatabaseUrl::parse(text).is_ok_and(|url| url.has_password());
        self.is_secret && (self.name != "database_url" || has_password())
    }

    pub(super) fn set_default(&self, config: &mut Config) {
        if !self.default.is_empty() {
            self.set(config, self.default)
                .expect("a test sets every default");
        }
    }
}

const fn key(
    name: &'static str,
    default: &'static str,
    allowed: &'static str,
    about: &'static str,
    set: fn(&mut Config, &str) -> Option<()>,
) -> Key {
    Key {
        name,
        default,
        allowed,
        about,
        is_secret: false,
        set,
    }
}

fn within<T: std::str::FromStr + PartialOrd>(text: &str, least: T, most: T) -> Option<T> {
    let value: T = text.parse().ok()?;
    (value >= least && value <= most).then_some(value)
}

/// Seconds, with a fraction if need be.
fn seconds(text: &str, least: f64, most: f64) -> Option<Duration> {
    within(text, least, most).map(Duration::from_secs_f64)
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
}

fn path(text: &str) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

fn http_url(text: &str) -> Option<String> {
    let url = reqwest::Url::parse(text).ok()?;
    (matches!(url.scheme(), "http" | "https") && url.has_host())
        .then(|| text.trim_end_matches('/').to_owned())
}

fn allowed_hosts(text: &str) -> Option<Vec<String>> {
    if text.trim().is_empty() {
        // An empty list of the file.
        return Some(Vec::new());
    }
    let names = text.split(',').map(str::trim);
    let is_fit = |name: &str| {
        name == "*" || Authority::parse(name).is_some_and(|authority| authority.port.is_none())
    };
    names
        .map(|name| is_fit(name).then(|| name.to_owned()))
        .collect()
}

pub(super) fn postgres_url(text: &str) -> Result<String, Fault> {
    DatabaseUrl::parse(text).map(|_| text.to_owned())
}

/// The contents of a mounted secret.
fn secret_in(file: &str) -> std::io::Result<String> {
    Ok(std::fs::read_to_string(file)?.trim().to_owned())
}

fn node_secret(text: &str) -> Option<String> {
    let is_fit = (16..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    is_fit.then(|| text.to_owned())
}

/// All keys, in the order of the documentation.
pub const KEYS: &[Key] = &[
    key(
        "bind",
        "127.0.0.1:8080",
        "an address and port, like 127.0.0.1:8080, [::1]:8080 or 0.0.0.0:8080; port 0 takes a free one",
        "Where the HTTP API listens.",
        |c, t| t.parse::<SocketAddr>().ok().map(|v| c.bind = v),
    ),
    key(
        "advertise_url",
        "",
        "an http or https URL",
        "The URL at which other nodes reach this one; no two nodes may have the same. By default `http://` and the bound address, \
         with the machine's name in place of 0.0.0.0.",
        |c, t| http_url(t).map(|v| c.advertise_url = Some(v)),
    ),
    key(
        "allowed_hosts",
        "",
        "names or addresses separated by commas, without ports, or * for any",
        "Host names that requests may use (`Host`), besides loopback names, the bound address and the host of `advertise_url`. \
         The check keeps web pages from reaching the broker under a name of their own (DNS rebinding). It applies to \
         every request while `bind` is a loopback address or once this key is set, and otherwise to requests with a browser's headers \
         (`Sec-Fetch-Site`, `Sec-Fetch-Dest`, `Origin`); requests to an IP address pass unless `bind` is a loopback address.",
        |c, t| allowed_hosts(t).map(|v| c.allowed_hosts = v),
    ),
    Key {
        is_secret: true,
        ..key(
            "node_secret",
            "",
            "16 to 255 visible ASCII characters, the same for all nodes; in a variable or a node_secret_file, not in the configuration file",
            "The secret by which nodes recognize each other when they pass requests on. By default they use a key in the broker's \
             database, so that anyone who can read it can act as a node.",
            |c, t| node_secret(t).map(|v| c.node_secret = Some(v)),
        )
    },
    key(
        "node_secret_file",
        "",
        "the path of a file that holds nothing but the secret",
        "A file to read instead of `node_secret`, such as a mounted secret.",
        |c, t| {
            let secret = secret_in(t).ok()?;
            node_secret(&secret).map(|v| c.node_secret = Some(v))
        },
    ),
    Key {
        is_secret: true,
        ..key(
            "database_url",
            "",
            "a URL like postgres://user:password@host:5432/database, or keywords like host=… dbname=…; if it has a password, in a variable or a database_url_file, not in the configuration file",
            "The broker's Postgres. The broker also reads `DATABASE_URL`. With neither, it starts a private local Postgres.",
            |c, t| postgres_url(t).ok().map(|v| c.database_url = Some(v)),
        )
    },
    key(
        "database_url_file",
        "",
        "the path of a file that holds nothing but the URL",
        "A file to read instead of `database_url`, such as a mounted secret.",
        |c, t| {
            let url = postgres_url(&secret_in(t).ok()?).ok()?;
            c.database_url = Some(url);
            Some(())
        },
    ),
    key(
        "data_dir",
        "",
        "a path",
        "The data folder of the local Postgres. By default the platform's folder for data (`~/.local/share/postroad`, \
         `~/Library/Application Support/postroad`); for root `/var/lib/postroad`.",
        |c, t| path(t).map(|v| c.data_dir = Some(v)),
    ),
    key(
        "postgres_bin",
        "",
        "the path of a folder",
        "The folder of `postgres` and `initdb`, if the broker does not find them by itself.",
        |c, t| path(t).map(|v| c.postgres_bin = Some(v)),
    ),
    key(
        "database_pool_size",
        "16",
        "a whole number from 4 to 1000",
        "The most pooled connections to the broker's Postgres. The appender, the heartbeat and each relay have further \
         connections of their own.",
        |c, t| within(t, 4, 1000).map(|v| c.database_pool_size = v),
    ),
    key(
        "allow_unsafe_postgres",
        "false",
        SWITCH,
        "Run on a Postgres with `fsync`, `full_page_writes` or `synchronous_commit` off, which can lose acknowledged messages.",
        |c, t| boolean(t).map(|v| c.allow_unsafe_postgres = v),
    ),
    key(
        "log_format",
        "text",
        "text or json",
        "The format of log lines, which go to standard error.",
        |c, t| {
            c.log_format = match t {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                _ => return None,
            };
            Some(())
        },
    ),
    key(
        "log_level",
        "info",
        "a level (error, warn, info, debug, trace) or directives like info,postroad::relay=debug",
        "The level of detail in the log.",
        |c, t| {
            let is_valid = !t.is_empty() && tracing_subscriber::EnvFilter::try_new(t).is_ok();
            is_valid.then(|| t.clone_into(&mut c.log_level))
        },
    ),
    key(
        "node_ttl_seconds",
        "10",
        "seconds from 2 to 300",
        "A node that has not renewed its row for this long counts as dead, and other nodes take over its leases.",
        |c, t| seconds(t, 2.0, 300.0).map(|v| c.node_ttl = v),
    ),
    key(
        "node_heartbeat_seconds",
        "1",
        "seconds from 0.1 to 60, at most a third of node_ttl_seconds",
        "How often a node renews its row.",
        |c, t| seconds(t, 0.1, 60.0).map(|v| c.node_heartbeat = v),
    ),
    key(
        "outbox_grace_seconds",
        "600",
        "seconds from 1 to 1500, since a leaf of the outbox is filled again after a cycle",
        "How long relayed rows stay in an outbox. They make a failover of the broker's database repairable.",
        |c, t| seconds(t, 1.0, 1_500.0).map(|v| c.outbox_grace = v),
    ),
    key(
        "message_max_bytes",
        "1048576",
        "a whole number from 1024 to 16777216",
        "The largest message that HTTP accepts: payload and attributes together.",
        |c, t| within(t, 1_024, 16 << 20).map(|v| c.message_max_bytes = v),
    ),
    key(
        "connections_max",
        "20000",
        "a whole number from 16 to 1000000",
        "The most HTTP connections at a time; further ones wait. Each is an open file: the process raises its limit of open files \
         as far as it may (`ulimit -Hn`), and accepts no more connections than that limit allows.",
        |c, t| within(t, 16, 1_000_000).map(|v| c.connections_max = v),
    ),
    key(
        "keep_alive_seconds",
        "75",
        "seconds from 1 to 3600",
        "How long an idle HTTP connection stays open, at least; answers say so (`Keep-Alive`). Set it longer than a proxy in \
         front of the broker keeps its connections, or the proxy sends requests into a connection that is closing.",
        |c, t| seconds(t, 1.0, 3_600.0).map(|v| c.keep_alive = v),
    ),
    key(
        "http_memory_bytes",
        "",
        "a whole number from 67108864 to 1099511627776",
        "Memory for request bodies, and for answers that clients have not read yet: half for each. Requests beyond it are \
         answered 503. By default an eighth of the memory of the machine or the container, from 64 MiB to 1 GiB.",
        |c, t| within(t, 64 << 20, 1 << 40).map(|v| c.http_memory_bytes = Some(v)),
    ),
    key(
        "stream_cache_bytes",
        "67108864",
        "a whole number from 1048576 to 1099511627776",
        "Memory for recent messages, so that queues that keep up do not read from the database.",
        |c, t| within(t, 1 << 20, 1 << 40).map(|v| c.stream_cache_bytes = v),
    ),
    key(
        "lame_duck_seconds",
        "5",
        "seconds from 0 to 60",
        "How long a stopping process keeps serving after `/readyz` reports the stop, so that load balancers notice. There is no \
         such wait when `bind` is a loopback address.",
        |c, t| seconds(t, 0.0, 60.0).map(|v| c.lame_duck = v),
    ),
    key(
        "shutdown_seconds",
        "25",
        "seconds from 1 to 600",
        "How long a stop may take in total before the process ends regardless.",
        |c, t| seconds(t, 1.0, 600.0).map(|v| c.shutdown = v),
    ),
];
