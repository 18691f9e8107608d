//! A private Postgres for users who have none: found on the machine, initialised in a data folder, started, kept running,
//! stopped with the broker.
//!
//! It listens only on a Unix socket, in a folder that only its account may enter. So it needs no password and no port, and
//! nobody else on the machine reaches it. The data folder is locked while a broker uses it. A broker killed with -9 leaves
//! its server running: the next broker adopts it. A server killed with -9 is started again, and recovers from its log.
//! `initdb` works in a folder beside the final one, which is renamed when complete, so a kill half-way leaves nothing
//! behind.

mod account;
mod binaries;
mod folder;
mod server;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::supervisor::{OnEnd, Supervisor};

pub use account::Account;
pub use binaries::{Installation, find};
pub use server::let_go;

/// The superuser of the private server. Not named like the schema `postroad`, which would come first in its search path.
pub const USER: &str = "postgres";
/// The database that is made with the server.
pub const DATABASE: &str = "postroad";

/// The port that its socket is named for.
pub const PORT: u16 = 5432;

/// How to run the private server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folder of everything: the lock, the database cluster, its log and, when the path is short enough, its socket.
    pub data_dir: PathBuf,
    /// The folder of `postgres` and `initdb`; found by itself when `None`.
    pub bin_dir: Option<PathBuf>,
    /// Server parameters beyond Postroad's own, as `-c name=value` would give them.
    pub parameters: Vec<(String, String)>,
    /// Whether `initdb` flushes to disk. Tests turn it off.
    pub sync_initdb: bool,
    /// How long the server may take to accept connections, crash recovery included.
    pub start_deadline: Duration,
}

impl Settings {
    /// Settings for lasting data in `data_dir`.
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            bin_dir: None,
            parameters: Vec::new(),
            sync_initdb: true,
            start_deadline: Duration::from_secs(300),
        }
    }
}

/// Reasons why the private server did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No installation anywhere.
    #[error(
        "no Postgres server was found on PATH or in {places}: install one (`make install-postgres`, or your system's package postgresql), \
         set POSTROAD_POSTGRES_BIN to the folder of `postgres` and `initdb`, or set DATABASE_URL to a running server"
    )]
    NotFound {
        /// The places looked in.
        places: String,
    },
    /// The data folder was made by a major version that is not installed.
    #[error("the data in {data_dir} needs Postgres {needed}, and only {found} is installed", data_dir = data_dir.display())]
    Version {
        /// The data folder.
        data_dir: PathBuf,
        /// Major version of the data.
        needed: String,
        /// Major versions installed.
        found: String,
    },
    /// Another broker holds the lock.
    #[error(
        "another postroad uses the data folder {data_dir}: stop it, or choose another folder with --data-dir",
        data_dir = data_dir.display()
    )]
    Locked {
        /// The data folder.
        data_dir: PathBuf,
    },
    /// Running as root, and no account to run the server as.
    #[error("Postgres refuses to run as root, and neither the user `postgres` nor `nobody` exists")]
    NoAccount,
    /// A user id that has no name, as containers can be given.
    #[error(
        "the user id {uid} has no name, which Postgres needs: add it to /etc/passwd, run as another user, or set DATABASE_URL to a running server"
    )]
    Nameless {
        /// The user id.
        uid: u32,
    },
    /// The account that runs the server may not enter a folder on the way to the data.
    #[error(
        "the user `{user}`, which runs Postgres when postroad runs as root, may not enter {folder}: choose another --data-dir",
        folder = folder.display()
    )]
    Unreachable {
        /// Account name.
        user: String,
        /// First folder that cannot be entered.
        folder: PathBuf,
    },
    /// The socket's folder belongs to somebody else.
    #[error("the socket's folder {folder} belongs to another user", folder = folder.display())]
    Squatted {
        /// The folder.
        folder: PathBuf,
    },
    /// Reading or writing a file or folder.
    #[error("{doing} {path} failed", path = path.display())]
    File {
        /// The operation that failed.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A program of Postgres ended with an error.
    #[error("{program} failed: {output}")]
    Program {
        /// `initdb` or `postgres`.
        program: &'static str,
        /// The last lines it wrote.
        output: String,
    },
    /// The supervisor was stopped meanwhile.
    #[error("the start was aborted before the server was up")]
    Stopped,
    /// The server neither accepts connections nor ends.
    #[error("Postgres did not accept connections within {waited:?}; see {log}", log = log.display())]
    StartDeadline {
        /// The deadline.
        waited: Duration,
        /// The server's log.
        log: PathBuf,
    },
}

