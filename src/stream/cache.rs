//! The most recent entries of all streams, within one bound in bytes. The latest entries are read most: by queues that keep
//! up, and by replays that follow live.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::request::{Batch, Page, Read};
use crate::domain::id::{Offset, StreamId};
use crate::domain::message::Entry;
use crate::domain::name::Topic;

/// The approximate overhead of an entry beside its event, in bytes.
const ENTRY_OVERHEAD_BYTES: usize = 256;

#[derive(Debug)]
pub(super) struct Cache {
    max_bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    streams: HashMap<StreamId, Run>,
    /// The batches in the order they came, so that the oldest goes first whatever its stream.
    batches: VecDeque<(StreamId, Offset, usize)>,
    bytes: usize,
}

/// Entries of one stream without a gap.
#[derive(Debug)]
struct Run {
    first: Offset,
    entries: VecDeque<Arc<Entry>>,
}

impl Run {
    fn get(&self, offset: Offset) -> Option<&Arc<Entry>> {
        let place = usize::try_from(offset.0 - self.first.0).ok()?;
        self.entries.get(place)
    }
}

/// Bytes that an entry is taken to occupy.
pub(super) fn weight(entry: &Entry) -> usize {
    ENTRY_OVERHEAD_BYTES + entry.event.len() + entry.key.as_ref().map_or(0, |key| key.len())
}

impl Cache {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a batch in. A batch that does not follow the present ones replaces them.
    pub(super) fn push(&self, batch: &Batch) {
        let dense = batch.entries.len() as i64 == batch.last.0 - batch.first.0 + 1;
        let bytes: usize = batch.entries.iter().map(|entry| weight(entry)).sum();
        let mut state = self.state();
        if !dense || bytes > self.max_bytes {
            state.forget(batch.stream);
            return;
        }
        let follows = state
            .streams
            .get(&batch.stream)
            .is_some_and(|run| run.first.0 + run.entries.len() as i64 == batch.first.0);
        if !follows {
            state.forget(batch.stream);
        }
        state
            .streams
            .entry(batch.stream)
            .or_insert_with(|| Run {
                first: batch.first,
                entries: VecDeque::new(),
            })
            .entries
            .extend(batch.entries.iter().cloned());
        state.batches.push_back((batch.stream, batch.last, bytes));
        state.bytes += bytes;
        while state.bytes > self.max_bytes {
            state.evict();
        }
    }

    /// Forgets a stream that is gone.
    pub(super) fn forget(&self, stream: StreamId) {
        self.state().forget(stream);
    }

    /// Forgets what retention dropped.
    pub(super) fn forget_through(&self, stream: StreamId, floor: Offset) {
        self.state().forget_through(stream, floor);
    }

    pub(super) fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// Answers a read completely from memory, or not at all. Committed entries may not have arrived here yet, and a read that runs
    /// to the end of the stream must see them.
    pub(super) fn read(&self, read: &Read, committed: Offset) -> Option<Page> {
        let state = self.state();
        let run = state.streams.get(&read.stream)?;
        let end = run.first.0 + run.entries.len() as i64 - 1;
        if read.after.next() < run.first || read.after.0 >= end {
            return None;
        }
        let through = Offset(read.through.map_or(end, |through| through.0.min(end)));
        let mut page = Page {
            entries: Vec::new(),
            through: read.after,
            lost_through: None,
        };
        let mut bytes = 0;
        let skip = (read.after.0 + 1 - run.first.0) as usize;
        for entry in run.entries.iter().skip(skip) {
            if entry.offset > through || page.entries.len() >= read.max_messages.max(1) {
                break;
            }
            if matches(read, &entry.topic, entry.key.as_deref()) {
                bytes += entry.event.len();
                if bytes > read.max_bytes && !page.entries.is_empty() {
                    break;
                }
                page.entries.push(Arc::clone(entry));
            }
            page.through = entry.offset;
        }
        let wanted = read
            .through
            .map_or(committed, |through| through.min(committed));
        if page.through.0 == end && end < wanted.0 {
            return None;
        }
        Some(page)
    }

    /// Splits offsets into the entries at hand and the offsets to read.
    pub(super) fn fetch(
        &self,
        stream: StreamId,
        offsets: Vec<Offset>,
    ) -> (Vec<Arc<Entry>>, Vec<Offset>) {
        let state = self.state();
        let Some(run) = state.streams.get(&stream) else {
            return (Vec::new(), offsets);
        };
        let mut found = Vec::with_capacity(offsets.len());
        let mut missing = Vec::new();
        for offset in offsets {
            match run.get(offset) {
                Some(entry) => found.push(Arc::clone(entry)),
                None => missing.push(offset),
            }
        }
        drop(state);
        found.sort_by_key(|entry| entry.offset);
        (found, missing)
    }
}

/// Whether a message passes the read's filters.
pub(super) fn matches(read: &Read, topic: &Topic, key: Option<&str>) -> bool {
    let topic_matches = read
        .topics
        .as_ref()
        .is_none_or(|patterns| patterns.iter().any(|pattern| pattern.matches(topic)));
    topic_matches && read.key.as_deref().is_none_or(|wanted| key == Some(wanted))
}

impl State {
    fn evict(&mut self) {
        let Some((stream, last, bytes)) = self.batches.pop_front() else {
            return;
        };
        self.bytes -= bytes;
        if let Some(run) = self.streams.get_mut(&stream) {
            let count = (last.0 - run.first.0 + 1).max(0) as usize;
            run.entries.drain(..count.min(run.entries.len()));
            run.first = last.next();
            if run.entries.is_empty() {
                self.streams.remove(&stream);
            }
        }
    }

