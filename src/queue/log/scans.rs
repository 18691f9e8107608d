//! Catch-up scans of the log, shared. While scans are under way the next requests gather, and one scan answers all that
//! look at about the same place of a stream; recent pages are kept for a while (`pages.rs`) for requests that come a little
//! later. A thousand queues that begin at the start of a stream, or ten thousand that come back after a restart, read it
//! about once.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use super::pages::Pages;
use crate::domain::name::{Topic, TopicPattern};
use crate::domain::topic_index::TopicIndex;
use crate::queue::metrics::Metrics;
use crate::queue::options::QUEUES_MAX;
use crate::stream::{self, Scan, ScanItem, Scanned};
use crate::supervisor::Supervisor;

/// Scans of the log at a time, for all queues: at least one of the stream's readers is left for payloads.
const RUNNING_MAX: usize = 2;
/// Items of a shared scan. More than [`BEHIND_MAX`], so that a scan always gets as far as the request that began it.
const SHARED_ITEMS: usize = 20_000;
/// A scan begins up to this many offsets earlier, if somebody looks there.
const BEHIND_MAX: i64 = 10_000;
/// Somebody who looks further ahead than this does not join.
const AHEAD_MAX: i64 = 50_000;
/// With more patterns than this a shared scan looks at all topics: to find the topics of each would cost more.
const PATTERNS_MAX: usize = 64;

type Reply = oneshot::Sender<Result<Scanned, stream::Error>>;

#[derive(Debug)]
struct Request {
    scan: Scan,
    reply: Reply,
}

/// The way to the scanner. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::queue) struct Scans {
    requests: mpsc::Sender<Request>,
}

/// The task that scans for all queues.
pub(in crate::queue) struct Scanner {
    stream: stream::Handle,
    metrics: Metrics,
    supervisor: Supervisor,
    requests: mpsc::Receiver<Request>,
}

impl Scans {
    pub(in crate::queue) fn new(
        stream: stream::Handle,
        metrics: Metrics,
        supervisor: Supervisor,
    ) -> (Self, Scanner) {
        let (sender, requests) = mpsc::channel(QUEUES_MAX);
        let scanner = Scanner {
            stream,
            metrics,
            supervisor,
            requests,
        };
        (Self { requests: sender }, scanner)
    }

    /// The matching messages after an offset. The log is read after the call, so everything committed before it is seen.
    ///
    /// # Errors
    /// The database's. [`stream::Error::Stopping`] also when the scan was shared and another caller learns what failed.
    pub(in crate::queue) async fn scan(&self, scan: Scan) -> Result<Scanned, stream::Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.requests.send(Request { scan, reply }).await;
        sent.map_err(|_| stream::Error::Stopping)?;
        answer.await.map_err(|_| stream::Error::Stopping)?
    }
}

/// A scan that ended, and for whom it was.
type Ended = (Scan, Vec<Request>, Result<Scanned, stream::Error>);
type Running = FuturesUnordered<Pin<Box<dyn Future<Output = Ended> + Send>>>;

impl Scanner {
    pub(in crate::queue) async fn run(mut self) {
        let mut pending: VecDeque<Request> = VecDeque::new();
        let mut running = Running::new();
        let mut pages = Pages::default();
        loop {
            while running.len() < RUNNING_MAX
                && let Some(members) = gather(&mut pending)
            {
                self.start(members, &pages, &running);
            }
            let forget_at = pages.forget_at();
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => {
                        self.take(request, &mut pages, &mut pending);
                        while let Ok(request) = self.requests.try_recv() {
                            self.take(request, &mut pages, &mut pending);
                        }
                    }
                    None => return,
                },
                Some((scan, members, scanned)) = running.next() => {
                    if let Ok(scanned) = &scanned {
                        pages.keep(&scan, scanned);
                    }
                    share(members, scanned, &mut pending);
                    for request in std::mem::take(&mut pending) {
                        self.take(request, &mut pages, &mut pending);
                    }
                }
                () = tokio::time::sleep_until(forget_at) => pages.forget_unused(),
                () = self.supervisor.stopping() => return,
            }
        }
    }

    /// Answers from recent pages, if they reach further.
    fn take(&self, request: Request, pages: &mut Pages, pending: &mut VecDeque<Request>) {
        match pages.find(&request.scan) {
            Some(page) => {
                self.metrics.scans_answered.inc();
                let members = [request];
                let mut shares = divide(&members, page.items());
                let [request] = members;
                let _ = request.reply.send(Ok(Scanned {
                    items: shares.pop().unwrap_or_default(),
                    through: page.through(),
                }));
            }
            None => pending.push_back(request),
        }
    }

    fn start(&self, members: Vec<Request>, pages: &Pages, running: &Running) {
        let mut scan = together(&members);
        if pages.are_many_interested(&scan) {
            scan.topics.clear();
            scan.max_items = SHARED_ITEMS;
        }
        self.metrics.scans.inc();
        self.metrics.scans_answered.inc_by(members.len() as u64);
        let stream = self.stream.clone();
        running.push(Box::pin(async move {
            let scanned = stream.scan(scan.clone()).await;
            (scan, members, scanned)
        }));
    }
}

