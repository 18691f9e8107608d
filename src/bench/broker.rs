//! The target of the load: a running broker, or one that the bench starts as a separate process on its own database, which
//! it drops at the end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use super::api::Api;
use super::options::Options;
use super::wire::Address;
use super::{Error, Interrupt};
use crate::config::{self, Environment, Flags};
use crate::local_postgres;
use crate::store::{self, Connection, Database};
use crate::supervisor::Supervisor;
use crate::telemetry::tell;

const START_DEADLINE: Duration = Duration::from_secs(60);
/// Longer than `serve` gives itself.
const STOP_DEADLINE: Duration = Duration::from_secs(40);

/// A broker under test, and its Postgres.
pub(super) struct Broker {
    pub(super) api: Api,
    pub(super) address: Address,
    /// The broker's own database, where producers insert.
    pub(super) database: Database,
    /// In words, for the head of the report.
    pub(super) place: String,
    own: Option<Own>,
}

/// The parts that the bench started itself.
struct Own {
    child: Child,
    log_path: PathBuf,
    admin: Connection,
    name: String,
}

impl Broker {
    pub(super) async fn start(
        options: &Options,
        postgres: &Supervisor,
        interrupt: &Interrupt,
    ) -> Result<Self, Error> {
        match &options.url {
            Some(url) => Self::running(url, options).await,
            None => Self::own(options, postgres, interrupt).await,
        }
    }

    async fn running(url: &str, options: &Options) -> Result<Self, Error> {
        let address = Address::of(url).ok_or_else(|| Error::Url {
            url: url.to_owned(),
        })?;
        let database_url = options.database_url.as_ref();
        let database = Database::new(database_url.ok_or(Error::NoDatabaseUrl)?, 1)?;
        let api = Api::new(url)?;
        if !api.is_ready().await {
            return Err(Error::NotThere {
                url: url.to_owned(),
            });
        }
        Ok(Self {
            place: format!("{url}, running already; Postgres {}", database.place()),
            api,
            address,
            database,
            own: None,
        })
    }

    async fn own(
        options: &Options,
        postgres: &Supervisor,
        interrupt: &Interrupt,
    ) -> Result<Self, Error> {
        let (server, is_private) = server_url(options, postgres).await?;
        let mut admin = Database::new(&server, 1)?.connect().await?;
        if is_private {
            // Nobody else uses this server: what is there was left by a run that was killed.
            store::bench::drop_left_databases(&mut admin).await?;
        }
        let name = format!("postroad_bench_{}", std::process::id());
        store::bench::create_database(&mut admin, &name).await?;
        let url = with_database(&server, &name);
        let socket = std::net::TcpListener::bind(("127.0.0.1", 0)).map_err(Error::Port)?;
        let address = socket.local_addr().map_err(Error::Port)?;
        drop(socket);
        let log_path = std::env::temp_dir().join(format!("postroad-bench-{address}.log"));
        let base = format!("http://{address}");
        let database = Database::new(&url, 1)?;
        let mut broker = Self {
            api: Api::new(&base)?,
            address: Address::of(&base).ok_or(Error::Url { url: base })?,
            place: format!("a separate process; Postgres {}", database.place()),
            database,
            own: Some(Own {
                child: spawn(address, &url, &log_path)?,
                log_path,
                admin,
                name,
            }),
        };
        match broker.wait_until_ready(interrupt).await {
            Ok(()) => Ok(broker),
            Err(error) => {
                broker.stop().await;
                Err(error)
            }
        }
    }

    /// Whether the bench started it, so that nobody else uses it and its database.
    pub(super) const fn is_own(&self) -> bool {
        self.own.is_some()
    }

    async fn wait_until_ready(&mut self, interrupt: &Interrupt) -> Result<(), Error> {
        let since = Instant::now();
        while !self.api.is_ready().await {
            let Some(own) = &mut self.own else {
                return Ok(());
            };
            let has_ended = own.child.try_wait().map_err(Error::Process)?.is_some();
            if has_ended || since.elapsed() > START_DEADLINE {
                return Err(Error::NotReady {
                    log: own.log_path.clone(),
                });
            }
            interrupt.pause(Duration::from_millis(20)).await?;
        }
        Ok(())
    }

