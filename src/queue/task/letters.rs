//! Dead letters, where the queue's task meets them.

use tokio::sync::oneshot;

use super::Task;
use super::part::Answer;
use crate::domain::id::Offset;
use crate::domain::letter::LetterId;
use crate::queue::api::Error;
use crate::queue::log::letters::Source;

impl Task {
    /// The source of the messages of this queue's deliveries.
    pub(super) fn source(&self) -> Source {
        Source {
            stream: self.parts.stream.clone(),
            letters: self.parts.letters.clone(),
            stream_id: self.parts.stream_id,
            queue: self.machine.id(),
        }
    }

    /// The redriven messages among these, in the same order.
    pub(super) fn reopened(&self, offsets: &[Offset]) -> Vec<Offset> {
        let offsets = offsets.iter().copied();
        offsets
            .filter(|&offset| self.machine.is_reopened(offset))
            .collect()
    }

    pub(super) fn remove_letter(
        &mut self,
        id: LetterId,
        delivery: u32,
        reply: oneshot::Sender<Result<(), Error>>,
    ) {
        // Of a later death, or gone: then the one that was meant is removed.
        if self.machine.death(id.offset) == Some(delivery) {
            if self.machine.is_reopened(id.offset) {
                let _ = reply.send(Err(Error::LetterRedriven { id }));
                return;
            }
            self.machine.remove_letter(id.offset);
        }
        self.answer_later(Answer::Done { reply });
    }
}
