//! Maintenance of the log: leaves are made ahead, summarised, emptied and dropped; ids and results are rotated. The node
//! that holds the lease makes one bounded pass per tick or wake-up. Each step is safe on any number of nodes; the lease
//! only saves work.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::Options;
use super::handle::State;
use super::leaf_sizes::{next_size, size_for_kept, size_within};
use super::limits::Unsettled;
use crate::cluster;
use crate::domain::chain;
use crate::domain::id::Offset;
use crate::failpoint;
use crate::store::stream::{self as sql, Emptied, EmptyLeaf, Leaf, StreamRow};
use crate::store::{self, Connection, Link};
use crate::supervisor::{Backoff, Duty, Lease, Next, Routine, Supervisor};

/// Without appends, the pause between passes grows to this many times the usual one.
const QUIET_FACTOR: u32 = 4;

/// The lease of the node that does the maintenance.
pub(super) const LEASE: &str = "duty/streams";
/// Leaves of a deleted stream that one transaction drops, and how many such steps a pass takes.
const DROP_LEAVES: i32 = 10;
const DROP_STEPS: usize = 100;
/// The pause between attempts to drop leaves while somebody has the log open: each may hold up appends for 50 ms.
const DROP_PAUSE: Duration = Duration::from_secs(60);
const ROTATE_PAUSE: Duration = Duration::from_secs(60);

pub(super) struct Maintenance {
    pub(super) options: Options,
    pub(super) link: Link,
    pub(super) cluster: cluster::Handle,
    pub(super) state: Arc<State>,
    pub(super) supervisor: Supervisor,
    pub(super) drop_at: Instant,
    pub(super) rotate_at: Instant,
    /// The streams' ends at the last pass, all added up.
    pub(super) ends: Option<i64>,
    /// The node's clock and the database's were apart at the last look.
    pub(super) is_apart: bool,
    /// The pause after passes between which nothing was appended.
    pub(super) quiet: Backoff,
    /// Of one stream, or of one part of a pass.
    pub(super) trouble: Option<String>,
}

impl Duty for Maintenance {
    type Error = store::Error;

    async fn pass(&mut self) -> Result<Next, store::Error> {
        self.watch_clocks();
        let ends = self.ends;
        self.keep_all().await?;
        if ends.is_none() || self.ends != ends {
            self.quiet.reset();
        }
        Ok(Next::Within(self.quiet.next_pause()))
    }

    fn failed(&mut self, error: &store::Error) {
        self.ends = None;
        self.state.metrics.maintenance_failures.inc();
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "maintenance of the streams failed"
        );
    }

    fn trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    fn stands_by(&mut self) {
        self.watch_clocks();
    }
}

impl Maintenance {
    pub(super) fn start(self, lease: Lease) {
        let every = self.options.maintenance;
        let routine = Routine::every(every, "stream maintenance")
            .woken_by(&self.state.maintain)
            .under(lease)
            .backing_off(Self::quiet(every));
        self.supervisor.clone().start(routine, self);
    }

    /// The pauses while nothing is appended, where passes are this far apart otherwise.
    pub(super) fn quiet(every: Duration) -> Backoff {
        Backoff::new(every, every * QUIET_FACTOR)
    }

    /// Logs when the two clocks disagree, and when they agree again.
    fn watch_clocks(&mut self) {
        let gap_seconds = self.state.witness.gap(&self.cluster).num_seconds();
        let is_apart = self.state.witness.is_apart(&self.cluster);
        if is_apart == std::mem::replace(&mut self.is_apart, is_apart) {
            return;
        }
        match is_apart {
            true => tracing::error!(
                gap_seconds,
                "the clocks of the broker's database and of this node differ: correct the wrong one. Until then scheduled messages wait \
                 for the later of the two, retention goes by the earlier one, and ids are kept"
            ),
            false => tracing::info!(
                gap_seconds,
                "the clocks of the broker's database and of this node agree again"
            ),
        }
    }

    async fn keep_all(&mut self) -> Result<(), store::Error> {
        let mut connection = self.link.lend().await?;
        let streams = sql::load_catalogue(&mut connection).await?.streams;
        let leaves = sql::list_leaves(&mut connection).await?;
        let ends = streams.iter().map(|of| self.state.tails.last(of.id).0);
        self.ends = Some(ends.sum());
        let mut blocked = 0;
        for stream in &streams {
            let first = leaves.partition_point(|leaf| leaf.stream < stream.id);
            let own = leaves[first..].iter();
            let own: Vec<&Leaf> = own.take_while(|leaf| leaf.stream == stream.id).collect();
            let kept = self.keep(&mut connection, stream, &own).await;
            blocked += self.go_on(&stream.name, kept)?.unwrap_or_default();
        }
        let is_there = |id| streams.iter().any(|stream| stream.id == id);
        self.state.limits.keep(&self.state.metrics, is_there);
        self.state.metrics.leaves_blocked.set(blocked);
        if Instant::now() >= self.rotate_at {
            self.rotate_at = Instant::now() + ROTATE_PAUSE;
            let now = self.state.witness.now();
            let rotated = skip_if_held(sql::rotate_buckets(&mut connection, now).await);
            self.go_on(&"the recent ids", rotated)?;
            let corrected = sql::correct_leaves(&mut connection, self.now()).await;
            self.go_on(&"the leaves", corrected)?;
        }
        if Instant::now() >= self.drop_at {
            let dropped = self.drop_emptied(&mut connection, &leaves).await;
            self.go_on(&"emptied leaves", dropped)?;
            let dropped = self.drop_orphans(&mut connection).await;
            self.go_on(&"deleted streams", dropped)?;
        }
        self.link.keep(connection);
        Ok(())
    }

