//! Postgres' snapshots as texts, and the places that can hold rows between two of them.

/// Ids in progress that a window is cut around. More are looked at, and left out row by row.
const CUTS_MAX: usize = 64;

/// A snapshot of Postgres' type pg_snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    xmin: i64,
    xmax: i64,
    /// In progress, in order.
    held: Vec<i64>,
}

impl Snapshot {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ':');
        let xmin = parts.next()?.parse().ok()?;
        let xmax = parts.next()?.parse().ok()?;
        let held = parts.next()?.split(',').filter(|id| !id.is_empty());
        let mut held: Vec<i64> = held.map(str::parse).collect::<Result<_, _>>().ok()?;
        held.sort_unstable();
        Some(Self { xmin, xmax, held })
    }

    pub(super) fn shows(&self, id: i64) -> bool {
        id < self.xmin || (id < self.xmax && self.held.binary_search(&id).is_err())
    }

    /// Spans of ids, first and last, in order and apart, that have all that this snapshot shows and `since` does not; and few others.
    pub(super) fn spans_since(&self, since: &Self) -> Vec<(i64, i64)> {
        // Transactions that were in progress then and have ended: each alone, since all around it was passed.
        let stragglers = since.held.iter().filter(|id| self.shows(**id));
        let mut spans: Vec<(i64, i64)> = stragglers.map(|id| (*id, *id)).collect();
        let mut from = since.xmax;
        for id in self
            .held
            .iter()
            .filter(|id| **id >= since.xmax)
            .take(CUTS_MAX)
        {
            if from < *id {
                spans.push((from, id - 1));
            }
            from = id + 1;
        }
        if from < self.xmax {
            spans.push((from, self.xmax - 1));
        }
        spans
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn spans_have_all_that_is_new_and_little_else() {
        for (since, now, expected) in [
            ("3:3:", "10:10:", vec![(3, 9)]),
            ("3:3:", "5:10:5,7", vec![(3, 4), (6, 6), (8, 9)]),
            ("5:10:5,7", "7:12:7,11", vec![(5, 5), (10, 10)]),
            ("5:10:5,7", "5:10:5,7", vec![]),
            ("5:10:5,7", "12:12:", vec![(5, 5), (7, 7), (10, 11)]),
        ] {
            let (old, new) = (
                Snapshot::parse(since).unwrap(),
                Snapshot::parse(now).unwrap(),
            );
            let spans = new.spans_since(&old);
            assert_eq!(spans, expected, "{since} {now}");
            for id in 3..12 {
                let is_new = new.shows(id) && !old.shows(id);
                let is_in = spans.iter().any(|(low, high)| (*low..=*high).contains(&id));
                assert!(is_in || !is_new, "{id} of {since} {now}");
            }
        }
        assert_eq!(Snapshot::parse("3:x:"), None);
    }

    #[test]
    fn very_many_that_are_held_are_not_all_cut_around() {
        let held: Vec<String> = (100..1_000).map(|id| (id * 2).to_string()).collect();
        let now = Snapshot::parse(&format!("200:2000:{}", held.join(","))).unwrap();
        let spans = now.spans_since(&Snapshot::parse("3:3:").unwrap());
        assert!(spans.len() <= CUTS_MAX + 1);
        assert_eq!(spans.last(), Some(&(327, 1_999)));
    }
}
