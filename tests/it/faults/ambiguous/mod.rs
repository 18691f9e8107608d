//! Ambiguous commits over all kinds of writes: the connection is cut right before, or right after, the write was forwarded (for a
//! transaction: its COMMIT). The client must be answered with what became of it, and a repeat must get that again; the database must
//! have it once.
//!
//! `POSTROAD_TEST_AMBIGUOUS=24 cargo test --test it ambiguous:: -- --nocapture` is the long form: more than 500 cuts.

mod kinds;
mod leases;

use std::sync::{Arc, Mutex};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use super::size;
use crate::relay::shop::Dice;
use crate::support::consumer::{publish_ids, stream_ids};
use crate::support::{self, Action, Consumer, Direction, Http, Proxy};
use kinds::{KINDS, Kind};

/// Where a write is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// At the one statement.
    Statement,
    /// At the COMMIT of the transaction that the statement is in.
    Commit,
}

/// A write, known by bytes of its parameters.
#[derive(Debug, Clone)]
struct Mark {
    /// All of them are in it.
    bytes: Vec<Vec<u8>>,
    cut: Cut,
    /// How many of the kind are let through before: reads that have the same parameters.
    passes: usize,
}

#[derive(Debug)]
struct Armed {
    mark: Mark,
    is_in_transaction: bool,
    action: Action,
}

/// Cuts the connection once, at a write that is known by bytes of its parameters.
#[derive(Debug, Clone, Default)]
struct Snare(Arc<Mutex<Option<Armed>>>);

fn has(chunk: &[u8], bytes: &[u8]) -> bool {
    chunk.windows(bytes.len()).any(|part| part == bytes)
}

impl Snare {
    fn on(proxy: &Proxy) -> Self {
        let snare = Self::default();
        let shared = snare.clone();
        proxy.filter(move |direction, chunk| {
            let mut armed = shared.0.lock().unwrap();
            let Some(set) = armed.as_mut().filter(|_| direction == Direction::ToServer) else {
                return Action::Forward;
            };
            let is_it = set.mark.bytes.iter().all(|bytes| has(chunk, bytes));
            if is_it && set.mark.passes > 0 {
                set.mark.passes -= 1;
                return Action::Forward;
            }
            let springs = match set.mark.cut {
                Cut::Statement => is_it,
                Cut::Commit => {
                    let springs = set.is_in_transaction && has(chunk, b"COMMIT");
                    set.is_in_transaction |= is_it;
                    springs
                }
            };
            match springs {
                true => armed.take().map_or(Action::Forward, |set| set.action),
                false => Action::Forward,
            }
        });
        snare
    }

    fn arm(&self, mark: Mark, action: Action) {
        *self.0.lock().unwrap() = Some(Armed {
            mark,
            is_in_transaction: false,
            action,
        });
    }

    fn has_sprung(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }
}

/// What a test works with.
struct Rig {
    http: Http,
    /// Past the proxy.
    direct: PgConnection,
    snare: Snare,
    queue: Consumer,
    /// Before or after the write is forwarded.
    action: Action,
    /// Rises with every write.
    number: usize,
    /// Ids that were published, in `main`.
    published: Vec<String>,
    /// First answers that said that the outcome is not known.
    told_unknown: usize,
    /// The last one was such.
    was_unknown: bool,
}

impl Rig {
    /// Asks with the snare armed, again while the answer is 503, and gives the first other one.
    async fn cut(
        &mut self,
        mark: Mark,
        (method, path): (Method, &str),
        body: Option<&Value>,
    ) -> (StatusCode, Value) {
        self.snare.arm(mark, self.action);
        let first = self.http.call(method.clone(), path, body).await.unwrap();
        assert!(
            self.snare.has_sprung(),
            "{method} {path}: nothing was cut, and the answer is {first:?}"
        );
        self.was_unknown = first.0 == StatusCode::SERVICE_UNAVAILABLE;
        if !self.was_unknown {
            return first;
        }
        println!("{method} {path}: {}", first.1["type"]);
        self.told_unknown += 1;
        support::eventually(path, || async {
            let again = self.http.call(method.clone(), path, body).await.unwrap();
            (again.0 != StatusCode::SERVICE_UNAVAILABLE).then_some(again)
        })
        .await
    }

