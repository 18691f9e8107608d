//! The existing queues, whichever node created or deleted them. Each heartbeat brings the catalogue's version; when it has
//! risen, the changes are read. A name that is asked for before that is looked up.

use std::time::Instant;

use super::Engine;
use crate::cluster::View;
use crate::domain::id::{Offset, QueueId, Slot};
use crate::domain::name::QueueName;
use crate::queue::api::Error;
use crate::queue::ask::Command;
use crate::store;
use crate::store::queue::QueueRow;

/// The engine's knowledge of the catalogue.
#[derive(Debug)]
pub(in crate::queue) struct Catalogue {
    /// All that led to this version is known.
    pub(in crate::queue) version: i64,
    /// It was the version then, or later.
    pub(in crate::queue) as_of: Instant,
    /// Other nodes were there at some time.
    pub(in crate::queue) had_peers: bool,
}

impl Engine {
    /// Takes in what a heartbeat says of the catalogue.
    pub(super) async fn follow_catalogue(&mut self, view: &View) {
        self.catalogue.had_peers |= view.has_peers();
        if view.queues_version == self.catalogue.version {
            self.catalogue.as_of = self.catalogue.as_of.max(view.as_of);
            return;
        }
        if let Err(error) = self.read_changes().await {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "reading other nodes' changes of the queues failed; trying again"
            );
        }
    }

    async fn read_changes(&mut self) -> Result<(), store::Error> {
        let asked = Instant::now();
        let since = self.catalogue.version;
        let (version, made, deleted) = store::queue::find_changes(&self.database, since).await?;
        for id in deleted {
            self.forget(id).await;
        }
        for row in made {
            self.take_in(row).await;
        }
        self.catalogue.version = version;
        self.catalogue.as_of = asked;
        Ok(())
    }

    /// Takes in a queue that another node may have made.
    pub(super) async fn take_in(&mut self, row: QueueRow) {
        if self.queues.contains_key(&row.id) {
            return;
        }
        if let Some(former) = self.find(&row.name) {
            self.forget(former).await;
        }
        self.take_over(row);
    }

    /// A name's queue as the database has it now.
    pub(super) async fn look_up(&mut self, name: &QueueName) -> Result<Slot, Error> {
        let known = self.find(name);
        let row = store::queue::find_queue(&self.database, name).await?;
        let Some(row) = row else {
            if let Some(gone) = known {
                self.forget(gone).await;
            }
            return Err(Error::NotFound {
                queue: name.clone(),
            });
        };
        let slot = row.slot;
        self.take_in(row).await;
        Ok(slot)
    }

    /// Forgets a queue that is deleted.
    pub(super) async fn forget(&mut self, id: QueueId) {
        self.forget_behind(id);
        let Some(owned) = self.queues.remove(&id) else {
            return;
        };
        let known = self.find(&owned.row.name);
        if known == Some(id) {
            self.write_known().remove(&owned.row.name);
        }
        self.alone.remove(&id);
        if let Some(state) = self.slots.get_mut(&owned.row.slot) {
            state.void_recovery();
        }
        owned.dispatch.unsubscribe(id);
        if let Some(mailbox) = owned.mailbox {
            let _ = mailbox.send(Command::End).await;
        }
        let stream = owned.row.stream_id;
        if !self
            .queues
            .values()
            .any(|other| other.row.stream_id == stream)
        {
            let as_of = self.catalogue.as_of;
            self.stream
                .set_watermark_as_of(stream, Offset(i64::MAX), as_of);
        }
        self.shared.metrics.queues.set(self.queues.len() as i64);
    }

    /// Refuses what only the node that owns the queue may do.
    pub(super) fn check_owned(&self, row: &QueueRow) -> Result<(), Error> {
        self.shared.check_owned(&row.name, row.slot)
    }
}
