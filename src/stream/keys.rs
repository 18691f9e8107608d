//! The keys of keyed streams that `key_head` does not have yet: for each key, its messages since the last fold. A full leaf
//! of the log is folded soon, so this is about one leaf per stream. It lets an append do nothing for the index: an offset
//! is recorded here under its key once the append is answered, and the leaf's own index is built when the leaf takes no
//! more.
//!
//! Correctness does not depend on it. The appender tells the database between which offsets it has counted, and learns when
//! the database disagrees; a reader looks at the fold and at this under one bound. Missing parts are read from the log: at
//! the start of the process, after another node's appends, and after a fold that dropped too much.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use super::Error;
use crate::domain::id::{Offset, StreamId};
use crate::store::Connection;
use crate::store::stream as sql;

/// Messages of one stream that are counted here at most. Beyond it, the folds have fallen behind by many leaves: then nothing is
/// counted until they have caught up.
const COUNTED_MAX: i64 = 2_000_000;
/// Messages counted here of all streams together: beyond it the stream that was asked for least recently is forgotten, and read again
/// when it is.
const ALL_COUNTED_MAX: usize = 4_000_000;
/// Messages whose keys one statement reads.
const READ_CHUNK: i64 = 50_000;
/// How often a fold may overtake a reader before it gives up.
pub(super) const TRIES: usize = 20;

/// The keyed streams that were asked for.
#[derive(Debug, Default)]
pub(super) struct Keys {
    streams: RwLock<HashMap<StreamId, Arc<Mutex<Open>>>>,
}

/// One stream's keys after a fold.
#[derive(Debug)]
struct Open {
    /// The fold: `keys_through`.
    after: Offset,
    /// All messages up to here are in.
    through: Offset,
    /// By key; offsets ascend. Ordered as the database orders keys: by bytes.
    keys: BTreeMap<Arc<str>, Vec<Offset>>,
    message_count: usize,
    asked_at: Instant,
}

/// How many messages some keys have had between two offsets.
#[derive(Debug)]
pub(super) struct Counted<'k> {
    pub(super) after: Offset,
    pub(super) through: Offset,
    pub(super) counts: HashMap<&'k str, usize>,
}

/// A key with messages after a fold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OpenKey {
    pub(super) key: Arc<str>,
    pub(super) count: usize,
    pub(super) last: Offset,
}

impl Open {
    fn new(after: Offset) -> Self {
        Self {
            after,
            through: after,
            keys: BTreeMap::new(),
            message_count: 0,
            asked_at: Instant::now(),
        }
    }

    /// Takes in what follows, up to `last`; what it has already is passed over.
    fn take<K: AsRef<str>>(&mut self, last: Offset, messages: impl Iterator<Item = (Offset, K)>) {
        for (offset, key) in messages {
            if offset <= self.through {
                continue;
            }
            self.message_count += 1;
            if let Some(offsets) = self.keys.get_mut(key.as_ref()) {
                offsets.push(offset);
            } else {
                self.keys.insert(Arc::from(key.as_ref()), vec![offset]);
            }
        }
        self.through = self.through.max(last);
    }

    /// Drops folded keys.
    fn rebase(&mut self, after: Offset) {
        if after >= self.through {
            *self = Self::new(after);
            return;
        }
        self.after = after;
        let mut left = 0;
        self.keys.retain(|_, offsets| {
            let folded = offsets.partition_point(|&offset| offset <= after);
            offsets.drain(..folded);
            left += offsets.len();
            !offsets.is_empty()
        });
        self.message_count = left;
    }
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

fn within(offsets: &[Offset], after: Offset, through: Offset) -> &[Offset] {
    let first = offsets.partition_point(|&offset| offset <= after);
    let end = offsets.partition_point(|&offset| offset <= through);
    &offsets[first..end.max(first)]
}

impl Keys {
    fn get(&self, stream: StreamId) -> Option<Arc<Mutex<Open>>> {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        streams.get(&stream).map(Arc::clone)
    }

