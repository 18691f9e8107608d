//! The command line. Each command's work is elsewhere; here it is parsed, started and ended with an exit status:
//! 0 done, 1 failed, 2 the command line or the configuration is wrong.

mod flags;
mod healthcheck;
mod install;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{self, Config, Environment};
use crate::{bench, demo, http, telemetry};

use flags::ConfigFlags;

/// A transactional outbox message broker for Postgres.
#[derive(Debug, Parser)]
#[command(name = "postroad", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker; without a database URL, on a private local Postgres
    Serve(ConfigFlags),
    /// Run a small shop through the broker, and prove that no message was lost, repeated or put out of order
    Demo(demo::Options),
    /// Measure a broker, and check that it delivered everything once and in order
    Bench(Box<bench::Options>),
    /// Install the outbox's schema in a database, or the inbox's, or print it as SQL
    Install(install::Install),
    /// Print the description of the HTTP API, openapi.yaml
    Openapi,
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Ask a running broker whether it is ready; exit status 0 if so
    Healthcheck(healthcheck::Healthcheck),
    /// Print the version
    Version,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Read the configuration and say what is wrong with it
    Check(ConfigFlags),
    /// Print what is in effect, and where each value came from; passwords are left out
    Print(ConfigFlags),
}

/// Parses the process's arguments, runs the command and gives the exit status.
#[must_use]
pub fn main() -> ExitCode {
    match Cli::parse().command {
        // Takes a runtime for each history of the database.
        Command::Serve(flags) => serve::main(&flags),
        Command::Demo(options) => on_runtime(async {
            let report = demo::run(options).await;
            judged(report.map(|report| report.is_clean()))
        }),
        Command::Bench(options) => on_runtime(async {
            let report = bench::run(*options).await;
            judged(report.map(|report| report.is_clean()))
        }),
        Command::Install(install) => on_runtime(async { ended(install.run().await) }),
        Command::Healthcheck(healthcheck) => on_runtime(async { ended(healthcheck.run().await) }),
        Command::Config(ConfigCommand::Check(flags)) => with_config(&flags, |config| {
            for warning in &config.warnings {
                println!("warning: {warning}");
            }
            println!("the configuration is valid");
        }),
        Command::Config(ConfigCommand::Print(flags)) => {
            with_config(&flags, |config| print!("{}", config::effective(config)))
        }
        Command::Openapi => {
            print!("{}", http::openapi_yaml());
            ExitCode::SUCCESS
        }
        Command::Version => {
            println!("postroad {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
    }
}

/// Runs to the end on a runtime of its own.
fn on_runtime(work: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: starting the runtime failed: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(work);
    // A task that outlived its deadline must not keep the process.
    runtime.shutdown_background();
    code
}

/// Whether a run that checks itself found nothing wrong.
fn judged(is_clean: Result<bool, impl Into<anyhow::Error>>) -> ExitCode {
    match is_clean {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => ended(Err(error.into())),
    }
}

fn with_config(flags: &ConfigFlags, show: impl FnOnce(&Config)) -> ExitCode {
    match config::load(&flags.0, &Environment::of_process()) {
        Ok(config) => {
            telemetry::start(&config);
            show(&config);
            ExitCode::SUCCESS
        }
        Err(error) => {
            print_error(&error.into());
            ExitCode::from(2)
        }
    }
}

fn ended(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print_error(&error);
            ExitCode::FAILURE
        }
    }
}

/// One line, causes after colons.
fn print_error(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
