//! Maintenance of the log: leaves made ahead, summarised, emptied, dropped; ids and results rotated. One bounded pass per tick
//! or wake-up, by the node that holds the lease. Each step is safe on any number of nodes; the lease only spares the work.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Options;
use super::handle::State;
use super::limits::Unsettled;
use crate::cluster;
use crate::domain::id::{Fence, Offset, StreamId};
use crate::failpoint;
use crate::store::stream::{self as sql, Emptied, EmptyLeaf, Leaf, StreamRow};
use crate::store::{self, Connection, Database};
use crate::supervisor::Supervisor;

/// With nothing appended, the pause between passes grows to so many times the usual one.
const QUIET_FACTOR: u32 = 4;

/// The lease of the node that does the maintenance.
pub(super) const LEASE: &str = "duty/streams";
/// A leaf that fills faster than this is followed by larger ones.
const FILLS_FAST: Duration = Duration::from_secs(600);
/// A leaf that fills slower than this is followed by smaller ones, so that retention has something to drop.
const FILLS_SLOWLY: Duration = Duration::from_secs(6 * 3_600);
/// How far sizes adapt from the configured one, as factors.
const SMALLEST_FRACTION: i64 = 50;
const LARGEST_MULTIPLE: i64 = 8;
/// The same of keyed streams: what is not folded is in memory, and each leaf's index is looked at for a key's history.
const SMALLEST_KEYED_FRACTION: i64 = 5;
const LARGEST_KEYED_MULTIPLE: i64 = 1;
/// The pause between attempts to drop leaves while somebody has the log open: each may hold up appends for 50 ms.
const DROP_PAUSE: Duration = Duration::from_secs(60);
const ROTATE_PAUSE: Duration = Duration::from_secs(60);

/// How many offsets the next leaf of each stream gets.
#[derive(Debug)]
pub(super) struct LeafSizes {
    configured: i64,
    sizes: Mutex<HashMap<StreamId, i64>>,
}

impl LeafSizes {
    pub(super) fn new(configured: i64) -> Self {
        Self {
            configured: configured.max(1),
            sizes: Mutex::default(),
        }
    }

    pub(super) fn get(&self, stream: StreamId) -> i64 {
        let sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        sizes.get(&stream).copied().unwrap_or(self.configured)
    }

    fn set(&self, stream: StreamId, size: i64) {
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        sizes.insert(stream, size);
    }
}

/// The size after a leaf of `size` offsets that took `filled_in` to fill.
fn next_size(configured: i64, is_keyed: bool, size: i64, filled_in: Duration) -> i64 {
    let (smallest, largest) = match is_keyed {
        true => (SMALLEST_KEYED_FRACTION, LARGEST_KEYED_MULTIPLE),
        false => (SMALLEST_FRACTION, LARGEST_MULTIPLE),
    };
    let next = if filled_in < FILLS_FAST {
        size * 2
    } else if filled_in > FILLS_SLOWLY {
        size / 2
    } else {
        size
    };
    next.clamp((configured / smallest).max(1), configured * largest)
}

pub(super) struct Maintenance {
    pub(super) options: Options,
    pub(super) db: Database,
    pub(super) cluster: cluster::Handle,
    pub(super) state: Arc<State>,
    pub(super) supervisor: Supervisor,
    pub(super) lease: watch::Receiver<Option<Fence>>,
    pub(super) connection: Option<Connection>,
    pub(super) drop_at: Instant,
    pub(super) rotate_at: Instant,
    /// The streams' ends at the last pass, all added up.
    pub(super) ends: Option<i64>,
}