/// Takes out who has waited longest, and who looks at about the same place.
fn gather(pending: &mut VecDeque<Request>) -> Option<Vec<Request>> {
    pending.retain(|request| !request.reply.is_closed());
    let first = &pending.front()?.scan;
    let (stream, at) = (first.stream, first.after.0);
    let near = |scan: &Scan, from: i64, to: i64| {
        scan.stream == stream && (from..=to).contains(&scan.after.0)
    };
    let behind = pending.iter().map(|request| &request.scan);
    let behind = behind.filter(|scan| near(scan, at.saturating_sub(BEHIND_MAX), at));
    let base = behind.map(|scan| scan.after.0).min().unwrap_or(at);
    let (members, others) = std::mem::take(pending)
        .into_iter()
        .partition(|request| near(&request.scan, base, base.saturating_add(AHEAD_MAX)));
    *pending = others;
    Some(Vec::from(members))
}

/// One scan for all.
fn together(members: &[Request]) -> Scan {
    let first = &members[0].scan;
    if members.len() == 1 {
        return first.clone();
    }
    let after = members.iter().map(|member| member.scan.after).min();
    let mut patterns: BTreeSet<&TopicPattern> = BTreeSet::new();
    for member in members {
        patterns.extend(&member.scan.topics);
        if member.scan.topics.is_empty() || patterns.len() > PATTERNS_MAX {
            patterns.clear();
            break;
        }
    }
    Scan {
        stream: first.stream,
        after: after.unwrap_or(first.after),
        topics: patterns.into_iter().cloned().collect(),
        max_items: SHARED_ITEMS,
    }
}

/// Answers each member with its share. Who looks beyond where the scan came waits for the next one.
fn share(
    members: Vec<Request>,
    scanned: Result<Scanned, stream::Error>,
    pending: &mut VecDeque<Request>,
) {
    let scanned = match scanned {
        Ok(scanned) => scanned,
        Err(error) => {
            // The others' senders are dropped: they try again later, like the first.
            if let Some(first) = members.into_iter().next() {
                let _ = first.reply.send(Err(error));
            }
            return;
        }
    };
    let shares = divide(&members, &scanned.items);
    let base = members.iter().map(|member| member.scan.after).min();
    for (member, items) in members.into_iter().zip(shares) {
        // No further than `after` means the end of the stream, which is only true for who was the first of all.
        if member.scan.after >= scanned.through && Some(member.scan.after) > base {
            pending.push_back(member);
            continue;
        }
        let _ = member.reply.send(Ok(Scanned {
            items,
            through: scanned.through,
        }));
    }
}

