//! Dead letters read ahead of their redrive, and the later messages of their keys.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use chrono::{DateTime, Utc};

use crate::domain::id::{Offset, QueueId, StreamId};
use crate::domain::letter::Selection;
use crate::domain::name::TopicPattern;
use crate::domain::queue::Reborn;
use crate::queue::api::{Error, stream_error};
use crate::queue::log::letters::Letters;
use crate::store;
use crate::store::redrive::Redrivable;
use crate::stream::{self, Scan, key_hash};

/// Letters of one read.
const BLOCK: i64 = 5_000;
/// Messages of one scan for what comes after.
const SCAN_ITEMS: usize = 10_000;
/// How often the log is looked at before a batch: while producers go on there is always something new.
const LOOKS_MAX: u32 = 3;

/// Letters read ahead.
#[derive(Debug, Default)]
pub(super) struct Block {
    pub(super) letters: VecDeque<Reborn>,
    /// How far the letters were looked at; None before the first read, and at the end.
    pub(super) through: Option<Offset>,
    pub(super) is_end: bool,
    /// In a queue ordered by key.
    later: Option<Later>,
}

impl Block {
    /// Whether a batch can be taken: letters are at hand, or none are left, and what comes after them is known.
    pub(super) fn is_ready(&self, scanned: Offset) -> bool {
        let is_read = !self.letters.is_empty() || self.is_end;
        let later = self.later.as_ref();
        is_read && later.is_none_or(|later| later.is_known(scanned))
    }

    /// How many of the letters come first and are at offsets that the queue has looked through.
    pub(super) fn letters_through(&self, scanned: Offset) -> usize {
        self.letters
            .iter()
            .take_while(|letter| letter.offset <= scanned)
            .count()
    }

    /// The letters of the next batch.
    pub(super) fn take_batch(&mut self, most: usize) -> Vec<Reborn> {
        if let Some(later) = &mut self.later {
            later.looks = 0;
        }
        self.letters.drain(..most.min(self.letters.len())).collect()
    }

    /// The message of its key that comes after a letter.
    pub(super) fn take_next(&mut self, letter: Offset) -> Option<Offset> {
        self.later.as_mut()?.next.remove(&letter)
    }
}

/// The next message of its key after each letter.
#[derive(Debug, Default)]
struct Later {
    /// Letters without one so far, by the hash of their key.
    open: HashMap<i64, Vec<Offset>>,
    next: HashMap<Offset, Offset>,
    /// The log was looked at up to here.
    scanned: Offset,
    /// How often it was looked at for this batch.
    looks: u32,
}

impl Later {
    fn new(letters: &[Redrivable]) -> Self {
        let mut later = Self {
            scanned: letters
                .first()
                .map_or(Offset(0), |first| first.letter.offset),
            ..Self::default()
        };
        for found in letters {
            if let Some(key) = &found.key {
                let open = later.open.entry(key_hash(key)).or_default();
                open.push(found.letter.offset);
            }
        }
        later
    }

    /// Whether what comes after is known, as far as the queue has looked or as can be had.
    fn is_known(&self, scanned: Offset) -> bool {
        self.open.is_empty() || self.scanned >= scanned || self.looks >= LOOKS_MAX
    }

    fn see(&mut self, key: Option<i64>, offset: Offset, is_letter: impl Fn(Offset) -> bool) {
        let Some(key) = key else {
            return;
        };
        let Some(open) = self.open.get_mut(&key) else {
            return;
        };
        // A letter of the same redrive comes back before it matters.
        if is_letter(offset) {
            return;
        }
        open.retain(|&letter| {
            let is_before = letter < offset;
            if is_before {
                self.next.insert(letter, offset);
            }
            !is_before
        });
        if open.is_empty() {
            self.open.remove(&key);
        }
    }
}

/// The context of a read ahead.
pub(super) struct Ahead {
    pub(super) letters: Letters,
    pub(super) stream: stream::Handle,
    pub(super) stream_id: StreamId,
    pub(super) queue: QueueId,
    pub(super) patterns: Arc<[TopicPattern]>,
    pub(super) selection: Selection,
    pub(super) before: DateTime<Utc>,
    pub(super) after: Offset,
    pub(super) is_ordered: bool,
    pub(super) scan_to: Offset,
}

impl Ahead {
    pub(super) async fn read(self, mut block: Block) -> Result<Block, Error> {
        if block.letters.is_empty() && !block.is_end {
            let (queue, after, before) = (self.queue, self.after, self.before);
            let selection = self.selection.clone();
            let part = self
                .letters
                .ask(move |database| async move {
                    store::redrive::find_redrivable(
                        &database, queue, after, &selection, before, BLOCK,
                    )
                    .await
                })
                .await?;
            block.later = self.is_ordered.then(|| Later::new(&part.found));
            block.is_end = part.through.is_none();
            block.through = part.through;
            block.letters = part.found.into_iter().map(|found| found.letter).collect();
        }
        if let Some(later) = &mut block.later {
            later.looks += 1;
            self.look_for_later(later, &block.letters).await?;
        }
        Ok(block)
    }

    /// Looks through the log, as far as the queue has, for what comes next after the letters. Their keys go on mostly soon.
    async fn look_for_later(
        &self,
        later: &mut Later,
        letters: &VecDeque<Reborn>,
    ) -> Result<(), Error> {
        while !later.open.is_empty() && later.scanned < self.scan_to {
            let scan = Scan {
                stream: self.stream_id,
                after: later.scanned,
                topics: self.patterns.to_vec(),
                max_items: SCAN_ITEMS,
            };
            let scanned = self.stream.scan(scan).await.map_err(stream_error)?;
            let is_letter = |offset: Offset| {
                let found = letters.binary_search_by_key(&offset, |letter| letter.offset);
                found.is_ok()
            };
            for item in &scanned.items {
                later.see(item.key_hash, item.offset, is_letter);
            }
            let is_end = scanned.through <= later.scanned;
            later.scanned = if is_end {
                self.scan_to
            } else {
                scanned.through
            };
        }
        Ok(())
    }
}
