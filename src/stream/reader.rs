//! Reads of the log. A few tasks with one connection each do them, so that no read is ever cut off inside a statement and
//! no more run at once than the database should bear.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use tokio::sync::{mpsc, oneshot};

use super::Error;
use super::handle::State;
use super::request::{
    Attributes, KeyPage, KeyRead, KeysPage, KeysRead, Page, Read, Scan, ScanItem, Scanned, Search,
    SearchPage, key_hash,
};
use crate::domain::id::{Offset, StreamId, TopicId};
use crate::domain::message::Entry;
use crate::domain::name::TopicPattern;
use crate::store::stream::{self as sql, Head, Slice, SliceItem};
use crate::store::{self, Link};
use crate::supervisor::Supervisor;

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// The requests to the readers.
#[derive(Debug)]
pub(super) enum Job {
    Read {
        read: Read,
        reply: Reply<Page>,
    },
    Scan {
        scan: Scan,
        reply: Reply<Scanned>,
    },
    Fetch {
        stream: StreamId,
        offsets: Vec<Offset>,
        reply: Reply<Vec<Arc<Entry>>>,
    },
    /// One chunk: see [`attributes_chunk`].
    Attributes {
        stream: StreamId,
        offsets: Vec<Offset>,
        reply: Reply<Vec<Attributes>>,
    },
    Key {
        read: KeyRead,
        reply: Reply<KeyPage>,
    },
    Keys {
        read: KeysRead,
        reply: Reply<KeysPage>,
    },
    /// Nobody waits for it.
    CountKeys {
        stream: StreamId,
    },
    Search {
        search: Search,
        reply: Reply<SearchPage>,
    },
    OffsetAt {
        stream: StreamId,
        at: DateTime<Utc>,
        reply: Reply<Offset>,
    },
}

impl Job {
    fn stream(&self) -> StreamId {
        match self {
            Self::Read { read, .. } => read.stream,
            Self::Scan { scan, .. } => scan.stream,
            Self::Key { read, .. } => read.stream,
            Self::Keys { read, .. } => read.stream,
            Self::Search { search, .. } => search.stream,
            Self::Fetch { stream, .. }
            | Self::Attributes { stream, .. }
            | Self::CountKeys { stream }
            | Self::OffsetAt { stream, .. } => *stream,
        }
    }

    /// Answers that it was not done.
    fn refuse(self) {
        fn held<T>(reply: Reply<T>) {
            let _ = reply.send(Err(Error::Store(store::Error::Held)));
        }
        match self {
            Self::Read { reply, .. } => held(reply),
            Self::Scan { reply, .. } => held(reply),
            Self::Fetch { reply, .. } => held(reply),
            Self::Attributes { reply, .. } => held(reply),
            Self::Key { reply, .. } => held(reply),
            Self::Keys { reply, .. } => held(reply),
            Self::Search { reply, .. } => held(reply),
            Self::OffsetAt { reply, .. } => held(reply),
            Self::CountKeys { .. } => {}
        }
    }
}

/// Offsets that one scan examines at most before it answers.
const SCAN_MAX_EXAMINED: i64 = 2_000_000;
/// Offsets that one page of a replay examines at most: the next page goes on.
const READ_MAX_EXAMINED: i64 = 250_000;
/// Offsets per statement when only some topics are wanted, so that no statement runs for long.
const SLICE_MAX_OFFSETS: i64 = 250_000;
/// Messages per statement that carries payloads.
const FETCH_CHUNK: usize = 500;
/// Messages whose attributes one statement looks up.
const LOOK_UP_CHUNK: usize = 10_000;
/// As `LOOK_UP_CHUNK`, where it reads a range: each costs a tenth then, and with fewer the way there and back counts.
const RANGE_CHUNK: usize = 50_000;
/// The approximate overhead of an event beside its payload, in bytes.
const EVENT_OVERHEAD_BYTES: usize = 256;

/// One of the tasks that read.
pub(super) struct Reader {
    pub(super) link: Link,
    /// The stream that it is asked of just now.
    pub(super) serving: Option<StreamId>,
    pub(super) state: Arc<State>,
    pub(super) supervisor: Supervisor,
    pub(super) jobs: Arc<tokio::sync::Mutex<mpsc::Receiver<Job>>>,
}

