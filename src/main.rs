//! The program `postroad`. See `postroad --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    postroad::cli::main()
}
