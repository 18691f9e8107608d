//! Finds which of an origin's messages the streams already have, for a relay whose origin went back in time. The messages
//! are kept as hashes of 128 bits, and the log is read once for all of them, in pieces of bounded time on a separate
//! connection: neither readers nor other relays wait for it, however long the log is.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::{Error, Handle};
use crate::domain::id::{Offset, OriginId, StreamId, TopicId};
use crate::domain::name::StreamName;
use crate::store::Connection;
use crate::store::stream as sql;

/// Offsets of one piece to begin with, the fewest and the most.
const PIECE: i64 = 20_000;
const PIECE_MIN: i64 = 100;
const PIECE_MAX: i64 = 100_000;
/// A piece that took longer is followed by a smaller one.
const PIECE_TIME: Duration = Duration::from_secs(2);
/// Scheduled messages of one piece.
const SCHEDULED_PIECE: usize = 20_000;

/// Messages that are looked for, each by its topic, source and id. An origin can have two of one name: each that the log has stands for
/// one.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Hashes and places, in order once it is sealed.
    hashes: Vec<(u64, u64, u32)>,
    topics: HashSet<String>,
    count: u32,
}

/// The messages of [`Wanted`] that were found.
struct Found {
    hashes: Vec<(u64, u64, u32)>,
    /// How many of those with the hash at this index were found; at the first of them.
    seen: HashMap<usize, usize>,
    present: Vec<bool>,
}

impl Wanted {
    /// Adds a message.
    pub fn push(&mut self, topic: &str, source: &str, id: &str) {
        let (high, low) = hash(topic, source, id);
        self.hashes.push((high, low, self.count));
        if !self.topics.contains(topic) {
            self.topics.insert(topic.to_owned());
        }
        self.count += 1;
    }

    /// Adds one of which nothing is known: it is not found.
    pub const fn push_unknown(&mut self) {
        self.count += 1;
    }

    /// How many were added.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether none was.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }
}

fn hash(topic: &str, source: &str, id: &str) -> (u64, u64) {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    for part in [topic, source, id] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let hash = hasher.digest128();
    ((hash >> 64) as u64, hash as u64)
}

impl Found {
    fn of(wanted: Wanted) -> Self {
        let mut hashes = wanted.hashes;
        hashes.sort_unstable();
        Self {
            hashes,
            seen: HashMap::new(),
            present: vec![false; wanted.count as usize],
        }
    }

    /// Notes a message. `is_copy`: it may be one that was noted already.
    fn note(&mut self, (high, low): (u64, u64), is_copy: bool) {
        let first = self
            .hashes
            .partition_point(|found| (found.0, found.1) < (high, low));
        let is_it = |at: usize| {
            let found = self.hashes.get(at);
            found.is_some_and(|found| (found.0, found.1) == (high, low))
        };
        if !is_it(first) {
            return;
        }
        let seen = self.seen.get(&first).copied().unwrap_or(0);
        if (is_copy && seen > 0) || !is_it(first + seen) {
            return;
        }
        let (.., place) = self.hashes[first + seen];
        self.present[place as usize] = true;
        self.seen.insert(first, seen + 1);
    }

    fn is_complete(&self) -> bool {
        self.present.iter().all(|is_present| *is_present)
    }
}

