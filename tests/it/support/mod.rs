//! The harness. `database()` gives a fresh migrated database; `cluster()` a private server that a test may kill;
//! `proxy` a TCP proxy that cuts, holds and delays; `clock` a database whose clock can be set; `broker()` a whole broker in
//! this process, `program()` the real one as a child. All that a test makes goes away with the value it got.
//!
//! The run's shared server is `DATABASE_URL`'s (a superuser's URL) when that is set, else one that the run starts.

#![allow(dead_code, unused_imports, reason = "each test uses what it needs")]

pub mod audit;
pub mod broker;
pub mod clock;
pub mod cluster;
pub mod consumer;
pub mod database;
pub mod events;
pub mod leases;
pub mod mutant;
pub mod pooler;
pub mod process;
pub mod proxy;
pub mod worker;

use std::future::Future;
use std::sync::OnceLock;

use tokio::runtime::Runtime;

pub use broker::{Http, Program, TestBroker, broker, broker_with, program, program_with_log};
pub use cluster::{
    Cluster, backup_of, cluster, cluster_in, cluster_of_copy, cluster_with, copy_folder, standby_of,
};
pub use consumer::Consumer;
pub use database::{TestDatabase, copy_of, database, empty_database, role};
pub use events::Events;
pub use proxy::{Action, Direction, Proxy, Trap, cut_marked, proxy};

/// Runs what outlives a single test's runtime: the shared server's keeper and the dropping of databases.
pub fn background() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("support")
            .enable_all()
            .build()
            .unwrap()
    })
}

/// Runs a future on the background runtime and blocks this thread until it is done: for `Drop`.
pub fn finish<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    background().spawn(async move {
        let _ = sender.send(task.await);
    });
    receiver.recv().unwrap()
}

/// Sends a signal to a process of this run. By a system call: a small system has no `kill` program.
pub fn send_signal(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process has a number above 0");
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Waits until `check` gives a value, looking every 10 ms, 30 s at most. For states that send no event.
///
/// # Panics
/// After 30 s, saying what was waited for.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut check: impl FnMut() -> F,
) -> T {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "waited 30 s for: {what}"
        );
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
