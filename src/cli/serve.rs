//! `postroad serve`: runs the broker until a signal, or until one of its parts fails.
//!
//! When the database turns out to have another history (after a failover or a restore), everything that the process has in
//! memory is void. The program then starts again on a new runtime, so that nothing of the old one is left. To clients this
//! looks like a restart.

use std::future::Future;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::flags::ConfigFlags;
use super::signals::Signals;
use super::{ended, print_error};
use crate::app::{self, Broker};
use crate::config::{self, Config, Environment};
use crate::telemetry;

/// How long work on separate threads may take when a runtime ends.
const RUNTIME_END: Duration = Duration::from_secs(5);

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
    if config.database_url.is_none() {
        super::forget_pgoptions();
    }
    telemetry::start(&config);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let served = serve(&mut config);
    // A part that there was no time to stop in order ends by itself.
    app::let_postgres_go();
    ended(served)
}

fn serve(config: &mut Config) -> anyhow::Result<()> {
    let mut signals = Signals::listen(app::longest_stop(config))?;
    let mut void = Vec::new();
    loop {
        let work = run(config.clone(), std::mem::take(&mut void), &mut signals);
        match on_own_runtime(work)? {
            Ended::Stopped => return Ok(()),
            Ended::Anew(address, histories) => {
                config.bind = address;
                void = histories;
                signals.stop_ended();
            }
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

async fn run(config: Config, void: Vec<Uuid>, signals: &mut Signals) -> anyhow::Result<Ended> {
    let asked = async {
        let name = signals.next().await;
        tracing::info!("stopping on {name}, before the start was complete");
    };
    let Some(broker) = Broker::start_until(config, void, asked).await? else {
        tracing::info!("stopped");
        return Ok(Ended::Stopped);
    };
    tracing::info!(url = %broker.url(), "postroad is ready");
    let has_failed = tokio::select! {
        name = signals.next() => {
            tracing::info!("stopping on {name}; a second signal ends the process at once");
            false
        }
        () = broker.failed() => true,
        why = broker.history_changed() => {
            tracing::error!(why, "the broker's database has a new history: starting again");
            let address = broker.address;
            signals.stop_begins();
            return Ok(Ended::Anew(address, broker.abandon().await));
        }
    };
    if has_failed {
        signals.stop_begins();
    }
    let tasks = broker.tasks();
    tokio::select! {
        stopped = broker.stop() => stopped.context("the stop was not clean")?,
        name = signals.next() => {
            bail!("ended at once on {name} while these tasks still ran: {}", tasks.running().join(", "));
        }
    }
    if has_failed {
        bail!("a part of the broker failed; the log says which");
    }
    tracing::info!("stopped");
    Ok(Ended::Stopped)
}
