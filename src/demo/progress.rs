//! The progress display: counts that the demo's own producers and consumers keep, for display only.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::telemetry::{self, say};

/// Counts of the run so far. The reconciliation at the end does not read them.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) committed: AtomicU64,
    pub(super) rolled_back: AtomicU64,
    pub(super) billing: AtomicU64,
    pub(super) shipping: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) kills: AtomicU64,
}

impl Progress {
    /// Acknowledgements of both services.
    pub(super) fn acknowledged(&self) -> u64 {
        self.billing.load(Ordering::Relaxed) + self.shipping.load(Ordering::Relaxed)
    }

    pub(super) fn line(&self, started: Instant) -> String {
        let count = |number: &AtomicU64| thousands(number.load(Ordering::Relaxed));
        let mut line = format!(
            "{:5.1} s  orders {} committed, {} rolled back | billing {} acked | shipping {} acked, {} refused at first",
            started.elapsed().as_secs_f64(),
            count(&self.committed),
            count(&self.rolled_back),
            count(&self.billing),
            count(&self.shipping),
            count(&self.refused),
        );
        let kills = self.kills.load(Ordering::Relaxed);
        if kills > 0 {
            line.push_str(&format!(" | broker killed {kills}x"));
        }
        line
    }
}

/// Draws one line again and again on a terminal; prints a line every two seconds elsewhere.
#[derive(Debug)]
pub(super) struct Display {
    progress: Arc<Progress>,
    started: Instant,
    printed: Instant,
    is_terminal: bool,
}

impl Display {
    pub(super) fn new(progress: Arc<Progress>, started: Instant) -> Self {
        Self {
            progress,
            started,
            printed: started,
            is_terminal: std::io::stdout().is_terminal(),
        }
    }

    /// How often [`Display::tick`] wants to be called.
    pub(super) const EVERY: Duration = Duration::from_millis(200);

    pub(super) fn tick(&mut self) {
        if self.is_terminal {
            // Back to the line's start, and clear what a longer line left behind.
            telemetry::to_stdout(format_args!(
                "\r  {}\x1b[K",
                self.progress.line(self.started)
            ));
        } else if self.printed.elapsed() >= Duration::from_secs(2) {
            self.printed = Instant::now();
            say!("  {}", self.progress.line(self.started));
        }
    }

    /// Prints something between the redrawn lines.
    pub(super) fn note(&self, text: &str) {
        if self.is_terminal {
            say!("\r  {text}\x1b[K");
        } else {
            say!("  {text}");
        }
    }

    pub(super) fn end(&mut self) {
        self.note(&self.progress.line(self.started));
    }
}

/// `1234567` as `1,234,567`.
pub(super) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_print_with_separators() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (20_000, "20,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(thousands(number), text);
        }
    }
}
