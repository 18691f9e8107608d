//! Dead letters and redrives, as people ask for them.

use crate::domain::id::Offset;
use crate::domain::letter::Selection;
use crate::store::letter::Summary;

/// Most dead letters of a page.
pub const LETTERS_MAX: u32 = 1_000;

/// Which dead letters to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LetterFilter {
    /// Those that fit.
    pub selection: Selection,
    /// Of offsets after this one.
    pub after: Offset,
    /// At most this many, 1 to 1,000.
    pub limit: u32,
}

/// A page of dead letters.
#[derive(Debug, Clone, PartialEq)]
pub struct LetterPage {
    /// The letters, by offset.
    pub letters: Vec<Summary>,
    /// Where the next page starts; None at the end. There may be more even when this page has few.
    pub next_after: Option<Offset>,
}

/// What a dry run found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DryRun {
    /// Letters that would come back.
    pub matching: u64,
    /// Of these, in a queue ordered by key: a later message of their key is settled already.
    pub late: u64,
}

/// What is asked of a redrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRedrive {
    /// Its name, 1 to 100 bytes: the same one again is the same redrive.
    pub id: String,
    /// Which letters.
    pub selection: Selection,
    /// Letters per second, 1 to 10,000; as fast as the queue takes them without.
    pub rate_per_second: Option<u32>,
}
