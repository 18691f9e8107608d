//! Private Postgres servers. A watchdog process, waiting on a pipe whose other end the test process holds, stops the
//! server and removes its folder when the test process ends, however it ends.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use postroad::local_postgres::{self, Handle, Settings};
use postroad::supervisor::Supervisor;
use sqlx::{Connection as _, PgConnection};

use super::{background, finish};

/// Ends the server of a folder and removes the folder, once its input ends.
const WATCHDOG: &str = r#"
cat >/dev/null
pid=$(head -n 1 "$1/postgres/postmaster.pid" 2>/dev/null)
if [ -n "$pid" ]; then
    kill -QUIT "$pid" 2>/dev/null
    tries=0
    while kill -0 "$pid" 2>/dev/null && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
fi
rm -rf "$1"/* 2>/dev/null
if mountpoint -q "$1" 2>/dev/null; then umount -l "$1"; fi
rm -rf "$1"
"#;

/// A folder for a server, with its watchdog. The server in it is killed and the folder removed when dropped.
#[derive(Debug)]
pub struct Folder {
    /// Short enough for a socket.
    pub path: PathBuf,
    watchdog: Child,
}

/// A private server. Stopped, and its data removed, when dropped.
#[derive(Debug)]
pub struct Cluster {
    settings: Settings,
    running: Option<(Supervisor, Handle)>,
    // After `running`: dropped last.
    _folder: Folder,
}

/// Parameters that make a server of a test fast: what it writes does not survive the machine, only the process.
pub fn fast() -> Vec<(String, String)> {
    [
        ("fsync", "off"),
        ("full_page_writes", "off"),
        ("max_connections", "400"),
        ("max_prepared_transactions", "20"),
        ("shared_buffers", "128MB"),
        ("max_wal_size", "4GB"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

/// Starts a private server with the fast parameters.
pub async fn cluster() -> Cluster {
    cluster_with(&[]).await
}

/// Starts a private server with further (or other) parameters than the fast ones.
pub async fn cluster_with(parameters: &[(&str, &str)]) -> Cluster {
    cluster_in(Folder::new(), parameters).await
}

/// The same in a folder.
pub async fn cluster_in(folder: Folder, parameters: &[(&str, &str)]) -> Cluster {
    let mut settings = folder.settings();
    for &(name, value) in parameters {
        settings
            .parameters
            .push((name.to_owned(), value.to_owned()));
    }
    let mut cluster = Cluster {
        settings,
        running: None,
        _folder: folder,
    };
    cluster.start().await;
    cluster
}

/// Starts a private server on a copy of another one's data folder, after `prepare` was done to the copy.
pub async fn cluster_of_copy(
    data_dir: &Path,
    parameters: &[(&str, &str)],
    prepare: impl FnOnce(&Path),
) -> Cluster {
    let folder = Folder::new();
    let copy = folder.path.join("postgres");
    copy_folder(data_dir, &copy);
    prepare(&copy);
    let mut settings = folder.settings();
    for &(name, value) in parameters {
        settings
            .parameters
            .push((name.to_owned(), value.to_owned()));
    }
    let mut cluster = Cluster {
        settings,
        running: None,
        _folder: folder,
    };
    cluster.start().await;
    cluster
}

/// Starts a standby of a server, on a copy of its data folder. The server is stopped for it, and started again.
pub async fn standby_of(primary: &mut Cluster) -> Cluster {
    let socket = primary.socket_dir().to_owned();
    primary.stop().await;
    let standby = cluster_of_copy(&primary.data_dir(), &FOLLOW, |copy| follow(copy, &socket)).await;
    primary.start().await;
    standby
}

/// Standbys connect again soon.
const FOLLOW: [(&str, &str); 1] = [("wal_retrieve_retry_interval", "100ms")];

/// Has the server of a data folder follow the one at a socket.
fn follow(data_dir: &Path, socket: &Path) {
    std::fs::write(data_dir.join("standby.signal"), "").unwrap();
    let conf = data_dir.join("postgresql.auto.conf");
    let text = std::fs::read_to_string(&conf).unwrap_or_default();
    let conninfo = format!(
        "primary_conninfo = 'host={} user=postgres'\n",
        socket.display()
    );
    std::fs::write(&conf, text + &conninfo).unwrap();
}

/// Starts a standby of a server that goes on meanwhile, by `pg_basebackup`.
pub async fn backup_of(primary: &Cluster) -> Cluster {
    let folder = Folder::new();
    let backup = folder.path.join("backup");
    let mut command = Command::new(primary.bin_dir().join("pg_basebackup"));
    command
        .args([
            "-U",
            "postgres",
            "-X",
            "stream",
            "-c",
            "fast",
            "--no-sync",
            "-h",
        ])
        .arg(primary.socket_dir())
        .arg("-D")
        .arg(&backup);
    // It can take a moment, and the server's keeper runs here.
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let owner = std::fs::metadata(primary.data_dir()).unwrap();
    let owner = format!("{}:{}", owner.uid(), owner.gid());
    let given = Command::new("chown")
        .arg("-R")
        .arg(owner)
        .arg(&backup)
        .status();
    assert!(given.unwrap().success());
    let socket = primary.socket_dir().to_owned();
    cluster_of_copy(&backup, &FOLLOW, |copy| follow(copy, &socket)).await
}

/// Copies a folder with owners and modes; the target must not be there.
pub fn copy_folder(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.unwrap().success());
}

impl Folder {
    /// A new empty folder.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Not the platform's temporary folder: its path can be too long for a socket.
        let path = PathBuf::from(format!(
            "/tmp/postroad-test-{}-{number}",
            std::process::id()
        ));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        let path = path.canonicalize().unwrap();
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(&path)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { path, watchdog }
    }

    /// Settings for a fast server in it.
    pub fn settings(&self) -> Settings {
        let mut settings = Settings::new(&self.path);
        settings.sync_initdb = false;
        settings.parameters = fast();
        settings
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        let _ = self.watchdog.wait();
    }
}

impl Cluster {
    fn handle(&self) -> &Handle {
        &self.running.as_ref().expect("the cluster is stopped").1
    }

    /// The URL of a database of this server, as its superuser.
    pub fn url(&self, database: &str) -> String {
        self.handle().url_of(database)
    }

    /// The folder of the data, PGDATA.
    pub fn data_dir(&self) -> PathBuf {
        self.settings.data_dir.join("postgres")
    }

    /// The folder of the socket, for `psql -h`.
    pub fn socket_dir(&self) -> &Path {
        self.handle().socket_dir()
    }

    /// The server's folder.
    pub fn folder(&self) -> &Path {
        &self.settings.data_dir
    }

    /// The postmaster's process id.
    pub fn pid(&self) -> Option<i32> {
        self.handle().pid()
    }

    /// Makes an empty database and gives its URL.
    pub async fn create_database(&self, name: &str) -> String {
        let mut admin = PgConnection::connect(&self.url("postgres")).await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(format!("create database {name}")))
            .execute(&mut admin)
            .await
            .unwrap();
        admin.close().await.unwrap();
        self.url(name)
    }

    /// Starts the server again after [`Cluster::stop`]; returns when it accepts connections.
    pub async fn start(&mut self) {
        assert!(self.running.is_none(), "the cluster runs already");
        let settings = self.settings.clone();
        let started = background().spawn(async move {
            let supervisor = Supervisor::new();
            let handle = local_postgres::start(settings, &supervisor).await;
            (supervisor, handle)
        });
        let (supervisor, handle) = started.await.unwrap();
        self.running = Some((supervisor, handle.unwrap()));
    }

    /// Stops the server: sessions end, transactions roll back, a checkpoint is written.
    pub async fn stop(&mut self) {
        if let Some((supervisor, handle)) = self.running.take() {
            drop(handle);
            background()
                .spawn(async move { supervisor.stop(Duration::from_secs(60)).await })
                .await
                .unwrap()
                .unwrap();
        }
    }

    /// Waits until this standby has replayed all that its primary has flushed by now.
    pub async fn has_followed(&self, primary: &Self) {
        let mut there = PgConnection::connect(&primary.url("postgres"))
            .await
            .unwrap();
        let flushed: String = sqlx::query_scalar("select pg_current_wal_flush_lsn()::text")
            .fetch_one(&mut there)
            .await
            .unwrap();
        super::eventually("the standby to follow", || async {
            let mut here = PgConnection::connect(&self.url("postgres")).await.ok()?;
            let replayed = "select pg_last_wal_replay_lsn() >= $1::text::pg_lsn";
            let is_there: bool = sqlx::query_scalar(replayed)
                .bind(&flushed)
                .fetch_one(&mut here)
                .await
                .ok()?;
            is_there.then_some(())
        })
        .await;
    }

    /// Copies the data folder. The server is stopped for it, and started again.
    pub async fn copy_data(&mut self) -> PathBuf {
        self.stop().await;
        let copy = self.data_dir().with_extension("copy");
        copy_folder(&self.data_dir(), &copy);
        self.start().await;
        copy
    }

    /// Puts a copy of the data folder in its place. It stays, and can be put back again.
    pub async fn put_back(&mut self, copy: &Path) {
        self.stop().await;
        std::fs::remove_dir_all(self.data_dir()).unwrap();
        copy_folder(copy, &self.data_dir());
        self.start().await;
    }

    /// The client programs are where the server's are; else on PATH.
    fn bin_dir(&self) -> PathBuf {
        let server = std::fs::read_link(format!("/proc/{}/exe", self.pid().unwrap()));
        server
            .map(|path| path.parent().unwrap().to_owned())
            .unwrap_or_default()
    }

    /// Loads what `pg_dump` with these arguments gives into a database of this server.
    pub fn load_dump(&self, arguments: &[&str], database: &str) {
        let bin_dir = self.bin_dir();
        let file = self.data_dir().with_extension("sql");
        let run = |command: &mut Command| {
            let output = command.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
        };
        let dump = bin_dir.join("pg_dump");
        run(Command::new(dump).arg("-f").arg(&file).args(arguments));
        run(Command::new(bin_dir.join("psql"))
            .args([
                "-q",
                "-v",
                "ON_ERROR_STOP=1",
                "-d",
                &self.url(database),
                "-f",
            ])
            .arg(&file));
    }

    /// Kills the postmaster with -9. It is started again by its keeper, and recovers; wait for it by connecting.
    pub fn kill(&self) {
        let pid = self.pid().expect("the server runs");
        super::send_signal(pid, rustix::process::Signal::KILL);
    }

    /// The same, and waits until another postmaster runs. It may still recover.
    pub async fn kill_and_restart(&self) {
        let pid = self.pid();
        self.kill();
        super::eventually("another Postgres", || async {
            (self.pid().is_some() && self.pid() != pid).then_some(())
        })
        .await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some((supervisor, handle)) = self.running.take() {
            drop(handle);
            let _ = finish(async move { supervisor.stop(Duration::from_secs(60)).await });
        }
    }
}
