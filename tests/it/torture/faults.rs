//! What is done to the nodes, and to what they stand on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use chrono::Utc;
use postroad::failpoint;
use rustix::process::Signal;

use super::world::{Node, TTL, World};
use super::{points, postgres, tools};
use crate::history::Time;
use crate::support::worker::Dice;
use crate::support::{self, Action, Direction};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A node is killed, and started at once or when the others have what it had.
    Kill,
    /// A node is ended in order and started again.
    Restart,
    /// A node sleeps for longer than it may.
    Pause,
    /// The same, with a statement under way that comes to the database when the node is dead to the others.
    PauseInStatement,
    /// The same, with an append that is committed while it sleeps.
    PauseInAppend,
    /// A node dies at a failpoint, or sleeps there for longer than it may.
    Point,
    /// The same, with all points in turn, and both ways.
    NextPoint,
    /// A node hears nothing of the database for longer than it may, and goes on.
    Partition,
    /// Its connections to the database end, before or after some bytes.
    Cut,
    /// All that passes is slow.
    Slow,
    /// Nothing is heard again of its connections; new ones work.
    Vanish,
    KillPostgres,
    StopPostgres,
    TerminateBackends,
    KillOrigin,
    StopOrigin,
    CutOrigin,
    TerminateOrigin,
    OpenTransaction,
    PreparedTransaction,
    PinnedXmin,
    SlowFlush,
    FailingFlush,
    FullDisk,
    NodeClock,
    /// The database's clock jumps ahead, an hour or some seconds.
    DatabaseClock,
    /// It is set back by some seconds.
    DatabaseClockBack,
}

/// What was done in a run.
#[derive(Debug, Default)]
pub struct Done {
    pub counts: BTreeMap<Fault, usize>,
    /// What this machine cannot do, and why.
    pub skipped: BTreeSet<String>,
    /// Failpoints at which a node died or slept.
    pub reached: BTreeSet<String>,
    pub not_reached: BTreeSet<String>,
    /// Who slept from when on, and that it was another's part by its end.
    pub pauses: Vec<(i64, Time)>,
}

impl Done {
    pub fn total(&self) -> usize {
        self.counts.values().sum()
    }
}

/// One fault, drawn; back when it is over, if not all that follows from it.
pub async fn act(world: &mut World, fault: Fault, dice: &mut Dice, done: &mut Done) {
    let node = dice.below(world.nodes.len());
    match fault {
        Fault::Kill => kill(&mut world.nodes[node], dice).await,
        Fault::Restart => {
            // One whose database was away at its start may have ended by itself.
            if !world.nodes[node].program.has_ended() {
                let ended = world.nodes[node].program.stop().await;
                if !ended.success() {
                    world.folder.disable_cleanup(true);
                    let logs = world.logs().display();
                    panic!("node {node} did not end in order: {ended}; the nodes' logs: {logs}");
                }
            }
            world.nodes[node].start().await;
        }
        Fault::Pause | Fault::PauseInStatement => {
            pause(world, node, fault, dice, done).await;
        }
        Fault::PauseInAppend => pause_in_append(world, dice, done).await,
        Fault::Point => {
            let common = points::common();
            let name = common[dice.below(common.len())];
            let act = ["abort", "stop"][dice.below(2)];
            points::point(world, (name, act), dice, done).await;
        }
        Fault::NextPoint => {
            let (turn, names) = (done.total(), failpoint::NAMES);
            let act = ["abort", "stop"][turn / names.len() % 2];
            points::point(world, (names[turn % names.len()], act), dice, done).await;
        }
        Fault::Partition => {
            let proxy = &world.nodes[node].proxy;
            proxy.hold();
            tokio::time::sleep(TTL + millis(dice, 300..1_500)).await;
            proxy.open();
        }
        Fault::Cut => {
            cut_later(&world.nodes[node].proxy, dice);
            tokio::time::sleep(millis(dice, 100..500)).await;
            world.nodes[node].proxy.no_filter();
        }
        Fault::Slow => {
            let proxy = &world.nodes[node].proxy;
            proxy.delay(millis(dice, 20..150));
            tokio::time::sleep(millis(dice, 500..1_500)).await;
            proxy.delay(Duration::ZERO);
        }
        Fault::Vanish => {
            world.nodes[node].proxy.vanish();
            tokio::time::sleep(millis(dice, 500..2_000)).await;
        }
        Fault::SlowFlush | Fault::FailingFlush | Fault::FullDisk => {
            if let Err(why) = disk(world, fault, dice).await {
                done.skipped.insert(format!("{fault:?}: {why}"));
                return;
            }
        }
        Fault::NodeClock => {
            let Some(clock) = &world.nodes[node].clock else {
                done.skipped
                    .insert(format!("{fault:?}: libfaketime is not installed"));
                return;
            };
            tools::set_clock(clock, [-3_600, 3_600, 0][dice.below(3)]);
            tokio::time::sleep(millis(dice, 500..2_500)).await;
        }
        _ => postgres::act(world, fault, dice).await,
    }
    *done.counts.entry(fault).or_default() += 1;
}

