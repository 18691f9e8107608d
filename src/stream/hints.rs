//! Notices between nodes that something was appended, so that queues on other nodes need not wait for their next look at
//! the log. At most one is on its way at a time, and none while there is nobody to hear it.

use std::sync::Arc;
use std::time::Duration;

use super::handle::State;
use crate::cluster;
use crate::domain::chain;
use crate::store::hint::{Hints, tell_appended};
use crate::store::{self, Database, Link};
use crate::supervisor::{Backoff, Duty, Next, Report, Routine, Supervisor};

/// The least time between two notices.
const BETWEEN: Duration = Duration::from_millis(5);
/// The pause after a failure.
const AGAIN: Duration = Duration::from_secs(1);

/// Tells other nodes of this one's appends.
pub(super) struct Teller {
    pub(super) link: Link,
    pub(super) cluster: cluster::Handle,
    pub(super) state: Arc<State>,
}

impl Teller {
    pub(super) fn start(self, supervisor: &Supervisor) {
        let routine = Routine::every(BETWEEN, "stream teller")
            .woken_by(&self.state.appended_here)
            .backing_off(Backoff::constant(AGAIN));
        supervisor.start(routine, self);
    }
}

impl Duty for Teller {
    type Error = store::Error;

    async fn pass(&mut self) -> Result<Next, store::Error> {
        if self.cluster.view().has_peers() {
            let incarnation = self.cluster.incarnation();
            tell_appended(self.link.get().await?, incarnation).await?;
        }
        Ok(Next::Woken(BETWEEN))
    }

    fn failed(&mut self, error: &store::Error) {
        self.link.cut();
        tracing::debug!(
            error = error as &dyn std::error::Error,
            "sending a notice to other nodes failed"
        );
    }
}

/// Hears of other nodes' appends. A loop of its own: it waits on a connection for what others say, as long as that lasts.
pub(super) struct Listener {
    pub(super) db: Database,
    pub(super) cluster: cluster::Handle,
    pub(super) state: Arc<State>,
    pub(super) supervisor: Supervisor,
}

impl Listener {
    pub(super) async fn run(self) {
        let mut views = self.cluster.views();
        tokio::select! {
            _ = views.wait_for(|view| view.has_peers()) => {}
            () = self.supervisor.stopping() => return,
        }
        drop(views);
        let report = self.supervisor.report("stream listener", None);
        while !self.supervisor.is_stopping() {
            report.begins();
            if let Err(error) = self.listen(&report).await {
                report.failed(chain(&error), AGAIN);
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "listening for notices of other nodes failed"
                );
            }
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                () = self.supervisor.stopping() => {}
            }
        }
    }

    async fn listen(&self, report: &Report) -> Result<(), store::Error> {
        let mut hints = Hints::listen(&self.db).await?;
        report.recovered();
        loop {
            // Dropped at the end only, with its connection.
            let from = tokio::select! {
                from = hints.next() => from?,
                () = self.supervisor.stopping() => return Ok(()),
            };
            if from != self.cluster.incarnation() {
                self.state.appended_elsewhere.notify_one();
            }
        }
    }
}
