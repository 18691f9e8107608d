//! Several nodes over one database: the real program, joined, stopped, killed and put to sleep. What moves is the least that must,
//! every node answers every request, and what one node has handed out another one settles.

mod api;
mod hand_over;
mod load;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use crate::support::{self, Http, Program};

/// The shortest that can be configured.
const TTL: Duration = Duration::from_secs(2);
const QUEUES: usize = 24;

/// Starts a node.
async fn node(url: &str) -> Program {
    let variables = [
        ("POSTROAD_NODE_TTL_SECONDS", "2"),
        ("POSTROAD_NODE_HEARTBEAT_SECONDS", "0.2"),
        ("POSTROAD_DATABASE_POOL_SIZE", "8"),
    ];
    support::program(url, &variables).await
}

/// Three of them, each with its share.
async fn three_nodes(url: &str) -> [Program; 3] {
    let nodes = [node(url).await, node(url).await, node(url).await];
    settled(&nodes[0].http, 3).await;
    nodes
}

/// A size from the environment, or the everyday one.
fn size(variable: &str, everyday: usize) -> usize {
    let given = std::env::var(variable).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(everyday)
}

fn queue(number: usize) -> String {
    format!("q{number}")
}

/// Declares queues on nodes in turn, all of one stream.
async fn declare(nodes: &[&Program]) {
    for number in 0..QUEUES {
        let http = &nodes[number % nodes.len()].http;
        let path = format!("/v1/queues/{}", queue(number));
        http.declare(&path, &json!({"topics": ["orders.*"]})).await;
    }
}

/// The number of a node.
async fn number(http: &Http) -> i64 {
    let (_, cluster) = http.get("/v1/cluster").await;
    cluster["node"].as_i64().unwrap()
}

/// Who is to hold each slot, as a node sees it.
fn assigned(cluster: &Value) -> BTreeMap<i64, i64> {
    let slots = cluster["slots"].as_array().unwrap().iter();
    slots
        .filter_map(|slot| Some((slot["slot"].as_i64()?, slot["node"].as_i64()?)))
        .collect()
}

/// How many slots each of the nodes is to hold.
fn shares(assigned: &BTreeMap<i64, i64>) -> BTreeMap<i64, usize> {
    let mut shares = BTreeMap::new();
    for node in assigned.values() {
        *shares.entry(*node).or_default() += 1;
    }
    shares
}

/// Whether every lease that is wanted is with the node that is to hold it.
fn is_settled(cluster: &Value) -> bool {
    let slots = cluster["slots"].as_array().unwrap().iter();
    let leases = cluster["leases"].as_array().unwrap().iter();
    let is_at_home = |held: &Value| held["holder"] == held["node"];
    let is_wanted = |held: &Value| held["epoch"] != 0;
    slots.filter(|slot| is_wanted(slot)).all(is_at_home) && leases.clone().all(is_at_home)
}

/// Waits until a node sees so many nodes, all that is wanted in the right hands; gives who is to hold each slot.
async fn settled(http: &Http, nodes: usize) -> BTreeMap<i64, i64> {
    support::eventually(&format!("{nodes} nodes, everything in place"), || async {
        let (_, cluster) = http.get("/v1/cluster").await;
        let live = cluster["nodes"].as_array()?.iter();
        let live = live.filter(|node| node["state"] == "live").count();
        let assigned = assigned(&cluster);
        let is_shared = assigned.len() == 64 && shares(&assigned).len() == nodes;
        (live == nodes && is_shared && is_settled(&cluster)).then_some(assigned)
    })
    .await
}

fn moves(before: &BTreeMap<i64, i64>, after: &BTreeMap<i64, i64>) -> usize {
    let moved = after
        .iter()
        .filter(|(slot, node)| before.get(*slot) != Some(*node));
    moved.count()
}

/// A client that asks another node when one does not answer, as one behind a balancer does.
#[derive(Debug, Clone)]
struct Ring {
    nodes: Arc<[Http]>,
    next: Arc<AtomicUsize>,
    /// Requests that had to be repeated.
    repeated: Arc<AtomicUsize>,
}

impl Ring {
    fn new(nodes: &[&Program]) -> Self {
        Self {
            nodes: nodes.iter().map(|node| node.http.clone()).collect(),
            next: Arc::default(),
            repeated: Arc::default(),
        }
    }

