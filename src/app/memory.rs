//! How much memory the process may use: that of the machine, or the limit of its container.

use std::path::Path;

/// HTTP may hold so much where nothing is known of the memory.
const UNKNOWN: u64 = 256 << 20;
/// Bounds of what it may hold by default.
const LEAST: u64 = 64 << 20;
const MOST: u64 = 1 << 30;
/// It gets this fraction of the memory: one part in `PART`.
const PART: u64 = 8;

/// The memory for HTTP bodies and answers, unless it is configured: an eighth of all.
pub(super) fn for_http() -> usize {
    share_of(memory_bytes(Path::new("/")))
}

fn share_of(memory: Option<u64>) -> usize {
    let share = memory.map_or(UNKNOWN, |memory| memory / PART);
    usize::try_from(share.clamp(LEAST, MOST)).unwrap_or(usize::MAX)
}

/// The least of what the kernel says; the limits of containers are above the memory where there are none.
fn memory_bytes(root: &Path) -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let limit = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let machine = read("proc/meminfo").and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024)
    });
    [
        machine,
        limit("sys/fs/cgroup/memory.max"),
        limit("sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ]
    .into_iter()
    .flatten()
    .min()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_less_than_its_machine() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(memory_bytes(root.path()), None);
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(
            "proc/meminfo",
            "MemTotal:        8388608 kB\nMemFree: 1 kB\n",
        );
        assert_eq!(memory_bytes(root.path()), Some(8 << 30));
        write("sys/fs/cgroup/memory.max", "max\n");
        assert_eq!(memory_bytes(root.path()), Some(8 << 30));
        write("sys/fs/cgroup/memory.max", "1073741824\n");
        assert_eq!(memory_bytes(root.path()), Some(1 << 30));
    }

    #[test]
    fn an_eighth_is_for_bodies_within_bounds() {
        for (memory, share) in [
            (None, 256 << 20),
            (Some(1 << 20), 64 << 20),
            (Some(4 << 30), 512 << 20),
            (Some(1 << 40), 1 << 30),
        ] {
            assert_eq!(share_of(memory), share, "{memory:?}");
        }
    }
}
