//! Logs: lines to standard error, as text or JSON. No payload, key, password or URL with one is ever logged. And what the
//! process uses of the machine, for the metrics.

mod process;

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};

pub use process::register;

/// Sends the process's log lines to standard error. The first call in a process counts.
pub fn start(config: &Config) {
    // The driver repeats the server's notices, such as "already exists, skipping"; what is configured comes after and wins.
    let filter = EnvFilter::try_new(format!("sqlx=warn,{}", config.log_level))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // Set already, by a test or an embedding program: theirs stays.
    let _ = match config.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
