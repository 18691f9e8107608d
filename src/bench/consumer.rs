//! Consumers of a queue over HTTP, and of the table queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::Error;
use super::load::Shared;
use super::options::Ack;
use super::tracker::Came;
use super::wire;
use crate::store::{self, Connection};

/// How long a consumer of the table queue waits when it found nothing.
const POLL: Duration = Duration::from_millis(5);
/// How long a receive waits at the broker.
const WAIT_SECONDS: u32 = 20;
/// The same when it carries acks, whose answer comes with its own.
const WAIT_WITH_ACKS_SECONDS: u32 = 1;

/// The parts of a receive's answer that are read; the rest is skipped.
#[derive(Deserialize)]
struct Received<'a> {
    ack: Option<Settled>,
    #[serde(borrow)]
    deliveries: Vec<Delivery<'a>>,
}

#[derive(Deserialize)]
struct Delivery<'a> {
    #[serde(borrow)]
    receipt: &'a str,
    offset: i64,
    #[serde(borrow)]
    event: Event<'a>,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow)]
    id: &'a str,
    #[serde(borrow)]
    partitionkey: Option<&'a str>,
}

impl Event<'_> {
    /// The key's number.
    fn key(&self) -> Option<usize> {
        self.partitionkey?.strip_prefix('k')?.parse().ok()
    }
}

/// The part of an ack's answer that is read.
#[derive(Deserialize)]
struct Settled {
    settled: u64,
    refused: u64,
}

/// A consumer over HTTP.
pub(super) struct Consumer {
    pub(super) shared: Arc<Shared>,
    /// Among the queues of the round.
    pub(super) queue: usize,
    pub(super) queue_name: String,
    pub(super) connection: wire::Connection,
}

impl Consumer {
    /// Receives and acks until the round is done.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        let receive = format!("/v1/queues/{}/receive", self.queue_name);
        let ack = format!("/v1/queues/{}/ack", self.queue_name);
        let (mut request, mut receipts) = (Vec::new(), Vec::new());
        loop {
            let is_with_acks = !receipts.is_empty();
            put_receive(&mut request, self.shared.pace.receive, &receipts);
            receipts.clear();
            let answer = tokio::select! {
                biased;
                // A receive cut off half-way takes its connection with it: this consumer is over.
                () = self.shared.done.cancelled() => return Ok(()),
                answer = self.connection.post(&receive, JSON, &request) => answer?,
            };
            let acked = take(&self.shared, self.queue, answer, &receive, &mut receipts)?;
            if is_with_acks {
                let odd = || wire::Error::Answer {
                    path: receive.clone(),
                    what: "it has no results for the acks".to_owned(),
                };
                self.note(&acked.ok_or_else(odd)?);
            }
            if receipts.is_empty() || self.shared.pace.ack == Ack::WithReceive {
                continue;
            }
            request.clear();
            put_receipts(&mut request, "{\"deliveries\":[", &receipts);
            request.push(b'}');
            receipts.clear();
            let answer = self.connection.post(&ack, JSON, &request).await?;
            let settled: Settled = parse(answer, &ack)?;
            self.note(&settled);
        }
    }

    fn note(&self, settled: &Settled) {
        self.shared.settled(settled.settled);
        self.shared.tracker.refused(settled.refused);
    }
}

/// A receive's body, with the acks of what came before.
fn put_receive(body: &mut Vec<u8>, batch: u32, receipts: &[u8]) {
    let wait = match receipts.is_empty() {
        true => WAIT_SECONDS,
        false => WAIT_WITH_ACKS_SECONDS,
    };
    body.clear();
    body.extend_from_slice(
        format!("{{\"max_messages\":{batch},\"wait_seconds\":{wait}").as_bytes(),
    );
    if !receipts.is_empty() {
        put_receipts(body, ",\"ack\":[", receipts);
    }
    body.push(b'}');
}

fn put_receipts(body: &mut Vec<u8>, head: &str, receipts: &[u8]) {
    body.extend_from_slice(head.as_bytes());
    body.extend_from_slice(receipts);
    body.push(b']');
}

const JSON: &str = "content-type: application/json\r\n";

fn parse<'a, T: Deserialize<'a>>(answer: &'a [u8], path: &str) -> Result<T, Error> {
    serde_json::from_slice(answer).map_err(|error| {
        let what = error.to_string();
        let path = path.to_owned();
        wire::Error::Answer { path, what }.into()
    })
}

/// Books what came, puts its receipts down for the ack, and gives what became of the acks that the receive carried.
fn take(
    shared: &Shared,
    queue: usize,
    answer: &[u8],
    path: &str,
    receipts: &mut Vec<u8>,
) -> Result<Option<Settled>, Error> {
    let at = Instant::now();
    let received: Received<'_> = parse(answer, path)?;
    if received.deliveries.is_empty() {
        return Ok(received.ack);
    }
    let mut times = Vec::with_capacity(received.deliveries.len());
    for delivery in &received.deliveries {
        if !receipts.is_empty() {
            receipts.push(b',');
        }
        receipts.extend_from_slice(b"{\"receipt\":\"");
        receipts.extend_from_slice(delivery.receipt.as_bytes());
        receipts.extend_from_slice(b"\"}");
        // An id of somebody else's is that of no producer.
        let (producer, number) =
            identity(&shared.run, delivery.event.id).unwrap_or((usize::MAX, 0));
        let came = Came {
            queue,
            producer,
            number,
            offset: delivery.offset,
            key: delivery.event.key(),
        };
        times.extend(shared.tracker.came(&came, at));
    }
    for delivery in &received.deliveries {
        shared.tracker.settling(queue, delivery.event.key());
    }
    shared.series.came(at, &times);
    Ok(received.ack)
}

/// Producer and number of an id of this run.
fn identity(run: &str, id: &str) -> Option<(usize, u64)> {
    let rest = id.strip_prefix(run)?.strip_prefix('-')?;
    let (producer, number) = rest.split_once('-')?;
    Some((producer.parse().ok()?, number.parse().ok()?))
}

/// A consumer of the table queue: claims, and deletes what it has claimed.
pub(super) async fn run_lease(
    shared: Arc<Shared>,
    mut connection: Connection,
) -> Result<(), Error> {
    let most = i32::try_from(shared.pace.receive).unwrap_or(i32::MAX);
    while !shared.done.is_cancelled() {
        let claimed = store::bench::claim(&mut connection, most).await?;
        let at = Instant::now();
        if claimed.is_empty() {
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = shared.done.cancelled() => {}
            }
            continue;
        }
        let mut times = Vec::with_capacity(claimed.len());
        let mut ids = Vec::with_capacity(claimed.len());
        for row in &claimed {
            let came = Came {
                queue: 0,
                producer: usize::try_from(row.producer).unwrap_or(usize::MAX),
                number: row.number.unsigned_abs(),
                offset: row.id,
                key: None,
            };
            times.extend(shared.tracker.came(&came, at));
            ids.push(row.id);
        }
        shared.series.came(at, &times);
        let deleted = store::bench::delete(&mut connection, &ids).await?;
        shared
            .tracker
            .refused(ids.len() as u64 - deleted.min(ids.len() as u64));
        shared.settled(deleted);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::identity;

    #[test]
    fn an_id_names_producer_and_number() {
        assert_eq!(identity("ab", "ab-3-12"), Some((3, 12)));
        for id in ["ac-3-12", "ab-3", "ab3-12", "ab-x-1", "", "ab--"] {
            assert_eq!(identity("ab", id), None, "{id}");
        }
    }
}