/// Divides a scan's findings among its members.
fn divide(members: &[Request], items: &[ScanItem]) -> Vec<Vec<ScanItem>> {
    let mut index = TopicIndex::default();
    let mut all = Vec::new();
    for (place, member) in members.iter().enumerate() {
        if member.scan.topics.is_empty() {
            all.push(place);
        }
        for pattern in &member.scan.topics {
            index.insert(pattern, place);
        }
    }
    let mut shares = vec![Vec::new(); members.len()];
    let mut topics: HashMap<&Topic, Vec<usize>> = HashMap::new();
    for item in items {
        let takers = topics
            .entry(&item.topic)
            .or_insert_with(|| [index.matching(&item.topic), all.clone()].concat());
        for &place in takers.iter() {
            if item.offset > members[place].scan.after {
                shares[place].push(item.clone());
            }
        }
    }
    shares
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::domain::id::{Offset, StreamId};
    use crate::domain::message::Priority;

    type Answer = oneshot::Receiver<Result<Scanned, stream::Error>>;

    fn request(stream: i32, after: i64, topics: &[&str]) -> (Request, Answer) {
        let (reply, answer) = oneshot::channel();
        let topics = topics
            .iter()
            .map(|text| TopicPattern::parse(text).unwrap())
            .collect();
        let scan = Scan {
            stream: StreamId(stream),
            after: Offset(after),
            topics,
            max_items: 10_000,
        };
        (Request { scan, reply }, answer)
    }

    fn places(members: &[Request]) -> Vec<i64> {
        members.iter().map(|member| member.scan.after.0).collect()
    }

    #[test]
    fn who_looks_at_about_the_same_place_goes_together() {
        let mut answers = Vec::new();
        let mut pending = VecDeque::new();
        for (stream, after) in [
            (1, 20_000),
            (2, 20_000),
            (1, 15_000),
            (1, 9_999),
            (1, 60_000),
            (1, 65_001),
            (1, 20_000),
        ] {
            let (request, answer) = request(stream, after, &["a"]);
            pending.push_back(request);
            answers.push(answer);
        }
        let mut next = || places(&gather(&mut pending).unwrap_or_default());
        assert_eq!(next(), [20_000, 15_000, 60_000, 20_000]);
        assert_eq!(next(), [20_000]);
        assert_eq!(next(), [9_999]);
        assert_eq!(next(), [65_001]);
        assert_eq!(next(), [0; 0]);
    }

    #[test]
    fn who_is_gone_is_not_scanned_for() {
        let (request, answer) = request(1, 0, &["a"]);
        drop(answer);
        let mut pending = VecDeque::from([request]);
        assert!(gather(&mut pending).is_none());
    }

    #[test]
    fn each_gets_what_it_would_have_found_alone() {
        let topics = ["a", "a.b", "b", "a.c"];
        let items: Vec<ScanItem> = (101..=200)
            .map(|offset| ScanItem {
                offset: Offset(offset),
                topic: Topic::parse(topics[offset as usize % 4]).unwrap(),
                key_hash: None,
                priority: Priority::default(),
                bytes: 1,
            })
            .collect();
        let asked: [(i64, &[&str]); 6] = [
            (100, &["a.*"]),
            (150, &["a.*", "a.b", "b"]),
            (100, &[]),
            (120, &["x"]),
            (200, &[">"]),
            (300, &[">"]),
        ];
        let (members, answers): (Vec<_>, Vec<_>) = asked
            .iter()
            .map(|(after, topics)| request(1, *after, topics))
            .unzip();
        let scan = together(&members);
        assert_eq!((scan.after, scan.topics.len()), (Offset(100), 0));
        let scanned = Scanned {
            items: items.clone(),
            through: Offset(200),
        };
        let mut pending = VecDeque::new();
        share(members, Ok(scanned), &mut pending);
        assert_eq!(places(pending.make_contiguous()), [200, 300]);
        for ((after, patterns), mut answer) in asked.iter().zip(answers) {
            let Ok(answer) = answer.try_recv() else {
                assert!(*after >= 200);
                continue;
            };
            let answer = answer.unwrap();
            let patterns: Vec<_> = patterns
                .iter()
                .map(|text| TopicPattern::parse(text).unwrap())
                .collect();
            let expected = items.iter().filter(|item| {
                item.offset.0 > *after
                    && (patterns.is_empty() || patterns.iter().any(|p| p.matches(&item.topic)))
            });
            let expected: Vec<_> = expected.cloned().collect();
            assert_eq!((answer.items, answer.through), (expected, Offset(200)));
        }
    }

    #[test]
    fn a_failure_is_told_once() {
        let (members, mut answers): (Vec<_>, Vec<_>) =
            [request(1, 0, &["a"]), request(1, 0, &["b"])]
                .into_iter()
                .unzip();
        share(
            members,
            Err(stream::Error::MainIsKept),
            &mut VecDeque::new(),
        );
        assert!(answers[0].try_recv().unwrap().is_err());
        assert!(answers[1].try_recv().is_err(), "its sender is dropped");
    }
}
