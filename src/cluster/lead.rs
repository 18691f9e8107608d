//! The leader's work: it assigns leases whenever the nodes, or the leases there are, have changed. It keeps no state except
//! what is stored, so any node can take over.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::domain::assignment::{Node, assign, even_out};
use crate::domain::id::Fence;
use crate::store::{self, Connection};

use super::Shared;
use super::view::{LEADER, Observer, View};

/// How often loads are looked at: nodes tell them every few seconds, and each is of about a minute.
pub(super) const EVEN_OUT_EVERY: Duration = Duration::from_secs(60);

/// The leader, as a node sees it.
pub(super) enum Lead {
    /// It, at this epoch.
    Held(Fence),
    /// It, if it takes the lease.
    Free,
    /// Somebody else.
    Others,
}

impl Lead {
    pub(super) fn of(view: &View, is_leaving: bool) -> Self {
        let leading = view.leases.get(LEADER);
        match leading.filter(|lease| lease.holder == Some(view.own)) {
            Some(lease) => Self::Held(Fence {
                lease: LEADER.to_owned(),
                epoch: lease.epoch,
            }),
            None if view.is_free(LEADER) && !is_leaving => Self::Free,
            None => Self::Others,
        }
    }
}

/// An assignment that is another than before.
pub(super) struct Anew {
    /// All of it.
    pub(super) next: BTreeMap<String, Node>,
    /// Leases that now belong to another node.
    pub(super) changed: Vec<(String, Node)>,
    /// Leases that nobody wants any more.
    pub(super) gone: Vec<String>,
}

impl Anew {
    /// None when nothing is to change. `evens_out`: slots may be exchanged for their loads, too.
    pub(super) fn of(view: &View, evens_out: bool) -> Option<Self> {
        let items = view.items();
        let mut next = assign(&items, &view.assigned);
        if evens_out && next == view.assigned {
            next = even_out(&items, &next);
        }
        let changed = next
            .iter()
            .filter(|(name, node)| view.assigned.get(*name) != Some(node));
        let changed: Vec<(String, Node)> =
            changed.map(|(name, &node)| (name.clone(), node)).collect();
        let gone = view
            .assigned
            .keys()
            .filter(|name| !next.contains_key(*name));
        let gone: Vec<String> = gone.cloned().collect();
        (!changed.is_empty() || !gone.is_empty()).then_some(Self {
            next,
            changed,
            gone,
        })
    }
}

/// Leads, if this node is or can become the leader; returns the new assignment in the view.
pub(super) async fn lead(
    shared: &Shared,
    connection: &mut Connection,
    observer: &Observer,
    view: &mut View,
) -> Result<(), store::Error> {
    let is_leaving = shared.state().is_leaving;
    let fence = match Lead::of(view, is_leaving) {
        Lead::Held(fence) => fence,
        Lead::Free => {
            let silent = observer.silent(view);
            let names = [LEADER.to_owned()];
            let taken = store::cluster::take_leases(connection, view.own, &names, &silent).await?;
            match taken.into_iter().next() {
                Some(fence) => {
                    tracing::info!(node = view.own, epoch = fence.epoch.0, "this node leads");
                    fence
                }
                None => return not_leading(shared),
            }
        }
        Lead::Others => return not_leading(shared),
    };
    shared.metrics.leads.set(1);
    let Some(Anew {
        next,
        changed,
        gone,
    }) = Anew::of(view, shared.is_evening_out())
    else {
        return Ok(());
    };
    let moved = changed
        .iter()
        .filter(|(name, _)| view.assigned.contains_key(name));
    tracing::info!(
        changed = changed.len(),
        moved = moved.count(),
        gone = gone.len(),
        nodes = view.nodes.len(),
        "assigned leases to nodes"
    );
    if store::cluster::write_assignment(connection, view.own, &fence, &changed, &gone).await? {
        view.assigned = next;
    }
    Ok(())
}

fn not_leading(shared: &Shared) -> Result<(), store::Error> {
    shared.metrics.leads.set(0);
    Ok(())
}
