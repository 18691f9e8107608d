//! Redriven dead letters. A redriven message is unsettled again while its letter stays: `dead` holds it and so do the
//! entries, which are looked at first. It is in `reopened`, and messages in there hold back neither the watermark nor
//! retention: the payload comes from the letter when the log has dropped it. Once the message is settled the letter goes;
//! when it dies again the letter is replaced.

use super::record::{End, Record, SettledAs};
use super::{At, Entry, Queue, State};
use crate::domain::id::Offset;

/// Redriven messages that are not settled yet, after which a redrive waits: each has a place in memory, and those that
/// are handed out for the first time need room, too.
pub const REOPENED_MAX: usize = 100_000;

/// A dead letter as its row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reborn {
    /// The message.
    pub offset: Offset,
    /// The delivery that it died with.
    pub delivery: u32,
}

impl Queue {
    /// Redrives dead letters: they are due at once, with all their attempts, and go before ready messages at later offsets. Returns
    /// the redriven ones: a letter whose message is already unsettled, or that was removed, or that died again since its row was
    /// read, is left out.
    pub fn redrive(&mut self, letters: &[Reborn], now: At) -> Vec<Offset> {
        let mut back: Vec<(i64, u32)> = letters
            .iter()
            .filter(|letter| self.is_redrivable(letter))
            // The number of the death counts as issued, so that the receipts of then are stale.
            .map(|letter| (letter.offset.0, letter.delivery.saturating_add(1)))
            .collect();
        back.sort_unstable();
        back.dedup();
        let offsets = back.iter().map(|&(offset, _)| Offset(offset)).collect();
        if !back.is_empty() {
            self.commit(Record::Redriven {
                at: now,
                letters: back,
            });
        }
        offsets
    }

    fn is_redrivable(&self, letter: &Reborn) -> bool {
        self.death(letter.offset) == Some(letter.delivery) && !self.is_unsettled(letter.offset)
    }

    /// How many dead letters can be brought back now.
    #[must_use]
    pub fn redrive_room(&self) -> usize {
        let reopened = usize::try_from(self.reopened.len()).unwrap_or(usize::MAX);
        REOPENED_MAX.saturating_sub(reopened).min(self.room())
    }

    /// Whether the message was redriven and is not settled since.
    #[must_use]
    pub fn is_reopened(&self, offset: Offset) -> bool {
        self.reopened.contains(offset.0 as u64)
    }

    /// The delivery that a message died with, if it has a dead letter.
    #[must_use]
    pub fn death(&self, offset: Offset) -> Option<u32> {
        self.dead.get(&offset.0).map(|dead| dead.delivery)
    }

    /// Whether the message is there to be handed out, now or later, among those looked at.
    #[must_use]
    pub fn is_unsettled(&self, offset: Offset) -> bool {
        self.entries.contains_key(&offset.0) || self.fresh.contains(offset.0)
    }

    /// Whether a message that matches was settled by an ack or a person: neither unsettled, nor dead, nor yet to be found.
    #[must_use]
    pub fn is_done_with(&self, offset: Offset) -> bool {
        let is_seen = offset.0 >= self.start && offset.0 <= self.scanned;
        (is_seen || self.is_ahead(offset.0))
            && !self.is_unsettled(offset)
            && !self.dead.contains_key(&offset.0)
    }

    pub(super) fn apply_redriven(&mut self, at: At, letters: &[(i64, u32)]) {
        for &(offset, delivery) in letters {
            if self.is_unsettled(Offset(offset)) {
                continue;
            }
            self.reopened.insert(offset as u64);
            // Found again by a seek, handed out and lost, while its letter stayed.
            self.lost.remove(offset as u64);
            let entry = Entry {
                delivery,
                attempts: 0,
                releases: 0,
                timed_out: false,
                since: at,
                batch: None,
                mark: self
                    .dead
                    .get(&offset)
                    .map(|dead| dead.mark)
                    .unwrap_or_default(),
                state: State::Ended {
                    end: End::Unwritten,
                    due: at,
                },
                receive: None,
                // Those of its former life are with its letter.
                failures: Vec::new(),
            };
            self.attach(offset, entry);
        }
    }