impl Error {
    fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            doing,
            path,
            source,
        }
    }
}

/// A running private server. It runs until the supervisor it was started under is stopped.
#[derive(Debug, Clone)]
pub struct Handle {
    folder: folder::Folder,
}

impl Handle {
    /// The URL of the database [`DATABASE`]. Holds no password.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_of(DATABASE)
    }

    /// The URL of another database of the server. It says all that it could, so that no variable of the environment leads elsewhere.
    #[must_use]
    pub fn url_of(&self, database: &str) -> String {
        let host = percent_encoding::utf8_percent_encode(
            &self.folder.socket_dir.to_string_lossy(),
            URL_QUERY,
        )
        .to_string();
        format!(
            "postgres://{USER}:@localhost:{PORT}/{database}?host={host}&sslmode=disable&application_name=postroad"
        )
    }

    /// The folder of the socket `.s.PGSQL.5432`, what `psql -h` takes.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        &self.folder.socket_dir
    }

    /// The database cluster's folder, PGDATA.
    #[must_use]
    pub fn cluster_dir(&self) -> &Path {
        &self.folder.cluster_dir
    }

    /// The server's log.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.folder.log_path
    }

    /// The postmaster's process id, if it runs now.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        server::running_pid(&self.folder)
    }
}

/// The characters to escape in a value of a URL's query. A slash may stay.
const URL_QUERY: &percent_encoding::AsciiSet = &percent_encoding::CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'&')
    .add(b'+')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'=');

/// The default data folder: the platform's folder for a user's data, or, for root, one that the account which runs Postgres
/// can enter.
#[must_use]
pub fn default_data_dir() -> PathBuf {
    if account::is_root() {
        return PathBuf::from("/var/lib/postroad");
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(base) = variable("XDG_DATA_HOME") {
        return PathBuf::from(base).join("postroad");
    }
    match variable("HOME") {
        Some(home) if cfg!(target_os = "macos") => {
            PathBuf::from(home).join("Library/Application Support/postroad")
        }
        Some(home) => PathBuf::from(home).join(".local/share/postroad"),
        None => PathBuf::from("postroad-data"),
    }
}

/// Starts (or adopts) the private server and keeps it running until `supervisor` is stopped; then it is shut down, so
/// stop that supervisor after everything that uses the database. Resolves when the server accepts connections. Cancel-safe: what was
/// begun goes on in a task, until the supervisor is stopped.
///
/// # Errors
/// See [`Error`]. Nothing is left running after an error.
pub async fn start(settings: Settings, supervisor: &Supervisor) -> Result<Handle, Error> {
    let (started, has_started) = oneshot::channel();
    let watch = supervisor.clone();
    supervisor.spawn("local-postgres start", OnEnd::Ordinary, async move {
        // Who asked may have left; the keeper does not, until it is told to.
        let _ = started.send(begin(settings, &watch).await);
    });
    has_started.await.unwrap_or(Err(Error::Stopped))
}

/// Starts the server, and its keeper.
async fn begin(settings: Settings, supervisor: &Supervisor) -> Result<Handle, Error> {
    let account = account::server_account()?;
    let folder = folder::prepare(&settings, account)?;
    let installation = binaries::choose(&settings, &folder)?;
    folder::initialise(&folder, &installation, settings.sync_initdb, supervisor).await?;
    let running = server::start(&folder, &installation, &settings, supervisor).await?;
    tracing::info!(
        data = %folder.cluster_dir.display(),
        psql = ?format!("psql -h {} -U {USER} {DATABASE}", folder.socket_dir.display()),
        version = installation.version,
        adopted = running.is_adopted(),
        "local Postgres is running"
    );
    let handle = Handle {
        folder: folder.clone(),
    };
    let watch = supervisor.clone();
    supervisor.spawn("local-postgres", OnEnd::StopProcess, async move {
        server::keep(running, &folder, &installation, &settings, &watch).await;
    });
    Ok(handle)
}