    /// Asks once more, with nothing cut.
    async fn again(
        &self,
        (method, path): (Method, &str),
        body: Option<&Value>,
    ) -> (StatusCode, Value) {
        self.http.call(method, path, body).await.unwrap()
    }

    async fn count(&mut self, text: &str) -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(text.to_owned()))
            .fetch_one(&mut self.direct)
            .await
            .unwrap()
    }

    /// A message in the queue, taken.
    async fn take_one(&mut self) -> Value {
        let id = self.next_id("plain");
        publish_ids(&self.http, "work.done", std::slice::from_ref(&id)).await;
        self.queue.take(1, 3_600).await.remove(0)
    }

    fn next_id(&mut self, kind: &str) -> String {
        let id = format!("{kind}-{:05}", self.number);
        self.published.push(id.clone());
        id
    }
}

/// As a parameter of a statement goes over the wire: its length, and the number.
fn bigint(number: i64) -> Vec<u8> {
    [&8_i32.to_be_bytes()[..], &number.to_be_bytes()].concat()
}

fn integer(number: i32) -> Vec<u8> {
    [&4_i32.to_be_bytes()[..], &number.to_be_bytes()].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_write_is_found_out_or_repeats_with_its_first_result() {
    let seed = size("POSTROAD_TEST_SEED", 20_261_122) as u64;
    let rounds = size("POSTROAD_TEST_AMBIGUOUS", 2);
    let mut dice = Dice::new(seed);
    let database = support::database().await;
    let mut direct = PgConnection::connect(&database.url).await.unwrap();
    // Numbers that look like no other parameter.
    let sequences = "select setval(pg_get_serial_sequence('postroad_broker.queue', 'id'), 7654321), \
        setval(pg_get_serial_sequence('postroad_broker.stream', 'id'), 76543), \
        setval(pg_get_serial_sequence('postroad_broker.rejected_message', 'id'), 8765432)";
    sqlx::query(sequences).execute(&mut direct).await.unwrap();
    let proxy = support::proxy(&database.url).await;
    let program = support::program(&proxy.url(&database.url), &[]).await;
    let work = json!({"topics": ["work.*"], "max_attempts": 16});
    let queue = Consumer::declare(&program.http, "work", &work).await;
    kinds::prepare(&program.http).await;
    let mut rig = Rig {
        http: program.http.clone(),
        direct,
        snare: Snare::on(&proxy),
        queue,
        action: Action::CutBefore,
        number: 0,
        published: Vec::new(),
        told_unknown: 0,
        was_unknown: false,
    };
    for round in 0..rounds {
        let mut left: Vec<Kind> = KINDS.to_vec();
        while !left.is_empty() {
            let kind = left.swap_remove(dice.roll(left.len() as u64) as usize);
            // Each kind both ways, in two rounds.
            rig.action = match (round + kind as usize).is_multiple_of(2) {
                true => Action::CutBefore,
                false => Action::CutAfter,
            };
            rig.number += 1;
            kind.run(&mut rig).await;
        }
    }
    let log = stream_ids(&rig.http, "main").await;
    let offsets: Vec<u64> = log.iter().map(|(offset, _)| *offset).collect();
    assert!(offsets.iter().copied().eq(1..=offsets.len() as u64));
    let mut ids: Vec<String> = log.into_iter().map(|(_, id)| id).collect();
    ids.sort();
    rig.published.sort();
    assert_eq!(ids, rig.published, "each message once");
    println!(
        "seed {seed}: {} ambiguous commits of {} kinds, 0 wrong; {} were answered as not known, and repeated",
        rig.number,
        KINDS.len(),
        rig.told_unknown
    );
}
