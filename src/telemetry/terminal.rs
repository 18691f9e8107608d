//! The output of a command to its user. Nothing here panics: the reader of a pipe may leave (`| head -1`), and a disk may
//! be full.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// Prints a text that is a command's result to standard output, whole. A reader that has left wants no more of it, which is no error.
///
/// # Errors
/// It cannot be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let printed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match printed {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

/// Says something on standard output, if anybody hears it. See the macro `say!`.
pub fn to_stdout(text: Arguments<'_>) {
    let mut out = io::stdout().lock();
    let _ = out.write_fmt(text).and_then(|()| out.flush());
}

/// Says something on standard error, if anybody hears it. See the macro `tell!`.
pub fn to_stderr(text: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

/// A line on standard output, as `println!`, which panics when nobody reads.
macro_rules! say {
    () => { $crate::telemetry::to_stdout(format_args!("\n")) };
    ($format:literal $($rest:tt)*) => {
        $crate::telemetry::to_stdout(format_args!("{}\n", format_args!($format $($rest)*)))
    };
}

/// A line on standard error, as `eprintln!`, which panics when nobody reads.
macro_rules! tell {
    () => { $crate::telemetry::to_stderr(format_args!("\n")) };
    ($format:literal $($rest:tt)*) => {
        $crate::telemetry::to_stderr(format_args!("{}\n", format_args!($format $($rest)*)))
    };
}

pub(crate) use {say, tell};
