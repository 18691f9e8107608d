//! Who is to hold what: leases over live nodes, evenly, with as few moves as that takes.

use std::collections::{BTreeMap, BTreeSet};

/// A node by its incarnation.
pub type Node = i64;

/// A lease, and the nodes that can hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its name, `slot/07`.
    pub name: String,
    /// Live nodes that want it. With none it is nobody's.
    pub nodes: BTreeSet<Node>,
}

/// Gives each item to one of its nodes. What a node has, it keeps, unless another has two less of the kind and can hold
/// it: so among items that all nodes can hold the spread is one at most, and nothing moves that need not.
///
/// Slots are one kind and everything else is another: a node that has more slots than others by one does not have fewer
/// relays for it.
#[must_use]
pub fn assign(items: &[Item], before: &BTreeMap<String, Node>) -> BTreeMap<String, Node> {
    let mut assigned = BTreeMap::new();
    // Who has one more of a kind is the first to go without in the next.
    let mut totals: BTreeMap<Node, usize> = BTreeMap::new();
    for is_slot in [true, false] {
        let kind = items
            .iter()
            .filter(|item| item.name.starts_with("slot/") == is_slot);
        let mut kind: Vec<&Item> = kind.collect();
        kind.sort_by(|a, b| a.name.cmp(&b.name));
        for (name, node) in assign_kind(&kind, before, &totals) {
            *totals.entry(node).or_default() += 1;
            assigned.insert(name, node);
        }
    }
    assigned
}

fn assign_kind(
    items: &[&Item],
    before: &BTreeMap<String, Node>,
    totals: &BTreeMap<Node, usize>,
) -> BTreeMap<String, Node> {
    let all = items.iter().flat_map(|item| item.nodes.iter().copied());
    let mut counts: BTreeMap<Node, usize> = all.map(|node| (node, 0)).collect();
    let mut assigned: BTreeMap<String, Node> = BTreeMap::new();
    for item in items {
        if let Some(&node) = before.get(&item.name)
            && item.nodes.contains(&node)
        {
            *counts.entry(node).or_default() += 1;
            assigned.insert(item.name.clone(), node);
        }
    }
    let rank = |counts: &BTreeMap<Node, usize>, node: Node| {
        let count = counts.get(&node).copied().unwrap_or_default();
        (count, totals.get(&node).copied().unwrap_or_default(), node)
    };
    for item in items {
        if assigned.contains_key(&item.name) {
            continue;
        }
        let least = item.nodes.iter().min_by_key(|node| rank(&counts, **node));
        if let Some(&node) = least {
            *counts.entry(node).or_default() += 1;
            assigned.insert(item.name.clone(), node);
        }
    }
    while let Some((name, from, to)) = next_move(items, &assigned, &counts) {
        *counts.entry(from).or_default() -= 1;
        *counts.entry(to).or_default() += 1;
        assigned.insert(name, to);
    }
    assigned
}

