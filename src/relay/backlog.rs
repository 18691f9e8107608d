//! A window of very many rows, as far as it is counted: a coarse table of where the rows lie. With it each part of the
//! window is read where it lies, so a row costs the same however many wait with it.
//!
//! The table is made in pieces of bounded time, which are smaller where the server is slow. It outlives the session,
//! because the rows of a window are the same set whoever asks. Rows are grouped by their seqs, and for each group the table
//! has its transaction ids; ids and seqs go together, except for transactions that were open for long. A transaction that
//! wrote more rows than fit in a piece is found by the blocks of its rows, since its id does not say where they are.
//!
//! The table also has the number of rows in each group: if a different number is found, some rows have been moved, and
//! everything is counted again.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::position::{Position, Window};
use super::snapshot::Snapshot;
use super::task::Run;
use super::trouble::Trouble;
use crate::store::origin::{Asked, Place, Range, Where};

/// Groups of seqs; with more, each takes twice as many.
const BUCKETS_MAX: usize = 20_000;
/// Spans of ids of a group; with more, the two that are nearest are made one.
const SPANS_MAX: usize = 128;
/// The fewest rows of a piece.
const ROWS_MIN: usize = 64;
/// A piece that took longer is followed by a smaller one, and one that took less than an eighth of it by a larger.
const PIECE_TIME: Duration = Duration::from_secs(2);
/// Rows in a block, about.
const BLOCK_ROWS: usize = 64;

/// How much is asked of the origin at a time, as it has shown to bear.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    rows: usize,
    most: usize,
}

impl Effort {
    /// A part of the window that is read at once is as large as two pieces.
    pub(super) fn new(manifest_rows: usize) -> Self {
        let most = (manifest_rows / 2).max(ROWS_MIN);
        Self { rows: most, most }
    }

    fn took(&mut self, time: Duration) {
        if time > PIECE_TIME {
            self.rows = (self.rows / 2).max(ROWS_MIN);
        } else if time < PIECE_TIME / 8 {
            self.rows = (self.rows * 2).min(self.most);
        }
    }

    /// A statement was too slow. Returns whether a smaller one is left to be tried.
    fn failed(&mut self) -> bool {
        let is_left = self.rows > ROWS_MIN;
        self.rows = (self.rows / 4).max(ROWS_MIN);
        // Not tried again in this window.
        self.most = (self.rows * 2).min(self.most);
        is_left
    }
}

#[derive(Debug, Default, Clone)]
struct Bucket {
    count: u64,
    /// Transaction ids, apart and in order.
    spans: Vec<Range>,
    /// Leaves and blocks of those that wrote very much.
    blocks: Vec<(i16, Range)>,
}

impl Bucket {
    fn join(&mut self, other: Self) {
        self.count += other.count;
        self.spans.extend(other.spans);
        join_ranges(&mut self.spans);
        while self.spans.len() > SPANS_MAX {
            let gap = |n: &usize| self.spans[n + 1].0 - self.spans[*n].1;
            let Some(nearest) = (0..self.spans.len() - 1).min_by_key(gap) else {
                break;
            };
            let (_, high) = self.spans.remove(nearest + 1);
            self.spans[nearest].1 = high;
        }
        self.blocks.extend(other.blocks);
        self.blocks.sort_unstable();
        self.blocks.dedup_by(|next, last| {
            let is_joined = next.0 == last.0 && next.1.0 <= last.1.1 + 1;
            if is_joined {
                last.1.1 = last.1.1.max(next.1.1);
            }
            is_joined
        });
    }
}

/// Puts ranges in order, and those together that overlap.
fn join_ranges(ranges: &mut Vec<Range>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let is_joined = next.0 <= last.1;
        if is_joined {
            last.1 = last.1.max(next.1);
        }
        is_joined
    });
}

/// The table of a window.
#[derive(Debug)]
pub(super) struct Backlog {
    since: String,
    snapshot: String,
    /// Rows after this seq are counted.
    after: i64,
    shift: u32,
    /// Spans of ids that are still to be counted; all at once, as long as nobody has tried.
    spans: VecDeque<Range>,
    is_tried: bool,
    /// Ids of transactions that wrote more rows than a piece has.
    large: Vec<i64>,
    /// Leaves and blocks that theirs are still to be counted in; none until the leaves are known.
    leaves: Option<VecDeque<(i16, Range)>>,
    buckets: BTreeMap<i64, Bucket>,
    count: u64,
}

/// A part of a window.
#[derive(Debug)]
pub(super) struct Part {
    /// By seq.
    pub(super) places: Vec<Place>,
    /// Everything up to here was looked at.
    pub(super) through: i64,
    /// The window ends here.
    pub(super) is_last: bool,
}

