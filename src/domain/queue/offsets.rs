//! A set of offsets that costs about two bytes per offset, however many there are, and knows its length.

use roaring::RoaringTreemap;

/// Offsets, ascending. None is negative.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Offsets {
    set: RoaringTreemap,
    /// The set itself would count its parts each time.
    len: u64,
}

impl Offsets {
    /// Whether it is new.
    pub(super) fn insert(&mut self, offset: i64) -> bool {
        let is_new = self.set.insert(offset as u64);
        self.len += u64::from(is_new);
        is_new
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, offset: i64) -> bool {
        let was_there = self.set.remove(offset as u64);
        self.len -= u64::from(was_there);
        was_there
    }

    pub(super) fn contains(&self, offset: i64) -> bool {
        self.set.contains(offset as u64)
    }

    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn first(&self) -> Option<i64> {
        self.set.min().map(|offset| offset as i64)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = i64> + '_ {
        self.set.iter().map(|offset| offset as i64)
    }

    /// The offsets from `first` on.
    pub(super) fn iter_from(&self, first: i64) -> impl Iterator<Item = i64> + '_ {
        let mut iter = self.set.iter();
        iter.advance_to(first.max(0) as u64);
        iter.map(|offset| offset as i64)
    }

    /// The offsets up to `last`, as stored.
    pub(super) fn stored_through(&self, last: i64) -> RoaringTreemap {
        let mut set = self.set.clone();
        set.remove_range((last.max(0) as u64 + 1)..);
        set.optimize();
        set
    }

    /// The offsets from `first` to `last`, as stored.
    pub(super) fn stored_between(&self, first: i64, last: i64) -> RoaringTreemap {
        let last = last as u64;
        let from = self.iter_from(first).map(|offset| offset as u64);
        let between = from.take_while(|&offset| offset <= last);
        let mut set = RoaringTreemap::from_sorted_iter(between).expect("a set's walk ascends");
        // Runs take next to nothing then, and millions that wait for one key are runs.
        set.optimize();
        set
    }

    /// The offsets of another set that are not in this one.
    pub(super) fn missing_of(&self, other: &RoaringTreemap) -> RoaringTreemap {
        other - &self.set
    }
}

impl From<RoaringTreemap> for Offsets {
    fn from(set: RoaringTreemap) -> Self {
        let len = set.len();
        Self { set, len }
    }
}
