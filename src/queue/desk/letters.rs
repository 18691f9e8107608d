//! Dead letters, as people read and remove them.

use super::Handle;
use crate::domain::letter::LetterId;
use crate::domain::name::QueueName;
use crate::queue::api::{Error, LETTERS_MAX, LetterFilter, LetterPage};
use crate::queue::ask::Command;
use crate::store;
use crate::store::letter::{Part, Stored, Summary};

impl Handle {
    /// Lists dead letters by offset, without payloads.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Stopping`], or the database's.
    pub async fn dead_letters(
        &self,
        queue: &QueueName,
        filter: LetterFilter,
    ) -> Result<LetterPage, Error> {
        let id = self.shared.find(queue)?.description.id;
        let limit = i64::from(filter.limit.clamp(1, LETTERS_MAX));
        let part: Part<Summary> = self
            .shared
            .letters
            .ask(move |database| async move {
                let LetterFilter {
                    selection, after, ..
                } = filter;
                store::letter::list_letters(&database, id, after, &selection, limit).await
            })
            .await?;
        Ok(LetterPage {
            letters: part.found,
            next_after: part.through,
        })
    }

    /// Reads one dead letter, with its message and its history.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::LetterNotFound`], [`Error::Stopping`], or the database's.
    pub async fn dead_letter(&self, queue: &QueueName, id: LetterId) -> Result<Stored, Error> {
        let queue_id = self.shared.find(queue)?.description.id;
        let found = self
            .shared
            .letters
            .ask(move |database| async move {
                store::letter::find_letter(&database, queue_id, id.offset).await
            })
            .await?;
        found
            .filter(|letter| letter.summary.id == id)
            .ok_or_else(|| Error::LetterNotFound {
                queue: queue.clone(),
                id,
            })
    }

    /// Removes a dead letter: its message is settled like any other from then on, and with `hold_key` its key goes on.
    /// Answered after the commit. Repeating it is safe: one that is not there is removed already.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::LetterRedriven`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`], or the database's.
    pub async fn delete_dead_letter(&self, queue: &QueueName, id: LetterId) -> Result<(), Error> {
        let queue_id = self.shared.find(queue)?.description.id;
        let delivery =
            self.shared
                .letters
                .ask(move |database| async move {
                    store::letter::find_death(&database, queue_id, id).await
                })
                .await?;
        let Some(delivery) = delivery else {
            return Ok(());
        };
        self.tell(queue, self.shared.outcome_wait, |reply| {
            Command::RemoveLetter {
                id,
                delivery,
                reply,
            }
        })
        .await
    }
}
