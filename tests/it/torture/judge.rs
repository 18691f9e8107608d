//! The end of a run: all comes to rest, the histories are read, the checkers judge, and what was seen is printed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use sqlx::{Connection as _, PgConnection};

use super::faults::Done;
use super::load::{self, Load};
use super::world::World;
use crate::history::liveness::{self, Sample};
use crate::history::log::{self, Fate, LogHistory, Read, Sent, Transaction};
use crate::history::{self, History, Published, Recorder, Time, owners};
use crate::support::consumer::stream_ids;
use crate::support::{Http, audit, leases};

/// How long after the last fault all must be relayed and settled (I13). A statement on a connection that is dead without a word is
/// given up after ten seconds, one of the pool after fifteen, and a long one after twenty.
pub const REST: TimeDelta = TimeDelta::seconds(40);
/// Faults that are printed.
const FAULTS_SHOWN: usize = 40;

/// A run whose faults have stopped.
pub struct Run {
    pub test: &'static str,
    pub seed: u64,
    /// The command that repeats it.
    pub repeat: String,
    pub took: Duration,
    pub stopped_at: Time,
    /// Whether the clocks of the database and of the test are the same.
    pub is_timed: bool,
    /// How long after the last fault all must be relayed and settled (I13).
    pub bound: TimeDelta,
    pub done: Done,
    /// What producers and publishers were told.
    pub transactions: Vec<Transaction>,
}

/// A message of the log, as its table has it.
type Logged = (i64, String, Option<String>, String);

impl Run {
    /// # Panics
    /// With all faults found, and the command that repeats the run.
    pub async fn judge(mut self, world: World, load: Load) {
        let nodes = world.clients();
        let samples = watch(&world, &nodes, self.stopped_at + self.bound * 3 / 2).await;
        let recorders = load.recorders.clone();
        let readers = load.finish().await;
        let mut faults = liveness::check(&samples, self.stopped_at, self.bound);

        self.ask_ledgers(&world, &mut faults).await;
        let http = Http::new(&nodes[0].base);
        let read = stream_ids(&http, "main").await.into_iter();
        let log = LogHistory {
            transactions: std::mem::take(&mut self.transactions),
            readers,
            log: read.map(|(offset, id)| Read { offset, id }).collect(),
        };
        faults.extend(log::check(&log));

        let mut connection = PgConnection::connect(&world.url).await.unwrap();
        let logged: Vec<Logged> = sqlx::query_as(
            "select m.\"offset\", m.id, m.key, t.name from postroad_broker.message m
             join postroad_broker.topic t on t.id = m.topic_id
             join postroad_broker.stream s on s.id = m.stream_id
             where s.name = 'main' order by m.\"offset\"",
        )
        .fetch_all(&mut connection)
        .await
        .unwrap();
        let mut queues = Queues::default();
        for (name, recorder) in recorders {
            let history = history(&mut connection, &name, &recorder, &logged).await;
            queues.add(&name, &history, self.is_timed, &mut faults);
        }
        let events = leases::events(&world.url).await;
        faults.extend(owners::check(&events));
        let pauses = self.take_overs(&events, &mut faults);
        let lives = lives(&mut connection).await;
        println!(
            "{}: {}{}\n  {}; longest time without an owner {:?}; {lives} lives of the nodes; {pauses}\n  verdict: {}",
            self.test,
            self.figures(&log),
            queues.figures(),
            rest(&samples, self.stopped_at),
            owners::longest_gap(&events),
            match faults.len() {
                0 => "sound".to_owned(),
                count => format!("{count} FAULTS"),
            },
        );
        if !faults.is_empty() {
            let logs = world.logs().to_owned();
            std::mem::forget(world.folder);
            let shown = faults.iter().take(FAULTS_SHOWN).cloned();
            let shown: Vec<String> = shown.collect();
            panic!(
                "{} faults; the nodes' logs: {}; again: {}\n{}",
                faults.len(),
                logs.display(),
                self.repeat,
                shown.join("\n")
            );
        }
    }

    /// What was not answered is decided by the producers' own ledgers, and what they were told must agree with those.
    async fn ask_ledgers(&mut self, world: &World, faults: &mut Vec<String>) {
        let mut committed = BTreeSet::new();
        for shop in &world.shops {
            let ids = load::ledger(&shop.origin).await;
            committed.extend(ids.expect("an origin answers"));
        }
        let mut known = BTreeSet::new();
        for transaction in &mut self.transactions {
            let mut ids = transaction.sent.iter().map(|sent| &sent.id);
            let is_of_web = ids.any(|id| id.starts_with("web-"));
            if is_of_web || transaction.sent.is_empty() {
                continue;
            }
            let ids = transaction.sent.iter().map(|sent| &sent.id);
            known.extend(ids.clone().cloned());
            let there = ids.filter(|id| committed.contains(*id)).count();
            let fate = match there {
                0 => Fate::Failed,
                _ => Fate::Committed,
            };
            let is_half = there != 0 && there != transaction.sent.len();
            let was_told_else = transaction.fate != Fate::Unknown && transaction.fate != fate;
            if is_half || was_told_else {
                faults.push(format!("an origin is not right by itself: {transaction:?}"));
            }
            transaction.fate = fate;
        }
        // Of the transactions that were held open.
        let others = committed.into_iter().filter(|id| !known.contains(id));
        self.transactions.extend(others.map(|id| Transaction {
            fate: Fate::Committed,
            sent: vec![Sent {
                id,
                version: None,
                offset: None,
            }],
        }));
    }

