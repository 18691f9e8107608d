//! The nodes of the broker, and what each of them holds.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Instant;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::wire;
use crate::cluster::{Standing, View};
use crate::domain::id::{SLOT_COUNT, Slot};
use crate::http::extract::Query;
use crate::http::openapi::Reads;
use crate::http::problem::Problem;
use crate::http::route::Routes;
use crate::http::state::State;
use crate::supervisor::{self, Status};

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
    /// The background work of the node that answers, by name.
    duties: Vec<DutyNow>,
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

/// A piece of background work: bounded passes with pauses between them. A pass that fails is repeated.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Duty)]
struct DutyNow {
    /// The name, as in the node's log.
    #[schema(example = "stream maintenance")]
    name: String,
    /// The lease that the duty runs under, as in `leases`; null if every node runs the duty.
    #[schema(example = "duty/streams")]
    lease: Option<String>,
    /// `running` while a pass is under way; `waiting` for the next pass; `failing` if the last pass failed and is about to be
    /// repeated; `standing_by` while another node holds the lease.
    state: DutyState,
    /// When the duty came to this state.
    #[schema(format = DateTime)]
    since: String,
    /// How many passes have ended, failed ones included.
    passes: u64,
    /// How many passes have failed since the last one that succeeded.
    failures_in_a_row: u32,
    /// When the last pass ended.
    #[schema(format = DateTime)]
    last_pass_at: Option<String>,
    /// How long the last pass took.
    last_pass_seconds: Option<f64>,
    /// Why the last pass that failed did so, or a part of a pass, such as one stream. Kept after passes that succeed.
    last_error: Option<String>,
    /// When that failed.
    #[schema(format = DateTime)]
    last_error_at: Option<String>,
    /// When the next pass begins at the latest; an event can bring it earlier. Null while a pass is under way, and if only an
    /// event brings one.
    #[schema(format = DateTime)]
    next_pass_at: Option<String>,
}

impl DutyNow {
    /// The clock that tells `now` shows the moments.
    fn new(status: Status, (at, now): (DateTime<Utc>, Instant)) -> Self {
        let past = |moment: Instant| {
            let ago = TimeDelta::from_std(now.saturating_duration_since(moment));
            wire::time(at - ago.unwrap_or_default())
        };
        let coming = |moment: Instant| {
            let until = TimeDelta::from_std(moment.saturating_duration_since(now));
            wire::time(at + until.unwrap_or_default())
        };
        let last_error_at = status.last_error.as_ref().map(|(at, _)| past(*at));
        Self {
            name: status.name.into_owned(),
            lease: status.lease.map(Cow::into_owned),
            state: match status.state {
                supervisor::State::Running => DutyState::Running,
                supervisor::State::Waiting => DutyState::Waiting,
                supervisor::State::Failing => DutyState::Failing,
                supervisor::State::StandingBy => DutyState::StandingBy,
            },
            since: past(status.since),
            passes: status.passes,
            failures_in_a_row: status.failures_in_a_row,
            last_pass_at: status.last_pass.map(|(at, _)| past(at)),
            last_pass_seconds: status.last_pass.map(|(_, took)| took.as_secs_f64()),
            last_error: status.last_error.map(|(_, why)| why),
            last_error_at,
            next_pass_at: status.next_at.map(coming),
        }
    }
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
    /// `leaving` while it hands over what it holds; `expired` when others take over.
    state: NodeState,
    /// The number of slots that are assigned to it.
    slots: usize,
}

/// A duty's state.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum DutyState {
    Running,
    Waiting,
    Failing,
    StandingBy,
}

/// A node's state.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum NodeState {
    Live,
    Leaving,
    Expired,
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
    fn new(view: &View, duties: Vec<DutyNow>, histories: Vec<HistoryNow>) -> Self {
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
                Standing::Live => NodeState::Live,
                Standing::Leaving => NodeState::Leaving,
                Standing::Expired => NodeState::Expired,
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
            duties,
            histories,
        }
    }
}

pub(super) fn routes() -> Routes {
    Routes::new().routes(routes!(describe))
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
    let now = (state.parts.cluster.now(), Instant::now());
    let duties = state.supervisor.statuses().into_iter();
    let duties = duties.map(|status| DutyNow::new(status, now));
    let cluster = Cluster::new(&view, duties.collect(), histories.collect());
    Ok(wire::json(StatusCode::OK, &cluster))
}