    /// Asks until the answer is 2xx.
    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Value {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let http = &self.nodes[number % self.nodes.len()];
            let told = match http.call(method.clone(), path, body).await {
                Ok((status, answer)) if status.is_success() => return answer,
                Ok((status, answer)) => {
                    assert_eq!(status.as_u16(), 503, "{method} {path}: {answer}");
                    answer.to_string()
                }
                Err(error) => error.to_string(),
            };
            assert!(Instant::now() < deadline, "{method} {path}: {told}");
            self.repeated.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn post(&self, path: &str, body: &Value) -> Value {
        self.ask(Method::POST, path, Some(body)).await
    }
}

const TRIGGERS: &str = r#"
create schema history;
create table history.event (
    number bigserial primary key, at timestamptz not null default clock_timestamp(),
    lease text, epoch bigint, holder bigint, is_write boolean);
create function history.see_lease() returns trigger language plpgsql as $$
begin
    insert into history.event (lease, epoch, holder, is_write) values (new.name, new.epoch, new.holder, false);
    return null;
end $$;
create function history.see_journal() returns trigger language plpgsql as $$
begin
    insert into history.event (lease, epoch, is_write)
    values ('slot/' || lpad(new.slot::text, 2, '0'), new.epoch, true);
    return null;
end $$;
create trigger history after insert or update on postroad_broker.lease for each row execute function history.see_lease();
create trigger history after insert on postroad_broker.queue_journal for each row execute function history.see_journal();
"#;

/// A change of a lease, or a write under it, in the order of the commits: both hold the lease's row until they commit.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Event {
    at: chrono::DateTime<chrono::Utc>,
    lease: String,
    epoch: i64,
    holder: Option<i64>,
    is_write: bool,
}

async fn watch(url: &str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(TRIGGERS)
        .execute(&mut connection)
        .await
        .unwrap();
}

async fn events(url: &str) -> Vec<Event> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let rows: Vec<(
        chrono::DateTime<chrono::Utc>,
        String,
        i64,
        Option<i64>,
        bool,
    )> = sqlx::query_as(
        "select at, lease, epoch, holder, is_write from history.event order by number",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    let rows = rows.into_iter();
    rows.map(|(at, lease, epoch, holder, is_write)| Event {
        at,
        lease,
        epoch,
        holder,
        is_write,
    })
    .collect()
}

/// I11: no write under an epoch after one of a later epoch was begun. I12: an epoch has one owner, and epochs only rise. Faults,
/// each a line.
fn check(events: &[Event]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut now: BTreeMap<&str, (i64, Option<i64>)> = BTreeMap::new();
    let mut owners: BTreeMap<(&str, i64), i64> = BTreeMap::new();
    for event in events {
        let lease = event.lease.as_str();
        let (epoch, holder) = now.get(lease).copied().unwrap_or((0, None));
        if event.is_write {
            if event.epoch != epoch || holder.is_none() {
                faults.push(format!(
                    "{lease}: a write under epoch {} while {holder:?} had it at {epoch}",
                    event.epoch
                ));
            }
            continue;
        }
        if event.epoch < epoch {
            faults.push(format!("{lease}: epoch {} after {epoch}", event.epoch));
        }
        if let Some(holder) = event.holder {
            let owner = *owners.entry((lease, event.epoch)).or_insert(holder);
            if owner != holder {
                let epoch = event.epoch;
                faults.push(format!("{lease}: {owner} and {holder} had epoch {epoch}"));
            }
        }
        now.insert(lease, (event.epoch, event.holder));
    }
    faults
}

/// The longest time that a lease was given back and not taken, of those that somebody took.
fn longest_gap(events: &[Event]) -> Duration {
    let mut free: BTreeMap<&str, chrono::DateTime<chrono::Utc>> = BTreeMap::new();
    let mut longest = Duration::ZERO;
    for event in events
        .iter()
        .filter(|event| !event.is_write && event.epoch > 0)
    {
        match event.holder {
            None => {
                free.insert(&event.lease, event.at);
            }
            Some(_) => {
                if let Some(since) = free.remove(event.lease.as_str()) {
                    longest = longest.max((event.at - since).to_std().unwrap_or_default());
                }
            }
        }
    }
    longest
}

#[test]
fn the_checker_finds_planted_faults() {
    let event = |epoch, holder, is_write| Event {
        at: chrono::DateTime::UNIX_EPOCH,
        lease: "slot/00".to_owned(),
        epoch,
        holder,
        is_write,
    };
    let sound = [
        event(0, None, false),
        event(1, Some(1), false),
        event(1, None, true),
        event(1, None, false),
        event(2, Some(2), false),
        event(2, None, true),
    ];
    assert_eq!(check(&sound), Vec::<String>::new());
    let finds = |plant: Event, fault: &str| {
        let mut events = sound.to_vec();
        events.push(plant);
        let faults = check(&events);
        assert!(
            faults.iter().any(|found| found.contains(fault)),
            "{faults:?}"
        );
    };
    finds(
        event(1, None, true),
        "a write under epoch 1 while Some(2) had it at 2",
    );
    finds(event(2, Some(1), false), "2 and 1 had epoch 2");
    finds(event(1, Some(1), false), "epoch 1 after 2");
}
