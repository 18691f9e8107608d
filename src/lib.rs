//! Postroad, a transactional outbox message broker for Postgres: one binary, one Postgres.
//!
//! The layers, each using only what stands above it (`tests/tidy.rs` holds them): [`domain`], [`supervisor`], [`store`]; the
//! engines [`cluster`], [`stream`], [`topic`], [`lock`], [`relay`], [`queue`]; [`http`]; [`client`], which knows the names of the domain alone; and
//! the program around them, [`app`], [`cli`], [`config`], [`telemetry`], [`local_postgres`], [`demo`], [`mod@bench`].
//! [`mod@failpoint`] is for tests, and nothing in a release. [`outbox`] stands beside them: it is for services that publish, and the broker does not use it.

pub mod app;
pub mod bench;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod config;
pub mod demo;
pub mod domain;
pub mod failpoint;
pub mod http;
pub mod local_postgres;
pub mod lock;
pub mod outbox;
pub mod queue;
pub mod relay;
#[cfg(test)]
mod simulation;
pub mod store;
pub mod stream;
pub mod supervisor;
pub mod telemetry;
pub mod topic;
