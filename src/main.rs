//! The program `postroad`. See `postroad --help`.

use std::process::ExitCode;

/// hyper keeps two buffers of 8 KiB for each connection, of which an idle one has touched little or nothing. This allocator
/// leaves untouched pages untouched; glibc's puts its marks and other blocks between them.
#[cfg(unix)]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    postroad::cli::main()
}