impl Backlog {
    fn new(position: &Position, window: &Window, after: i64, effort: Effort) -> Self {
        let snapshots = Snapshot::parse(&position.snapshot).zip(Snapshot::parse(&window.since));
        // All there is, if they cannot be understood: who asks the server leaves out what is not the window's.
        let spans = snapshots.map_or_else(
            || vec![(0, i64::MAX)],
            |(now, since)| now.spans_since(&since),
        );
        Self {
            since: window.since.clone(),
            snapshot: position.snapshot.clone(),
            after,
            shift: (effort.rows / 8).max(2).ilog2().min(14),
            spans: spans.into(),
            is_tried: false,
            large: Vec::new(),
            leaves: None,
            buckets: BTreeMap::new(),
            count: 0,
        }
    }

    fn is_of(&self, position: &Position, window: &Window, after: i64) -> bool {
        (&self.since, &self.snapshot) == (&window.since, &position.snapshot) && self.after <= after
    }

    fn asked(&self) -> Asked<'_> {
        Asked {
            since: &self.since,
            snapshot: &self.snapshot,
            after: self.after,
        }
    }

    fn is_counted(&self) -> bool {
        let has_leaves = self.leaves.as_ref().is_none_or(VecDeque::is_empty);
        self.spans.is_empty() && has_leaves && (self.large.is_empty() || self.leaves.is_some())
    }

    /// Adds what a group has. `shift` is what it was grouped by, which the table may be beyond by now.
    fn add(&mut self, (bucket, shift): (i64, u32), found: Bucket) {
        self.count += found.count;
        let bucket = bucket >> (self.shift - shift);
        self.buckets.entry(bucket).or_default().join(found);
        while self.buckets.len() > BUCKETS_MAX {
            self.shift += 1;
            for (bucket, found) in std::mem::take(&mut self.buckets) {
                self.buckets.entry(bucket >> 1).or_default().join(found);
            }
        }
    }

    /// Whether a transaction's rows are the window's.
    fn has(&self, id: i64) -> bool {
        let parsed = Snapshot::parse(&self.snapshot).zip(Snapshot::parse(&self.since));
        parsed.is_none_or(|(now, since)| now.shows(id) && !since.shows(id))
    }

    /// The groups after a seq, up to this many rows but always one: the range of seqs, the last group's end, and whether there are
    /// more.
    fn next(&self, after: i64, rows: usize) -> (Range, i64, Bucket, bool) {
        let first = after.saturating_add(1) >> self.shift;
        let mut groups = self.buckets.range(first..).peekable();
        let mut all = Bucket::default();
        let mut last = first;
        while let Some((bucket, found)) = groups.peek() {
            let is_full = all.count.saturating_add(found.count) > rows as u64;
            if all.count > 0 && is_full {
                break;
            }
            last = **bucket;
            all.join((*found).clone());
            groups.next();
        }
        let has_more = groups.peek().is_some();
        let low = (first << self.shift).max(self.after.saturating_add(1));
        let high = (last << self.shift) | ((1 << self.shift) - 1);
        let end = if has_more { high } else { i64::MAX };
        ((low, end), high, all, has_more)
    }
}

