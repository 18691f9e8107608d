//! The server's process: started or adopted, watched, started again, shut down.

use std::collections::BTreeSet;
use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::process::Child;
use tokio::time::{Instant, sleep};

use super::{Error, Installation, Settings, folder::Folder};
use crate::supervisor::{Backoff, Supervisor};

/// How often a process that is not our child, and a starting server, is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The pause before a server that ended is started again.
const RESTART: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
/// After a fast shutdown has had this long, an immediate one follows; nothing is lost, the next start recovers.
const FAST_STOP: Duration = Duration::from_secs(20);
/// How long the last backends of a killed server may hold its shared memory.
const LEFTOVERS: Duration = Duration::from_secs(15);
/// A log longer than this, in bytes, is put aside at start; one old log is kept.
const LOG_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// The servers that this process started or adopted, by process id, as long as they run.
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn running() -> MutexGuard<'static, BTreeSet<i32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells every server that this process started or adopted to stop, and waits for none: for a process that has to end now.
pub fn let_go() {
    for pid in running().iter().filter_map(|&pid| Pid::from_raw(pid)) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, Signal::INT);
    }
}

/// A running server.
#[derive(Debug)]
pub(super) enum Running {
    /// Started by us.
    Child(Child, Pid),
    /// Left running by a broker that was killed.
    Adopted(Pid),
}

impl Running {
    fn child(child: Child, pid: Pid) -> Self {
        running().insert(pid.as_raw_pid());
        Self::Child(child, pid)
    }

    fn adopted(pid: Pid) -> Self {
        running().insert(pid.as_raw_pid());
        Self::Adopted(pid)
    }

    pub(super) fn is_adopted(&self) -> bool {
        matches!(self, Self::Adopted(_))
    }

    fn pid(&self) -> Pid {
        match self {
            Self::Child(_, pid) | Self::Adopted(pid) => *pid,
        }
    }

    /// How our child has ended, if it has.
    fn has_ended(&mut self) -> Option<std::process::ExitStatus> {
        let Self::Child(child, pid) = self else {
            return None;
        };
        let ended = child.try_wait().ok().flatten();
        if ended.is_some() {
            running().remove(&pid.as_raw_pid());
        }
        ended
    }

    /// Resolves when the process has ended, with how. Cancel-safe.
    async fn ended(&mut self) -> String {
        let how = match self {
            Self::Child(child, _) => child
                .wait()
                .await
                .map_or_else(|error| error.to_string(), |status| status.to_string()),
            Self::Adopted(pid) => {
                while is_alive(*pid) {
                    sleep(LOOK_EVERY * 10).await;
                }
                "it was not our child".to_owned()
            }
        };
        running().remove(&self.pid().as_raw_pid());
        how
    }
}

fn is_alive(pid: Pid) -> bool {
    match rustix::process::test_kill_process(pid) {
        Ok(()) => !is_zombie(pid),
        Err(error) => error == rustix::io::Errno::PERM,
    }
}

/// A killed process that its parent has not waited for: in a container whose first process reaps nothing it stays.
fn is_zombie(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            let state = stat.rsplit_once(')')?.1.trim_start().chars().next()?;
            Some(state == 'Z')
        })
        .unwrap_or(false)
}

/// The contents of `postmaster.pid`.
struct PidFile {
    pid: Pid,
    is_ready: bool,
}

fn read_pid_file(cluster_dir: &Path) -> Option<PidFile> {
    let text = std::fs::read_to_string(cluster_dir.join("postmaster.pid")).ok()?;
    let mut lines = text.lines();
    let pid = Pid::from_raw(lines.next()?.trim().parse().ok()?)?;
    let is_ready = lines.nth(6).is_some_and(|line| line.trim() == "ready");
    Some(PidFile { pid, is_ready })
}

/// Whether the process is the server of this folder. A number written before a reboot, or in another container, may
/// belong to anybody by now.
fn is_server_of(pid: Pid, cluster_dir: &Path) -> bool {
    if !is_alive(pid) {
        return false;
    }
    if Path::new("/proc/self").exists() {
        return std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == cluster_dir);
    }
    std::process::Command::new("ps")
        .args(["-o", "command=", "-p", &pid.to_string()])
        .output()
        .is_ok_and(|output| {
            String::from_utf8_lossy(&output.stdout).contains(&*cluster_dir.to_string_lossy())
        })
}

pub(super) fn running_pid(folder: &Folder) -> Option<i32> {
    read_pid_file(&folder.cluster_dir)
        .filter(|file| is_server_of(file.pid, &folder.cluster_dir))
        .map(|file| file.pid.as_raw_pid())
}

/// Adopts the server that runs, or starts one, and waits until it accepts connections, or until the supervisor is stopped.
pub(super) async fn start(
    folder: &Folder,
    installation: &Installation,
    settings: &Settings,
    supervisor: &Supervisor,
) -> Result<Running, Error> {
    let deadline = Instant::now() + settings.start_deadline;
    loop {
        match read_pid_file(&folder.cluster_dir) {
            Some(file) if is_server_of(file.pid, &folder.cluster_dir) => {
                // Ready: ours now. Starting or stopping: wait for what becomes of it.
                if file.is_ready {
                    return Ok(Running::adopted(file.pid));
                }
                if Instant::now() > deadline {
                    return Err(start_deadline(folder, settings));
                }
                if supervisor.is_stopping() {
                    return Err(Error::Stopped);
                }
                sleep(LOOK_EVERY).await;
            }
            Some(_) => {
                let path = folder.cluster_dir.join("postmaster.pid");
                std::fs::remove_file(&path).map_err(Error::file("removing the stale", &path))?;
            }
            None => break,
        }
    }
    let leftovers = Instant::now() + LEFTOVERS;
    loop {
        match launch(folder, installation, settings, (deadline, supervisor)).await {
            Err(Error::Program { output, .. })
                if output.contains("shared memory")
                    && Instant::now() < leftovers
                    && !supervisor.is_stopping() =>
            {
                sleep(Duration::from_millis(300)).await;
            }
            outcome => return outcome,
        }
    }
}

