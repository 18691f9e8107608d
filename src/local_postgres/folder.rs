//! The data folder: its lock, its parts, and the initialisation of the database cluster in it.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::process::Command;
use tokio::time::timeout;

use super::{Account, DATABASE, Error, Installation, Settings, USER};
use crate::supervisor::Supervisor;

/// The longest folder that still leaves room for `/.s.PGSQL.5432` in a socket's address (104 bytes on the BSDs).
const SOCKET_DIR_MAX_BYTES: usize = 86;

/// How long a program has to end after it was told to.
const PROGRAM_STOP: Duration = Duration::from_secs(5);

/// The places of the parts. Holds the lock while any clone lives.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    pub(super) cluster_dir: PathBuf,
    pub(super) socket_dir: PathBuf,
    pub(super) log_path: PathBuf,
    pub(super) account: Option<Account>,
    _lock: Arc<Lock>,
}

/// The lock of a data folder. A process that another thread is just starting has this file open too until its program
/// runs, and closing ours alone would leave the folder locked until then: so it is unlocked, not only closed.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing it releases it as well, if later.
        let _ = self.0.unlock();
    }
}

impl Folder {
    /// The major version that made the cluster; `None` while there is none.
    pub(super) fn cluster_version(&self) -> Option<String> {
        std::fs::read_to_string(self.cluster_dir.join("PG_VERSION"))
            .ok()
            .map(|text| text.trim().to_owned())
    }

    /// A command of the installation, run by the account that owns the data, without the caller's PG* variables, and in a separate
    /// process group: a Ctrl-C at the terminal must reach the broker first.
    pub(super) fn command(&self, installation: &Installation, program: &str) -> Command {
        let mut command = Command::new(installation.bin_dir.join(program));
        command
            .current_dir("/")
            .env_clear()
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .env("PATH", "/usr/bin:/bin")
            .process_group(0)
            .stdin(Stdio::null());
        // Where an installation unpacked without root has its libraries.
        if let Some(libraries) = std::env::var_os("LD_LIBRARY_PATH") {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        if let Some(account) = &self.account {
            // The standard library drops the supplementary groups with the user id.
            command.gid(account.gid).uid(account.uid);
        }
        command
    }

    fn give_to_account(&self, path: &Path) -> Result<(), Error> {
        if let Some(account) = &self.account {
            chown(path, Some(account.uid), Some(account.gid))
                .map_err(Error::file("giving away", path))?;
        }
        Ok(())
    }
}

/// Makes and locks the data folder.
pub(super) fn prepare(settings: &Settings, account: Option<Account>) -> Result<Folder, Error> {
    let asked = &settings.data_dir;
    make_data_dir(asked, account.as_ref())?;
    let data_dir = asked
        .canonicalize()
        .map_err(Error::file("finding", asked))?;
    if let Some(account) = &account {
        check_reachable(&data_dir, account)?;
    }
    let lock_path = data_dir.join("lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path)
        .map_err(Error::file("opening", &lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::Locked { data_dir }),
        Err(TryLockError::Error(source)) => {
            return Err(Error::file("locking", &lock_path)(source));
        }
    }
    let mut socket_dir = data_dir.join("run");
    if socket_dir.as_os_str().len() > SOCKET_DIR_MAX_BYTES {
        let hash = xxhash_rust::xxh3::xxh3_64(data_dir.as_os_str().as_encoded_bytes());
        socket_dir = PathBuf::from(format!("/tmp/postroad-{hash:016x}"));
    }
    let folder = Folder {
        cluster_dir: data_dir.join("postgres"),
        log_path: data_dir.join("postgres.log"),
        socket_dir,
        account,
        _lock: Arc::new(Lock(lock)),
    };
    make_private(&folder)?;
    Ok(folder)
}

/// The folder of it all is closed to others where it is made here. One that is there keeps its mode.
fn make_data_dir(path: &Path, account: Option<&Account>) -> Result<(), Error> {
    if path.is_dir() {
        return Ok(());
    }
    let failed = || Error::file("making the folder", path);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed())?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        // By another process, meanwhile; the lock says whose it is.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(failed()(error)),
    }
    if let Some(account) = account {
        chown(path, Some(account.uid), Some(account.gid))
            .map_err(Error::file("giving away", path))?;
    }
    Ok(())
}

/// The socket's folder: only the server's account may enter it, which is all the authentication there is.
fn make_private(folder: &Folder) -> Result<(), Error> {
    let path = &folder.socket_dir;
    match std::fs::create_dir(path) {
        Ok(()) => folder.give_to_account(path)?,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::file("making the folder", path)(error)),
    }
    let found = std::fs::symlink_metadata(path).map_err(Error::file("reading", path))?;
    let owner = folder
        .account
        .as_ref()
        .map_or_else(|| rustix::process::geteuid().as_raw(), |a| a.uid);
    if !found.is_dir() || found.uid() != owner {
        return Err(Error::Squatted {
            folder: path.clone(),
        });
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o700))
        .map_err(Error::file("closing", path))
}

