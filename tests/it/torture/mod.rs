//! `make torture`: several nodes of the real program, origins on Postgres servers of their own, producers, publishers, readers and
//! consumers, under faults that are drawn by a seed; then nothing is done any more, all must come to rest, and checkers that know only
//! the promises judge what was told and what was committed (`crate::history`). See `docs/reliability.md`.
//!
//! Without the variables the same tests run for a few seconds each.

mod faults;
mod judge;
mod load;
mod points;
mod postgres;
mod rare;
mod tools;
mod world;

use std::time::{Duration, Instant};

use chrono::Utc;
use postroad::failpoint;
use uuid::Uuid;

use self::faults::{Done, Fault, act, millis};
use self::judge::Run;
use self::load::Load;
use self::world::{Ground, World};
use crate::support::worker::Dice;

/// In seconds.
const HOUR: i64 = 3_600;

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub seed: u64,
    pub nodes: usize,
    pub origins: usize,
}

fn size(name: &str, everyday: usize) -> usize {
    let given = std::env::var(format!("POSTROAD_TORTURE_{name}")).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(everyday)
}

impl Sizes {
    fn given() -> Self {
        let seed = std::env::var("POSTROAD_TORTURE_SEED").ok();
        let seed = seed.and_then(|text| text.parse().ok());
        Self {
            seed: seed.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0),
            nodes: size("NODES", 3).max(2),
            origins: size("ORIGINS", 1).max(1),
        }
    }
}

/// When a run has seen enough.
#[derive(Debug, Clone, Copy)]
enum Until {
    Seconds(usize),
    Faults(usize),
}

/// A test: which faults, on what.
struct Plan {
    test: &'static str,
    /// The variable that says how much, and what it says.
    variable: &'static str,
    until: Until,
    /// Drawn from; one that is there twice comes twice as often.
    deck: Vec<Fault>,
    ground: Ground,
}

impl Plan {
    /// The deck, or of it only what `POSTROAD_TORTURE_ONLY` names.
    fn deck(&self) -> Vec<Fault> {
        let only = std::env::var("POSTROAD_TORTURE_ONLY").unwrap_or_default();
        let is_named = |fault: &Fault| only.split(',').any(|name| format!("{fault:?}") == name);
        let named: Vec<_> = self.deck.iter().copied().filter(is_named).collect();
        match named.is_empty() {
            true => self.deck.clone(),
            false => named,
        }
    }
}

async fn run(plan: Plan) {
    let sizes = Sizes::given();
    let deck = plan.deck();
    let (Until::Seconds(amount) | Until::Faults(amount)) = plan.until;
    let repeat = format!(
        "POSTROAD_TORTURE_SEED={} POSTROAD_TORTURE_{}={amount} POSTROAD_TORTURE_NODES={} POSTROAD_TORTURE_ORIGINS={} \
         make torture ARGS=torture::{}",
        sizes.seed, plan.variable, sizes.nodes, sizes.origins, plan.test
    );
    println!("{}: seed {}; again: {repeat}", plan.test, sizes.seed);
    let mut dice = Dice::new(sizes.seed);
    let mut world = World::open(&sizes, plan.ground).await;
    let mut load = Load::start(&world, sizes.seed);
    let (began, mut done) = (Instant::now(), Done::default());
    let mut drawn = 0;
    loop {
        let is_enough = match plan.until {
            Until::Seconds(seconds) => began.elapsed() >= Duration::from_secs(seconds as u64),
            Until::Faults(count) => drawn >= count,
        };
        if is_enough {
            break;
        }
        tokio::time::sleep(millis(&mut dice, 100..900)).await;
        let fault = deck[dice.below(deck.len())];
        act(&mut world, fault, &mut dice, &mut done).await;
        drawn += 1;
        if drawn % 20 == 0 {
            println!("{}: {drawn} faults in {:?}", plan.test, began.elapsed());
        }
    }
    if plan.ground.clock_jump == Some(HOUR) && done.counts.contains_key(&Fault::Kill) {
        // A node reads the database's clock at its start. What one whose clock is ahead extends or puts off is held for as much longer
        // by one whose clock is not: so all are started again at a time when that is over.
        crate::support::clock::set(
            &world.url,
            &format!("{} seconds", world.clock_ahead + 2 * HOUR),
        )
        .await;
        for node in &mut world.nodes {
            node.kill().await;
            node.start().await;
        }
    }
    let transactions = load.end_sending().await;
    let run = Run {
        test: plan.test,
        seed: sizes.seed,
        repeat,
        took: began.elapsed(),
        stopped_at: Utc::now(),
        is_timed: plan.ground.clock_jump.is_none(),
        // Whoever's clock is behind holds things for as much longer.
        bound: judge::REST + chrono::TimeDelta::seconds(world.clock_jumped),
        done,
        transactions,
    };
    run.judge(world, load).await;
}