/// The limits of a walk over a stream.
struct Walk<'a> {
    stream: StreamId,
    after: Offset,
    through: Offset,
    topics: Option<&'a [TopicId]>,
    key_hash: Option<i64>,
    max_items: usize,
    max_examined: i64,
}

impl Reader {
    pub(super) async fn run(mut self) {
        loop {
            let jobs = Arc::clone(&self.jobs);
            let job = tokio::select! {
                job = async { jobs.lock().await.recv().await } => job,
                () = self.supervisor.stopping() => return,
            };
            match job {
                Some(job) => {
                    let state = Arc::clone(&self.state);
                    let stream = job.stream();
                    // Of streams that somebody has locked, one reader at a time: the others have work that they can do.
                    let Some(_turn) = state.held.turn(stream) else {
                        job.refuse();
                        continue;
                    };
                    self.serving = Some(stream);
                    self.serve(job).await;
                }
                None => return,
            }
        }
    }

    async fn serve(&mut self, job: Job) {
        match job {
            Job::Read { read, reply } if !reply.is_closed() => {
                let answer = self.read(read).await;
                self.answer(reply, answer);
            }
            Job::Scan { scan, reply } if !reply.is_closed() => {
                let answer = self.scan(scan).await;
                self.answer(reply, answer);
            }
            Job::Fetch {
                stream,
                offsets,
                reply,
            } if !reply.is_closed() => {
                let answer = self.fetch(stream, offsets).await;
                self.answer(reply, answer);
            }
            Job::Attributes {
                stream,
                offsets,
                reply,
            } if !reply.is_closed() => {
                let answer = self.attributes(stream, &offsets).await;
                self.answer(reply, answer);
            }
            Job::Key { read, reply } if !reply.is_closed() => {
                let answer = self.key_page(read).await;
                self.answer(reply, answer);
            }
            Job::Keys { read, reply } if !reply.is_closed() => {
                let answer = self.keys_page(read).await;
                self.answer(reply, answer);
            }
            Job::CountKeys { stream } => {
                if let Err(error) = self.count_keys(stream).await {
                    match &error {
                        Error::Store(error) if error.is_held() => self.state.held.note(stream),
                        _ => self.link.cut(),
                    }
                    tracing::warn!(
                        stream = stream.0,
                        error = &error as &dyn std::error::Error,
                        "counting keys failed"
                    );
                }
            }
            Job::Search { search, reply } if !reply.is_closed() => {
                let answer = self.search(search).await;
                self.answer(reply, answer);
            }
            Job::OffsetAt { stream, at, reply } if !reply.is_closed() => {
                let answer = self.offset_at(stream, at).await;
                self.answer(reply, answer);
            }
            // Its caller has gone.
            _ => {}
        }
    }

    fn answer<T>(&mut self, reply: Reply<T>, answer: Result<T, Error>) {
        if let Err(Error::Store(error)) = &answer
            && error.is_held()
        {
            if let Some(stream) = self.serving {
                self.state.held.note(stream);
            }
        } else if let Err(Error::Store(_)) = &answer {
            // Cheap to make anew, and whatever state it is in is gone with it.
            self.link.cut();
        }
        let _ = reply.send(answer);
    }

    async fn floor(&mut self, stream: StreamId) -> Result<Offset, Error> {
        Ok(self.head(stream).await?.floor)
    }

    async fn head(&mut self, stream: StreamId) -> Result<Head, Error> {
        let head = sql::find_head(self.link.get().await?, stream).await?;
        head.ok_or_else(|| Error::NotFound {
            stream: stream.to_string(),
        })
    }

    /// The first and the last offset that there is: (floor, top).
    pub(super) async fn bounds(&mut self, stream: StreamId) -> Result<(Offset, Offset), Error> {
        let hint = self.state.tails.last(stream);
        let floor = self.floor(stream).await?;
        let connection = self.link.get().await?;
        let top = match sql::read_top(connection, stream, hint).await? {
            None if hint > floor => sql::read_top(connection, stream, floor).await?,
            top => top,
        };
        Ok((floor, top.map_or(floor, |top| top.max(floor))))
    }

    /// The numbers of the topics that match. To be called after the top was read: the topics of all messages up to the top
    /// are there by then, so a message that is passed over does not match.
    pub(super) async fn topics(
        &mut self,
        patterns: &[TopicPattern],
    ) -> Result<Vec<TopicId>, Error> {
        let state = Arc::clone(&self.state);
        state.topics.refresh(self.link.get().await?).await?;
        Ok(state.topics.matching(patterns))
    }

