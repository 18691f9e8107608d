//! Dead letters and redrives, as people ask for them.

use crate::domain::id::Offset;
use crate::domain::letter::Selection;
use crate::store::letter::Summary;

/// Most dead letters of a page.
pub const LETTERS_MAX: u32 = 1_000;

/// A filter on dead letters to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LetterFilter {
    /// The letters that match.
    pub selection: Selection,
    /// Only messages after this offset.
    pub after: Offset,
    /// At most this many, 1 to 1,000.
    pub limit: u32,
}

/// A page of dead letters.
#[derive(Debug, Clone, PartialEq)]
pub struct LetterPage {
    /// The letters, by offset.
    pub letters: Vec<Summary>,
    /// The start of the next page; None at the end. More may follow even when this page has few.
    pub next_after: Option<Offset>,
}

/// The findings of a dry run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DryRun {
    /// Letters that would come back.
    pub matching: u64,
    /// Matching letters, in a queue ordered by key, whose key has a later message that is already settled.
    pub late: u64,
}

/// The request for a redrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRedrive {
    /// Its name, 1 to 100 bytes: the same one again is the same redrive.
    pub id: String,
    /// The filter of the letters.
    pub selection: Selection,
    /// Letters per second, 1 to 10,000; as fast as the queue takes them without.
    pub rate_per_second: Option<u32>,
}
