//! The existing queues, whichever node created or deleted them. Each heartbeat brings the catalogue's version; when it has
//! risen, the changes are read. A name that is asked for before that is looked up.

use std::collections::HashSet;
use std::time::Instant;

use super::Engine;
use super::errand::Errand;
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
    pub(super) version: i64,
    /// It was the version then, or later.
    pub(super) as_of: Instant,
    /// Other nodes were there at some time.
    pub(super) had_peers: bool,
    /// Queues that were deleted, and that a read of before may still bring.
    gone: HashSet<QueueId>,
}

impl Catalogue {
    /// All that led to this version is known.
    pub(in crate::queue) fn new(as_of: Instant, version: i64, had_peers: bool) -> Self {
        Self {
            version,
            as_of,
            had_peers,
            gone: HashSet::new(),
        }
    }
}

impl Errand {
    /// A name's queue as the database has it now.
    pub(super) async fn look_up(&self, name: QueueName) -> Result<Slot, Error> {
        loop {
            let of = name.clone();
            let (version, known) = self
                .visit(move |engine| (engine.catalogue.version, engine.find(&of)))
                .await?;
            let row = {
                let _statement = self.statement().await;
                store::queue::find_queue(&self.database, &name).await?
            };
            let of = name.clone();
            let found = self
                .visit(move |engine| {
                    let is_now = engine.catalogue.version == version;
                    is_now.then(|| engine.note_found(of, known, row))
                })
                .await?;
            if let Some(found) = found {
                return found;
            }
            // It was read before the catalogue changed: what was deleted since must not come back.
        }
    }
}

impl Engine {
    /// Takes in what a heartbeat says of the catalogue.
    pub(super) fn follow_catalogue(&mut self, view: &View) {
        self.catalogue.had_peers |= view.has_peers();
        if view.queues_version == self.catalogue.version {
            self.catalogue.as_of = self.catalogue.as_of.max(view.as_of);
            return;
        }
        let (asked, since) = (Instant::now(), self.catalogue.version);
        self.beside("queue catalogue", move |errand| async move {
            match store::queue::find_changes(&errand.database, since).await {
                Ok((version, made, deleted)) => {
                    let note = move |engine: &mut Self| {
                        engine.note_changes(made, &deleted);
                        engine.catalogue.version = version;
                        engine.catalogue.as_of = asked;
                    };
                    let _ = errand.visit(note).await;
                }
                Err(error) => tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "reading other nodes' changes of the queues failed; trying again"
                ),
            }
        });
    }

    fn note_changes(&mut self, made: Vec<QueueRow>, deleted: &[QueueId]) {
        for &id in deleted {
            self.forget(id);
        }
        for row in made {
            self.take_in(row);
        }
        // Nothing that is read from now on has them.
        for id in deleted {
            self.catalogue.gone.remove(id);
        }
    }

    /// Takes in a queue that another node may have made.
    fn take_in(&mut self, row: QueueRow) {
        if self.queues.contains_key(&row.id) || self.catalogue.gone.contains(&row.id) {
            return;
        }
        if let Some(former) = self.find(&row.name) {
            if former.0 > row.id.0 {
                // It was read before that one was made.
                return;
            }
            self.forget(former);
        }
        self.take_over(row);
    }

    /// A name was looked up. `known`: the queue of that name that was known before.
    fn note_found(
        &mut self,
        name: QueueName,
        known: Option<QueueId>,
        row: Option<QueueRow>,
    ) -> Result<Slot, Error> {
        let Some(row) = row.filter(|row| !self.catalogue.gone.contains(&row.id)) else {
            if let Some(gone) = known {
                self.forget(gone);
            }
            return Err(Error::NotFound { queue: name });
        };
        let slot = row.slot;
        self.take_in(row);
        Ok(slot)
    }

    /// Forgets a queue that is deleted.
    pub(super) fn forget(&mut self, id: QueueId) {
        self.catalogue.gone.insert(id);
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
            self.post(&mailbox, Command::End);
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