/// Kills of nodes, at random.
#[tokio::test(flavor = "multi_thread")]
async fn kills() {
    run(Plan {
        test: "kills",
        variable: "KILLS",
        until: Until::Faults(size("KILLS", 3)),
        deck: vec![Fault::Kill],
        ground: Ground::default(),
    })
    .await;
}

/// Nodes that sleep for longer than they may, at random and in the middle of a statement.
#[tokio::test(flavor = "multi_thread")]
async fn pauses() {
    run(Plan {
        test: "pauses",
        variable: "PAUSES",
        until: Until::Faults(size("PAUSES", 1)),
        deck: vec![
            Fault::Pause,
            Fault::Pause,
            Fault::PauseInStatement,
            Fault::PauseInAppend,
        ],
        ground: Ground::default(),
    })
    .await;
}

/// Nodes that die or sleep at failpoints: at one of all that there are, or at so many, one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn points() {
    let all = 2 * failpoint::NAMES.len();
    let count = size("POINTS", 1).min(all);
    run(Plan {
        test: "points",
        variable: "POINTS",
        until: Until::Faults(count),
        deck: match count {
            // Any, and not the first of the list each time.
            ..4 => vec![Fault::Point],
            _ => vec![Fault::NextPoint],
        },
        ground: RICH,
    })
    .await;
}

/// Where what comes seldom comes within seconds.
const RICH: Ground = Ground {
    has_disk: false,
    clock_jump: None,
    is_rich: true,
};

/// Everything, but what needs a disk or clocks of its own.
const MIXED: [Fault; 21] = [
    Fault::Kill,
    Fault::Kill,
    Fault::Restart,
    Fault::Pause,
    Fault::PauseInStatement,
    Fault::PauseInAppend,
    Fault::Point,
    Fault::Partition,
    Fault::Cut,
    Fault::Cut,
    Fault::Slow,
    Fault::KillPostgres,
    Fault::StopPostgres,
    Fault::TerminateBackends,
    Fault::KillOrigin,
    Fault::StopOrigin,
    Fault::CutOrigin,
    Fault::TerminateOrigin,
    Fault::OpenTransaction,
    Fault::PreparedTransaction,
    Fault::PinnedXmin,
];

#[tokio::test(flavor = "multi_thread")]
async fn mixed() {
    let seconds = size("SECONDS", 6);
    let mut deck = MIXED.to_vec();
    // What is dead without a word is noticed after a minute.
    if seconds >= 60 {
        deck.push(Fault::Vanish);
    }
    run(Plan {
        test: "mixed",
        variable: "SECONDS",
        until: Until::Seconds(seconds),
        deck,
        ground: RICH,
    })
    .await;
}

/// Flushes that are slow or fail, and a disk that is full.
#[tokio::test(flavor = "multi_thread")]
async fn disk() {
    run(Plan {
        test: "disk",
        variable: "DISKS",
        until: Until::Faults(size("DISKS", 1)),
        deck: vec![Fault::SlowFlush, Fault::FailingFlush, Fault::FullDisk],
        ground: Ground {
            has_disk: true,
            ..Ground::default()
        },
    })
    .await;
}

/// Clocks of nodes and of the database that jump an hour, while nodes are killed.
#[tokio::test(flavor = "multi_thread")]
async fn clocks() {
    run(clocks_of("clocks", HOUR)).await;
}

/// The same by seconds: all is done in time without starting anything again.
#[tokio::test(flavor = "multi_thread")]
async fn steps() {
    run(clocks_of("steps", 5)).await;
}

fn clocks_of(test: &'static str, jump: i64) -> Plan {
    Plan {
        test,
        variable: "CLOCKS",
        until: Until::Faults(size("CLOCKS", 2)),
        deck: vec![
            Fault::NodeClock,
            Fault::DatabaseClock,
            Fault::DatabaseClockBack,
            Fault::Kill,
        ],
        ground: Ground {
            clock_jump: Some(jump),
            ..Ground::default()
        },
    }
}
