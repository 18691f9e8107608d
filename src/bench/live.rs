//! The line that is redrawn while a round runs. On standard error: standard output is for the result.

use std::io::{IsTerminal as _, Write as _};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::load::Shared;
use super::series;
use crate::telemetry::{self, tell};

/// How often it is redrawn on a terminal, and printed elsewhere.
const REDRAW: Duration = Duration::from_millis(500);
const PRINT: Duration = Duration::from_secs(10);

/// The live line of a round.
pub(super) struct Live {
    name: String,
    drawn: Instant,
    settled: u64,
    is_terminal: bool,
}

impl Live {
    pub(super) fn new(name: &str, shared: &Shared) -> Self {
        Self {
            name: name.to_owned(),
            drawn: shared.series.began(),
            settled: 0,
            is_terminal: std::io::stderr().is_terminal(),
        }
    }

    pub(super) fn tick(&mut self, shared: &Shared) {
        let every = if self.is_terminal { REDRAW } else { PRINT };
        let since = self.drawn.elapsed();
        if since < every {
            return;
        }
        let settled = shared.settled.load(Ordering::Relaxed);
        let per_message = shared.tracker.deliveries_per_message() as f64;
        let rate = (settled - self.settled) as f64 / per_message / since.as_secs_f64();
        let latest = shared.series.latest();
        let latency = match (
            series::milliseconds(&latest, 0.5),
            series::milliseconds(&latest, 0.99),
        ) {
            (Some(p50), Some(p99)) => format!("  p50 {p50:.1} ms  p99 {p99:.1} ms"),
            _ => String::new(),
        };
        let line = format!(
            "{:6.1} s  {}  {} msg/s{latency}  {} on their way",
            shared.series.began().elapsed().as_secs_f64(),
            self.name,
            grouped(rate),
            grouped(shared.outstanding() as f64),
        );
        self.show(&line);
        (self.drawn, self.settled) = (Instant::now(), settled);
    }

    fn show(&self, line: &str) {
        let mut out = std::io::stderr().lock();
        // Back to the line's start, and clear what a longer line left behind. Nobody minds a closed terminal.
        let _ = match self.is_terminal {
            true => write!(out, "\r  {line}\x1b[K"),
            false => writeln!(out, "  {line}"),
        };
        let _ = out.flush();
    }

    /// Prints something that stays.
    pub(super) fn note(&self, text: &str) {
        self.show(text);
        if self.is_terminal {
            tell!();
        }
    }

    /// Clears the line.
    pub(super) fn end(&self) {
        if self.is_terminal {
            telemetry::to_stderr(format_args!("\r\x1b[K"));
        }
    }
}

/// A number of three or more digits: `12,345`.
pub(super) fn grouped(number: f64) -> String {
    let digits = format!("{:.0}", number.abs());
    let mut text = String::with_capacity(digits.len() + digits.len() / 3 + 1);
    if number <= -0.5 {
        text.push('-');
    }
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
    use super::grouped;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        for (number, text) in [
            (0.0, "0"),
            (999.4, "999"),
            (999.6, "1,000"),
            (1_234_567.0, "1,234,567"),
            (-1_234.0, "-1,234"),
            (-0.1, "0"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }
}
