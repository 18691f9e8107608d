//! `postroad serve`: runs the broker until a signal, or until one of its parts fails.
//!
//! When the database turns out to have another history (a failover, a restore), all that the process has in memory is void. It then
//! begins anew, on a runtime of its own, so that nothing of the former one is left; clients see what they see of a restart.

use std::future::Future;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use uuid::Uuid;

use super::flags::ConfigFlags;
use super::{ended, print_error};
use crate::app::Broker;
use crate::config::{self, Config, Environment};
use crate::telemetry;

/// How long what runs on threads of its own may take when a runtime ends.
const RUNTIME_END: Duration = Duration::from_secs(5);

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

/// How a run came to its end.
enum Ended {
    Stopped,
    /// The database has another history, and these are void. The next run listens where this one did.
    Anew(SocketAddr, Vec<Uuid>),
}

/// Runs the broker until it stops; more than once if the database's history changes.
pub(super) fn main(flags: &ConfigFlags) -> ExitCode {
    let mut config = match config::load(&flags.0, &Environment::of_process()) {
        Ok(config) => config,
        Err(error) => {
            print_error(&error.into());
            return ExitCode::from(2);
        }
    };
    telemetry::start(&config);
    let mut void = Vec::new();
    loop {
        match on_own_runtime(run(config.clone(), std::mem::take(&mut void))) {
            Ok(Ended::Stopped) => return ExitCode::SUCCESS,
            Ok(Ended::Anew(address, histories)) => {
                config.bind = address;
                void = histories;
            }
            Err(error) => return ended(Err(error)),
        }
    }
}

fn on_own_runtime(work: impl Future<Output = anyhow::Result<Ended>>) -> anyhow::Result<Ended> {
    let runtime = Runtime::new().context("starting the runtime failed")?;
    let ended = runtime.block_on(work);
    match ended {
        // Whatever is left ends here: nothing of it may write.
        Ok(Ended::Anew(..)) => runtime.shutdown_timeout(RUNTIME_END),
        // A task that outlived its deadline must not keep the process.
        _ => runtime.shutdown_background(),
    }
    ended
}

async fn run(config: Config, void: Vec<Uuid>) -> anyhow::Result<Ended> {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let mut signals = Signals::listen()?;
    let starting = Broker::start_anew(config, void);
    let broker = tokio::select! {
        // Nothing was promised to anybody yet: the process may end here, and what it began is undone by the database.
        name = signals.next() => {
            tracing::info!("stopping on {name}, before the start was done");
            return Ok(Ended::Stopped);
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
        why = broker.history_changed() => {
            tracing::error!(why, "the broker's database has another history than before: starting anew");
            let address = broker.address;
            return Ok(Ended::Anew(address, broker.abandon().await));
        }
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
    Ok(Ended::Stopped)
}
