//! Upkeep beside the steps: empties the outbox's leaves once every row in them was passed a grace ago, and folds the
//! journals and marks that appends leave behind. Nothing here waits for a lock: work whose lock is taken stays for the next
//! time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::position::Position;
use super::status::Blocked;
use super::task::Run;
use super::trouble::Trouble;
use crate::domain::mapping::Pickup;
use crate::domain::name::StreamName;
use crate::store::origin::{Emptied, LEAF_PERIOD, Passed};
use crate::{failpoint, store};

/// How often an origin's journal is folded: a fold leaves versions of the catalogue's rows behind, so not by the append.
const JOURNAL_FOLD: Duration = Duration::from_secs(60);
/// Positions in the journal of an origin at which it is folded before that.
const JOURNAL_FOLD_APPENDS: i64 = 20_000;
/// The same where each position names the rows that it took.
const JOURNAL_FOLD_APPENDS_BY_DELETION: i64 = 500;
/// Rows of a mapped table that are taken out in one turn.
const DELETE_ROWS_PER_TURN: i64 = 10_000;
/// Marks between two folds of an origin's marks.
const MARK_FOLD_COUNT: u32 = 2_000;
/// Positions noted per grace.
const HISTORY_PER_GRACE: u32 = 8;
/// The longest pause between two looks for leaves to empty.
const ROTATION_INTERVAL_MAX: Duration = Duration::from_secs(10);

/// How often the list of rejected rows is looked at.
const REJECTED_INTERVAL: Duration = Duration::from_secs(60);
/// Rejected rows that one statement deletes.
const REJECTED_DELETE_ROWS: u32 = 1_000;

/// How long rows stay in the outbox beyond the grace: a leaf is filled, and the one after it.
const LEAVES_KEPT: Duration = Duration::from_secs(3 * LEAF_PERIOD.as_secs());
/// How often the streams' retention is looked at.
const RETENTION_INTERVAL: Duration = Duration::from_secs(600);

/// The memory of upkeep between its turns.
pub(super) struct Rotation {
    folded_number: i64,
    /// The time of that.
    folded_at: Instant,
    pub(super) mark_count: u32,
    noted: Option<(i64, Instant)>,
    rotated_at: Option<Instant>,
    rejected_at: Option<Instant>,
    /// Rejected rows that are gone since they were last told.
    rejected_dropped: u64,
    retention_at: Option<Instant>,
    /// Streams that were warned of.
    short: BTreeSet<StreamName>,
    blocked: BTreeMap<i16, (DateTime<Utc>, Option<i32>)>,
}

impl Rotation {
    /// `folded_number`: the checkpoint's. A relay whose sessions are short folds too.
    pub(super) fn new(folded_number: i64) -> Self {
        Self {
            folded_number,
            folded_at: Instant::now(),
            // Unknown how many there are: the first fold comes early.
            mark_count: MARK_FOLD_COUNT / 2,
            noted: None,
            rotated_at: None,
            rejected_at: None,
            rejected_dropped: 0,
            retention_at: None,
            short: BTreeSet::new(),
            blocked: BTreeMap::new(),
        }
    }
}