    /// Notes the messages appended from `first` to `last`, if somebody asked for the stream and nothing lies between. Cheap for
    /// other streams.
    pub(super) fn feed<K: AsRef<str>>(
        &self,
        stream: StreamId,
        (first, last): (Offset, Offset),
        messages: impl Iterator<Item = (Offset, K)>,
    ) {
        let Some(open) = self.get(stream) else { return };
        let mut open = lock(&open);
        if first.0 <= open.through.0 + 1 && last > open.through {
            open.take(last, messages);
        }
        let is_too_much = open.message_count as i64 > COUNTED_MAX;
        drop(open);
        if is_too_much {
            self.forget(stream);
        }
    }

    pub(super) fn forget(&self, stream: StreamId) {
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        streams.remove(&stream);
    }

    /// Counts messages of keys; `None` when the stream has to be caught up with first.
    pub(super) fn count<'k>(
        &self,
        stream: StreamId,
        keys: impl Iterator<Item = &'k str>,
    ) -> Option<Counted<'k>> {
        let open = self.get(stream)?;
        let open = lock(&open);
        let count = |key| open.keys.get(key).map_or(0, Vec::len);
        Some(Counted {
            after: open.after,
            through: open.through,
            counts: keys.map(|key| (key, count(key))).collect(),
        })
    }

    /// The offsets of a key's messages after a fold and up to an offset; `None` when another fold came in between, or not all is here.
    pub(super) fn offsets(
        &self,
        stream: StreamId,
        key: &str,
        (after, through): (Offset, Offset),
    ) -> Option<Vec<Offset>> {
        let open = self.get(stream)?;
        let open = lock(&open);
        if open.after > after || open.through < through {
            return None;
        }
        let offsets = open.keys.get(key);
        Some(offsets.map_or_else(Vec::new, |offsets| within(offsets, after, through).to_vec()))
    }

    /// Keys in their order after one of them, with what they have had after a fold and up to an offset. `None` as for [`Keys::offsets`].
    pub(super) fn page(
        &self,
        stream: StreamId,
        after_key: Option<&str>,
        (after, through): (Offset, Offset),
        limit: usize,
    ) -> Option<Vec<OpenKey>> {
        let open = self.get(stream)?;
        let open = lock(&open);
        if open.after > after || open.through < through {
            return None;
        }
        let from = after_key.map_or(Bound::Unbounded, Bound::Excluded);
        let keys = open.keys.range::<str, _>((from, Bound::Unbounded));
        let found = keys.filter_map(|(key, offsets)| {
            let own = within(offsets, after, through);
            own.last().map(|&last| OpenKey {
                key: Arc::clone(key),
                count: own.len(),
                last,
            })
        });
        Some(found.take(limit).collect())
    }

    /// How far a stream is counted from a fold: up to `through`, after dropping what the fold has. `None`: nothing of it is here.
    pub(super) fn rebase(&self, stream: StreamId, after: Offset) -> Option<(Offset, Offset)> {
        let open = self.get(stream)?;
        let mut open = lock(&open);
        open.asked_at = Instant::now();
        if after > open.after {
            open.rebase(after);
        }
        Some((open.after, open.through))
    }

    /// How many keys are here, and how many messages of theirs.
    pub(super) fn size(&self) -> (usize, usize) {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        let streams: Vec<_> = streams.values().map(Arc::clone).collect();
        streams.iter().fold((0, 0), |(keys, messages), open| {
            let open = lock(open);
            (keys + open.keys.len(), messages + open.message_count)
        })
    }

    /// Begins a stream again after a fold.
    fn begin(&self, stream: StreamId, after: Offset) {
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        let mut sizes: Vec<_> = streams
            .iter()
            .map(|(&stream, open)| {
                let open = lock(open);
                (open.asked_at, stream, open.message_count)
            })
            .collect();
        sizes.sort_unstable_by_key(|&(asked_at, ..)| asked_at);
        let mut total: usize = sizes.iter().map(|&(_, _, count)| count).sum();
        for (_, stream, count) in sizes {
            if total <= ALL_COUNTED_MAX {
                break;
            }
            total -= count;
            streams.remove(&stream);
        }
        streams.insert(stream, Arc::new(Mutex::new(Open::new(after))));
    }
}

