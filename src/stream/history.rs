//! Histories of keys: the folded part comes from the indexes of the leaves, the rest from memory. Neither statement scans a
//! leaf.

use super::Error;
use super::keys::{self, OpenKey, TRIES};
use super::reader::{Reader, event_bytes};
use super::request::{KeyEntry, KeyPage, KeyRead, KeysPage, KeysRead, key_hash};
use crate::domain::id::{Offset, StreamId};
use crate::store::stream::{self as sql, KeyHead, SliceItem};

/// The state of a key at an offset.
struct Known {
    version: i64,
    last: Option<Offset>,
}

impl Reader {
    /// Sees that a stream's keys are counted in memory, so that nobody waits for it later.
    pub(super) async fn count_keys(&mut self, stream: StreamId) -> Result<(), Error> {
        let (_, top) = self.bounds(stream).await?;
        let state = std::sync::Arc::clone(&self.state);
        keys::catch_up(self.link.get().await?, &state.keys, stream, top).await?;
        Ok(())
    }

    /// A key's messages between two offsets, in offset order, up to a limit; and the offset up to which they are complete.
    pub(super) async fn key_items(
        &mut self,
        stream: StreamId,
        key: &str,
        (after, through): (Offset, Offset),
        limit: usize,
    ) -> Result<(Vec<SliceItem>, Offset), Error> {
        let state = std::sync::Arc::clone(&self.state);
        for _ in 0..TRIES {
            let connection = self.link.get().await?;
            let folded = keys::catch_up(connection, &state.keys, stream, through).await?;
            let span = (after.max(folded), through);
            let Some(open) = state.keys.offsets(stream, key, span) else {
                continue;
            };
            let span = (after, folded.min(through));
            let mut items = self.folded_items(stream, key, span, limit).await?;
            let left = limit - items.len();
            let open: Vec<Offset> = open.into_iter().take(left).collect();
            items.extend(sql::fetch_items(self.link.get().await?, stream, &open).await?);
            let examined = match items.last() {
                Some(last) if items.len() >= limit => last.offset,
                _ if open.len() == left => *open.last().unwrap_or(&through),
                _ => through,
            };
            return Ok((items, examined));
        }
        Err(Error::KeysNotCounted { stream })
    }

    /// The same for folded leaves, few enough per statement that it is planned quickly.
    async fn folded_items(
        &mut self,
        stream: StreamId,
        key: &str,
        (mut at, through): (Offset, Offset),
        limit: usize,
    ) -> Result<Vec<SliceItem>, Error> {
        let of = (key, key_hash(key));
        let mut items = Vec::new();
        while at < through && items.len() < limit {
            let connection = self.link.get().await?;
            let Some(end) = sql::find_span_end(connection, stream, at).await? else {
                break;
            };
            let span = (at, end.min(through));
            let left = limit - items.len();
            items.extend(sql::read_key_slice(connection, stream, of, span, left).await?);
            at = end;
        }
        Ok(items)
    }

    /// A key's version and last offset by an offset.
    async fn find_key(
        &mut self,
        stream: StreamId,
        key: &str,
        through: Offset,
    ) -> Result<Known, Error> {
        let state = std::sync::Arc::clone(&self.state);
        for _ in 0..TRIES {
            let connection = self.link.get().await?;
            let counted = keys::catch_up(connection, &state.keys, stream, through).await?;
            let found = sql::find_key_head(connection, stream, key).await?;
            let (folded, head) = found.ok_or_else(|| not_keyed(stream))?;
            if folded != counted {
                continue;
            }
            if let Some(open) = state.keys.offsets(stream, key, (folded, through)) {
                return Ok(Known {
                    version: head.as_ref().map_or(0, |head| head.version) + open.len() as i64,
                    last: open.last().copied().or(head.map(|head| head.last)),
                });
            }
        }
        Err(Error::KeysNotCounted { stream })
    }

    pub(super) async fn key_page(&mut self, read: KeyRead) -> Result<KeyPage, Error> {
        let (floor, top) = self.bounds(read.stream).await?;
        let known = self.find_key(read.stream, &read.key, top).await?;
        let span = (read.after.max(floor), top);
        let items = match known.last {
            Some(last) if last <= span.0 => Vec::new(),
            Some(last) if read.last_only => {
                sql::fetch_items(self.link.get().await?, read.stream, &[last]).await?
            }
            Some(_) => {
                let limit = read.max_messages.max(1);
                let (items, _) = self.key_items(read.stream, &read.key, span, limit).await?;
                items
            }
            None => Vec::new(),
        };
        let offsets: Vec<Offset> = cut(&items, read.max_bytes)
            .iter()
            .map(|item| item.offset)
            .collect();
        let shown = offsets.last().copied();
        let entries = self.fetch(read.stream, offsets).await?;
        // Only what is still there after the last statement was there for all of them.
        let (floor, _) = self.bounds(read.stream).await?;
        Ok(KeyPage {
            version: known.version,
            last_offset: known.last,
            first_offset: floor.next(),
            next_after: shown.filter(|&shown| known.last.is_some_and(|last| shown < last)),
            entries,
        })
    }

