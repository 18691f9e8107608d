//! The whole state as one blob: what recovery starts from, so that it need not read the journal from its beginning.

use std::collections::HashMap;
use std::sync::Arc;

use super::record::{Decode, End};
use super::wire::{Reader, Writer};
use super::{At, Dead, Entry, FAILURES_KEPT, Failure, Mark, Queue, Random, Receive, State};
use crate::domain::id::{Generation, Offset, QueueId};
use crate::domain::message::Priority;
use crate::domain::policy::Settings;

const VERSION: u8 = 1;

impl Queue {
    /// The stored part of the state. The caller journals the scan position first ([`Queue::journal_scan`]), so that
    /// what is fresh here is what the journal knows.
    #[must_use]
    pub fn checkpoint(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        let mut to = Writer(&mut out);
        to.signed(self.start);
        to.signed(self.journaled);
        to.bitmap(&self.fresh.stored_through(self.journaled));
        to.bitmap(&self.ahead);
        to.bitmap(&self.lost);
        to.bitmap(&self.reopened);
        to.0.push(u8::from(self.left_order));
        self.write_dead(&mut to);
        self.write_receives(&mut to);
        out
    }

    pub(super) fn write_dead(&self, to: &mut Writer<'_>) {
        to.number(self.dead.len() as u64);
        let mut last = 0;
        for (&offset, dead) in &self.dead {
            to.signed(offset - last);
            to.number(u64::from(dead.delivery));
            to.signed(dead.at.0);
            to.key(dead.mark.key);
            to.0.push(dead.mark.priority.stored() as u8);
            to.0.push(u8::from(dead.holds));
            last = offset;
        }
    }

    pub(super) fn read_dead(&mut self, from: &mut Reader<'_>) -> Result<(), Decode> {
        let mut last = 0i64;
        for _ in 0..from.length_of_list()? {
            last = last.wrapping_add(from.signed()?);
            let dead = Dead {
                delivery: from.small()?,
                at: At(from.signed()?),
                mark: Mark {
                    key: from.key()?,
                    priority: Priority::from_stored(i16::from(from.byte()?)),
                },
                holds: from.flag()?,
            };
            self.bury(last, dead);
        }
        Ok(())
    }

    /// Receives are shared by the deliveries of a batch: each is written once, and entries name it by its number.
    fn write_receives(&self, to: &mut Writer<'_>) {
        let mut numbers: HashMap<*const Receive, u64> = HashMap::new();
        let mut receives: Vec<&Receive> = Vec::new();
        for receive in self
            .entries
            .values()
            .filter_map(|entry| entry.receive.as_ref())
        {
            numbers.entry(Arc::as_ptr(receive)).or_insert_with(|| {
                receives.push(receive);
                receives.len() as u64
            });
        }
        to.number(receives.len() as u64);
        for receive in receives {
            to.receive(receive);
        }
        to.number(self.entries.len() as u64);
        let mut last = 0;
        for (&offset, entry) in &self.entries {
            to.signed(offset - last);
            last = offset;
            let receive = entry.receive.as_ref();
            to.number(receive.map_or(0, |receive| numbers[&Arc::as_ptr(receive)]));
            write_entry(to, entry);
        }
    }

    /// The state of a checkpoint.
    ///
    /// # Errors
    /// What is not a checkpoint of a known version.
    pub fn from_checkpoint(
        bytes: &[u8],
        id: QueueId,
        generation: Generation,
        settings: Settings,
        random: Random,
    ) -> Result<Self, Decode> {
        let mut from = Reader(bytes);
        if from.byte()? != VERSION {
            return Err(Decode {
                what: "an unknown version of the checkpoint",
            });
        }
        let start = from.signed()?.max(1);
        let mut queue = Self::new(id, generation, Offset(start), settings, random);
        queue.journaled = from.signed()?;
        queue.scanned = queue.journaled;
        queue.fresh = from.bitmap()?.into();
        queue.ahead = from.bitmap()?;
        queue.lost = from.bitmap()?;
        queue.reopened = from.bitmap()?;
        queue.left_order = from.flag()?;
        queue.read_dead(&mut from)?;
        let mut receives = Vec::new();
        for _ in 0..from.length_of_list()? {
            receives.push(Arc::new(from.receive()?));
        }
        let mut last = 0i64;
        for _ in 0..from.length_of_list()? {
            last = last.wrapping_add(from.signed()?);
            let receive = match from.length_of_number()? {
                0 => None,
                number => Some(receives.get(number - 1).map(Arc::clone).ok_or(Decode {
                    what: "an entry of an unknown receive",
                })?),
            };
            let entry = read_entry(&mut from, receive)?;
            queue.detach(last);
            queue.attach(last, entry);
        }
        from.end()?;
        Ok(queue)
    }
}

