//! Assigns leases to live nodes, evenly, with as few moves as that takes.

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
    /// How much there is to do with it: of a slot, deliveries in a second, about. 0 when nobody has said.
    pub weight: u64,
}

/// Loads that are this close are even: rates of a moment say no more than that.
const EVEN: u64 = 100;
/// Exchanges at a time.
const EXCHANGES_MAX: usize = 4;

/// Gives each item to one of its nodes. What a node has, it keeps, unless another has two less of the kind and can hold
/// it: so among items that all nodes can hold the spread is one at most, and nothing moves that need not.
///
/// Weights say which of them move: those that leave the loads most even. They never say that more do; see [`even_out`] for that.
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
    let mut shares: Shares = all.map(|node| (node, Share::default())).collect();
    let mut assigned: BTreeMap<String, Node> = BTreeMap::new();
    for item in items {
        if let Some(&node) = before.get(&item.name)
            && item.nodes.contains(&node)
        {
            shares.entry(node).or_default().add(item);
            assigned.insert(item.name.clone(), node);
        }
    }
    let rank = |shares: &Shares, node: Node| {
        let Share { count, load } = share(shares, node);
        let total = totals.get(&node).copied().unwrap_or_default();
        (count, load, total, node)
    };
    let free = items
        .iter()
        .filter(|item| !assigned.contains_key(&item.name));
    let mut free: Vec<&&Item> = free.collect();
    // The heaviest first, since the others can make up for it.
    free.sort_by_key(|item| std::cmp::Reverse(item.weight));
    for item in free {
        let least = item.nodes.iter().min_by_key(|node| rank(&shares, **node));
        if let Some(&node) = least {
            shares.entry(node).or_default().add(item);
            assigned.insert(item.name.clone(), node);
        }
    }
    while let Some((item, from, to)) = next_move(items, &assigned, &shares) {
        shares.entry(from).or_default().take(item);
        shares.entry(to).or_default().add(item);
        assigned.insert(item.name.clone(), to);
    }
    assigned
}

/// A node's share of one kind of lease.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    count: usize,
    load: u64,
}

type Shares = BTreeMap<Node, Share>;

impl Share {
    fn add(&mut self, item: &Item) {
        self.count += 1;
        self.load += item.weight;
    }

    fn take(&mut self, item: &Item) {
        self.count -= 1;
        self.load -= item.weight;
    }
}

fn share(shares: &Shares, node: Node) -> Share {
    shares.get(&node).copied().unwrap_or_default()
}

/// A move from a node that has most to one that has two less at least. Each lowers the sum of the squares: they come to an
/// end.
fn next_move<'a>(
    items: &[&'a Item],
    assigned: &BTreeMap<String, Node>,
    shares: &Shares,
) -> Option<(&'a Item, Node, Node)> {
    let count = |node: Node| share(shares, node).count;
    let moves = items.iter().filter_map(|&item| {
        let from = *assigned.get(&item.name)?;
        let to = item.nodes.iter().copied();
        let to = to.min_by_key(|&node| (count(node), share(shares, node).load, node))?;
        (count(from) >= count(to) + 2).then_some((item, from, to))
    });
    // The largest gap first; of one node's items the one that leaves the loads most even, or else the last, so that low slots
    // stay where they are.
    moves.max_by_key(|(item, from, to)| {
        let left = gap_after(
            share(shares, *from).load,
            share(shares, *to).load,
            item.weight,
        );
        (
            count(*from) - count(*to),
            *from,
            std::cmp::Reverse((*to, left)),
            &item.name,
        )
    })
}

/// How far two loads are apart once `weight` of the first is the second's.
fn gap_after(from: u64, to: u64, weight: u64) -> u64 {
    from.saturating_sub(weight).abs_diff(to + weight)
}

/// Exchanges slots between the node that has most to do and the one that has least, one for one, while they are further apart than
/// half of a fair share: so that what is even in number is about even in load. A few at a time, and only exchanges that bring
/// them nearer: one slot that outweighs all others does not wander from node to node. Each exchange hands two slots over, so the
/// leader calls this once a minute, with weights of about as long.
#[must_use]
pub fn even_out(items: &[Item], assigned: &BTreeMap<String, Node>) -> BTreeMap<String, Node> {
    let mut assigned = assigned.clone();
    for _ in 0..EXCHANGES_MAX {
        let Some((one, other)) = next_exchange(items, &assigned) else {
            break;
        };
        let (from, to) = (assigned[&one.name], assigned[&other.name]);
        assigned.insert(one.name.clone(), to);
        assigned.insert(other.name.clone(), from);
    }
    assigned
}