/// A move from a node that has most to one that has two less at least. Each lowers the sum of the squares: they come to an
/// end.
fn next_move(
    items: &[&Item],
    assigned: &BTreeMap<String, Node>,
    counts: &BTreeMap<Node, usize>,
) -> Option<(String, Node, Node)> {
    let count = |node: Node| counts.get(&node).copied().unwrap_or_default();
    let moves = items.iter().filter_map(|item| {
        let from = *assigned.get(&item.name)?;
        let to = item.nodes.iter().copied();
        let to = to.min_by_key(|&node| (count(node), node))?;
        (count(from) >= count(to) + 2).then_some((item, from, to))
    });
    // The largest gap first; of one node's items the last, so that low slots stay where they are.
    let (item, from, to) = moves.max_by_key(|(item, from, to)| {
        (
            count(*from) - count(*to),
            *from,
            std::cmp::Reverse(*to),
            &item.name,
        )
    })?;
    Some((item.name.clone(), from, to))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::id::{SLOT_COUNT, Slot};

    fn slots(nodes: &BTreeSet<Node>) -> Vec<Item> {
        let names = (0..SLOT_COUNT).map(|slot| Slot(slot).lease_name());
        names
            .map(|name| Item {
                name,
                nodes: nodes.clone(),
            })
            .collect()
    }

    fn counts(assigned: &BTreeMap<String, Node>, nodes: &BTreeSet<Node>) -> BTreeMap<Node, usize> {
        let of = |node: Node| assigned.values().filter(|&&at| at == node).count();
        nodes.iter().map(|&node| (node, of(node))).collect()
    }

    fn spread(assigned: &BTreeMap<String, Node>, nodes: &BTreeSet<Node>) -> usize {
        let counts = counts(assigned, nodes);
        counts.values().max().unwrap() - counts.values().min().unwrap()
    }

    fn moves(before: &BTreeMap<String, Node>, after: &BTreeMap<String, Node>) -> usize {
        let moved = |(name, node): (&String, &Node)| before.get(name).is_some_and(|at| at != node);
        after.iter().filter(|&entry| moved(entry)).count()
    }

    /// The fewest moves that even shares take: what is with nodes that are gone, and what the others have beyond their
    /// shares, of which the largest go to those that have most.
    fn fewest(before: &BTreeMap<String, Node>, nodes: &BTreeSet<Node>) -> usize {
        let mut counts: Vec<usize> = counts(before, nodes).into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let (share, rest) = (before.len() / nodes.len(), before.len() % nodes.len());
        let kept = counts.iter().enumerate();
        let kept = kept.map(|(place, &count)| count.min(share + usize::from(place < rest)));
        before.len() - kept.sum::<usize>()
    }

    #[test]
    fn a_join_and_a_leave_move_no_more_than_they_must() {
        let (one, two) = (BTreeSet::from([1]), BTreeSet::from([1, 2]));
        let three = BTreeSet::from([1, 2, 3]);
        let alone = assign(&slots(&one), &BTreeMap::new());
        assert!(alone.len() == 64 && alone.values().all(|&node| node == 1));
        let both = assign(&slots(&two), &alone);
        assert_eq!((moves(&alone, &both), spread(&both, &two)), (32, 0));
        let all = assign(&slots(&three), &both);
        assert_eq!((moves(&both, &all), spread(&all, &three)), (21, 1));
        assert!(
            all.iter()
                .all(|(name, &node)| node == 3 || both[name] == node)
        );
        let without = BTreeSet::from([2, 3]);
        let left = assign(&slots(&without), &all);
        assert_eq!(spread(&left, &without), 0);
        assert_eq!(
            moves(&all, &left),
            all.values().filter(|&&n| n == 1).count()
        );
    }

    #[test]
    fn what_only_some_can_hold_is_shared_by_those() {
        let item = |name: &str, nodes: &[Node]| Item {
            name: name.to_owned(),
            nodes: nodes.iter().copied().collect(),
        };
        let items = [
            item("duty/a", &[1, 2]),
            item("duty/b", &[1, 2]),
            item("relay/1", &[2]),
            item("relay/2", &[2]),
            item("relay/3", &[]),
        ];
        let assigned = assign(&items, &BTreeMap::new());
        assert_eq!(assigned.len(), 4);
        assert_eq!((assigned["duty/a"], assigned["duty/b"]), (1, 1));
        assert_eq!((assigned["relay/1"], assigned["relay/2"]), (2, 2));
    }

    #[test]
    fn one_slot_more_is_one_relay_less() {
        let nodes = BTreeSet::from([1, 2, 3]);
        let mut items = slots(&nodes);
        let relays = ["relay/1", "relay/2"];
        items.extend(relays.map(|name| Item {
            name: name.to_owned(),
            nodes: nodes.clone(),
        }));
        let assigned = assign(&items, &BTreeMap::new());
        assert_eq!(spread(&assigned, &nodes), 0);
    }

    proptest! {
        #[test]
        fn it_is_even_complete_sticky_and_moves_the_fewest(
            had in proptest::collection::vec(0i64..6, 64),
            now in proptest::collection::btree_set(0i64..8, 1..8),
        ) {
            let names = (0..SLOT_COUNT).map(|slot| Slot(slot).lease_name());
            let before: BTreeMap<String, Node> = names.zip(had).collect();
            let after = assign(&slots(&now), &before);
            prop_assert_eq!(after.len(), 64);
            prop_assert!(after.values().all(|node| now.contains(node)));
            prop_assert!(spread(&after, &now) <= 1);
            prop_assert_eq!(moves(&before, &after), fewest(&before, &now));
            prop_assert_eq!(assign(&slots(&now), &after), after.clone());
        }
    }
}
