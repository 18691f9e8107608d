//! What a process uses, as /proc tells: memory, processor time; and this one's limit of open files.

use std::time::Duration;

/// A value of `/proc/<pid>/status` in KiB; 0 where there is no /proc.
fn status_kib(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().nth(1))
        .and_then(|kib| kib.parse().ok())
        .unwrap_or_default()
}

/// The memory that a process has resident, in bytes.
pub fn resident_bytes(pid: u32) -> u64 {
    status_kib(pid, "VmRSS:") * 1024
}

/// The most that it has had, in bytes.
pub fn peak_resident_bytes(pid: u32) -> u64 {
    status_kib(pid, "VmHWM:") * 1024
}

/// The fields of `/proc/<pid>/stat` after the name, which may have blanks in it.
fn stat(pid: u32) -> Vec<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest)
        .unwrap_or_default();
    rest.split_whitespace().map(str::to_owned).collect()
}

/// Whether a process was stopped by a signal and has not gone on.
pub fn is_stopped(pid: u32) -> bool {
    stat(pid).first().is_some_and(|state| state == "T")
}

/// The children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
    let parent = |child: &u32| stat(*child).get(1).and_then(|parent| parent.parse().ok());
    pids.filter(|child| parent(child) == Some(pid)).collect()
}

fn ticks(fields: &[String], places: std::ops::Range<usize>) -> u64 {
    let fields = fields.get(places).unwrap_or_default();
    fields
        .iter()
        .filter_map(|field| field.parse::<u64>().ok())
        .sum()
}

/// Processor time that a process has used, by the kernel's ticks of 10 ms.
pub fn cpu_time(pid: u32) -> Duration {
    Duration::from_millis(10 * ticks(&stat(pid), 11..13))
}

/// Processor time of a process and its children, those that ended included.
pub fn cpu_time_with_children(pid: u32) -> Duration {
    let mut total = ticks(&stat(pid), 11..15);
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(child) = entry.file_name().to_string_lossy().parse::<u32>().ok() else {
            continue;
        };
        let fields = stat(child);
        if fields.get(1).and_then(|parent| parent.parse::<u32>().ok()) == Some(pid) {
            total += ticks(&fields, 11..13);
        }
    }
    Duration::from_millis(10 * total)
}

/// Lets this process open as many files as it may. Gives how many.
pub fn raise_open_files() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let _ = setrlimit(Resource::Nofile, raised);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
