//! Notices between nodes that something was appended, so that queues on other nodes need not wait for their next look at
//! the log. At most one is on its way at a time, and none while there is nobody to hear it.

use std::sync::Arc;
use std::time::Duration;

use super::handle::State;
use crate::cluster;
use crate::store::hint::{Hints, tell_appended};
use crate::store::{Database, Link};
use crate::supervisor::Supervisor;

/// The least time between two notices.
const BETWEEN: Duration = Duration::from_millis(5);
/// The pause after a failure.
const AGAIN: Duration = Duration::from_secs(1);

/// Tells other nodes of this one's appends.
pub(super) struct Teller {
    pub(super) link: Link,
    pub(super) cluster: cluster::Handle,
    pub(super) state: Arc<State>,
    pub(super) supervisor: Supervisor,
}

impl Teller {
    pub(super) async fn run(mut self) {
        loop {
            tokio::select! {
                () = self.state.appended_here.notified() => {}
                () = self.supervisor.stopping() => return,
            }
            if !self.cluster.view().has_peers() {
                continue;
            }
            let told = async {
                let connection = self.link.get().await?;
                tell_appended(connection, self.cluster.incarnation()).await
            };
            let pause = match told.await {
                Ok(()) => BETWEEN,
                Err(error) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "sending a notice to other nodes failed"
                    );
                    self.link.cut();
                    AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    }
}

/// Hears of other nodes' appends.
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
        while !self.supervisor.is_stopping() {
            if let Err(error) = self.listen().await {
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

    async fn listen(&self) -> Result<(), crate::store::Error> {
        let mut hints = Hints::listen(&self.db).await?;
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
