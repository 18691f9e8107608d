//! People's acts on a queue: look at one message, settle it, end deliveries early, begin a new generation.
//!
//! Each act is one of the records that consumers' verbs make, so replay needs nothing new. A new generation takes over the
//! dead letters (and what was redriven of them); everything else of the former generation is void, and its receipts are
//! `gone`.

use std::sync::Arc;

use super::record::{Decode, Record, SettledAs};
use super::state::note_failure;
use super::wire::{Reader, Writer};
use super::{At, Failure, Letter, Mark, Queue, Random, Receive, State};
use crate::domain::id::{Generation, Offset, QueueId};
use crate::domain::policy::Settings;

/// First byte of the state that a generation begins with; a checkpoint begins with its version.
const CARRIED: u8 = 0xc1;

/// The state of a message in a queue, as far as the queue knows without the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Never handed out.
    Fresh,
    /// Handed out before, and due again.
    Ready,
    /// Ready, and held back by an earlier message of its key.
    Waiting,
    /// Handed out, until the deadline.
    Live {
        /// The time when it expires.
        deadline: At,
    },
    /// Held back by time.
    Delayed {
        /// The time when it is due.
        due: At,
    },
    /// A dead letter.
    Dead,
    /// Handed out, and then lost to retention's hard limit.
    Lost,
    /// Looked at and not unsettled: settled, or of a topic that the queue does not take.
    Passed,
    /// Not looked at yet.
    Unseen,
    /// Before this generation's first offset.
    BeforeStart,
}

impl Standing {
    /// Whether it is there to be handed out, now or later.
    #[must_use]
    pub fn is_unsettled(self) -> bool {
        matches!(
            self,
            Self::Fresh | Self::Ready | Self::Waiting | Self::Live { .. } | Self::Delayed { .. }
        )
    }
}

/// A queue's knowledge of one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// The message.
    pub offset: Offset,
    /// Its state.
    pub standing: Standing,
    /// The number of its last delivery; 0 before the first.
    pub delivery: u32,
    /// Attempts made, one under way included.
    pub attempts: u32,
    /// How its last attempts failed, oldest first.
    pub failures: Vec<Failure>,
    /// The time when its last delivery began.
    pub since: Option<At>,
    /// The receive that has it or had it last.
    pub receive: Option<Arc<Receive>>,
}

/// The live deliveries that end early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    /// The deliveries of a consumer.
    Consumer(String),
    /// The deliveries of these messages.
    Offsets(Vec<Offset>),
}

impl Queue {
    /// The queue's knowledge of a message.
    #[must_use]
    pub fn inspect(&self, offset: Offset, now: At) -> Inspected {
        let entry = self.entries.get(&offset.0);
        let standing = match entry.map(|entry| entry.state) {
            Some(State::Live { deadline }) => Standing::Live { deadline },
            Some(State::Ended { due, .. }) if due > now => Standing::Delayed { due },
            Some(State::Ended { .. }) if self.is_open(offset) => Standing::Ready,
            Some(State::Ended { .. }) => Standing::Waiting,
            None => self.standing_without_entry(offset.0),
        };
        let under_way = u32::from(matches!(standing, Standing::Live { .. }));
        Inspected {
            offset,
            standing,
            delivery: entry.map_or(0, |entry| entry.delivery),
            attempts: entry.map_or(0, |entry| entry.attempts + under_way),
            failures: entry.map_or_else(Vec::new, |entry| entry.failures.clone()),
            since: entry.map(|entry| entry.since),
            receive: entry.and_then(|entry| entry.receive.clone()),
        }
    }

    fn standing_without_entry(&self, offset: i64) -> Standing {
        if self.fresh.contains(offset) {
            match self.is_open(Offset(offset)) {
                true => Standing::Fresh,
                false => Standing::Waiting,
            }
        } else if self.dead.contains_key(&offset) {
            Standing::Dead
        } else if self.lost.contains(offset as u64) {
            Standing::Lost
        } else if offset < self.start {
            Standing::BeforeStart
        } else if offset <= self.scanned || self.is_ahead(offset) {
            Standing::Passed
        } else {
            Standing::Unseen
        }
    }

    /// Settles a message as deleted, in this queue only. The caller knows that it matches: one that was not looked at yet
    /// will be passed over. False, and nothing done, when it is neither unsettled nor unseen.
    pub fn delete(&mut self, offset: Offset, now: At) -> bool {
        let standing = self.inspect(offset, now).standing;
        if !standing.is_unsettled() && standing != Standing::Unseen {
            return false;
        }
        self.commit(Record::Settled {
            kind: SettledAs::Deleted,
            ranges: vec![(offset.0, offset.0)],
        });
        true
    }