/// Whether the account may enter every folder above the data.
fn check_reachable(data_dir: &Path, account: &Account) -> Result<(), Error> {
    for folder in data_dir.ancestors() {
        let found = folder.metadata().map_err(Error::file("reading", folder))?;
        let mode = found.mode();
        let may_enter = if found.uid() == account.uid {
            mode & 0o100 != 0
        } else if found.gid() == account.gid {
            mode & 0o010 != 0
        } else {
            mode & 0o001 != 0
        };
        if !may_enter {
            return Err(Error::Unreachable {
                user: account.name.clone(),
                folder: folder.to_owned(),
            });
        }
    }
    Ok(())
}

/// Makes the database cluster unless it is there.
pub(super) async fn initialise(
    folder: &Folder,
    installation: &Installation,
    sync: bool,
    supervisor: &Supervisor,
) -> Result<(), Error> {
    if folder.cluster_version().is_some() {
        return Ok(());
    }
    let fresh = folder.cluster_dir.with_extension("new");
    match std::fs::remove_dir_all(&fresh) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::file("removing", &fresh)(error)),
    }
    std::fs::create_dir(&fresh).map_err(Error::file("making the folder", &fresh))?;
    folder.give_to_account(&fresh)?;
    // Locale C: bytewise order is what indexes want, and no update of the system can change it beneath the data.
    let mut initdb = folder.command(installation, "initdb");
    initdb
        .arg("--pgdata")
        .arg(&fresh)
        .args(["--username", USER, "--encoding", "UTF8", "--locale", "C"])
        .args(["--auth-local", "trust", "--auth-host", "reject"])
        .arg("--data-checksums");
    if !sync {
        initdb.arg("--no-sync");
    }
    run("initdb", &mut initdb, supervisor).await?;
    // The server in its single-user mode reads statements from its input: no client program is needed.
    let statements = fresh.join("create_database.sql");
    std::fs::write(&statements, format!("create database {DATABASE}\n"))
        .map_err(Error::file("writing", &statements))?;
    let input = File::open(&statements).map_err(Error::file("opening", &statements))?;
    let mut single = folder.command(installation, "postgres");
    single.arg("--single").arg("-D").arg(&fresh);
    if !sync {
        single.arg("-F");
    }
    single.arg("postgres").stdin(input);
    run("postgres --single", &mut single, supervisor).await?;
    std::fs::remove_file(&statements).map_err(Error::file("removing", &statements))?;
    std::fs::rename(&fresh, &folder.cluster_dir)
        .map_err(Error::file("naming", &folder.cluster_dir))?;
    if sync {
        let parent = folder.cluster_dir.parent().unwrap_or(Path::new("/"));
        File::open(parent)
            .and_then(|parent| parent.sync_all())
            .map_err(Error::file("flushing", parent))?;
    }
    Ok(())
}

/// Runs a program to its end, or ends it when the supervisor is stopped.
async fn run(
    program: &'static str,
    command: &mut Command,
    supervisor: &Supervisor,
) -> Result<(), Error> {
    let failed = || Error::file("running", Path::new(program));
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed())?;
    let group = child.id().and_then(|id| i32::try_from(id).ok());
    let group = group.and_then(rustix::process::Pid::from_raw);
    let mut output = pin!(child.wait_with_output());
    let output = tokio::select! {
        output = &mut output => output.map_err(failed())?,
        () = supervisor.stopping() => {
            // It is in a group of its own, and takes away what it made.
            for signal in [Signal::TERM, Signal::KILL] {
                if let Some(group) = group {
                    let _ = rustix::process::kill_process_group(group, signal);
                }
                if timeout(PROGRAM_STOP, &mut output).await.is_ok() {
                    break;
                }
            }
            return Err(Error::Stopped);
        }
    };
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("could not look up effective user ID") {
        let uid = rustix::process::geteuid().as_raw();
        return Err(Error::Nameless { uid });
    }
    Err(Error::Program {
        program,
        output: last_lines(&text, 4),
    })
}

/// The last lines of a text, joined into one.
pub(super) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join(" | ")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_folder_is_free_at_once_while_processes_start_beside() {
        let place = std::env::temp_dir().join(format!("postroad-lock-{}", std::process::id()));
        let settings = Settings::new(&place);
        let over = AtomicBool::new(false);
        let locked = std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        std::process::Command::new("true").status().unwrap();
                    }
                });
            }
            let started = std::time::Instant::now();
            let mut locked = None;
            while locked.is_none() && started.elapsed().as_millis() < 500 {
                locked = prepare(&settings, None).err();
            }
            over.store(true, Ordering::Relaxed);
            locked
        });
        std::fs::remove_dir_all(&place).unwrap();
        assert!(locked.is_none(), "{locked:?}");
    }
}
