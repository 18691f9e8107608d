//! The database of a run: node rows, leases, assignments, and what was written under a lease. Each call does what its
//! function in `migrations/broker` does, at one moment.

use std::collections::{BTreeMap, BTreeSet};

use chrono::DateTime;

use super::{TTL, Wrong};
use crate::domain::assignment::Node;
use crate::domain::id::{Epoch, Fence};
use crate::simulation::Fault;
use crate::store::cluster::{LeaseRow, NodeRow, Seen};

#[derive(Debug, Clone)]
pub(super) enum Call {
    Register {
        address: usize,
    },
    Beat {
        node: Node,
        wants: Vec<String>,
        is_leaving: bool,
    },
    Take {
        node: Node,
        names: Vec<String>,
        silent: Vec<(Node, i64)>,
    },
    Release {
        node: Node,
        names: Vec<String>,
    },
    Assign {
        node: Node,
        epoch: Epoch,
        changed: Vec<(String, Node)>,
        gone: Vec<String>,
    },
    /// A write of an engine under its lease; the same number again is the same write.
    Write {
        node: Node,
        fence: Fence,
        number: u64,
    },
}

#[derive(Debug, Clone)]
pub(super) enum Answer {
    Registered(Node),
    Seen(Seen),
    Taken(Vec<Fence>),
    Released,
    /// Whether the caller leads.
    Assigned(bool),
    /// Whether the fence holds.
    Written(bool),
}

#[derive(Debug)]
struct Row {
    address: usize,
    expires_at: i64,
    /// By no clock but the run's.
    renewed_at: i64,
    wants: Vec<String>,
    is_leaving: bool,
    is_dead: bool,
}

#[derive(Debug)]
pub(super) struct Database {
    pub(super) wrong: Option<Wrong>,
    /// How far its clock is from the run's, in milliseconds.
    pub(super) ahead: i64,
    /// The time since when its clock has run steadily.
    pub(super) steady_since: i64,
    rows: BTreeMap<Node, Row>,
    leases: BTreeMap<String, (Epoch, Option<Node>)>,
    assigned: BTreeMap<String, Node>,
    written: BTreeSet<(String, i64, u64)>,
    /// The epoch of the last write under each lease.
    last_written: BTreeMap<String, Epoch>,
    owners: BTreeMap<(String, i64), Node>,
    pub(super) takes: u64,
    pub(super) writes: u64,
}

fn at(millis: i64) -> DateTime<chrono::Utc> {
    DateTime::from_timestamp_millis(millis).expect("a run is short")
}

impl Database {
    pub(super) fn new(wrong: Option<Wrong>) -> Self {
        Self {
            wrong,
            ahead: 0,
            steady_since: 0,
            rows: BTreeMap::new(),
            leases: BTreeMap::new(),
            assigned: BTreeMap::new(),
            written: BTreeSet::new(),
            last_written: BTreeMap::new(),
            owners: BTreeMap::new(),
            takes: 0,
            writes: 0,
        }
    }

    pub(super) fn epoch(&self, lease: &str) -> Option<(Epoch, Option<Node>)> {
        self.leases.get(lease).copied()
    }

    pub(super) fn assigned(&self) -> &BTreeMap<String, Node> {
        &self.assigned
    }

    pub(super) fn call(&mut self, now: i64, call: Call) -> Result<Answer, Fault> {
        let clock = now + self.ahead;
        Ok(match call {
            Call::Register { address } => Answer::Registered(self.register(now, address)),
            Call::Beat {
                node,
                wants,
                is_leaving,
            } => Answer::Seen(self.beat(now, node, wants, is_leaving)),
            Call::Take {
                node,
                names,
                silent,
            } => Answer::Taken(self.take((now, clock), node, names, &silent)?),
            Call::Release { node, names } => {
                for name in names {
                    if let Some((_, holder)) = self.leases.get_mut(&name) {
                        holder.take_if(|holder| *holder == node);
                    }
                }
                Answer::Released
            }
            Call::Assign {
                node,
                epoch,
                changed,
                gone,
            } => {
                let leads = self.epoch(super::LEADER) == Some((epoch, Some(node)));
                if leads {
                    self.assigned.retain(|name, _| !gone.contains(name));
                    self.assigned.extend(changed);
                }
                Answer::Assigned(leads)
            }
            Call::Write {
                node,
                fence,
                number,
            } => Answer::Written(self.write(node, fence, number)?),
        })
    }

