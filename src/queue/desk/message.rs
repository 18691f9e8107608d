//! Single messages of a queue: where one stands, settle it, end its delivery before its time.

use super::Handle;
use crate::domain::id::Offset;
use crate::domain::name::{QueueName, Topic};
use crate::domain::policy::{CONSUMER_MAX_BYTES, REASON_MAX_BYTES};
use crate::domain::queue::Whose;
use crate::queue::api::{Act, Acted, Error, Expire, INSPECT_MAX, MessageStatus, invalid};
use crate::queue::ask::Command;
use crate::store;

impl Handle {
    /// Says where messages stand, in the order asked. `None` for the topic of one that the log does not have.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`] for more than 1,000, [`Error::Unavailable`], [`Error::Stopping`], or the
    /// database's.
    pub async fn inspect(
        &self,
        queue: &QueueName,
        messages: Vec<(Offset, Option<Topic>)>,
    ) -> Result<Vec<MessageStatus>, Error> {
        if messages.len() > INSPECT_MAX {
            return Err(invalid("messages", "must be at most 1000"));
        }
        let id = self.shared.find(queue)?.description.id;
        let bound = self.shared.outcome_wait;
        let (mut told, dead) = self
            .tell(queue, bound, |reply| Command::Inspect { messages, reply })
            .await?;
        if !dead.is_empty() {
            let read = move |database: store::Database| async move {
                store::letter::find_histories(&database, id, &dead).await
            };
            for letter in self.shared.letters.ask(read).await? {
                let meant = told
                    .iter_mut()
                    .filter(|told| told.offset == letter.id.offset);
                meant.for_each(|told| told.add_letter(&letter));
            }
        }
        Ok(told)
    }

    /// Settles a message, in this queue only. Answered after the commit. Repeating it is safe: it finds the message settled.
    ///
    /// # Errors
    /// [`Error::NotFound`] for the queue, [`Error::Invalid`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`].
    pub async fn act(&self, queue: &QueueName, offset: Offset, act: Act) -> Result<Acted, Error> {
        if let Act::Reject {
            reason: Some(reason),
        } = &act
            && (reason.len() > REASON_MAX_BYTES || reason.contains('\0'))
        {
            return Err(invalid(
                "reason",
                "must be at most 1024 bytes long, without the character U+0000",
            ));
        }
        let bound = self.shared.outcome_wait;
        self.tell(queue, bound, |reply| Command::Act { offset, act, reply })
            .await
    }

    /// Ends live deliveries as if they had expired: the attempts count, and the messages go out again as after any expiry. Answered
    /// after the commit, with the messages. Messages that are not live are not touched.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::Unavailable`], [`Error::OutcomeUnknown`], [`Error::Stopping`].
    pub async fn expire(&self, queue: &QueueName, expire: Expire) -> Result<Vec<Offset>, Error> {
        match &expire.whose {
            Whose::Consumer(name) if name.is_empty() || name.len() > CONSUMER_MAX_BYTES => {
                return Err(invalid("consumer", "must be 1 to 255 bytes long"));
            }
            Whose::Offsets(offsets) if offsets.is_empty() || offsets.len() > INSPECT_MAX => {
                return Err(invalid("offsets", "must be a list of 1 to 1000"));
            }
            _ => {}
        }
        let bound = self.shared.outcome_wait;
        self.tell(queue, bound, |reply| Command::Expire { expire, reply })
            .await
    }
}