    pub(super) async fn keys_page(&mut self, read: KeysRead) -> Result<KeysPage, Error> {
        let (floor, top) = self.bounds(read.stream).await?;
        let (mut found, is_more) = self.list_keys(&read, top).await?;
        let mut lasts: Vec<Offset> = found.iter().map(|key| key.last).collect();
        lasts.retain(|&last| last > floor);
        lasts.sort_unstable();
        let connection = self.link.get().await?;
        let items = sql::fetch_items(connection, read.stream, &lasts).await?;
        // In the order of the keys: the page ends before the first whose message does not fit.
        let size = |key: &KeyHead| {
            let place = items.binary_search_by_key(&key.last, |item| item.offset);
            place.map_or(0, |place| event_bytes(&items[place]))
        };
        let mut bytes = 0;
        let fits = found.iter().position(|key| {
            bytes += size(key);
            bytes > read.max_bytes
        });
        let is_cut = fits.is_some();
        found.truncate(fits.unwrap_or(found.len()).max(1));
        let offsets = found.iter().map(|key| key.last);
        let entries = self
            .fetch(read.stream, offsets.filter(|&last| last > floor).collect())
            .await?;
        let next_after = (is_more || is_cut).then(|| found.last().map(|key| key.key.clone()));
        let keys = found.into_iter().map(|key| {
            let place = entries.binary_search_by_key(&key.last, |entry| entry.offset);
            KeyEntry {
                entry: place
                    .ok()
                    .map(|place| std::sync::Arc::clone(&entries[place])),
                key: key.key,
                version: key.version,
                last_offset: key.last,
            }
        });
        Ok(KeysPage {
            keys: keys.collect(),
            next_after: next_after.flatten(),
        })
    }

    /// Keys in their order, with what they have come to by an offset; and whether there may be more.
    async fn list_keys(
        &mut self,
        read: &KeysRead,
        through: Offset,
    ) -> Result<(Vec<KeyHead>, bool), Error> {
        let (stream, limit) = (read.stream, read.max_keys.max(1));
        let after = read.after.as_deref();
        let state = std::sync::Arc::clone(&self.state);
        for _ in 0..TRIES {
            let connection = self.link.get().await?;
            let counted = keys::catch_up(connection, &state.keys, stream, through).await?;
            let listed = sql::list_key_heads(connection, stream, after, limit).await?;
            let (folded, heads) = listed.ok_or_else(|| not_keyed(stream))?;
            if folded != counted {
                continue;
            }
            if let Some(open) = state.keys.page(stream, after, (folded, through), limit) {
                let mut merged = merge(heads, open);
                let is_more = merged.len() >= limit;
                merged.truncate(limit);
                return Ok((merged, is_more));
            }
        }
        Err(Error::KeysNotCounted { stream })
    }
}

fn not_keyed(stream: StreamId) -> Error {
    Error::NotKeyed {
        stream: stream.to_string(),
    }
}

/// As many from the start as fit, but one always.
fn cut(items: &[SliceItem], max_bytes: usize) -> &[SliceItem] {
    let mut bytes = 0;
    let fits = items.iter().position(|item| {
        bytes += event_bytes(item);
        bytes > max_bytes
    });
    &items[..fits.unwrap_or(items.len()).max(1).min(items.len())]
}

/// Merges the folded keys and the later ones, both in the order of the keys.
fn merge(heads: Vec<KeyHead>, open: Vec<OpenKey>) -> Vec<KeyHead> {
    let mut merged = Vec::with_capacity(heads.len() + open.len());
    let mut heads = heads.into_iter().peekable();
    for own in open {
        while let Some(head) = heads.next_if(|head| *head.key < *own.key) {
            merged.push(head);
        }
        let folded = heads.next_if(|head| *head.key == *own.key);
        merged.push(KeyHead {
            version: folded.map_or(0, |head| head.version) + own.count as i64,
            key: own.key.to_string(),
            last: own.last,
        });
    }
    merged.extend(heads);
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fold_and_what_came_since_are_one_list() {
        let head = |key: &str, version, last| KeyHead {
            key: key.to_owned(),
            version,
            last: Offset(last),
        };
        let open = |key: &str, count, last| OpenKey {
            key: key.into(),
            count,
            last: Offset(last),
        };
        let merged = merge(
            vec![head("a", 2, 5), head("c", 1, 6), head("d", 9, 7)],
            vec![open("b", 1, 11), open("c", 3, 12), open("e", 1, 13)],
        );
        let expected = [
            head("a", 2, 5),
            head("b", 1, 11),
            head("c", 4, 12),
            head("d", 9, 7),
            head("e", 1, 13),
        ];
        assert_eq!(merged, expected);
    }
}
