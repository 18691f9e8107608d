//! Nodes that die or sleep at failpoints.

use std::time::{Duration, Instant};

use chrono::Utc;
use postroad::failpoint;

use super::faults::{Done, millis, sleep_through};
use super::world::{MAPPED, TTL, World};
use crate::support::worker::Dice;

/// How long nodes are given to come by a point, all turns together.
const REACH: Duration = Duration::from_secs(20);
/// How long one of them is given: what it holds may have become another's.
const TURN: Duration = Duration::from_secs(7);
/// How long a node that takes things at its start is given.
const REACH_AT_START: Duration = Duration::from_secs(4);

/// The points that all work comes by. Others need that something is emptied, or due later, or mapped.
pub fn common() -> Vec<&'static str> {
    let families = [
        "settlement.",
        "append.",
        "node.",
        "lease.",
        "recovery.",
        "http.",
    ];
    let of_relay = [
        "relay.window_opened",
        "relay.mark_written",
        "relay.before_append",
        "relay.after_append",
    ];
    let names = failpoint::NAMES.iter().copied();
    let is_common = |name: &&str| {
        families.iter().any(|family| name.starts_with(family)) || of_relay.contains(name)
    };
    names.filter(is_common).collect()
}

/// Whether a node comes by a point when it takes what is free.
fn is_of_taking(name: &str) -> bool {
    name.starts_with("lease.") || name.starts_with("recovery.")
}

/// A node dies (`abort`) or sleeps (`stop`) at a point.
pub async fn point(world: &mut World, (name, act): (&str, &str), dice: &mut Dice, done: &mut Done) {
    if !cfg!(feature = "failpoints") {
        let why = "Point: built without the feature failpoints".to_owned();
        done.skipped.insert(why);
        return;
    }
    let mut reached = None;
    if is_of_taking(name) {
        reached = start_armed(world, name, act, dice).await;
    }
    if reached.is_none() {
        reached = arm(world, name, act, dice).await;
    }
    let list = match reached {
        Some(_) => &mut done.reached,
        None => &mut done.not_reached,
    };
    list.insert(format!("{name}={act}"));
    let Some(node) = reached else {
        return;
    };
    if !world.nodes[node].program.has_ended() {
        let incarnation = world.incarnation(node).await;
        sleep_through(world, incarnation, Utc::now(), dice, done).await;
        world.nodes[node].go_on();
        // What it still does is the point of it.
        tokio::time::sleep(millis(dice, 300..1_000)).await;
    }
    world.nodes[node].kill().await;
    world.nodes[node].start().await;
}

/// A node is started again with the point in its way. Gives which, if it came by.
async fn start_armed(world: &mut World, name: &str, act: &str, dice: &mut Dice) -> Option<usize> {
    let node = dice.below(world.nodes.len());
    let armed = format!("{name}={act}@{}", 1 + dice.below(4));
    world.nodes[node].kill().await;
    let variable = [("POSTROAD_FAILPOINTS", armed.as_str())];
    world.nodes[node].program.launch_with(&variable);
    let until = Instant::now() + REACH_AT_START;
    if has_met(world, node, until).await {
        return Some(node);
    }
    world.nodes[node].kill().await;
    world.nodes[node].start().await;
    None
}

/// The node that is to come by it runs into the point, in the middle of what it does. Gives which, if one did.
async fn arm(world: &mut World, name: &str, act: &str, dice: &mut Dice) -> Option<usize> {
    let count = world.nodes.len();
    let mut away = None;
    let is_hand_over = name.starts_with("hand_over.");
    if is_hand_over || is_of_taking(name) {
        let node = dice.below(count);
        world.nodes[node].kill().await;
        if is_hand_over {
            // The others have what it had, and are to give it back.
            tokio::time::sleep(TTL + Duration::from_millis(1_500)).await;
        }
        away = Some(node);
    }
    let other = away.map(|away| (away + 1 + dice.below(count - 1)) % count);
    let until = Instant::now() + REACH;
    while Instant::now() < until {
        let node = match other {
            Some(other) => other,
            None => who_passes(world, name, dice).await,
        };
        let file = world.nodes[node].point.clone();
        std::fs::write(&file, format!("{name}={act}")).unwrap();
        if let Some(away) = away.take_if(|_| is_hand_over) {
            world.nodes[away].start().await;
        }
        let mut is_met = has_met(world, node, Instant::now() + TURN).await;
        let is_taken = std::fs::remove_file(&file).is_err();
        is_met |= is_taken && has_met(world, node, Instant::now() + TURN).await;
        if let Some(away) = away.take() {
            world.nodes[away].start().await;
        }
        if is_met {
            return Some(node);
        }
    }
    None
}

async fn has_met(world: &mut World, node: usize, until: Instant) -> bool {
    let victim = &mut world.nodes[node];
    while !victim.program.has_ended() && !victim.is_stopped() {
        if Instant::now() > until {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}

/// The node that comes by a point: any, but for what only the holder of a lease does.
async fn who_passes(world: &World, name: &str, dice: &mut Dice) -> usize {
    let lease = match name.split_once('.').map_or(name, |(family, _)| family) {
        "relay" | "outbox" => "relay/%",
        "scheduled" => "duty/scheduled",
        "log" => "duty/streams",
        _ => "",
    };
    let is_of_mapped = name == "relay.before_delete";
    let text = "select n.url from postroad_broker.lease l
        join postroad_broker.node n on n.incarnation = l.holder
        left join postroad_broker.origin o on l.name = 'relay/' || o.id
        where l.name like $1 and (o.name is not distinct from $2) = $3 order by random() limit 1";
    if let Some(mut connection) = world.connect().await {
        let holder = sqlx::query_scalar::<_, String>(text);
        let holder = holder.bind(lease).bind(MAPPED).bind(is_of_mapped);
        if let Ok(Some(url)) = holder.fetch_optional(&mut connection).await {
            let mut nodes = world.nodes.iter();
            if let Some(node) = nodes.position(|node| node.program.http.base == url) {
                return node;
            }
        }
    }
    dice.below(world.nodes.len())
}
