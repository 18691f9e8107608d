//! Recently scanned pages, without payloads, for queues that look at the same place a little later. The log does not
//! change, so a page stays true; it is kept as long as somebody uses it, and all pages together are bounded.

use std::time::Duration;

use tokio::time::Instant;

use crate::domain::id::{Offset, StreamId};
use crate::domain::name::TopicPattern;
use crate::stream::{Scan, ScanItem, Scanned};

/// Items of all pages: some 10 MB.
const ITEMS_MAX: usize = 100_000;
/// Pages, however small.
const PAGES_MAX: usize = 200;
/// A page that nobody used for so long is forgotten.
const UNUSED: Duration = Duration::from_secs(20);
/// When this many pages of other topics are of one place, the next scan there is of all topics.
const INTERESTED: usize = 3;

/// A part of a stream, as one scan has found it.
#[derive(Debug)]
pub(super) struct Page {
    stream: StreamId,
    after: Offset,
    through: Offset,
    /// Empty for all topics.
    topics: Vec<TopicPattern>,
    items: Vec<ScanItem>,
    used: Instant,
}

impl Page {
    pub(super) fn items(&self) -> &[ScanItem] {
        &self.items
    }

    /// All up to here was looked at.
    pub(super) fn through(&self) -> Offset {
        self.through
    }

    fn is_of(&self, scan: &Scan) -> bool {
        self.stream == scan.stream && self.after <= scan.after && scan.after < self.through
    }

    fn has_topics(&self, wanted: &[TopicPattern]) -> bool {
        let has = |pattern: &TopicPattern| self.topics.contains(pattern);
        self.topics.is_empty() || !wanted.is_empty() && wanted.iter().all(has)
    }
}

/// The pages that are kept.
#[derive(Debug, Default)]
pub(super) struct Pages {
    pages: Vec<Page>,
    items: usize,
}

impl Pages {
    /// The page that answers the scan, at least a part of it.
    pub(super) fn find(&mut self, scan: &Scan) -> Option<&Page> {
        let fits = |page: &Page| page.is_of(scan) && page.has_topics(&scan.topics);
        let found = self.pages.iter_mut().filter(|page| fits(page));
        let page = found.max_by_key(|page| page.through)?;
        page.used = Instant::now();
        Some(page)
    }

    /// Whether enough queues have looked here for other topics that it is better to look for all.
    pub(super) fn are_many_interested(&self, scan: &Scan) -> bool {
        let of_here = self.pages.iter().filter(|page| page.is_of(scan));
        of_here.count() >= INTERESTED
    }

    /// Keeps what a scan found. A page of all topics takes the place of those that it covers.
    pub(super) fn keep(&mut self, scan: &Scan, scanned: &Scanned) {
        if scanned.through <= scan.after || scanned.items.len() > ITEMS_MAX {
            return;
        }
        let page = Page {
            stream: scan.stream,
            after: scan.after,
            through: scanned.through,
            topics: scan.topics.clone(),
            items: scanned.items.clone(),
            used: Instant::now(),
        };
        let is_covered = |old: &Page| {
            old.stream == page.stream
                && page.after <= old.after
                && old.through <= page.through
                && (page.topics.is_empty() || old.topics == page.topics)
        };
        self.pages.retain(|old| !is_covered(old));
        self.pages.push(page);
        self.items = self.pages.iter().map(|page| page.items.len()).sum();
        while self.items > ITEMS_MAX || self.pages.len() > PAGES_MAX {
            let oldest = self.pages.iter().enumerate();
            let Some((place, _)) = oldest.min_by_key(|(_, page)| page.used) else {
                break;
            };
            self.items -= self.pages.swap_remove(place).items.len();
        }
    }

    /// The time to look for unused pages; far away without pages.
    pub(super) fn forget_at(&self) -> Instant {
        let oldest = self.pages.iter().map(|page| page.used).min();
        oldest.map_or_else(|| Instant::now() + 180 * UNUSED, |used| used + UNUSED)
    }

    pub(super) fn forget_unused(&mut self) {
        self.pages.retain(|page| page.used.elapsed() < UNUSED);
        self.items = self.pages.iter().map(|page| page.items.len()).sum();
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::domain::message::Priority;
    use crate::domain::name::Topic;

    fn scan(after: i64, topics: &[&str]) -> Scan {
        Scan {
            stream: StreamId(1),
            after: Offset(after),
            topics: topics
                .iter()
                .map(|text| TopicPattern::parse(text).unwrap())
                .collect(),
            max_items: 10,
        }
    }

    fn scanned(after: i64, through: i64, step: usize) -> Scanned {
        let item = |offset| ScanItem {
            offset: Offset(offset),
            topic: Topic::parse("a").unwrap(),
            key_hash: None,
            priority: Priority::default(),
            bytes: 1,
        };
        Scanned {
            items: (after + 1..=through).step_by(step).map(item).collect(),
            through: Offset(through),
        }
    }

    #[test]
    fn a_page_answers_who_looks_into_it_for_its_topics() {
        let mut pages = Pages::default();
        pages.keep(&scan(100, &["a", "b"]), &scanned(100, 200, 1));
        for (after, topics, is_found) in [
            (100, &["a"][..], true),
            (199, &["b", "a"], true),
            (200, &["a"], false),
            (99, &["a"], false),
            (150, &["a", "c"], false),
            (150, &[], false),
        ] {
            let found = pages.find(&scan(after, topics)).is_some();
            assert_eq!(found, is_found, "{after} {topics:?}");
        }
        // Nothing was found further on: that is no page.
        pages.keep(&scan(200, &["a"]), &scanned(200, 200, 1));
        assert!(pages.find(&scan(200, &["a"])).is_none());
        pages.keep(&scan(50, &[]), &scanned(50, 300, 1));
        assert_eq!(pages.pages.len(), 1, "it covers the former one");
        let found = pages.find(&scan(150, &["a", "c"])).unwrap();
        assert_eq!(found.through(), Offset(300));
    }

    #[test]
    fn many_that_look_at_one_place_are_noticed() {
        let mut pages = Pages::default();
        for topic in ["a", "b", "c"] {
            assert!(!pages.are_many_interested(&scan(0, &["x"])));
            pages.keep(&scan(0, &[topic]), &scanned(0, 100, 10));
        }
        assert!(pages.are_many_interested(&scan(50, &["x"])));
        assert!(!pages.are_many_interested(&scan(100, &["x"])));
    }

    #[test]
    fn pages_are_bounded_and_the_unused_go_first() {
        let mut pages = Pages::default();
        for number in 0..6 {
            let after = number * 25_000;
            pages.keep(&scan(after, &["a"]), &scanned(after, after + 25_000, 1));
            assert!(pages.find(&scan(0, &["a"])).is_some(), "used all the time");
        }
        assert!(pages.items <= ITEMS_MAX);
        assert!(pages.find(&scan(25_000, &["a"])).is_none());
        for number in 0..400 {
            let after = 1_000_000 + number;
            pages.keep(&scan(after, &["a"]), &scanned(after, after + 1, 1));
        }
        assert!(pages.pages.len() <= PAGES_MAX);
        pages.keep(&scan(0, &["a"]), &scanned(0, 200_000, 1));
        assert!(
            pages.items <= ITEMS_MAX,
            "one that is too large is not kept"
        );
    }
}