/// Sees that a stream's keys are here from its last fold up to an offset. Returns that fold, as the database has it.
///
/// # Errors
/// [`Error::NotFound`], [`Error::NotKeyed`], [`Error::KeysNotCounted`], or the database's.
pub(super) async fn catch_up(
    connection: &mut Connection,
    keys: &Keys,
    stream: StreamId,
    through: Offset,
) -> Result<Offset, Error> {
    for attempt in 0..TRIES {
        let head = sql::find_head(connection, stream).await?;
        let head = head.ok_or_else(|| Error::NotFound {
            stream: stream.to_string(),
        })?;
        let folded = head.keys_through.ok_or_else(|| Error::NotKeyed {
            stream: stream.to_string(),
        })?;
        let at = match keys.rebase(stream, folded) {
            // It was rebased by who has seen a later fold: look again. If that one is never seen, the database is an older copy.
            Some((after, _)) if after > folded && attempt + 1 < TRIES => continue,
            Some((after, at)) if after == folded => at,
            _ => {
                keys.begin(stream, folded);
                folded
            }
        };
        if at >= through {
            return Ok(folded);
        }
        if through.0 - folded.0 > COUNTED_MAX {
            keys.forget(stream);
            return Err(Error::KeysNotCounted { stream });
        }
        read(connection, keys, stream, (at, through)).await?;
    }
    Err(Error::KeysNotCounted { stream })
}

/// Reads keys from the log, a chunk at a time.
async fn read(
    connection: &mut Connection,
    keys: &Keys,
    stream: StreamId,
    (mut at, through): (Offset, Offset),
) -> Result<(), Error> {
    while at < through {
        let end = Offset(through.0.min(at.0 + READ_CHUNK));
        let found = sql::read_keys(connection, stream, at, end).await?;
        keys.feed(stream, (at.next(), end), found.into_iter());
        at = end;
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const STREAM: StreamId = StreamId(1);

    fn feed(keys: &Keys, first: i64, own: &[&str]) {
        let messages = (first..).map(Offset).zip(own.iter().copied());
        let last = Offset(first + own.len() as i64 - 1);
        keys.feed(STREAM, (Offset(first), last), messages);
    }

    fn span(after: i64, through: i64) -> (Offset, Offset) {
        (Offset(after), Offset(through))
    }

    #[test]
    fn what_follows_is_taken_once_and_a_gap_is_not_taken() {
        let keys = Keys::default();
        feed(&keys, 1, &["a"]);
        assert!(keys.count(STREAM, ["a"].into_iter()).is_none());
        keys.begin(STREAM, Offset(10));
        feed(&keys, 11, &["a", "b", "a"]);
        feed(&keys, 12, &["b", "a", "c"]);
        feed(&keys, 16, &["a"]);
        let counted = keys
            .count(STREAM, ["a", "b", "c", "d"].into_iter())
            .unwrap();
        assert_eq!((counted.after, counted.through), span(10, 14));
        let counts = ["a", "b", "c", "d"].map(|key| counted.counts[key]);
        assert_eq!(counts, [2, 1, 1, 0]);
        let offsets = keys.offsets(STREAM, "a", span(11, 14)).unwrap();
        assert_eq!(offsets, [Offset(13)]);
        assert!(keys.offsets(STREAM, "a", span(10, 15)).is_none());
    }

    #[test]
    fn a_fold_drops_what_it_has() {
        let keys = Keys::default();
        keys.begin(STREAM, Offset(0));
        feed(&keys, 1, &["a", "b", "a", "c"]);
        assert_eq!(keys.rebase(STREAM, Offset(2)), Some(span(2, 4)));
        assert!(keys.offsets(STREAM, "a", span(0, 4)).is_none(), "folded");
        let page = keys.page(STREAM, None, span(2, 4), 10).unwrap();
        let page: Vec<_> = page.iter().map(|k| (&*k.key, k.count, k.last.0)).collect();
        assert_eq!(page, [("a", 1, 3), ("c", 1, 4)]);
        let page = keys.page(STREAM, Some("a"), span(3, 4), 10).unwrap();
        assert_eq!(page.len(), 1);
        // A fold beyond what is here: what follows it is taken.
        assert_eq!(keys.rebase(STREAM, Offset(9)), Some(span(9, 9)));
        feed(&keys, 10, &["z"]);
        assert_eq!(keys.offsets(STREAM, "z", span(9, 10)).unwrap().len(), 1);
        assert_eq!(keys.size(), (1, 1));
        // One that is older than what is here is told the later one.
        assert_eq!(keys.rebase(STREAM, Offset(4)), Some(span(9, 10)));
    }
}
