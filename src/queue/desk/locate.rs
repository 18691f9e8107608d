//! Which node answers for a queue.

use super::Handle;
use crate::cluster::Owner;
use crate::domain::id::Slot;
use crate::domain::name::QueueName;
use crate::queue::api::Error;
use crate::queue::ask::Job;

impl Handle {
    /// The slot of a queue, and who answers for it. A queue that this process does not know is looked up.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Stopping`], [`Error::OutcomeUnknown`] when the look takes too long, or the database's.
    pub async fn locate(&self, name: &QueueName) -> Result<(Slot, Owner), Error> {
        let slot = match self.shared.find(name) {
            Ok(known) => Slot::of(known.description.id),
            Err(_) => self.look_up(name).await?,
        };
        Ok((slot, self.shared.cluster.view().owner(&slot.lease_name())))
    }

    /// As [`Handle::locate`], for a name under which another queue may be by now.
    ///
    /// # Errors
    /// As [`Handle::locate`].
    pub async fn look_up(&self, name: &QueueName) -> Result<Slot, Error> {
        let name = name.clone();
        self.ask(|reply| Job::Find { name, reply }).await
    }

    /// True if the queue's task runs here.
    #[must_use]
    pub fn is_here(&self, name: &QueueName) -> bool {
        let known = self.shared.find(name);
        known.is_ok_and(|known| known.mailbox.is_some())
    }
}
