//! SIGHUP, which a terminal sends when it closes.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGHUP. It never comes where the process was started so that it survives the terminal's close, as with `nohup`: listening would undo that.
#[derive(Debug)]
pub struct Hangup(Option<Signal>);

impl Hangup {
    /// Listens from now on.
    ///
    /// # Errors
    /// There is no handler to be had.
    pub fn listen() -> io::Result<Self> {
        let kind = SignalKind::hangup();
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        match is_ignored(&status, kind.as_raw_value()) {
            true => Ok(Self(None)),
            false => signal(kind).map(|hangup| Self(Some(hangup))),
        }
    }

    /// Resolves at the next one. Cancel-safe.
    pub async fn received(&mut self) {
        match &mut self.0 {
            Some(hangup) => {
                hangup.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}

fn is_ignored(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::is_ignored;

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        let status = "Name:\tpostroad\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n";
        assert!(is_ignored(status, 1) && is_ignored(status, 13));
        assert!(!is_ignored(status, 2) && !is_ignored("", 1));
    }
}