pub fn millis(dice: &mut Dice, range: std::ops::Range<u64>) -> Duration {
    let width = (range.end - range.start) as usize;
    Duration::from_millis(range.start + dice.below(width) as u64)
}

async fn kill(node: &mut Node, dice: &mut Dice) {
    node.kill().await;
    // Mostly at once, before it is missed; sometimes after others have all that it had.
    if dice.is_lucky(0.25) {
        tokio::time::sleep(TTL + millis(dice, 0..1_000)).await;
    }
    node.start().await;
}

/// Puts a node to sleep until what it had is others', and lets it go on.
async fn pause(world: &World, node: usize, fault: Fault, dice: &mut Dice, done: &mut Done) {
    let victim = &world.nodes[node];
    let incarnation = world.incarnation(node).await;
    if fault == Fault::PauseInStatement {
        victim.proxy.hold();
        // Long enough for statements to be on their way.
        tokio::time::sleep(millis(dice, 50..200)).await;
    }
    let since = Utc::now();
    victim.program.signal(Signal::STOP);
    sleep_through(world, incarnation, since, dice, done).await;
    // Its statements reach the database before it can take anything back, or when it could have.
    if dice.is_lucky(0.5) {
        victim.proxy.open();
        victim.go_on();
    } else {
        victim.go_on();
        tokio::time::sleep(millis(dice, 0..300)).await;
        victim.proxy.open();
    }
}

/// Waits until others have what a node had; longer, at times.
pub async fn sleep_through(
    world: &World,
    incarnation: Option<i64>,
    since: Time,
    dice: &mut Dice,
    done: &mut Done,
) {
    tokio::time::sleep(TTL + millis(dice, 100..700)).await;
    let Some(incarnation) = incarnation else {
        return;
    };
    done.pauses.push((incarnation, since));
    wait_for_others(world, incarnation).await;
}

async fn wait_for_others(world: &World, incarnation: i64) {
    let until = Instant::now() + Duration::from_secs(15);
    while Instant::now() < until {
        if let Some(mut connection) = world.connect().await {
            let held = sqlx::query_scalar::<_, bool>(
                "select exists (select from postroad_broker.lease where holder = $1)",
            );
            if let Ok(false) = held.bind(incarnation).fetch_one(&mut connection).await {
                return;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The node that relays falls asleep while its append waits in the database for the log's head. The append goes on without it, and what
/// became of it the node hears when it is dead to the others.
async fn pause_in_append(world: &World, dice: &mut Dice, done: &mut Done) {
    let Some(mut holder) = world.connect().await else {
        return;
    };
    let relaying = "select n.incarnation, n.url from postroad_broker.lease l
        join postroad_broker.node n on n.incarnation = l.holder where l.name like 'relay/%' order by l.name limit 1";
    let found: Result<(i64, String), _> = sqlx::query_as(relaying).fetch_one(&mut holder).await;
    let Ok((incarnation, url)) = found else {
        return;
    };
    let victim = |node: &&Node| node.program.http.base == url;
    let Some(victim) = world.nodes.iter().find(victim) else {
        return;
    };
    let lock = "begin; select from postroad_broker.stream_head for update";
    if sqlx::raw_sql(lock).execute(&mut holder).await.is_err() {
        return;
    }
    // The producers go on: an append of each relay is waiting soon.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let since = Utc::now();
    victim.program.signal(Signal::STOP);
    let _ = sqlx::raw_sql("commit").execute(&mut holder).await;
    sleep_through(world, Some(incarnation), since, dice, done).await;
    victim.go_on();
}

/// Cuts a connection at one of the next chunks to the server, so that nobody knows what became of it.
pub fn cut_later(proxy: &support::Proxy, dice: &mut Dice) {
    let mut left = dice.below(12);
    let action = match dice.is_lucky(0.5) {
        true => Action::CutBefore,
        false => Action::CutAfter,
    };
    proxy.filter(move |direction, _| {
        if direction == Direction::ToClient {
            return Action::Forward;
        }
        let is_it = left == 0;
        left = left.saturating_sub(1);
        if is_it {
            // The one after the next few, then.
            left = 40;
        }
        match is_it {
            true => action,
            false => Action::Forward,
        }
    });
}

async fn disk(world: &World, fault: Fault, dice: &mut Dice) -> Result<(), String> {
    let running = "Postgres to run";
    let pid = support::eventually(running, || async { world.server.pid() }).await;
    match fault {
        Fault::SlowFlush => {
            let _slow = tools::inject(pid, tools::Flush::Slow).await?;
            // Longer than a time to live: nobody is to be taken for dead for it.
            tokio::time::sleep(TTL + millis(dice, 500..1_500)).await;
        }
        Fault::FailingFlush => {
            let _failing = tools::inject(pid, tools::Flush::Fails).await?;
            tokio::time::sleep(millis(dice, 300..900)).await;
        }
        _ => {
            if !world.is_small {
                return Err("a small disk needs root".to_owned());
            }
            let ballast = tools::fill(world.server.folder());
            tokio::time::sleep(millis(dice, 1_500..3_000)).await;
            std::fs::remove_file(ballast).unwrap();
        }
    }
    Ok(())
}
