//! Decides what a step does, by the stored position and by the result of opening the next window. No I/O: `window` carries
//! it out, and `simulation` runs it by seed over a server that forgets.

use uuid::Uuid;

use super::position::{NOTHING, Position};
use crate::store::origin::Identity;

/// The starting point of the next window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Since<'a> {
    /// The snapshot that it begins at.
    pub(super) snapshot: &'a str,
    /// The mark that must be there.
    pub(super) mark: Option<Uuid>,
    /// Rows are read with it. Those after a window that is not finished, or of an origin not seen before, are read later.
    pub(super) reads_rows: bool,
}

impl<'a> Since<'a> {
    /// `cursor`: a later snapshot, of this session alone, after which nothing was found.
    pub(super) fn of(position: Option<&'a Position>, cursor: Option<&'a str>) -> Self {
        match position {
            Some(position) => Self {
                snapshot: cursor.unwrap_or(&position.snapshot),
                mark: position.mark,
                reads_rows: position.window.is_none(),
            },
            None => Self {
                snapshot: NOTHING,
                mark: None,
                reads_rows: false,
            },
        }
    }
}

/// The next act after opening a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The broker's database is older than the last emptied rows: all of the outbox is read again, and messages may be missing.
    Gap,
    /// All of the outbox is read again, and why.
    Rerelay(&'static str),
    /// The position's window is gone on with.
    Resume,
    /// Nothing is there.
    Rest,
    /// The rows are appended.
    Append,
    /// There are too many for one append: they are read by their places.
    Large,
}

impl Next {
    /// `number` is the stored position's and `emptied` the one up to which rows have left the outbox; `rows` how many came, and
    /// whether they are all.
    pub(super) fn of(
        position: Option<&Position>,
        (number, emptied): (i64, i64),
        identity: &Identity,
        (rows, is_whole): (usize, bool),
    ) -> Self {
        if number < emptied {
            return Self::Gap;
        }
        let Some(position) = position else {
            return Self::Rerelay("its outbox has never been relayed");
        };
        if let Some(why) = went_back(position, identity) {
            return Self::Rerelay(why);
        }
        match (position.window.is_some(), rows, is_whole) {
            (true, ..) => Self::Resume,
            (false, 0, _) => Self::Rest,
            (false, _, true) => Self::Append,
            (false, _, false) => Self::Large,
        }
    }
}

/// The reason why the position is not in this origin's past, if it is not.
pub(super) fn went_back(position: &Position, identity: &Identity) -> Option<&'static str> {
    if position.system_identifier != identity.system_identifier {
        Some("it is a different Postgres cluster than before")
    } else if !identity.has_mark {
        Some("the mark of the last position is missing there")
    } else if identity.is_ahead {
        Some("the last position is ahead of it")
    } else {
        None
    }
}

/// Up to which seq a window is passed once a page of a chunk is appended, whose last seq is `page`; None is all of it.
pub(super) fn passed_through(
    page: i64,
    is_last_page: bool,
    chunk: i64,
    is_last_chunk: bool,
) -> Option<i64> {
    match (is_last_page, is_last_chunk) {
        (true, true) => None,
        (true, false) => Some(chunk),
        (false, _) => Some(page),
    }
}

/// Takes the last seq off a full chunk: a row with the same one (nobody may write it, but nothing forbids it) can lie
/// beyond the limit, and the position inside a window is a seq.
pub(super) fn leave_last_seq<T>(chunk: &mut Vec<T>, seq: impl Fn(&T) -> i64) {
    let Some(last) = chunk.last().map(&seq) else {
        return;
    };
    let kept = chunk.partition_point(|item| seq(item) < last);
    // All of one seq: cutting it is the only way on.
    if kept > 0 {
        chunk.truncate(kept);
    }
}

/// The number of the position after the stored one. It lies beyond the emptied rows, so that a broker restored from a backup
/// goes through a gap only once.
pub(super) fn next_number(number: i64, emptied: i64) -> i64 {
    number.max(emptied) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_chunk_leaves_its_last_seq() {
        let check = |seqs: &[i64], left: &[i64]| {
            let mut chunk = seqs.to_vec();
            leave_last_seq(&mut chunk, |seq| *seq);
            assert_eq!(chunk, left);
        };
        check(&[], &[]);
        check(&[1, 2, 3], &[1, 2]);
        check(&[1, 2, 3, 3], &[1, 2]);
        check(&[3, 3], &[3, 3]);
    }
}