fn next_exchange<'a>(
    items: &'a [Item],
    assigned: &BTreeMap<String, Node>,
) -> Option<(&'a Item, &'a Item)> {
    let slots = items.iter().filter(|item| item.name.starts_with("slot/"));
    let held = slots.filter_map(|item| Some((item, *assigned.get(&item.name)?)));
    let held: Vec<(&Item, Node)> = held.collect();
    let mut loads: BTreeMap<Node, u64> = BTreeMap::new();
    for (item, node) in &held {
        *loads.entry(*node).or_default() += item.weight;
    }
    let (&most, &high) = loads.iter().max_by_key(|(_, load)| **load)?;
    let (&least, &low) = loads.iter().min_by_key(|(_, load)| **load)?;
    let fair = loads.values().sum::<u64>() / loads.len() as u64;
    let gap = high - low;
    if gap <= EVEN.max(fair / 2) {
        return None;
    }
    let of = |node: Node| held.iter().filter(move |(_, at)| *at == node);
    let pairs = of(most).flat_map(|(one, _)| of(least).map(move |(other, _)| (*one, *other)));
    let pairs = pairs.filter(|(one, other)| {
        one.weight > other.weight && one.nodes.contains(&least) && other.nodes.contains(&most)
    });
    let left = |(one, other): &(&Item, &Item)| gap_after(high, low, one.weight - other.weight);
    let best = pairs.min_by_key(|pair| (left(pair), &pair.0.name, &pair.1.name))?;
    (left(&best) + EVEN <= gap).then_some(best)
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
                weight: 0,
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
            weight: 0,
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
            weight: 0,
        }));
        let assigned = assign(&items, &BTreeMap::new());
        assert_eq!(spread(&assigned, &nodes), 0);
    }

    fn weighed(nodes: &BTreeSet<Node>, weights: impl IntoIterator<Item = u64>) -> Vec<Item> {
        let mut slots = slots(nodes);
        for (slot, weight) in slots.iter_mut().zip(weights) {
            slot.weight = weight;
        }
        slots
    }

    fn loads(items: &[Item], assigned: &BTreeMap<String, Node>) -> Vec<u64> {
        let mut loads: BTreeMap<Node, u64> = BTreeMap::new();
        for item in items {
            *loads.entry(assigned[&item.name]).or_default() += item.weight;
        }
        loads.into_values().collect()
    }

    #[test]
    fn a_node_that_joins_gets_its_share_of_what_there_is_to_do() {
        let (one, two) = (BTreeSet::from([1]), BTreeSet::from([1, 2]));
        let alone = assign(&slots(&one), &BTreeMap::new());
        // The low half is busy: without a look at the weights all of it would stay with the first.
        let items = weighed(&two, [1_000; 32]);
        let both = assign(&items, &alone);
        assert_eq!((moves(&alone, &both), spread(&both, &two)), (32, 0));
        assert_eq!(loads(&items, &both), [16_000, 16_000]);
        // One that is heavier than all the others has a node that has little else to do.
        let items = weighed(&two, std::iter::once(5_000).chain([100; 63]));
        let fresh = assign(&items, &BTreeMap::new());
        assert_eq!(loads(&items, &fresh), [8_100, 3_200]);
    }

    #[test]
    fn loads_that_have_grown_apart_are_exchanged_for_others() {
        let two = BTreeSet::from([1, 2]);
        let before = assign(&slots(&two), &BTreeMap::new());
        let is_ones = |slot: i16| before[&Slot(slot).lease_name()] == 1;
        let busy = |weight| (0..SLOT_COUNT).map(move |slot| (slot, weight));
        let of_one = |weight| busy(weight).map(|(slot, weight)| weight * u64::from(is_ones(slot)));
        let items = weighed(&two, of_one(100));
        let mut now = before.clone();
        for _ in 0..10 {
            let next = even_out(&items, &now);
            assert!(moves(&now, &next) <= 2 * EXCHANGES_MAX);
            assert_eq!(spread(&next, &two), 0);
            now = next;
        }
        let (high, low) = (loads(&items, &now)[0], loads(&items, &now)[1]);
        assert!(high - low <= 3_200 / 4, "{high} and {low}");
        assert_eq!(even_out(&items, &now), now, "and that is all");
        assert_eq!(assign(&items, &now), now, "nor does anything else move it");
        // Not for a little, and not for one slot that is as heavy wherever it is.
        assert_eq!(even_out(&weighed(&two, of_one(3)), &before), before);
        let one = weighed(&two, [10_000]);
        assert_eq!(even_out(&one, &before), before);
    }

    proptest! {
        #[test]
        fn it_is_even_complete_sticky_and_moves_the_fewest(
            had in proptest::collection::vec(0i64..6, 64),
            now in proptest::collection::btree_set(0i64..8, 1..8),
            weights in proptest::collection::vec(0u64..1_000, 64),
        ) {
            let names = (0..SLOT_COUNT).map(|slot| Slot(slot).lease_name());
            let before: BTreeMap<String, Node> = names.zip(had).collect();
            let items = weighed(&now, weights);
            let after = assign(&items, &before);
            prop_assert_eq!(after.len(), 64);
            prop_assert!(after.values().all(|node| now.contains(node)));
            prop_assert!(spread(&after, &now) <= 1);
            prop_assert_eq!(moves(&before, &after), fewest(&before, &now));
            prop_assert_eq!(assign(&items, &after), after.clone());
            let evened = even_out(&items, &after);
            prop_assert!(spread(&evened, &now) <= 1);
            let apart = |loads: &[u64]| loads.iter().max().unwrap() - loads.iter().min().unwrap();
            prop_assert!(apart(&loads(&items, &evened)) <= apart(&loads(&items, &after)));
            prop_assert_eq!(assign(&items, &evened), evened.clone());
        }
    }
}
