//! The integration tests: one binary, parallel, each test with a database of its own. See `support`.

#![expect(clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::disallowed_methods,
    reason = "a test may take away a task of its own in the middle of anything"
)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod bench;
mod client;
mod clients;
mod cluster;
mod demo;
mod end_to_end;
mod escalation;
mod examples;
mod failover;
#[cfg(feature = "failpoints")]
mod failpoints;
mod faults;
mod golden;
mod history;
mod http;
mod inbox;
mod local_postgres;
mod lock;
mod matrix;
mod nodes;
mod outbox;
mod program;
mod queue;
mod relay;
mod shutdown;
mod soak;
mod stream;
mod support;
mod torture;
mod upgrade;
