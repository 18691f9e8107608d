//! The origin of a run: a Postgres as far as relays see it. It has transactions with ids, rows that carry them, a log that
//! is flushed or not, crashes that assign unflushed ids again, and volumes that are restored.

use std::collections::{BTreeMap, BTreeSet};

use chrono::DateTime;
use uuid::Uuid;

use super::Wrong;
use crate::relay::position::NOTHING;
use crate::simulation::Dice;
use crate::store::origin::Identity;

pub(super) const KEYS: u64 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    Committed,
    Aborted,
}

#[derive(Debug, Clone)]
struct Transaction {
    /// Not as long as nothing is written.
    xid: Option<u64>,
    is_asynchronous: bool,
    keys: BTreeSet<u64>,
    rows: Vec<usize>,
}

/// An outbox row.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) id: u64,
    pub(super) seq: i64,
    pub(super) key: u64,
    pub(super) version: u64,
    /// The column, as the relay reads it.
    xid: u64,
    end: End,
    written_lsn: u64,
    ended_lsn: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) wrong: Option<Wrong>,
    system_identifier: u64,
    timeline: i32,
    next_xid: u64,
    next_seq: i64,
    next_id: u64,
    lsn: u64,
    flushed: u64,
    /// The position in the log of the last record of each id.
    seen_xids: BTreeMap<u64, u64>,
    open: Vec<Transaction>,
    pub(super) rows: Vec<Row>,
    marks: BTreeMap<Uuid, u64>,
    /// Sessions end with a crash.
    pub(super) session: u64,
    /// Ids that were durable at some time.
    pub(super) durable: BTreeSet<u64>,
}

/// A snapshot, of Postgres' type pg_snapshot.
#[derive(Debug, Clone)]
struct Snapshot {
    xmax: u64,
    in_progress: BTreeSet<u64>,
}

impl Snapshot {
    fn read(text: &str) -> Self {
        let mut parts = text.split(':').skip(1);
        let xmax = parts.next().and_then(|xmax| xmax.parse().ok());
        let list = parts.next().unwrap_or_default().split(',');
        Self {
            xmax: xmax.expect("a snapshot has an xmax"),
            in_progress: list.filter_map(|xid| xid.parse().ok()).collect(),
        }
    }

    fn shows(&self, xid: u64) -> bool {
        xid < self.xmax && !self.in_progress.contains(&xid)
    }

    fn text(&self) -> String {
        let xmin = self.in_progress.first().unwrap_or(&self.xmax);
        let list: Vec<String> = self.in_progress.iter().map(u64::to_string).collect();
        format!("{xmin}:{}:{}", self.xmax, list.join(","))
    }
}

impl Origin {
    pub(super) fn new(wrong: Option<Wrong>) -> Self {
        Self {
            wrong,
            system_identifier: 1,
            timeline: 1,
            next_xid: 10,
            next_seq: 1,
            next_id: 1,
            lsn: 0,
            flushed: 0,
            seen_xids: BTreeMap::new(),
            open: Vec::new(),
            rows: Vec::new(),
            marks: BTreeMap::new(),
            session: 1,
            durable: BTreeSet::new(),
        }
    }

    fn log(&mut self, xid: u64) -> u64 {
        self.lsn += 1;
        self.seen_xids.insert(xid, self.lsn);
        self.lsn
    }

    fn take_xid(&mut self) -> u64 {
        let xid = self.next_xid;
        self.next_xid += 1;
        xid
    }

    /// The log up to now is on the disk.
    pub(super) fn flush(&mut self) {
        self.flushed = self.lsn;
        let rows = self.rows.iter();
        let durable = rows
            .filter(|row| row.end == End::Committed)
            .map(|row| row.id);
        self.durable.extend(durable);
    }

    /// A producer goes on, somewhere.
    pub(super) fn produce(&mut self, dice: &mut Dice) {
        if self.open.len() < 4 && dice.once_in(2) {
            let is_asynchronous = dice.once_in(3);
            self.open.push(Transaction {
                xid: None,
                is_asynchronous,
                keys: BTreeSet::new(),
                rows: Vec::new(),
            });
        }
        if self.open.is_empty() {
            return;
        }
        let place = dice.place(self.open.len());
        match dice.roll(6) {
            0 | 1 => self.end(place, End::Committed),
            2 => self.end(place, End::Aborted),
            3 => {
                // An id is taken before the key's row is.
                if self.open[place].xid.is_none() {
                    self.open[place].xid = Some(self.take_xid());
                }
            }
            _ => self.insert(place, dice.roll(KEYS)),
        }
    }

    fn insert(&mut self, place: usize, key: u64) {
        let is_locked = |other: &Transaction| other.keys.contains(&key);
        let others = self.open.iter().enumerate();
        let mut others = others.filter(|(other, _)| *other != place);
        if others.any(|(_, other)| is_locked(other)) {
            return;
        }
        let xid = match self.open[place].xid {
            Some(xid) => xid,
            None => self.take_xid(),
        };
        let versions = self.rows.iter();
        let versions = versions.filter(|row| row.key == key && row.end != End::Aborted);
        let row = Row {
            id: self.next_id,
            seq: self.next_seq,
            key,
            version: versions.map(|row| row.version).max().unwrap_or(0) + 1,
            xid,
            end: End::Open,
            written_lsn: self.log(xid),
            ended_lsn: u64::MAX,
        };
        self.next_id += 1;
        self.next_seq += 1;
        let transaction = &mut self.open[place];
        transaction.xid = Some(xid);
        transaction.keys.insert(key);
        transaction.rows.push(self.rows.len());
        self.rows.push(row);
    }