impl Run<'_> {
    /// Counts the rest of a window after a seq, unless it is counted already. Returns at least the number of its rows.
    pub(super) async fn count_backlog(
        &mut self,
        position: &Position,
        window: &Window,
        after: i64,
    ) -> Result<u64, Trouble> {
        let known = self.caution.backlog.take();
        let mut backlog = known
            .filter(|known| known.is_of(position, window, after))
            .unwrap_or_else(|| Backlog::new(position, window, after, self.caution.effort));
        while !backlog.is_counted() {
            if self.relay.supervisor.is_stopping() {
                return Err(Trouble::Stopping);
            }
            let began = Instant::now();
            match self.count_piece(&mut backlog).await {
                Ok(()) => self.caution.effort.took(began.elapsed()),
                Err(error) if error.is_canceled() && self.caution.effort.failed() => {
                    self.note_slow();
                }
                Err(error) => {
                    // The counts stay.
                    self.caution.backlog = Some(backlog);
                    return Err(Trouble::Origin(error));
                }
            }
            self.relay
                .status
                .send_modify(|status| status.lag_rows = status.lag_rows.max(backlog.count));
        }
        let count = backlog.count;
        self.caution.backlog = Some(backlog);
        Ok(count)
    }

    fn note_slow(&self) {
        tracing::warn!(
            origin = %self.relay.name, rows = self.caution.effort.rows,
            "the origin is slow: reading fewer rows of its backlog at a time"
        );
    }

    async fn count_piece(&mut self, backlog: &mut Backlog) -> Result<(), crate::store::Error> {
        let limit = self.caution.effort.rows;
        let shift = backlog.shift;
        let of_ids = |count, ids| Bucket {
            count,
            spans: vec![ids],
            blocks: Vec::new(),
        };
        if !backlog.is_tried && backlog.spans.len() > 1 {
            let spans: Vec<Range> = backlog.spans.iter().copied().collect();
            let counting = self
                .session
                .count_by_ids(backlog.asked(), &spans, backlog.shift, limit);
            let piece = counting.await?;
            backlog.is_tried = true;
            if !piece.is_cut {
                backlog.spans.clear();
                for group in piece.groups {
                    backlog.add((group.bucket, shift), of_ids(group.count, group.ids));
                }
            }
            return Ok(());
        }
        if let Some(&(low, high)) = backlog.spans.front() {
            let span = [(low, high)];
            let counting = self
                .session
                .count_by_ids(backlog.asked(), &span, backlog.shift, limit);
            let piece = counting.await?;
            for group in piece.groups {
                backlog.add((group.bucket, shift), of_ids(group.count, group.ids));
            }
            backlog.spans.pop_front();
            let rest = match piece.ids.filter(|_| piece.is_cut) {
                Some((first, last)) if first == last => {
                    if backlog.has(first) {
                        backlog.large.push(first);
                    }
                    Some(last + 1)
                }
                Some((_, last)) => Some(last),
                None => None,
            };
            if let Some(rest) = rest.filter(|rest| *rest <= high) {
                backlog.spans.push_front((rest, high));
            }
            return Ok(());
        }
        let Some(leaves) = &mut backlog.leaves else {
            let found = self.session.find_leaves(&backlog.large).await?;
            let leaves = found.into_iter().filter(|(_, blocks)| *blocks > 0);
            backlog.leaves = Some(
                leaves
                    .map(|(leaf, blocks)| (leaf, (0, blocks - 1)))
                    .collect(),
            );
            return Ok(());
        };
        let Some(&(leaf, (low, high))) = leaves.front() else {
            return Ok(());
        };
        let blocks = i64::try_from((limit / BLOCK_ROWS).max(1)).unwrap_or(i64::MAX);
        let end = high.min(low.saturating_add(blocks - 1));
        let counting = self.session.count_by_blocks(
            backlog.after,
            (leaf, (low, end)),
            &backlog.large,
            backlog.shift,
        );
        let found = counting.await?;
        leaves.pop_front();
        if end < high {
            leaves.push_front((leaf, (end + 1, high)));
        }
        for (bucket, count) in found {
            let found = Bucket {
                count,
                spans: Vec::new(),
                blocks: vec![(leaf, (low, end))],
            };
            backlog.add((bucket, shift), found);
        }
        Ok(())
    }

    /// The next part of a window after a seq. None when the window has to be counted again.
    pub(super) async fn find_part(&mut self, after: i64) -> Result<Option<Part>, Trouble> {
        let Some(backlog) = self.caution.backlog.take() else {
            return Ok(None);
        };
        let usual = self.relay.options.manifest_rows.max(2);
        let rows = usual.min(self.caution.effort.rows.saturating_mul(2));
        let (mut seqs, last, found, has_more) = backlog.next(after, rows);
        // One group of very many is read from its place on, the others whole: then it is known how many there are.
        let is_whole = found.count <= 2 * usual as u64;
        let limit = match is_whole {
            true => usize::try_from(found.count)
                .unwrap_or(usize::MAX)
                .saturating_add(1),
            false => {
                seqs.0 = seqs.0.max(after.saturating_add(1));
                usual
            }
        };
        let began = Instant::now();
        let places = self.find_places(&backlog, seqs, limit, &found).await;
        let mut places = match places {
            Ok(places) => places,
            // Fewer groups at a time; and if it is one, smaller groups: then all is counted again.
            Err(error) if error.is_canceled() && self.caution.effort.failed() => {
                self.note_slow();
                let is_one = seqs.0 >> backlog.shift == last >> backlog.shift;
                if is_one {
                    return Ok(None);
                }
                self.caution.backlog = Some(backlog);
                return Box::pin(self.find_part(after)).await;
            }
            Err(error) => {
                self.caution.backlog = Some(backlog);
                return Err(Trouble::Origin(error));
            }
        };
        self.caution.effort.took(began.elapsed());
        if is_whole && places.len() as u64 != found.count {
            tracing::warn!(
                origin = %self.relay.name, counted = found.count, found = places.len(),
                "rows of the outbox are not where they were: counting the backlog again"
            );
            return Ok(None);
        }
        let is_cut = !is_whole && places.len() >= limit;
        if is_cut {
            super::decide::leave_last_seq(&mut places, |place| place.seq);
        }
        places.retain(|place| place.seq > after);
        let is_last = !is_cut && !has_more;
        let through = match is_cut {
            true => places.last().map_or(after, |place| place.seq),
            false if is_last => places.last().map_or(after, |place| place.seq),
            false => seqs.1,
        };
        self.caution.backlog = Some(backlog);
        Ok(Some(Part {
            places,
            through,
            is_last,
        }))
    }

    async fn find_places(
        &mut self,
        backlog: &Backlog,
        seqs: Range,
        limit: usize,
        found: &Bucket,
    ) -> Result<Vec<Place>, crate::store::Error> {
        let asked = backlog.asked();
        let mut places = Vec::new();
        if !found.spans.is_empty() {
            let at = Where::Ids {
                spans: &found.spans,
                but: &backlog.large,
            };
            places = self.session.find_places(asked, seqs, limit, at).await?;
        }
        for (leaf, blocks) in &found.blocks {
            let at = Where::Blocks {
                leaf: *leaf,
                blocks: *blocks,
                of: &backlog.large,
            };
            places.extend(self.session.find_places(asked, seqs, limit, at).await?);
        }
        places.sort_by_key(|place| place.seq);
        places.truncate(limit);
        Ok(places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backlog(shift: u32) -> Backlog {
        Backlog {
            since: "3:3:".into(),
            snapshot: "100:100:".into(),
            after: i64::MIN,
            shift,
            spans: VecDeque::new(),
            is_tried: true,
            large: Vec::new(),
            leaves: None,
            buckets: BTreeMap::new(),
            count: 0,
        }
    }

    fn found(count: u64, ids: Range) -> Bucket {
        Bucket {
            count,
            spans: vec![ids],
            blocks: Vec::new(),
        }
    }

    #[test]
    fn parts_are_groups_that_follow_each_other() {
        let mut backlog = backlog(4);
        for (bucket, count, ids) in [
            (-1, 3, (3, 5)),
            (0, 5, (5, 9)),
            (2, 9, (8, 12)),
            (3, 1, (4, 4)),
        ] {
            backlog.add((bucket, 4), found(count, ids));
        }
        let (seqs, _, part, has_more) = backlog.next(i64::MIN, 8);
        assert_eq!((seqs.1, part.count, has_more), (15, 8, true));
        assert_eq!(part.spans, [(3, 9)]);
        let (seqs, _, part, has_more) = backlog.next(15, 8);
        assert_eq!((seqs, part.count, has_more), ((16, 47), 9, true));
        let (seqs, _, part, has_more) = backlog.next(47, 8);
        assert_eq!((seqs, part.count, has_more), ((48, i64::MAX), 1, false));
        assert_eq!(part.spans, [(4, 4)]);
        assert_eq!(backlog.next(63, 8).2.count, 0);
    }

    #[test]
    fn its_size_is_bounded_and_it_loses_nothing() {
        let mut backlog = backlog(0);
        for n in 0..50_000_i64 {
            backlog.add((n * 7 - 1_000, 0), found(1, (n * 3, n * 3 + 1)));
        }
        assert!(backlog.buckets.len() <= BUCKETS_MAX);
        assert_eq!(backlog.count, 50_000);
        for n in (0..50_000_i64).step_by(97) {
            let bucket = &backlog.buckets[&((n * 7 - 1_000) >> backlog.shift)];
            assert!(bucket.spans.len() <= SPANS_MAX);
            assert!(
                bucket
                    .spans
                    .iter()
                    .any(|(low, high)| *low <= n * 3 && n * 3 < *high)
            );
        }
        let total: u64 = backlog.buckets.values().map(|bucket| bucket.count).sum();
        assert_eq!(total, 50_000);
    }

    #[test]
    fn what_is_too_slow_is_tried_smaller_and_goes_on_so() {
        let mut effort = Effort::new(200_000);
        let mut tries = 0;
        while effort.failed() {
            tries += 1;
            assert!(tries < 20);
        }
        assert_eq!(effort.rows, ROWS_MIN);
        effort.took(Duration::from_secs(1));
        assert_eq!(effort.rows, ROWS_MIN);
        for _ in 0..3 {
            effort.took(Duration::from_millis(10));
            assert_eq!(effort.rows, 2 * ROWS_MIN);
        }
        effort.took(Duration::from_secs(3));
        assert_eq!(effort.rows, ROWS_MIN);
    }
}