    /// Makes a message a dead letter, whoever holds it. Its key goes on, also with `hold_key`: the person whom the key would wait
    /// for is the one who acts here. `key_hash` is that of a message that was not looked at yet. Otherwise as [`Queue::delete`].
    pub fn condemn(
        &mut self,
        offset: Offset,
        key_hash: Option<i64>,
        reason: Option<String>,
        now: At,
    ) -> bool {
        self.seal();
        let found = self.inspect(offset, now);
        if !found.standing.is_unsettled() && found.standing != Standing::Unseen {
            return false;
        }
        let reason = reason.unwrap_or_else(|| "rejected".to_owned());
        let mut failures = found.failures;
        note_failure(&mut failures, Failure { at: now, reason });
        self.pending.write_letter(Letter {
            offset,
            delivery: found.delivery,
            attempts: found.attempts,
            cause: "rejected",
            failures,
            died_at: now,
        });
        let Mark { key, priority } = self.mark_of(offset.0);
        // One that was not looked at is known to the caller alone.
        let key = match found.standing {
            Standing::Unseen => key_hash,
            _ => key,
        };
        self.commit(Record::Dead {
            offset: offset.0,
            delivery: found.delivery,
            at: now,
            key,
            priority,
            holds: false,
        });
        true
    }

    /// Ends live deliveries as if their time were up: the attempt counts. Only those that began before `began_before`,
    /// if given. Returns the messages, by offset.
    pub fn expire_now(&mut self, whose: &Whose, began_before: Option<At>, now: At) -> Vec<Offset> {
        let is_meant = |offset: i64| {
            let entry = self.entries.get(&offset)?;
            let is_live = matches!(entry.state, State::Live { .. });
            let is_early = began_before.is_none_or(|before| entry.since < before);
            let is_theirs = match whose {
                Whose::Offsets(_) => true,
                Whose::Consumer(name) => entry
                    .receive
                    .as_ref()
                    .is_some_and(|receive| receive.consumer.as_deref() == Some(name)),
            };
            (is_live && is_early && is_theirs).then_some(offset)
        };
        let mut over: Vec<i64> = match whose {
            Whose::Offsets(offsets) => offsets.iter().filter_map(|o| is_meant(o.0)).collect(),
            Whose::Consumer(_) => {
                let live = self.deadlines.iter().map(|&(_, offset)| offset);
                live.filter_map(is_meant).collect()
            }
        };
        over.sort_unstable();
        over.dedup();
        for &offset in &over {
            self.expire(offset, now);
        }
        // What is due at once is ready at once.
        self.advance(now, At(i64::MIN));
        over.into_iter().map(Offset).collect()
    }

    /// The state that the next generation begins with: the dead letters. `keeps_redriven`: letters that were redriven and are not
    /// settled go out again in it; otherwise they are dead letters as before.
    #[must_use]
    pub fn carried(&self, keeps_redriven: bool, now: At) -> Vec<u8> {
        let mut out = vec![CARRIED];
        let mut to = Writer(&mut out);
        self.write_dead(&mut to);
        to.signed(now.0);
        let redriven = self.reopened.iter().filter(|_| keeps_redriven);
        let redriven = redriven.filter_map(|offset| {
            let entry = self.entries.get(&(offset as i64))?;
            Some((offset as i64, entry.delivery))
        });
        to.deliveries(&redriven.collect::<Vec<_>>());
        out
    }

    /// The state that a generation begins with. None when the bytes are another kind of state.
    ///
    /// # Errors
    /// Bytes that no known version has written.
    pub fn from_carried(
        bytes: &[u8],
        id: QueueId,
        generation: Generation,
        start: Offset,
        settings: Settings,
        random: Random,
    ) -> Result<Option<Self>, Decode> {
        let mut from = Reader(bytes);
        if from.byte()? != CARRIED {
            return Ok(None);
        }
        let mut queue = Self::new(id, generation, start, settings, random);
        queue.read_dead(&mut from)?;
        let at = At(from.signed()?);
        let redriven = from.deliveries()?;
        from.end()?;
        queue.apply_redriven(at, &redriven);
        Ok(Some(queue))
    }