    async fn walk(&mut self, walk: Walk<'_>) -> Result<(Vec<SliceItem>, Offset), Error> {
        let mut items = Vec::new();
        let mut at = walk.after;
        let limit = Offset(
            walk.through
                .0
                .min(walk.after.0.saturating_add(walk.max_examined)),
        );
        let Some(topics) = walk.topics else {
            let end = match walk.key_hash {
                None => walk.through,
                Some(_) => limit,
            };
            at = self.slice(&walk, at, end, &mut items).await?;
            return Ok((items, at));
        };
        if topics.is_empty() {
            return Ok((items, walk.through.max(at)));
        }
        // Skipping costs next to nothing, so only what is looked at counts.
        let mut examined = 0;
        while at < walk.through && items.len() < walk.max_items && examined < walk.max_examined {
            let connection = self.link.get().await?;
            let ranges =
                sql::list_match_ranges(connection, walk.stream, at, walk.through, topics).await?;
            if ranges.is_empty() {
                return Ok((items, walk.through));
            }
            for leaf in ranges {
                if let Some((first, last)) = leaf.range {
                    at = at.max(Offset(first.0 - 1));
                    let last = last.min(walk.through);
                    while at < last {
                        if items.len() >= walk.max_items || examined >= walk.max_examined {
                            return Ok((items, at));
                        }
                        let end = Offset(last.0.min(at.0 + SLICE_MAX_OFFSETS));
                        let before = at;
                        at = self.slice(&walk, at, end, &mut items).await?;
                        examined += at.0 - before.0;
                    }
                }
                at = at.max(leaf.leaf_last.min(walk.through));
            }
        }
        Ok((items, at))
    }

    /// Looks through a slice. Returns up to where it was examined.
    async fn slice(
        &mut self,
        walk: &Walk<'_>,
        after: Offset,
        end: Offset,
        items: &mut Vec<SliceItem>,
    ) -> Result<Offset, Error> {
        if end <= after {
            return Ok(after);
        }
        let limit = walk.max_items.saturating_sub(items.len()).max(1);
        let slice = Slice {
            stream: walk.stream,
            after,
            through: end,
            topics: walk.topics,
            key_hash: walk.key_hash,
            id: None,
            limit,
        };
        let found = sql::read_slice(self.link.get().await?, &slice).await?;
        let examined = match found.last() {
            Some(last) if found.len() >= limit => last.offset,
            _ => end,
        };
        items.extend(found);
        Ok(examined)
    }

    async fn scan(&mut self, scan: Scan) -> Result<Scanned, Error> {
        let (floor, top) = self.bounds(scan.stream).await?;
        let after = scan.after.max(floor);
        if top <= after {
            return Ok(Scanned {
                items: Vec::new(),
                through: after,
            });
        }
        let topics = self.topics(&scan.topics).await?;
        let filter = (!scan.topics.is_empty()).then_some(&*topics);
        let (found, through) = self
            .walk(Walk {
                stream: scan.stream,
                after,
                through: top,
                topics: filter,
                key_hash: None,
                max_items: scan.max_items.max(1),
                max_examined: SCAN_MAX_EXAMINED,
            })
            .await?;
        let items = found
            .into_iter()
            .map(|item| self.scan_item(item))
            .collect::<Result<_, _>>()?;
        Ok(Scanned { items, through })
    }

    fn scan_item(&self, item: SliceItem) -> Result<ScanItem, Error> {
        let topic = self.state.topics.name(item.topic);
        Ok(ScanItem {
            offset: item.offset,
            topic: topic.ok_or_else(|| {
                Error::Store(store::Error::Corrupt {
                    doing: "scanning a stream",
                    what: format!(
                        "offset {} has the unknown topic {}",
                        item.offset, item.topic
                    ),
                })
            })?,
            key_hash: item.key_hash,
            bytes: event_bytes(&item),
            priority: item.priority,
        })
    }

