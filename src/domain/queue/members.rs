//! The unsettled messages of one key, by offset: a few of them for most keys, millions for some.

use std::collections::VecDeque;

use roaring::RoaringTreemap;

/// A key with more members than this keeps them as a bitmap.
const FEW_MAX: usize = 1_024;

/// Offsets, ascending. They come at the end and go at the beginning, mostly.
#[derive(Debug, Clone)]
pub(super) enum Members {
    /// Most keys have one, which takes no allocation.
    One(i64),
    Few(VecDeque<i64>),
    Many(RoaringTreemap),
}

impl Default for Members {
    fn default() -> Self {
        Self::Few(VecDeque::new())
    }
}

impl Members {
    pub(super) fn insert(&mut self, offset: i64) {
        match self {
            Self::One(one) if *one == offset => {}
            Self::One(one) => {
                let (low, high) = (offset.min(*one), offset.max(*one));
                *self = Self::Few(VecDeque::from([low, high]));
            }
            Self::Few(few) if few.is_empty() => *self = Self::One(offset),
            Self::Few(few) => {
                let last = few.back().copied();
                if last.is_some_and(|last| last < offset) {
                    few.push_back(offset);
                } else if let Err(place) = few.binary_search(&offset) {
                    few.insert(place, offset);
                }
                if few.len() > FEW_MAX {
                    *self = Self::Many(few.iter().map(|&offset| offset as u64).collect());
                }
            }
            Self::Many(many) => {
                many.insert(offset as u64);
            }
        }
    }

    pub(super) fn remove(&mut self, offset: i64) {
        match self {
            Self::One(one) if *one == offset => *self = Self::default(),
            Self::One(_) => {}
            Self::Few(few) => {
                if few.front() == Some(&offset) {
                    few.pop_front();
                } else if let Ok(place) = few.binary_search(&offset) {
                    few.remove(place);
                }
            }
            Self::Many(many) => {
                many.remove(offset as u64);
            }
        }
    }

    /// Takes out all that are in `gone`. Whether there were any.
    pub(super) fn remove_all(&mut self, gone: &RoaringTreemap) -> bool {
        let before = self.len();
        match self {
            Self::One(one) if gone.contains(*one as u64) => *self = Self::default(),
            Self::One(_) => {}
            Self::Few(few) => few.retain(|&offset| !gone.contains(offset as u64)),
            Self::Many(many) => *many -= gone,
        }
        self.len() < before
    }

    pub(super) fn contains(&self, offset: i64) -> bool {
        match self {
            Self::One(one) => *one == offset,
            Self::Few(few) => few.binary_search(&offset).is_ok(),
            Self::Many(many) => many.contains(offset as u64),
        }
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Self::One(_) => 1,
            Self::Few(few) => few.len() as u64,
            Self::Many(many) => many.len(),
        }
    }

    pub(super) fn first(&self) -> Option<i64> {
        match self {
            Self::One(one) => Some(*one),
            Self::Few(few) => few.front().copied(),
            Self::Many(many) => many.min().map(|offset| offset as i64),
        }
    }

    /// The lowest at or after an offset.
    pub(super) fn first_from(&self, offset: i64) -> Option<i64> {
        match self {
            Self::One(one) => (*one >= offset).then_some(*one),
            Self::Few(few) => few
                .get(few.partition_point(|&other| other < offset))
                .copied(),
            Self::Many(many) => {
                let mut iter = many.iter();
                iter.advance_to(offset.max(0) as u64);
                iter.next().map(|offset| offset as i64)
            }
        }
    }

    pub(super) fn iter(&self) -> Box<dyn Iterator<Item = i64> + '_> {
        match self {
            Self::One(one) => Box::new(std::iter::once(*one)),
            Self::Few(few) => Box::new(few.iter().copied()),
            Self::Many(many) => Box::new(many.iter().map(|offset| offset as i64)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn they_are_a_set(steps in proptest::collection::vec((0..3_000i64, 0..5u8), 0..200), wide: bool) {
            let mut members = Members::default();
            let mut plain = BTreeSet::new();
            if wide {
                for offset in 0..1_100 {
                    members.insert(offset * 2);
                    plain.insert(offset * 2);
                }
            }
            for (offset, act) in steps {
                match act {
                    0 => { members.remove(offset); plain.remove(&offset); }
                    1 => {
                        let gone = [offset as u64, offset as u64 + 2].into_iter().collect();
                        let before = plain.len();
                        plain.retain(|&other| other != offset && other != offset + 2);
                        prop_assert_eq!(members.remove_all(&gone), plain.len() < before);
                    }
                    _ => { members.insert(offset); plain.insert(offset); }
                }
                prop_assert_eq!(members.contains(offset), plain.contains(&offset));
                prop_assert_eq!(members.first(), plain.first().copied());
                prop_assert_eq!(members.first_from(offset + 1), plain.range(offset + 1..).next().copied());
            }
            prop_assert_eq!(members.len(), plain.len() as u64);
            prop_assert_eq!(members.iter().collect::<Vec<_>>(), plain.into_iter().collect::<Vec<_>>());
        }
    }
}