    /// This queue in its next generation, which has to learn its order as a recovered one has.
    ///
    /// # Errors
    /// As [`Queue::from_carried`].
    pub fn next_generation(
        &self,
        carried: &[u8],
        generation: Generation,
        start: Offset,
    ) -> Result<Self, Decode> {
        let (settings, random) = (self.settings.clone(), self.random.clone());
        let next = Self::from_carried(carried, self.id, generation, start, settings, random)?;
        let mut next = next.ok_or(Decode {
            what: "not the state of a generation's beginning",
        })?;
        next.former.clone_from(&self.former);
        next.arrange();
        Ok(next)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use super::super::{Found, Item, Outcome, Reborn, Stored, Verb, decode, encode};
    use super::*;
    use crate::domain::policy::Ordering;
    use crate::domain::receipt::Receipt;

    const SECOND: Duration = Duration::from_secs(1);

    fn queue(count: i64) -> Queue {
        let settings = Settings {
            max_attempts: 3,
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

    fn take(queue: &mut Queue, count: usize, consumer: &str, now: i64) -> Vec<i64> {
        queue.advance(At(now), At(i64::MIN));
        let receive = Receive {
            consumer: Some(consumer.to_owned()),
            receive_id: None,
        };
        let taken = queue.hand_out(At(now), SECOND, &receive, (count, 1_000), &|_| Some(1));
        taken.handed.iter().map(|handed| handed.offset.0).collect()
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

    fn standing(queue: &Queue, offset: i64, now: i64) -> Standing {
        queue.inspect(Offset(offset), At(now)).standing
    }

    /// The queue that replaying this batch makes of the queue before it.
    fn replayed(mut before: Queue, queue: &mut Queue) -> Queue {
        let batch = queue.take_batch();
        for record in decode(&encode(&batch.records)).unwrap() {
            before.apply(&record);
        }
        before
    }

    #[test]
    fn every_standing_is_told() {
        let mut queue = queue(8);
        assert_eq!(take(&mut queue, 5, "a", 0), [1, 2, 3, 4, 5]);
        queue.settle(Verb::Ack, &[item(1, 1)], At(1));
        queue.settle(Verb::Reject, &[item(2, 1)], At(1));
        let mut later = item(3, 1);
        later.delay = Some(SECOND);
        later.reason = Some("busy".into());
        queue.settle(Verb::Nack, &[later], At(1));
        queue.settle(Verb::Release, &[item(4, 1)], At(1));
        queue.looked_through(Offset(9));
        for (offset, expected) in [
            (0, Standing::BeforeStart),
            (1, Standing::Passed),
            (2, Standing::Dead),
            (3, Standing::Delayed { due: At(1_001) }),
            (4, Standing::Ready),
            (
                5,
                Standing::Live {
                    deadline: At(1_000),
                },
            ),
            (6, Standing::Fresh),
            (9, Standing::Passed),
            (10, Standing::Unseen),
        ] {
            assert_eq!(standing(&queue, offset, 2), expected, "{offset}");
        }
        let nacked = queue.inspect(Offset(3), At(2));
        assert_eq!((nacked.delivery, nacked.attempts), (1, 1));
        assert_eq!(nacked.failures[0].reason, "busy");
        assert_eq!(queue.inspect(Offset(5), At(2)).attempts, 1);
        assert_eq!(standing(&queue, 3, 1_001), Standing::Ready);
        queue.lose(vec![Offset(5)]);
        assert_eq!(standing(&queue, 5, 2), Standing::Lost);
    }

    #[test]
    fn a_deleted_message_is_settled_wherever_it_stood() {
        let mut queue = queue(4);
        take(&mut queue, 2, "a", 0);
        queue.take_batch();
        let before = queue.clone();
        queue.settle(Verb::Nack, &[item(2, 1)], At(1));
        for offset in [1, 2, 3, 7] {
            assert!(queue.delete(Offset(offset), At(1)), "{offset}");
            assert!(!queue.delete(Offset(offset), At(1)), "once: {offset}");
        }
        assert!(!queue.delete(Offset(0), At(1)));
        let mut queue = replayed(before, &mut queue);
        assert_eq!(
            queue.settle(Verb::Ack, &[item(1, 1)], At(2)),
            [Outcome::AlreadySettled]
        );
        queue.found(Found::at(7));
        queue.found(Found::at(8));
        assert_eq!(
            queue.ready(9),
            [Offset(4), Offset(8)],
            "the unseen one is passed over"
        );
    }

    #[test]
    fn a_person_rejects_what_was_never_handed_out_too() {
        let mut queue = queue(3);
        take(&mut queue, 1, "a", 0);
        queue.take_batch();
        for offset in [1, 2, 9] {
            assert!(queue.condemn(Offset(offset), None, Some("poison".into()), At(1)));
            assert!(!queue.condemn(Offset(offset), None, None, At(1)), "once");
            assert_eq!(standing(&queue, offset, 1), Standing::Dead);
        }
        let letters = queue.take_batch().letters;
        let told: Vec<_> = letters
            .iter()
            .map(|letter| (letter.offset.0, letter.delivery, letter.attempts))
            .collect();
        assert_eq!(told, [(1, 1, 1), (2, 0, 0), (9, 0, 0)]);
        assert!(letters.iter().all(|l| l.failures[0].reason == "poison"));
        queue.found(Found::at(9));
        assert_eq!(queue.ready(9), [Offset(3)]);
        let reborn = Reborn {
            offset: Offset(2),
            delivery: 0,
        };
        assert_eq!(queue.redrive(&[reborn], At(2)), [Offset(2)]);
    }

    #[test]
    fn who_blocks_a_key_is_rejected_and_the_key_goes_on() {
        let settings = Settings {
            ordering: Ordering::Key,
            hold_key: true,
            ..Settings::default()
        };
        let (id, random) = (QueueId(1), Random::new(7));
        let mut queue = Queue::new(id, Generation(1), Offset(1), settings, random);
        for offset in 1..=4 {
            queue.found(Found {
                key_hash: (offset < 4).then_some(77),
                ..Found::at(offset)
            });
        }
        assert_eq!(take(&mut queue, 9, "a", 0), [1, 4]);
        assert_eq!(standing(&queue, 2, 1), Standing::Waiting);
        assert!(queue.condemn(Offset(1), None, None, At(1)));
        assert_eq!(take(&mut queue, 9, "a", 2), [2]);
        assert!(
            queue.condemn(Offset(3), None, None, At(3)),
            "one that waits"
        );
        let dead: Vec<_> = queue
            .dead
            .values()
            .map(|dead| (dead.mark.key, dead.holds))
            .collect();
        assert_eq!(dead, [(Some(77), false), (Some(77), false)]);
        assert!(queue.delete(Offset(2), At(4)));
        assert_eq!(queue.counts().waiting, 0);
    }

    #[test]
    fn expiry_by_a_person_counts_as_one_by_time_and_only_once() {
        let mut queue = queue(5);
        take(&mut queue, 2, "a", 0);
        take(&mut queue, 2, "b", 10);
        let ours = Whose::Consumer("a".to_owned());
        assert_eq!(
            queue.expire_now(&ours, None, At(20)),
            [Offset(1), Offset(2)]
        );
        assert!(queue.expire_now(&ours, None, At(20)).is_empty());
        let told = queue.inspect(Offset(1), At(20));
        assert_eq!((told.standing, told.attempts), (Standing::Ready, 1));
        assert_eq!(told.failures[0].reason, "timed_out");
        let some = Whose::Offsets(vec![Offset(4), Offset(3), Offset(5), Offset(3)]);
        assert!(queue.expire_now(&some, Some(At(10)), At(20)).is_empty());
        assert_eq!(
            queue.expire_now(&some, Some(At(11)), At(20)),
            [Offset(3), Offset(4)]
        );
        for _ in 0..2 {
            let taken = take(&mut queue, 4, "a", 30);
            assert_eq!(taken[0], 1);
            queue.expire_now(&ours, None, At(31));
        }
        assert_eq!(standing(&queue, 1, 40), Standing::Dead, "out of attempts");
    }

    #[test]
    fn a_new_generation_has_the_dead_letters_and_nothing_else() {
        let mut queue = queue(5);
        take(&mut queue, 4, "a", 0);
        queue.settle(Verb::Ack, &[item(1, 1)], At(1));
        queue.settle(Verb::Reject, &[item(2, 1), item(3, 1)], At(1));
        let reborn = Reborn {
            offset: Offset(3),
            delivery: 1,
        };
        queue.redrive(&[reborn], At(1));
        let renew = |keeps| {
            let carried = queue.carried(keeps, At(5));
            queue
                .next_generation(&carried, Generation(2), Offset(2))
                .unwrap()
        };
        let mut next = renew(true);
        assert_eq!(
            (next.generation(), next.watermark()),
            (Generation(2), Offset(1))
        );
        assert_eq!(
            next.settle(Verb::Ack, &[item(4, 1)], At(6)),
            [Outcome::Gone { incident: false }]
        );
        assert_eq!(standing(&next, 2, 6), Standing::Dead);
        assert_eq!(
            (standing(&next, 3, 6), next.is_reopened(Offset(3))),
            (Standing::Ready, true)
        );
        for offset in 2..=5 {
            next.found(Found::at(offset));
        }
        assert_eq!(
            take(&mut next, 9, "a", 7),
            [2, 3, 4, 5],
            "dead ones are found again, redriven ones once"
        );
        let purged = renew(false);
        assert_eq!(
            (standing(&purged, 3, 6), purged.counts().dead),
            (Standing::Dead, 2)
        );
        let checkpoint = purged.checkpoint(&Stored::default()).head;
        let other = Queue::from_carried(
            &checkpoint,
            QueueId(1),
            Generation(2),
            Offset(1),
            Settings::default(),
            Random::new(1),
        );
        assert!(other.unwrap().is_none(), "a checkpoint is told from it");
    }
}
