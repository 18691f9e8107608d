//! The broker's view of its nodes, and the histories of its database.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use reqwest::Method;
use serde::Deserialize;

use super::Client;
use super::call::Call;
use super::error::Error;

/// All nodes and what each holds, as seen by the node that answers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Cluster {
    /// The number of the node that was asked.
    pub node: i64,
    /// The node that assigns leases to nodes; None while there is none.
    pub leader: Option<i64>,
    /// By number. Nodes that have ended are left out.
    pub nodes: Vec<Node>,
    /// The parts that queues belong to, by number.
    pub slots: Vec<Slot>,
    /// The other leases: relays of origins and duties, by name.
    pub leases: Vec<Lease>,
    /// The background work of the node that was asked, by name. Earlier brokers do not tell.
    #[serde(default)]
    pub duties: Vec<Duty>,
    /// The histories of the broker's database, by number. The last one is the present one.
    pub histories: Vec<History>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Node {
    /// The node's number, new at each start.
    pub node: i64,
    /// The address that identifies the node across restarts.
    pub address: String,
    /// The URL at which other nodes reach it.
    pub url: String,
    /// The time when it started.
    pub started_at: DateTime<Utc>,
    /// The node counts as dead after this time, unless it sends another heartbeat.
    pub expires_at: DateTime<Utc>,
    /// The node's state.
    pub state: NodeState,
    /// The number of slots that are assigned to it.
    pub slots: usize,
}

/// The state of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NodeState {
    /// It holds what it is to hold.
    Live,
    /// It hands over what it holds.
    Leaving,
    /// Others take what it held.
    Expired,
    /// A state that only a later broker has.
    #[serde(other)]
    Other,
}

/// A part of the queues.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Slot {
    /// Its number, from 0.
    pub slot: i16,
    /// By whom it is held.
    #[serde(flatten)]
    pub held: Held,
}

/// A relay of an origin, or a duty.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Lease {
    /// `relay/…` or `duty/…`.
    pub name: String,
    /// By whom it is held.
    #[serde(flatten)]
    pub held: Held,
}

/// By whom something is held.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Held {
    /// The node that is assigned to hold it, and answers for it; None while there is none.
    pub node: Option<i64>,
    /// The node that holds it: another one while it changes hands.
    pub holder: Option<i64>,
    /// How many times the lease has been taken; 0 for never.
    pub epoch: i64,
    /// The time since when this has been so.
    pub since: Option<DateTime<Utc>>,
}

/// A piece of background work: bounded passes with pauses between them. A pass that fails is repeated.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Duty {
    /// The name, as in the node's log.
    pub name: String,
    /// The lease that the duty runs under, as in [`Cluster::leases`]; None if every node runs the duty.
    pub lease: Option<String>,
    /// The duty's state.
    pub state: DutyState,
    /// When the duty came to this state.
    pub since: DateTime<Utc>,
    /// How many passes have ended, failed ones included.
    pub passes: u64,
    /// How many passes have failed since the last one that succeeded.
    pub failures_in_a_row: u32,
    /// When the last pass ended.
    pub last_pass_at: Option<DateTime<Utc>>,
    /// How long the last pass took.
    pub last_pass_seconds: Option<f64>,
    /// Why the last pass that failed did so, or a part of a pass, such as one stream. Kept after passes that succeed.
    pub last_error: Option<String>,
    /// When that failed.
    pub last_error_at: Option<DateTime<Utc>>,
    /// When the next pass begins at the latest.
    pub next_pass_at: Option<DateTime<Utc>>,
}

/// The state of a duty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DutyState {
    /// A pass is under way.
    Running,
    /// The next pass is not due.
    Waiting,
    /// The last pass failed and is about to be repeated.
    Failing,
    /// Another node holds the lease.
    StandingBy,
    /// A state that only a later broker knows.
    #[serde(other)]
    Other,
}

/// A history of the broker's database: another one begins when the database is found promoted, or restored.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct History {
    /// Its number, from 1.
    pub era: i64,
    /// The server's, as `pg_control_system()` gives it.
    pub system_identifier: String,
    /// The timeline of the server's log.
    pub timeline: i32,
    /// The time when a node first found it.
    pub began_at: DateTime<Utc>,
    /// By stream, the first offset of the messages that were appended in it: what a reader had from there on before is lost. Empty for
    /// the first history.
    pub first_offsets: BTreeMap<String, i64>,
}

impl Cluster {
    /// Whether all is held by the nodes that are to hold it. What nobody has asked for yet is held by nobody.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let slots = self.slots.iter().map(|slot| &slot.held);
        let mut all = slots.chain(self.leases.iter().map(|lease| &lease.held));
        all.all(|held| held.epoch == 0 || held.holder == held.node)
    }
}

impl Client {
    /// The nodes, what each holds, and the histories of the database. A reader of streams by offset should keep the last
    /// history's number with its place: when another history has begun, the place is valid only before that history's first
    /// offset.
    ///
    /// # Errors
    /// A failed call.
    pub async fn cluster(&self) -> Result<Cluster, Error> {
        self.ask(Call::new(Method::GET, "/v1/cluster")).await
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_later_brokers_is_another_one() {
        let read = |text: &str| serde_json::from_str::<NodeState>(text).unwrap();
        assert_eq!(read("\"leaving\""), NodeState::Leaving);
        assert_eq!(read("\"asleep\""), NodeState::Other);
    }

    #[test]
    fn duties_are_read_and_may_be_missing() {
        let of = |duties: &str| {
            let text = format!(
                r#"{{"node": 1, "leader": null, "nodes": [], "slots": [], "leases": [], "histories": []{duties}}}"#
            );
            serde_json::from_str::<Cluster>(&text).unwrap().duties
        };
        assert_eq!(of(""), []);
        let told = of(
            r#", "duties": [{"name": "stream maintenance", "lease": "duty/streams", "state": "standing_by",
                "since": "2026-01-01T00:00:00Z", "passes": 0, "failures_in_a_row": 0, "last_pass_at": null,
                "last_pass_seconds": null, "last_error": null, "last_error_at": null, "next_pass_at": null}]"#,
        );
        assert_eq!(told[0].state, DutyState::StandingBy);
        assert_eq!(told[0].lease.as_deref(), Some("duty/streams"));
    }
}
