//! The node's knowledge of all nodes, as of its last heartbeat, and its conclusions.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use crate::domain::assignment::{Item, Node};
use crate::domain::id::{Epoch, SLOT_COUNT, Slot};
use crate::store::cluster::{LeaseRow, NodeRow, Seen};

/// The lease of the node that says who is to hold what.
pub(super) const LEADER: &str = "leader";
/// Stands for all slots among what a node wants.
pub(super) const SLOTS: &str = "slot/*";

/// The standing of a node, as another node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It renews its row.
    Live,
    /// It does, and is about to end.
    Leaving,
    /// Its time is over. A node that takes one of its leases marks it dead.
    Expired,
}

/// A node that is not marked dead.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its row.
    pub row: NodeRow,
    /// Its standing.
    pub standing: Standing,
}

/// All nodes, leases and assignments at one moment.
#[derive(Debug, Clone)]
pub struct View {
    /// All of this was so then, or later.
    pub as_of: Instant,
    /// The database's clock.
    pub clock: DateTime<Utc>,
    /// This node.
    pub own: Node,
    /// The version of the catalogue of queues.
    pub queues_version: i64,
    /// Nodes by number.
    pub nodes: Vec<Member>,
    /// Leases by name.
    pub leases: BTreeMap<String, LeaseRow>,
    /// The assignment of leases to nodes.
    pub assigned: BTreeMap<String, Node>,
    /// Deliveries in a second out of each slot, about; empty when no node has said.
    pub loads: Vec<u64>,
}

/// The node that answers for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// This node, or it will in a moment.
    This,
    /// Another one.
    Other {
        /// Its number.
        node: Node,
        /// The URL at which it is reached.
        url: String,
        /// The epoch at which it holds the lease; that of somebody before it while it is about to take it.
        epoch: Epoch,
    },
    /// Nobody that lives, as far as it is known.
    Nobody,
}

impl View {
    /// Notes the contents of this node's heartbeat: its row was read as it was before.
    pub(super) fn note_own(&mut self, wants: &[String], is_leaving: bool) {
        let own = self.own;
        let nodes = self.nodes.iter_mut();
        for member in nodes.filter(|member| member.row.incarnation == own) {
            member.row.wants = wants.to_vec();
            member.row.is_leaving = is_leaving;
            member.standing = match is_leaving {
                true => Standing::Leaving,
                false => Standing::Live,
            };
        }
    }

    /// The node of a number, if it is not dead.
    #[must_use]
    pub fn node(&self, node: Node) -> Option<&Member> {
        self.nodes
            .iter()
            .find(|member| member.row.incarnation == node)
    }

    /// Whether a node can be counted on.
    #[must_use]
    pub fn is_live(&self, node: Node) -> bool {
        self.node(node)
            .is_some_and(|member| member.standing != Standing::Expired)
    }

    /// Whether there are nodes beside this one.
    #[must_use]
    pub fn has_peers(&self) -> bool {
        let mut nodes = self.nodes.iter();
        nodes.any(|member| {
            member.row.incarnation != self.own && member.standing != Standing::Expired
        })
    }

    /// Whether there are nodes beside this one that stay.
    pub(super) fn has_staying_peers(&self) -> bool {
        let mut nodes = self.nodes.iter();
        nodes.any(|member| member.row.incarnation != self.own && member.standing == Standing::Live)
    }

    /// The node that answers for a lease: the one that it is assigned to.
    #[must_use]
    pub fn owner(&self, lease: &str) -> Owner {
        let Some(&node) = self.assigned.get(lease) else {
            return Owner::Nobody;
        };
        if node == self.own {
            return Owner::This;
        }
        let member = self.node(node);
        match member.filter(|member| member.standing != Standing::Expired) {
            Some(member) => Owner::Other {
                node,
                url: member.row.url.clone(),
                epoch: self.leases.get(lease).map_or(Epoch(0), |lease| lease.epoch),
            },
            None => Owner::Nobody,
        }
    }