    /// The most memory that its process ever used, in MiB; None where /proc does not tell.
    pub(super) fn peak_memory_mib(&self) -> Option<f64> {
        let pid = self.own.as_ref()?.child.id()?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
        Some(kibibytes / 1024.0)
    }

    /// Processor time of its process so far, in seconds.
    pub(super) fn cpu_seconds(&self) -> Option<f64> {
        let pid = self.own.as_ref()?.child.id()?;
        super::proc::cpu_seconds_of(i32::try_from(pid).ok()?)
    }

    /// Stops the parts that the bench started, in order, and drops the database. A broker that ran before runs on.
    pub(super) async fn stop(self) {
        let Some(mut own) = self.own else {
            return;
        };
        self.database.close().await;
        let pid = own.child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let ended = tokio::time::timeout(STOP_DEADLINE, own.child.wait()).await;
        match ended {
            Ok(Ok(status)) if status.success() => {
                let _ = std::fs::remove_file(&own.log_path);
            }
            Ok(_) => tell!("the broker failed; its log is {}", own.log_path.display()),
            Err(_) => {
                tell!(
                    "the broker did not stop in time; its log is {}",
                    own.log_path.display()
                );
                let _ = own.child.kill().await;
            }
        }
        if let Err(error) = store::bench::drop_database(&mut own.admin, &own.name).await {
            tell!("dropping the database {} failed: {error}", own.name);
        }
    }
}

/// The server's URL, and whether it is a private one that was started for this.
async fn server_url(options: &Options, postgres: &Supervisor) -> Result<(String, bool), Error> {
    if let Some(url) = &options.database_url {
        return Ok((url.clone(), false));
    }
    let flags = Flags {
        file: None,
        values: Default::default(),
    };
    let config = config::load(&flags, &Environment::of_process())?;
    if let Some(url) = config.database_url {
        return Ok((url, false));
    }
    let data_dir = options
        .data_dir
        .clone()
        .unwrap_or_else(|| local_postgres::default_data_dir().join("bench"));
    let mut settings = local_postgres::Settings::new(data_dir);
    settings.bin_dir = config.postgres_bin;
    let server = local_postgres::start(settings, postgres).await?;
    Ok((server.url(), true))
}

/// The URL with another database in it.
fn with_database(url: &str, name: &str) -> String {
    let (rest, query) = match url.split_once('?') {
        Some((rest, query)) => (rest, format!("?{query}")),
        None => (url, String::new()),
    };
    let authority = rest.find("://").map_or(0, |at| at + 3);
    let end = rest[authority..]
        .find('/')
        .map_or(rest.len(), |at| authority + at);
    format!("{}/{name}{query}", &rest[..end])
}

fn spawn(address: SocketAddr, url: &str, log_path: &std::path::Path) -> Result<Child, Error> {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(log_path)
        .map_err(Error::Process)?;
    let program = std::env::current_exe().map_err(Error::Process)?;
    Command::new(program)
        .args(["serve", "--bind", &address.to_string()])
        // A postroad.toml of the working folder could name origins, which are not the bench's to relay.
        .current_dir("/")
        .env_remove("POSTROAD_CONFIG")
        // Not an argument: everybody on the machine can read those, and the URL may hold a password.
        .env("POSTROAD_DATABASE_URL", url)
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(Error::Process)?)
        .stderr(log)
        // Ctrl-C reaches the bench alone, which then stops the broker in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(Error::Process)
}

#[cfg(test)]
mod tests {
    use super::with_database;

    #[test]
    fn a_url_gets_another_database() {
        for (url, expected) in [
            ("postgres://u:p@h:1/db", "postgres://u:p@h:1/bench"),
            ("postgres://h", "postgres://h/bench"),
            (
                "postgres://u@localhost/db?host=/tmp/x",
                "postgres://u@localhost/bench?host=/tmp/x",
            ),
            (
                "postgres:///db?host=/tmp/x",
                "postgres:///bench?host=/tmp/x",
            ),
        ] {
            assert_eq!(with_database(url, "bench"), expected);
        }
    }
}