impl Reader<'_> {
    fn length_of_number(&mut self) -> Result<usize, Decode> {
        usize::try_from(self.number()?).map_err(|_| Decode {
            what: "a number out of range",
        })
    }
}

fn write_entry(to: &mut Writer<'_>, entry: &Entry) {
    to.number(u64::from(entry.delivery));
    to.number(u64::from(entry.attempts));
    to.number(u64::from(entry.releases));
    to.signed(entry.since.0);
    to.0.push(u8::from(entry.batch.is_some()));
    if let Some(batch) = entry.batch {
        to.signed(batch.0.wrapping_sub(entry.since.0));
    }
    to.0.push(u8::from(entry.timed_out));
    match entry.state {
        State::Live { deadline } => {
            to.0.push(255);
            to.signed(deadline.0);
        }
        State::Ended { end, due } => {
            to.0.push(end.code());
            to.signed(due.0);
        }
    }
    to.number(entry.failures.len() as u64);
    for failure in &entry.failures {
        to.signed(failure.at.0);
        to.text(Some(&failure.reason));
    }
}

fn read_entry(from: &mut Reader<'_>, receive: Option<Arc<Receive>>) -> Result<Entry, Decode> {
    let (delivery, attempts, releases) = (from.small()?, from.small()?, from.small()?);
    let since = At(from.signed()?);
    let batch = match from.flag()? {
        true => Some(At(since.0.wrapping_add(from.signed()?))),
        false => None,
    };
    let timed_out = from.byte()? != 0;
    let state = match from.byte()? {
        255 => State::Live {
            deadline: At(from.signed()?),
        },
        code => State::Ended {
            end: End::of(code)?,
            due: At(from.signed()?),
        },
    };
    let mut failures = Vec::with_capacity(FAILURES_KEPT);
    for _ in 0..from.length_of_list()? {
        failures.push(Failure {
            at: At(from.signed()?),
            reason: from.text()?.unwrap_or_default(),
        });
    }
    Ok(Entry {
        delivery,
        attempts,
        releases,
        timed_out,
        since,
        batch,
        mark: Mark::default(),
        state,
        receive,
        failures,
    })
}

#[cfg(test)]
mod tests {
    use super::super::Found;
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Queue, Decode> {
        Queue::from_checkpoint(
            bytes,
            QueueId(1),
            Generation(1),
            Settings::default(),
            Random::new(1),
        )
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = read(&bytes);
        }

        #[test]
        fn a_changed_checkpoint_does_not_panic(place: prop::sample::Index, byte: u8) {
            let mut queue = Queue::new(QueueId(1), Generation(1), Offset(1), Settings::default(), Random::new(1));
            for offset in 1..40 {
                queue.found(Found::at(offset));
            }
            let receive = Receive { consumer: Some("c".into()), receive_id: Some("r".into()) };
            queue.hand_out(At(0), std::time::Duration::from_secs(1), &receive, (9, 1_000), &|_| Some(1));
            queue.advance(At(5_000), At(5_000));
            queue.journal_scan(Offset(40));
            let mut bytes = queue.checkpoint();
            let place = place.index(bytes.len());
            bytes[place] = byte;
            let _ = read(&bytes);
        }
    }
}