impl Maintenance {
    pub(super) async fn run(mut self) {
        let mut pause = self.options.maintenance;
        while !self.supervisor.is_stopping() {
            let ends = self.ends;
            let is_held = self.lease.borrow_and_update().is_some();
            if !is_held {
                self.cluster.yielded(LEASE);
            } else if let Err(error) = self.pass().await {
                self.state.metrics.maintenance_failures.inc();
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "maintenance of the streams failed"
                );
                (self.connection, self.ends) = (None, None);
            }
            pause = match ends.is_some() && self.ends == ends {
                true => (pause * 2).min(self.options.maintenance * QUIET_FACTOR),
                false => self.options.maintenance,
            };
            tokio::select! {
                Ok(()) = self.lease.changed() => {}
                () = tokio::time::sleep(pause) => {}
                () = self.state.maintain.notified() => {}
                () = self.supervisor.stopping() => {}
            }
        }
    }

    async fn pass(&mut self) -> Result<(), store::Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.db.connect().await?,
        };
        let streams = sql::load_catalogue(&mut connection).await?.streams;
        let leaves = sql::list_leaves(&mut connection).await?;
        let ends = streams.iter().map(|of| self.state.tails.last(of.id).0);
        self.ends = Some(ends.sum());
        let mut blocked = 0;
        for stream in &streams {
            let own: Vec<&Leaf> = leaves
                .iter()
                .filter(|leaf| leaf.stream == stream.id)
                .collect();
            let sizes = match stream.retention.bytes() {
                Some(_) => sql::read_leaf_sizes(&mut connection, stream.id).await?,
                None => Vec::new(),
            };
            self.extend(&mut connection, stream, &own, &sizes).await?;
            self.summarise(&mut connection, stream, &own).await?;
            blocked += self.empty(&mut connection, stream, &own, &sizes).await?;
            self.watch_limits(&mut connection, stream, &own, &sizes)
                .await?;
        }
        let is_there = |id| streams.iter().any(|stream| stream.id == id);
        self.state.limits.keep(&self.state.metrics, is_there);
        self.state.metrics.leaves_blocked.set(blocked);
        if Instant::now() >= self.drop_at {
            self.drop_leaves(&mut connection, &leaves).await?;
        }
        if Instant::now() >= self.rotate_at {
            self.rotate_at = Instant::now() + ROTATE_PAUSE;
            skip_if_held(sql::rotate_buckets(&mut connection).await)?;
        }
        self.connection = Some(connection);
        Ok(())
    }

    /// Keeps a whole leaf ahead of the one being filled.
    async fn extend(
        &self,
        connection: &mut Connection,
        stream: &StreamRow,
        leaves: &[&Leaf],
        bytes: &Sizes,
    ) -> Result<(), store::Error> {
        let sizes = &self.state.leaf_sizes;
        let last = self.state.tails.last(stream.id);
        let filling = leaves.iter().position(|leaf| leaf.last > last);
        let ahead = filling.map_or(0, |place| leaves.len() - place);
        if ahead >= 2 {
            return Ok(());
        }
        let size = match leaves {
            // The first two are made together: nothing is known yet about how fast they fill.
            [] | [_] => sizes.get(stream.id),
            [.., newest] => {
                let age = (self.cluster.now() - newest.created_at)
                    .to_std()
                    .unwrap_or_default();
                let size = newest.last.0 - newest.first.0 + 1;
                next_size(sizes.configured, stream.is_keyed, size, age)
            }
        };
        let size = match stream.retention.bytes() {
            Some(limit) => {
                let count = last.0 - self.state.tails.floor_now(stream.id).0;
                size_within(limit, total(bytes), count)
                    .max(sizes.configured / SMALLEST_FRACTION)
                    .clamp(1, size)
            }
            None => size,
        };
        sizes.set(stream.id, size);
        let end = leaves.last().map_or(last, |leaf| leaf.last.max(last));
        let through = Offset(end.0 + size * if ahead == 0 { 2 } else { 1 });
        sql::extend_log(connection, stream.id, through, size).await?;
        self.state.metrics.leaves_made.inc();
        Ok(())
    }

    async fn summarise(
        &self,
        connection: &mut Connection,
        stream: &StreamRow,
        leaves: &[&Leaf],
    ) -> Result<(), store::Error> {
        let last = self.state.tails.last(stream.id);
        for leaf in leaves {
            if !leaf.is_summarised && !leaf.is_emptied && leaf.last <= last {
                // First, so that a leaf that is summarised is folded.
                if stream.is_keyed {
                    self.fold(connection, leaf).await?;
                }
                sql::summarise_leaf(connection, leaf.stream, leaf.first).await?;
            }
        }
        Ok(())
    }

    /// Folds the keys of a leaf, and drops from memory what is in their heads now.
    async fn fold(&self, connection: &mut Connection, leaf: &Leaf) -> Result<(), store::Error> {
        if let Some(through) = sql::fold_keys(connection, leaf.stream, leaf.first).await? {
            self.state.keys.rebase(leaf.stream, through);
        }
        Ok(())
    }

    /// Empties what is old, the oldest first, up to the first that stays. Returns how many could not be had.
    async fn empty(
        &self,
        connection: &mut Connection,
        stream: &StreamRow,
        leaves: &[&Leaf],
        sizes: &Sizes,
    ) -> Result<i64, store::Error> {
        let Some((watermark, told_at)) = self.state.watermarks.get(stream.id) else {
            return Ok(0);
        };
        let watermark_at = self.cluster.now() - told_at.elapsed();
        let retention = &stream.retention;
        let mut behind = total(sizes);
        for leaf in leaves.iter().filter(|leaf| !leaf.is_emptied) {
            behind -= size_of(sizes, leaf);
            let is_over = |limit: Option<u64>| limit.is_some_and(|limit| behind >= limit);
            let old = EmptyLeaf {
                stream: stream.id,
                first: leaf.first,
                now: self.cluster.now(),
                settled: retention.settled,
                unsettled: retention.unsettled,
                is_over_settled_bytes: is_over(retention.settled_bytes),
                is_over_unsettled_bytes: is_over(retention.unsettled_bytes),
                watermark,
                watermark_at,
            };
            failpoint::reach("log.before_empty");
            let mut emptied = sql::empty_leaf(connection, old).await;
            if matches!(emptied, Ok(Emptied::KeysFirst)) {
                self.fold(connection, leaf).await?;
                emptied = sql::empty_leaf(connection, old).await;
            }
            match emptied {
                Ok(Emptied::Through(floor)) => {
                    failpoint::reach("log.after_empty");
                    self.state.raise_floor(stream.id, floor);
                    tracing::info!(
                        stream = stream.name.as_str(),
                        floor = floor.0,
                        "messages dropped by retention"
                    );
                    self.state.metrics.leaves_emptied.inc();
                }
                Ok(Emptied::No | Emptied::KeysFirst) => break,
                Err(error) if is_held(&error) => {
                    tracing::warn!(
                        stream = stream.name.as_str(),
                        first_offset = leaf.first.0,
                        "a leaf of the log is read by somebody and cannot be emptied"
                    );
                    return Ok(1);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(0)
    }

    /// Sees how near the oldest unsettled message is to the hard limit.
    async fn watch_limits(
        &self,
        connection: &mut Connection,
        stream: &StreamRow,
        leaves: &[&Leaf],
        sizes: &Sizes,
    ) -> Result<(), store::Error> {
        let Some((watermark, _)) = self.state.watermarks.get(stream.id) else {
            return Ok(());
        };
        let last = self.state.tails.last(stream.id);
        let watermark = watermark.max(self.state.tails.floor_now(stream.id));
        let oldest = match stream.retention.has_hard_limit() && watermark < last {
            true => sql::read_appended_at(connection, stream.id, watermark.next()).await?,
            false => None,
        };
        let unsettled = oldest.map(|since| Unsettled {
            since,
            bytes: leaves
                .iter()
                .filter(|leaf| leaf.last > watermark)
                .map(|leaf| size_of(sizes, leaf))
                .sum(),
        });
        let of = (stream.id, &stream.name, &stream.retention);
        let now = self.cluster.now();
        self.state
            .limits
            .note(&self.state.metrics, of, unsettled, now);
        Ok(())
    }

    /// Drops leaves that were emptied and the logs of deleted streams, until one cannot be had.
    async fn drop_leaves(
        &mut self,
        connection: &mut Connection,
        leaves: &[Leaf],
    ) -> Result<(), store::Error> {
        let emptied = leaves.iter().filter(|leaf| leaf.is_emptied);
        let mut gone: Vec<(StreamId, Option<Offset>)> = emptied
            .map(|leaf| (leaf.stream, Some(leaf.first)))
            .collect();
        let orphans = sql::list_orphans(connection).await?;
        gone.extend(orphans.into_iter().map(|stream| (stream, None)));
        for (stream, first) in gone {
            if !skip_if_held(sql::drop_leaf(connection, stream, first).await)? {
                self.drop_at = Instant::now() + DROP_PAUSE;
                break;
            }
            self.state.metrics.leaves_dropped.inc();
        }
        Ok(())
    }
}

/// Bytes of leaves, by their first offset.
type Sizes = [(Offset, u64)];

fn total(sizes: &Sizes) -> u64 {
    sizes.iter().map(|&(_, bytes)| bytes).sum()
}

fn size_of(sizes: &Sizes, leaf: &Leaf) -> u64 {
    let found = sizes.iter().find(|&&(first, _)| first == leaf.first);
    found.map_or(0, |&(_, bytes)| bytes)
}

/// How many offsets a leaf may have, so that several make up a limit in bytes, by what a message has taken so far.
fn size_within(limit: u64, bytes: u64, count: i64) -> i64 {
    const LEAVES_PER_LIMIT: u64 = 8;
    const USUAL_BYTES: u64 = 1_024;
    let count = count.max(0).unsigned_abs();
    let each = match count {
        0 => USUAL_BYTES,
        count => (bytes / count).max(64),
    };
    i64::try_from(limit / LEAVES_PER_LIMIT / each).unwrap_or(i64::MAX)
}

fn is_held(error: &store::Error) -> bool {
    error.sqlstate().as_deref() == Some("55P03")
}

/// `false`: somebody holds it; the next pass tries again.
fn skip_if_held(result: Result<(), store::Error>) -> Result<bool, store::Error> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if is_held(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_grow_while_they_fill_fast_and_shrink_while_slowly() {
        let seconds = Duration::from_secs;
        for (is_keyed, size, filled_in, next) in [
            (false, 1_000, 5, 2_000),
            (false, 8_000, 5, 8_000),
            (false, 1_000, 3_600, 1_000),
            (false, 1_000, 90_000, 500),
            (false, 20, 90_000, 20),
            (true, 1_000, 5, 1_000),
            (true, 1_000, 90_000, 500),
            (true, 200, 90_000, 200),
        ] {
            assert_eq!(next_size(1_000, is_keyed, size, seconds(filled_in)), next);
        }
    }
}