impl Run<'_> {
    /// One turn, between two windows.
    pub(super) async fn upkeep(&mut self) -> Result<(), Trouble> {
        let Some(position) = self.position.clone().filter(|p| p.window.is_none()) else {
            return Ok(());
        };
        if self.has_foreign_rows().await? {
            self.rerelay("it holds rows with transaction ids that this server has not assigned")
                .await?;
            return Ok(());
        }
        // Rows that leave as they are relayed have no history.
        let is_kept = self.relay.pickup() == Pickup::Snapshot;
        if is_kept {
            self.note_history(&position).await?;
        }
        self.drop_rejected().await?;
        self.fold_journal().await?;
        self.fold_marks(&position).await?;
        match &self.relay.mapping {
            None => {
                self.look_at_retention().await?;
                self.rotate().await
            }
            Some(mapping) if mapping.deletes_relayed => self.delete_passed().await,
            Some(_) => Ok(()),
        }
    }

    /// Drops the oldest rejected rows beyond the bounds of their list, and counts the rest.
    async fn drop_rejected(&mut self) -> Result<(), Trouble> {
        let relay = self.relay;
        let interval = REJECTED_INTERVAL.min(relay.options.rejected.age / 2);
        let last = self.rotation.rejected_at;
        if last.is_some_and(|at| at.elapsed() < interval) {
            return Ok(());
        }
        self.rotation.rejected_at = Some(Instant::now());
        let (broker, origin) = (&relay.broker, relay.id);
        let finding = store::relay::find_rejected_beyond(broker, origin, relay.options.rejected);
        if let Some(through) = finding.await.map_err(Trouble::Broker)? {
            // One statement a turn: rows that came meanwhile do not wait for hundreds of them.
            let deleting =
                store::relay::delete_rejected(broker, origin, 0..=through, REJECTED_DELETE_ROWS);
            let deleted = deleting.await.map_err(Trouble::Broker)?;
            self.rotation.rejected_dropped += deleted;
            if deleted == u64::from(REJECTED_DELETE_ROWS) {
                self.rotation.rejected_at = None;
                return Ok(());
            }
        }
        let dropped = std::mem::take(&mut self.rotation.rejected_dropped);
        if dropped > 0 {
            tracing::warn!(origin = %relay.name, dropped, "the oldest rejected rows were dropped: their list is bounded");
        }
        let rejected = store::relay::count_rejected(broker, origin).await;
        let rejected = rejected.map_err(Trouble::Broker)?;
        relay.status.send_if_modified(|status| {
            std::mem::replace(&mut status.rejected_count, rejected) != rejected
        });
        Ok(())
    }

    /// A stream that forgets a message before the outbox forgets its row takes the row for a new one after a failover.
    async fn look_at_retention(&mut self) -> Result<(), Trouble> {
        let relay = self.relay;
        let last = self.rotation.retention_at;
        if last.is_some_and(|at| at.elapsed() < RETENTION_INTERVAL) {
            return Ok(());
        }
        self.rotation.retention_at = Some(Instant::now());
        let least = relay.options.grace + LEAVES_KEPT;
        let looking = relay.stream.kept_for_less(least).await;
        let short = looking.map_err(|error| match error {
            crate::stream::Error::Store(error) => Trouble::Broker(error),
            _ => Trouble::Stopping,
        })?;
        for stream in short {
            if self.rotation.short.insert(stream.clone()) {
                tracing::warn!(
                    origin = %relay.name, %stream, least_seconds = least.as_secs(),
                    "a stream keeps settled messages for less time than the outbox keeps its rows: after a failover of the \
                     origin they are relayed again, or listed as rejected where the stream is keyed; raise its retention"
                );
            }
        }
        Ok(())
    }

    /// Takes rows out of a mapped table that were passed a grace ago, a bounded number in a turn.
    async fn delete_passed(&mut self) -> Result<(), Trouble> {
        let relay = self.relay;
        let grace = relay.options.grace;
        let finding = store::relay::find_passed_position(&relay.broker, relay.id, grace);
        let Some((number, text)) = finding.await.map_err(Trouble::Broker)? else {
            return Ok(());
        };
        let passed: Position = serde_json::from_str(&text).map_err(Trouble::Position)?;
        let reader = relay.reader();
        let deleting =
            self.session
                .delete_passed(&passed.snapshot, reader, number, DELETE_ROWS_PER_TURN);
        let deleted = deleting.await.map_err(Trouble::Origin)?;
        if deleted > 0 {
            tracing::debug!(origin = %relay.name, deleted, "deleted relayed rows whose grace is over");
        }
        Ok(())
    }

    async fn note_history(&mut self, position: &Position) -> Result<(), Trouble> {
        let grace = self.relay.options.grace;
        let is_due = match self.rotation.noted {
            Some((number, at)) => {
                number != self.number && at.elapsed() >= grace / HISTORY_PER_GRACE
            }
            None => true,
        };
        if !is_due {
            return Ok(());
        }
        let text = position.to_text();
        let noted = store::relay::note_history(
            &self.relay.broker,
            self.relay.id,
            &self.fence,
            self.number,
            &text,
            grace,
        );
        noted.await.map_err(Trouble::Broker)?;
        self.rotation.noted = Some((self.number, Instant::now()));
        Ok(())
    }

    async fn fold_journal(&mut self) -> Result<(), Trouble> {
        let appends = match self.relay.pickup() {
            Pickup::Snapshot => JOURNAL_FOLD_APPENDS,
            Pickup::Delete => JOURNAL_FOLD_APPENDS_BY_DELETION,
        };
        let appends = failpoint::limit("relay-fold-appends", appends);
        let unfolded = self.number - self.rotation.folded_number;
        let is_due = unfolded >= appends
            || (unfolded > 0 && self.rotation.folded_at.elapsed() >= JOURNAL_FOLD);
        if !is_due {
            return Ok(());
        }
        failpoint::reach("relay.before_fold");
        let folded = store::relay::fold_journal(&self.relay.broker).await;
        failpoint::reach("relay.after_fold");
        // The position is in the checkpoint now, also when an older snapshot or a reader keeps the segment.
        folded.map_err(Trouble::Broker)?;
        self.rotation.folded_number = self.number;
        self.rotation.folded_at = Instant::now();
        Ok(())
    }

    async fn fold_marks(&mut self, position: &Position) -> Result<(), Trouble> {
        let Some(mark) = position.mark else {
            return Ok(());
        };
        if self.rotation.mark_count < MARK_FOLD_COUNT {
            return Ok(());
        }
        let folded = self.session.fold_marks(mark).await;
        if folded.map_err(Trouble::Origin)? {
            self.rotation.mark_count = 0;
        }
        Ok(())
    }

    async fn rotate(&mut self) -> Result<(), Trouble> {
        let grace = self.relay.options.grace;
        let interval = (grace / HISTORY_PER_GRACE).min(ROTATION_INTERVAL_MAX);
        let is_due = self
            .rotation
            .rotated_at
            .is_none_or(|at| at.elapsed() >= interval);
        if !is_due {
            return Ok(());
        }
        self.rotation.rotated_at = Some(Instant::now());
        let finding = store::relay::find_passed_position(&self.relay.broker, self.relay.id, grace);
        let Some((number, text)) = finding.await.map_err(Trouble::Broker)? else {
            return Ok(());
        };
        let passed: Position = serde_json::from_str(&text).map_err(Trouble::Position)?;
        let leaves = self.session.find_idle_leaves().await;
        let leaves = leaves.map_err(Trouble::Origin)?;
        let now = self.relay.cluster.now();
        self.rotation
            .blocked
            .retain(|leaf, _| leaves.contains(leaf));
        let mut emptied_count = 0;
        for leaf in leaves {
            let passed = Passed {
                reader: self.relay.reader(),
                now,
                number,
                snapshot: &passed.snapshot,
            };
            let emptying = self.session.empty_leaf(leaf, passed);
            match emptying.await.map_err(Trouble::Origin)? {
                Emptied::Yes => {
                    emptied_count += 1;
                    self.rotation.blocked.remove(&leaf);
                }
                Emptied::NotYet => {
                    self.rotation.blocked.remove(&leaf);
                }
                Emptied::Blocked(pid) => {
                    let since = self.rotation.blocked.entry(leaf).or_insert((now, pid));
                    since.1 = pid;
                }
            }
        }
        let longest = self.rotation.blocked.iter().min_by_key(|(_, (at, _))| *at);
        let blocked = longest.map(|(leaf, &(since, pid))| Blocked {
            leaf: format!("postroad.outbox_{leaf}"),
            pid,
            since,
        });
        self.relay.status.send_if_modified(|status| {
            let is_news = emptied_count > 0 || status.blocked != blocked;
            status.emptied_count += emptied_count;
            status.blocked = blocked;
            is_news
        });
        Ok(())
    }
}