    /// One duty of the pass that fails does not end it, unless the connection is lost.
    fn go_on<T>(
        &mut self,
        what: &dyn std::fmt::Display,
        done: Result<T, store::Error>,
    ) -> Result<Option<T>, store::Error> {
        match done {
            Ok(done) => Ok(Some(done)),
            Err(error) if error.is_connection_spent() || !error.is_answered() => Err(error),
            // The next pass tries again.
            Err(error) if error.is_held() => Ok(None),
            Err(error) => {
                self.trouble = Some(format!("{what}: {}", chain(&error)));
                self.state.metrics.maintenance_failures.inc();
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    of = %what,
                    "a duty of stream maintenance failed; the others go on"
                );
                Ok(None)
            }
        }
    }

    /// The time that makes messages old: the earliest of the clocks that this node knows. The database's is asked too.
    fn now(&self) -> DateTime<Utc> {
        self.cluster.now().min(self.state.witness.now())
    }

    /// All duties of one stream. Returns how many leaves could not be emptied.
    async fn keep(
        &mut self,
        connection: &mut Connection,
        stream: &StreamRow,
        own: &[&Leaf],
    ) -> Result<i64, store::Error> {
        let sizes = match stream.retention.bytes() {
            Some(_) => sql::read_leaf_sizes(connection, stream.id).await?,
            None => Vec::new(),
        };
        let extended = self.extend(connection, stream, own, &sizes).await;
        self.go_on(&stream.name, extended)?;
        let summarised = self.summarise(connection, stream, own).await;
        self.go_on(&stream.name, summarised)?;
        let emptied = self.empty(connection, stream, own, &sizes).await;
        let blocked = self.go_on(&stream.name, emptied)?;
        self.watch_limits(connection, stream, own, &sizes).await?;
        Ok(blocked.unwrap_or_default())
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
        let kept = last.0 - self.state.tails.floor_now(stream.id).0;
        let size = size_for_kept(sizes.configured, stream.is_keyed, size, kept);
        let size = match stream.retention.bytes() {
            Some(limit) => {
                let count = last.0 - self.state.tails.floor_now(stream.id).0;
                size_within(limit, total(bytes), count)
                    .max(sizes.smallest())
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
                sql::summarise_leaf(connection, (leaf.stream, leaf.first), self.now()).await?;
            }
        }
        Ok(())
    }

    /// Folds the keys of a leaf, and drops from memory the part that their heads now have.
    async fn fold(&self, connection: &mut Connection, leaf: &Leaf) -> Result<(), store::Error> {
        if let Some(through) = sql::fold_keys(connection, leaf.stream, leaf.first).await? {
            self.state.keys.rebase(leaf.stream, through);
        }
        Ok(())
    }

    /// Empties old leaves, the oldest first, up to the first that stays. Returns how many were locked.
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
        let retention = &stream.retention;
        let mut behind = total(sizes);
        for leaf in leaves.iter().filter(|leaf| !leaf.is_emptied) {
            behind -= size_of(sizes, leaf);
            let is_over = |limit: Option<u64>| limit.is_some_and(|limit| behind >= limit);
            let now = self.now();
            let old = EmptyLeaf {
                stream: stream.id,
                first: leaf.first,
                now,
                settled: retention.settled,
                unsettled: retention.unsettled,
                is_over_settled_bytes: is_over(retention.settled_bytes),
                is_over_unsettled_bytes: is_over(retention.unsettled_bytes),
                watermark,
                watermark_at: now - told_at.elapsed(),
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
                Err(error) if error.is_held() => {
                    tracing::warn!(
                        stream = stream.name.as_str(),
                        first_offset = leaf.first.0,
                        "another session holds a lock on a leaf of the log, so it cannot be emptied"
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

    /// Drops emptied leaves, until one is locked.
    async fn drop_emptied(
        &mut self,
        connection: &mut Connection,
        leaves: &[Leaf],
    ) -> Result<(), store::Error> {
        for leaf in leaves.iter().filter(|leaf| leaf.is_emptied) {
            let dropping = sql::drop_leaf(connection, leaf.stream, leaf.first).await;
            if !skip_if_held(dropping)? {
                self.drop_at = Instant::now() + DROP_PAUSE;
                break;
            }
            self.state.metrics.leaves_dropped.inc();
        }
        Ok(())
    }

    /// Drops the logs of deleted streams, in steps, each until something of it cannot be had. What is left is a later pass's.
    async fn drop_orphans(&mut self, connection: &mut Connection) -> Result<(), store::Error> {
        let mut steps = DROP_STEPS;
        let mut failure = None;
        'streams: for stream in sql::list_orphans(connection).await? {
            loop {
                if steps == 0 || self.supervisor.is_stopping() {
                    self.state.maintain.notify_one();
                    break 'streams;
                }
                steps -= 1;
                match sql::drop_stream_log(connection, stream, DROP_LEAVES).await {
                    Ok(false) => {}
                    Ok(true) => {
                        self.state.metrics.leaves_dropped.inc();
                        break;
                    }
                    Err(error) if error.is_held() => {
                        self.drop_at = Instant::now() + DROP_PAUSE;
                        break;
                    }
                    Err(error) if error.is_connection_spent() => return Err(error),
                    // Another deleted stream is not held up by this one.
                    Err(error) => {
                        failure = Some(error);
                        break;
                    }
                }
            }
        }
        match failure {
            Some(error) => {
                self.drop_at = Instant::now() + DROP_PAUSE;
                Err(error)
            }
            None => Ok(()),
        }
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

/// `false`: somebody holds it; the next pass tries again.
fn skip_if_held(result: Result<(), store::Error>) -> Result<bool, store::Error> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.is_held() => Ok(false),
        Err(error) => Err(error),
    }
}