    /// What was done, and what went through.
    fn figures(&self, log: &LogHistory) -> String {
        let mut text = format!(
            "seed {}, {} faults in {:?}:",
            self.seed,
            self.done.total(),
            self.took
        );
        for (fault, count) in &self.done.counts {
            let _ = write!(text, " {fault:?} {count}");
        }
        for skipped in &self.done.skipped {
            let _ = write!(text, "\n  SKIPPED {skipped}");
        }
        let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(" ");
        if !self.done.reached.is_empty() || !self.done.not_reached.is_empty() {
            let (reached, others) = (&self.done.reached, &self.done.not_reached);
            let others = others.difference(reached).cloned().collect();
            let _ = write!(
                text,
                "\n  {} points: {}; not come by in time: {}",
                reached.len(),
                list(reached),
                list(&others)
            );
        }
        let mut fates: BTreeMap<&str, usize> = BTreeMap::new();
        for transaction in &log.transactions {
            let name = match transaction.fate {
                Fate::Committed => "committed",
                Fate::Failed => "rolled back",
                Fate::Unknown => "unknown",
            };
            *fates.entry(name).or_default() += 1;
        }
        let reads: usize = log.readers.iter().map(Vec::len).sum();
        let _ = write!(
            text,
            "\n  {} messages of {fates:?} transactions and publishes, {reads} read",
            log.log.len()
        );
        text
    }

    /// How fast the others had what a sleeper had.
    fn take_overs(&self, events: &[owners::Event], faults: &mut Vec<String>) -> String {
        let mut took = Vec::new();
        for (holder, since) in &self.done.pauses {
            match owners::taken_over(events, *holder, *since) {
                // It had just been started, and had nothing.
                Some(Duration::ZERO) => {}
                Some(after) => took.push(after),
                None => faults.push(format!("nobody took over what {holder} had at {since}")),
            }
        }
        took.sort_unstable();
        let (Some(last), median) = (took.last(), took.get(took.len() / 2)) else {
            return "nobody slept".to_owned();
        };
        format!(
            "{} slept, others had all it had after {:?} in the median, {last:?} at most",
            took.len(),
            median.unwrap_or(last)
        )
    }
}

/// Looks until all is done, or it is too late.
async fn watch(world: &World, nodes: &[Http], until: Time) -> Vec<Sample> {
    let queues: Vec<String> = load::queues().into_iter().map(|(name, _)| name).collect();
    let mut samples = Vec::new();
    let mut quiet = 0;
    while quiet < 3 && Utc::now() < until {
        let sample = load::sample(world, nodes, &queues).await;
        quiet = match (sample.lag_rows, sample.depth) {
            (Some(0), Some(0)) => quiet + 1,
            _ => 0,
        };
        samples.push(sample);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    samples
}

/// How long it took until all was relayed, and until all was settled.
fn rest(samples: &[Sample], stopped_at: Time) -> String {
    let after = |samples: &[Sample]| match liveness::done_at(samples) {
        Some(at) => format!("{} ms", (at - stopped_at).num_milliseconds().max(0)),
        None => "not".to_owned(),
    };
    let relayed = samples.iter().map(|sample| Sample {
        depth: sample.depth.map(|_| 0),
        ..sample.clone()
    });
    let relayed: Vec<Sample> = relayed.collect();
    let (relayed, settled) = (after(&relayed), after(samples));
    format!("all relayed {relayed} and all settled {settled} after the faults stopped")
}

/// A queue's history, with what the database has of it.
async fn history(
    connection: &mut PgConnection,
    name: &str,
    recorder: &Arc<Recorder>,
    logged: &[Logged],
) -> History {
    let mut history = recorder.lock().clone();
    history.journaled = audit::journaled(connection, name).await;
    history.acked = audit::acked(connection, name).await;
    history.letters = audit::letters(connection, name).await;
    let taken = logged.iter().filter(|(.., topic)| load::takes(name, topic));
    let published = taken.map(|(offset, _, key, _)| {
        let key = key.clone();
        (offset.unsigned_abs(), Published { key })
    });
    history.published = published.collect();
    history
}

/// What the queues of a run saw.
#[derive(Default)]
struct Queues {
    deliveries: usize,
    settled: usize,
    unknown: usize,
    letters: usize,
}

impl Queues {
    fn add(&mut self, name: &str, history: &History, is_timed: bool, faults: &mut Vec<String>) {
        self.deliveries += history.delivered.len();
        self.settled += history.settled.len();
        let unknown = history.settled.iter().filter(|s| s.told.is_none());
        self.unknown += unknown.count();
        self.letters += history.letters.len();
        let found = match is_timed {
            true => history::check(history),
            false => {
                let history = without_times(history);
                let mut found = history::queue::check(&history);
                found.extend(history::order::check(&history));
                found
            }
        };
        faults.extend(found.into_iter().map(|fault| format!("{name}: {fault}")));
    }

    fn figures(&self) -> String {
        format!(
            "; {} deliveries, {} settlements ({} not answered), {} dead letters",
            self.deliveries, self.settled, self.unknown, self.letters
        )
    }
}

/// A database whose clock jumps ends deliveries before or after their time: what it says of times is left out. When a message died it
/// knows alone, so the order of keys is judged without those.
fn without_times(history: &History) -> History {
    let mut history = history.clone();
    for (offset, published) in &mut history.published {
        if history.letters.contains_key(offset) {
            published.key = None;
        }
    }
    for delivered in &mut history.delivered {
        delivered.visible_until = Time::UNIX_EPOCH;
    }
    let told = history.settled.iter_mut();
    for told in told.filter_map(|settled| settled.told.as_mut()) {
        (told.due_at, told.visible_until) = (None, None);
    }
    history
}

/// How often a node was declared dead, or was another life of one.
async fn lives(connection: &mut PgConnection) -> i64 {
    let text = "select count(*) from postroad_broker.node";
    sqlx::query_scalar(text)
        .fetch_one(connection)
        .await
        .unwrap()
}
