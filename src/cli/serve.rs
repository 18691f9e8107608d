//! `postroad serve`: runs the broker until a signal, or until one of its parts fails.

use anyhow::{Context as _, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::Broker;
use crate::config::Config;

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals failed");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    /// The next one's name. Cancel-safe.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

pub(super) async fn run(config: Config) -> anyhow::Result<()> {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let mut signals = Signals::listen()?;
    let starting = Broker::start(config);
    let broker = tokio::select! {
        // Nothing was promised to anybody yet: the process may end here, and what it began is undone by the database.
        name = signals.next() => {
            tracing::info!("stopping on {name}, before the start was done");
            return Ok(());
        }
        started = starting => started?,
    };
    tracing::info!(url = %broker.url(), "postroad is ready");
    let has_failed = tokio::select! {
        name = signals.next() => {
            tracing::info!("stopping on {name}; a second signal ends at once");
            false
        }
        () = broker.failed() => true,
    };
    let tasks = broker.tasks();
    tokio::select! {
        stopped = broker.stop() => stopped.context("the stop was not clean")?,
        name = signals.next() => {
            bail!("ended at once on {name}, while these still ran: {}", tasks.running().join(", "));
        }
    }
    if has_failed {
        bail!("a part of the broker failed; the log says which");
    }
    tracing::info!("stopped");
    Ok(())
}
