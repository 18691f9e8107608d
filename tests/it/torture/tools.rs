//! Faults that need something of the machine: strace, a small disk, libfaketime. Where it is not to be had, the fault is left out, and
//! the run says so.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::support;
use crate::support::process::children;

/// A small disk, in bytes: enough for a server, its log and a run.
const DISK_BYTES: u64 = 400 * 1024 * 1024;

/// What happens to each flush of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    Slow,
    Fails,
}

/// Strace at work on a server. Ends with the value.
pub struct Injection(Child);

impl Drop for Injection {
    fn drop(&mut self) {
        support::send_signal(i32::try_from(self.0.id()).unwrap(), Signal::TERM);
        let _ = self.0.wait();
    }
}

/// Has the flushes of a server go wrong; why not, where that cannot be done.
pub async fn inject(postmaster: i32, flush: Flush) -> Result<Injection, String> {
    let postmaster = postmaster.unsigned_abs();
    let fault = match flush {
        // Microseconds.
        Flush::Slow => "inject=fdatasync,fsync:delay_enter=150000",
        Flush::Fails => "inject=fdatasync,fsync:error=EIO",
    };
    let mut command = Command::new("strace");
    command.args([
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=fdatasync,fsync",
    ]);
    command.args(["-e", fault]);
    for pid in children(postmaster).into_iter().chain([postmaster]) {
        command.args(["-p", &pid.to_string()]);
    }
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = quiet
        .spawn()
        .map_err(|error| format!("no strace: {error}"))?;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if is_traced(postmaster) {
            return Ok(Injection(child));
        }
        if child.try_wait().is_ok_and(|status| status.is_some()) {
            break;
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    Err("strace may not attach to Postgres".to_owned())
}

fn is_traced(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut lines = status.lines();
    lines.any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
}

/// Mounts a small disk on an empty folder. False where that may not be done. It goes away with the folder.
pub fn mount_small(folder: &Path) -> bool {
    let options = format!("size={DISK_BYTES},mode=0755");
    let mut command = Command::new("mount");
    let command = command.args(["-t", "tmpfs", "-o", &options, "postroad-test"]);
    let done = command.arg(folder).stderr(Stdio::null()).status();
    done.is_ok_and(|status| status.success())
}

/// Writes to a file beside the server's until nothing fits any more, and gives the file.
pub fn fill(folder: &Path) -> PathBuf {
    use std::io::Write as _;
    let path = folder.join("ballast");
    let mut file = std::fs::File::create(&path).unwrap();
    let block = vec![0; 64 * 1024];
    // Smaller and smaller: the last byte is to be gone.
    for length in [block.len(), 4_096] {
        while file.write_all(&block[..length]).is_ok() {}
    }
    path
}

/// The library that sets a process's clock, if it is installed.
pub fn fake_time() -> Option<PathBuf> {
    let places = [
        "/usr/lib/x86_64-linux-gnu/faketime",
        "/usr/lib/aarch64-linux-gnu/faketime",
        "/usr/lib64/faketime",
        "/usr/lib/faketime",
    ];
    let files = places.map(|place| Path::new(place).join("libfaketimeMT.so.1"));
    files.into_iter().find(|file| file.exists())
}

/// Sets the clock of a process that was started with `clock_variables`.
pub fn set_clock(file: &Path, ahead_seconds: i64) {
    // Renamed into place: never read by half.
    let new = file.with_extension("new");
    std::fs::write(&new, format!("{ahead_seconds:+}\n")).unwrap();
    std::fs::rename(new, file).unwrap();
}

/// The monotonic clock stays as it is: it does not jump on any machine.
pub fn clock_variables(library: &Path, file: &Path) -> Vec<(String, String)> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    [
        ("LD_PRELOAD", text(library)),
        ("FAKETIME_TIMESTAMP_FILE", text(file)),
        ("FAKETIME_CACHE_DURATION", "1".to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}