impl Handle {
    /// Says for each message, in the order added, whether a relay of one of these origins has appended it, or has it scheduled.
    /// Messages appended before `since` are not looked at. Messages published over HTTP have no origin.
    ///
    /// # Errors
    /// The database's; [`Error::Stopping`] as soon as `is_stopping`.
    pub async fn find_present(
        &self,
        origins: &[OriginId],
        wanted: Wanted,
        since: Option<DateTime<Utc>>,
        is_stopping: impl Fn() -> bool,
    ) -> Result<Vec<bool>, Error> {
        let connection = &mut sql::connect_reader(&self.shared.db).await?;
        let names: Vec<&str> = wanted.topics.iter().map(String::as_str).collect();
        let topics = sql::find_topics(connection, &names).await?;
        let topics: HashMap<TopicId, String> = topics.into_iter().collect();
        let mut found = Found::of(wanted);
        if found.hashes.is_empty() || topics.is_empty() {
            return Ok(found.present);
        }
        for (stream, floor) in sql::list_heads(connection).await? {
            let Some(top) = sql::read_top(connection, stream, floor).await? else {
                continue;
            };
            let mut after = match since {
                Some(since) => offset_at(connection, stream, (floor, top), since).await?,
                None => floor,
            };
            let mut piece = PIECE;
            while after < top {
                if is_stopping() {
                    return Err(Error::Stopping);
                }
                let through = Offset(after.0.saturating_add(piece).min(top.0));
                let began = Instant::now();
                let rows = sql::read_ids(connection, stream, (after, through), origins).await?;
                for (topic, source, id) in rows {
                    if let Some(topic) = topics.get(&topic) {
                        found.note(hash(topic, &source, &id), false);
                    }
                }
                piece = match began.elapsed() {
                    slow if slow > PIECE_TIME => (piece / 2).max(PIECE_MIN),
                    quick if quick < PIECE_TIME / 8 => (piece * 2).min(PIECE_MAX),
                    _ => piece,
                };
                after = through;
            }
        }
        if found.is_complete() {
            return Ok(found.present);
        }
        for (stream, _) in sql::list_heads(connection).await? {
            let mut after = None;
            loop {
                if is_stopping() {
                    return Err(Error::Stopping);
                }
                let rows =
                    sql::read_scheduled_ids(connection, stream, after, SCHEDULED_PIECE).await?;
                let is_last = rows.len() < SCHEDULED_PIECE;
                for row in rows {
                    after = Some((row.due_at, row.number));
                    if let Some(topic) = topics
                        .get(&row.topic)
                        .filter(|_| row.origin.is_some_and(|origin| origins.contains(&origin)))
                    {
                        // It is in the log too once it was due.
                        found.note(hash(topic, &row.source, &row.id), true);
                    }
                }
                if is_last {
                    break;
                }
            }
        }
        Ok(found.present)
    }
}

impl Handle {
    /// The streams that can drop what every queue has settled at an age below this one.
    ///
    /// # Errors
    /// The database's.
    pub async fn kept_for_less(&self, age: Duration) -> Result<Vec<StreamName>, Error> {
        let connection = &mut sql::connect_reader(&self.shared.db).await?;
        let catalogue = sql::load_catalogue(connection).await?;
        let streams = catalogue.streams.into_iter();
        let short = streams.filter(|row| row.retention.settled.is_some_and(|kept| kept < age));
        Ok(short.map(|row| row.name).collect())
    }
}

/// The last offset appended before a time. Times never go back over offsets.
async fn offset_at(
    connection: &mut Connection,
    stream: StreamId,
    (floor, top): (Offset, Offset),
    at: DateTime<Utc>,
) -> Result<Offset, Error> {
    let (mut before, mut after) = (floor, top.next());
    while after.0 - before.0 > 1 {
        let middle = Offset(before.0 + (after.0 - before.0) / 2);
        match sql::read_appended_at(connection, stream, middle).await? {
            Some(appended_at) if appended_at >= at => after = middle,
            // Messages that retention dropped meanwhile are older than the rest.
            Some(_) | None => before = middle,
        }
    }
    Ok(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_looked_for_is_known_by_topic_source_and_id() {
        let mut wanted = Wanted::default();
        for (topic, source, id) in [
            ("a", "/s", "1"),
            ("b", "/s", "1"),
            ("a", "/t", "1"),
            ("a", "/s", "2"),
        ] {
            wanted.push(topic, source, id);
        }
        wanted.push_unknown();
        let mut found = Found::of(wanted);
        found.note(hash("b", "/s", "1"), false);
        found.note(hash("a", "/s", "2"), false);
        found.note(hash("a", "/s1", ""), false);
        assert_eq!(found.present, [false, true, false, true, false]);
    }

    #[test]
    fn each_of_two_of_one_name_is_counted_once() {
        let twins = || {
            let mut wanted = Wanted::default();
            for _ in 0..3 {
                wanted.push("a", "/s", "1");
            }
            Found::of(wanted)
        };
        let mut found = twins();
        found.note(hash("a", "/s", "1"), false);
        // Scheduled, and appended since.
        found.note(hash("a", "/s", "1"), true);
        assert_eq!(found.present, [true, false, false]);
        found.note(hash("a", "/s", "1"), false);
        assert_eq!(found.present, [true, true, false]);
        for _ in 0..3 {
            found.note(hash("a", "/s", "1"), false);
        }
        assert!(found.is_complete());
    }
}
