//! A relay's memory beyond its sessions. When an append is refused because of the contents of some row, the relay tries
//! again with half of its rows, until the row stands alone: then the row is listed as rejected, and the rows behind it go
//! on. After each append that passes, the next one takes twice as many rows.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::backlog::{Backlog, Effort};
use super::row;
use crate::store::origin::OutboxRow;
use crate::stream::Rejected;

/// Rows of a mapped table that are left where they are, since not even their text can be had.
const LEFT_MAX: usize = 1_000;

#[derive(Debug)]
pub(super) struct Caution {
    /// How much is asked of the origin at a time.
    pub(super) effort: Effort,
    /// The window that is relayed, as far as it is counted.
    pub(super) backlog: Option<Backlog>,
    /// The most rows in the next append; none is as many as usual.
    rows: Option<usize>,
    /// Rows that were refused alone.
    doomed: Option<Doomed>,
    /// Primary keys of rows that are left in their table.
    left: Vec<Vec<String>>,
}

#[derive(Debug)]
struct Doomed {
    copies: HashSet<String>,
    reason: String,
    /// The list did not take their copies either: they are listed by their numbers.
    is_bare: bool,
}

impl Caution {
    pub(super) fn new(manifest_rows: usize) -> Self {
        Self {
            effort: Effort::new(manifest_rows),
            backlog: None,
            rows: None,
            doomed: None,
            left: Vec::new(),
        }
    }

    /// Whether appends are of fewer rows than usual.
    pub(super) const fn is_active(&self) -> bool {
        self.rows.is_some()
    }

    /// The most rows of the next append.
    pub(super) fn page_rows(&self, usual: usize) -> usize {
        self.rows.map_or(usual, |rows| rows.min(usual))
    }

    /// Whether rows go one by one, so that a refusal concerns a single row.
    pub(super) fn is_single(&self) -> bool {
        self.rows == Some(1)
    }

    /// Notes a refused append of this many rows, with the rows' copies where they went alone. `keeps_rows`: the rows stay where
    /// they are when they are listed. Returns whether something is left to try.
    pub(super) fn refused(
        &mut self,
        count: usize,
        copies: Vec<String>,
        reason: String,
        keeps_rows: bool,
    ) -> bool {
        if !self.is_single() {
            self.rows = Some((count / 2).max(1));
            return count > 0;
        }
        let copies: HashSet<String> = copies.into_iter().collect();
        match &mut self.doomed {
            // Listed whole, they are refused again.
            Some(doomed) if copies.iter().all(|copy| doomed.copies.contains(copy)) => {
                let is_new = keeps_rows && !doomed.is_bare;
                doomed.is_bare = true;
                is_new
            }
            _ => {
                self.doomed = Some(Doomed {
                    copies,
                    reason,
                    is_bare: false,
                });
                count > 0
            }
        }
    }

    /// Takes note of an append that passed. Returns whether it was one of fewer rows than usual.
    pub(super) fn passed(&mut self, usual: usize) -> bool {
        self.doomed = None;
        let Some(rows) = self.rows else {
            return false;
        };
        self.rows = Some(rows.saturating_mul(2)).filter(|rows| *rows < usual);
        true
    }

    /// Parts rows from those that no append takes.
    pub(super) fn sort_out(&self, rows: Vec<OutboxRow>) -> (Vec<OutboxRow>, Vec<Rejected>) {
        let Some(doomed) = &self.doomed else {
            return (rows, Vec::new());
        };
        let mut passing = Vec::new();
        let mut rejected = Vec::new();
        for row in rows {
            let copy = row::copy(&row).to_string();
            if doomed.copies.contains(&copy) {
                rejected.push(Rejected {
                    seq: row.seq,
                    reason: format!("the stream refuses the row: {}", to_ascii(&doomed.reason)),
                    outbox_row: match doomed.is_bare {
                        // Every encoding has these letters.
                        false => to_ascii(&copy),
                        true => row::unread_copy(row.seq, None),
                    },
                });
            } else {
                passing.push(row);
            }
        }
        (passing, rejected)
    }

    pub(super) fn left(&self) -> &[Vec<String>] {
        &self.left
    }

    /// Leaves a row in its table. Returns false when there are too many already.
    pub(super) fn leave(&mut self, key: Vec<String>) -> bool {
        self.left.push(key);
        self.left.len() <= LEFT_MAX
    }
}

/// A JSON text with all that is not ASCII escaped: only its strings have any.
fn to_ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            text.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(text, "\\u{unit:04x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(seq: i64, key: &str) -> OutboxRow {
        OutboxRow {
            seq,
            key: Some(key.to_owned()),
            ..OutboxRow::default()
        }
    }

    #[test]
    fn pages_are_halved_until_the_row_is_found_and_doubled_after() {
        let mut caution = Caution::new(200_000);
        let rows: Vec<OutboxRow> = (0..100).map(|seq| row(seq, "k\u{e9}")).collect();
        let (mut at, mut appends, mut listed) = (0, 0, Vec::new());
        while at < rows.len() {
            let page = &rows[at..rows.len().min(at + caution.page_rows(64))];
            let (passing, rejected) = caution.sort_out(page.to_vec());
            appends += 1;
            if passing.iter().any(|row| row.seq == 37) {
                let copies = match caution.is_single() {
                    true => page.iter().map(|row| row::copy(row).to_string()).collect(),
                    false => Vec::new(),
                };
                assert!(caution.refused(page.len(), copies, "no".into(), true));
                continue;
            }
            listed.extend(rejected);
            caution.passed(64);
            at += page.len();
        }
        let [found] = &listed[..] else {
            panic!("{listed:?}");
        };
        assert_eq!(found.seq, 37);
        assert!(
            found.outbox_row.contains("k\\u00e9"),
            "{}",
            found.outbox_row
        );
        assert!(appends < 30, "{appends}");
        assert_eq!(caution.page_rows(64), 64);
    }

    #[test]
    fn a_row_that_cannot_be_listed_whole_is_listed_by_its_number_or_ends_it() {
        for (keeps_rows, expected) in [
            (true, [true, true, true, false]),
            (false, [true, true, false, false]),
        ] {
            let mut caution = Caution::new(200_000);
            let copies = vec![row::copy(&row(5, "k")).to_string()];
            let mut refuse = || caution.refused(1, copies.clone(), "no".into(), keeps_rows);
            assert_eq!([(); 4].map(|()| refuse()), expected);
            if keeps_rows {
                let (_, rejected) = caution.sort_out(vec![row(5, "k")]);
                assert!(!rejected[0].outbox_row.contains("key"));
            }
        }
    }
}
