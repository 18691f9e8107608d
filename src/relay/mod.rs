//! Relays: one supervised task per origin moves the committed rows of its outbox into the streams, exactly once and in
//! order.
//!
//! The parts are: `window` for newly visible rows, `backlog` for very many of them, `position` for the stored progress,
//! `rerelay` for an origin that went back in time, `deletion` for a mapped table whose rows leave as they are relayed,
//! `rotation` for the outbox's space, `row` for turning rows into messages, and `task` for the loop around them. The
//! failure story is the same everywhere: a step that did not end well drops its session with the origin and everything it
//! knew, and the next one begins from the position that the broker's database holds.

mod append;
mod backlog;
mod caution;
mod claim;
mod decide;
mod deletion;
mod handle;
mod lookups;
mod metrics;
mod pace;
mod page;
mod position;
mod rejected;
mod rerelay;
mod rotation;
mod row;
#[cfg(test)]
mod simulation;
mod snapshot;
mod status;
mod task;
mod trouble;
mod window;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::domain::mapping::Mapping;
use crate::domain::name::OriginName;
use crate::store::origin::{LEAF_COUNT, LEAF_PERIOD};
use crate::store::relay::RejectedBounds;
use crate::store::{self, Database};
use crate::supervisor::{Desk, OnEnd, Supervisor};
use crate::{cluster, stream, topic};

pub use handle::{Correction, Handle, RejectedError};
pub use rejected::{REJECTED_PAGE_MAX, RejectedPage};
pub use status::{Blocked, Mapped, State, Status};

/// The longest grace: a leaf is filled again after a cycle, and the leaves beside the one that is filled are left alone.
pub const GRACE_MAX: Duration =
    Duration::from_secs(LEAF_PERIOD.as_secs() * (LEAF_COUNT as u64 - 3));

/// An origin from the configuration.
#[derive(Clone)]
pub struct OriginOptions {
    /// Its name, which is its identity: under another name it is another origin, and all that its outbox holds is relayed.
    pub name: OriginName,
    /// Its URL; `None` is the broker's own database.
    pub url: Option<String>,
    /// A table that is there already and is read in place of the outbox.
    pub mapping: Option<Mapping>,
}

// The URL has a password in it.
impl fmt::Debug for OriginOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OriginOptions")
            .field("name", &self.name)
            .field("has_url", &self.url.is_some())
            .field("mapping", &self.mapping)
            .finish()
    }
}

/// How relays work.
#[derive(Debug, Clone)]
pub struct Options {
    /// The origins, each name once.
    pub origins: Vec<OriginOptions>,
    /// How long outbox rows stay after the position passed them, which is what makes a failover of the broker's database
    /// repairable. At most [`GRACE_MAX`].
    pub grace: Duration,
    /// The pause after a step that found nothing; each one after it is twice as long.
    pub poll_min: Duration,
    /// The longest of them: between steps of an idle origin. (While many rows come it is `pace::SHARED`.)
    pub poll_max: Duration,
    /// The most rows in one append.
    pub page_rows: usize,
    /// The most bytes of payload in one append, but always one row.
    pub page_bytes: usize,
    /// The most rows of a large window whose places are known at a time, about 24 bytes each. A piece of it that is counted has half
    /// as many.
    pub manifest_rows: usize,
    /// How long the origin may take for a piece of a large window. A piece that takes longer is ended, and tried smaller.
    pub piece_time: Duration,
    /// How much of an origin's rejected rows is kept.
    pub rejected: RejectedBounds,
    /// The longest pause before an origin in trouble is tried again.
    pub retry_max: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            origins: vec![OriginOptions {
                name: OriginName::local(),
                url: None,
                mapping: None,
            }],
            grace: Duration::from_secs(600),
            poll_min: Duration::from_micros(500),
            poll_max: Duration::from_millis(100),
            page_rows: 4_000,
            page_bytes: 4 << 20,
            manifest_rows: 200_000,
            piece_time: Duration::from_secs(10),
            rejected: RejectedBounds {
                rows: 100_000,
                bytes: 1 << 30,
                age: Duration::from_secs(30 * 86_400),
            },
            retry_max: Duration::from_secs(5),
        }
    }
}

