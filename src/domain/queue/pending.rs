//! Decisions that are not written yet, in pieces that can be written one by one. Each piece begins where the previous one
//! ends, so whichever piece is last, the stored state is that of some moment. A piece is bounded, so that no request, and
//! no mass expiry of deliveries, makes one write that everybody else waits for.

use std::collections::VecDeque;

use super::{Batch, Letter, Queue, Record};
use crate::domain::id::Offset;

/// Dead letters of a piece: each is a copy of a message.
pub(super) const LETTERS_TOGETHER: usize = 32;
/// About how many bytes of records and letters make a piece.
pub(super) const BYTES_TOGETHER: usize = 512 * 1024;

/// The pieces to write, oldest first.
#[derive(Debug, Clone, Default)]
pub(super) struct Pending {
    /// The piece that decisions go into.
    now: Batch,
    /// About its bytes.
    weight: usize,
    /// The batches before it.
    sealed: VecDeque<Batch>,
    /// The number of the piece that decisions go into.
    number: u64,
}

impl Pending {
    pub(super) fn push(&mut self, record: Record) {
        self.weight += record.weight();
        self.now.records.push(record);
    }

    /// The letter's death is recorded in the same piece. A letter of a former death that was removed in it is replaced instead.
    pub(super) fn write_letter(&mut self, letter: Letter) {
        let reasons = letter.failures.iter().map(|failure| failure.reason.len());
        self.weight += 64 + reasons.sum::<usize>();
        self.now
            .removed_letters
            .retain(|removed| *removed != letter.offset);
        self.now.letters.push(letter);
    }

    /// Removes letters; the same piece records it. Letters of this very piece are not even written.
    pub(super) fn remove_letters(&mut self, offsets: &[Offset]) {
        if !self.now.letters.is_empty() {
            self.now
                .letters
                .retain(|letter| !offsets.contains(&letter.offset));
        }
        self.now.removed_letters.extend(offsets);
    }

    fn is_full(&self) -> bool {
        self.now.letters.len() >= LETTERS_TOGETHER || self.weight >= BYTES_TOGETHER
    }

    fn begin(&mut self) -> Batch {
        self.weight = 0;
        self.number += 1;
        std::mem::take(&mut self.now)
    }

    fn take(&mut self) -> Batch {
        match self.sealed.pop_front() {
            Some(batch) => batch,
            None => self.begin(),
        }
    }

    fn is_empty(&self) -> bool {
        self.sealed.is_empty() && self.now.is_empty()
    }
}

impl Queue {
    /// The piece to write next: the oldest.
    pub fn take_batch(&mut self) -> Batch {
        if !self.is_split() && self.is_leaving() != self.left_order {
            let leaves = self.is_leaving();
            self.commit(Record::OrderLeft { leaves });
        }
        self.pending.take()
    }

    /// Whether [`Queue::take_batch`] would give something.
    #[must_use]
    pub fn has_batch(&self) -> bool {
        !self.pending.is_empty() || self.is_leaving() != self.left_order
    }

    /// Whether more than one piece waits: the next one leaves the stored state behind the one at hand.
    #[must_use]
    pub fn is_split(&self) -> bool {
        !self.pending.sealed.is_empty()
    }

    /// The number of the piece that the last decision is in, or a later one's.
    #[must_use]
    pub fn deciding(&self) -> u64 {
        self.pending.number
    }

    /// The number of the piece that [`Queue::take_batch`] would give.
    #[must_use]
    pub fn writing(&self) -> u64 {
        self.pending.number - self.pending.sealed.len() as u64
    }

    /// Called where all that was decided is recorded: what follows goes into the next piece if this one is full.
    pub(super) fn seal(&mut self) {
        if self.pending.is_full() {
            let full = self.pending.begin();
            self.pending.sealed.push_back(full);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{At, Found, Item, Random, Receive, Verb};
    use super::*;
    use crate::domain::id::{Generation, QueueId};
    use crate::domain::policy::Settings;
    use crate::domain::receipt::Receipt;

    const COUNT: i64 = 1_000;

    fn queue() -> Queue {
        let settings = Settings {
            max_attempts: 1,
            ..Settings::default()
        };
        let (id, random) = (QueueId(1), Random::new(1));
        Queue::new(id, Generation(1), Offset(1), settings, random)
    }

    /// A queue that has handed all out, its journal so far, and the receipts.
    fn handed_out() -> (Queue, Vec<Record>, Vec<Item>) {
        let mut queue = queue();
        (1..=COUNT).for_each(|offset| queue.found(Found::at(offset)));
        let (second, limits) = (Duration::from_secs(1), (COUNT as usize, u64::MAX));
        let receive = Receive::default();
        let taken = queue.hand_out(At(0), second, &receive, limits, &|_| Some(1));
        let items = taken.handed.iter().map(|handed| Item {
            receipt: Some(Receipt {
                queue: QueueId(1),
                generation: Generation(1),
                offset: handed.offset,
                delivery: handed.delivery,
            }),
            reason: Some("x".repeat(1_024)),
            ..Item::default()
        });
        let items = items.collect();
        let journal = queue.take_batch().records;
        (queue, journal, items)
    }

    /// Each letter's death is stored with its row, whichever piece was the last to be written. Gives how many pieces there were.
    fn check_pieces(queue: &mut Queue, journal: &mut Vec<Record>) -> usize {
        let (mut pieces, mut letters) = (0, 0);
        let mut stored = self::queue();
        journal.iter().for_each(|record| stored.apply(record));
        let before = stored.counts().dead;
        while queue.has_batch() {
            assert_eq!(queue.is_split(), queue.writing() < queue.deciding());
            let batch = queue.take_batch();
            assert!(batch.letters.len() <= LETTERS_TOGETHER);
            let bytes = super::super::encode(&batch.records).len();
            assert!(bytes <= BYTES_TOGETHER + 4_096, "{bytes} bytes");
            letters += batch.letters.len();
            journal.extend(batch.records);
            let mut stored = self::queue();
            journal.iter().for_each(|record| stored.apply(record));
            assert_eq!(stored.counts().dead, before + letters as u64);
            pieces += 1;
        }
        pieces
    }

    #[test]
    fn a_thousand_letters_are_written_in_pieces_whoever_makes_them() {
        let (mut queue, mut journal, items) = handed_out();
        queue.settle(Verb::Reject, &items, At(1));
        assert_eq!(check_pieces(&mut queue, &mut journal), 32);
        // Those whose time is over wait until some of them are written.
        let (mut queue, mut journal, _) = handed_out();
        let mut pieces = 0;
        while queue.next_deadline().is_some() {
            queue.advance(At(5_000), At(5_000));
            pieces += check_pieces(&mut queue, &mut journal);
        }
        assert!((32..70).contains(&pieces), "{pieces}");
        assert_eq!(queue.counts().dead, COUNT as u64);
    }

    #[test]
    fn long_reasons_are_written_in_pieces_and_acks_among_them_come_with_the_last() {
        let (mut queue, _, items) = handed_out();
        queue.settings.max_attempts = 3;
        queue.settle(Verb::Nack, &items[..990], At(1));
        queue.settle(Verb::Ack, &items[990..], At(1));
        assert!(queue.is_split());
        let mut last = Batch::default();
        let mut pieces = 0;
        while queue.has_batch() {
            last = queue.take_batch();
            pieces += 1;
        }
        assert_eq!(pieces, 2);
        let is_ack = |record: &Record| matches!(record, Record::Settled { .. });
        assert!(last.records.iter().any(is_ack));
    }
}