    fn end(&mut self, place: usize, end: End) {
        let transaction = self.open.swap_remove(place);
        let Some(xid) = transaction.xid else { return };
        let lsn = match transaction.rows.is_empty() {
            // It leaves nothing in the log.
            true => self.lsn,
            false => self.log(xid),
        };
        for row in transaction.rows {
            self.rows[row].end = end;
            self.rows[row].ended_lsn = lsn;
        }
        if end == End::Committed && !transaction.is_asynchronous {
            self.flush();
        }
    }

    pub(super) fn end_all(&mut self) {
        while !self.open.is_empty() {
            self.end(0, End::Committed);
        }
        self.flush();
    }

    /// kill -9 of the server: whatever was not flushed never happened, and its ids are assigned again.
    pub(super) fn crash(&mut self) {
        let flushed = self.flushed;
        self.open.clear();
        self.rows.retain(|row| row.written_lsn <= flushed);
        for row in &mut self.rows {
            if row.end == End::Open || row.ended_lsn > flushed {
                row.end = End::Aborted;
                row.ended_lsn = flushed;
            }
        }
        self.marks.retain(|_, lsn| *lsn <= flushed);
        self.seen_xids.retain(|_, lsn| *lsn <= flushed);
        let last = self.seen_xids.keys().last().copied();
        self.next_xid = last.map_or(10, |last| last + 1);
        self.lsn = flushed;
        self.session += 1;
    }

    /// Restores an earlier copy of the volume.
    pub(super) fn put_back(&mut self, copy: &Self) {
        let (session, durable) = (self.session, std::mem::take(&mut self.durable));
        let next_id = self.next_id;
        *self = copy.clone();
        self.crash();
        self.durable.extend(durable);
        self.session = session + 1;
        self.next_id = next_id;
        self.timeline += 1;
    }

    /// The outbox is dumped and restored into a new cluster, whose ids start again. Its rows keep the ids in their column.
    pub(super) fn move_to_new_cluster(&mut self) {
        self.crash();
        self.rows.retain(|row| row.end == End::Committed);
        self.system_identifier += 1;
        self.seen_xids.clear();
        self.next_xid = 10;
        // A sequence that was not restored.
        self.next_seq = 1;
        self.marks.clear();
    }

    fn snapshot(&self) -> Snapshot {
        let open = self.open.iter();
        Snapshot {
            xmax: self.next_xid,
            in_progress: open.filter_map(|transaction| transaction.xid).collect(),
        }
    }

    /// `open_outbox_window.sql`: the identity with the new snapshot, and the rows by seq.
    pub(super) fn open_window(&self, last: &str, mark: Option<Uuid>) -> (Identity, Vec<Row>) {
        let now = self.snapshot();
        let identity = Identity {
            in_recovery: false,
            system_identifier: self.system_identifier.to_string(),
            timeline: self.timeline,
            backend_pid: 1,
            has_mark: mark.is_none_or(|mark| self.marks.contains_key(&mark)),
            is_ahead: Snapshot::read(last).xmax > now.xmax,
            snapshot: now.text(),
            read_at: DateTime::UNIX_EPOCH,
        };
        let text = identity.snapshot.clone();
        (identity, self.window(last, &text, i64::MIN))
    }

    /// Rows that the later snapshot shows and the earlier does not, after a seq, by seq.
    pub(super) fn window(&self, since: &str, now: &str, after: i64) -> Vec<Row> {
        let (since, now) = (Snapshot::read(since), Snapshot::read(now));
        let is_new = |row: &&Row| {
            let is_straggler = since.in_progress.contains(&row.xid);
            (row.xid >= since.xmax || is_straggler && self.wrong != Some(Wrong::NoStragglers))
                && now.shows(row.xid)
        };
        let rows = self.rows.iter().filter(|row| row.end == End::Committed);
        let rows = rows.filter(is_new).filter(|row| row.seq > after);
        let mut rows: Vec<Row> = rows.cloned().collect();
        match self.wrong {
            Some(Wrong::OrderByXid) => rows.sort_by_key(|row| (row.xid, row.seq)),
            _ => rows.sort_by_key(|row| row.seq),
        }
        rows
    }

    pub(super) fn insert_mark(&mut self, mark: Uuid) {
        let xid = self.take_xid();
        let lsn = self.log(xid);
        self.marks.insert(mark, lsn);
        if self.wrong != Some(Wrong::MarkIsNotFlushed) {
            self.flush();
        }
    }

    /// `relay_restamp`: visible rows whose ids are not assigned yet get a current id.
    pub(super) fn restamp(&mut self) {
        let highest = self.rows.iter().map(|row| row.seq).max().unwrap_or(0);
        self.next_seq = self.next_seq.max(highest + 1);
        let now = self.snapshot();
        let is_odd = |row: &Row| row.end == End::Committed && !now.shows(row.xid);
        if self.rows.iter().any(is_odd) {
            let xid = self.take_xid();
            self.log(xid);
            for row in self.rows.iter_mut().filter(|row| is_odd(row)) {
                row.xid = xid;
            }
            self.flush();
        }
    }

    pub(super) fn committed(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.end == End::Committed)
    }
}

#[test]
fn a_snapshot_is_read_as_it_is_written() {
    let snapshot = Snapshot::read("12:20:12,15");
    assert_eq!(snapshot.text(), "12:20:12,15");
    assert!(snapshot.shows(11) && snapshot.shows(13) && !snapshot.shows(15) && !snapshot.shows(20));
    assert!(!Snapshot::read(NOTHING).shows(3));
}