    /// The node that leads.
    #[must_use]
    pub fn leader(&self) -> Option<Node> {
        self.leases.get(LEADER).and_then(|lease| lease.holder)
    }

    /// Whether nobody who lives has the lease.
    pub(super) fn is_free(&self, lease: &str) -> bool {
        let holder = self.leases.get(lease).and_then(|lease| lease.holder);
        holder.is_none_or(|holder| holder == self.own || !self.is_live(holder))
    }

    /// The leases to hold, and the nodes that can hold them. A leaving node holds something only where no other node can.
    pub(super) fn items(&self) -> Vec<Item> {
        let live = self.nodes.iter();
        let live = live.filter(|member| member.standing != Standing::Expired);
        let live: Vec<&Member> = live.collect();
        let wanting = |lease: &str| -> BTreeSet<Node> {
            let wants = |member: &&&Member| member.row.wants.iter().any(|name| name == lease);
            let wanting: Vec<&Member> = live.iter().filter(wants).copied().collect();
            let staying = wanting.iter();
            let staying = staying.filter(|member| member.standing == Standing::Live);
            let staying: BTreeSet<Node> = staying.map(|member| member.row.incarnation).collect();
            match staying.is_empty() {
                true => wanting
                    .iter()
                    .map(|member| member.row.incarnation)
                    .collect(),
                false => staying,
            }
        };
        let of_slots = wanting(SLOTS);
        let slots = (0..SLOT_COUNT).map(|slot| Item {
            name: Slot(slot).lease_name(),
            nodes: of_slots.clone(),
            weight: self.loads.get(slot as usize).copied().unwrap_or_default(),
        });
        let names = live.iter().flat_map(|member| &member.row.wants);
        let names: BTreeSet<&String> = names.filter(|name| *name != SLOTS).collect();
        let others = names.into_iter().map(|name| Item {
            name: name.clone(),
            nodes: wanting(name),
            weight: 0,
        });
        slots.chain(others).collect()
    }
}

/// Watches nodes by this process's own clock.
///
/// The database's clock says when a node's time is over. If it jumped back, the rows of nodes that died before stay in its
/// future; so a row that was watched for the node's whole time to live, and did not change, is out of date, too.
///
/// An observer that could not look for a while judges nobody at first: if the database was away, it was for all, and whoever
/// is back first must not take what the others are about to go on with.
#[derive(Debug, Default)]
pub(super) struct Observer {
    rows: HashMap<Node, (DateTime<Utc>, Instant)>,
    blind_after: Duration,
    last_asked: Option<Instant>,
    /// The time since when it looks again, after it could not.
    back_since: Option<Instant>,
}

/// A look later than this after the one before means that there could be none between.
const BLIND: Duration = Duration::from_secs(1);
/// How long nobody is judged after that: others connect again within a second.
const BACK: Duration = Duration::from_secs(2);

impl Observer {
    /// One whose heartbeats come this often.
    pub(super) fn new(heartbeat: Duration) -> Self {
        Self {
            blind_after: heartbeat * 2 + BLIND,
            ..Self::default()
        }
    }

    /// How long nobody is judged from then on.
    fn lenience(&self, asked: Instant) -> Duration {
        self.back_since.map_or(Duration::ZERO, |since| {
            (since + BACK).saturating_duration_since(asked)
        })
    }