    /// Whole batches go; of one that retention cut in two, the first part goes and its bytes stay counted until the rest goes.
    fn forget_through(&mut self, stream: StreamId, floor: Offset) {
        let bytes = &mut self.bytes;
        self.batches.retain(|&(of, last, size)| {
            let is_gone = of == stream && last <= floor;
            if is_gone {
                *bytes -= size;
            }
            !is_gone
        });
        if let Some(run) = self.streams.get_mut(&stream)
            && floor >= run.first
        {
            let count = (floor.0 - run.first.0 + 1) as usize;
            run.entries.drain(..count.min(run.entries.len()));
            run.first = floor.next();
            if run.entries.is_empty() {
                self.streams.remove(&stream);
            }
        }
    }

    fn forget(&mut self, stream: StreamId) {
        if self.streams.remove(&stream).is_some() {
            let bytes = &mut self.bytes;
            self.batches.retain(|&(of, _, size)| {
                if of == stream {
                    *bytes -= size;
                }
                of != stream
            });
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use crate::domain::message::Priority;
    use bytes::Bytes;
    use chrono::DateTime;

    use super::*;

    const STREAM: StreamId = StreamId(1);

    fn batch(stream: StreamId, first: i64, last: i64) -> Batch {
        let entries = (first..=last)
            .map(|offset| {
                Arc::new(Entry {
                    stream,
                    offset: Offset(offset),
                    topic: Topic::parse(if offset % 2 == 0 { "even" } else { "odd" }).unwrap(),
                    key: None,
                    key_hash: None,
                    priority: Priority::Normal,
                    event: Bytes::from(vec![b'x'; 744]),
                    appended_at: DateTime::UNIX_EPOCH,
                })
            })
            .collect();
        Batch {
            stream,
            first: Offset(first),
            last: Offset(last),
            entries,
        }
    }

    fn offsets(page: &Page) -> Vec<i64> {
        page.entries.iter().map(|entry| entry.offset.0).collect()
    }

    fn read(after: i64) -> Read {
        Read {
            stream: STREAM,
            after: Offset(after),
            through: None,
            topics: None,
            key: None,
            max_messages: 100,
            max_bytes: 1 << 20,
        }
    }

    #[test]
    fn the_oldest_batches_go_first_and_reads_answer_whole_or_not_at_all() {
        let cache = Cache::new(10_000);
        cache.push(&batch(STREAM, 1, 4));
        cache.push(&batch(StreamId(2), 1, 2));
        cache.push(&batch(STREAM, 5, 8));
        assert_eq!(cache.bytes(), 10_000);
        assert_eq!(
            offsets(&cache.read(&read(2), Offset(8)).unwrap()),
            [3, 4, 5, 6, 7, 8]
        );
        cache.push(&batch(STREAM, 9, 9));
        assert_eq!(cache.bytes(), 7_000);
        assert_eq!(cache.read(&read(3), Offset(0)), None);
        assert_eq!(
            offsets(&cache.read(&read(4), Offset(0)).unwrap()),
            [5, 6, 7, 8, 9]
        );
        assert_eq!(cache.read(&read(9), Offset(0)), None);
        let (found, missing) = cache.fetch(STREAM, vec![Offset(9), Offset(2), Offset(5)]);
        assert_eq!(found.iter().map(|e| e.offset.0).collect::<Vec<_>>(), [5, 9]);
        assert_eq!(missing, [Offset(2)]);
    }

    #[test]
    fn what_retention_dropped_is_not_served_from_memory() {
        let cache = Cache::new(100_000);
        cache.push(&batch(STREAM, 1, 4));
        cache.push(&batch(StreamId(2), 1, 2));
        cache.push(&batch(STREAM, 5, 8));
        cache.forget_through(STREAM, Offset(6));
        let wanted = vec![Offset(4), Offset(6), Offset(7)];
        let (found, missing) = cache.fetch(STREAM, wanted);
        assert_eq!(found.iter().map(|e| e.offset.0).collect::<Vec<_>>(), [7]);
        assert_eq!(missing, [Offset(4), Offset(6)]);
        assert_eq!(
            cache.bytes(),
            6_000,
            "the first batch's bytes are no longer counted"
        );
        cache.push(&batch(STREAM, 9, 9));
        assert_eq!(
            offsets(&cache.read(&read(6), Offset(9)).unwrap()),
            [7, 8, 9]
        );
        cache.forget_through(STREAM, Offset(9));
        assert_eq!(cache.bytes(), 2_000);
        cache.push(&batch(STREAM, 10, 10));
        assert_eq!(offsets(&cache.read(&read(9), Offset(10)).unwrap()), [10]);
    }

    #[test]
    fn filters_and_bounds_hold() {
        let cache = Cache::new(100_000);
        cache.push(&batch(STREAM, 1, 9));
        let odd = Read {
            topics: Some(Arc::from([
                crate::domain::name::TopicPattern::parse("odd").unwrap()
            ])),
            max_messages: 2,
            ..read(1)
        };
        let page = cache.read(&odd, Offset(9)).unwrap();
        assert_eq!((offsets(&page), page.through), (vec![3, 5], Offset(5)));
        let small = Read {
            max_bytes: 1,
            ..read(0)
        };
        assert_eq!(offsets(&cache.read(&small, Offset(20)).unwrap()), [1]);
        assert_eq!(
            cache.read(&read(5), Offset(10)),
            None,
            "10 is committed and not here yet"
        );
    }

    #[test]
    fn a_gap_starts_the_run_anew() {
        let cache = Cache::new(100_000);
        cache.push(&batch(STREAM, 1, 4));
        cache.push(&batch(STREAM, 6, 7));
        assert_eq!(cache.read(&read(3), Offset(0)), None);
        assert_eq!(offsets(&cache.read(&read(5), Offset(7)).unwrap()), [6, 7]);
        assert_eq!(cache.bytes(), 2_000);
    }
}