    /// The letters of messages that are settled after all go with them.
    pub(super) fn remove_letters_of(&mut self, record: &Record) {
        let Record::Settled { kind, ranges } = record else {
            return;
        };
        if self.dead.is_empty() {
            return;
        }
        for &(from, through) in ranges {
            let dead = self.dead.range(from..=through).map(|(&offset, _)| offset);
            let gone = dead.filter(|&offset| self.takes_letter(offset, *kind));
            let gone: Vec<Offset> = gone.map(Offset).collect();
            self.pending.remove_letters(&gone);
        }
    }

    /// Whether the letter goes when its message is settled. One that the log lost takes none with it, but for a redriven
    /// one: that is lost only when the letter is, too.
    pub(super) fn takes_letter(&self, offset: i64, kind: SettledAs) -> bool {
        kind != SettledAs::Gap || self.reopened.contains(offset as u64)
    }

    /// The lowest offset that was handed out, is not settled, and was not redriven.
    pub(super) fn first_entry(&self) -> Option<i64> {
        if self.reopened.is_empty() {
            return self.entries.keys().next().copied();
        }
        // Redriven ones are mostly old, and may be many: those passed over once are not looked at again.
        let from = self.passed.get();
        let mut ordinary = self
            .entries
            .range(from..)
            .map(|(&offset, _)| offset)
            .filter(|&offset| !self.reopened.contains(offset as u64));
        let first = ordinary.next();
        self.passed.set(first.unwrap_or(i64::MAX));
        first
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use super::super::{Found, Item, Outcome, Random, Receive, Stored, Verb, decode, encode};
    use super::*;
    use crate::domain::id::{Generation, QueueId};
    use crate::domain::policy::Settings;
    use crate::domain::receipt::Receipt;

    fn queue(count: i64) -> Queue {
        let settings = Settings {
            max_attempts: 1,
            ..Settings::default()
        };
        let mut queue = Queue::new(
            QueueId(1),
            Generation(1),
            Offset(1),
            settings,
            Random::new(7),
        );
        for offset in 1..=count {
            queue.found(Found::at(offset));
        }
        queue
    }

    fn take(queue: &mut Queue, now: i64) -> Vec<(i64, u32, u32)> {
        queue.advance(At(now), At(now));
        let second = Duration::from_secs(1);
        let taken = queue.hand_out(
            At(now),
            second,
            &Receive::default(),
            (100, u64::MAX),
            &|_| Some(1),
        );
        taken
            .handed
            .iter()
            .map(|handed| (handed.offset.0, handed.delivery, handed.attempt))
            .collect()
    }

    fn item(offset: i64, delivery: u32) -> Item {
        Item {
            receipt: Some(Receipt {
                queue: QueueId(1),
                generation: Generation(1),
                offset: Offset(offset),
                delivery,
            }),
            ..Item::default()
        }
    }

    /// The queue as a restart finds it, by the journal and by a checkpoint.
    fn restarted(queue: &mut Queue) -> Queue {
        queue.journal_scan(Offset(i64::MAX));
        let checkpoint = queue.checkpoint(&Stored::default());
        let (id, settings, head) = (queue.id(), queue.settings().clone(), &checkpoint.head);
        let generation = queue.generation();
        let read = Queue::from_checkpoint(head, id, generation, settings, Random::new(7));
        let (mut queue, _) = read.unwrap();
        for chunk in checkpoint.chunks {
            queue.take_chunk(&chunk.data).unwrap();
        }
        queue
    }

    fn reborn(offset: i64, delivery: u32) -> Reborn {
        Reborn {
            offset: Offset(offset),
            delivery,
        }
    }

    #[test]
    fn a_redriven_message_begins_again_and_its_letter_goes_when_it_is_settled() {
        let mut queue = queue(3);
        assert_eq!(take(&mut queue, 0).len(), 3);
        queue.settle(Verb::Reject, &[item(1, 1), item(2, 1)], At(1));
        queue.settle(Verb::Ack, &[item(3, 1)], At(1));
        assert_eq!(queue.watermark(), Offset(3));
        queue.take_batch();
        let asked = [reborn(1, 1), reborn(2, 2), reborn(3, 1), reborn(9, 1)];
        assert_eq!(queue.redrive(&asked, At(2)), [Offset(1)]);
        assert_eq!(queue.redrive(&asked, At(2)), [], "not twice");
        let batch = queue.take_batch();
        assert_eq!(decode(&encode(&batch.records)).unwrap(), batch.records);
        assert_eq!(queue.watermark(), Offset(3), "nothing is held back");
        assert_eq!(queue.lose_through(Offset(3)), 0, "its letter has a copy");
        let mut queue = restarted(&mut queue);
        assert!(queue.is_reopened(Offset(1)) && queue.watermark() == Offset(3));
        let stale = queue.settle(Verb::Ack, &[item(1, 1)], At(3));
        assert_eq!(stale[0], Outcome::Stale { attempt: 1 });
        assert_eq!(take(&mut queue, 3), [(1, 3, 1)]);
        let twice = queue.settle(Verb::Ack, &[item(1, 3), item(1, 3)], At(4));
        assert_eq!(twice, [Outcome::Acked, Outcome::AlreadySettled]);
        assert_eq!(queue.take_batch().removed_letters, [Offset(1)]);
        assert!(!queue.is_reopened(Offset(1)) && queue.is_done_with(Offset(1)));
        assert_eq!((queue.counts().dead, queue.death(Offset(2))), (1, Some(1)));
    }

    #[test]
    fn what_dies_again_can_be_redriven_again() {
        let mut queue = queue(1);
        take(&mut queue, 0);
        queue.settle(Verb::Reject, &[item(1, 1)], At(1));
        queue.redrive(&[reborn(1, 1)], At(2));
        assert_eq!(queue.counts().dead, 0);
        assert_eq!(take(&mut queue, 2), [(1, 3, 1)]);
        queue.take_batch();
        queue.advance(At(5_000), At(5_000));
        let batch = queue.take_batch();
        assert_eq!(
            (batch.letters[0].delivery, batch.letters[0].attempts),
            (3, 1)
        );
        assert!(batch.removed_letters.is_empty(), "it is replaced");
        assert_eq!((queue.counts().dead, queue.death(Offset(1))), (1, Some(3)));
        assert_eq!(queue.redrive(&[reborn(1, 1)], At(6_000)), [], "an old row");
        assert_eq!(queue.redrive(&[reborn(1, 3)], At(6_000)), [Offset(1)]);
    }

    #[test]
    fn the_oldest_that_holds_back_is_found_among_redriven_ones() {
        let mut queue = queue(5);
        take(&mut queue, 0);
        let all: Vec<Item> = (1..=5).map(|offset| item(offset, 1)).collect();
        queue.settle(
            Verb::Reject,
            &[all[0].clone(), all[1].clone(), all[3].clone()],
            At(1),
        );
        queue.redrive(&[reborn(1, 1), reborn(2, 1), reborn(4, 1)], At(1));
        assert_eq!(queue.oldest_unsettled(), Some(Offset(3)));
        queue.settle(Verb::Ack, &all[2..3], At(2));
        assert_eq!(queue.oldest_unsettled(), Some(Offset(5)));
        queue.settle(Verb::Ack, &all[4..], At(2));
        assert_eq!(
            (queue.oldest_unsettled(), queue.watermark()),
            (None, Offset(5))
        );
        queue.found(Found::at(6));
        take(&mut queue, 2);
        assert_eq!(queue.oldest_unsettled(), Some(Offset(6)));
    }
}