fn start_deadline(folder: &Folder, settings: &Settings) -> Error {
    Error::StartDeadline {
        waited: settings.start_deadline,
        log: folder.log_path.clone(),
    }
}

async fn launch(
    folder: &Folder,
    installation: &Installation,
    settings: &Settings,
    (deadline, supervisor): (Instant, &Supervisor),
) -> Result<Running, Error> {
    let log_path = &folder.log_path;
    if std::fs::metadata(log_path).is_ok_and(|log| log.len() > LOG_MAX_BYTES) {
        let old = log_path.with_extension("log.old");
        std::fs::rename(log_path, &old).map_err(Error::file("putting aside", log_path))?;
    }
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log_path)
        .map_err(Error::file("opening", log_path))?;
    // One that was there already.
    log.set_permissions(Permissions::from_mode(0o600))
        .map_err(Error::file("closing", log_path))?;
    let log_start = log.metadata().map_or(0, |log| log.len());
    let mut command = folder.command(installation, "postgres");
    command.arg("-D").arg(&folder.cluster_dir);
    let own = [
        ("listen_addresses", String::new()),
        (
            "unix_socket_directories",
            folder.socket_dir.to_string_lossy().into_owned(),
        ),
        ("unix_socket_permissions", "0700".to_owned()),
        ("port", super::PORT.to_string()),
        ("max_connections", "200".to_owned()),
        ("cluster_name", "postroad".to_owned()),
        ("log_line_prefix", "%m [%p] ".to_owned()),
        // Payloads are in statements, in their parameters and in the rows that a check refuses: none of it is for a log.
        ("log_min_error_statement", "panic".to_owned()),
        ("log_parameter_max_length", "0".to_owned()),
        ("log_parameter_max_length_on_error", "0".to_owned()),
        ("log_error_verbosity", "terse".to_owned()),
    ];
    for (name, value) in &own {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    for (name, value) in &settings.parameters {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    let out = log.try_clone().map_err(Error::file("opening", log_path))?;
    let child = command
        .stdout(out)
        .stderr(log)
        .spawn()
        .map_err(Error::file("starting", Path::new("postgres")))?;
    let pid = child
        .id()
        .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
        .expect("a child that was not waited for has its id");
    let mut running = Running::child(child, pid);
    loop {
        if let Some(status) = running.has_ended() {
            let text = std::fs::read(log_path).unwrap_or_default();
            let from = usize::try_from(log_start).map_or(0, |at| at.min(text.len()));
            let text = String::from_utf8_lossy(&text[from..]);
            return Err(Error::Program {
                program: "postgres",
                output: format!("{status}: {}", super::folder::last_lines(&text, 4)),
            });
        }
        if read_pid_file(&folder.cluster_dir).is_some_and(|file| file.pid == pid && file.is_ready) {
            return Ok(running);
        }
        if Instant::now() > deadline {
            stop(&mut running).await;
            return Err(start_deadline(folder, settings));
        }
        if supervisor.is_stopping() {
            stop(&mut running).await;
            return Err(Error::Stopped);
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Fast shutdown: sessions end, transactions roll back, a checkpoint is written.
async fn stop(running: &mut Running) {
    for (signal, patience) in [
        (Signal::INT, FAST_STOP),
        (Signal::QUIT, Duration::from_secs(5)),
    ] {
        // It may have ended by itself; `ended` says so at once.
        let _ = rustix::process::kill_process(running.pid(), signal);
        if tokio::time::timeout(patience, running.ended())
            .await
            .is_ok()
        {
            return;
        }
        tracing::warn!(?signal, "local Postgres did not stop in {patience:?}");
    }
}

/// Watches the server, starts it again when it ends by itself, and shuts it down when told to stop.
pub(super) async fn keep(
    mut running: Running,
    folder: &Folder,
    installation: &Installation,
    settings: &Settings,
    supervisor: &Supervisor,
) {
    let mut backoff = RESTART;
    loop {
        let how = tokio::select! {
            how = running.ended() => how,
            () = supervisor.stopping() => {
                stop(&mut running).await;
                return;
            }
        };
        tracing::error!(how, log = %folder.log_path.display(), "local Postgres ended; starting it again");
        loop {
            match start(folder, installation, settings, supervisor).await {
                Ok(started) => {
                    running = started;
                    backoff.reset();
                    tracing::info!("local Postgres is running again");
                    break;
                }
                Err(error) => {
                    let pause = backoff.upcoming();
                    tracing::error!(%error, "local Postgres did not start; trying again in {pause:?}");
                }
            }
            tokio::select! {
                () = backoff.wait() => {}
                () = supervisor.stopping() => return,
            }
        }
    }
}
