//! Processor time of Postgres, from /proc: of all its processes, including those that ended in the meantime. Nothing is
//! measured where there is no /proc, or when the server runs elsewhere.

use std::path::Path;

/// Jiffies per second in /proc: a constant of Linux' interface, whatever the kernel's own.
const TICKS: f64 = 100.0;

/// A Postgres server on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Postgres {
    postmaster: i32,
}

/// The contents of `/proc/PID/stat`.
#[derive(Debug, Clone, PartialEq)]
struct Stat {
    name: String,
    parent: i32,
    /// Its own time, in seconds.
    own: f64,
    /// Processor time of children that ended and were waited for.
    ended: f64,
    /// The start of the process, in seconds since the machine started.
    started: f64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The name is in brackets and may hold anything, brackets too.
        let (head, tail) = text.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
        // The first of them is the third of the file.
        let number = |place: usize| fields.get(place - 3)?.parse::<f64>().ok();
        Some(Self {
            name: name.to_owned(),
            parent: fields.get(1)?.parse().ok()?,
            own: (number(14)? + number(15)?) / TICKS,
            ended: (number(16)? + number(17)?) / TICKS,
            started: number(22)? / TICKS,
        })
    }
}

impl Postgres {
    /// The server whose backend has this pid and whose postmaster started then (seconds since the Unix epoch), if it runs on
    /// this machine: a pid alone could be that of something else.
    pub(super) fn find(backend: i32, started_at: f64) -> Option<Self> {
        let postmaster = Stat::read(backend)?.parent;
        let stat = Stat::read(postmaster)?;
        let boot = std::fs::read_to_string("/proc/stat").ok()?;
        let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?;
        let boot: f64 = boot.trim().parse().ok()?;
        let is_it =
            stat.name.starts_with("postgres") && (boot + stat.started - started_at).abs() < 3.0;
        is_it.then_some(Self { postmaster })
    }

    /// Seconds of processor time since the server started.
    pub(super) fn cpu_seconds(self) -> Option<f64> {
        let stat = Stat::read(self.postmaster)?;
        let mut sum = stat.own + stat.ended;
        for entry in std::fs::read_dir("/proc").ok()?.flatten() {
            let pid = entry.file_name().to_string_lossy().parse::<i32>();
            if let Some(child) = pid.ok().and_then(Stat::read)
                && child.parent == self.postmaster
            {
                sum += child.own;
            }
        }
        Some(sum)
    }
}

/// Processor time of one process and its threads so far, in seconds.
pub(super) fn cpu_seconds_of(pid: i32) -> Option<f64> {
    Some(Stat::read(pid)?.own)
}

/// The machine in words: processors, their model, memory. Empty parts where there is no /proc.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub(super) struct Machine {
    pub(super) processors: usize,
    pub(super) model: String,
    pub(super) memory_mib: u64,
    pub(super) system: String,
}

impl Machine {
    pub(super) fn read() -> Self {
        let field = |path: &str, name: &str| -> Option<String> {
            let text = std::fs::read_to_string(Path::new(path)).ok()?;
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field("/proc/meminfo", "MemTotal").unwrap_or_default();
        let memory = memory.trim_end_matches("kB").trim().parse::<u64>();
        let system = rustix::system::uname();
        Self {
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            model: field("/proc/cpuinfo", "model name").unwrap_or_default(),
            memory_mib: memory.unwrap_or(0) / 1024,
            system: format!(
                "{} {} {}",
                system.sysname().to_string_lossy(),
                system.release().to_string_lossy(),
                system.machine().to_string_lossy()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name() {
        let line = "12 (postgres: a) (b) S 34 12 12 0 -1 4194560 1 2 3 4 150 50 1000 200 20 0 1 0 500 1 2 3";
        let expected = Stat {
            name: "postgres: a) (b".to_owned(),
            parent: 34,
            own: 2.0,
            ended: 12.0,
            started: 5.0,
        };
        assert_eq!(Stat::parse(line), Some(expected));
        assert_eq!(Stat::parse("12 (cut"), None);
    }

    #[test]
    fn another_process_is_not_taken_for_the_server() {
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        assert_eq!(Postgres::find(own, 0.0), None);
    }
}
