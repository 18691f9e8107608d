//! The nodes of the broker, and what each of them holds.

use std::collections::BTreeMap;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::wire;
use crate::cluster::{Standing, View};
use crate::domain::id::{SLOT_COUNT, Slot};
use crate::http::extract::Query;
use crate::http::openapi::Reads;
use crate::http::problem::Problem;
use crate::http::state::State;

/// All nodes and what each holds, as seen by the node that answers.
#[derive(Debug, Serialize, ToSchema)]
struct Cluster {
    /// The node that answers.
    node: i64,
    /// The node that assigns slots and leases to nodes; null while there is none.
    leader: Option<i64>,
    /// By number. Nodes that have ended are left out.
    nodes: Vec<Node>,
    /// All slots, by number.
    slots: Vec<SlotNow>,
    /// The other leases: relays of origins and duties, by name.
    leases: Vec<Lease>,
    /// The histories of the broker's database, by number. A new one begins when the database is found promoted, or restored into
    /// another server. The last one is current.
    histories: Vec<HistoryNow>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = History)]
struct HistoryNow {
    #[schema(minimum = 1)]
    era: i64,
    /// The server's system identifier, as `pg_control_system()` returns it.
    system_identifier: String,
    /// The timeline of the server's log.
    timeline: i32,
    /// The time when a node first found it.
    #[schema(format = DateTime)]
    began_at: String,
    /// By stream, the first offset of the messages that were appended in this history. Messages that a reader had before, from that offset
    /// on, are lost, and other messages are in their place. Empty for the first history.
    first_offsets: BTreeMap<String, i64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Node {
    /// The node's number, new at each start.
    node: i64,
    /// The address that identifies the node across restarts.
    #[schema(example = "http://broker-1:8080")]
    address: String,
    /// The URL at which other nodes reach it.
    #[schema(example = "http://broker-1:8080")]
    url: String,
    #[schema(format = DateTime)]
    started_at: String,
    /// The node counts as dead after this time, unless it sends another heartbeat.
    #[schema(format = DateTime)]
    expires_at: String,
    /// `live`; `leaving` while it hands over what it holds; `expired` when others take over.
    state: &'static str,
    /// The number of slots that are assigned to it.
    slots: usize,
}

/// A slot. Each queue belongs to one slot.
#[derive(Debug, Serialize, ToSchema)]
struct SlotNow {
    #[schema(minimum = 0, maximum = 63)]
    slot: i16,
    #[serde(flatten)]
    held: Held,
}

#[derive(Debug, Serialize, ToSchema)]
struct Lease {
    /// `relay/…` or `duty/…`.
    #[schema(example = "duty/streams")]
    name: String,
    #[serde(flatten)]
    held: Held,
}

#[derive(Debug, Serialize, ToSchema)]
struct Held {
    /// The node that is assigned to hold it, and answers for it; null while there is none.
    node: Option<i64>,
    /// The node that holds it: another one while it changes hands, null while nobody has asked for it.
    holder: Option<i64>,
    /// How many times the lease has been taken; 0 for never.
    epoch: i64,
    /// The time since when this has been so.
    #[schema(format = DateTime)]
    since: Option<String>,
}

impl Held {
    fn of(view: &View, lease: &str) -> Self {
        let row = view.leases.get(lease);
        let holder = row.and_then(|row| row.holder);
        Self {
            node: view.assigned.get(lease).copied(),
            holder: holder.filter(|&node| view.node(node).is_some()),
            epoch: row.map_or(0, |row| row.epoch.0),
            since: row.and_then(|row| row.acquired_at).map(wire::time),
        }
    }
}

impl Cluster {
    fn new(view: &View, histories: Vec<HistoryNow>) -> Self {
        let slots_of = |node: i64| {
            let slots = view.assigned.iter();
            slots
                .filter(|(name, of)| **of == node && name.starts_with("slot/"))
                .count()
        };
        let nodes = view.nodes.iter().map(|member| Node {
            node: member.row.incarnation,
            address: member.row.address.clone(),
            url: member.row.url.clone(),
            started_at: wire::time(member.row.started_at),
            expires_at: wire::time(member.row.expires_at),
            state: match member.standing {
                Standing::Live => "live",
                Standing::Leaving => "leaving",
                Standing::Expired => "expired",
            },
            slots: slots_of(member.row.incarnation),
        });
        let slots = (0..SLOT_COUNT).map(|slot| SlotNow {
            slot,
            held: Held::of(view, &Slot(slot).lease_name()),
        });
        let others = view.assigned.keys();
        let others = others.filter(|name| !name.starts_with("slot/"));
        Self {
            node: view.own,
            leader: view.leader().filter(|&node| view.is_live(node)),
            nodes: nodes.collect(),
            slots: slots.collect(),
            leases: others
                .map(|name| Lease {
                    name: name.clone(),
                    held: Held::of(view, name),
                })
                .collect(),
            histories,
        }
    }
}

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new().routes(routes!(describe))
}

/// Describe the nodes and what each of them holds.
#[utoipa::path(
    get, path = "/v1/cluster", tag = "operation", operation_id = "describe_cluster",
    responses((status = 200, description = "The nodes", body = Cluster), Reads),
)]
async fn describe(Extract(state): Extract<State>, query: Query) -> Result<Response, Problem> {
    query.finish()?;
    let view = state.parts.cluster.refresh().await;
    let histories = state.parts.cluster.histories().iter();
    let histories = histories.map(|history| HistoryNow {
        era: history.era,
        system_identifier: history.system_identifier.clone(),
        timeline: history.timeline,
        began_at: wire::time(history.began_at),
        first_offsets: (history.first_offsets.iter())
            .map(|(stream, offset)| (stream.clone(), offset.0))
            .collect(),
    });
    let cluster = Cluster::new(&view, histories.collect());
    Ok(wire::json(StatusCode::OK, &cluster))
}