    async fn read(&mut self, read: Read) -> Result<Page, Error> {
        let (floor, top) = self.bounds(read.stream).await?;
        let after = read.after.max(floor);
        let end = read.through.map_or(top, |through| through.min(top));
        if end <= after {
            return Ok(Page {
                entries: Vec::new(),
                through: after,
                lost_through: (floor > read.after).then_some(floor),
            });
        }
        let topics = match &read.topics {
            Some(patterns) => Some(self.topics(patterns).await?),
            None => None,
        };
        let (items, mut through) = self
            .matching(&read, (after, end), topics.as_deref())
            .await?;
        let mut offsets = Vec::with_capacity(items.len());
        let mut bytes = 0;
        for item in &items {
            bytes += event_bytes(item);
            if bytes > read.max_bytes && !offsets.is_empty() {
                through = Offset(item.offset.0 - 1);
                break;
            }
            offsets.push(item.offset);
        }
        let mut entries = self.fetch(read.stream, offsets).await?;
        // Two keys can share a hash.
        entries.retain(|entry| super::cache::matches(&read, &entry.topic, entry.key.as_deref()));
        // Only what is still there after the last statement was there for all of them.
        let floor = self.floor(read.stream).await?;
        Ok(Page {
            entries,
            through,
            lost_through: (floor > read.after).then_some(floor),
        })
    }

    /// The entries between two offsets that match a read. One key of a keyed stream is found by its index.
    async fn matching(
        &mut self,
        read: &Read,
        (after, through): (Offset, Offset),
        topics: Option<&[TopicId]>,
    ) -> Result<(Vec<SliceItem>, Offset), Error> {
        let limit = read.max_messages.max(1);
        if let Some(key) = &read.key
            // Which no key has, and which Postgres would not take.
            && !key.contains('\0')
            && self.head(read.stream).await?.keys_through.is_some()
        {
            let span = (after, through);
            match self.key_items(read.stream, key, span, limit).await {
                // Not now: as in any other stream.
                Err(Error::KeysNotCounted { .. }) => {}
                found => {
                    let (mut items, through) = found?;
                    let matches = |item: &SliceItem| topics.is_none_or(|t| t.contains(&item.topic));
                    items.retain(matches);
                    return Ok((items, through));
                }
            }
        }
        self.walk(Walk {
            stream: read.stream,
            after,
            through,
            topics,
            key_hash: read.key.as_deref().map(key_hash),
            max_items: limit,
            max_examined: READ_MAX_EXAMINED,
        })
        .await
    }

    pub(super) async fn fetch(
        &mut self,
        stream: StreamId,
        mut offsets: Vec<Offset>,
    ) -> Result<Vec<Arc<Entry>>, Error> {
        offsets.sort_unstable();
        offsets.dedup();
        let mut entries = Vec::with_capacity(offsets.len());
        let state = Arc::clone(&self.state);
        for chunk in offsets.chunks(FETCH_CHUNK) {
            let connection = self.link.get().await?;
            entries.extend(super::tail::fetch(connection, &state.topics, stream, chunk).await?);
        }
        Ok(entries)
    }

    async fn attributes(
        &mut self,
        stream: StreamId,
        offsets: &[Offset],
    ) -> Result<Vec<Attributes>, Error> {
        let found = sql::fetch_attributes(self.link.get().await?, stream, offsets).await?;
        let found = found.into_iter().map(|row| Attributes {
            offset: row.offset,
            key_hash: row.key_hash,
            priority: row.priority,
        });
        Ok(found.collect())
    }

    /// Halves the range until it is found: times never go back over offsets.
    async fn offset_at(&mut self, stream: StreamId, at: DateTime<Utc>) -> Result<Offset, Error> {
        let (mut before, top) = self.bounds(stream).await?;
        let mut after = top.next();
        while after.0 - before.0 > 1 {
            let middle = Offset(before.0 + (after.0 - before.0) / 2);
            let connection = self.link.get().await?;
            match sql::read_appended_at(connection, stream, middle).await? {
                Some(appended_at) if appended_at >= at => after = middle,
                // Messages that retention dropped meanwhile are older than the rest.
                Some(_) | None => before = middle,
            }
        }
        Ok(before)
    }
}

/// How many of these offsets, which ascend, one statement asks for.
pub(super) fn attributes_chunk(offsets: &[Offset]) -> usize {
    let many = offsets.len().min(RANGE_CHUNK);
    match sql::are_dense(&offsets[..many]) {
        true => many,
        false => offsets.len().min(LOOK_UP_CHUNK),
    }
}

pub(super) fn event_bytes(item: &SliceItem) -> usize {
    EVENT_OVERHEAD_BYTES + usize::try_from(item.data_bytes).unwrap_or(0)
}