    /// Takes in what a heartbeat brought that was sent at the first moment and answered at the second.
    pub(super) fn view(
        &mut self,
        (asked, answered): (Instant, Instant),
        own: Node,
        seen: Seen,
    ) -> View {
        let before = self.last_asked.replace(asked);
        if before.is_some_and(|before| asked.saturating_duration_since(before) > self.blind_after) {
            self.back_since = Some(answered);
            self.rows.clear();
        }
        let is_lenient = !self.lenience(asked).is_zero();
        let mut rows = HashMap::new();
        let nodes = seen.nodes.into_iter().map(|row| {
            let since = match self.rows.get(&row.incarnation) {
                Some(&(expires_at, since)) if expires_at == row.expires_at => since,
                // Since the answer to the question at the earliest.
                _ => answered,
            };
            rows.insert(row.incarnation, (row.expires_at, since));
            let is_own = row.incarnation == own;
            let is_silent = asked.saturating_duration_since(since) >= ttl(&row);
            let standing = match row.is_leaving {
                _ if !is_own && !is_lenient && (row.expires_at < seen.clock || is_silent) => {
                    Standing::Expired
                }
                true => Standing::Leaving,
                false => Standing::Live,
            };
            Member { row, standing }
        });
        let nodes = nodes.collect();
        self.rows = rows;
        let leases = seen.leases.into_iter();
        View {
            as_of: asked,
            clock: seen.clock,
            own,
            queues_version: seen.queues_version,
            nodes,
            leases: leases.map(|lease| (lease.name.clone(), lease)).collect(),
            assigned: seen.assigned.into_iter().collect(),
            loads: seen.loads,
        }
    }

    /// The nodes that were watched for their whole time to live, with what their rows said all the while.
    pub(super) fn silent(&self, view: &View) -> Vec<(Node, DateTime<Utc>)> {
        let others = view
            .nodes
            .iter()
            .filter(|member| member.row.incarnation != view.own);
        let silent = others.filter_map(|member| {
            let &(expires_at, since) = self.rows.get(&member.row.incarnation)?;
            let is_silent = view.as_of.saturating_duration_since(since) >= ttl(&member.row);
            is_silent.then_some((member.row.incarnation, expires_at))
        });
        silent.collect()
    }

    /// How long from the view on until the time of some other node is over.
    pub(super) fn until_expiry(&self, view: &View) -> Option<Duration> {
        let others = view.nodes.iter().filter(|member| {
            member.row.incarnation != view.own && member.standing != Standing::Expired
        });
        let left = others.map(|member| {
            let by_clock = (member.row.expires_at - view.clock).to_std();
            let since = self.rows.get(&member.row.incarnation);
            let by_watching = since.map_or(Duration::MAX, |&(_, since)| {
                (since + ttl(&member.row)).saturating_duration_since(view.as_of)
            });
            let left = by_clock.unwrap_or_default().min(by_watching);
            left.max(self.lenience(view.as_of))
        });
        left.min()
    }
}

