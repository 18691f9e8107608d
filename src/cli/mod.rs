//! The command line. It parses and starts each command, whose work is elsewhere, and ends with an exit status: 0 done, 1
//! failed, 2 the command line or the configuration is wrong. Printing never panics, even if nobody reads the output.

mod flags;
mod healthcheck;
mod install;
mod leave;
mod serve;
mod signals;

use std::os::unix::process::CommandExt as _;
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::Context as _;

use clap::{Parser, Subcommand};

use crate::config::{self, Config, Environment, Flags};
use crate::telemetry::{self, tell};
use crate::{bench, demo, http};

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
    /// Run a small shop through the broker, and check that no message was lost, repeated or out of order
    Demo(demo::Options),
    /// Measure a broker, and check that it delivered everything once and in order
    Bench(Box<bench::Options>),
    /// Install the schema of the outbox or the inbox in a database, or print it as SQL
    Install(install::Install),
    /// Give up an outbox, so that another broker, or this one under another origin, can relay it
    Release(leave::Release),
    /// Remove the outbox or the inbox from a database, or print the SQL for it
    Uninstall(leave::Uninstall),
    /// Forget an origin, or rename it, in the broker's database
    #[command(subcommand)]
    Origin(leave::Origin),
    /// Print the description of the HTTP API, openapi.yaml
    Openapi,
    /// Check or print the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Ask a running broker whether it is ready; exit status 0 if so
    Healthcheck(healthcheck::Healthcheck),
    /// Print the version
    Version,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Read the configuration and report every mistake
    Check(ConfigFlags),
    /// Print the settings in effect and where each value came from, without passwords
    Print(ConfigFlags),
}

/// How long the last lines of the log have.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Parses the process's arguments, runs the command and gives the exit status.
#[must_use]
pub fn main() -> ExitCode {
    let code = run(Cli::parse().command);
    telemetry::flush(LAST_WORDS);
    code
}

fn run(command: Command) -> ExitCode {
    match command {
        // Takes a runtime for each history of the database.
        Command::Serve(flags) => serve::main(&flags),
        Command::Demo(options) => {
            if options.database_url.is_none() && !has_database() {
                forget_pgoptions();
            }
            on_runtime(async {
                let report = demo::run(options).await;
                judged(report.map(|report| report.is_clean()))
            })
        }
        Command::Bench(options) => {
            if options.database_url.is_none() && !has_database() {
                forget_pgoptions();
            }
            on_runtime(async {
                let report = bench::run(*options).await;
                judged(report.map(|report| report.is_clean()))
            })
        }
        Command::Install(install) => on_runtime(async { ended(install.run().await) }),
        Command::Release(release) => on_runtime(async { ended(release.run().await) }),
        Command::Uninstall(uninstall) => on_runtime(async { ended(uninstall.run().await) }),
        Command::Origin(origin) => on_runtime(async { ended(origin.run().await) }),
        Command::Healthcheck(healthcheck) => on_runtime(async { ended(healthcheck.run().await) }),
        Command::Config(ConfigCommand::Check(flags)) => with_config(&flags, |config| {
            let warnings = config.warnings.iter();
            let mut text: String = warnings.map(|it| format!("warning: {it}\n")).collect();
            text.push_str("the configuration is valid\n");
            text
        }),
        Command::Config(ConfigCommand::Print(flags)) => with_config(&flags, config::effective),
        Command::Openapi => ended(print(&http::openapi_yaml())),
        Command::Version => ended(print(&format!("postroad {}\n", env!("CARGO_PKG_VERSION")))),
    }
}

/// Whether variables or the file name a database.
fn has_database() -> bool {
    let config = config::load(&Flags::default(), &Environment::of_process());
    config.is_ok_and(|config| config.database_url.is_some())
}

/// Starts the program again without `PGOPTIONS`, if it is set: the private Postgres must be reachable whatever a developer has
/// in there, and the driver cannot be told to ignore it.
fn forget_pgoptions() {
    const NAME: &str = "PGOPTIONS";
    if std::env::var_os(NAME).is_none() {
        return;
    }
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "postroad".into());
    let error = match std::env::current_exe() {
        Ok(program) => process::Command::new(program)
            .arg0(name)
            .args(arguments)
            .env_remove(NAME)
            .exec(),
        Err(error) => error,
    };
    tell!("warning: {NAME} could not be removed from the environment: {error}");
}

/// Runs to the end on its own runtime.
fn on_runtime(work: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            tell!("error: starting the runtime failed: {error}");
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

/// Prints a command's result.
fn print(text: &str) -> anyhow::Result<()> {
    telemetry::print(text).context("writing to standard output failed")
}

fn with_config(flags: &ConfigFlags, show: impl FnOnce(&Config) -> String) -> ExitCode {
    match config::load(&flags.0, &Environment::of_process()) {
        Ok(config) => {
            telemetry::start(&config);
            ended(print(&show(&config)))
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
    tell!("error: {error:#}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
