//! The whole stored state, from which recovery starts, so that it need not read the journal from its beginning.
//!
//! A checkpoint is a head and chunks. A small queue's checkpoint fits in its head. For other queues, the dead letters and
//! the messages in flight are in chunks, each named by its content: what has not changed since the last checkpoint is
//! stored already, and each chunk is small enough to be written between the groups of other queues. A chunk ends after an
//! offset that its own bits choose, so that a change moves no other chunk's bounds. The head names its chunks, and is
//! written when all of them are.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher as _;
use std::sync::Arc;

use super::record::{Decode, End};
use super::wire::{Reader, Writer};
use super::{At, Dead, Entry, FAILURES_KEPT, Failure, Mark, Queue, Random, Receive, State};
use crate::domain::id::{Generation, Offset, QueueId};
use crate::domain::message::Priority;
use crate::domain::policy::Settings;

const VERSION: u8 = 2;
/// Dead letters and messages in flight that are written into the head.
const INLINE_MAX: usize = if cfg!(test) { 3 } else { 512 };
/// One offset in this many ends a chunk.
const CHUNK_OFFSETS: u64 = if cfg!(test) { 2 } else { 2_048 };
/// About how many bytes a chunk has at most.
const CHUNK_BYTES: usize = 256 * 1024;
/// The content of a chunk.
const DEAD: u8 = 1;
const ENTRIES: u8 = 2;

/// The name of a chunk.
pub type ChunkId = [u8; 16];

/// A part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Its name: another content has another.
    pub id: ChunkId,
    /// Its content.
    pub data: Vec<u8>,
}

/// The stored form of a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// To be stored when all chunks are.
    pub head: Vec<u8>,
    /// The chunks that it is made of.
    pub names: Vec<ChunkId>,
    /// Chunks that are not stored yet.
    pub chunks: Vec<Chunk>,
}

/// The stored chunks of a queue, as far as its owner has written them itself. Names are made with the owner's own keys, so that
/// nobody can choose two contents with one name.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    names: HashSet<ChunkId>,
    keys: (RandomState, RandomState),
}

impl Stored {
    /// A checkpoint of these chunks is stored, and no others are.
    pub fn note(&mut self, names: Vec<ChunkId>) {
        self.names = names.into_iter().collect();
    }

    fn name(&self, data: &[u8]) -> ChunkId {
        let mut id = [0; 16];
        let (first, second) = id.split_at_mut(8);
        first.copy_from_slice(&self.keys.0.hash_one(data).to_le_bytes());
        second.copy_from_slice(&self.keys.1.hash_one(data).to_le_bytes());
        id
    }
}

/// Cuts items into chunks.
struct Cutter<'a> {
    stored: &'a Stored,
    names: Vec<ChunkId>,
    chunks: Vec<Chunk>,
}