fn ttl(row: &NodeRow) -> Duration {
    Duration::try_from_secs_f64(row.ttl_seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn row(incarnation: Node, expires_at: DateTime<Utc>, wants: &[&str]) -> NodeRow {
        NodeRow {
            incarnation,
            address: format!("http://{incarnation}"),
            url: format!("http://{incarnation}"),
            started_at: DateTime::UNIX_EPOCH,
            expires_at,
            ttl_seconds: 10.0,
            wants: wants.iter().map(|&name| name.to_owned()).collect(),
            is_leaving: false,
        }
    }

    fn seen(clock: DateTime<Utc>, nodes: Vec<NodeRow>) -> Seen {
        Seen {
            is_renewed: true,
            clock,
            queues_version: 0,
            nodes,
            leases: vec![LeaseRow {
                name: "slot/00".to_owned(),
                epoch: Epoch(3),
                holder: Some(2),
                acquired_at: None,
            }],
            assigned: vec![("slot/00".to_owned(), 2), ("slot/01".to_owned(), 1)],
            loads: Vec::new(),
        }
    }

    #[test]
    fn the_databases_clock_judges_and_where_it_jumped_back_this_processs_own() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap();
        let mut observer = Observer::new(Duration::from_secs(60));
        let asked = Instant::now();
        let nodes = || vec![row(1, at(110), &[SLOTS]), row(2, at(109), &[SLOTS])];
        let view = observer.view((asked, asked), 1, seen(at(100), nodes()));
        assert!(view.is_live(2) && view.has_peers() && !view.is_free("slot/00"));
        assert_eq!(view.owner("slot/01"), Owner::This);
        assert!(matches!(
            view.owner("slot/00"),
            Owner::Other {
                node: 2,
                epoch: Epoch(3),
                ..
            }
        ));
        assert_eq!(view.owner("slot/02"), Owner::Nobody);
        assert!(observer.until_expiry(&view).unwrap() <= Duration::from_secs(9));
        assert!(observer.silent(&view).is_empty());
        // An hour back: its row lies in the future, and says nothing new.
        let before = observer.view(
            (
                asked + Duration::from_secs(9),
                asked + Duration::from_secs(9),
            ),
            1,
            seen(at(-3_000), nodes()),
        );
        assert!(before.is_live(2));
        let eleven = asked + Duration::from_secs(11);
        let later = observer.view((eleven, eleven), 1, seen(at(-2_998), nodes()));
        assert!(!later.is_live(2) && later.is_free("slot/00") && !later.has_peers());
        assert_eq!(later.owner("slot/00"), Owner::Nobody);
        assert_eq!(observer.silent(&later), [(2, at(109))]);
        // By the clock.
        let expired = observer.view((asked, asked), 1, seen(at(120), nodes()));
        assert!(
            !expired.is_live(2) && expired.is_live(1),
            "this node lives: it asks"
        );
    }

    #[test]
    fn after_an_outage_nobody_is_judged_at_first() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap();
        let after = |seconds| Duration::from_secs(seconds);
        let mut observer = Observer::new(after(1));
        let asked = Instant::now();
        let nodes = || vec![row(1, at(110), &[SLOTS]), row(2, at(109), &[SLOTS])];
        observer.view((asked, asked), 1, seen(at(100), nodes()));
        let back = observer.view(
            (asked + after(30), asked + after(30)),
            1,
            seen(at(130), nodes()),
        );
        assert!(back.is_live(2), "it cannot have been heard");
        assert!(observer.silent(&back).is_empty());
        let left = observer.until_expiry(&back).unwrap();
        assert!(left > after(1) && left <= BACK, "{left:?}");
        let later = observer.view(
            (asked + after(31), asked + after(31)),
            1,
            seen(at(131), nodes()),
        );
        assert!(later.is_live(2));
        let judged = observer.view(
            (asked + after(33), asked + after(33)),
            1,
            seen(at(133), nodes()),
        );
        assert!(!judged.is_live(2));
        // The first look of a process judges at once: what is out of date then has been for longer than it lives.
        let first = Observer::new(after(1)).view((asked, asked), 1, seen(at(130), nodes()));
        assert!(!first.is_live(2));
    }

    #[test]
    fn a_node_that_leaves_keeps_what_nobody_else_can_hold() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap();
        let mut leaving = row(2, at(200), &[SLOTS, "relay/1", "relay/2"]);
        leaving.is_leaving = true;
        let nodes = vec![row(1, at(200), &[SLOTS, "relay/1"]), leaving];
        let now = Instant::now();
        let mut seen = seen(at(100), nodes);
        seen.loads = vec![0, 7];
        let view = Observer::default().view((now, now), 1, seen);
        let items = view.items();
        let weight = |slot: usize| items[slot].weight;
        assert_eq!((weight(0), weight(1), weight(2)), (0, 7, 0));
        let of = |name: &str| items.iter().find(|item| item.name == name).unwrap();
        assert_eq!(items.len(), 66);
        assert_eq!(of("slot/63").nodes, BTreeSet::from([1]));
        assert_eq!(of("relay/1").nodes, BTreeSet::from([1]));
        assert_eq!(of("relay/2").nodes, BTreeSet::from([2]));
    }
}
