//! Logs: lines to standard error, as text or JSON. No payload, key, password or URL with a password is ever logged. The
//! output of commands to their users. And the process's use of the machine, for the metrics.

mod hangup;
mod process;
mod sink;
mod terminal;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal as _;
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};
use crate::supervisor;
use sink::Sink;

pub use hangup::Hangup;
pub use process::register;
pub use terminal::{print, to_stderr, to_stdout};
pub(crate) use terminal::{say, tell};

/// Sends the process's log lines to standard error. The first call in a process counts.
pub fn start(config: &Config) {
    // The driver repeats the server's notices, such as "already exists, skipping"; what is configured comes after and wins. Where it
    // reads URLs and password files it would log lines of them.
    let filter = format!("sqlx=warn,{},sqlx_postgres::options=off", config.log_level);
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let sink = Sink::default();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would say by `eprintln!`, which panics, that a line cannot be written.
        .log_internal_errors(false)
        .with_writer(sink.clone())
        .with_ansi(std::io::stderr().is_terminal());
    let is_set = match config.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    // Set already, by a test or an embedding program: theirs stays.
    if is_set.is_err() {
        return;
    }
    let _ = SINK.set(sink.clone());
    std::panic::set_hook(Box::new(log_panic));
    if let Err(error) = supervisor::thread("log", move || sink.write_on()) {
        tell!("error: there is no log, because starting its thread failed: {error}");
    }
}

/// The log's sink, once it was started.
static SINK: OnceLock<Sink> = OnceLock::new();

/// Waits until logged lines are written, up to a time limit: nobody may be reading them.
pub fn flush(longest: Duration) {
    if let Some(sink) = SINK.get() {
        sink.flush(longest);
    }
}

/// Log lines that were dropped since standard error did not take them, or not in time.
fn dropped() -> u64 {
    SINK.get().map_or(0, Sink::dropped)
}

/// Logs a panic like any other line: the usual hook waits for the reader of standard error.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let what = panic
        .payload_as_str()
        .unwrap_or("a panic without a message");
    let place = panic.location().map(ToString::to_string);
    let backtrace = Backtrace::capture();
    let is_captured = backtrace.status() == BacktraceStatus::Captured;
    let backtrace = is_captured.then(|| tracing::field::display(backtrace));
    tracing::error!(panic = what, place, backtrace, "a thread panicked");
}
