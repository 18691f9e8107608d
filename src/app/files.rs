//! Open files: each connection is one, so the process's limit bounds the number of connections.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files reserved for everything except clients: connections to Postgres, the log, the private server's pipes.
const RESERVED: u64 = 256;

/// Raises the limit of open files as far as the process may, and gives how many connections of those wanted it leaves room
/// for. A limit that is met by accepting alone would leave none for Postgres.
pub(super) fn connections_within(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit of open files could not be raised");
    }
    let room = room(getrlimit(Resource::Nofile).current);
    if room < wanted {
        tracing::warn!(
            connections_max = wanted,
            room,
            "the limit of open files allows fewer connections than configured: raise it (ulimit -n, LimitNOFILE)"
        );
    }
    wanted.min(room)
}

/// How many of these files may be clients' connections; at least a few.
fn room(files: Option<u64>) -> usize {
    let files = files.map_or(u64::MAX, |files| files.saturating_sub(RESERVED).max(16));
    usize::try_from(files).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_files_are_not_for_clients() {
        assert_eq!(room(None), usize::MAX);
        assert_eq!(room(Some(20_000)), 19_744);
        assert_eq!(room(Some(100)), 16);
        assert_eq!(connections_within(16), 16);
    }
}