    fn register(&mut self, now: i64, address: usize) -> Node {
        let new = self.rows.keys().last().map_or(1, |last| last + 1);
        let former = self
            .rows
            .iter_mut()
            .filter(|(_, row)| row.address == address);
        let mut wants = Vec::new();
        let mut dead = Vec::new();
        for (&number, row) in former {
            if !row.is_dead && !row.is_leaving {
                wants.clone_from(&row.wants);
            }
            row.is_dead = true;
            dead.push(number);
        }
        for node in self.assigned.values_mut() {
            if dead.contains(node) {
                *node = new;
            }
        }
        let row = Row {
            address,
            expires_at: now + self.ahead + TTL,
            renewed_at: now,
            wants,
            is_leaving: false,
            is_dead: false,
        };
        self.rows.insert(new, row);
        new
    }

    fn beat(&mut self, now: i64, node: Node, wants: Vec<String>, is_leaving: bool) -> Seen {
        let clock = now + self.ahead;
        // Read as it was before the renewal.
        let nodes = self.rows.iter().filter(|(_, row)| !row.is_dead);
        let nodes = nodes.map(|(&incarnation, row)| NodeRow {
            incarnation,
            address: row.address.to_string(),
            url: row.address.to_string(),
            started_at: at(0),
            expires_at: at(row.expires_at),
            ttl_seconds: TTL as f64 / 1_000.0,
            wants: row.wants.clone(),
            is_leaving: row.is_leaving,
        });
        let nodes = nodes.collect();
        let own = self.rows.get_mut(&node).filter(|row| !row.is_dead);
        let is_renewed = own.is_some();
        if let Some(row) = own {
            row.expires_at = clock + TTL;
            row.renewed_at = now;
            row.wants = wants;
            row.is_leaving = is_leaving;
        }
        let leases = self.leases.iter().map(|(name, &(epoch, holder))| LeaseRow {
            name: name.clone(),
            epoch,
            holder,
            acquired_at: None,
        });
        Seen {
            is_renewed,
            clock: at(clock),
            queues_version: 0,
            nodes,
            leases: leases.collect(),
            assigned: self.assigned.clone().into_iter().collect(),
            loads: Vec::new(),
        }
    }

    fn take(
        &mut self,
        (now, clock): (i64, i64),
        taker: Node,
        names: Vec<String>,
        silent: &[(Node, i64)],
    ) -> Result<Vec<Fence>, Fault> {
        let Some(own) = self.rows.get(&taker).filter(|row| !row.is_dead) else {
            return Ok(Vec::new());
        };
        let address = own.address;
        for name in &names {
            let holder = self.leases.get(name).and_then(|(_, holder)| *holder);
            let Some(number) = holder.filter(|&holder| holder != taker) else {
                continue;
            };
            let row = self.rows.get_mut(&number).expect("holders have rows");
            let is_over = row.expires_at < clock
                || row.address == address
                || silent.contains(&(number, row.expires_at))
                || self.wrong == Some(Wrong::NobodyIsAskedAgain);
            if is_over && !row.is_dead {
                let is_in_time = now - row.renewed_at < TTL && now - self.steady_since > TTL;
                if row.address != address && is_in_time {
                    return Err(format!(
                        "{number} is taken for dead {} ms after its heartbeat",
                        now - row.renewed_at
                    ));
                }
                row.is_dead = true;
            }
        }
        let mut taken = Vec::new();
        for name in names {
            let lease = self.leases.entry(name.clone()).or_default();
            let is_free = lease.1.is_none_or(|holder| {
                holder == taker || self.rows.get(&holder).is_none_or(|row| row.is_dead)
            });
            if is_free {
                let rises = self.wrong != Some(Wrong::EpochStays);
                *lease = (Epoch(lease.0.0 + i64::from(rises)), Some(taker));
                let owner = self
                    .owners
                    .entry((name.clone(), lease.0.0))
                    .or_insert(taker);
                if *owner != taker {
                    return Err(format!(
                        "{name}: {owner} and {taker} have epoch {}",
                        lease.0
                    ));
                }
                self.takes += 1;
                let epoch = lease.0;
                taken.push(Fence { lease: name, epoch });
            }
        }
        Ok(taken)
    }

    fn write(&mut self, node: Node, fence: Fence, number: u64) -> Result<bool, Fault> {
        let Fence { lease, epoch } = fence;
        if self.epoch(&lease) != Some((epoch, Some(node)))
            && self.wrong != Some(Wrong::NoEpochCheck)
        {
            return Ok(false);
        }
        let last = self.last_written.entry(lease.clone()).or_default();
        if *last > epoch {
            return Err(format!(
                "{lease}: a write under {epoch} after one under {last}"
            ));
        }
        *last = epoch;
        self.writes += u64::from(self.written.insert((lease, epoch.0, number)));
        Ok(true)
    }
}
