//! Why a broker does not start, or does not stop.

use std::net::SocketAddr;

use crate::{cluster, http, local_postgres, queue, relay, store, stream, topic};

/// Reasons why the broker did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is taken or not ours.
    #[error("listening on {address} failed")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// No private Postgres.
    #[error("the local Postgres did not start")]
    LocalPostgres(#[from] local_postgres::Error),
    /// The database is there and not fit.
    #[error("the database {place} cannot be used: {reason}")]
    Refused {
        /// Host, port and name.
        place: String,
        /// The fault.
        reason: String,
    },
    /// The start was to be given up, and parts of it did not stop.
    #[error("the start was aborted, and the stop was not clean")]
    NotStopped(#[source] NotStopped),
    /// The database failed.
    #[error("the database failed")]
    Store(#[from] store::Error),
    /// The node could not be registered.
    #[error("the node did not start")]
    Cluster(#[from] cluster::Error),
    /// The streams.
    #[error("the streams did not start")]
    Stream(#[from] stream::Error),
    /// The queues.
    #[error("the queues did not start")]
    Queue(#[from] queue::Error),
    /// The settings of topics.
    #[error("the topic settings did not load")]
    Topic(#[from] topic::Error),
    /// The relays.
    #[error("the relays did not start")]
    Relay(#[from] relay::Error),
    /// The HTTP server.
    #[error("the HTTP server did not start")]
    Http(#[from] http::Error),
    /// A stream or queue of the configuration breaks a rule.
    #[error("`{key}` in the configuration was refused: {reason}")]
    Declaration {
        /// `streams.orders`.
        key: String,
        /// The rule.
        reason: String,
    },
}

/// Parts that had not stopped when their time was over.
#[derive(Debug, thiserror::Error)]
#[error("these tasks did not stop in time: {}", .0.join(", "))]
pub struct NotStopped(pub Vec<String>);
