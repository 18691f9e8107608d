//! The path of a log line to standard error. A log that cannot be written stops nothing: a task leaves its line in a
//! bounded queue, and one thread writes. A line that finds the queue full, or that standard error does not take, is dropped
//! and counted (`postroad_log_lines_dropped_total`). When lines are accepted again, one of them says how many are missing.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Most bytes that wait to be written.
const WAITING_MAX_BYTES: usize = 4 << 20;
/// The cost of a line beside its text.
const LINE_OVERHEAD: usize = 64;
/// About how much is written at a time.
const WRITE_BYTES: usize = 64 << 10;
/// A pause before a sink is tried again that blocks where it was asked not to.
const FULL_PAUSE: Duration = Duration::from_millis(50);

/// The queue, to log into. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Sink(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// A line came, or all were written.
    changed: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Box<[u8]>>,
    /// The cost of these lines and of the line being written.
    bytes: usize,
    is_writing: bool,
}

impl Sink {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        (self.0.waiting.lock()).unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines that were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    fn push(&self, line: &[u8]) {
        let cost = line.len() + LINE_OVERHEAD;
        let mut waiting = self.waiting();
        if waiting.bytes + cost > WAITING_MAX_BYTES {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.bytes += cost;
        waiting.lines.push_back(line.into());
        drop(waiting);
        self.0.changed.notify_all();
    }

    /// Waits until all lines are written, or dropped; at most so long.
    pub(super) fn flush(&self, longest: Duration) {
        let until = Instant::now() + longest;
        let mut waiting = self.waiting();
        while waiting.is_writing || !waiting.lines.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let woken = self.0.changed.wait_timeout(waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Some lines that wait, one after the other, with how many they are and what they cost. Waits until there are any.
    fn take(&self) -> (Vec<u8>, u64, usize) {
        let mut waiting = self.waiting();
        while waiting.lines.is_empty() {
            let woken = self.0.changed.wait(waiting);
            waiting = woken.unwrap_or_else(PoisonError::into_inner);
        }
        waiting.is_writing = true;
        let (mut text, mut count, mut cost) = (Vec::new(), 0, 0);
        while text.len() < WRITE_BYTES
            && let Some(line) = waiting.lines.pop_front()
        {
            count += 1;
            cost += line.len() + LINE_OVERHEAD;
            text.extend_from_slice(&line);
        }
        (text, count, cost)
    }

    fn taken(&self, cost: usize) {
        let mut waiting = self.waiting();
        waiting.bytes -= cost;
        waiting.is_writing = false;
        drop(waiting);
        self.0.changed.notify_all();
    }

    /// Writes lines to standard error, for as long as the process lives. Runs on a separate thread.
    pub(super) fn write_on(&self) {
        // A descriptor of its own: a write that blocks must not hold the lock of the standard library's.
        let own = io::stderr().as_fd().try_clone_to_owned();
        let out: Box<dyn Write> = match own {
            Ok(own) => Box::new(File::from(own)),
            Err(_) => Box::new(io::stderr()),
        };
        let mut writer = Writer {
            out,
            is_torn: false,
            told: 0,
        };
        loop {
            writer.write_some(self);
        }
    }
}

/// The writer of lines.
struct Writer<Out> {
    out: Out,
    /// The last line was cut.
    is_torn: bool,
    /// How many missing lines were told of.
    told: u64,
}

impl<Out: Write> Writer<Out> {
    /// Waits for lines and writes them, or drops them.
    fn write_some(&mut self, sink: &Sink) {
        let (mut text, count, cost) = sink.take();
        if self.is_torn {
            // The rest of a line that was cut is not to be read as the next one's beginning.
            text.insert(0, b'\n');
        }
        let written = write_whole(&mut self.out, &text);
        sink.taken(cost);
        if let Err(written) = written {
            self.is_torn |= written > 0;
            sink.0.dropped.fetch_add(count, Ordering::Relaxed);
            return;
        }
        self.is_torn = false;
        let dropped = sink.dropped();
        if dropped > self.told {
            self.told = dropped;
            tracing::warn!(
                dropped,
                "standard error did not accept all log lines: this many are missing since the start"
            );
        }
    }
}

/// Writes all of it. The error is how much was written before.
fn write_whole(out: &mut impl Write, text: &[u8]) -> Result<(), usize> {
    let mut written = 0;
    while written < text.len() {
        match out.write(&text[written..]) {
            Ok(0) => return Err(written),
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Somebody made it so for a process that shares it.
                #[expect(clippy::disallowed_methods, reason = "the thread is there for it")]
                std::thread::sleep(FULL_PAUSE);
            }
            Err(_) => return Err(written),
        }
    }
    Ok(())
}

/// One line's way into the queue.
#[derive(Debug)]
pub(super) struct Line(Sink);

impl Write for Line {
    /// A line comes whole, in one call. It is never refused: who logs has nothing to do about it.
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.push(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Sink {
    type Writer = Line;

    fn make_writer(&self) -> Line {
        Line(self.clone())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Takes this many bytes, then fails like a full disk; begins again when told so.
    struct Disk {
        room: usize,
        text: Vec<u8>,
    }

    impl Write for Disk {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                self.room = usize::MAX;
                return Err(ErrorKind::StorageFull.into());
            }
            let count = text.len().min(self.room);
            self.room -= count;
            self.text.extend_from_slice(&text[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn log(sink: &Sink, line: &str) {
        sink.make_writer().write_all(line.as_bytes()).unwrap();
    }

    #[test]
    fn nobody_waits_for_a_log_that_is_not_read() {
        let sink = Sink::default();
        let line = "x".repeat(1_000);
        for _ in 0..10_000 {
            log(&sink, &line);
        }
        assert!(sink.waiting().bytes <= WAITING_MAX_BYTES);
        let kept = sink.waiting().lines.len() as u64;
        assert_eq!(sink.dropped(), 10_000 - kept);
        let began = Instant::now();
        sink.flush(Duration::from_millis(20));
        assert!(began.elapsed() >= Duration::from_millis(20));
    }

    #[test]
    fn a_line_that_was_cut_is_counted_and_the_next_one_begins_anew() {
        let sink = Sink::default();
        let mut writer = Writer {
            out: Disk {
                room: 10,
                text: Vec::new(),
            },
            is_torn: false,
            told: 0,
        };
        for line in ["one\n", "two and more\n", "three\n"] {
            log(&sink, line);
            writer.write_some(&sink);
        }
        let text = String::from_utf8(writer.out.text).unwrap();
        assert_eq!(text, "one\ntwo an\nthree\n");
        assert_eq!(sink.dropped(), 1);
        sink.flush(Duration::ZERO);
    }
}