/// Reasons why the relays could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two origins have one name.
    #[error("the origin `{name}` is configured twice")]
    Duplicate {
        /// The name.
        name: OriginName,
    },
    /// Two origins are the broker's own database: its outbox would be relayed twice.
    #[error("the origins `{first}` and `{second}` both name the broker's own database")]
    TwoLocal {
        /// One.
        first: OriginName,
        /// The other.
        second: OriginName,
    },
    /// The grace is longer than the outbox's leaves allow.
    #[error("the outbox grace is {grace:?}, at most {GRACE_MAX:?} is allowed")]
    GraceTooLong {
        /// The grace.
        grace: Duration,
    },
    /// An origin's URL cannot be read.
    #[error("the URL of the origin `{name}` is not valid")]
    Url {
        /// The origin.
        name: OriginName,
        /// The fault.
        #[source]
        source: store::Error,
    },
    /// The broker's database could not do it.
    #[error("the database could not be used")]
    Store(#[from] store::Error),
}

fn check(options: &Options) -> Result<(), Error> {
    if options.grace > GRACE_MAX {
        return Err(Error::GraceTooLong {
            grace: options.grace,
        });
    }
    for (index, origin) in options.origins.iter().enumerate() {
        for other in &options.origins[..index] {
            if other.name == origin.name {
                return Err(Error::Duplicate {
                    name: origin.name.clone(),
                });
            }
            if other.url.is_none() && origin.url.is_none() {
                return Err(Error::TwoLocal {
                    first: other.name.clone(),
                    second: origin.name.clone(),
                });
            }
        }
    }
    Ok(())
}

/// Starts a relay per origin. An origin that cannot be reached does not fail the start: its status says so. The broker's own
/// outbox must be installed (`store::migrate::origin`).
///
/// # Errors
/// All of [`Error`].
pub async fn start(
    options: Options,
    db: Database,
    (stream, topics): (stream::Handle, topic::Handle),
    cluster: cluster::Handle,
    supervisor: &Supervisor,
    registry: &mut Registry,
) -> Result<Handle, Error> {
    check(&options)?;
    let options = Arc::new(options);
    let lookups = Arc::new(lookups::Lookups::default());
    let mut statuses = Vec::new();
    for origin in &options.origins {
        let id = store::relay::insert_origin(&db, &origin.name).await?;
        let source = match &origin.url {
            None => db.clone(),
            Some(url) => Database::new(url, 1).map_err(|source| Error::Url {
                name: origin.name.clone(),
                source,
            })?,
        };
        let mut status = Status::new(origin.name.clone(), id, source.place(), cluster.now());
        status.mapped = origin.mapping.as_ref().map(|mapping| Mapped {
            table: mapping.table.to_string(),
            pickup: mapping.pickup,
        });
        let (status, watched) = watch::channel(status);
        statuses.push(watched);
        let relay = task::Relay {
            name: origin.name.clone(),
            id,
            is_local: origin.url.is_none(),
            source,
            mapping: origin.mapping.clone(),
            broker: db.clone(),
            stream: stream.clone(),
            topics: topics.clone(),
            cluster: cluster.clone(),
            supervisor: supervisor.clone(),
            options: Arc::clone(&options),
            lookups: Arc::clone(&lookups),
            status,
            session: Mutex::default(),
        };
        supervisor.spawn(relay.task_name(), OnEnd::StopProcess, relay.run());
    }
    let rejected = rejected::Rejected {
        broker: db,
        stream,
        cluster: cluster.clone(),
        topics,
        supervisor: supervisor.clone(),
    };
    let rejected = Desk::open(supervisor, "relay/rejected", 64, rejected);
    let handle = Handle::new(statuses, rejected);
    metrics::register(registry, &handle, cluster);
    Ok(handle)
}