impl Cutter<'_> {
    /// Items by offset, with about how many bytes each takes.
    fn cut<T>(
        &mut self,
        kind: u8,
        items: impl Iterator<Item = (i64, T, usize)>,
        write: impl Fn(&mut Writer<'_>, &[(i64, T)]),
    ) {
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        let mut items = items.peekable();
        while let Some((offset, item, size)) = items.next() {
            chunk.push((offset, item));
            bytes += size;
            let bits = (offset as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            let is_end = bits.is_multiple_of(CHUNK_OFFSETS) || bytes >= CHUNK_BYTES;
            if is_end || items.peek().is_none() {
                let mut data = vec![kind];
                write(&mut Writer(&mut data), &chunk);
                let id = self.stored.name(&data);
                self.names.push(id);
                if !self.stored.names.contains(&id) {
                    self.chunks.push(Chunk { id, data });
                }
                chunk.clear();
                bytes = 0;
            }
        }
    }
}

impl Queue {
    /// The stored part of the state. The caller journals the scan position first ([`Queue::journal_scan`]), so that the fresh
    /// messages here are those that the journal knows.
    #[must_use]
    pub fn checkpoint(&self, stored: &Stored) -> Checkpoint {
        let mut cutter = Cutter {
            stored,
            names: Vec::new(),
            chunks: Vec::new(),
        };
        let is_small = self.dead.len() + self.entries.len() <= INLINE_MAX;
        if !is_small {
            let dead = self.dead.iter().map(|(&offset, dead)| (offset, dead, 24));
            cutter.cut(DEAD, dead, write_dead);
            let entries = self.entries.iter();
            let entries = entries.map(|(&offset, entry)| (offset, entry, entry.size()));
            cutter.cut(ENTRIES, entries, write_entries);
        }
        let mut head = vec![VERSION];
        let mut to = Writer(&mut head);
        to.signed(self.start);
        to.signed(self.journaled);
        to.bitmap(&self.fresh.stored_through(self.journaled));
        to.bitmap(&self.ahead);
        to.bitmap(&self.lost);
        to.bitmap(&self.reopened);
        to.0.push(u8::from(self.left_order));
        to.number(cutter.names.len() as u64);
        for name in &cutter.names {
            to.0.extend_from_slice(name);
        }
        to.0.push(u8::from(is_small));
        if is_small {
            self.write_dead(&mut to);
            let entries: Vec<(i64, &Entry)> = self.entries.iter().map(|(&at, e)| (at, e)).collect();
            write_entries(&mut to, &entries);
        }
        Checkpoint {
            head,
            names: cutter.names,
            chunks: cutter.chunks,
        }
    }

    pub(super) fn write_dead(&self, to: &mut Writer<'_>) {
        let dead: Vec<(i64, &Dead)> = self.dead.iter().map(|(&at, dead)| (at, dead)).collect();
        write_dead(to, &dead);
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

    fn read_entries(&mut self, from: &mut Reader<'_>) -> Result<(), Decode> {
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
            let entry = read_entry(from, receive)?;
            self.detach(last);
            self.attach(last, entry);
        }
        Ok(())
    }

    /// The state of a checkpoint's head, and the chunks to take in ([`Queue::take_chunk`]), in any order.
    ///
    /// # Errors
    /// The bytes are not a checkpoint of a known version.
    pub fn from_checkpoint(
        head: &[u8],
        id: QueueId,
        generation: Generation,
        settings: Settings,
        random: Random,
    ) -> Result<(Self, Vec<ChunkId>), Decode> {
        let mut from = Reader(head);
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
        let mut names = Vec::new();
        for _ in 0..from.length_of_list()? {
            let mut name = ChunkId::default();
            name.copy_from_slice(from.bytes(16)?);
            names.push(name);
        }
        if from.flag()? {
            queue.read_dead(&mut from)?;
            queue.read_entries(&mut from)?;
        }
        from.end()?;
        Ok((queue, names))
    }

    /// Takes in a chunk of the checkpoint.
    ///
    /// # Errors
    /// A text that is no chunk of a known kind.
    pub fn take_chunk(&mut self, data: &[u8]) -> Result<(), Decode> {
        let mut from = Reader(data);
        match from.byte()? {
            DEAD => self.read_dead(&mut from)?,
            ENTRIES => self.read_entries(&mut from)?,
            _ => {
                return Err(Decode {
                    what: "an unknown kind of chunk",
                });
            }
        }
        from.end()
    }
}

fn write_dead(to: &mut Writer<'_>, all: &[(i64, &Dead)]) {
    to.number(all.len() as u64);
    let mut last = 0;
    for &(offset, dead) in all {
        to.signed(offset - last);
        to.number(u64::from(dead.delivery));
        to.signed(dead.at.0);
        to.key(dead.mark.key);
        to.0.push(dead.mark.priority.stored() as u8);
        to.0.push(u8::from(dead.holds));
        last = offset;
    }
}

/// Receives are shared by the deliveries of a batch: each is written once, and entries name it by its number.
fn write_entries(to: &mut Writer<'_>, all: &[(i64, &Entry)]) {
    let mut numbers: HashMap<*const Receive, u64> = HashMap::new();
    let mut receives: Vec<&Receive> = Vec::new();
    for receive in all.iter().filter_map(|(_, entry)| entry.receive.as_ref()) {
        numbers.entry(Arc::as_ptr(receive)).or_insert_with(|| {
            receives.push(receive);
            receives.len() as u64
        });
    }
    to.number(receives.len() as u64);
    for receive in receives {
        to.receive(receive);
    }
    to.number(all.len() as u64);
    let mut last = 0;
    for &(offset, entry) in all {
        to.signed(offset - last);
        last = offset;
        let receive = entry.receive.as_ref();
        to.number(receive.map_or(0, |receive| numbers[&Arc::as_ptr(receive)]));
        write_entry(to, entry);
    }
}

impl Entry {
    /// About how many bytes it takes.
    fn size(&self) -> usize {
        let receive = self.receive.as_ref().map_or(0, |receive| {
            let texts = [&receive.consumer, &receive.receive_id];
            texts.into_iter().flatten().map(String::len).sum()
        });
        32 + receive + self.reason_bytes()
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
    let count = from.length_of_list()?;
    let mut failures = Vec::with_capacity(count.min(FAILURES_KEPT));
    for _ in 0..count {
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
    use std::time::Duration;

    use super::super::{Found, REASON_BYTES_MAX, Record};
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<(Queue, Vec<ChunkId>), Decode> {
        Queue::from_checkpoint(
            bytes,
            QueueId(1),
            Generation(1),
            Settings::default(),
            Random::new(1),
        )
    }

    fn new_queue() -> Queue {
        let (id, random) = (QueueId(1), Random::new(1));
        Queue::new(id, Generation(1), Offset(1), Settings::default(), random)
    }

    /// A queue with this many deliveries, and with long reasons.
    fn with_failures(count: i64) -> Queue {
        let mut queue = new_queue();
        queue.settings.max_in_flight = 1_000_000;
        (1..=count).for_each(|offset| queue.found(Found::at(offset)));
        let receive = Receive {
            consumer: Some("c".into()),
            receive_id: Some("r".into()),
        };
        let (second, limits) = (Duration::from_secs(1), (count as usize, u64::MAX));
        queue.hand_out(At(0), second, &receive, limits, &|_| Some(1));
        queue
    }

    fn nack(queue: &mut Queue, offset: i64, reason: &str) {
        queue.apply(&Record::Ended {
            offset,
            end: End::Nacked,
            at: At(1),
            due: At(2),
            attempts: 1,
            releases: 0,
            reason: Some(reason.to_owned()),
        });
    }

    /// As recovery does it.
    fn recovered(checkpoint: &Checkpoint, stored: &HashMap<ChunkId, Vec<u8>>) -> Queue {
        let (mut queue, names) = read(&checkpoint.head).expect("it was just written");
        assert_eq!(names, checkpoint.names);
        for name in names {
            queue.take_chunk(&stored[&name]).expect("a chunk reads");
        }
        queue
    }

    #[test]
    fn a_checkpoint_writes_what_has_changed_since_the_last_one() {
        let mut queue = with_failures(2_000);
        queue.journal_scan(Offset(2_000));
        let mut stored = Stored::default();
        let mut chunks = HashMap::new();
        let mut keep = |checkpoint: &Checkpoint, stored: &mut Stored| {
            let new = checkpoint.chunks.iter();
            chunks.extend(new.map(|chunk| (chunk.id, chunk.data.clone())));
            stored.note(checkpoint.names.clone());
            chunks.clone()
        };
        let first = queue.checkpoint(&stored);
        assert!(first.chunks.len() > 100 && first.chunks.len() == first.names.len());
        let kept = keep(&first, &mut stored);
        assert_eq!(recovered(&first, &kept).entries, queue.entries);
        assert!(queue.checkpoint(&stored).chunks.is_empty());
        nack(&mut queue, 1_000, "no stock");
        let second = queue.checkpoint(&stored);
        assert_eq!(second.chunks.len(), 1);
        let kept = keep(&second, &mut stored);
        assert_eq!(recovered(&second, &kept).entries, queue.entries);
    }

    #[test]
    fn reasons_have_a_budget_and_chunks_a_size() {
        let mut queue = with_failures(8_000);
        let long = "é".repeat(512);
        for _ in 0..3 {
            for offset in 1..=8_000 {
                nack(&mut queue, offset, &long);
            }
        }
        let kept: usize = queue.entries.values().map(Entry::reason_bytes).sum();
        assert_eq!(kept, queue.reason_bytes());
        assert!((REASON_BYTES_MAX / 2..REASON_BYTES_MAX + 8_000 * 100).contains(&kept));
        let lasts = queue.entries.values().map(|entry| entry.failures.last());
        assert!(lasts.flatten().all(|last| last.reason.len() >= 100));
        let checkpoint = queue.checkpoint(&Stored::default());
        let largest = checkpoint.chunks.iter().map(|chunk| chunk.data.len()).max();
        assert!(largest.is_some_and(|largest| largest < CHUNK_BYTES + 8_192));
        // A recovered queue knows as much, and goes on by the same budget.
        let chunks = checkpoint.chunks.iter();
        let chunks = chunks.map(|chunk| (chunk.id, chunk.data.clone())).collect();
        assert_eq!(recovered(&checkpoint, &chunks).reason_bytes(), kept);
        for offset in 1..=8_000 {
            queue.detach(offset);
        }
        assert_eq!(queue.reason_bytes(), 0);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = read(&bytes);
            for kind in [DEAD, ENTRIES] {
                if let Some(first) = bytes.first_mut() {
                    *first = kind;
                }
                let _ = new_queue().take_chunk(&bytes);
            }
        }

        #[test]
        fn a_changed_checkpoint_does_not_panic(place: prop::sample::Index, byte: u8, small: bool) {
            let mut queue = with_failures(if small { 3 } else { 9 });
            queue.advance(At(5_000), At(5_000));
            queue.journal_scan(Offset(40));
            let checkpoint = queue.checkpoint(&Stored::default());
            prop_assert_eq!(checkpoint.chunks.is_empty(), small);
            let chunks = checkpoint.chunks.into_iter().map(|chunk| chunk.data);
            let mut all: Vec<Vec<u8>> = std::iter::once(checkpoint.head).chain(chunks).collect();
            for bytes in &mut all {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            let (mut queue, chunks) = match read(&all[0]) {
                Ok((queue, _)) => (queue, &all[1..]),
                Err(_) => (new_queue(), &all[1..]),
            };
            for chunk in chunks {
                let _ = queue.take_chunk(chunk);
            }
        }
    }
}
