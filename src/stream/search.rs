//! Searches for messages by their attributes: bounded work per request, however long the stream is.

use super::Error;
use super::reader::{Reader, event_bytes};
use super::request::{Search, SearchPage};
use crate::domain::id::{Offset, TopicId};
use crate::store::stream::{self as sql, Slice, SliceItem};

/// Offsets that one search looks at before it answers with what it has.
const EXAMINED_MAX: i64 = 200_000;
/// Offsets per statement.
const SLICE_OFFSETS: i64 = 50_000;

impl Reader {
    /// Partitions none of whose topics are wanted are passed over and cost nothing.
    pub(super) async fn search(&mut self, search: Search) -> Result<SearchPage, Error> {
        let (floor, top) = self.bounds(search.stream).await?;
        let mut topics = self.topics(&search.topics).await?;
        if let Some(topic) = &search.topic {
            let narrower = self.topics(std::slice::from_ref(topic)).await?;
            topics.retain(|topic| narrower.contains(topic));
        }
        let after = search.after.max(floor);
        let (items, mut next) = self.look(&search, after, top, &topics).await?;
        let (mut offsets, mut bytes) = (Vec::with_capacity(items.len()), 0);
        for item in &items {
            bytes += event_bytes(item);
            if bytes > search.max_bytes && !offsets.is_empty() {
                next = Some(Offset(item.offset.0 - 1));
                break;
            }
            offsets.push(item.offset);
        }
        let mut entries = self.fetch(search.stream, offsets).await?;
        // Two keys can share a hash.
        entries
            .retain(|entry| search.key.is_none() || entry.key.as_deref() == search.key.as_deref());
        Ok(SearchPage { entries, next })
    }

    /// The matching messages, and where to go on; None at the end of the stream.
    async fn look(
        &mut self,
        search: &Search,
        after: Offset,
        top: Offset,
        topics: &[TopicId],
    ) -> Result<(Vec<SliceItem>, Option<Offset>), Error> {
        let (mut items, mut at, mut examined) = (Vec::new(), after, 0);
        while at < top && !topics.is_empty() {
            let connection = self.link.get().await?;
            let leaves = sql::list_match_ranges(connection, search.stream, at, top, topics).await?;
            if leaves.is_empty() {
                break;
            }
            for leaf in leaves {
                if let Some((first, last)) = leaf.range {
                    at = at.max(Offset(first.0 - 1));
                    let last = last.min(top);
                    while at < last {
                        let left = search.max_messages.saturating_sub(items.len());
                        if left == 0 || examined >= EXAMINED_MAX {
                            return Ok((items, Some(at)));
                        }
                        let slice = Slice {
                            stream: search.stream,
                            after: at,
                            through: Offset(last.0.min(at.0 + SLICE_OFFSETS)),
                            topics: Some(topics),
                            key_hash: search.key.as_deref().map(super::key_hash),
                            id: search.id.as_deref(),
                            limit: left,
                        };
                        let found = sql::read_slice(self.link.get().await?, &slice).await?;
                        let through = match found.last() {
                            Some(last) if found.len() >= left => last.offset,
                            _ => slice.through,
                        };
                        examined += through.0 - at.0;
                        at = through;
                        items.extend(found);
                    }
                }
                at = at.max(leaf.leaf_last.min(top));
            }
        }
        Ok((items, None))
    }
}
