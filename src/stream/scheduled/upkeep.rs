//! The upkeep of scheduled messages, beside the duty that publishes them and on a separate connection: however long it
//! takes, due messages come in time.

use std::sync::Arc;
use std::time::Duration;

use super::OfStream;
use crate::store::stream as sql;
use crate::store::{self, Connection, Link};
use crate::stream::handle::State;
use crate::supervisor::{Backoff, Duty, Lease, Next, Routine, Supervisor};

/// How often leaves are made and emptied, and messages counted.
const UPKEEP: Duration = Duration::from_secs(60);
/// How long published messages are remembered, so that a late cancel learns where they went.
const KEEP: Duration = Duration::from_secs(86_400);
/// The pause after a failure.
const AGAIN: Backoff = Backoff::new(Duration::from_secs(1), UPKEEP);
/// Rows of no leaf that one statement deletes of a stream.
const FORGET_ROWS: i32 = 5_000;

pub(in crate::stream) struct Upkeep {
    pub(in crate::stream) link: Link,
    pub(in crate::stream) state: Arc<State>,
    pub(in crate::stream) supervisor: Supervisor,
}

impl Duty for Upkeep {
    type Error = store::Error;

    /// Counts, makes the leaves that are missing, and empties those that are over. Each statement is a transaction of few locks.
    async fn pass(&mut self) -> Result<Next, store::Error> {
        let mut connection = self.link.lend().await?;
        self.count(&mut connection).await?;
        let clock = sql::read_clock(&mut connection).await?;
        let now = self.state.witness.agreed(clock);
        for leaf in sql::missing_scheduled_leaves(&mut connection, now).await? {
            match sql::extend_scheduled(&mut connection, &leaf).await {
                Err(error) if error.is_held() => break,
                made => made?,
            }
        }
        for leaf in sql::list_scheduled_leaves(&mut connection).await? {
            match sql::empty_scheduled_leaf(&mut connection, &leaf, now, KEEP).await {
                Ok(false) => {}
                Ok(true) => {
                    tracing::debug!(first_at = %leaf.first_at, kind = leaf.kind, "forgot old scheduled messages");
                }
                // Somebody has it open: the next time. Each attempt can hold up appends for 50 ms.
                Err(error) if error.is_held() => break,
                Err(error) => return Err(error),
            }
        }
        while !self.supervisor.is_stopping()
            && sql::forget_scheduled(&mut connection, FORGET_ROWS).await? >= FORGET_ROWS
        {}
        self.link.keep(connection);
        Ok(Next::Tick)
    }

    fn failed(&mut self, error: &store::Error) {
        self.state.metrics.scheduled_failures.inc();
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "the upkeep of scheduled messages failed"
        );
    }
}

impl Upkeep {
    pub(in crate::stream) fn start(self, lease: Lease) {
        let routine = Routine::every(UPKEEP, "stream schedule upkeep")
            .woken_by(&self.state.schedule.count)
            .under(lease)
            .backing_off(AGAIN);
        self.supervisor.clone().start(routine, self);
    }

    async fn count(&self, connection: &mut Connection) -> Result<(), store::Error> {
        let counts = sql::count_scheduled(connection).await?;
        let mut known = self.state.schedule.known();
        let streams = &mut known.streams;
        let count = |(id, (name, count))| {
            let next_due_at = streams.get(&id).and_then(|before| before.next_due_at);
            let stream = OfStream {
                name,
                count,
                next_due_at,
            };
            (id, stream)
        };
        *streams = counts.into_iter().map(count).collect();
        Ok(())
    }
}
